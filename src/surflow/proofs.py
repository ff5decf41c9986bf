"""What a transform must prove: checks of the contract as plain functions of one example.

Each check runs a :class:`~surflow.transforms.Example` and returns a :class:`Proof`: what was
measured, whether it holds, and a sentence. A transform that raises fails the check with what it
raised. The checks expect an example built in float64; :func:`example_of` builds it so.

>>> from surflow.transforms import Tanh
>>> with double_precision():
...     all(proof.ok for proof in prove(Tanh.example(), n=20_000))
True
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surflow.checks import check_values
from surflow.transforms.base import Example, Transform
from surflow.transforms.inverse import Inverse

__all__ = [
    "CHECKS",
    "Proof",
    "agreement",
    "batch_of_one",
    "compiles",
    "contexts",
    "double_precision",
    "dtypes",
    "example_of",
    "flags",
    "generation",
    "gradients",
    "jacobian",
    "prove",
    "round_trip",
    "row_independence",
    "turned",
    "unit_mass",
]


@dataclass(frozen=True)
class Proof:
    """The outcome of one check.

    Attributes:
        check: the name of the check.
        ok: whether the property holds; True also where it does not apply.
        message: one sentence, with the numbers where there are any.
        measured: the numbers by name.
        applies: False where the kind of the transform makes the check meaningless.
    """

    check: str
    ok: bool
    message: str
    measured: dict[str, float] = field(default_factory=dict)
    applies: bool = True


class _Failed(Exception):
    """A property that does not hold, with the numbers."""

    def __init__(self, message: str, **measured: float) -> None:
        super().__init__(message)
        self.measured = measured


class _DoesNotApply(Exception):
    pass


def _check(function: Callable[..., tuple[str, dict[str, float]]]) -> Callable[..., Proof]:
    """Turn a function that returns a message and numbers, or raises, into one that gives a Proof.

    The random state is set before the check and restored after it, so that a check gives the
    same answer wherever it runs.
    """

    @functools.wraps(function)
    def run(example: Example, *args, seed: int = 0, **kwargs) -> Proof:
        name = function.__name__
        with _seeded(seed):
            try:
                message, measured = function(example, *args, **kwargs)
            except _DoesNotApply as reason:
                return Proof(name, True, str(reason), applies=False)
            except _Failed as failure:
                return Proof(name, False, str(failure), failure.measured)
            except Exception as error:
                return Proof(name, False, f"raised {type(error).__name__}: {error}")
            return Proof(name, True, message, measured)

    return run


# Helpers ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
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


def example_of(cls: type[Transform], seed: int = 0) -> Example:
    """``cls.example()`` in float64, its parameters drawn from ``seed``.

    The example draws its inputs in the default dtype of the moment: run the checks under
    :func:`double_precision` too.
    """
    with double_precision(), _seeded(seed):
        return cls.example()


class _Quadratic:
    """An off-centre quadratic: something smooth to differentiate, of no particular mass."""

    conditional = False
    normalised = False

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x.flatten(1)
        weight = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)
        return -0.5 * (weight * (x - 1).square()).sum(1)


def turned(example: Example) -> Example:
    """The example of ``Inverse(transform)``: its inputs are the latents, and the other way round.

    For a bijection. It has no base with a known mass on the new codomain, so :func:`unit_mass`
    and :func:`generation` do not apply to it.
    """
    if not example.transform.bijective:
        raise ValueError(
            f"turned: expected a bijection, got {example.transform.label} "
            f"({example.transform.kind})"
        )

    def sample(n: int) -> tuple[Tensor, Tensor]:
        z = _latents(example, n)
        return z, example.base.log_prob(z)

    return Example(
        Inverse(example.transform),
        sample,
        _Quadratic(),
        context=example.context,
        latent=lambda n: example.sample(n)[0],
    )


def _inputs(example: Example, n: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, context, log r(x)."""
    x, log_r = example.sample(n)
    return x, example.context(n) if example.context else None, log_r


def _latents(example: Example, n: int) -> Tensor:
    with torch.no_grad():
        return example.latent(n) if example.latent else example.base.sample(n)


def _gap(a: Tensor, b: Tensor) -> float:
    """The greatest |a - b| / (1 + |b|); infinite for different shapes or values not finite."""
    if a.shape != b.shape or not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        return float("inf")
    if a.numel() == 0:
        return 0.0
    return ((a - b).abs() / (1 + b.abs())).max().item()


def _require_mass(example: Example) -> None:
    if not getattr(example.base, "normalised", True):
        raise _DoesNotApply("the base of this example has no known mass")


def _base_log_prob(example: Example, z: Tensor, context: Tensor | None) -> Tensor:
    if getattr(example.base, "conditional", False):
        return example.base.log_prob(z, context)
    return example.base.log_prob(z)


def _require_below(gap: float, tolerance: float, what: str) -> tuple[str, dict[str, float]]:
    if not gap <= tolerance:
        raise _Failed(f"{what}: off by {gap:.3g}, allowed {tolerance:.3g}", gap=gap)
    return f"{what}: within {gap:.3g}", {"gap": gap}


def _require_row(ldj: Tensor, n: int, method: str) -> None:
    """Contributions are one finite number a row, float32 or better."""
    if tuple(ldj.shape) != (n,):
        raise _Failed(f"{method}: expected ldj of shape ({n},), got {tuple(ldj.shape)}")
    if ldj.dtype not in (torch.float32, torch.float64):
        raise _Failed(f"{method}: expected ldj in float32 or float64, got {ldj.dtype}")


# Checks ----------------------------------------------------------------------------------------


@_check
@torch.no_grad()
def round_trip(example: Example, n: int = 256, tolerance: float = 1e-7):
    """The deterministic sides undo each other.

    Bijections: inverse(forward(x)) = x and forward(inverse(z)) = z. Inference surjections: the
    second alone. Generative surjections: the first alone. The gap is relative to 1 + |value|.
    """
    t = example.transform
    if t.stochastic_forward and t.stochastic_inverse:
        raise _DoesNotApply("both directions are stochastic: no round trip to check")
    gaps = {}
    if not t.stochastic_inverse:
        x, context, _ = _inputs(example, n)
        z, ldj = t(x, context)
        _require_row(ldj, n, "forward")
        back = t.inverse(z, context)
        integer = not x.is_floating_point()
        if integer and back.dtype != x.dtype:
            raise _Failed(f"inverse(forward(x)): expected {x.dtype}, got {back.dtype}")
        gaps["inverse(forward(x)) - x"] = _gap(back.double(), x.double())
    if not t.stochastic_forward:
        z = _latents(example, n)
        context = example.context(n) if example.context else None
        gaps["forward(inverse(z)) - z"] = _gap(t(t.inverse(z, context), context)[0], z)
    name, worst = max(gaps.items(), key=lambda item: item[1])
    if not worst <= tolerance:
        raise _Failed(f"{name}: off by {worst:.3g}, allowed {tolerance:.3g}", **gaps)
    return ", ".join(f"{k}: within {v:.3g}" for k, v in gaps.items()), gaps


@_check
def jacobian(example: Example, n: int = 8, tolerance: float = 1e-8):
    """ldj = log |det dz/dx| with the Jacobian of autograd, row by row. Bijections only."""
    t = example.transform
    if not t.bijective:
        raise _DoesNotApply(f"{t.kind}: no square Jacobian")
    x, context, _ = _inputs(example, n)
    ldj = t(x, context)[1].detach()
    _require_row(ldj, n, "forward")
    expected = []
    for i in range(n):
        row, row_context = x[i : i + 1], None if context is None else context[i : i + 1]
        matrix = torch.autograd.functional.jacobian(lambda r, c=row_context: t(r, c)[0], row)
        size = row.numel()
        if matrix.numel() != size * size:
            raise _Failed(f"a bijection must keep {size} dimensions, got {matrix.numel() / size}")
        expected.append(torch.linalg.slogdet(matrix.reshape(size, size))[1])
    return _require_below(_gap(ldj, torch.stack(expected)), tolerance, "ldj - log |det dz/dx|")


@_check
@torch.no_grad()
def unit_mass(
    example: Example,
    n: int = 200_000,
    max_standard_error: float = 0.03,
    max_share: float = 0.01,
    chunk: int = 50_000,
):
    r"""The model's mass is one: :math:`E_r[p(z) e^{V(x, z)} / r(x)] = 1`.

    Stochastic layers included, since the expectation over z of p(z) exp(V) is p(x). It fails
    where the mean is more than 4 standard errors from 1; where the standard error leaves the
    check without power; and where one draw carries more than ``max_share`` of the sum, a sign of
    an r whose weights have no finite variance and whose standard error means nothing.
    """
    _require_mass(example)
    t, parts = example.transform, []
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        x, context, log_r = _inputs(example, size)
        z, ldj = t(x, context)
        _require_row(ldj, size, "forward")
        log_weight = _base_log_prob(example, z, context) + ldj - log_r
        if tuple(log_weight.shape) != (size,):
            raise _Failed(f"expected one weight a row, got shape {tuple(log_weight.shape)}")
        parts.append(log_weight.double().exp())
    weights = torch.cat(parts)
    if not bool(weights.isfinite().all()):
        raise _Failed(f"{int((~weights.isfinite()).sum())} of {n} weights are not finite")
    mean, error = weights.mean().item(), (weights.std() / n**0.5).item()
    share = (weights.max() / weights.sum().clamp_min(1e-300)).item()
    measured = {"mass": mean, "standard_error": error, "largest_share": share, "n": float(n)}
    said = f"mass {mean:.5f} ± {error:.5f}, the largest weight {share:.2%} of the sum"
    if error > max_standard_error:
        raise _Failed(f"{said}: the standard error must be below {max_standard_error}", **measured)
    if share > max_share:
        raise _Failed(f"{said}: the sampler of this example does not cover the model", **measured)
    if abs(mean - 1) > 4 * error + 1e-9:
        raise _Failed(f"{said}: not 1 within 4 standard errors", **measured)
    return said, measured


@_check
@torch.no_grad()
def generation(
    example: Example, n: int = 20_000, num_features: int = 12, max_standard_error: float = 0.05
):
    r"""What inverse draws has the density that forward reports.

    For any feature h of a pair and its contribution,

    .. math:: E_{z \sim p,\, x \sim p(x|z)}[h(x, z, V)]
              = E_{x \sim r,\, z \sim q(z|x)}[h(x, z, V)\, p(z) e^{V} / r(x)],

    so the pairs of ``inverse_and_ldj`` and the weighted pairs of ``forward`` must give the same
    means. The features are tanh of random mixes of x, z, the context and V; each mean may be 5
    standard errors off. It is what catches a layer that samples from another conditional than
    the one it scores, which mass alone does not see.
    """
    _require_mass(example)
    t = example.transform
    x, context, log_r = _inputs(example, n)
    z, ldj = t(x, context)
    weight = (_base_log_prob(example, z, context) + ldj - log_r).double().exp()
    if getattr(example.base, "conditional", False):
        latent = example.base.sample(n, context)
    else:
        latent = example.base.sample(n)
    drawn, pair = t.inverse_and_ldj(latent, context)
    again = t.inverse(latent, context)

    def mixed(x: Tensor, z: Tensor, v: Tensor | None) -> Tensor:
        with _seeded(1):
            total = torch.zeros(n, num_features, dtype=torch.float64)
            for part in (x, z, context, v):
                if part is not None:
                    flat = part.double().reshape(n, -1)
                    total += flat @ torch.randn(flat.shape[1], num_features).double()
            return torch.tanh(total)

    worst, errors = 0.0, 0.0
    for theirs, v in ((drawn, True), (again, False)):
        ours = mixed(x, z, ldj if v else None) * weight.unsqueeze(1)
        model = mixed(theirs, latent, pair if v else None)
        error = ((ours.var(0) + model.var(0)) / n).sqrt()
        gap = (ours.mean(0) - model.mean(0)).abs()
        worst = max(worst, (gap / (error + 1e-12)).max().item())
        errors = max(errors, error.max().item())
    measured = {"deviation": worst, "standard_error": errors, "n": float(n)}
    said = f"means of {num_features} features differ by at most {worst:.2f} standard errors"
    if not errors <= max_standard_error:
        raise _Failed(f"{said} of {errors:.3g}: too coarse a measure", **measured)
    if not worst <= 5:
        raise _Failed(said, **measured)
    return said, measured


@_check
def gradients(example: Example, n: int = 64):
    """The mean log-likelihood has finite gradients, and every parameter gets one that is not zero.

    With respect to x, where it is no integer, the gradient must be finite: the layers before
    this one learn through it.
    """
    t = example.transform
    parameters = {name: p for name, p in t.named_parameters() if p.requires_grad}
    x, context, _ = _inputs(example, n)
    _, _, objective, through = _objective(t, example, x, context)
    found = _gradients_of(objective, [*parameters.values(), *through])
    if through and found[-1] is not None and not bool(found[-1].isfinite().all()):
        raise _Failed("the gradient of x is not finite")
    if not parameters:
        said = "; the gradient of x is finite" if through else ""
        raise _DoesNotApply(f"no parameters{said}")
    norms = {}
    for name, gradient in zip(parameters, found, strict=False):
        if gradient is None:
            raise _Failed(f"no gradient reaches {name}")
        if not bool(gradient.isfinite().all()):
            raise _Failed(f"the gradient of {name} is not finite")
        norms[name] = gradient.norm().item()
        if norms[name] < 1e-12:
            raise _Failed(f"the gradient of {name} is zero", **norms)
    return f"finite and not zero for {len(norms)} parameters", norms


def _objective(
    run: Callable, example: Example, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """z, ldj, the mean log-likelihood, and x as something to differentiate by, if it can be."""
    through = [x.detach().clone().requires_grad_()] if x.is_floating_point() else []
    z, ldj = run(through[0] if through else x, context)
    return z, ldj, (_base_log_prob(example, z, context) + ldj).mean(), through


def _gradients_of(objective: Tensor, of: list[Tensor]) -> list[Tensor | None]:
    if not of or not objective.requires_grad:
        return [None] * len(of)
    return list(torch.autograd.grad(objective, of, allow_unused=True))


@_check
@torch.no_grad()
def batch_of_one(example: Example):
    """One row goes through both directions, and comes out as one row."""
    t = example.transform
    x, context, _ = _inputs(example, 1)
    z, ldj = t(x, context)
    _require_row(ldj, 1, "forward")
    latent = _latents(example, 1)
    if z.shape != latent.shape:
        raise _Failed(f"forward: z {tuple(z.shape)}, but a latent is {tuple(latent.shape)}")
    back, pair = t.inverse_and_ldj(latent, context)
    _require_row(pair, 1, "inverse_and_ldj")
    for value, name in ((t.inverse(latent, context), "inverse"), (back, "inverse_and_ldj")):
        if value.shape != x.shape:
            raise _Failed(f"{name}: expected x {tuple(x.shape)}, got {tuple(value.shape)}")
    if not all(bool(v.isfinite().all()) for v in (z.double(), ldj, back.double(), pair)):
        raise _Failed("a batch of one gives values that are not finite")
    return "a batch of one works both ways", {}


@_check
@torch.no_grad()
def row_independence(example: Example, n: int = 32, tolerance: float = 1e-9):
    """A row's result does not change when the other rows do.

    The random state is held, so that a stochastic layer draws the same noise; in a deterministic
    direction the rows are permuted too.
    """
    t = example.transform
    keep = n // 4
    gaps = {}

    def run(method: Callable, value: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        with _seeded(1):
            return method(value, context)

    for name, method, stochastic, draw in (
        ("forward", t, t.stochastic_forward, lambda m: _inputs(example, m)[0]),
        ("inverse", t.inverse_and_ldj, t.stochastic_inverse, lambda m: _latents(example, m)),
    ):
        value, other = draw(n), draw(n)
        context = example.context(n) if example.context else None
        other_context = example.context(n) if example.context else None
        other[:keep] = value[:keep]
        if context is not None:
            other_context[:keep] = context[:keep]
        first, second = run(method, value, context), run(method, other, other_context)
        gap = max(
            _gap(a[:keep].double(), b[:keep].double()) for a, b in zip(first, second, strict=True)
        )
        if not stochastic:
            order = torch.randperm(n)
            permuted = run(method, value[order], None if context is None else context[order])
            gap = max(
                gap,
                *(
                    _gap(b.double(), a[order].double())
                    for a, b in zip(first, permuted, strict=True)
                ),
            )
        gaps[name] = gap
    worst = max(gaps.values())
    if not worst <= tolerance:
        raise _Failed(f"a row changes with the other rows, by {worst:.3g}", **gaps)
    return f"rows are independent, within {worst:.3g}", gaps


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return value.to(dtype) if value is not None and value.is_floating_point() else value


@_check
@torch.no_grad()
def dtypes(example: Example, n: int = 64, tolerance: float = 1e-3):
    """Contributions are (B,) and float32 or better whatever the dtype of layer and input.

    In float32 their median error against float64 is below ``tolerance``; under a bfloat16
    autocast inputs and contributions keep float32, and where a layer undoes itself it still does
    (within 100 times ``tolerance``, the nets being equally coarse both ways). In bfloat16 shape
    and dtype are checked, not values.
    """
    t = example.transform
    x, context, _ = _inputs(example, n)
    latent = _latents(example, n)
    with _seeded(1):
        z, ldj = t(x, context)
    measured = {}

    single = copy.deepcopy(t).to(torch.float32)
    x32, latent32, context32 = (_cast(v, torch.float32) for v in (x, latent, context))
    with _seeded(1):
        z32, ldj32 = single(x32, context32)
    _require_row(ldj32, n, "forward in float32")
    if not t.stochastic_forward:
        measured["float32"] = (ldj32.double() - ldj.double()).abs().median().item()
        if not measured["float32"] <= tolerance:
            raise _Failed(f"float32: ldj off by {measured['float32']:.3g}", **measured)
    _require_row(single.inverse_and_ldj(latent32, context32)[1], n, "inverse_and_ldj in float32")

    with torch.autocast("cpu", dtype=torch.bfloat16), check_values(False):
        z16, ldj16 = single(x32, context32)
        _require_row(ldj16, n, "forward under autocast")
        _require_row(
            single.inverse_and_ldj(latent32, context32)[1], n, "inverse_and_ldj under autocast"
        )
        if z.is_floating_point() and z16.dtype != z32.dtype:
            raise _Failed(f"autocast: expected z in {z32.dtype}, got {z16.dtype}")
        if not t.stochastic_inverse and x.is_floating_point():
            back = single.inverse(z16, context32)
            measured["autocast"] = ((back - x32).abs() / (1 + x32.abs())).median().item()
            if not measured["autocast"] <= 100 * tolerance:
                raise _Failed(f"autocast: round trip off by {measured['autocast']:.3g}", **measured)

    if x.is_floating_point():
        half = copy.deepcopy(t).to(torch.bfloat16)
        with check_values(False):  # rounding may put a value on the edge of its support
            ldj_half = half(*(_cast(v, torch.bfloat16) for v in (x, context)))[1]
        _require_row(ldj_half, n, "forward in bfloat16")
    return "float32 contributions in float32, bfloat16 and under autocast", measured


@_check
@torch.no_grad()
def contexts(example: Example, n: int = 8):
    """A layer that reads a context insists on one; a layer that reads none ignores it."""
    t = example.transform
    x, context, _ = _inputs(example, n)
    latent = _latents(example, n)
    if t.conditional != (example.context is not None):
        raise _Failed(
            f"conditional is {t.conditional}, but the example "
            f"{'has a' if example.context else 'has no'} context"
        )
    methods = (
        ("forward", t.forward, x),
        ("inverse", t.inverse, latent),
        ("inverse_and_ldj", t.inverse_and_ldj, latent),
    )
    if context is None:
        for name, method, value in methods:
            with _seeded(1):
                without = method(value)
            unread = torch.randn(n, 3)
            with _seeded(1):
                with_one = method(value, unread)
            for a, b in zip(_as_tuple(without), _as_tuple(with_one), strict=True):
                if not torch.equal(a, b):
                    raise _Failed(f"{name}: a context changes a layer that takes none")
        return "a context it does not read changes nothing", {}

    for name, method, value in methods:
        for wrong, given in (("no context", None), ("too few rows", context[: n // 2])):
            try:
                method(value, given)
            except ValueError:
                continue
            raise _Failed(f"{name}: {wrong} must raise ValueError")
    with _seeded(1):
        here = t(x, context)
    with _seeded(1):
        there = t(x, example.context(n))
    if all(torch.equal(a, b) for a, b in zip(here, there, strict=True)):
        raise _Failed("forward: another context changes nothing")
    return "insists on its context, and reads it", {}


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@_check
@torch.no_grad()
def agreement(example: Example, n: int = 256, tolerance: float = 1e-7):
    """The two ways to score a pair agree, and turning a layer round twice changes nothing.

    Where forward is deterministic, ``inverse_and_ldj`` gives the contribution that ``forward``
    gives at the x it returned, and leads back to the same z. For every layer
    ``Inverse(Inverse(t))`` does what t does, with the random state held.
    """
    t = example.transform
    context = example.context(n) if example.context else None
    x, latent = _inputs(example, n)[0], _latents(example, n)
    gaps = {}
    if not t.stochastic_forward:
        generated, ldj = t.inverse_and_ldj(latent, context)
        again, expected = t(generated, context)
        gaps["z"], gaps["ldj"] = _gap(again, latent), _gap(ldj, expected)
    twice = Inverse(Inverse(t))
    for name, ours, theirs, value in (
        ("forward", twice.forward, t.forward, x),
        ("inverse", twice.inverse, t.inverse, latent),
        ("inverse_and_ldj", twice.inverse_and_ldj, t.inverse_and_ldj, latent),
    ):
        with _seeded(1):
            a = _as_tuple(ours(value, context))
        with _seeded(1):
            b = _as_tuple(theirs(value, context))
        gaps[f"Inverse(Inverse).{name}"] = max(
            _gap(p.double(), q.double()) for p, q in zip(a, b, strict=True)
        )
    name, worst = max(gaps.items(), key=lambda item: item[1])
    if not worst <= tolerance:
        raise _Failed(f"{name}: off by {worst:.3g}, allowed {tolerance:.3g}", **gaps)
    return f"both scores of a pair agree, within {worst:.3g}", gaps


@_check
@torch.no_grad()
def flags(example: Example, n: int = 64):
    """What the transform declares is what it does: two runs differ exactly where it samples."""
    t = example.transform
    if t.bijective and (t.stochastic_forward or t.stochastic_inverse):
        raise _Failed("bijective, and stochastic in a direction: it cannot be both")
    if not (t.bijective or t.stochastic_forward or t.stochastic_inverse):
        raise _Failed("not bijective, and stochastic in no direction: one of them must be")
    if t.lower_bound != t.stochastic_forward:
        raise _Failed("lower_bound must be stochastic_forward")
    x, context, _ = _inputs(example, n)
    latent = _latents(example, n)
    for name, method, value, declared in (
        ("forward", t.forward, x, t.stochastic_forward),
        ("inverse", t.inverse, latent, t.stochastic_inverse),
    ):
        with _seeded(1):
            first = _as_tuple(method(value, context))[0]
        with _seeded(2):
            second = _as_tuple(method(value, context))[0]
        differs = not torch.equal(first, second)
        if differs != declared:
            raise _Failed(
                f"stochastic_{name} is {declared}, but two runs "
                f"{'differ' if differs else 'are equal'}"
            )
    if t.bijective:
        z = t(x, context)[0]
        if len(z.flatten(1).unique(dim=0)) < len(x.flatten(1).unique(dim=0)):
            raise _Failed("bijective, but different x share a latent")
    return f"{t.kind}, as declared", {}


@_check
def compiles(example: Example, n: int = 8, backend: str = "aot_eager", tolerance: float = 1e-7):
    """Both directions and the gradient go through ``torch.compile`` as one graph each.

    ``forward`` with the backward of the mean log-likelihood, ``inverse`` and ``inverse_and_ldj``
    are compiled with ``fullgraph=True``, where a graph break is an error; so is reading a value
    to the host (``.item()``), which breaks the graph elsewhere. What comes out is finite and, in
    a deterministic direction, what the layer gives uncompiled; a compiled layer may draw its
    random numbers in another order. A layer that declares ``compiles = False`` must say why.

    Costs seconds rather than milliseconds, and says the same for most instances of a class: so it
    is no member of :data:`CHECKS`, and :func:`prove` runs it where a backend is named. With
    "aot_eager" ``inverse`` is only traced: what would be lowered is in ``inverse_and_ldj`` too.
    """
    t = example.transform
    if not t.compiles:
        if not t.why_not_compiled.strip():
            raise _Failed("declares compiles = False without saying why in why_not_compiled")
        raise _DoesNotApply(f"declared as not compiled: {t.why_not_compiled}")
    x, context, _ = _inputs(example, n)
    latent = _latents(example, n)
    parameters = {name: p for name, p in t.named_parameters() if p.requires_grad}

    def scored(run: Callable) -> dict[str, Tensor | None]:
        z, ldj, objective, through = _objective(run, example, x, context)
        found = _gradients_of(objective, [*parameters.values(), *through])
        names = [*parameters, *(["x"] if through else [])]
        gradients_ = {f"gradient of {k}": g for k, g in zip(names, found, strict=True)}
        return {"z": z, "ldj": ldj, **gradients_}

    def generated(run: Callable) -> dict[str, Tensor | None]:
        return dict(zip(("x", "ldj"), _as_tuple(run(latent, context)), strict=False))

    read: list[str] = []  # where a graph reads a value

    def watched(graph: Any, inputs: list[Any]) -> Callable:
        for node in graph.graph.nodes:
            if node.op == "call_method" and node.target in ("item", "tolist"):
                read.append(_last_frame(node.stack_trace or "") or f"`{node}`")
        traced = backend == "aot_eager" and name == "inverse"
        return torch._dynamo.lookup_backend("eager" if traced else backend)(graph, inputs)

    gaps = {}
    for name, method, collect, stochastic in (
        ("forward", t.forward, scored, t.stochastic_forward),
        ("inverse", t.inverse, generated, t.stochastic_inverse),
        ("inverse_and_ldj", t.inverse_and_ldj, generated, t.stochastic_inverse),
    ):
        torch._dynamo.reset()
        run = torch.compile(
            lambda value, context, method=method: method(value, context),
            fullgraph=True,
            dynamic=False,
            backend=watched,
        )
        with torch.set_grad_enabled(name == "forward"):
            expected = collect(method)
            try:
                found = collect(run)
            except Exception as error:
                raise _Failed(f"{name}: {_compile_error(error)}") from None
            finally:
                torch._dynamo.reset()
        if read:
            raise _Failed(f"{name}: graph break at {read[0]}: reads a value to the host")
        for key, value in found.items():
            if expected[key] is None:  # nothing to differentiate
                continue
            if value is None or not bool(value.isfinite().all()):
                said = "missing" if value is None else "not finite"
                raise _Failed(f"{name}, compiled: the {key} is {said}")
            if not stochastic:
                gaps[f"{name}: {key}"] = _gap(value.detach().double(), expected[key].double())
    for key, gap in gaps.items():
        if not gap <= tolerance:
            raise _Failed(f"{key} changes by {gap:.3g} when compiled", **gaps)
    return f"one graph each way ({backend}), within {max(gaps.values(), default=0.0):.3g}", gaps


def _compile_error(error: Exception) -> str:
    """One sentence for what the compiler says in many lines: what, where, in whose code."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    said = lines[0]
    if said.endswith("raised:"):  # by a backend: the next line is what it says
        said = " ".join(lines[:2])
    explanation = next((li for li in lines if li.startswith("Explanation: ")), "")
    if explanation:
        said = f"{said}: {explanation.removeprefix('Explanation: ')}"
    place = _last_frame(text.partition("from user code:")[2])
    if place is None:
        return f"does not compile, {type(error).__name__}: {said}"
    return f"graph break at {place}: {said}"


def _last_frame(trace: str) -> str | None:
    """The innermost place of a stack trace."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)', trace)
    if not frames:
        return None
    path, line, function, code = frames[-1]
    return f"{Path(path).name}:{line} in {function}, `{code.strip()}`"


CHECKS: dict[str, Callable[..., Proof]] = {
    check.__name__: check
    for check in (
        round_trip,
        jacobian,
        unit_mass,
        generation,
        gradients,
        batch_of_one,
        row_independence,
        dtypes,
        contexts,
        agreement,
        flags,
    )
}


def prove(
    example: Example, n: int = 200_000, seed: int = 0, backend: str | None = None
) -> list[Proof]:
    """Every check on one example, in float64.

    Args:
        example: an instance with its inputs and base, built in float64; see :func:`example_of`.
        n: draws of :func:`unit_mass`.
        seed: of every check.
        backend: of ``torch.compile``, such as "aot_eager" or "inductor": :func:`compiles` comes
            last; None leaves it out.
    """
    with double_precision():
        for part in (example.transform, example.base):
            if isinstance(part, nn.Module):
                part.to(torch.float64)
        proofs = [
            check(example, n, seed=seed) if name == "unit_mass" else check(example, seed=seed)
            for name, check in CHECKS.items()
        ]
        if backend is not None:
            proofs.append(compiles(example, backend=backend, seed=seed))
        return proofs
