"""Densely connected convolutional nets for images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_at_least, require_positive_sizes


class GatedConv2d(nn.Module):
    r"""A 1×1 convolution whose output is partly switched: (B, in, H, W) -> (B, out, H, W).

    .. math:: y = a + b \odot \sigma(c), \qquad (a, b, c) = W x + w

    Raises:
        ValueError: for sizes that are not positive.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        require_positive_sizes("GatedConv2d", in_channels=in_channels, out_channels=out_channels)
        self.conv = nn.Conv2d(in_channels, 3 * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.conv(x).chunk(3, dim=1)
        return torch.addcmul(a, b, torch.sigmoid(c))


class DenseLayer(nn.Module):
    r"""New channels, concatenated to the input's: (B, C, H, W) -> (B, C + growth, H, W).

    .. math:: y = (x,\ h(V * h(U x + u) + v))

    with h the rectifier, U a 1×1 convolution that keeps C and V one of 3×3.

    Args:
        in_channels: C.
        growth: channels added.
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        require_positive_sizes("DenseLayer", in_channels=in_channels, growth=growth)
        self.mix = nn.Conv2d(in_channels, in_channels, 1)
        self.grow = nn.Conv2d(in_channels, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.grow(F.relu(self.mix(x))))], dim=1)


class DenseBlock(nn.Module):
    """Dense layers, and a 1×1 convolution of all their channels: (B, in, H, W) -> (B, out, H, W).

    Args:
        depth: number of :class:`DenseLayer`.
        growth: channels that each adds.
        gated: whether the last convolution is a :class:`GatedConv2d`.

    Raises:
        ValueError: for sizes that are not positive.

    Source: Huang et al. 2017, arXiv 1608.06993.
    """

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, growth: int, gated: bool = True
    ) -> None:
        super().__init__()
        require_positive_sizes(
            "DenseBlock",
            in_channels=in_channels,
            out_channels=out_channels,
            depth=depth,
            growth=growth,
        )
        self.layers = nn.ModuleList(
            DenseLayer(in_channels + i * growth, growth) for i in range(depth)
        )
        width = in_channels + depth * growth
        self.outlet = (
            GatedConv2d(width, out_channels) if gated else nn.Conv2d(width, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.outlet(x)


class DenseNet(nn.Module):
    """Residual dense blocks between two 1×1 convolutions: (B, in, H, W) -> (B, out, H, W).

    Args:
        mid_channels: size between the blocks.
        depth: dense layers a block.
        growth: channels that each adds.
        gated: whether a block ends with a :class:`GatedConv2d`.
        num_blocks: number of blocks.
        context_features: channels of a context of the input's height and width, which is
            concatenated to the input; 0 for none.
        zero_init: start the output layer at zero, so that a coupling starts as the identity.

    Raises:
        ValueError: for sizes that are not positive.

    Source: Nielsen et al. 2020, arXiv 2007.02731, image experiments; dense blocks of Huang et al.
    2017, arXiv 1608.06993.

    >>> net = DenseNet(6, 12, mid_channels=16, depth=2, growth=8, zero_init=True)
    >>> out = net(torch.randn(2, 6, 4, 4))
    >>> tuple(out.shape), bool((out == 0).all())
    ((2, 12, 4, 4), True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int = 64,
        depth: int = 10,
        growth: int = 64,
        gated: bool = True,
        num_blocks: int = 1,
        context_features: int = 0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        require_positive_sizes("DenseNet", in_channels=in_channels, out_channels=out_channels)
        require_positive_sizes("DenseNet", mid_channels=mid_channels, num_blocks=num_blocks)
        require_at_least("DenseNet", 0, context_features=context_features)
        self.context_features = context_features
        self.inlet = nn.Conv2d(in_channels + context_features, mid_channels, 1)
        self.blocks = nn.ModuleList(
            DenseBlock(mid_channels, mid_channels, depth, growth, gated) for _ in range(num_blocks)
        )
        self.outlet = nn.Conv2d(mid_channels, out_channels, 1)
        if zero_init:
            nn.init.zeros_(self.outlet.weight)
            nn.init.zeros_(self.outlet.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, in, H, W), context (B, context_features, H, W) -> (B, out, H, W)."""
        if self.context_features:
            x = torch.cat([x, context], dim=1)
        x = self.inlet(x)
        for block in self.blocks:
            x = x + block(x)
        return self.outlet(x)


class ImageEmbedding(nn.Module):
    """Features of an image at half its size: (B, in, H, W) -> (B, out, H / 2, W / 2).

    A dense block, a 2×2 convolution with stride 2, and another dense block.

    Args:
        mid_channels: size between the blocks.
        depth, growth, gated: see :class:`DenseBlock`.

    Raises:
        ValueError: for sizes that are not positive.

    Source: Nielsen et al. 2020, arXiv 2007.02731, image experiments (context of the dequantizer).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int = 64,
        depth: int = 4,
        growth: int = 16,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.fine = DenseBlock(in_channels, mid_channels, depth, growth, gated)
        self.halve = nn.Conv2d(mid_channels, mid_channels, 2, stride=2)
        self.coarse = DenseBlock(mid_channels, out_channels, depth, growth, gated)

    def forward(self, x: Tensor) -> Tensor:
        return self.coarse(self.halve(self.fine(x)))
