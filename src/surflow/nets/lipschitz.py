"""Nets with a bounded Lipschitz constant."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_at_least, require_one_of, require_positive
from surflow.numeric import at_least_float32

NORMS = ("exact", "power")


class LipSwish(nn.Module):
    r"""The swish over its greatest slope: :math:`x\,\sigma(\beta x) / 1.1`, beta > 0 learned.

    Slope at most 1, and a second derivative that is not zero where the first is near 1, which the
    gradient of a log-determinant needs.

    Source: Chen et al. 2019, arXiv 1906.02735, Sec. 3.3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * F.softplus(self.beta)) / 1.1


# slopes in [-1, 1], smooth but for elu's second derivative; relu's log-determinant has no gradient
# in the place of its kinks and is left out
LIPSCHITZ_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "lipswish": LipSwish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class LipschitzLinear(nn.Linear):
    r"""A linear layer whose weight has a spectral norm of at most ``bound``.

    .. math:: y = \tilde W x + b, \qquad \tilde W = W \min(1, c / \lVert W \rVert_2)

    Args:
        bound: c, positive.
        norm: "exact", by singular values; "power", in training by power iteration that goes on
            from call to call (an estimate from below, so that a step may exceed the bound a
            little), in evaluation exact.
        num_iterations: power iterations a training call.

    Raises:
        ValueError: for a bound that is not positive or an unknown norm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bound: float,
        norm: str = "exact",
        num_iterations: int = 1,
    ) -> None:
        super().__init__(in_features, out_features)
        require_positive("LipschitzLinear", bound=bound)
        require_one_of("LipschitzLinear", NORMS, norm=norm)
        require_at_least("LipschitzLinear", 1, num_iterations=num_iterations)
        self.bound, self.norm, self.num_iterations = bound, norm, num_iterations
        if norm == "power":
            self.register_buffer("left", F.normalize(torch.randn(out_features), dim=0))
            self.register_buffer("right", F.normalize(torch.randn(in_features), dim=0))
            with torch.no_grad():
                self._iterate(self.weight.detach(), 20)

    @property
    def repeatable(self) -> bool:
        """Whether a second run changes nothing; see :class:`surflow.transforms.Transform`."""
        return not self.training

    def _iterate(self, weight: Tensor, count: int) -> None:
        left, right = self.left.to(weight.dtype), self.right.to(weight.dtype)
        for _ in range(count):
            left = F.normalize(weight @ right, dim=0)
            right = F.normalize(weight.T @ left, dim=0)
        self.left.copy_(left)
        self.right.copy_(right)

    def bounded_weight(self) -> Tensor:
        """The weight within its bound, (out, in), float32 or better; a training call iterates."""
        weight = at_least_float32(self.weight)
        with torch.autocast(weight.device.type, enabled=False):
            if self.norm == "power" and self.training:
                with torch.no_grad():
                    self._iterate(weight.detach(), self.num_iterations)
                # copies: a later call writes the buffers before this one's backward
                left, right = (v.to(weight.dtype, copy=True) for v in (self.left, self.right))
                norm = left @ (weight @ right)
            else:
                norm = torch.linalg.svdvals(weight)[0]
            return weight * (self.bound / norm.clamp_min(self.bound))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.bounded_weight().to(self.weight.dtype), self.bias)


class _Prepared:
    """A :class:`LipschitzMLP` whose bounded weights are computed once."""

    def __init__(self, net: LipschitzMLP) -> None:
        self.net = net
        self.context_features = net.context_features
        dtype = net.linears[0].weight.dtype
        self.weights = [layer.bounded_weight().to(dtype) for layer in net.linears]

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        net = self.net
        for i, (layer, weight) in enumerate(zip(net.linears, self.weights, strict=True)):
            if i > 0:
                x = net.activations[i - 1](x)
            x = F.linear(x, weight, layer.bias)
            if i == 0 and net.from_context is not None:
                x = x + net.from_context(context)
        return x


class LipschitzMLP(nn.Module):
    r"""Fully connected layers, with a Lipschitz constant in x of at most ``coefficient``.

    .. math:: g(x) = \tilde W_L h(\tilde W_{L-1} \cdots h(\tilde W_1 x + U c + b_1) \cdots) + b_L,
              \qquad \lVert \tilde W_l \rVert_2 \le \mathrm{coefficient}^{1/L}

    The context c enters the first layer without a bound: a residual flow must contract in x
    alone.

    Args:
        activation: elu, lipswish, softplus or tanh, whose slopes lie in [-1, 1].
        coefficient: below 1 for a residual flow.
        context_features: size of the context; 0 for none.
        norm, num_iterations: see :class:`LipschitzLinear`.

    Raises:
        ValueError: for sizes or a coefficient that are not positive, an unknown activation or
            norm.

    >>> g = LipschitzMLP(2, 2, [16], coefficient=0.5)
    >>> a, b = torch.randn(2, 100, 2)
    >>> bool(((g(a) - g(b)).norm(dim=1) <= 0.5 * (a - b).norm(dim=1)).all())
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "lipswish",
        coefficient: float = 0.9,
        context_features: int = 0,
        norm: str = "exact",
        num_iterations: int = 1,
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden_features, out_features]
        if min(sizes) < 1 or context_features < 0:
            raise ValueError(
                f"LipschitzMLP: expected positive sizes, got {in_features=}, "
                f"hidden_features={list(hidden_features)}, {out_features=}, {context_features=}"
            )
        require_one_of("LipschitzMLP", LIPSCHITZ_ACTIVATIONS, activation=activation)
        require_positive("LipschitzMLP", coefficient=coefficient)
        self.in_features, self.context_features = in_features, context_features
        bound = coefficient ** (1 / (len(sizes) - 1))
        self.linears = nn.ModuleList(
            LipschitzLinear(a, b, bound, norm, num_iterations) for a, b in pairwise(sizes)
        )
        activations = (LIPSCHITZ_ACTIVATIONS[activation]() for _ in sizes[1:-1])
        self.activations = nn.ModuleList(activations)
        self.from_context = (
            nn.Linear(context_features, sizes[1], bias=False) if context_features else None
        )

    def prepared(self) -> _Prepared:
        """The same function, its weights bounded once: for many evaluations of one state."""
        return _Prepared(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.prepared()(x, context)
