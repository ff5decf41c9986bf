"""The Haar wavelet transform of an image: block means, and what they leave out."""

import math

import torch
from torch import Tensor

from surflow.checks import InputError
from surflow.distributions import DiagonalNormal
from surflow.transforms.base import Bijection, Example, zero_ldj
from surflow.transforms.bijections.squeeze import to_channels, to_pixels


class Haar(Bijection):
    r"""One level of the Haar transform, scaled so that the coarse part is the image at half size.

    .. math:: m = \tfrac14 (a + b + c + d), \quad (u, v, w) = \tfrac12 (a - b + c - d,\
              a + b - c - d,\ a - b - c + d), \qquad
              \mathrm{ldj} = -\tfrac14 C H W \log 2

    for each 2×2 block (a b; c d) of each channel. The first C channels of z are the means m, so
    that a coarse image lies where the fine one did; then come u of all channels, v and w.

    Exact. x is (B, C, H, W), z (B, 4 C, H / 2, W / 2).

    Raises:
        ValueError: for an odd H or W, or, from ``inverse``, channels not divisible by 4.

    Cost: forward and inverse two copies and O(D) sums.
    Source: Haar 1910; as a layer of a flow, Yu et al. 2020 (Wavelet Flow), arXiv 2010.13821,
    Sec. 3.

    >>> z, ldj = Haar()(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]))
    >>> z.flatten().tolist(), round(ldj.item(), 4)
    ([3.0, -2.0, -3.0, 1.0], -0.6931)
    """

    reversible = True
    event_shape = (None, None, None)
    latent_shape = (None, None, None)

    @staticmethod
    def _ldj(elements: int, like: Tensor) -> Tensor:
        return zero_ldj(like) - 0.25 * elements * math.log(2.0)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise InputError(f"expected an even height and width, got shape {tuple(x.shape)}")
        a, b, c, d = to_channels(x, 2).unflatten(1, (-1, 4)).unbind(2)
        left, right, down, across = a + c, b + d, a - c, b - d
        parts = (
            0.25 * (left + right),
            0.5 * (left - right),
            0.5 * (down + across),
            0.5 * (down - across),
        )
        return torch.cat(parts, dim=1), self._ldj(x[0].numel(), x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        if z.shape[1] % 4:
            raise InputError(f"expected channels divisible by 4, got shape {tuple(z.shape)}")
        mean, u, v, w = z.chunk(4, dim=1)
        left, right = mean + 0.5 * u, mean - 0.5 * u
        down, across = 0.5 * (v + w), 0.5 * (v - w)
        block = (left + down, right + across, left - down, right - across)
        return to_pixels(torch.stack(block, dim=2).flatten(1, 2), 2)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, context), self._ldj(z[0].numel(), z)

    @classmethod
    def example(cls) -> Example:
        # the mean of four has half their deviation
        scale = torch.tensor([0.5, 1.0, 1.0, 1.0]).view(4, 1, 1)
        return Example(
            cls(), DiagonalNormal((1, 2, 4), scale=1.2), DiagonalNormal((4, 1, 2), scale=scale)
        )
