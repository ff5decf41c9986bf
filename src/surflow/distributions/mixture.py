"""Mixtures: of any distributions, and of diagonal normals in one vectorised class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_at_least
from surflow.distributions.base import Distribution, draw_index, register_value, sum_event
from surflow.distributions.location_scale import HALF_LOG_TWO_PI
from surflow.score_function import record_score


class Mixture(Distribution):
    r"""A mixture of any distributions over the same events.

    .. math:: \log p(x) = \log \sum_k \pi_k\, p_k(x)

    Args:
        components: distributions with one event shape; conditional ones share the context.
        weights: positive weights, (K,), normalised here; equal if left out.
        learn: whether the log-weights are a parameter.

    Raises:
        ValueError: for no component, different event shapes, or weights that are not positive.
    """

    def __init__(
        self,
        components: Sequence[Distribution],
        weights: Sequence[float] | Tensor | None = None,
        learn: bool = False,
    ) -> None:
        if not components or len({c.event_shape for c in components}) != 1:
            shapes = [c.event_shape for c in components]
            raise ValueError(f"Mixture: expected components with one event shape, got {shapes}")
        super().__init__(components[0].event_shape)
        self.components = nn.ModuleList(components)
        self.discrete = components[0].discrete
        self.integer = components[0].integer
        weights = torch.ones(len(components)) if weights is None else torch.as_tensor(weights)
        if weights.shape != (len(components),) or not bool((weights > 0).all()):
            raise ValueError(
                f"Mixture: expected {len(components)} positive weights, got {weights.tolist()}"
            )
        logits = weights.to(torch.get_default_dtype()).log()
        register_value(self, "logits", logits, learn)

    conditional = property(lambda self: any(c.conditional for c in self.components))

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        parts = torch.stack([c.log_prob(x, context) for c in self.components], dim=-1)
        return torch.logsumexp(parts + F.log_softmax(self.logits, 0), dim=-1)

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        draws = torch.stack([c.sample(n, context, temperature) for c in self.components])
        if n == 0:
            return draws[0]
        index = torch.multinomial(self.logits.softmax(0), n, replacement=True)
        if not self.discrete:  # one that is records the whole of its log-mass
            record_score(F.log_softmax(self.logits, 0)[index])
        return draws[index, torch.arange(n, device=index.device)]


class DiagonalNormalMixture(Distribution):
    r"""A mixture of K diagonal normals, all components at once.

    .. math:: \log p(x) = \log \sum_k \pi_k \prod_d \mathcal N(x_d; \mu_{kd}, \sigma_{kd}^2)

    Args:
        num_components: K.
        spread: standard deviation of the initial locations (unconditional).
        learn: whether weights, locations and log-scales are parameters.
        net: maps a context to (B, C * 3 K, ...); per element K weight logits (averaged over the
            event, since a mixture has one weight a component), K locations, K log-scales.

    Raises:
        ValueError: for K < 1.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_components: int,
        spread: float = 1.0,
        learn: bool = True,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, net)
        require_at_least("DiagonalNormalMixture", 1, num_components=num_components)
        self.num_components = num_components
        if net is not None:
            return
        shape = (num_components, *self.event_shape)
        register_value(self, "logits", torch.zeros(num_components), learn)
        register_value(self, "loc", torch.randn(shape) * spread, learn)
        register_value(self, "log_scale", torch.zeros(shape), learn)

    def parameters_of(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (b, K), locations and log-scales (b, K, *event); b is 1 or the batch."""
        k = self.num_components
        if not self.conditional:
            parts = F.log_softmax(self.logits, 0), self.loc, self.log_scale
            return tuple(part.unsqueeze(0) for part in parts)
        parts = torch.stack(self._net_parameters(context, 3 * k), dim=1)
        logits, loc, log_scale = parts.split(k, dim=1)
        return F.log_softmax(logits.flatten(2).mean(2), 1), loc, log_scale

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        log_weight, loc, log_scale = self.parameters_of(context)
        eps = (x.unsqueeze(1) - loc) * torch.exp(-log_scale)
        density = -0.5 * eps.square() - HALF_LOG_TWO_PI - log_scale
        per_component = sum_event(density.flatten(0, 1)).unflatten(0, density.shape[:2])
        return torch.logsumexp(per_component + log_weight, dim=1)

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        log_weight, loc, log_scale = self.parameters_of(context)
        shape = (n, self.num_components, *self.event_shape)
        if n == 0:
            return loc.new_empty((0, *self.event_shape))
        log_weight = log_weight.expand(n, -1)
        index = draw_index(log_weight.exp()).squeeze(1)
        rows = torch.arange(n, device=index.device)
        record_score(log_weight[rows, index])
        loc, log_scale = loc.expand(shape)[rows, index], log_scale.expand(shape)[rows, index]
        return loc + torch.exp(log_scale) * temperature * torch.randn_like(loc)
