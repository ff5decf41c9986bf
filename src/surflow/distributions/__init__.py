"""Densities: bases of flows, and conditionals inside stochastic layers."""

from surflow.distributions.base import Distribution
from surflow.distributions.discrete import Bernoulli, Categorical
from surflow.distributions.location_scale import (
    DiagonalNormal,
    HalfNormal,
    LocationScale,
    Logistic,
    StandardNormal,
)
from surflow.distributions.mixture import DiagonalNormalMixture, Mixture
from surflow.distributions.uniform import Uniform

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagonalNormal",
    "DiagonalNormalMixture",
    "Distribution",
    "HalfNormal",
    "LocationScale",
    "Logistic",
    "Mixture",
    "StandardNormal",
    "Uniform",
]
