"""Densities: bases of flows, and conditionals inside stochastic layers."""

import inspect

from surflow.distributions.autoregressive import AutoregressiveBernoulli
from surflow.distributions.base import Distribution
from surflow.distributions.channel_autoregressive import ChannelAutoregressive
from surflow.distributions.discrete import Bernoulli, Categorical
from surflow.distributions.gumbel import Gumbel
from surflow.distributions.location_scale import (
    DiagonalNormal,
    HalfNormal,
    LocationScale,
    Logistic,
    StandardNormal,
)
from surflow.distributions.mixture import DiagonalNormalMixture, Mixture
from surflow.distributions.order import OrderStatistics, PlackettLuce
from surflow.distributions.truncated import Exponential, TruncatedNormal, ZeroInflated
from surflow.distributions.uniform import Uniform
from surflow.distributions.unit_interval import LogitLogistic

__all__ = [
    name for name, value in list(vars().items()) if name[0] != "_" and not inspect.ismodule(value)
]
