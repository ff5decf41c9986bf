"""Checks of the mathematics: round trips, contributions, mass, samples."""

from __future__ import annotations

import torch
from torch import Tensor

from surflow.proofs.proof import Trial, applies_where, check, expect, expect_row, expect_small, gap
from surflow.transforms.inverse import Inverse


@check
def round_trip(trial: Trial, n: int = 256, tolerance: float = 1e-7):
    """The deterministic sides undo each other: inverse(forward(x)) = x, forward(inverse(z)) = z.

    Both for bijections; the second for inference, the first for generative surjections.
    """
    t, gaps = trial.t, {}
    both = t.stochastic_forward and t.stochastic_inverse
    applies_where(not both, "both directions are stochastic: no round trip to check")
    if not t.stochastic_inverse:
        x, context, _ = trial.inputs(n)
        z, ldj = t(x, context)
        expect_row(ldj, n, "forward")
        back = t.inverse(z, context)
        same = x.is_floating_point() or back.dtype == x.dtype
        expect(same, f"inverse(forward(x)): expected {x.dtype}, got {back.dtype}")
        gaps["inverse(forward(x)) - x"] = gap(back, x)
    if not t.stochastic_forward:
        z, context = trial.latents(n), trial.context(n)
        gaps["forward(inverse(z)) - z"] = gap(t(t.inverse(z, context), context)[0], z)
    expect_small(gaps, tolerance)
    return ", ".join(f"{k}: within {v:.3g}" for k, v in gaps.items()), gaps


@check
@torch.enable_grad()
def jacobian(trial: Trial, n: int = 8, tolerance: float = 1e-8):
    """ldj = log |det dz/dx| with the Jacobian of autograd, row by row. Bijections only."""
    t = trial.t
    applies_where(t.bijective, f"{t.kind}: no square Jacobian")
    x, context, _ = trial.inputs(n)
    ldj = t(x, context)[1].detach()
    expect_row(ldj, n, "forward")
    expected = []
    for i in range(n):
        row, given = x[i : i + 1], None if context is None else context[i : i + 1]
        matrix = torch.autograd.functional.jacobian(lambda r, c=given: t(r, c)[0], row)
        size = row.numel()
        got = matrix.numel() / size
        expect(got == size, f"a bijection must keep {size} dimensions, got {got}")
        expected.append(torch.linalg.slogdet(matrix.reshape(size, size))[1])
    gaps, what = {"gap": gap(ldj, torch.stack(expected))}, "ldj - log |det dz/dx|"
    worst = expect_small(gaps, tolerance, what + ": off by {gap:.3g}, allowed {tolerance:.3g}")
    return f"{what}: within {worst:.3g}", gaps


def _weighted(trial: Trial, n: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """x ~ r, context, z, ldj, and the weights p(z) e^ldj / r(x), (n,)."""
    known = getattr(trial.base, "normalised", True)
    applies_where(known, "the base of this example has no known mass")
    x, context, log_r = trial.inputs(n)
    z, ldj = trial.t(x, context)
    expect_row(ldj, n, "forward")
    log_weight = trial.base_log_prob(z, context) + ldj - log_r
    shape = tuple(log_weight.shape)
    expect(shape == (n,), f"expected one weight a row, got shape {shape}")
    return x, context, z, ldj, log_weight.double().exp()


@check
def unit_mass(
    trial: Trial,
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
    sizes = [min(chunk, n - start) for start in range(0, n, chunk)]
    weights = torch.cat([_weighted(trial, size)[-1] for size in sizes])
    bad = int((~weights.isfinite()).sum())
    expect(not bad, f"{bad} of {n} weights are not finite")
    mean, error = weights.mean().item(), (weights.std() / n**0.5).item()
    share = (weights.max() / weights.sum().clamp_min(1e-300)).item()
    measured = {"mass": mean, "standard_error": error, "largest_share": share, "n": float(n)}
    said = f"mass {mean:.5f} ± {error:.5f}, the largest weight {share:.2%} of the sum"
    for ok, why in (
        (error <= max_standard_error, f"the standard error must be below {max_standard_error}"),
        (share <= max_share, "the sampler of this example does not cover the model"),
        (abs(mean - 1) <= 4 * error + 1e-9, "not 1 within 4 standard errors"),
    ):
        expect(ok, f"{said}: {why}", **measured)
    return said, measured


@check
def generation(
    trial: Trial, n: int = 20_000, num_features: int = 12, max_standard_error: float = 0.05
):
    r"""What inverse draws has the density that forward reports.

    For any feature h of a pair and its contribution,

    .. math:: E_{z \sim p,\, x \sim p(x|z)}[h(x, z, V)]
              = E_{x \sim r,\, z \sim q(z|x)}[h(x, z, V)\, p(z) e^{V} / r(x)],

    so the pairs of ``inverse_and_ldj`` and the weighted pairs of ``forward`` must give the same
    means. The features are tanh of random mixes of x, z, the context and V; each mean may be 5
    standard errors off. It catches a layer that samples from another conditional than the one it
    scores, which mass alone does not.
    """
    x, context, z, ldj, weight = _weighted(trial, n)
    latent = trial.base.sample(n, *((context,) if trial.conditional_base else ()))
    drawn, pair = trial.t.inverse_and_ldj(latent, context)
    again = trial.t.inverse(latent, context)

    def mixed(*parts: Tensor | None) -> Tensor:
        total = torch.zeros(n, num_features, dtype=torch.float64)
        mixes = torch.Generator().manual_seed(1)
        for flat in (part.double().reshape(n, -1) for part in parts if part is not None):
            total += flat @ torch.randn(flat.shape[1], num_features, generator=mixes).double()
        return torch.tanh(total)

    worst, spread = 0.0, 0.0
    for generated, ours_v, model_v in ((drawn, ldj, pair), (again, None, None)):
        ours = mixed(x, z, context, ours_v) * weight.unsqueeze(1)
        model = mixed(generated, latent, context, model_v)
        error = ((ours.var(0) + model.var(0)) / n).sqrt()
        difference = (ours.mean(0) - model.mean(0)).abs()
        worst = max(worst, (difference / (error + 1e-12)).max().item())
        spread = max(spread, error.max().item())
    measured = {"deviation": worst, "standard_error": spread, "n": float(n)}
    said = f"means of {num_features} features differ by at most {worst:.2f} standard errors"
    coarse = f"{said} of {spread:.3g}: too coarse a measure"
    expect(spread <= max_standard_error, coarse, **measured)
    expect(worst <= 5, said, **measured)
    return said, measured


@check
def agreement(trial: Trial, n: int = 256, tolerance: float = 1e-7):
    """The two ways to score a pair agree, and ``Inverse(Inverse(t))`` does what t does.

    Where forward is deterministic, ``inverse_and_ldj`` gives the contribution that ``forward``
    gives at the x it returned, and leads back to the same z.
    """
    t, gaps, context = trial.t, {}, trial.context(n)
    x, latent = trial.inputs(n)[0], trial.latents(n)
    if not t.stochastic_forward:
        generated, ldj = t.inverse_and_ldj(latent, context)
        again, expected = t(generated, context)
        gaps["z"], gaps["ldj"] = gap(again, latent), gap(ldj, expected)
    twice = Inverse(Inverse(t))
    for name, method, value, _ in trial.methods(x, latent):
        ours = trial.call(getattr(twice, name), value, context)
        gaps[f"Inverse(Inverse).{name}"] = max(map(gap, ours, trial.call(method, value, context)))
    return f"both scores of a pair agree, within {expect_small(gaps, tolerance):.3g}", gaps
