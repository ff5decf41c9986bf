"""The uniform distribution on a box."""

from collections.abc import Sequence

import torch
from torch import Tensor

from surflow.checks import InputError
from surflow.distributions.base import Distribution, register_edges, sum_event


class Uniform(Distribution):
    r"""Uniform on a box, :math:`x_d \in [l_d, h_d]`.

    .. math:: \log p(x) = -\sum_d \log(h_d - l_d)

    Args:
        low, high: the edges, broadcastable to the event.

    Raises:
        ValueError: unless low < high everywhere, or if an edge does not broadcast; from
            ``sample``, for a temperature other than 1, which a uniform does not have.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        low: float | Sequence[float] | Tensor = 0.0,
        high: float | Sequence[float] | Tensor = 1.0,
    ) -> None:
        super().__init__(event_shape)
        register_edges(self, low, high)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        inside = (x >= self.low) & (x <= self.high)
        density = torch.where(inside, -(self.high - self.low).log(), -torch.inf)
        return sum_event(density.to(torch.promote_types(x.dtype, density.dtype)))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        if temperature != 1.0:
            raise InputError(f"expected temperature 1, got {temperature}")
        u = torch.rand((n, *self.event_shape), device=self.low.device, dtype=self.low.dtype)
        return self.low + (self.high - self.low) * u
