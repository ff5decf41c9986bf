"""Densities on part of the line: exponential, truncated normal, and a mass at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_fraction, require_positive
from surflow.distributions.base import (
    Distribution,
    as_shape,
    expand_to,
    register_edges,
    register_value,
    sum_event,
)
from surflow.distributions.location_scale import HALF_LOG_TWO_PI, LocationScale
from surflow.numeric import at_least_float32, working_dtype

FAR = 1e9  # stands for an infinite edge, in standard deviations: its square fits float32
SERIES_FROM = 30.0  # where the tail series beats the derivative of erfcx in float32


def log_mills(t: Tensor) -> Tensor:
    r"""log of :math:`e^{t^2/2} \Phi(-t)` for t >= 0: value and derivative stable however far."""
    near = (0.5 * torch.special.erfcx(t.clamp(max=SERIES_FROM) * math.sqrt(0.5))).log()
    far = t.clamp(min=SERIES_FROM)
    q = far.square().reciprocal()
    series = -q * (1 - q * (3 - q * (15 - q * (105 - q * 945))))
    return torch.where(t < SERIES_FROM, near, torch.log1p(series) - far.log() - HALF_LOG_TWO_PI)


def _broadcasts(shape: Sequence[int], event_shape: tuple[int, ...]) -> bool:
    try:
        return torch.broadcast_shapes(shape, event_shape) == event_shape
    except RuntimeError:
        return False


class Exponential(LocationScale):
    r"""Independent exponentials on :math:`x \ge 0`.

    .. math:: \log p(x) = \sum_d -x_d / s_d - \log s_d, \quad x_d \ge 0

    Args:
        scale: the mean s.
        net: maps a context to log s, (B, *event).
        learn, parameter_shape, and errors: see :class:`LocationScale`.

    Cost: O(D) to draw and to score.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 (as a density of remainders).

    >>> p = Exponential((1,), scale=2.0)
    >>> p.log_prob(torch.tensor([[0.0], [2.0], [-1.0]]))
    tensor([-0.6931, -1.6931,    -inf])
    """

    learns_loc = False  # the edge of the support stays at 0

    def __init__(
        self,
        event_shape: int | Sequence[int],
        scale: float | Sequence[float] | Tensor = 1.0,
        learn: bool = False,
        parameter_shape: Sequence[int] | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, 0.0, scale, learn, parameter_shape, net)

    def parameters_of(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.conditional:
            (log_scale,) = self._net_parameters(context, 1)
            return torch.zeros_like(log_scale), log_scale
        return self.loc, self.log_scale

    def _standard_log_prob(self, eps: Tensor) -> Tensor:
        return torch.where(eps >= 0, -eps, -math.inf)

    def _standard_sample(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        u = torch.rand(shape, device=like.device, dtype=working_dtype(like))
        return -torch.log1p(-u).to(like.dtype)


class TruncatedNormal(Distribution):
    r"""Independent normals kept to an interval, fixed, learned or conditional.

    .. math:: \log p(x) = \sum_d \log \mathcal N(x_d; \mu_d, \sigma_d^2)
              - \log\left(\Phi(\tfrac{h_d - \mu_d}{\sigma_d})
              - \Phi(\tfrac{l_d - \mu_d}{\sigma_d})\right), \quad l_d \le x_d \le h_d

    The logarithms are taken relative to the density at the nearer edge, so that float32 serves
    in the far tails (edges thousands of standard deviations from the mean) and in intervals much
    narrower than one. Draws are reparametrised.

    Args:
        loc, scale: of the normal before truncation, broadcastable to the event.
        low, high: the edges, broadcastable to the event, possibly infinite. ``high="context"``:
            the context itself is the upper edge, (B, ...) broadcastable to (B, *event), and there
            is no lower one.
        learn: whether log scale (and loc) are parameters.
        learn_loc: False keeps loc as given, whoever gives the scale; with loc = 0 and low = 0
            that is a half-normal whose scale is learned.
        parameter_shape: see :class:`LocationScale`.
        net: maps a context to (B, 2 C, ...), channels alternating loc, log scale, or to log scale
            alone, (B, C, ...), where ``learn_loc`` is False.

    Raises:
        ValueError: for a scale that is not positive, low >= high, a lower edge with
            ``high="context"``, or parameters that do not broadcast.

    Cost: O(D) to draw (5 Newton steps) and to score.
    Source: Robert 1995, Stat. Comput. 5 (the density); Nielsen et al. 2020, arXiv 2007.02731,
    Table 6 (below a maximum).

    >>> p = TruncatedNormal((1,), loc=1000.0, high=0.0)
    >>> p.log_prob(torch.tensor([[0.0], [-0.001], [1.0]]))  # nearly exponential with rate 1000
    tensor([6.9078, 5.9078,   -inf])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        loc: float | Sequence[float] | Tensor = 0.0,
        scale: float | Sequence[float] | Tensor = 1.0,
        low: float | Sequence[float] | Tensor = -math.inf,
        high: float | Sequence[float] | Tensor | str = math.inf,
        learn: bool = False,
        learn_loc: bool = True,
        parameter_shape: Sequence[int] | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, net)
        self.below_context = isinstance(high, str)
        if self.below_context and high != "context":
            raise ValueError(f"TruncatedNormal: expected numbers or 'context' as high, got {high}")
        low = expand_to(low, self.event_shape, "TruncatedNormal: low")
        if self.below_context:
            if not bool((low == -math.inf).all()):
                raise ValueError("TruncatedNormal: expected no low together with high='context'")
            high = math.inf
        register_edges(self, low, high)
        self.learn_loc = learn_loc
        scale = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        require_positive("TruncatedNormal", scale=scale)
        shape = self.event_shape if parameter_shape is None else as_shape(parameter_shape)
        if not _broadcasts(shape, self.event_shape):
            raise ValueError(
                f"TruncatedNormal: expected parameters that broadcast to {self.event_shape}, "
                f"got {shape}"
            )
        loc = expand_to(loc, shape, "TruncatedNormal: loc").clone()
        log_scale = expand_to(scale.log(), shape, "TruncatedNormal: scale").clone()
        if net is None or not learn_loc:
            register_value(self, "loc", loc, learn and learn_loc)
        if net is None:
            register_value(self, "log_scale", log_scale, learn)

    conditional = property(lambda self: self.net is not None or self.below_context)

    def parameters_of(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """loc and log_scale, each broadcastable to (B, *event), float32 or better."""
        if self.net is None:
            return at_least_float32(self.loc), at_least_float32(self.log_scale)
        if self.learn_loc:
            loc, log_scale = self._net_parameters(context, 2)
        else:
            loc, (log_scale,) = self.loc, self._net_parameters(context, 1)
        return at_least_float32(loc), at_least_float32(log_scale)

    def _edges(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """low and high, broadcastable to (B, *event), infinite where there is none."""
        if not self.below_context:
            return self.low, self.high
        fits = _broadcasts(context.shape[1:], self.event_shape)
        if not fits or context.dim() != len(self.event_shape) + 1:
            raise ValueError(
                "TruncatedNormal: expected a context that broadcasts to (batch, "
                f"{', '.join(map(str, self.event_shape))}) as upper edge, "
                f"got shape {tuple(context.shape)}"
            )
        return self.low, context

    def _frame(self, context: Tensor | None, temperature: float = 1.0) -> _Frame:
        loc, log_scale = self.parameters_of(context)
        low, high = self._edges(context)
        return _Frame(loc, log_scale + math.log(temperature), low, high)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return sum_event(self._frame(context).log_prob(x))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        frame = self._frame(context, temperature)
        u = torch.rand((n, *self.event_shape), device=frame.loc.device, dtype=frame.loc.dtype)
        return frame.quantile(u).to(working_dtype(self.low))


class _Frame:
    """The interval in standard deviations, turned so that most of it lies below the mean.

    Turned over where low + high > 2 loc, the upper edge b is the nearer of the two to the mean's
    far side, and a < 0, a <= -|b|. With t = max(-b, 0), everything is relative to the density at
    t, which is where it is greatest.
    """

    def __init__(self, loc: Tensor, log_scale: Tensor, low: Tensor, high: Tensor) -> None:
        self.loc, self.log_scale = loc, log_scale
        self.low, self.high = low.to(loc.dtype), high.to(loc.dtype)
        self.scale, inverse = log_scale.exp(), torch.exp(-log_scale)
        self.inverse = inverse
        a = self._standard(self.low)
        b = self._standard(self.high)
        finite = self.low.isfinite() & self.high.isfinite()
        # from the edges themselves where it can be: b - a loses what the two have in common
        width = torch.where(finite, self.high - self.low, 0.0) * inverse
        self.width = torch.where(finite, width, (b - a).detach()).clamp(max=2 * FAR)
        self.flip = a + b > 0
        self.a, self.b = torch.where(self.flip, -b, a), torch.where(self.flip, -a, b)
        self.tail = self.b < 0
        self.t = (-self.b).clamp(min=0)
        half = 0.5 * self.width
        self.narrow = half < (1e-5 if loc.dtype == torch.float64 else 1e-3)
        # log Phi(a) - log Phi(b) <= 0
        far = (-self.a).clamp(min=0)
        apart = torch.where(self.tail, self.width, far)
        self.log_upper = torch.where(  # log Phi(b) + t^2 / 2
            self.tail, log_mills(self.t), torch.special.log_ndtr(self.b.clamp(min=0))
        )
        d = log_mills(far) - self.log_upper - 0.5 * apart * (far + self.t)
        self.d = torch.where(self.narrow, -1.0, d)
        # log mass + t^2 / 2; in a narrow interval the density is e^(-slope * distance) at heart
        general = self.log_upper + torch.log(-torch.expm1(self.d))
        middle = torch.where(self.tail, self.t + half, (0.5 * (self.a + self.b)).abs())
        self.slope = torch.where(self.narrow, middle, 1.0)
        above = torch.where(self.tail, half * (self.t + middle), middle.square())
        above = torch.where(self.narrow, above, 0.0)
        y = self.slope * torch.where(self.narrow, half, 1.0)
        small = y < 1e-2
        big = torch.where(small, 1.0, y)
        log_sinhc = torch.where(
            small, y.square() / 6, big + torch.log1p(-torch.exp(-2 * big)) - torch.log(2 * big)
        )
        width = torch.where(self.narrow, self.width, 1.0).clamp(min=torch.finfo(loc.dtype).tiny)
        flat = width.log() + log_sinhc - 0.5 * above - HALF_LOG_TWO_PI
        self.log_mass = torch.where(self.narrow, flat, general)

    def _standard(self, edge: Tensor) -> Tensor:
        finite = edge.isfinite()
        value = ((torch.where(finite, edge, 0.0) - self.loc) * self.inverse).clamp(-FAR, FAR)
        return torch.where(finite, value, torch.where(edge > 0, FAR, -FAR))

    def log_prob(self, x: Tensor) -> Tensor:
        """Elementwise, nats."""
        x = x.to(torch.promote_types(x.dtype, self.loc.dtype))
        inside = (x >= self.low) & (x <= self.high)
        eps = ((x - self.loc) * self.inverse).clamp(-FAR, FAR)
        edge = torch.where(self.flip, self.low, self.high)
        away = torch.where(self.flip, x - edge, edge - x)
        away = torch.where(self.tail, away, 0.0).clamp(min=0) * self.inverse
        square = torch.where(self.tail, away * (2 * self.t + away), eps.square())
        value = -0.5 * square - self.log_scale - HALF_LOG_TWO_PI - self.log_mass
        return torch.where(inside, value, -math.inf)

    def quantile(self, u: Tensor) -> Tensor:
        """The x below which lies a share u of the mass, for u in [0, 1): (n, *event)."""
        u = u.clamp(min=torch.finfo(u.dtype).eps / 2)
        # the share below, and the share above towards the nearer edge, in the turned interval
        u, rest = torch.where(self.flip, 1 - u, u), torch.where(self.flip, u, 1 - u)
        away = self._distance(rest)  # from the nearer edge, in standard deviations
        edge = torch.where(self.flip, self.low, self.high)
        edge = torch.where(edge.isfinite(), edge, 0.0)
        near = edge + torch.where(self.flip, 1.0, -1.0) * away * self.scale

        # the mean inside: from whichever end of the distribution is nearer
        usual = ~(self.tail | self.narrow)
        a, b = torch.where(usual, self.a, -1.0), torch.where(usual, self.b, 1.0)
        mass = torch.special.ndtr(b) - torch.special.ndtr(a)
        below = torch.special.ndtr(a) + u * mass
        above = torch.special.ndtr(-b) + rest * mass
        lower = below < above
        p = torch.where(lower, below, above)
        eps = torch.special.ndtri(p) * torch.where(lower, 1.0, -1.0)
        middle = self.loc + torch.where(self.flip, -eps, eps) * self.scale

        x = torch.where(usual, middle, near)
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def _distance(self, u: Tensor) -> Tensor:
        """How far below the nearer edge, where a share u of the mass is nearer to it.

        P(distance > s) goes with Phi(-(t + s)) / Phi(-t), which Newton's method inverts.
        """
        target = -torch.log1p(u * torch.expm1(self.d))
        t = self.t.expand(target.shape)

        def excess(s: Tensor, t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            there = log_mills(t + s)
            value = s * (t + 0.5 * s) + log_mills(t) - there - target
            return value, torch.exp(there + HALF_LOG_TWO_PI)  # the inverse of the hazard

        with torch.no_grad():
            s = 2 * target / (t + torch.sqrt(t.square() + 2 * target))
            for _ in range(4):
                value, step = excess(s, t, target)
                s = (s - value * step).clamp(min=0)
        value, step = excess(s, t, target)
        s = s - value * step  # differentiable: the implicit function's derivative

        rate = self.slope * torch.where(self.narrow, self.width, 1.0)
        straight = torch.where(rate < 1e-4, 1.0, rate)
        share = -torch.log1p(u * torch.expm1(-straight)) / straight
        share = torch.where(rate < 1e-4, u, share)
        s = torch.where(self.narrow, share * self.width, s)
        return torch.minimum(s.clamp(min=0), self.width)


class ZeroInflated(Distribution):
    r"""A mass at zero and a half-normal above it, coordinate by coordinate.

    .. math:: P(x_d = 0) = \pi_d, \qquad p(x_d) = (1 - \pi_d)\, \tfrac{2}{\sigma_d}
              \varphi(x_d / \sigma_d), \quad x_d > 0

    ``log_prob`` is the density with respect to Lebesgue measure on x > 0 plus a unit atom at 0:
    what a rectified variable has.

    Args:
        probability: of zero, in (0, 1), broadcastable to the event.
        scale: of the half-normal, positive, broadcastable to the event.
        learn: whether the logits of zero and log scale are parameters.
        net: maps a context to (B, 2 C, ...), channels alternating logit, log scale.

    Raises:
        ValueError: for a probability outside (0, 1), or a scale that is not positive.

    Cost: O(D) to draw and to score.
    Source: the codomain of the ReLU surjections in Nielsen et al. 2020, arXiv 2007.02731, Table 6.

    >>> p = ZeroInflated((1,), probability=0.25)
    >>> p.log_prob(torch.zeros(1, 1)).exp()
    tensor([0.2500])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        probability: float | Sequence[float] | Tensor = 0.5,
        scale: float | Sequence[float] | Tensor = 1.0,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, net)
        if net is not None:
            return
        p = expand_to(probability, self.event_shape, "ZeroInflated: probability")
        s = expand_to(scale, self.event_shape, "ZeroInflated: scale")
        require_fraction("ZeroInflated", probability=p)
        require_positive("ZeroInflated", scale=s)
        for name, value in (("logits", p.logit()), ("log_scale", s.log())):
            register_value(self, name, value.clone(), learn)

    def parameters_of(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of zero and log_scale, each broadcastable to (B, *event), float32 or better."""
        if self.conditional:
            logits, log_scale = self._net_parameters(context, 2)
        else:
            logits, log_scale = self.logits, self.log_scale
        return at_least_float32(logits), at_least_float32(log_scale)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        logits, log_scale = self.parameters_of(context)
        x = x.to(torch.promote_types(x.dtype, logits.dtype))
        density = math.log(2) - 0.5 * (x * torch.exp(-log_scale)).square() - HALF_LOG_TWO_PI
        positive = F.logsigmoid(-logits) + density - log_scale
        value = torch.where(x == 0, F.logsigmoid(logits), positive)
        return sum_event(torch.where(x >= 0, value, -math.inf))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        logits, log_scale = self.parameters_of(context)
        shape = (n, *self.event_shape)
        zero = torch.rand(shape, device=logits.device, dtype=logits.dtype) < logits.sigmoid()
        eps = torch.randn(shape, device=logits.device, dtype=logits.dtype).abs()
        return torch.where(zero, 0.0, eps * log_scale.exp() * temperature)
