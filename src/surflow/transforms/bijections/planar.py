"""The planar flow, with what it shares with the radial and the Sylvester flow."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.distributions.base import as_shape
from surflow.transforms.base import Example, Transform

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


class _FromParameters(Transform):
    """A bijection of vectors whose P parameters are free, or come from a net of the context.

    A subclass gives the initial values of its parameters to ``_declare`` and works on flat rows:
    ``_map`` (B, D) -> (B, D), ldj (B,) and ``_solve`` (B, D) -> (B, D), ldj (B,).
    """

    bijective = True
    stochastic_forward = False
    stochastic_inverse = False

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

    @property
    def conditional(self) -> bool:
        return self.net is not None

    def _rows(self, x: Tensor, context: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
        """x as (B, D) and the parameters, (B, P) or (1, P), in float32 or better."""
        rows = x.flatten(1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self.net is None:
            return rows, self.params.to(rows.dtype).unsqueeze(0)
        if context is None:
            raise ValueError(f"{self.where(method)}: expected a context, got none")
        out = self.net(context)
        expected = (x.shape[0], self.num_params)
        if tuple(out.shape) != expected:
            raise ValueError(
                f"{self.where(method)}: expected the net to give shape {expected}, "
                f"got {tuple(out.shape)}"
            )
        return rows, out.to(rows.dtype)

    def _map(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, params = self._rows(x, context, "forward")
        with torch.autocast(x.device.type, enabled=False):
            z, ldj = self._map(rows, params)
        return z.to(x.dtype).view(x.shape), ldj

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._inverse_and_ldj(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, params = self._rows(z, context, "inverse")
        with torch.autocast(z.device.type, enabled=False):
            x, ldj = self._solve(rows, params)
        return x.to(z.dtype).view(z.shape), ldj


class Planar(_FromParameters):
    r"""The planar flow: x moves along one direction, by a tanh of its place on another.

    .. math:: z = x + \hat u \tanh(w^\top x + b), \qquad
              \mathrm{ldj} = \log\big(1 + w^\top \hat u\,(1 - \tanh^2(w^\top x + b))\big)

    Exact. The map is invertible for :math:`w^\top \hat u > -1`. Any u is allowed:
    :math:`\hat u = u + (m(a) - a)\, w / \lVert w \rVert^2` with :math:`a = w^\top u`, and
    m(a) = a for a >= 0, :math:`m(a) = \epsilon (e^{a/\epsilon} - 1)` below, :math:`\epsilon`
    being 1 - 10\ :sup:`-4`. It plays the part of the source's softplus, and leaves u as it is
    where it is admissible by itself; m(a) - a being of second order, w = 0 needs no division by
    zero.

    The cheap direction is ``forward``. For density estimation use the layer as it is. Where
    samples are drawn and scored (the posterior of a VAE), use ``Inverse(Planar(...))``: then
    ``inverse_and_ldj``, which :class:`~surflow.flow.FlowDistribution` calls, is the cheap one and
    the scalar root is never looked for.

    Args:
        event_shape: the shape of x, D elements in all.
        net: maps the context to (B, 2 D + 1): u, w, b in this order. None: they are free
            parameters. A net that gives u = w = 0 everywhere stays there: do not start it at zero.

    Raises:
        ValueError: for a wrong shape of x, a missing context, or a net whose output has a wrong
            shape.

    Cost: forward O(D), inverse O(D) and 18 Newton steps for one scalar a row.
    Source: Rezende and Mohamed 2015, arXiv 1505.05770, Sec. 4.1 and Appendix A.1.

    >>> import torch
    >>> from surflow.transforms import Planar
    >>> layer = Planar(2)
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-6)
    True
    """

    def __init__(self, event_shape: int | Sequence[int], net: nn.Module | None = None) -> None:
        super().__init__(event_shape, net)
        u = 0.1 * torch.randn(self.features)
        w = torch.randn(self.features) / self.features**0.5
        self._declare(torch.cat([u, w, torch.zeros(1)]))

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """û and w, (B or 1, D), b and the slope 1 + w·û, (B or 1, 1)."""
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
        u, w, b, slope = self._unpack(params)
        y = (w * x).sum(1, keepdim=True) + b
        return x + u * torch.tanh(y), tanh_slope(y, slope).log().squeeze(1)

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b, slope = self._unpack(params)
        y = solve_tanh((w * z).sum(1, keepdim=True) + b, slope)
        return z - u * torch.tanh(y), tanh_slope(y, slope).log().squeeze(1)

    @classmethod
    def example(cls) -> Example:
        from surflow.distributions import DiagonalNormal, StandardNormal
        from surflow.nets import MLP

        wide = DiagonalNormal((3,), scale=1.8)
        return Example(
            cls((3,), net=_spread(MLP(2, 7, [8], "tanh"))),
            wide.sample_and_log_prob,
            StandardNormal((3,)),
            context=lambda n: torch.randn(n, 2),
        )


def _spread(net: nn.Module, scale: float = 3.0) -> nn.Module:
    """Scale the last layer, so that an example is far from the identity."""
    *_, last = (m for m in net.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    return net
