"""Transforms: bijections, surjections and stochastic layers under one contract."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from surflow.checks import check_values
from surflow.transforms.base import Example, Inverse, Sequential, Transform
from surflow.transforms.bijections.actnorm import ActNorm
from surflow.transforms.bijections.affine import AdditiveMap, Affine, AffineMap
from surflow.transforms.bijections.box import BoxToReal
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
from surflow.transforms.bijections.mixtures import LogisticMixtureMap
from surflow.transforms.bijections.permute import Permute, Reverse, Rotation
from surflow.transforms.bijections.splines import RationalQuadraticSpline
from surflow.transforms.maps import ElementwiseMap
from surflow.transforms.stochastic.vae import VAE
from surflow.transforms.surjections.abs import AbsGenerative, AbsInference
from surflow.transforms.surjections.dihedral import DihedralFold

__all__ = [
    "VAE",
    "AbsGenerative",
    "AbsInference",
    "ActNorm",
    "AdditiveCoupling",
    "AdditiveMap",
    "Affine",
    "AffineCoupling",
    "AffineMap",
    "BoxToReal",
    "Coupling",
    "DihedralFold",
    "Elementwise",
    "ElementwiseMap",
    "Example",
    "Exp",
    "Inverse",
    "LeakyReLU",
    "Log",
    "LogisticMixtureCoupling",
    "LogisticMixtureMap",
    "Logit",
    "Permute",
    "RationalQuadraticSpline",
    "RationalQuadraticSplineCoupling",
    "Reverse",
    "Rotation",
    "Sequential",
    "Sigmoid",
    "Softplus",
    "SoftplusInverse",
    "Tanh",
    "Transform",
    "catalogue",
    "check_values",
]


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
