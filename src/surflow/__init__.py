"""SurVAE flows in PyTorch: bijections, surjections and stochastic layers under one contract.

>>> import surflow
>>> from surflow.distributions import StandardNormal
>>> from surflow.transforms import AbsInference, Softplus, Inverse
>>> flow = surflow.Flow(StandardNormal(2), [AbsInference(2), Inverse(Softplus())])
>>> flow.lower_bound
False
"""

from importlib.metadata import PackageNotFoundError, version

from surflow.flow import Flow, FlowDistribution
from surflow.objectives import bits_per_dim, elbo, iwbo

try:
    __version__ = version("surflow")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"

__all__ = ["Flow", "FlowDistribution", "bits_per_dim", "elbo", "iwbo"]
