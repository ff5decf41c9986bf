"""Residual convolutional nets between an image and a vector."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    r"""Two 3×3 convolutions and a shortcut: (B, in, H, W) -> (B, out, ⌈H/s⌉, ⌈W/s⌉).

    .. math:: y = S * x + V * h(U * h(x))

    with h the exponential linear unit, U of stride s, and S the identity, or a 1×1 convolution of
    stride s where the sizes differ. V starts at zero, so that a deep net starts shallow.

    Args:
        stride: s.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        same = in_channels == out_channels and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride=stride)
        )
        self.first = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(F.elu(self.first(F.elu(x))))


def _stages(shape: Sequence[int], channels: Sequence[int], owner: str) -> list[tuple[int, int]]:
    """Heights and widths before the first stage and after each."""
    if len(shape) != 3 or min(shape) < 1 or not channels or min(channels) < 1:
        raise ValueError(
            f"{owner}: expected a shape (C, H, W) and at least one stage of positive size, got "
            f"{tuple(shape)} and channels {list(channels)}"
        )
    sizes = [(shape[1], shape[2])]
    for _ in channels:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


class ImageEncoder(nn.Module):
    """Residual stages, each at half the size, and a linear layer: (B, C, H, W) -> (B, out).

    Args:
        shape: (C, H, W).
        out_features: size of the output, which an exponential linear unit ends.
        channels: feature maps of each stage.
        num_blocks: residual blocks a stage.

    Raises:
        ValueError: for no stage, or sizes that are not positive.

    Source: after Salimans et al. 2015, arXiv 1410.6460, and Kingma et al. 2016, arXiv 1606.04934
    (ResNet VAEs of MNIST); plain convolutions in place of weight-normalised ones.

    >>> import torch
    >>> ImageEncoder((1, 28, 28), 8, (4, 8))(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (32, 32, 64),
        num_blocks: int = 2,
    ) -> None:
        super().__init__()
        height, width = _stages(shape, channels, "ImageEncoder")[-1]
        blocks: list[nn.Module] = []
        for a, b in pairwise([shape[0], *channels]):
            blocks.append(PlainBlock(a, b, stride=2))
            blocks += [PlainBlock(b, b) for _ in range(num_blocks - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.outlet = nn.Linear(channels[-1] * height * width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.outlet(F.elu(self.blocks(x)).flatten(1)))


class ImageDecoder(nn.Module):
    """A linear layer and residual stages, each at twice the size: (B, in) -> (B, out, H, W).

    The mirror image of :class:`ImageEncoder`; sizes are doubled by repeating pixels.

    Args:
        shape: (C, H, W), of which the height and width are the output's.
        out_channels: channels of the output.
        mid_features: size of a layer between the input and the first stage.
        channels: feature maps of each stage of the encoder, which this one runs in reverse.
        num_blocks: residual blocks a stage.

    Raises:
        ValueError: for no stage, or sizes that are not positive.

    >>> import torch
    >>> ImageDecoder(5, (1, 28, 28), 2, 16, (4, 8))(torch.zeros(3, 5)).shape
    torch.Size([3, 2, 28, 28])
    """

    def __init__(
        self,
        in_features: int,
        shape: Sequence[int],
        out_channels: int,
        mid_features: int = 450,
        channels: Sequence[int] = (32, 32, 64),
        num_blocks: int = 2,
    ) -> None:
        super().__init__()
        *self.sizes, (height, width) = _stages(shape, channels, "ImageDecoder")
        self.small = (channels[-1], height, width)
        self.inlet = nn.Sequential(
            nn.Linear(in_features, mid_features),
            nn.ELU(),
            nn.Linear(mid_features, channels[-1] * height * width),
        )
        down = list(reversed(channels))
        self.stages = nn.ModuleList()
        for a, b in pairwise([*down, down[-1]]):
            blocks = [PlainBlock(a, b), *(PlainBlock(b, b) for _ in range(num_blocks - 1))]
            self.stages.append(nn.Sequential(*blocks))
        self.outlet = nn.Conv2d(down[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.inlet(z).unflatten(1, self.small)
        for size, stage in zip(reversed(self.sizes), self.stages, strict=True):
            h = stage(F.interpolate(h, size=size, mode="nearest"))
        return self.outlet(F.elu(h))
