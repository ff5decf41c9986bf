"""A proof, the decorator that makes one of a check, and what the checks share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surflow.transforms.base import Example, Transform
from surflow.transforms.inverse import Inverse

Measured = dict[str, float]
OFF = "{name}: off by {gap:.3g}, allowed {tolerance:.3g}"


@dataclass(frozen=True)
class Proof:
    """The outcome of one check.

    Attributes:
        ok: whether the property holds; True also where it does not apply.
        message: one sentence, with the numbers where there are any.
        measured: the numbers by name.
        applies: False where the kind of the transform makes the check meaningless.
    """

    check: str
    ok: bool
    message: str
    measured: Measured = field(default_factory=dict)
    applies: bool = True


class _Ended(Exception):
    """The end of a check before its last line; the arguments are those of its proof."""


def expect(ok: bool, message: str, **measured: float) -> None:
    """Fail the check unless ``ok``."""
    if not ok:
        raise _Ended(False, message, measured)


def applies_where(applies: bool, reason: str) -> None:
    """End the check as one that does not apply, unless it does."""
    if not applies:
        raise _Ended(True, reason, {}, False)


def check(function: Callable[..., tuple[str, Measured]]) -> Callable[..., Proof]:
    """Turn a function of a :class:`Trial` into one of an example that gives a :class:`Proof`.

    It runs under a random state of its own, and without gradients unless it enables them.
    """

    @functools.wraps(function)
    def run(example: Example, *args, seed: int = 0, **kwargs) -> Proof:
        name = function.__name__
        with seeded(seed), torch.no_grad():
            try:
                return Proof(name, True, *function(Trial(example), *args, **kwargs))
            except _Ended as end:
                return Proof(name, *end.args)
            except Exception as error:
                return Proof(name, False, f"raised {type(error).__name__}: {error}")

    return run


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The random state of ``seed`` inside the block; restored after it."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """New tensors and parameters are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Trial:
    """An example under a check, and draws of its inputs: x, z (n, *event) and context (n, ...)."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.t, self.base = example.transform, example.base
        self.conditional_base = getattr(self.base, "conditional", False)

    def context(self, n: int) -> Tensor | None:
        """None for an unconditional example."""
        return self.example.context(n) if self.example.context else None

    def inputs(self, n: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """x, context, log r(x)."""
        x, log_r = self.example.sample(n)
        return x, self.context(n), log_r

    @torch.no_grad()
    def latents(self, n: int) -> Tensor:
        """Points of the codomain of forward."""
        return self.example.latent(n) if self.example.latent else self.base.sample(n)

    def both_sides(self, n: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """x, context, z: x and z are drawn each on its own."""
        return (*self.inputs(n)[:2], self.latents(n))

    def base_log_prob(self, z: Tensor, context: Tensor | None) -> Tensor:
        """log p(z), (n,)."""
        return self.base.log_prob(z, *((context,) if self.conditional_base else ()))

    def methods(self, x: Tensor, z: Tensor) -> tuple[tuple[str, Callable, Tensor, bool], ...]:
        """Each public method: its name, itself, its argument, whether it samples."""
        forward = ("forward", self.t.forward, x, self.t.stochastic_forward)
        samples = self.t.stochastic_inverse
        pair = ("inverse_and_ldj", self.t.inverse_and_ldj, z, samples)
        return forward, ("inverse", self.t.inverse, z, samples), pair

    def call(self, method: Callable, *arguments: Tensor | None, seed: int = 1) -> tuple:
        """What a method returns under the random state of ``seed``, as a tuple."""
        with seeded(seed):
            found = method(*arguments)
        return found if isinstance(found, tuple) else (found,)


def gap(a: Tensor, b: Tensor) -> float:
    """The greatest |a - b| / (1 + |b|); infinite for different shapes or values not finite."""
    a, b = a.double(), b.double()
    if a.shape != b.shape or not bool(a.isfinite().all() & b.isfinite().all()):
        return float("inf")
    return ((a - b).abs() / (1 + b.abs())).max().item() if a.numel() else 0.0


def expect_small(gaps: Measured, tolerance: float, message: str = OFF) -> float:
    """The greatest of the gaps; fails the check where it exceeds the tolerance."""
    name, worst = max(gaps.items(), key=lambda item: item[1], default=("", 0.0))
    expect(worst <= tolerance, message.format(name=name, gap=worst, tolerance=tolerance), **gaps)
    return worst


def expect_row(ldj: Tensor, n: int, method: str) -> None:
    """Contributions are one number a row, float32 or better."""
    shape, good = tuple(ldj.shape), ldj.dtype in (torch.float32, torch.float64)
    expect(shape == (n,), f"{method}: expected ldj of shape ({n},), got {shape}")
    expect(good, f"{method}: expected ldj in float32 or float64, got {ldj.dtype}")


def example_of(cls: type[Transform], seed: int = 0) -> Example:
    """``cls.example()`` in float64, its parameters drawn from ``seed``.

    Inputs come in the default dtype of the moment: run the checks under :func:`double_precision`.
    """
    with double_precision(), seeded(seed):
        return cls.example()


class _Quadratic:
    """An off-centre quadratic: something smooth to differentiate, of no particular mass."""

    conditional = normalised = False

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x.flatten(1)
        weight = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)
        return -0.5 * (weight * (x - 1).square()).sum(1)


def turned(example: Example) -> Example:
    """The example of ``Inverse(transform)``: its inputs are the latents, and the other way round.

    For a bijection. Its base has no known mass: unit_mass and generation do not apply to it.
    """
    t = example.transform
    if not t.bijective:
        raise ValueError(f"turned: expected a bijection, got {t.label} ({t.kind})")

    def sample(n: int) -> tuple[Tensor, Tensor]:
        z = Trial(example).latents(n)
        return z, example.base.log_prob(z)

    return Example(
        Inverse(t), sample, _Quadratic(), example.context, lambda n: example.sample(n)[0]
    )
