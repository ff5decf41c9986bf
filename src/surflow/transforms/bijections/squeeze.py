"""Space to channels and back."""

import torch.nn.functional as F
from torch import Tensor

from surflow.checks import InputError, require_at_least
from surflow.distributions import StandardNormal
from surflow.transforms.base import Bijection, Example, zero_ldj
from surflow.transforms.inverse import _InverseOf


def to_channels(x: Tensor, factor: int) -> Tensor:
    """Space to channels: (B, C, f H, f W) -> (B, C f², H, W), in one copy that lies as x does.

    (On a GPU ``pixel_unshuffle`` gives an image with channels last back with channels first.)
    """
    if x.stride(1) != 1:
        return F.pixel_unshuffle(x, factor)
    x = x.permute(0, 2, 3, 1).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))
    return x.permute(0, 1, 3, 5, 2, 4).flatten(3).permute(0, 3, 1, 2)  # from B h f w f C


def to_pixels(z: Tensor, factor: int) -> Tensor:
    """Channels to space: (B, C f², H, W) -> (B, C, f H, f W), in one copy that lies as z does."""
    if z.stride(1) != 1:
        return F.pixel_shuffle(z, factor)
    z = z.permute(0, 2, 3, 1).unflatten(3, (-1, factor, factor))  # B h w C f f
    return z.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class Squeeze(Bijection):
    r"""Blocks of pixels become channels.

    .. math:: z_{f^2 c + f i + j,\, h,\, w} = x_{c,\, f h + i,\, f w + j}, \quad
              0 \le i, j < f, \qquad \mathrm{ldj} = 0

    Args:
        factor: f, the side of a block; x is (B, C, H, W), z (B, f² C, H / f, W / f).

    Raises:
        ValueError: for f < 1; for H or W not divisible by f, or, from ``inverse``, channels not
            divisible by f².

    Cost: forward and inverse one copy.
    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.6.

    >>> import torch
    >>> Squeeze(2)(torch.arange(4.0).view(1, 1, 2, 2))[0].flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """

    reversible = True
    event_shape = (None, None, None)
    latent_shape = (None, None, None)

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        require_at_least(type(self).__name__, 1, factor=factor)
        self.factor = factor

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise InputError(
                f"expected height and width divisible by {self.factor}, got shape {tuple(x.shape)}"
            )
        return to_channels(x, self.factor), zero_ldj(x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        if z.shape[1] % self.factor**2:
            raise InputError(
                f"expected channels divisible by {self.factor**2}, got shape {tuple(z.shape)}"
            )
        return to_pixels(z, self.factor)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, context), zero_ldj(z)

    @classmethod
    def example(cls) -> Example:
        x, z = StandardNormal((1, 2, 4)), StandardNormal((4, 1, 2))
        return Example(cls(), x, z)


class Unsqueeze(_InverseOf):
    r"""Channels become blocks of pixels: the inverse of :class:`Squeeze`.

    .. math:: z_{c,\, f h + i,\, f w + j} = x_{f^2 c + f i + j,\, h,\, w}, \quad
              0 \le i, j < f, \qquad \mathrm{ldj} = 0

    Args:
        factor: f; x is (B, f² C, H, W), z (B, C, f H, f W).

    Raises:
        ValueError: for f < 1; for channels not divisible by f², or, from ``inverse``, H or W not
            divisible by f.

    Cost: forward and inverse one copy.
    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.6.

    >>> import torch
    >>> Unsqueeze(2)(torch.arange(4.0).view(1, 4, 1, 1))[0].tolist()
    [[[[0.0, 1.0], [2.0, 3.0]]]]
    """

    of = Squeeze

    def __init__(self, factor: int = 2) -> None:
        require_at_least("Unsqueeze", 1, factor=factor)
        super().__init__(factor)

    @classmethod
    def example(cls) -> Example:
        x, z = StandardNormal((4, 2, 1)), StandardNormal((1, 4, 2))
        return Example(cls(), x, z)
