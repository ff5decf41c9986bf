r"""Bounds in their terms: what a VAE pays for the data, for its posterior and for its prior.

.. math:: \mathcal L(x) = \underbrace{\log p(x \mid z)}_{\text{reconstruction}}
          - \underbrace{(\log q(z \mid x) - \log p(z))}_{\text{divergence}}, \qquad z \sim q(z|x)

Every VAE layer has an encoder, a decoder and, after it, its prior. With the terms apart a bound can
be annealed, given free bits, and asked which latents it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surflow.checks import require_at_least
from surflow.distributions import StandardNormal
from surflow.distributions.location_scale import HALF_LOG_TWO_PI
from surflow.errors import check_choice
from surflow.flow import Flow
from surflow.numeric import repeat_rows
from surflow.score_function import close_tape, open_tape
from surflow.transforms import VAE, Transform


@dataclass(frozen=True)
class Terms:
    """A bound's terms, each for one draw of every row.

    Attributes:
        reconstruction: log p(x|z) of the first VAE layer, and contributions before it, (B,).
        log_q: log q(z|x), added up over VAE layers, (B,).
        log_prior: log p(z): everything after the first VAE layer, (B,).
        divergence: (B, G), log q - log p(z) of each of G groups: one a latent dimension where
            posterior and prior are both factorised, else one in all.
        layers: of log q, what the layers of a flow posterior add, -log |det|, (B,).
        num_latents: L, latent dimensions of the first VAE layer.
    """

    reconstruction: Tensor
    log_q: Tensor
    log_prior: Tensor
    divergence: Tensor
    layers: Tensor
    num_latents: int

    @property
    def bound(self) -> Tensor:
        """log p(x|z) + log p(z) - log q(z|x), (B,), nats."""
        return self.reconstruction + self.log_prior - self.log_q


def has_vae_layer(flow: Flow) -> bool:
    """Whether a flow's bound has the terms of :func:`terms`."""
    return any(isinstance(layer, VAE) for _, layer in flow.transforms.layers())


def split_at_vae(flow: Flow, where: str) -> tuple[list[Transform], VAE, list[Transform]]:
    """The layers before the first VAE layer, that layer, and those after it: not copies.

    Raises:
        ValueError: for a flow without a VAE layer; ``where`` is for the message.
    """
    layers = [layer for _, layer in flow.transforms.layers()]
    for i, layer in enumerate(layers):
        if isinstance(layer, VAE):
            return layers[:i], layer, layers[i + 1 :]
    raise ValueError(f"{where}: expected a flow with a VAE layer, got none")


def prior_flow(flow: Flow) -> Flow:
    """What comes after the first VAE layer, as a flow over latents: its density, and its draws.

    The layers are those of ``flow``, not copies.

    Raises:
        ValueError: for a flow without a VAE layer.

    >>> from surflow.distributions import DiagonalNormal
    >>> from surflow.nets import MLP
    >>> from surflow.transforms import Affine
    >>> encoder, decoder = (DiagonalNormal(2, net=MLP(2, 4, [8])) for _ in range(2))
    >>> flow = Flow(StandardNormal(2), [VAE(encoder, decoder), Affine(2, scale=0.5)])
    >>> [name for name, _ in prior_flow(flow).layers()]
    ['0.Affine', 'base.StandardNormal']
    """
    return Flow(flow.base, split_at_vae(flow, "prior_flow")[2])


def _draw(
    layer: VAE, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """z, log q(z|x), the share of its layers and, of a factorised q, its parts by dimension,
    (B, L)."""
    given = layer._given(x, context)
    if not layer.encoder.factorised:
        z, log_q, layers = layer.encoder.draw_in_parts(context=given)
        return z, log_q + layers, layers, None
    loc, log_scale = layer.encoder.normal_parameters(given)
    eps = torch.randn(loc.shape, device=loc.device, dtype=loc.dtype)
    by_dimension = (-0.5 * eps.square() - HALF_LOG_TWO_PI - log_scale).flatten(1)
    z, log_q = loc + torch.exp(log_scale) * eps, by_dimension.sum(1)
    return z, log_q, torch.zeros_like(log_q), by_dimension


def terms(flow: Flow, x: Tensor, context: Tensor | None = None, num_samples: int = 1) -> Terms:
    r"""One draw (or several) of every row's bound, term by term.

    Args:
        flow: a flow with at least one VAE layer.
        x: (B, *event).
        context: (B, ...) or None.
        num_samples: S; with more than one the terms are (S B,), sample s of row b at s B + b.

    Returns:
        the terms; ``bound`` is what ``flow.log_prob`` gives for the same draws.

    Raises:
        ValueError: for a flow without a VAE layer.

    Source: Kingma & Welling 2014, arXiv 1312.6114, eq. 3; hierarchies as Sønderby et al. 2016,
    arXiv 1602.02282.
    """
    before, vae, after = split_at_vae(flow, "terms")
    require_at_least("terms", 1, num_samples=num_samples)
    v, context = repeat_rows(x, num_samples), repeat_rows(context, num_samples)
    reconstruction: list[Tensor] = []
    log_q: list[Tensor] = []
    log_prior: list[Tensor] = []
    of_layers: list[Tensor] = []
    num_latents = 0
    by_dimension: Tensor | None = None
    for layer in [*before, vae, *after]:
        found = log_prior if log_q else reconstruction
        if not isinstance(layer, VAE):
            v, part = layer(v, context)
            found.append(part)
            continue
        z, score, of_flow, by_dimension = _draw(layer, v, context)
        found.append(layer.decoder.log_prob(v, layer._given(z, context)))
        log_q.append(score)
        of_layers.append(of_flow)
        num_latents = num_latents or z[0].numel()
        v = z
    log_prior.append(flow.base.log_prob(v, context))
    total_q, total_prior = sum(log_q), sum(log_prior)
    simple = len(log_q) == len(log_prior) == 1 and isinstance(flow.base, StandardNormal)
    if simple and by_dimension is not None:
        prior = -0.5 * v.square() - HALF_LOG_TWO_PI
        divergence = by_dimension - prior.flatten(1)
    else:
        divergence = (total_q - total_prior).unsqueeze(1)
    return Terms(
        reconstruction=sum(reconstruction),
        log_q=total_q,
        log_prior=total_prior,
        divergence=divergence,
        layers=sum(of_layers),
        num_latents=num_latents,
    )


# Annealing


def divergence(t: Terms, beta: float | Tensor, costs: Tensor) -> Tensor:
    """log p(x|z) - β (log q(z|x) - log p(z)): the β-VAE's, and the usual warm-up."""
    return t.reconstruction - beta * costs


def joint(t: Terms, beta: float | Tensor, costs: Tensor) -> Tensor:
    """β log p(x, z) - log q(z|x): the tempered model of Rezende & Mohamed 2015."""
    return beta * (t.reconstruction + t.log_prior) - (t.log_prior + costs)


def latent_mean(t: Terms, beta: float | Tensor, costs: Tensor) -> Tensor:
    """log p(x|z) + log |det| - β (log q_0(z_0|x) - log p(z)) / L: no bound at any β.

    It is what a program trains that adds L columns of log-densities to a single one of log p(x|z),
    and takes the mean: Kong & Li, github.com/blisc/CSC412-Project.
    """
    return t.reconstruction - t.layers - beta * (costs - t.layers) / t.num_latents


ANNEALED: dict[str, Callable[[Terms, float | Tensor, Tensor], Tensor]] = {
    "divergence": divergence,
    "joint": joint,
    "latent_mean": latent_mean,
}
NEVER_A_BOUND = ("latent_mean",)
"""Of these, those that are no bound at β = 1 either."""


def linear_warm_up(step: int, start: float = 1.0, steps: int = 0) -> float:
    r"""β at an optimizer step: :math:`\min(1, \beta_0 + t / T)`, and 1 where T is 0.

    Args:
        step: t, from 0.
        start: β_0, in [0, 1].
        steps: T; 0: no warm-up.

    Raises:
        ValueError: for a start outside [0, 1] or negative steps.

    Source: Rezende & Mohamed 2015, arXiv 1505.05770, Sec. 6.2 (β_0 = 0.01, T = 10,000).

    >>> [linear_warm_up(t, 0.01, 10_000) for t in (0, 5_000, 20_000)]
    [0.01, 0.51, 1.0]
    """
    if not 0 <= start <= 1 or steps < 0:
        raise ValueError(
            f"linear_warm_up: expected start in [0, 1] and steps >= 0, got {start} and {steps}"
        )
    return min(1.0, start + step / steps) if steps else 1.0


def annealed_elbo(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    beta: float | Tensor = 1.0,
    free_bits: float = 0.0,
    num_samples: int = 1,
    annealed: str = "divergence",
) -> Tensor:
    r"""The bound as it is trained at first: annealed, and with nats that cost nothing.

    .. math:: \log p(x|z) - \beta \sum_g \max\big(\lambda,\ \overline{\log q_g - \log p_g}\big)
              \quad\text{or}\quad \beta \log p(x, z) - \log q(z|x)

    At β = 1 and λ = 0 these are :func:`surflow.objectives.elbo`, draw for draw. Otherwise, and with
    :func:`latent_mean`, it is no bound on the likelihood, and never to be reported as one.

    Args:
        flow: a flow with a VAE layer.
        x: (B, *event).
        context: (B, ...) or None.
        beta: β, a number or a tensor of no dimensions.
        free_bits: λ in nats, for each group of latents (:class:`Terms`): a group whose mean over
            the batch (the bar above) is less costs λ, without a gradient.
        num_samples: S, draws averaged per row.
        annealed: what β is a factor of: divergence, joint or latent_mean.

    Returns:
        (B,), nats.

    Raises:
        ValueError: for a flow without a VAE layer, an unknown name, a negative λ, or learned
            discrete latents (see :func:`surflow.objectives.elbo`).

    Source: Rezende & Mohamed 2015, arXiv 1505.05770, Sec. 6.2 (joint); Bowman et al. 2016, arXiv
    1511.06349, and Higgins et al. 2017 (divergence); Kingma et al. 2016, arXiv 1606.04934, App. C.8
    (free bits).
    """
    check_choice("annealed_elbo: annealed", annealed, ANNEALED)
    if not free_bits >= 0:
        raise ValueError(f"annealed_elbo: expected free_bits >= 0, got {free_bits}")
    tape = open_tape()
    try:
        t = terms(flow, x, context, num_samples)
    finally:
        close_tape()
    if tape:
        raise ValueError(
            "annealed_elbo: expected continuous latents, got learned discrete draws; take "
            "beta=1 and free_bits=0, which is elbo"
        )
    if free_bits:
        mean = t.divergence.mean(0)
        costs = torch.where(mean > free_bits, t.divergence, free_bits).sum(1)
    else:
        costs = t.log_q - t.log_prior
    value = ANNEALED[annealed](t, beta, costs)
    return value.unflatten(0, (num_samples, -1)).mean(0)


# Which latents are used


@dataclass(frozen=True)
class ActiveUnits:
    """How far a posterior's mean moves with the data, by latent dimension.

    Attributes:
        variance: (L,), of the posterior mean over the data.
        threshold: above which a dimension counts as active.
    """

    variance: Tensor
    threshold: float

    @property
    def count(self) -> int:
        """Active dimensions."""
        return int((self.variance > self.threshold).sum())

    @property
    def of(self) -> int:
        """All dimensions."""
        return self.variance.numel()


@torch.no_grad()
def active_units(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    num_samples: int = 32,
    threshold: float = 1e-2,
    rows: int = 1024,
) -> ActiveUnits:
    r"""The latent dimensions that say something about the data.

    .. math:: A_l = \mathrm{Var}_x\big(\mathbb E_{q(z|x)}[z_l]\big) > 10^{-2}

    The mean is the normal's own where the posterior is diagonal. That of a flow is estimated from S
    draws a row; the mean of :math:`\mathrm{Var}(z_l|x) / S`, from the same draws, is taken off, so
    that the variance is unbiased and may be below zero. The latent is that of the first VAE layer.

    Args:
        flow: a flow with a VAE layer.
        x: (N, *event), N >= 2.
        context: (N, ...) or None.
        num_samples: S >= 2, of a posterior without a mean in closed form.
        threshold: of the variance.
        rows: at a time.

    Raises:
        ValueError: for a flow without a VAE layer, fewer than 2 rows, or S < 2.

    Source: Burda et al. 2016, arXiv 1509.00519, Sec. 5.3 and App. C.
    """
    if len(x) < 2 or num_samples < 2:
        raise ValueError(
            f"active_units: expected at least 2 rows and 2 samples, got {len(x)} and {num_samples}"
        )
    before, vae, _ = split_at_vae(flow, "active_units")
    means, noise = [], []
    for start in range(0, len(x), rows):
        v = x[start : start + rows]
        seen = None if context is None else context[start : start + rows]
        for layer in before:
            v = layer.latent(v, seen)
        given = vae._given(v, seen)
        if vae.encoder.factorised:
            means.append(vae.encoder.normal_parameters(given)[0].flatten(1).double())
            continue
        z, _ = vae.encoder.sample_and_log_prob(context=given, num_samples=num_samples)
        z = z.flatten(1).double().unflatten(0, (num_samples, -1))
        means.append(z.mean(0))
        noise.append(z.var(0) / num_samples)
    variance = torch.cat(means).var(0)
    if noise:
        variance = variance - torch.cat(noise).mean(0)
    return ActiveUnits(variance.cpu(), threshold)
