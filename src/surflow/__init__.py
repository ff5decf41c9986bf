"""SurVAE flows in PyTorch: bijections, surjections and stochastic layers under one contract
(Nielsen et al. 2020, arXiv 2007.02731).

>>> import surflow
>>> from surflow.distributions import StandardNormal
>>> from surflow.transforms import AbsInference, Inverse, Softplus
>>> flow = surflow.Flow(StandardNormal(2), [AbsInference(2), Inverse(Softplus())])
>>> flow.lower_bound
False
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from surflow.portable import fix_kernels, portable

if portable():
    fix_kernels()
try:
    __version__ = version("surflow")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_PLACES = {
    "Flow": "flow",
    "FlowDistribution": "flow",
    "bits_per_dim": "objectives",
    "elbo": "objectives",
    "iwbo": "objectives",
}

__all__ = ["Flow", "FlowDistribution", "__version__", "bits_per_dim", "elbo", "iwbo"]


def __getattr__(name: str) -> object:
    """Import a name of the face when it is asked for: ``surflow.reporting`` needs no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'surflow' has no attribute {name!r}")
    return getattr(import_module(f"surflow.{_PLACES[name]}"), name)
