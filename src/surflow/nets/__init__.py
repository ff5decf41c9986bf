"""Neural nets; nothing probabilistic in here."""

from surflow.nets.densenet import DenseBlock, DenseLayer, DenseNet, GatedConv2d, ImageEmbedding
from surflow.nets.lipschitz import LipschitzMLP
from surflow.nets.made import MADE, MaskedLinear
from surflow.nets.mlp import ACTIVATIONS, MLP, FourierFeatures, make_activation

__all__ = [
    "ACTIVATIONS",
    "MADE",
    "MLP",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "FourierFeatures",
    "GatedConv2d",
    "ImageEmbedding",
    "LipschitzMLP",
    "MaskedLinear",
    "make_activation",
]
