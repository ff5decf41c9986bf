"""Residual convolutional nets with weight normalisation, as the couplings of RealNVP take them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_positive_sizes
from surflow.numeric import at_least_float32


class WeightNormConv2d(nn.Conv2d):
    r"""A convolution with learned filter lengths: (B, in, H, W) -> (B, out, H, W).

    .. math:: y_o = \frac{g_o}{\lVert V_o \rVert}\, V_o * x + b_o

    Odd kernels, zero padding that keeps height and width. It starts as the plain convolution with
    ``weight`` V.

    Args:
        kernel_size: odd.
        zero_init: start with g = 0, at the output zero.

    Source: Salimans & Kingma 2016, arXiv 1602.07868.

    >>> conv = WeightNormConv2d(2, 3, 3)
    >>> bool(torch.allclose(conv.filters(), conv.weight))
    True
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, zero_init: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        length = torch.linalg.vector_norm(self.weight.detach(), dim=(1, 2, 3))
        self.gain = nn.Parameter(torch.zeros_like(length) if zero_init else length)
        nn.init.zeros_(self.bias)

    def filters(self) -> Tensor:
        """The filters that are applied, (out, in, k, k)."""
        length = torch.linalg.vector_norm(self.weight, dim=(1, 2, 3))
        return self.weight * (self.gain / length).view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filters(), self.bias, padding=self.padding)


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-4) if batch_norm else nn.Identity()


class ResidualBlock(nn.Module):
    r"""Two residual 3×3 convolutions: (B, C, H, W) -> (B, C, H, W).

    .. math:: y = x + V * h(\nu(U * h(\nu(x))))

    with h the rectifier, ν batch normalisation (or nothing), U and V weight-normalised.

    Args:
        channels: C.
        batch_norm: whether there is batch normalisation.

    Source: He et al. 2016, arXiv 1603.05027 (activation before convolution).
    """

    def __init__(self, channels: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels, batch_norm), _norm(channels, batch_norm)
        self.conv1 = WeightNormConv2d(channels, channels, 3)
        self.conv2 = WeightNormConv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(h)))


class ResNet(nn.Module):
    r"""Residual blocks, all of which reach the output: (B, in, H, W) -> (B, out, H, W).

    .. math:: h_0 = U * (\max(\tilde x, 0), \max(-\tilde x, 0)[, m]), \quad h_i = R_i(h_{i-1}),
              \quad y = V * \max(\nu(\textstyle\sum_i S_i * h_i), 0)

    with :math:`\tilde x = \nu(x)`, ν batch normalisation (or nothing), U 3×3, the skips S_i and
    V 1×1 and all of them weight-normalised. In training mode batch normalisation makes the rows
    of a batch depend on each other; in evaluation mode it does not.

    Args:
        mid_channels: feature maps of a block.
        num_blocks: number of :class:`ResidualBlock`.
        batch_norm: whether there is batch normalisation.
        mask: (1, H, W), a further input channel m: which places of x are given, which tells
            a zero there from a place left out.
        zero_init: start at the output zero.

    Raises:
        ValueError: for sizes that are not positive.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.7 and 4.1; skips and rectified halves as in
    the authors' code.

    >>> net = ResNet(3, 6, mid_channels=8, num_blocks=2, zero_init=True)
    >>> out = net(torch.randn(2, 3, 4, 4))
    >>> tuple(out.shape), bool((out == 0).all())
    ((2, 6, 4, 4), True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int = 64,
        num_blocks: int = 8,
        batch_norm: bool = True,
        mask: Tensor | None = None,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        require_positive_sizes(
            "ResNet",
            in_channels=in_channels,
            out_channels=out_channels,
            mid_channels=mid_channels,
            num_blocks=num_blocks,
        )
        self.register_buffer(
            "mask", None if mask is None else mask.to(torch.get_default_dtype()), persistent=False
        )
        seen = 2 * in_channels + (0 if mask is None else mask.shape[0])
        self.norm_in = _norm(in_channels, batch_norm)
        self.inlet = WeightNormConv2d(seen, mid_channels, 3)
        self.blocks = nn.ModuleList(
            ResidualBlock(mid_channels, batch_norm) for _ in range(num_blocks)
        )
        self.skips = nn.ModuleList(
            WeightNormConv2d(mid_channels, mid_channels, 1) for _ in range(num_blocks + 1)
        )
        self.norm_out = _norm(mid_channels, batch_norm)
        self.outlet = WeightNormConv2d(mid_channels, out_channels, 1, zero_init)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(x)
        parts = [F.relu(x), F.relu(-x)]
        if self.mask is not None:
            parts.append(self.mask.to(x.dtype).expand(x.shape[0], -1, -1, -1))
        h = self.inlet(torch.cat(parts, dim=1))
        total = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            h = block(h)
            total = total + skip(h)
        return self.outlet(F.relu(self.norm_out(total)))


class TanhScale(nn.Module):
    r"""A net whose even outputs are bounded: (B, ...) -> (B, 2 C, ...).

    .. math:: y_{2c} = f_c \tanh(a_{2c}), \quad y_{2c + 1} = a_{2c + 1}, \qquad a = \mathrm{net}(x)

    So the log-scales of an affine coupling stay within ±f_c, learned and 1 at the start. The
    output is float32 or better whatever the precision of the net.

    Args:
        net: gives (B, 2 C, ...), channels alternating.
        channels: C.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 4.1 (a scaled hyperbolic tangent).
    """

    def __init__(self, net: nn.Module, channels: int) -> None:
        super().__init__()
        self.net = net
        self.factor = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = at_least_float32(self.net(x))
        log_scale, shift = out.unflatten(1, (-1, 2)).unbind(2)
        factor = self.factor.view(-1, *[1] * (out.dim() - 2))
        return torch.stack([factor * torch.tanh(log_scale), shift], dim=2).flatten(1, 2)
