"""Neural nets; nothing probabilistic in here."""

from surflow.nets.lipschitz import LipschitzMLP
from surflow.nets.made import MADE, MaskedLinear
from surflow.nets.mlp import ACTIVATIONS, MLP, FourierFeatures, make_activation

__all__ = [
    "ACTIVATIONS",
    "MADE",
    "MLP",
    "FourierFeatures",
    "LipschitzMLP",
    "MaskedLinear",
    "make_activation",
]
