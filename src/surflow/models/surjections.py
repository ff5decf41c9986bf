"""Surjections of vectors whose nets fit the data: functions of the shape of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from surflow.errors import check_choice
from surflow.transforms import AbsInference, DihedralFold, Transform

Net = Callable[..., nn.Module]
"""``net(in_features=..., out_features=...)`` makes a net."""


def with_net(
    shape: Sequence[int],
    layer: Callable[..., Transform],
    net: Net,
    out_features: int | None = None,
) -> Transform:
    """``layer(shape, net=...)`` with a net of the features of a row and ``out_features`` outputs;
    None: as many.
    """
    features = math.prod(shape)
    outputs = features if out_features is None else out_features
    return layer(shape, net=net(in_features=features, out_features=outputs))


def symmetry(shape: Sequence[int], kind: str, sign_net: Net) -> Transform:
    """The absolute value that fits a symmetry of 2-D data.

    Args:
        shape: of a row.
        kind: symmetric (both coordinates, fair signs), antisymmetric (the first coordinate, its
            sign learned) or dihedral (all eight symmetries of the square).
        sign_net: makes the net of the antisymmetric one.

    Raises:
        ValueError: for another kind.
    """
    check_choice("surjection.kind", kind, ("symmetric", "antisymmetric", "dihedral"))
    if kind == "dihedral":
        return DihedralFold()
    if kind == "symmetric":
        return AbsInference(shape, probability=0.5)
    net = sign_net(in_features=math.prod(shape), out_features=1)
    return AbsInference(shape, element=0, net=net)
