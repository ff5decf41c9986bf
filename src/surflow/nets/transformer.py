"""Transformers over sets of points."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.nets.mlp import make_activation


class SelfAttention(nn.Module):
    r"""Multi-head self-attention over the elements of a set: (B, N, D) -> (B, N, D).

    .. math:: y_i = W_o\,[\,\textstyle\sum_j \mathrm{softmax}_j(q_i^h \cdot k_j^h / \sqrt{D / H})\,
              v_j^h\,]_{h = 1 \dots H}

    Weights begin as N(0, (0.125)² / D), biases at zero.

    Args:
        features: D.
        num_heads: H, a divisor of D.
        dropout: probability with which a weight of the attention is left out in training.
        out_gain: factor on the initial output weights.

    Raises:
        ValueError: for heads that do not divide the features.

    Cost: O(N D² + N² D) a set.
    Source: Vaswani et al. 2017, arXiv 1706.03762, Sec. 3.2; initial weights: Child et al. 2019,
    arXiv 1904.10509, Sec. 6.
    """

    def __init__(
        self, features: int, num_heads: int, dropout: float = 0.0, out_gain: float = 1.0
    ) -> None:
        super().__init__()
        if num_heads < 1 or features < 1 or features % num_heads:
            got = f"{features} and {num_heads}"
            raise ValueError(f"SelfAttention: expected features that num_heads divides, got {got}")
        self.num_heads, self.dropout = num_heads, dropout
        self.queries_keys_values = _linear(features, 3 * features)
        self.out = _linear(features, features, out_gain)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D / H) each
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    r"""A residual block: attention, then a net applied to each element, both after a layer norm.

    .. math:: a = \mathrm{attention}(\mathrm{norm}(x)), \qquad
              y = x + a + W_2\,\sigma(W_1\,\mathrm{norm}(x + a))

    Args:
        features: D.
        feedforward_features: size of the hidden layer.
        dropout: on the attention's weights, and on the results of both parts.
        activation: σ; relu, elu, gelu, silu or tanh.
        out_gain: factor on the initial weights of the last layer of both parts.

    Cost: O(N D² + N D F + N² D) a set, F the size of the hidden layer.
    Source: Child et al. 2019, arXiv 1904.10509, Sec. 5.2 and 6.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        feedforward_features: int,
        dropout: float = 0.0,
        activation: str = "gelu",
        out_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.LayerNorm(features),
            SelfAttention(features, num_heads, dropout, out_gain),
            nn.Dropout(dropout),
        )
        self.feedforward = nn.Sequential(
            nn.LayerNorm(features),
            _linear(features, feedforward_features),
            make_activation(activation),
            _linear(feedforward_features, features, out_gain),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feedforward(x)


class SetTransformer(nn.Module):
    r"""A transformer over the elements of a set: (B, N, C) -> (B, N, out).

    .. math:: f(x_{\pi}) = f(x)_{\pi} \quad \text{for every order } \pi

    Without ``num_positions`` it is equivariant: elements in another order give the same outputs in
    that order, and any number of elements will do. With it, a learned vector of its place is added
    to every element. The output layer begins at zero, so that a coupling begins without a
    dependence between its parts.

    Args:
        in_features: C.
        out_features: outputs of an element.
        features: width of the blocks.
        num_heads: of the attention, a divisor of ``features``.
        num_layers: blocks.
        feedforward_features: size of a block's hidden layer; None: 4 times ``features``.
        dropout: see :class:`TransformerBlock`.
        activation: relu, elu, gelu, silu or tanh.
        num_positions: N, where the places of the elements count; None: they do not.

    Raises:
        ValueError: for sizes that are not positive, heads that do not divide the features, a
            dropout outside [0, 1), or, from ``forward``, an input of another shape.

    Cost: ``num_layers`` blocks.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 5 (exchangeable data), whose activation is
    x σ(1.702 x) where this has the GELU; blocks of Child et al. 2019, arXiv 1904.10509.

    >>> net = SetTransformer(2, 4, features=16, num_heads=2)
    >>> net(torch.randn(3, 5, 2)).shape
    torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int = 64,
        num_heads: int = 8,
        num_layers: int = 2,
        feedforward_features: int | None = None,
        dropout: float = 0.0,
        activation: str = "gelu",
        num_positions: int | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * features if feedforward_features is None else feedforward_features
        positions = 1 if num_positions is None else num_positions
        if min(in_features, out_features, features, num_layers, hidden, positions) < 1:
            raise ValueError(
                f"SetTransformer: expected positive sizes, got {in_features=}, {out_features=}, "
                f"{features=}, {num_layers=}, {feedforward_features=}, {num_positions=}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"SetTransformer: expected a dropout in [0, 1), got {dropout}")
        self.num_features, self.num_positions = in_features, num_positions
        self.embed = nn.Linear(in_features, features)
        if num_positions is not None:
            scale = 0.125 / math.sqrt(features)
            self.positions = nn.Parameter(scale * torch.randn(num_positions, features))
        gain = 1 / math.sqrt(2 * num_layers)
        options = (features, num_heads, hidden, dropout, activation, gain)
        self.blocks = nn.Sequential(*(TransformerBlock(*options) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(features)
        self.out = nn.Linear(features, out_features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        wanted = "any" if self.num_positions is None else self.num_positions
        fits = x.dim() == 3 and x.shape[2] == self.num_features
        if not fits or wanted not in ("any", x.shape[1]):
            shape = f"(batch, {wanted}, {self.num_features})"
            raise ValueError(f"SetTransformer: expected shape {shape}, got {tuple(x.shape)}")
        h = self.embed(x)
        if self.num_positions is not None:
            h = h + self.positions
        return self.out(self.norm(self.blocks(h)))


def _linear(in_features: int, out_features: int, gain: float = 1.0) -> nn.Linear:
    """Weights N(0, (0.125 gain)² / in_features), biases zero."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=0.125 * gain / math.sqrt(in_features))
    nn.init.zeros_(layer.bias)
    return layer
