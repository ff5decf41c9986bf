"""From a box with finite or infinite edges to the whole space."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surflow.checks import require, require_positive
from surflow.distributions import StandardNormal
from surflow.distributions.base import sum_event
from surflow.transforms.base import Bijection, Example


class BoxToReal(Bijection):
    r"""Map each coordinate's interval onto the real line.

    .. math:: z_d = \begin{cases}
        \mathrm{logit}((x_d - l_d)/(h_d - l_d)) & l_d, h_d \text{ finite} \\
        s_\beta(x_d - l_d) & h_d = \infty \\
        -s_\beta(h_d - x_d) & l_d = -\infty \\
        x_d & \text{both infinite}\end{cases}
        \qquad s_\beta(y) = \mathrm{softplus}^{-1}(\beta y)/\beta

    Args:
        low, high: the edges, (D,) each; infinite ones are allowed.
        sharpness: β. A half-line is left as it is but for a zone of width about 1/β at its edge.

    Raises:
        ValueError: unless low < high everywhere and β > 0; for x on or outside an edge.

    Cost: O(D) a row; forward and inverse alike.
    Source: the logit of Dinh et al. 2017, arXiv 1605.08803, Sec. 4.1, and the inverse softplus,
    chosen by the edges.

    >>> layer = BoxToReal(low=[0.0, 0.0], high=[1.0, math.inf])
    >>> layer.inverse(torch.zeros(1, 2))
    tensor([[0.5000, 0.6931]])
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], sharpness: float = 1.0) -> None:
        super().__init__()
        require_positive("BoxToReal", sharpness=sharpness)
        self.sharpness = float(sharpness)
        low_, high_ = (torch.as_tensor(t, dtype=torch.get_default_dtype()) for t in (low, high))
        if low_.dim() != 1 or low_.shape != high_.shape or not bool((low_ < high_).all()):
            raise ValueError(f"BoxToReal: expected low < high, (D,) each, got {low} and {high}")
        self.event_shape = tuple(low_.shape)
        self.register_buffer("low", low_)
        self.register_buffer("high", high_)
        for name in ("boxed", "half_open", "origin", "direction", "width"):
            self.register_buffer(name, None, persistent=False)
        self._derive()

    def _derive(self) -> None:
        """What follows from the edges."""
        low, high = self.low, self.high
        edges = zip(low.tolist(), high.tolist(), strict=True)
        self._support = "values in " + " x ".join(f"({a:g}, {b:g})" for a, b in edges)
        finite_low, finite_high = low.isfinite(), high.isfinite()
        # which of the four maps a box needs is known here, so that an unused one costs nothing
        self._boxed = bool((finite_low & finite_high).any())
        self._half_open = bool((finite_low ^ finite_high).any())
        self.boxed, self.half_open = finite_low & finite_high, finite_low ^ finite_high
        # x = origin + direction * width * y, y in (0, 1) or (0, inf)
        self.origin = torch.where(finite_low, low, torch.where(finite_high, high, 0.0))
        self.direction = torch.where(~finite_low & finite_high, -torch.ones_like(low), 1.0)
        self.width = torch.where(self.boxed, high - low, 1.0)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._derive()

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        require((x > self.low) & (x < self.high), self._support, x)
        z, ldj = x, torch.zeros_like(x)
        y = (x - self.origin) * self.direction / self.width
        if self._boxed:
            inner = torch.where(self.boxed, y, 0.5)
            log_y, log_rest = torch.log(inner), torch.log1p(-inner)
            z = torch.where(self.boxed, log_y - log_rest, z)
            ldj = torch.where(self.boxed, -log_y - log_rest - self.width.log(), ldj)
        if self._half_open:
            inner = torch.where(self.half_open, y, 1.0)
            log_slope = torch.log(-torch.expm1(-self.sharpness * inner))
            half = self.direction * (inner + log_slope / self.sharpness)
            z = torch.where(self.half_open, half, z)
            ldj = torch.where(self.half_open, -log_slope, ldj)
        return z, sum_event(ldj)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        x = z
        if self._boxed:
            x = torch.where(self.boxed, self.origin + self.width * torch.sigmoid(z), x)
        if self._half_open:
            length = F.softplus(self.sharpness * self.direction * z) / self.sharpness
            x = torch.where(self.half_open, self.origin + self.direction * length, x)
        return x

    @classmethod
    def example(cls) -> Example:
        low, high = [-1.0, 0.5, -math.inf, -math.inf], [2.0, math.inf, 1.0, math.inf]
        transform = cls(low, high, sharpness=2.0)
        normal = StandardNormal((4,))

        def sample(n: int) -> tuple[Tensor, Tensor]:
            z = 1.5 * normal.sample(n)
            log_r = normal.log_prob(z / 1.5) - 4 * math.log(1.5)
            # closed-form derivatives of the four maps, written independently of the layer
            a = -1.0 + 3.0 / (1 + torch.exp(-z[:, 0]))
            b = 0.5 + torch.log1p(torch.exp(2 * z[:, 1])) / 2
            c = 1.0 - torch.log1p(torch.exp(-2 * z[:, 2])) / 2
            x = torch.stack([a, b, c, z[:, 3]], dim=1)
            s0 = torch.sigmoid(z[:, 0])
            s1, s2 = torch.sigmoid(2 * z[:, 1]), torch.sigmoid(-2 * z[:, 2])
            return x, log_r - torch.log(3.0 * s0 * (1 - s0)) - torch.log(s1) - torch.log(s2)

        return Example(transform, sample, normal)
