"""Checks of tensor values: support and range, at the layer to which a wrong value came."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor

_CHECK_VALUES: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "surflow_check_values", default=True
)


@contextlib.contextmanager
def check_values(enabled: bool) -> Iterator[None]:
    """Switch the checks that must read tensor values (support, range) on or off.

    They are on by default and always off inside ``torch.compile``. Reading a value makes a GPU
    wait, so a training loop checks its first batch and switches them off for the others. Checks
    of shape and dtype cost nothing and stay on.
    """
    token = _CHECK_VALUES.set(enabled)
    try:
        yield
    finally:
        _CHECK_VALUES.reset(token)


def values_are_checked() -> bool:
    """Whether value checks run now."""
    return not torch.compiler.is_compiling() and _CHECK_VALUES.get()


def require(ok: Tensor, where: str, expected: str, got: Tensor) -> None:
    """Raise ``ValueError`` unless every element of ``ok`` holds.

    Args:
        ok: boolean tensor, any shape.
        where: the layer and method that found it.
        expected: what would be right.
        got: the values that came; their range goes into the message.
    """
    if not values_are_checked() or bool(ok.all()):
        return
    bad = got.detach().broadcast_to(ok.shape)[~ok].double()  # not every integer has a minimum
    raise ValueError(
        f"{where}: expected {expected}, got {bad.numel()} values outside it, "
        f"from {bad.min().item():.6g} to {bad.max().item():.6g}"
    )
