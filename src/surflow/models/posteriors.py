"""Posteriors of VAEs: a diagonal normal, and flows after it, from one shared net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surflow.distributions import DiagonalNormal
from surflow.errors import check_choice, check_whole
from surflow.flow import Flow, FlowDistribution
from surflow.nets import MLP
from surflow.transforms import (
    AffineCoupling,
    Inverse,
    MaskedAffineAutoregressive,
    Planar,
    Radial,
    Sylvester,
    Transform,
)


@dataclass(frozen=True)
class Layers:
    """What layers of a flow over latents are made of.

    Attributes:
        features: L, the size of the latent.
        num_layers: how many.
        context_features: H features that their parameters follow from; 0: they are free.
        hidden_features: hidden layers of the net of a coupling or an autoregressive layer.
        activation: of that net.
    """

    features: int
    num_layers: int
    context_features: int
    hidden_features: Sequence[int]
    activation: str

    def head(self, count: int) -> nn.Module | None:
        """A linear map of the context to ``count`` parameters; None where they are free."""
        return nn.Linear(self.context_features, count) if self.context_features else None

    def head_of_each(self, count: int, start: Callable[[Tensor], object]) -> nn.Module | None:
        """One head for ``count`` parameters of every layer.

        Args:
            start: changes weights and biases in place, (layers, count, H + 1), at the start.
        """
        net = self.head(self.num_layers * count)
        if net is not None:
            with torch.no_grad():
                both = torch.cat([net.weight, net.bias.unsqueeze(1)], dim=1)
                start(both.view(self.num_layers, count, -1))
                net.weight.copy_(both[:, :-1])
                net.bias.copy_(both[:, -1])
        return net


def planar(of: Layers) -> list[Transform]:
    """Planar layers, turned so that a draw and its density are closed forms. Amortised ones start
    as the identity, at u = 0."""
    d = of.features
    net = of.head_of_each(2 * d + 1, lambda rows: rows[:, :d].zero_())
    return [Inverse(Planar(d, net, of.num_layers))]


def radial(of: Layers) -> list[Transform]:
    """Radial layers, turned likewise. Amortised ones start as the identity, at alpha = gamma."""
    d = of.features
    net = of.head_of_each(d + 2, lambda rows: rows[:, d + 1].copy_(rows[:, d]))
    return [Inverse(Radial(d, net, of.num_layers))]


def sylvester(of: Layers) -> list[Transform]:
    """Sylvester layers over all directions, turned likewise."""
    d = of.features
    return [Inverse(Sylvester(d, net=of.head(d * (2 * d + 2)))) for _ in range(of.num_layers)]


def affine_couplings(of: Layers) -> list[Transform]:
    """Affine couplings whose halves take turns. They start as the identity.

    Raises:
        ValueError: for a latent of one feature.
    """
    if of.features < 2:
        raise ValueError(f"model.latent_features: expected >= 2 for a coupling, got {of.features}")
    first = of.features // 2
    layers: list[Transform] = []
    for i in range(of.num_layers):
        swap = bool(i % 2)
        seen, changed = (of.features - first, first) if swap else (first, of.features - first)
        inner = (of.hidden_features, of.activation, of.context_features)
        net = MLP(seen, 2 * changed, *inner, zero_init=True)
        layers.append(AffineCoupling(net, scale="tanh_exp", swap=swap))
    return layers


def masked_affine(of: Layers) -> list[Transform]:
    """Masked affine layers, every second in reversed order. They start as the identity.

    As they stand the density takes one pass (MAF); turned round, a draw does (IAF).
    """
    return [
        MaskedAffineAutoregressive(
            of.features,
            scale="tanh_exp",
            hidden_features=of.hidden_features,
            activation=of.activation,
            context_features=of.context_features,
            ordering="reversed" if i % 2 else "natural",
            zero_init=True,
        )
        for i in range(of.num_layers)
    ]


def inverse_autoregressive(of: Layers) -> list[Transform]:
    """Masked affine layers, turned round (IAF)."""
    return [Inverse(layer) for layer in masked_affine(of)]


def none(of: Layers) -> list[Transform]:
    """The diagonal normal alone, which has no layers."""
    raise ValueError(f"model.num_layers: expected 0 with posterior=diagonal, got {of.num_layers}")


POSTERIORS: dict[str, Callable[[Layers], list[Transform]]] = {
    "diagonal": none,
    "planar": planar,
    "radial": radial,
    "sylvester": sylvester,
    "realnvp": affine_couplings,
    "iaf": inverse_autoregressive,
}


class TanhHeads(nn.Module):
    """tanh of L pairs of a mean and a logarithm, the latter times a share: 1 where it is that of a
    standard deviation, 1/2 where it is that of a variance."""

    def __init__(self, features: int, share: float) -> None:
        super().__init__()
        scale = torch.tensor([1.0, share]).repeat(features)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        return torch.tanh(raw) * self.scale


HEADS: dict[str, Callable[[int], list[nn.Module]]] = {
    "linear": lambda features: [],
    "tanh_deviation": lambda features: [TanhHeads(features, 1.0)],
    "tanh_variance": lambda features: [TanhHeads(features, 0.5)],
}
"""What follows the linear map to mean and log-scale: nothing; tanh of the mean and of log σ, or of
log σ²."""


def flow_posterior(
    latent_features: int,
    embed: nn.Module,
    embed_features: int,
    posterior: str = "diagonal",
    num_layers: int = 0,
    amortised: bool = True,
    hidden_features: Sequence[int] = (320,),
    activation: str = "relu",
    heads: str = "linear",
) -> FlowDistribution:
    r"""A diagonal normal whose draws go through layers of a flow, all from one net of x.

    .. math:: z_0 \sim \mathcal N(\mu(h), \sigma^2(h)), \quad z = f_k \circ \dots \circ f_1(z_0;
              h), \qquad h = \mathrm{embed}(x)

    A draw and its density take one pass of ``embed`` and one of each layer. The density of a given
    z takes the layers' other direction: a scalar root (planar), a closed form (radial, coupling), L
    steps (IAF).

    Args:
        latent_features: L.
        embed: x -> h, (B, *event) -> (B, H).
        embed_features: H.
        posterior: diagonal, planar, radial, sylvester, realnvp or iaf.
        num_layers: k; 0 for the diagonal one, and with 0 every posterior is the diagonal one.
        amortised: whether the layers' parameters follow from h (planar, radial, sylvester: by a
            linear map a layer; couplings and masked layers: h enters their nets), or are free.
        hidden_features, activation: of the nets of couplings and masked layers.
        heads: of mean and scale: linear, tanh_deviation or tanh_variance; see ``HEADS``.

    Raises:
        ValueError: for an unknown posterior or head, a number of layers that does not fit, or a
            latent too small for it.

    Source: Rezende & Mohamed 2015, arXiv 1505.05770 (planar, radial); van den Berg et al. 2018,
    arXiv 1803.05649 (Sylvester); Kingma et al. 2016, arXiv 1606.04934 (IAF); Dinh et al. 2017,
    arXiv 1605.08803 (couplings).
    """
    check_choice("model.posterior", posterior, POSTERIORS)
    check_whole("model.num_layers", num_layers, least=0)
    check_choice("model.heads", heads, HEADS)
    linear = nn.Linear(embed_features, 2 * latent_features)
    after = HEADS[heads](latent_features)
    base = DiagonalNormal(latent_features, net=nn.Sequential(linear, *after) if after else linear)
    context = embed_features if amortised else 0
    of = Layers(latent_features, num_layers, context, hidden_features, activation)
    layers = POSTERIORS[posterior](of) if num_layers else []
    # the first layer after the draw is the last of the flow, which infers from z to z_0
    return FlowDistribution(Flow(base, layers[::-1]), latent_features, embed)
