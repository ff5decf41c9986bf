"""surflow: SurVAE flows as a PyTorch library (Nielsen et al. 2020, arXiv 2007.02731).

``surflow.transforms``, ``surflow.distributions`` and ``surflow.flow`` are the library and import
nothing but torch; ``surflow.cli`` is the Hydra pipeline that reproduces the papers' tables.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("surflow")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
