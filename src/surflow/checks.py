"""Checks of arguments and of tensor values, and the error that a layer puts its name to."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator

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


class InputError(ValueError):
    """What a layer expected and what it got; its public method adds 'Layer.method: '."""


def require(ok: Tensor, expected: str, got: Tensor, where: str | None = None) -> None:
    """Raise an error unless every element of ``ok`` holds.

    Args:
        ok: boolean tensor, any shape.
        expected: what would be right.
        got: the values that came; their range goes into the message.
        where: the function that checks, outside layers and distributions.

    Raises:
        InputError: which a layer names; with ``where`` a ValueError.
    """
    if not values_are_checked() or bool(ok.all()):
        return
    bad = got.detach().broadcast_to(ok.shape)[~ok].double()  # not every integer has a minimum
    message = (
        f"expected {expected}, got {bad.numel()} values outside it, "
        f"from {bad.min().item():.6g} to {bad.max().item():.6g}"
    )
    raise InputError(message) if where is None else ValueError(f"{where}: {message}")


def require_at_least(owner: str, least: int, **values: float) -> None:
    """Raise ``ValueError`` for the first of a constructor's arguments below ``least``.

    An owner such as ``model.`` is a group of the config: the message begins with the key.
    """
    for name, value in values.items():
        if value < least:
            where = owner + name if owner.endswith(".") else owner
            raise ValueError(f"{where}: expected {name} >= {least}, got {value}")


def require_positive(owner: str, **values: float | Tensor) -> None:
    """Raise ``ValueError`` for the first of a constructor's arguments that is not positive."""
    for name, value in values.items():
        if not bool((torch.as_tensor(value) > 0).all()):
            got = value.tolist() if isinstance(value, Tensor) else value
            raise ValueError(f"{owner}: expected {name} > 0, got {got}")


def require_fraction(owner: str, **values: float | Tensor) -> None:
    """Raise ``ValueError`` for the first of a constructor's arguments outside (0, 1)."""
    for name, value in values.items():
        given = torch.as_tensor(value)
        if not bool(((given > 0) & (given < 1)).all()):
            got = value.tolist() if isinstance(value, Tensor) else value
            raise ValueError(f"{owner}: expected 0 < {name} < 1, got {got}")


def require_one_of(owner: str, known: Iterable[str], **values: str) -> None:
    """Raise ``ValueError``, which lists what is known, for an unknown option."""
    for name, value in values.items():
        if value not in known:
            names = ", ".join(known)
            raise ValueError(f"{owner}: expected {name} to be one of {names}, got {value!r}")


def require_positive_sizes(owner: str, **sizes: int) -> None:
    """Raise ``ValueError``, which lists all sizes, unless each is positive."""
    if min(sizes.values()) < 1:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"{owner}: expected positive sizes, got {given}")
