"""Checks of the contract: rows, dtypes, contexts, and the declared kind."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from surflow.checks import check_values
from surflow.proofs.proof import Trial, check, expect, expect_row, expect_small, gap


@check
def batch_of_one(trial: Trial):
    """One row goes through both directions, and comes out as one row."""
    t = trial.t
    x, context, _ = trial.inputs(1)
    z, ldj = t(x, context)
    latent = trial.latents(1)
    (back, pair), again = t.inverse_and_ldj(latent, context), t.inverse(latent, context)
    expect_row(ldj, 1, "forward")
    expect_row(pair, 1, "inverse_and_ldj")
    found = {"forward": (z, latent), "inverse": (again, x), "inverse_and_ldj": (back, x)}
    for name, (value, like) in found.items():
        shape, expected = tuple(value.shape), tuple(like.shape)
        expect(shape == expected, f"{name}: expected {expected}, got {shape}")
    finite = all(bool(v.isfinite().all()) for v in (z, ldj, back, pair))
    expect(finite, "a batch of one gives values that are not finite")
    return "a batch of one works both ways", {}


@check
def row_independence(trial: Trial, n: int = 32, tolerance: float = 1e-9):
    """A row's result does not change when the other rows do.

    A stochastic layer draws the same noise; in a deterministic direction rows are permuted too.
    """
    t, keep, gaps = trial.t, n // 4, {}
    for name, method, stochastic, draw in (
        ("forward", t, t.stochastic_forward, lambda: trial.inputs(n)[0]),
        ("inverse", t.inverse_and_ldj, t.stochastic_inverse, lambda: trial.latents(n)),
    ):
        value, other = draw(), draw()
        context, other_context = trial.context(n), trial.context(n)
        other[:keep] = value[:keep]
        if context is not None:
            other_context[:keep] = context[:keep]
        first = trial.call(method, value, context)
        second = trial.call(method, other, other_context)
        found = [gap(a[:keep], b[:keep]) for a, b in zip(first, second, strict=True)]
        if not stochastic:
            order = torch.randperm(n)
            permuted = trial.call(method, value[order], None if context is None else context[order])
            found += [gap(b, a[order]) for a, b in zip(first, permuted, strict=True)]
        gaps[name] = max(found)
    worst = expect_small(gaps, tolerance, "a row changes with the other rows, by {gap:.3g}")
    return f"rows are independent, within {worst:.3g}", gaps


def _cast(dtype: torch.dtype, *values: Tensor | None) -> list[Tensor | None]:
    return [v.to(dtype) if v is not None and v.is_floating_point() else v for v in values]


@check
def dtypes(trial: Trial, n: int = 64, tolerance: float = 1e-3):
    """Contributions are (B,) and float32 or better whatever the dtype of layer and input.

    In float32 their median error against float64 is below ``tolerance``. Under a bfloat16
    autocast inputs and contributions keep float32, and a deterministic inverse still undoes
    forward, within 100 times ``tolerance``: the nets are equally coarse both ways. In bfloat16
    shape and dtype are checked, not values.
    """
    t, measured = trial.t, {}
    x, context, latent = trial.both_sides(n)
    z, ldj = trial.call(t, x, context)
    single = copy.deepcopy(t).float()
    x32, latent32, context32 = _cast(torch.float32, x, latent, context)
    z32, ldj32 = trial.call(single, x32, context32)
    expect_row(ldj32, n, "forward in float32")
    if not t.stochastic_forward:
        error = measured["float32"] = (ldj32.double() - ldj.double()).abs().median().item()
        expect(error <= tolerance, f"float32: ldj off by {error:.3g}", **measured)
    expect_row(single.inverse_and_ldj(latent32, context32)[1], n, "inverse_and_ldj in float32")
    with torch.autocast("cpu", dtype=torch.bfloat16), check_values(False):
        z16, ldj16 = single(x32, context32)
        expect_row(ldj16, n, "forward under autocast")
        ldj16 = single.inverse_and_ldj(latent32, context32)[1]
        expect_row(ldj16, n, "inverse_and_ldj under autocast")
        same = not z.is_floating_point() or z16.dtype == z32.dtype
        expect(same, f"autocast: expected z in {z32.dtype}, got {z16.dtype}")
        if not t.stochastic_inverse and x.is_floating_point():
            back = single.inverse(z16, context32)
            error = ((back - x32).abs() / (1 + x32.abs())).median().item()
            measured["autocast"], ok = error, error <= 100 * tolerance
            expect(ok, f"autocast: round trip off by {error:.3g}", **measured)
    if x.is_floating_point():
        half = copy.deepcopy(t).bfloat16()
        with check_values(False):  # rounding may put a value on the edge of its support
            expect_row(half(*_cast(torch.bfloat16, x, context))[1], n, "forward in bfloat16")
    return "float32 contributions in float32, bfloat16 and under autocast", measured


@check
def contexts(trial: Trial, n: int = 8):
    """A layer that reads a context requires one; a layer that reads none ignores it."""
    t, (x, context, latent) = trial.t, trial.both_sides(n)
    has = "has no" if context is None else "has a"
    said = f"conditional is {t.conditional}, but the example {has} context"
    expect(t.conditional == (context is not None), said)
    if context is None:
        for name, method, value, _ in trial.methods(x, latent):
            found = trial.call(method, value), trial.call(method, value, torch.randn(n, 3))
            same = all(map(torch.equal, *found))
            expect(same, f"{name}: a context changes a layer that takes none")
        return "a context it does not read changes nothing", {}
    for name, method, value, _ in trial.methods(x, latent):
        for wrong, given in (("no context", None), ("too few rows", context[: n // 2])):
            try:
                method(value, given)
            except ValueError:
                continue
            expect(False, f"{name}: {wrong} must raise ValueError")
    here, there = trial.call(t, x, context), trial.call(t, x, trial.context(n))
    expect(not all(map(torch.equal, here, there)), "forward: another context changes nothing")
    return "requires its context, and reads it", {}


@check
def flags(trial: Trial, n: int = 64):
    """What the transform declares is what it does: two runs differ exactly where it samples."""
    t = trial.t
    stochastic = t.stochastic_forward or t.stochastic_inverse
    both, neither = t.bijective and stochastic, not (t.bijective or stochastic)
    expect(not both, "bijective, and stochastic in a direction: it cannot be both")
    expect(not neither, "not bijective, and stochastic in no direction: one of them must be")
    expect(t.lower_bound == t.stochastic_forward, "lower_bound must be stochastic_forward")
    x, context, latent = trial.both_sides(n)
    for name, method, value, declared in trial.methods(x, latent)[:2]:
        first, second = (trial.call(method, value, context, seed=seed)[0] for seed in (1, 2))
        differs = not torch.equal(first, second)
        runs = "differ" if differs else "are equal"
        expect(differs == declared, f"stochastic_{name} is {declared}, but two runs {runs}")
    if t.bijective:
        z_rows, x_rows = (len(v.flatten(1).unique(dim=0)) for v in (t(x, context)[0], x))
        expect(z_rows >= x_rows, "bijective, but different x share a latent")
    return f"{t.kind}, as declared", {}
