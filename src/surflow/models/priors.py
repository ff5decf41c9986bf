"""Priors of VAEs: fixed and learned densities, and flows, over the latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surflow.distributions import DiagonalNormalMixture, Distribution, StandardNormal
from surflow.distributions.base import draw_index
from surflow.distributions.location_scale import HALF_LOG_TWO_PI
from surflow.errors import check_choice, check_whole
from surflow.flow import FlowDistribution
from surflow.models.posteriors import Layers, affine_couplings, masked_affine
from surflow.transforms import Transform

BaseAndLayers = tuple[Distribution, list[Transform]]


class VampPrior(Distribution):
    r"""A mixture of an encoder's posteriors at learned pseudo-inputs.

    .. math:: p(z) = \frac1K \sum_{k=1}^K q(z \mid u_k), \qquad u_k = \sigma(v_k)

    Args:
        encoder: q of the VAE layer, which keeps its parameters: a diagonal normal of
            :func:`~surflow.models.posteriors.flow_posterior`, on grey values in [0, 1].
        data_shape: the shape of one pseudo-input.
        num_components: K.

    Raises:
        ValueError: for another kind of encoder, or K < 1.

    Cost: a pass of the encoder's net over K pseudo-inputs, and O(K L) a row.

    Source: Tomczak & Welling 2018, arXiv 1705.07120, Sec. 3.
    """

    def __init__(
        self, encoder: FlowDistribution, data_shape: Sequence[int], num_components: int
    ) -> None:
        super().__init__(encoder.event_shape)
        if not encoder.factorised:
            raise ValueError(
                "model.prior: expected a diagonal posterior (num_layers=0) with vamp, got a flow"
            )
        check_whole("model.num_components", num_components)
        self._of = (encoder,)  # in a tuple: its parameters are registered with the VAE layer
        self.pseudo = nn.Parameter(torch.randn(num_components, *data_shape))

    def components(self) -> tuple[Tensor, Tensor]:
        """Locations and log-scales of the K posteriors, (K, L) each."""
        (encoder,) = self._of
        return encoder.normal_parameters(torch.sigmoid(self.pseudo))

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        loc, log_scale = self.components()
        eps = (x.unsqueeze(1) - loc) * torch.exp(-log_scale)
        parts = (-0.5 * eps.square() - HALF_LOG_TWO_PI - log_scale).sum(2)
        return torch.logsumexp(parts, 1) - math.log(len(loc))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        loc, log_scale = self.components()
        index = draw_index(loc.new_ones(n, len(loc))).squeeze(1)
        scale = torch.exp(log_scale[index]) * temperature
        return loc[index] + scale * torch.randn_like(scale)


@dataclass(frozen=True)
class Wanted:
    """What a prior is made of.

    Attributes:
        encoder: of the VAE layer before it.
        data_shape: of x.
        num_components: K of a mixture.
        spread: standard deviation of a mixture's locations at the start.
        num_layers: of a flow.
        hidden_features, activation: of the nets of a flow.
    """

    encoder: FlowDistribution
    data_shape: Sequence[int]
    num_components: int
    spread: float
    num_layers: int
    hidden_features: Sequence[int]
    activation: str

    def flow_of(self, make: Callable[[Layers], list[Transform]]) -> BaseAndLayers:
        """Layers after the VAE layer, and a standard normal after them."""
        (features,) = self.encoder.event_shape
        check_whole("model.prior_layers", self.num_layers)
        layers = make(Layers(features, self.num_layers, 0, self.hidden_features, self.activation))
        return StandardNormal(features), layers


PRIORS: dict[str, Callable[[Wanted], BaseAndLayers]] = {
    "standard": lambda of: (StandardNormal(of.encoder.event_shape), []),
    "mixture": lambda of: (
        DiagonalNormalMixture(of.encoder.event_shape, of.num_components, of.spread),
        [],
    ),
    "vamp": lambda of: (VampPrior(of.encoder, of.data_shape, of.num_components), []),
    "realnvp": lambda of: of.flow_of(affine_couplings),
    "autoregressive": lambda of: of.flow_of(masked_affine),
}
"""The standard normal; K diagonal normals, all learned; the posteriors of K learned pseudo-inputs;
affine couplings, or masked affine layers (MAF: an IAF turned round), before a standard normal."""


def prior_of(prior: str, of: Wanted) -> BaseAndLayers:
    """The base, and the layers after the VAE layer.

    Raises:
        ValueError: for an unknown prior, or parts that do not fit it.
    """
    check_choice("model.prior", prior, PRIORS)
    return PRIORS[prior](of)
