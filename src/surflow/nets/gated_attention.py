"""Convolutions and self-attention with gates, as the mixture couplings of Flow++ take them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from surflow.nets.resnet import WeightNormConv2d
from surflow.numeric import at_least_float32


def concat_elu(x: Tensor) -> Tensor:
    """Exponential linear units of x and of -x, concatenated along the channels."""
    return F.elu(torch.cat([x, -x], dim=1))


def positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    r"""Sinusoids of the places in raster order, (H W, channels).

    .. math:: e_{n, k} = \sin(n\, \omega_k), \quad e_{n, K + k} = \cos(n\, \omega_k), \qquad
              \omega_k = 10^{-4 k / (K - 1)}, \quad K = \lfloor \mathrm{channels} / 2 \rfloor

    Source: Vaswani et al. 2017, arXiv 1706.03762, Sec. 3.5.
    """
    count = channels // 2
    k = torch.arange(count, device=like.device, dtype=like.dtype)
    rate = torch.exp(-math.log(1e4) / max(1, count - 1) * k)
    place = torch.arange(height * width, device=like.device, dtype=like.dtype)
    angle = place.unsqueeze(1) * rate
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, channels % 2))


class ConvAttentionBlock(nn.Module):
    r"""A gated convolution and a gated self-attention, both residual: (B, C, H, W) -> same.

    .. math:: h = \nu(x + \mathrm{glu}(V * d(e(U * e(x))))), \qquad
              y = \nu(h + \mathrm{glu}(W\, \mathrm{attention}(h + \mathrm{positions})))

    with e the concatenated exponential linear units, d dropout of whole channels, ν a layer
    normalisation over channels, glu(a, b) = a σ(b), U 3×3, V 1×1, all weight-normalised. Attention
    is over all places, with several heads; its weights have the same dropout.

    Args:
        channels: C, divisible by num_heads.
        attention: whether there is attention.

    Source: Ho et al. 2019 (Flow++), arXiv 1902.00275, Sec. 3.3.
    """

    def __init__(
        self, channels: int, dropout: float = 0.2, attention: bool = True, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(2 * channels, channels, 3)
        self.gate = WeightNormConv2d(2 * channels, 2 * channels, 1)
        self.norm = nn.LayerNorm(channels)
        self.dropout, self.num_heads, self.attention = dropout, num_heads, attention
        if attention:
            self.project = weight_norm(nn.Linear(channels, 3 * channels, bias=False))
            self.attention_gate = weight_norm(nn.Linear(channels, 2 * channels))
            self.attention_norm = nn.LayerNorm(channels)

    def _attend(self, h: Tensor, height: int, width: int) -> Tensor:
        """(B, H W, C) -> the same."""
        placed = h + positions(height, width, h.shape[2], h)
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.project(placed).chunk(3, dim=2)
        )
        p = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=p)
        return F.glu(self.attention_gate(seen.transpose(1, 2).flatten(2)), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        h = concat_elu(self.conv(concat_elu(x)))
        h = F.dropout2d(h, self.dropout, self.training)
        h = x + F.glu(self.gate(h), dim=1)
        h = self.norm(h.flatten(2).transpose(1, 2))
        if self.attention:
            h = self.attention_norm(h + self._attend(h, height, width))
        return h.transpose(1, 2).unflatten(2, (height, width))


class ConvAttentionNet(nn.Module):
    r"""A 3×3 convolution, blocks, and a 3×3 convolution that starts at zero: (B, in, H, W) ->
    (B, out, H, W).

    The output is float32 or better whatever the precision of the convolutions.

    Args:
        mid_channels: of the blocks, divisible by num_heads.
        num_blocks: number of :class:`ConvAttentionBlock`.
        dropout, attention, num_heads: see :class:`ConvAttentionBlock`.

    Raises:
        ValueError: for sizes that are not positive or do not divide, or a dropout outside [0, 1).

    Source: Ho et al. 2019 (Flow++), arXiv 1902.00275, Sec. 3.3.

    >>> net = ConvAttentionNet(3, 6, mid_channels=8, num_blocks=1)
    >>> out = net(torch.randn(2, 3, 4, 4))
    >>> tuple(out.shape), bool((out == 0).all())
    ((2, 6, 4, 4), True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int = 96,
        num_blocks: int = 10,
        dropout: float = 0.2,
        attention: bool = True,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        sizes = (in_channels, out_channels, mid_channels, num_blocks, num_heads)
        if min(sizes) < 1 or mid_channels % num_heads:
            raise ValueError(
                "ConvAttentionNet: expected positive sizes and heads that divide mid_channels, got "
                f"{in_channels=}, {out_channels=}, {mid_channels=}, {num_blocks=}, {num_heads=}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"ConvAttentionNet: expected dropout in [0, 1), got {dropout}")
        self.inlet = WeightNormConv2d(in_channels, mid_channels, 3)
        options = (mid_channels, dropout, attention, num_heads)
        self.blocks = nn.Sequential(*(ConvAttentionBlock(*options) for _ in range(num_blocks)))
        self.outlet = WeightNormConv2d(mid_channels, out_channels, 3, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        return at_least_float32(self.outlet(self.blocks(self.inlet(x))))
