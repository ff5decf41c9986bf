"""Convolutions that look only at the pixels before one's own, in raster order."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_at_least, require_positive_sizes


class MaskedConv2d(nn.Conv2d):
    r"""A convolution masked after its centre: (B, in, H, W) -> (B, out, H, W).

    .. math:: y_{ij} = b + \sum_{(k, l)\ \text{before}\ (i, j)} W_{k - i,\,l - j}\, x_{kl}

    Before means: in a row above, or to the left in the same row; with ``centre`` the pixel itself
    too. Height and width are kept.

    Args:
        kernel_size: odd.
        centre: whether a pixel sees itself: not in the first layer of a net, whose input is x.

    Raises:
        ValueError: for an even kernel.

    Source: van den Oord et al. 2016, arXiv 1601.06759, Sec. 3.4.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, centre: bool) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"MaskedConv2d: expected an odd kernel_size, got {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        place = torch.arange(kernel_size**2).view(kernel_size, kernel_size)
        middle = kernel_size**2 // 2
        mask = place <= middle if centre else place < middle
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class LocalPixelCNN(nn.Module):
    r"""A pixel's parameters from a small window before it and from features of its place.

    .. math:: \theta_{ij} = \theta(x_{kl} : (k, l) \text{ before } (i, j),\ |k - i|, |l - j| \le r;\
              \ c)

    One masked convolution of x, its sum with a 1×1 convolution of the features c, and residual
    blocks of masked convolutions. What lies farther off than the reach r it cannot see: that is
    left to c.

    Args:
        channels: of x and of the parameters, (B, channels, H, W).
        context_features: channels of c, (B, context_features, H, W).
        mid_channels: feature maps.
        num_blocks: residual blocks.
        kernel_size: of the first convolution, odd.
        block_kernel_size: of those in the blocks, odd; 1 leaves the window as it is.

    Attributes:
        reach: r = (kernel_size - 1)/2 + num_blocks (block_kernel_size - 1)/2.

    Raises:
        ValueError: for sizes that are not positive, or even kernels.

    Source: van den Oord et al. 2016, arXiv 1601.06759; with a small window as the decoder of a
    VAE, Chen et al. 2017, arXiv 1611.02731, Sec. 3.1.
    """

    def __init__(
        self,
        channels: int,
        context_features: int,
        mid_channels: int = 32,
        num_blocks: int = 3,
        kernel_size: int = 5,
        block_kernel_size: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "mid_channels": mid_channels}
        require_positive_sizes("LocalPixelCNN", **sizes, context_features=context_features)
        require_at_least("LocalPixelCNN", 0, num_blocks=num_blocks)
        self.context_features = context_features
        self.reach = kernel_size // 2 + num_blocks * (block_kernel_size // 2)
        self.inlet = MaskedConv2d(channels, mid_channels, kernel_size, centre=False)
        self.context = nn.Conv2d(context_features, mid_channels, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ELU(),
                MaskedConv2d(mid_channels, mid_channels, block_kernel_size, centre=True),
                nn.ELU(),
                nn.Conv2d(mid_channels, mid_channels, 1),
            )
            for _ in range(num_blocks)
        )
        self.outlet = nn.Conv2d(mid_channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.inlet(x) + self.context(context)
        for block in self.blocks:
            h = h + block(h)
        return self.outlet(F.elu(h))
