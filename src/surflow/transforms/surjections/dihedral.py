"""Folding the plane by the symmetries of the square."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surflow.checks import require
from surflow.transforms.base import Example, Transform

LOG_8 = math.log(8.0)


class DihedralFold(Transform):
    r"""The inference surjection of the plane onto one of the square's eight triangles.

    .. math:: a = |x_1|,\ b = |x_2|,\quad u = |a - b|/\sqrt2,\ v = (a + b)/\sqrt2,\quad
              z = (u/v,\ v), \qquad V = -\log 8 - \log v

    Three absolute values in a row: of both coordinates, and, turned by 45°, of their difference.
    The eight preimages (two signs, one exchange) are equally likely, so the model is symmetric
    under the dihedral group D4. The first latent is in [0, 1], the second one positive. Exact:
    forward is deterministic. The origin alone has no preimage distribution of its own; there
    u/v is taken as 0 and v as the smallest positive number.

    Raises:
        ValueError: for an x that is not (B, 2); from ``inverse``, for z outside [0, 1] x (0, inf).

    Source: the absolute value of Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2, composed.
    """

    bijective = False
    stochastic_forward = False
    stochastic_inverse = True
    event_shape = (2,)
    image = ((0.0, 0.0), (1.0, math.inf))
    """Lower and upper edges of the latents."""

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = x.abs().unbind(1)
        v = ((a + b) * math.sqrt(0.5)).clamp_min(torch.finfo(x.dtype).tiny)
        u = (a - b).abs() * math.sqrt(0.5)
        ldj = -LOG_8 - torch.log(v if v.dtype == torch.float64 else v.float())
        return torch.stack([u / v, v], dim=1), ldj

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        t, v = z.unbind(1)
        where = self.where("inverse")
        require((t >= 0) & (t <= 1), where, "the first latent in [0, 1]", t)
        require(v > 0, where, "the second latent > 0", v)
        half = v * math.sqrt(0.5)
        larger, smaller = half * (1 + t), half * (1 - t)
        x = torch.stack([larger, smaller], dim=1)
        coins = torch.randint(2, (len(z), 3), device=z.device).bool()
        x = torch.where(coins[:, 2:], x.flip(1), x)
        return torch.where(coins[:, :2], x, -x)

    @classmethod
    def example(cls) -> Example:
        from surflow.distributions import DiagonalNormal, HalfNormal, Uniform

        wide = DiagonalNormal((2,), scale=1.5)

        class Product(torch.nn.Module):
            """Uniform times a half-normal."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = Uniform((1,)), HalfNormal((1,), loc=0.2)

            def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
                return self.first.log_prob(z[:, :1]) + self.second.log_prob(z[:, 1:])

            def sample(self, n: int) -> Tensor:
                return torch.cat([self.first.sample(n), self.second.sample(n)], dim=1)

        return Example(cls(), wide.sample_and_log_prob, Product())
