"""Folding the plane by the symmetries of the square."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surflow.checks import require
from surflow.distributions import DiagonalNormal, HalfNormal
from surflow.transforms.base import Box, Example, Surjection, zero_ldj

LOG_8 = math.log(8.0)
ROOT_2 = math.sqrt(2.0)


class DihedralFold(Surjection):
    r"""The inference surjection of the plane onto one eighth of it, by the square's symmetries.

    .. math:: a = |x_1|,\ b = |x_2|,\quad z = (|a - b|/\sqrt2,\ \sqrt2\,\min(a, b)),
              \qquad V = -\log 8

    Three absolute values in a row, of both coordinates and of their difference, in coordinates in
    which the image is the positive quadrant and the volume is kept. The eight preimages (two
    signs, one exchange) are equally likely, so a model that follows is symmetric under the dihedral
    group D4. Exact: forward is deterministic. A difference below the rounding error of a and b
    counts as that error, so that a point on a diagonal stays inside the quadrant.

    Raises:
        ValueError: for an x that is not (B, 2); from ``inverse``, for a negative z.

    Cost: O(1) a row; forward and inverse alike.
    Source: the absolute value of Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2, composed.

    >>> layer = DihedralFold()
    >>> layer(torch.tensor([[-3.0, 1.0], [1.0, 3.0]]))
    (tensor([[1.4142, 1.4142],
            [1.4142, 1.4142]]), tensor([-2.0794, -2.0794]))
    """

    event_shape = (2,)
    constraint = "the latents are >= 0"

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = x.abs().unbind(1)
        # a and b carry a rounding error; a difference below it is not known to be smaller
        floor = torch.finfo(x.dtype).eps * torch.maximum(a, b)
        difference = torch.maximum((a - b).abs(), floor)
        z = torch.stack([difference / ROOT_2, ROOT_2 * torch.minimum(a, b)], dim=1)
        return z, zero_ldj(x) - LOG_8

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        require(z >= 0, "values >= 0", z)
        difference, smaller = ROOT_2 * z[:, 0], z[:, 1] / ROOT_2
        x = torch.stack([smaller + difference, smaller], dim=1)
        coins = torch.randint(2, (len(z), 3), device=z.device).bool()
        x = torch.where(coins[:, 2:], x.flip(1), x)
        return torch.where(coins[:, :2], x, -x)

    def image(self, low: Sequence[float], high: Sequence[float]) -> Box:
        return [0.0, 0.0], [math.inf, math.inf]

    @classmethod
    def example(cls) -> Example:
        return Example(cls(), DiagonalNormal((2,), scale=2.0), HalfNormal((2,)))
