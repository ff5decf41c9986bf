"""Monotone rational-quadratic splines."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surflow.checks import require, require_at_least, require_fraction
from surflow.numeric import at_least_float32
from surflow.transforms.maps import ElementwiseMap


class RationalQuadraticSpline(ElementwiseMap):
    r"""A monotone rational-quadratic spline on an interval.

    With knots (x_k, y_k), slopes d_k, bin slope s = Δy/Δx, relative slopes δ_k = d_k/s and
    ξ = (x − x_k)/Δx,

    .. math:: z = y_k + \Delta y\,\frac{\xi^2 + \delta_k\,\xi(1-\xi)}{D}, \qquad
              D = \xi^2 + (\delta_k + \delta_{k+1})\,\xi(1-\xi) + (1-\xi)^2, \qquad
              \frac{dz}{dx} = s\,\frac{\delta_{k+1}\xi^2 + 2\xi(1-\xi) + \delta_k(1-\xi)^2}{D^2}

    and back, with η = (z − y_k)/Δy,

    .. math:: \frac{\xi}{1-\xi} = \frac{2\eta}{r + g} = \frac{r - g}{2(1-\eta)}, \qquad
              g = \delta_k(1-\eta) - \delta_{k+1}\eta, \qquad r = \sqrt{g^2 + 4\eta(1-\eta)}

    These are the paper's equations, arranged so that every sum has terms of one sign: nothing
    cancels, no discriminant can turn negative, and float32 keeps its digits in bins at the floor.

    Parameters of an element: K widths, K heights (softmax, with a floor), then the knots' slopes
    (softplus, with a floor). All zero is the identity. Computed in float32 or better.

    Args:
        num_bins: K.
        bound: the interval, [-bound, bound] or, as a pair, [low, high], with identity tails
            outside and slope 1 at both ends (K - 1 slopes); None: [0, 1] onto itself, free
            slopes at both ends (K + 1), and nothing outside. With tails ±inf goes to itself.
        min_bin, min_slope: floors, in units of the interval's length and of 1.

    Raises:
        ValueError: for sizes out of range, or a floor of the bins that float32 cannot resolve at
            the interval's edges; without tails, for x outside [0, 1].

    Cost: O(K) an element in both directions, nothing iterated.
    Source: Durkan et al. 2019, arXiv 1906.04032, Sec. 3 and Appendix A.

    >>> spline = RationalQuadraticSpline(num_bins=4, bound=2.0)
    >>> z, log_slope = spline.forward(torch.tensor([-3.0, 0.5]), torch.zeros(2, spline.num_params))
    >>> z
    tensor([-3.0000,  0.5000])
    """

    exact_inverse = True

    def __init__(
        self,
        num_bins: int = 8,
        bound: float | Sequence[float] | None = 3.0,
        min_bin: float = 1e-3,
        min_slope: float = 1e-3,
    ) -> None:
        require_at_least("RationalQuadraticSpline", 2, num_bins=num_bins)
        interval = (-bound, bound) if isinstance(bound, int | float) else tuple(bound or (0.0, 1.0))
        if len(interval) != 2 or not interval[0] < interval[1]:
            raise ValueError(
                "RationalQuadraticSpline: expected bound > 0, or a pair low < high, "
                f"got bound = {bound}"
            )
        if not 0 < min_bin * num_bins < 1:
            raise ValueError(
                f"RationalQuadraticSpline: expected 0 < min_bin < 1/num_bins, got {min_bin}"
            )
        require_fraction("RationalQuadraticSpline", min_slope=min_slope)
        self.num_bins = num_bins
        self.tails = bound is not None
        self.low, self.high = float(interval[0]), float(interval[1])
        # knots are sums: a bin narrower than a few of their last digits could come out empty
        finest = 32 * torch.finfo(torch.float32).eps * max(abs(self.low), abs(self.high))
        finest /= self.high - self.low
        if min_bin < finest:
            raise ValueError(
                f"RationalQuadraticSpline: expected min_bin >= {finest:.2g} on "
                f"[{self.low:g}, {self.high:g}], which float32 can resolve, got {min_bin}"
            )
        self.min_bin, self.min_slope = min_bin, min_slope
        # softplus(0 + this) + min_slope = 1
        self.slope_offset = math.log(math.expm1(1.0 - min_slope))
        self.num_params = 3 * num_bins - 1 if self.tails else 3 * num_bins + 1

    # The knots, and the bin of a value. The dimension over knots comes first: each operation then
    # runs over long contiguous rows, which on a CPU is up to 20 times as fast as over rows of K.

    def _inner(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """(..., P) -> inner knots of x and z, (2, K - 1, ...), and K ± 1 free slopes."""
        k, length = self.num_bins, self.high - self.low
        sizes, slopes = params.movedim(-1, 0).split([2 * k, self.num_params - 2 * k])
        shares = torch.softmax(sizes.unflatten(0, (2, k)), dim=1)
        sizes = length * self.min_bin + length * (1.0 - self.min_bin * k) * shares[:, :-1]
        return self.low + torch.cumsum(sizes, dim=1), slopes

    def _with_ends(self, inner: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """All knots of x and of z, (2, K + 1, ...), and their free slopes, (K + 1, ...)."""
        low, high = (torch.full_like(inner[:, :1], end) for end in (self.low, self.high))
        if self.tails:  # free slope 0 is slope 1
            one = torch.zeros_like(slopes[:1])
            slopes = torch.cat([one, slopes, one])
        return torch.cat([low, inner, high], dim=1), slopes

    def _slope(self, free: Tensor) -> Tensor:
        return self.min_slope + F.softplus(free + self.slope_offset)

    def _bins(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Knots in x and z and slopes at the knots, (K + 1, ...) each."""
        knots, slopes = self._with_ends(*self._inner(params))
        return knots[0], knots[1], self._slope(slopes)

    def _bin(self, value: Tensor, params: Tensor, axis: int) -> tuple[Tensor, ...]:
        """The bin in which a value lies.

        Args:
            value: inside the interval, (...); an x where ``axis`` is 0, a z where it is 1.
            params: (..., P).

        Returns:
            x and z of its left knot, its width and height, its slope s, and the relative slopes δ
            at its two knots, (...) each.
        """
        inner, slopes = self._inner(params)
        index = (value >= inner[axis]).sum(0)
        knots, slopes = self._with_ends(inner, slopes)
        ends = torch.stack([index, index + 1])
        (x0, x1), (z0, z1) = knots.gather(1, ends.expand(2, *ends.shape))
        free0, free1 = slopes.gather(0, ends)
        width, height = x1 - x0, z1 - z0
        slope = height / width
        return x0, z0, width, height, slope, self._slope(free0) / slope, self._slope(free1) / slope

    @staticmethod
    def _evaluate(
        xi: Tensor, rest: Tensor, slope: Tensor, delta0: Tensor, delta1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """η at a place ξ = 1 - rest of a bin, and log dz/dx."""
        both = xi * rest
        below = xi.square() + delta0 * both
        above = rest.square() + delta1 * both
        total = below + above
        steep = delta1 * xi.square() + 2.0 * both + delta0 * rest.square()
        return below / total, torch.log(slope * steep / total / total)

    @staticmethod
    def _solve(eta: Tensor, delta0: Tensor, delta1: Tensor) -> tuple[Tensor, Tensor]:
        """The place ξ at which a bin takes the value η, and 1 - ξ."""
        rest = 1.0 - eta
        g = delta0 * rest - delta1 * eta
        root = torch.sqrt(g.square() + 4.0 * eta * rest)
        # of the two forms of ξ/(1 - ξ) the one without a difference; not abs(g), whose gradient
        # at 0 is neither side's
        right = g >= 0
        far = root + torch.where(right, g, -g)
        xi = torch.where(right, 2.0 * eta, far)
        other = torch.where(right, far, 2.0 * rest)
        return xi / (xi + other), other / (xi + other)

    # Both directions ---------------------------------------------------------------------------

    def _prepare(self, value: Tensor, params: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """Lift to float32, and clamp what lies outside into the interval."""
        value = at_least_float32(value)
        params = params.to(value.dtype)
        inside = (value >= self.low) & (value <= self.high)
        if not self.tails:  # rounding alone leaves the closed interval by a few units
            slack = 4 * torch.finfo(value.dtype).eps * max(abs(self.low), abs(self.high))
            inside = (value >= self.low - slack) & (value <= self.high + slack)
            expected = f"values in [{self.low:g}, {self.high:g}]"
            require(inside, expected, value, f"RationalQuadraticSpline.{method}")
        return value.clamp(self.low, self.high), params, inside

    def _with_tails(self, result: Tensor, inside: Tensor, outside: Tensor | float) -> Tensor:
        return torch.where(inside, result, outside) if self.tails else result

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        value, params, inside = self._prepare(x, params, "forward")
        x0, z0, width, height, *slopes = self._bin(value, params, axis=0)
        xi = (value - x0) / width
        eta, log_slope = self._evaluate(xi, 1.0 - xi, *slopes)
        z = self._with_tails(z0 + height * eta, inside, x.to(value.dtype))
        return z.to(x.dtype), self._with_tails(log_slope, inside, 0.0)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        value, params, inside = self._prepare(z, params, "inverse")
        x0, z0, width, height, _, *deltas = self._bin(value, params, axis=1)
        xi, _ = self._solve((value - z0) / height, *deltas)
        return self._with_tails(x0 + width * xi, inside, z.to(value.dtype)).to(z.dtype)

    def inverse_and_ldj(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        value, params, inside = self._prepare(z, params, "inverse")
        x0, z0, width, height, slope, *deltas = self._bin(value, params, axis=1)
        xi, rest = self._solve((value - z0) / height, *deltas)
        _, log_slope = self._evaluate(xi, rest, slope, *deltas)
        x = self._with_tails(x0 + width * xi, inside, z.to(value.dtype))
        return x.to(z.dtype), self._with_tails(log_slope, inside, 0.0)
