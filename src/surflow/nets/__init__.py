"""Neural nets; nothing probabilistic in here."""

from surflow.nets.mlp import ACTIVATIONS, MLP, FourierFeatures, make_activation

__all__ = ["ACTIVATIONS", "MLP", "FourierFeatures", "make_activation"]
