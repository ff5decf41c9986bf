"""The planar flow, with what it shares with the radial and the Sylvester flow."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_at_least
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import as_shape
from surflow.nets import MLP
from surflow.numeric import at_least_float32
from surflow.transforms.base import Bijection, Example, output_of_context

MARGIN = 1e-4  # the least slope of the map along its own direction
NEWTON_STEPS = 18  # of solve_tanh; 15 reach rounding for every slope from MARGIN to 1e6


def slope_of(raw: Tensor) -> Tensor:
    """A slope above ``MARGIN`` from any real number: 1 + raw for raw >= 0, exp-like below.

    It is 1 at raw = 0, increases and has a continuous derivative; each value keeps its relative
    accuracy, so that its logarithm is good even where the constraint is active.
    """
    share = 1 - MARGIN
    return MARGIN + share * torch.exp(raw.clamp_max(0) / share) + F.relu(raw)


def squared_sech(y: Tensor) -> Tensor:
    """tanh'(y), accurate in its tails."""
    return 4 * torch.sigmoid(2 * y) * torch.sigmoid(-2 * y)


def tanh_slope(y: Tensor, slope: Tensor) -> Tensor:
    """d/dy (y + m tanh y) for m = slope - 1, as a sum of positive terms."""
    return torch.tanh(y).square() + slope * squared_sech(y)


def solve_tanh(c: Tensor, slope: Tensor) -> Tensor:
    """The y with y + m tanh(y) = c, elementwise, for m = slope - 1 and a slope > 0.

    The left side is odd, and on the positive half-line concave for m > 0 and convex for m < 0.
    Newton's method from the lower bound max(c - m, c / slope), for m < 0 from the upper bound
    min(c - m, c / slope), therefore approaches the root from one side and needs no bracket. Its
    steps are fixed in number; the last one carries the gradient of the implicit function.

    Args:
        c, slope: of shapes that broadcast.

    Returns:
        y, differentiable once in both.
    """
    with torch.no_grad():
        size, m = c.abs(), slope - 1
        size, m = torch.broadcast_tensors(size, m)
        y = torch.where(
            m >= 0, torch.maximum(size - m, size / slope), torch.minimum(size - m, size / slope)
        )
        for _ in range(NEWTON_STEPS):
            y = y - (y + m * torch.tanh(y) - size) / tanh_slope(y, slope)
        y = torch.copysign(y, c)
        derivative = tanh_slope(y, slope)
    return y - (y + (slope - 1) * torch.tanh(y) - c) / derivative


class _FromParameters(Bijection):
    """A bijection of vectors whose P parameters are free, or come from a net of the context.

    A subclass gives the initial values of its parameters to ``_declare`` and works on flat rows:
    ``_map`` (B, D) -> (B, D), ldj (B,) and ``_solve`` (B, D) -> (B, D), ldj (B,).
    """

    def __init__(self, event_shape: int | Sequence[int], net: nn.Module | None = None) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        self.features = prod(self.event_shape)
        self.net = net

    def _declare(self, start: Tensor) -> None:
        """Take the initial parameters, (P,); with a net only their number counts."""
        self.num_params = start.numel()
        if self.net is None:
            self.params = nn.Parameter(start)

    conditional = property(lambda self: self.net is not None)

    @abstractmethod
    def _map(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Rows x and parameters (B, P) or (1, P), in float32 or better, to z and ldj."""

    @abstractmethod
    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of ``_map``, with the ldj of the pair."""

    def _on_rows(
        self, function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows = at_least_float32(x.flatten(1))
        if self.net is None:
            params = self.params.unsqueeze(0)
        else:
            params = output_of_context(self.net, context, (x.shape[0], self.num_params))
        with torch.autocast(x.device.type, enabled=False):
            out, ldj = function(rows, params.to(rows.dtype))
        return out.to(x.dtype).view(x.shape), ldj

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._on_rows(self._map, x, context)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._inverse_and_ldj(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._on_rows(self._solve, z, context)


class _Stack(_FromParameters):
    """K layers of one kind at once; their parameters follow one another in ``params``."""

    def __init__(
        self, event_shape: int | Sequence[int], net: nn.Module | None = None, num_layers: int = 1
    ) -> None:
        super().__init__(event_shape, net)
        require_at_least(type(self).__name__, 1, num_layers=num_layers)
        self.num_layers = num_layers
        self._start(1)  # unused: it keeps the draws, hence the weights, of seeded runs on record
        self._declare(self._start(num_layers).flatten())

    @abstractmethod
    def _start(self, k: int) -> Tensor:
        """Initial parameters of k layers, one a row, (k, P / K)."""

    @abstractmethod
    def _unpack(self, params: Tensor) -> tuple[Tensor, ...]:
        """The parameters of single layers, (N, P / K), by name."""

    def _by_layer(self, params: Tensor) -> tuple[Tensor, ...]:
        """What ``_unpack`` gives, (B or 1, K, ...) each."""
        one = params.reshape(-1, self.num_params // self.num_layers)
        return tuple(t.unflatten(0, (-1, self.num_layers)) for t in self._unpack(one))


class Planar(_Stack):
    r"""The planar flow: x moves along one direction, by a tanh along another; K times.

    .. math:: x_k = x_{k-1} + \hat u_k \tanh(y_k), \quad y_k = w_k^\top x_{k-1} + b_k, \qquad
              \mathrm{ldj} = \sum_{k=1}^K \log\big(1 + w_k^\top \hat u_k\,(1 - \tanh^2 y_k)\big)

    Exact. The map is invertible for :math:`w^\top \hat u > -1`. Any u is allowed:
    :math:`\hat u = u + (m(a) - a)\, w / \lVert w \rVert^2` with :math:`a = w^\top u`, and
    m(a) = a for a >= 0, :math:`m(a) = \epsilon (e^{a/\epsilon} - 1)` below, :math:`\epsilon`
    being 1 - 10\ :sup:`-4`. It replaces the source's softplus, and leaves an admissible u
    unchanged; m(a) - a is of second order, so that w = 0 needs no division by zero.

    ``forward`` is the cheap direction. For density estimation use the layer as it is. Where
    samples are drawn and scored (the posterior of a VAE), use ``Inverse(Planar(...))``: then
    ``inverse_and_ldj``, which :class:`~surflow.flow.FlowDistribution` calls, is the cheap one and
    the scalar root is never needed.

    Args:
        event_shape: the shape of x, D elements in all.
        net: maps the context to (B, K (2 D + 1)): u, w, b of the first layer, then of the second,
            and so on. None: they are free parameters. A net that gives u = w = 0 everywhere has no
            gradient: do not start it at zero.
        num_layers: K.

    Raises:
        ValueError: for K < 1, a wrong shape of x, a missing context, or a net whose output has a
            wrong shape.

    Cost: forward O(K D), inverse O(K D) and 18 Newton steps for one scalar a row and layer.
    Source: Rezende and Mohamed 2015, arXiv 1505.05770, Sec. 4.1 and Appendix A.1.

    >>> layer = Planar(2, num_layers=4)
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-5)
    True
    """

    def _start(self, k: int) -> Tensor:
        d = self.features
        u, w = 0.1 * torch.randn(k, d), torch.randn(k, d) / d**0.5
        return torch.cat([u, w, torch.zeros(k, 1)], dim=1)

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """û and w, (N, D), b and the slope 1 + w·û, (N, 1)."""
        u, w, b = params.split([self.features, self.features, 1], dim=1)
        a = (w * u).sum(1, keepdim=True)
        negative, share = a.clamp_max(0), 1 - MARGIN
        bend = share * torch.expm1(negative / share)
        norm = w.square().sum(1, keepdim=True).clamp_min(1e-12)
        moved = u + (bend - negative) / norm * w
        with torch.no_grad():  # what cancellation lost where u is long
            rest = (bend + F.relu(a) - (w * moved).sum(1, keepdim=True)) / norm * w
        return moved + rest, w, b, slope_of(a)

    def _map(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b, slope = self._by_layer(params)
        places = []
        for u_k, w_k, b_k in zip(u.unbind(1), w.unbind(1), b.unbind(1), strict=True):
            y = (w_k * x).sum(1, keepdim=True) + b_k
            x = torch.addcmul(x, u_k, torch.tanh(y))
            places.append(y)
        return x, tanh_slope(torch.cat(places, dim=1), slope.squeeze(2)).log().sum(1)

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b, slope = self._by_layer(params)
        places = []
        for k in reversed(range(self.num_layers)):
            y = solve_tanh((w[:, k] * z).sum(1, keepdim=True) + b[:, k], slope[:, k])
            z = torch.addcmul(z, u[:, k], torch.tanh(y), value=-1)
            places.insert(0, y)
        return z, tanh_slope(torch.cat(places, dim=1), slope.squeeze(2)).log().sum(1)

    @classmethod
    def example(cls) -> Example:
        return _example(cls((3,), _spread(MLP(2, 3 * 7, [8], "tanh"), 1.5), num_layers=3), 2.0)


def _example(transform: _FromParameters, scale: float) -> Example:
    """Wide normal inputs of three elements, a context of two, a standard normal base."""
    return Example(transform, DiagonalNormal((3,), scale=scale), StandardNormal((3,)), context=2)


def _spread(net: nn.Module, scale: float = 3.0) -> nn.Module:
    """Scale the last layer, so that an example is far from the identity."""
    *_, last = (m for m in net.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    return net
