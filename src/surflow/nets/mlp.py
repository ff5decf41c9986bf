"""Multi-layer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def make_activation(name: str) -> nn.Module:
    """An activation by its name; ValueError lists the names there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


class Linear(nn.Linear):
    """A linear layer that, when compiled, writes its thinnest products without a matrix multiply.

    A product with one input or at most two outputs is little work for a matrix routine and much
    overhead; as pointwise arithmetic ``torch.compile`` fuses it with what stands around it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or x.dim() != 2:
            return super().forward(x)
        if self.in_features == 1:
            return x * self.weight[:, 0] + self.bias
        if self.out_features <= 2:
            columns = [(x * row).sum(1) for row in self.weight.unbind(0)]
            return torch.stack(columns, dim=1) + self.bias
        return super().forward(x)


class MLP(nn.Module):
    """Fully connected layers with an activation between them: (B, in) -> (B, out).

    Args:
        hidden_features: sizes of the hidden layers.
        activation: relu, elu, gelu, silu or tanh.
        context_features: size of a context that is concatenated to the input; 0 for none.
        zero_init: start the output layer at zero, so that a coupling starts as the identity.

    Raises:
        ValueError: for sizes that are not positive, or an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (128, 128),
        activation: str = "relu",
        context_features: int = 0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        sizes = [in_features + context_features, *hidden_features, out_features]
        if min(sizes) < 1 or in_features < 0 or context_features < 0:
            raise ValueError(
                f"MLP: expected positive sizes, got {in_features=}, "
                f"hidden_features={list(hidden_features)}, {out_features=}, {context_features=}"
            )
        self.in_features, self.context_features = in_features, context_features
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers.append(Linear(a, b))
            if i < len(sizes) - 2:
                layers.append(make_activation(activation))
        if zero_init:
            nn.init.zeros_(layers[-1].weight)
            nn.init.zeros_(layers[-1].bias)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.context_features:
            x = torch.cat([x, context], dim=1) if x.shape[1] else context
        return self.layers(x)


class FourierFeatures(nn.Module):
    r"""Sines and cosines of the input at dyadic frequencies, before a net.

    .. math:: \phi(x) = (x,\ \sin(2^k \pi x / L),\ \cos(2^k \pi x / L))_{k = 0 \dots K-1}

    They let a small net follow a function with sharp edges.

    Args:
        net: takes ``in_features * (1 + 2 K)`` features.
        num_frequencies: K.
        period: L, the half-period of the lowest frequency, in units of x.

    Source: Mildenhall et al. 2020, arXiv 2003.08934, Sec. 5.1.
    """

    def __init__(self, net: nn.Module, num_frequencies: int, period: float) -> None:
        super().__init__()
        self.net = net
        self.context_features = getattr(net, "context_features", 0)
        frequencies = math.pi / period * 2.0 ** torch.arange(num_frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        angles = (x.unsqueeze(-1) * self.frequencies).flatten(1)
        x = torch.cat([x, angles.sin(), angles.cos()], dim=1)
        return self.net(x, context) if self.context_features else self.net(x)
