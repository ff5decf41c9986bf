"""Monotone rational-quadratic splines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surflow.checks import require
from surflow.transforms.maps import ElementwiseMap


class RationalQuadraticSpline(ElementwiseMap):
    r"""A monotone rational-quadratic spline on an interval.

    With knots (x_k, y_k), slopes d_k, bin slope s = Δy/Δx and ξ = (x − x_k)/Δx,

    .. math:: z = y_k + \Delta y\,\frac{s\xi^2 + d_k\xi(1-\xi)}
                  {s + (d_{k+1} + d_k - 2s)\,\xi(1-\xi)}, \qquad
              \frac{dz}{dx} = \frac{s^2\,(d_{k+1}\xi^2 + 2s\xi(1-\xi) + d_k(1-\xi)^2)}
                  {(s + (d_{k+1} + d_k - 2s)\,\xi(1-\xi))^2}

    Parameters of an element: K widths, K heights (softmax, with a floor), then the knots' slopes
    (softplus, with a floor). All zero is the identity. Computed in float32 or better.

    Args:
        num_bins: K.
        bound: the interval, [-bound, bound] or, as a pair, [low, high], with identity tails
            outside and slope 1 at both ends (K - 1 slopes); None: [0, 1] onto itself, free
            slopes at both ends (K + 1), and nothing outside.
        min_bin, min_slope: floors, in units of the interval's length and of 1.

    Raises:
        ValueError: for sizes out of range; without tails, for x outside [0, 1].

    Source: Durkan et al. 2019, arXiv 1906.04032, Sec. 3 and Appendix A.
    """

    def __init__(
        self,
        num_bins: int = 8,
        bound: float | Sequence[float] | None = 3.0,
        min_bin: float = 1e-3,
        min_slope: float = 1e-3,
    ) -> None:
        if num_bins < 2:
            raise ValueError(f"RationalQuadraticSpline: expected num_bins >= 2, got {num_bins}")
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
        if not 0 < min_slope < 1:
            raise ValueError(
                f"RationalQuadraticSpline: expected 0 < min_slope < 1, got {min_slope}"
            )
        self.num_bins = num_bins
        self.tails = bound is not None
        self.low, self.high = float(interval[0]), float(interval[1])
        self.min_bin, self.min_slope = min_bin, min_slope
        # softplus(0 + this) + min_slope = 1
        self.slope_offset = math.log(math.expm1(1.0 - min_slope))
        self.num_params = 3 * num_bins - 1 if self.tails else 3 * num_bins + 1

    def _knots(self, unnormalised: Tensor) -> Tensor:
        """(..., K) -> knot positions (..., K + 1), increasing, exact at both ends."""
        length = self.high - self.low
        share = torch.softmax(unnormalised, dim=-1)
        share = self.min_bin + (1.0 - self.min_bin * self.num_bins) * share
        inner = self.low + length * torch.cumsum(share[..., :-1], dim=-1)
        return F.pad(F.pad(inner, (1, 0), value=self.low), (0, 1), value=self.high)

    def _bins(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Knots in x and z, (..., K + 1), and slopes at the knots, (..., K + 1)."""
        k = self.num_bins
        widths, heights, slopes = params.split([k, k, self.num_params - 2 * k], dim=-1)
        slopes = self.min_slope + F.softplus(slopes + self.slope_offset)
        if self.tails:
            slopes = F.pad(slopes, (1, 1), value=1.0)
        return self._knots(widths), self._knots(heights), slopes

    @staticmethod
    def _select(value: Tensor, knots: Tensor, *tables: Tensor) -> list[Tensor]:
        """For each value its bin's left and right entry of every table, interleaved."""
        index = (value.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1, keepdim=True)
        pair = torch.cat([index, index + 1], dim=-1)
        picked = [t.gather(-1, pair) for t in tables]
        return [p[..., i] for p in picked for i in (0, 1)]

    def _prepare(self, value: Tensor, params: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """Lift to float32, and clamp what lies outside into the interval."""
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        params = params.to(value.dtype)
        inside = (value >= self.low) & (value <= self.high)
        if not self.tails:
            where = f"RationalQuadraticSpline.{method}"
            require(inside, where, f"values in [{self.low:g}, {self.high:g}]", value)
        return value.clamp(self.low, self.high), params, inside

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        dtype, original = x.dtype, x
        x, params, inside = self._prepare(x, params, "forward")
        knots_x, knots_z, slopes = self._bins(params)
        x0, x1, z0, z1, d0, d1 = self._select(x, knots_x, knots_x, knots_z, slopes)
        z, log_slope = self._evaluate((x - x0) / (x1 - x0), z0, z1 - z0, x1 - x0, d0, d1)
        if self.tails:
            z = torch.where(inside, z, original.to(z.dtype))
            log_slope = torch.where(inside, log_slope, 0.0)
        return z.to(dtype), log_slope

    @staticmethod
    def _evaluate(
        xi: Tensor, z0: Tensor, height: Tensor, width: Tensor, d0: Tensor, d1: Tensor
    ) -> tuple[Tensor, Tensor]:
        xi = xi.clamp(0.0, 1.0)
        rest = 1.0 - xi
        both = xi * rest
        s = height / width
        denominator = s + (d1 + d0 - 2.0 * s) * both
        z = z0 + height * (s * xi.square() + d0 * both) / denominator
        numerator = d1 * xi.square() + 2.0 * s * both + d0 * rest.square()
        log_slope = 2.0 * (s.log() - denominator.log()) + numerator.log()
        return z, log_slope

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, ...]:
        """The place ξ in its bin at which the spline takes the value z, and the bin."""
        knots_x, knots_z, slopes = self._bins(params)
        x0, x1, z0, z1, d0, d1 = self._select(z, knots_z, knots_x, knots_z, slopes)
        width, height = x1 - x0, z1 - z0
        s = height / width
        above = z - z0
        curve = above * (d1 + d0 - 2.0 * s)
        a = height * (s - d0) + curve
        b = height * d0 - curve
        c = -s * above
        # the discriminant is positive for a monotone spline; rounding may take it below zero
        root = (b.square() - 4.0 * a * c).clamp_min(torch.finfo(z.dtype).tiny).sqrt()
        # 2c / (-b - root) loses no digits where a is small; b + root > 0
        xi = (2.0 * c / (-b - root)).clamp(0.0, 1.0)
        return xi, x0, width, z0, height, d0, d1

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        dtype, original = z.dtype, z
        z, params, inside = self._prepare(z, params, "inverse")
        xi, x0, width, *_ = self._solve(z, params)
        x = x0 + xi * width
        if self.tails:
            x = torch.where(inside, x, original.to(x.dtype))
        return x.to(dtype)

    def inverse_and_ldj(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        dtype, original = z.dtype, z
        z, params, inside = self._prepare(z, params, "inverse")
        xi, x0, width, z0, height, d0, d1 = self._solve(z, params)
        x = x0 + xi * width
        _, log_slope = self._evaluate(xi, z0, height, width, d0, d1)
        if self.tails:
            x = torch.where(inside, x, original.to(x.dtype))
            log_slope = torch.where(inside, log_slope, 0.0)
        return x.to(dtype), log_slope
