"""Optimizers, where an experiment needs more than one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from surflow.errors import check_choice


def one_of(
    params: Iterable[Any],
    algorithm: str,
    lr: float,
    options: Mapping[str, Callable[..., Optimizer]],
) -> Optimizer:
    """The optimizer that ``options`` has under a name.

    Args:
        params: parameters, or groups of them.
        algorithm: a name of ``options``.
        lr: the learning rate.
        options: functions (params, lr=...) -> optimizer, by name.

    Raises:
        ValueError: for another name.
    """
    check_choice("optimizer.algorithm", algorithm, options)
    return options[algorithm](params, lr=lr)
