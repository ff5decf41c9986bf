"""Transforms: bijections, surjections and stochastic layers under one contract."""

import importlib
import inspect
import pkgutil

from surflow.checks import check_values
from surflow.transforms.base import Bijection, Example, Surjection, Transform
from surflow.transforms.bijections.actnorm import ActNorm
from surflow.transforms.bijections.affine import AdditiveMap, Affine, AffineMap
from surflow.transforms.bijections.autoregressive import (
    Autoregressive,
    MaskedAffineAutoregressive,
    MaskedLogisticMixtureAutoregressive,
    MaskedSplineAutoregressive,
)
from surflow.transforms.bijections.batch_norm import BatchNorm
from surflow.transforms.bijections.box import BoxToReal
from surflow.transforms.bijections.continuous import Continuous
from surflow.transforms.bijections.convolution import Conv1x1, PeriodicConv2d
from surflow.transforms.bijections.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    LogisticMixtureCoupling,
    RationalQuadraticSplineCoupling,
)
from surflow.transforms.bijections.elementwise import (
    Elementwise,
    Exp,
    LeakyReLU,
    Log,
    Logit,
    Sigmoid,
    Softplus,
    SoftplusInverse,
    Tanh,
)
from surflow.transforms.bijections.haar import Haar
from surflow.transforms.bijections.linear import FullLinear, HouseholderLinear, PLULinear, QRLinear
from surflow.transforms.bijections.masks import channel_mask, checkerboard_mask
from surflow.transforms.bijections.mixtures import LogisticMixtureMap
from surflow.transforms.bijections.ordered import OrderedToReal, RunningMaxToReal
from surflow.transforms.bijections.permute import Permute, Reverse, Rotation
from surflow.transforms.bijections.planar import Planar
from surflow.transforms.bijections.radial import Radial
from surflow.transforms.bijections.residual import Residual
from surflow.transforms.bijections.splines import RationalQuadraticSpline
from surflow.transforms.bijections.squeeze import Squeeze, Unsqueeze
from surflow.transforms.bijections.sylvester import Sylvester
from surflow.transforms.inverse import Inverse
from surflow.transforms.maps import ElementwiseMap
from surflow.transforms.sequential import Sequential
from surflow.transforms.stochastic.indexed import DiscretelyIndexed
from surflow.transforms.stochastic.permutation import StochasticPermutation
from surflow.transforms.stochastic.vae import VAE
from surflow.transforms.surjections.abs import AbsGenerative, AbsInference
from surflow.transforms.surjections.argmax import (
    ArgmaxGenerative,
    ArgmaxInference,
    BinaryArgmaxGenerative,
    BinaryArgmaxInference,
    GumbelArgmaxGenerative,
    GumbelArgmaxInference,
)
from surflow.transforms.surjections.dihedral import DihedralFold
from surflow.transforms.surjections.interval_fold import IntervalFold
from surflow.transforms.surjections.max import MaxGenerative, MaxInference
from surflow.transforms.surjections.max_pool import MaxPool2d, MaxPool2dGenerative
from surflow.transforms.surjections.relu import ReLUGenerative, ReLUInference
from surflow.transforms.surjections.rounding import Dequantization, Rounding
from surflow.transforms.surjections.slicing import Augment, Slice
from surflow.transforms.surjections.sort import SortGenerative, SortInference


def catalogue() -> list[type[Transform]]:
    """Every concrete transform under ``surflow.transforms``, found by itself, by name."""
    found: dict[str, type[Transform]] = {}
    for module_info in pkgutil.walk_packages(__path__, __name__ + "."):
        module = importlib.import_module(module_info.name)
        for name, cls in vars(module).items():
            if (
                inspect.isclass(cls)
                and issubclass(cls, Transform)
                and cls.__module__ == module.__name__
                and not inspect.isabstract(cls)
                and not name.startswith("_")
            ):
                found[name] = cls
    return [found[name] for name in sorted(found)]


__all__ = [
    name for name, value in list(vars().items()) if name[0] != "_" and not inspect.ismodule(value)
]
