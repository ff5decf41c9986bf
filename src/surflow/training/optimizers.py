"""Optimizers, where an experiment needs more than one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

ALGORITHMS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
}


def one_of(
    params: Iterable[Any], algorithm: str, lr: float, options: Mapping[str, Mapping[str, Any]]
) -> Optimizer:
    """The optimizer of that name, with its own options.

    Args:
        params: parameters, or groups of them.
        algorithm: adam or rmsprop.
        lr: the learning rate.
        options: keyword arguments of each algorithm; none of one that is not there.

    Raises:
        ValueError: for another name.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"optimizer.algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}"
        )
    return ALGORITHMS[algorithm](params, lr=lr, **options.get(algorithm, {}))
