"""Two-dimensional densities that can be both sampled and evaluated exactly.

Every dataset knows its own log density and entropy, so a fitted flow can be compared with the best
value any model can reach: its expected negative log-likelihood is at least ``entropy``.
"""

import difflib
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "DATASETS",
    "Banana",
    "Checkerboard",
    "Corners",
    "EightGaussians",
    "FoldedMoons",
    "FourCircles",
    "Gaussian",
    "GaussianGrid",
    "LinearGaussian",
    "Pinwheel",
    "Rings",
    "Sinusoid",
    "Spirals",
    "SwissRoll",
    "SyntheticDataset2d",
    "TwoMoons",
    "grid_entropy",
    "make_dataset",
]

_LOG_2PI = math.log(2 * math.pi)
_CHUNK = 1 << 21  # most elements of one (points, components) table: 16 MiB in float64
_SPLITS = ("train", "valid", "test")


class SyntheticDataset2d(ABC):
    """p(x) on the plane, with a sampler, an exact log density and its entropy.

    A subclass sets the class attributes and implements ``_sample`` and ``_log_prob``, both in
    float64. One whose entropy has a closed form overrides ``entropy`` and ``entropy_method``.

    Attributes:
        name: key in ``DATASETS``.
        bound: samples lie strictly inside (-bound, bound)^2; None where the support is unbounded.
        window: half-width of the square to plot.
        extent: half-width of the square that holds all but a negligible part of the mass.
        step: grid step that resolves the density; used by the entropy quadrature.
        positive: all samples lie in the positive quadrant.
        symmetry: "symmetric" (p is unchanged when the sign of either coordinate flips),
            "antisymmetric" (flipping one coordinate maps the support to its complement in the
            bounding square) or None.
        entropy_method: "closed form" or "quadrature".
    """

    name: ClassVar[str]
    bound: ClassVar[float | None] = None
    window: ClassVar[float] = 4.0
    extent: ClassVar[float]
    step: ClassVar[float]
    positive: ClassVar[bool] = False
    symmetry: ClassVar[str | None] = None
    entropy_method: ClassVar[str] = "quadrature"

    @abstractmethod
    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n float64 points, (n, 2), on the generator's device."""

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats, (n,), of float64 points (n, 2)."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """x_1, ..., x_n ~ p, independent.

        All randomness comes from ``generator``. Points are drawn in float64 and returned in
        float32; samples of a bounded dataset avoid every edge of the support exactly.

        Args:
            n: number of points.
            generator: the only source of randomness; its device is the result's.

        Returns:
            (n, 2), float32.

        Raises:
            ValueError: if n is not a positive integer or generator is not a torch.Generator.
        """
        _check_size("n", n)
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generator: expected a torch.Generator, got {generator!r}")
        return self._sample(n, generator).to(torch.float32)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), in nats; -inf off the support.

        Computed in float64. The result is float64 for float64 input and float32 otherwise.

        Args:
            x: (n, 2), floating point.

        Returns:
            (n,)

        Raises:
            ValueError: if x is not a floating-point tensor of shape (n, 2).
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[1:] != (2,):
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected a floating-point tensor of shape (n, 2), got {got}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self._log_prob(x.to(torch.float64)).to(dtype)

    @property
    def entropy(self) -> float:
        """H[p] = -∫ p(x) log p(x) dx, in nats; see ``entropy_method``. Cached per class."""
        return _entropy_by_quadrature(type(self))

    def splits(self, train: int, valid: int, test: int, seed: int) -> dict[str, Tensor]:
        """x_split ~ p for each of train, valid and test, independent of one another.

        Each split has its own generator, seeded from (name, split, seed): a split depends neither
        on the process nor on the sizes of the others.

        Args:
            train, valid, test: number of points of each split.
            seed: any integer.

        Returns:
            {"train": (train, 2), "valid": (valid, 2), "test": (test, 2)}, float32.

        Raises:
            ValueError: if a size is not a positive integer or seed is not an integer.
        """
        sizes = dict(zip(_SPLITS, (train, valid, test), strict=True))
        for split, size in sizes.items():
            _check_size(split, size)
        if not _is_int(seed):
            raise ValueError(f"seed: expected an integer, got {seed!r}")
        return {
            split: self.sample(size, torch.Generator().manual_seed(self._sub_seed(split, seed)))
            for split, size in sizes.items()
        }

    def _sub_seed(self, split: str, seed: int) -> int:
        digest = hashlib.sha256(f"{self.name}/{split}/{seed}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1  # non-negative int64

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def grid_entropy(log_prob: Callable[[Tensor], Tensor], half_width: float, step: float) -> float:
    """H ≈ -h² Σ p(x) log p(x) over the cell midpoints x of a square grid of step h, in nats.

    On a smooth density that vanishes at the border the midpoint rule converges faster than any
    power of h: a step of 0.4 standard deviations of the narrowest Gaussian component, on a square
    that leaves out less than 1e-7 of the mass, gives better than 1e-5 nats. With a jump in the
    density the error is O(h), unless the jumps lie on cell edges.

    Args:
        log_prob: maps points (n, 2), float64, to log densities (n,) in nats.
        half_width: the grid covers [-half_width, half_width]^2.
        step: largest cell width; rounded down so that whole cells cover the square.

    Returns:
        the entropy in nats.

    Raises:
        ValueError: if half_width or step is not positive.
    """
    if not (half_width > 0 and step > 0):
        raise ValueError(f"expected half_width > 0 and step > 0, got {half_width} and {step}")
    cells = math.ceil(2 * half_width / step)
    h = 2 * half_width / cells
    axis = (torch.arange(cells, dtype=torch.float64) + 0.5) * h - half_width
    total = 0.0
    for column in axis.split(max(1, (1 << 16) // cells)):
        x = torch.cartesian_prod(column, axis)  # (n, 2)
        p = log_prob(x).exp()
        total -= torch.xlogy(p, p).sum().item()
    return total * h**2


@cache
def _entropy_by_quadrature(cls: type[SyntheticDataset2d]) -> float:
    return grid_entropy(cls()._log_prob, cls.extent, cls.step)


# Bounded densities, piecewise constant


class Checkerboard(SyntheticDataset2d):
    """p(x) = 1/32 where |x1|, |x2| < 4 and ⌊x1/2⌋ + ⌊x2/2⌋ is even, else 0.

    x1 is uniform on [-4, 4]; x2 is uniform on [-4, -2] ∪ [0, 2] for even i = ⌊x1/2⌋ and on
    [-2, 0] ∪ [2, 4] for odd i. Entropy: ln 32.

    Source: Nielsen et al. 2020, arXiv 2007.02731, synthetic experiments.
    """

    name = "checkerboard"
    bound = 4.0
    extent = 4.0
    step = 0.05
    symmetry = "antisymmetric"
    entropy_method = "closed form"

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        u, v = _open_uniform(2, n, generator)
        x1, v = 8 * u - 4, 4 * v
        low = torch.where(v < 2, v - 4, v - 2)  # [-4, -2] ∪ [0, 2]
        odd = torch.floor(x1 / 2).remainder(2)
        return torch.stack([x1, low + 2 * odd], dim=-1)

    def _log_prob(self, x: Tensor) -> Tensor:
        even = torch.floor(x / 2).sum(-1).remainder(2) == 0
        inside = (x.abs() < 4).all(-1) & even
        return torch.log(inside.to(x.dtype) / 32)

    @property
    def entropy(self) -> float:
        """H = ln 32, in nats."""
        return math.log(32)


class Corners(SyntheticDataset2d):
    """p(x) = (1{a ∈ [1,2]×[1,4]} + 1{a ∈ [1,4]×[1,2]}) / 24, with a = (|x1|, |x2|).

    An L in each quadrant: one of two bars with probability ½, and fair signs. The bars overlap in
    [1, 2]², where the density is 1/12. Entropy: ⅔ ln 24 + ⅓ ln 12.

    Source: Nielsen et al. 2020, arXiv 2007.02731, synthetic experiments.
    """

    name = "corners"
    bound = 4.0
    extent = 4.0
    step = 0.05
    symmetry = "symmetric"
    entropy_method = "closed form"

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        short, long = _open_uniform(2, n, generator)
        bar = torch.stack([1 + short, 1 + 3 * long], dim=-1)  # (n, 2)
        upright, *signs = _coins(3, n, generator)
        bar = torch.where(upright[:, None], bar, bar.flip(-1))
        return torch.where(torch.stack(signs, dim=-1), bar, -bar)

    def _log_prob(self, x: Tensor) -> Tensor:
        a = x.abs()
        inside = ((a > 1) & (a < 4)).all(-1)
        bars = inside * (a < 2).sum(-1)  # 0, 1 or 2
        return torch.log(bars.to(x.dtype) / 24)

    @property
    def entropy(self) -> float:
        """H = ⅔ ln 24 + ⅓ ln 12, in nats."""
        return 2 / 3 * math.log(24) + 1 / 3 * math.log(12)


# Mixtures of isotropic Gaussians


class _GaussianMixture(SyntheticDataset2d):
    """p(x) = 1/K Σ_k N(x; c_k, σ² I)."""

    centres: ClassVar[tuple[tuple[float, float], ...]]
    noise: ClassVar[float]  # σ

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        centres = _constant(self.centres, generator.device)
        k = _choice(len(centres), n, generator)
        return centres[k] + self.noise * _normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        d = x[:, None] - _constant(self.centres, x.device)  # (n, K, 2)
        log_p = -_LOG_2PI - 2 * math.log(self.noise) - 0.5 * (d / self.noise).square().sum(-1)
        return torch.logsumexp(log_p, -1) - math.log(len(self.centres))


class EightGaussians(_GaussianMixture):
    """p(x) = 1/8 Σ_k N(x; c_k, σ² I), |c_k| = 4/1.414, at angles π/8 + kπ/4, σ = 0.5/1.414.

    Source: Nielsen et al. 2020, arXiv 2007.02731, synthetic experiments; after Grathwohl et al.
    2019, arXiv 1810.01367, with the ring turned so that no centre lies on an axis.
    """

    name = "eight_gaussians"
    extent = 5.5
    step = 0.1
    symmetry = "symmetric"
    noise = 0.5 / 1.414
    centres = tuple(
        (4 / 1.414 * math.cos(angle), 4 / 1.414 * math.sin(angle))
        for angle in (math.pi / 8 + k * math.pi / 4 for k in range(8))
    )


class GaussianGrid(_GaussianMixture):
    """p(x) = 1/25 Σ_k N(x; c_k, 0.15² I), c_k ∈ {-3, -1.5, 0, 1.5, 3}².

    Source: the 5 × 5 grid usual for generative models, e.g. Dumoulin et al. 2017, arXiv
    1606.00704; spacing and width are ours, to fill the window of the other datasets.
    """

    name = "gaussian_grid"
    extent = 4.2
    step = 0.05
    symmetry = "symmetric"
    noise = 0.15
    centres = tuple((1.5 * i, 1.5 * j) for i in range(-2, 3) for j in range(-2, 3))


class Gaussian(_GaussianMixture):
    """p(x) = N(x; 0, I). Entropy: ln(2πe)."""

    name = "gaussian"
    extent = 7.0
    step = 0.25
    symmetry = "symmetric"
    entropy_method = "closed form"
    noise = 1.0
    centres = ((0.0, 0.0),)

    @property
    def entropy(self) -> float:
        """H = ln(2πe), in nats."""
        return _LOG_2PI + 1


class LinearGaussian(SyntheticDataset2d):
    """p(x) = N(x; μ, w wᵀ + σ² I): a line of latents and isotropic noise, as PPCA supposes.

    μ = (0.5, -0.3), w = (1.5, 0.8), σ = 0.4. Entropy: ln(2πe) + ½ ln det Σ.

    Source: the model of Tipping & Bishop 1999, Probabilistic principal component analysis; the
    numbers are ours.
    """

    name = "linear_gaussian"
    extent = 12.0
    step = 0.1
    window = 5.0
    entropy_method = "closed form"
    mean = (0.5, -0.3)
    loading = (1.5, 0.8)
    noise = 0.4

    @property
    def _determinant(self) -> float:
        var = self.noise**2
        return var * (var + sum(w * w for w in self.loading))

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, 1, generator=generator, dtype=torch.float64, device=generator.device)
        mean, loading = (_constant(v, generator.device) for v in (self.mean, self.loading))
        return mean + z * loading + self.noise * _normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        d = x - _constant(self.mean, x.device)
        along = d @ _constant(self.loading, x.device)
        var = self.noise**2
        # the inverse of σ² I + w wᵀ, by Sherman and Morrison
        square = (
            d.square().sum(-1) - along.square() / (var + sum(w * w for w in self.loading))
        ) / var
        return -_LOG_2PI - 0.5 * math.log(self._determinant) - 0.5 * square

    @property
    def entropy(self) -> float:
        """H = ln(2πe) + ½ ln det Σ, in nats."""
        return _LOG_2PI + 1 + 0.5 * math.log(self._determinant)


# Noisy circles


class _Circles(SyntheticDataset2d):
    """p(x) = 1/K Σ_k exp(-(ρ_k² + R_k²) / 2σ²) I₀(ρ_k R_k / σ²) / 2πσ², ρ_k = |x - c_k|."""

    centres: ClassVar[tuple[tuple[float, float], ...]]
    radii: ClassVar[tuple[float, ...]]
    noise: ClassVar[float]  # σ

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = _choice(len(self.radii), n, generator)
        angle = 2 * math.pi * _open_uniform(1, n, generator)[0]
        radius = _constant(self.radii, generator.device)[k]
        circle = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
        centre = _constant(self.centres, generator.device)[k]
        return centre + circle + self.noise * _normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        centres, radii = _constant(self.centres, x.device), _constant(self.radii, x.device)
        rho = torch.linalg.vector_norm(x[:, None] - centres, dim=-1)  # (n, K)
        var = self.noise**2
        # exp(-(ρ² + R²) / 2σ²) I₀(κ) = exp(-(ρ - R)² / 2σ²) i0e(κ) with κ = ρR/σ²
        log_p = torch.log(torch.special.i0e(rho * radii / var)) - (rho - radii).square() / (2 * var)
        return torch.logsumexp(log_p, -1) - _LOG_2PI - math.log(var * len(self.radii))


class FourCircles(_Circles):
    """p(x) = 1/4 Σ_k p_k(x): circles of radius 2 around (±1, ±1), Gaussian noise of σ = 0.1.

    p_k(x) = exp(-(ρ² + R²) / 2σ²) I₀(ρR/σ²) / 2πσ², with ρ = |x - c_k| and R = 2.

    Source: Nielsen et al. 2020, arXiv 2007.02731, synthetic experiments.
    """

    name = "four_circles"
    extent = 3.8
    step = 0.04
    symmetry = "symmetric"
    centres = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))
    radii = (2.0, 2.0, 2.0, 2.0)
    noise = 0.1


class Rings(_Circles):
    """p(x) = 1/4 Σ_k p_k(x): concentric circles of radius 0.75 k, k = 1, ..., 4, σ = 0.08.

    p_k(x) = exp(-(ρ² + R_k²) / 2σ²) I₀(ρR_k/σ²) / 2πσ², with ρ = |x|.

    Source: after Grathwohl et al. 2019, arXiv 1810.01367, toy experiments.
    """

    name = "rings"
    extent = 3.6
    step = 0.03
    symmetry = "symmetric"
    centres = ((0.0, 0.0),) * 4
    radii = (0.75, 1.5, 2.25, 3.0)
    noise = 0.08


# Noisy curves


class _Curves(SyntheticDataset2d):
    """p(x) = 1/K Σ_k ∫ w(t) N(x; c_k(t), σ² I) dt, by composite Gauss-Legendre quadrature.

    The nodes lie much closer together than σ along the curve, so the density is accurate to about
    1e-10 (relative) wherever there is mass.
    """

    noise: ClassVar[float]  # σ
    t_range: ClassVar[tuple[float, float]]
    panels: ClassVar[int]  # of 32 nodes

    @abstractmethod
    def _points(self, t: Tensor) -> Tensor:
        """The K curves at t: (K, *t.shape, 2)."""

    def _quantile(self, u: Tensor) -> Tensor:
        """Inverse distribution function of w; uniform on ``t_range`` unless overridden."""
        low, high = self.t_range
        return low + (high - low) * u

    def _weight(self, t: Tensor) -> Tensor:
        """w(t)."""
        low, high = self.t_range
        return torch.full_like(t, 1 / (high - low))

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        points = self._points(self._quantile(_open_uniform(1, n, generator)[0]))  # (K, n, 2)
        k = _choice(len(points), n, generator)
        points = points[k, torch.arange(n, device=points.device)]
        return points + self.noise * _normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        t, weight = (torch.from_numpy(v).to(x) for v in _gauss_legendre(*self.t_range, self.panels))
        points = self._points(t)  # (K, T, 2)
        log_w = (weight * self._weight(t) / len(points)).log().repeat(len(points))
        nodes = points.flatten(0, 1)  # (K·T, 2)
        var = self.noise**2
        offset = log_w - nodes.square().sum(-1) / (2 * var)
        mixed = [
            torch.logsumexp(torch.addmm(offset, rows / var, nodes.T), -1)
            for rows in x.split(max(1, _CHUNK // len(nodes)))
        ]
        return torch.cat(mixed) - x.square().sum(-1) / (2 * var) - _LOG_2PI - math.log(var)


class TwoMoons(_Curves):
    """c₁(t) = (2 cos t - 1, 2 sin t - 0.2), c₂(t) = (1 - 2 cos t, 0.8 - 2 sin t), t ~ U(0, π).

    x = c_k(t) + N(0, 0.2² I), k fair: two interleaved half circles.

    Source: Grathwohl et al. 2019, arXiv 1810.01367, toy experiments.
    """

    name = "two_moons"
    extent = 4.4
    step = 0.07
    noise = 0.2
    t_range = (0.0, math.pi)
    panels = 8

    def _points(self, t: Tensor) -> Tensor:
        x, y = 2 * t.cos(), 2 * t.sin()
        outer = torch.stack([x - 1, y - 0.2], dim=-1)
        return torch.stack([outer, torch.stack([1 - x, 0.8 - y], dim=-1)])


class Spirals(_Curves):
    """c(t) = ±(-t cos t, t sin t) / 3, t = 3π √u, u ~ U(0, 1).

    x = c(t) + N(0, 0.1² I): two arms.

    Source: after Grathwohl et al. 2019, arXiv 1810.01367, toy experiments, without their
    additional uniform noise.
    """

    name = "spirals"
    extent = 3.8
    step = 0.04
    noise = 0.1
    t_range = (0.0, 3 * math.pi)
    panels = 24

    def _points(self, t: Tensor) -> Tensor:
        arm = torch.stack([-t * t.cos(), t * t.sin()], dim=-1) / 3
        return torch.stack([arm, -arm])

    def _quantile(self, u: Tensor) -> Tensor:
        return self.t_range[1] * u.sqrt()

    def _weight(self, t: Tensor) -> Tensor:
        return 2 * t / self.t_range[1] ** 2


class SwissRoll(_Curves):
    """c(t) = (t cos t, t sin t) / 5, t ~ U(3π/2, 9π/2).

    x = c(t) + N(0, 0.2² I).

    Source: Grathwohl et al. 2019, arXiv 1810.01367, toy experiments.
    """

    name = "swiss_roll"
    extent = 4.2
    step = 0.07
    noise = 0.2
    t_range = (1.5 * math.pi, 4.5 * math.pi)
    panels = 16

    def _points(self, t: Tensor) -> Tensor:
        return torch.stack([t * t.cos(), t * t.sin()], dim=-1)[None] / 5


# Folded


class FoldedMoons(SyntheticDataset2d):
    """x = |y|, y ~ two moons: p(x) = Σ_s p_moons(s ⊙ x) over the four sign vectors s, x >= 0.

    Data for models of a generative absolute value. All of it lies in the positive quadrant.
    """

    name = "folded_moons"
    positive = True
    extent = TwoMoons.extent
    step = TwoMoons.step

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        return TwoMoons()._sample(n, generator).abs()

    def _log_prob(self, x: Tensor) -> Tensor:
        one = torch.tensor([1.0, -1.0], dtype=x.dtype, device=x.device)
        moons = TwoMoons()
        parts = [moons._log_prob(x * s) for s in torch.cartesian_prod(one, one)]
        inside = (x >= 0).all(-1)
        return torch.where(inside, torch.stack(parts).logsumexp(0), -torch.inf)


# Warped Gaussians


class Pinwheel(SyntheticDataset2d):
    """x = 2 Rot(2πk/5 + exp(|f|)/4) f, f ~ N((1, 0), diag(0.3², 0.1²)), k uniform on 0, ..., 4.

    The angle of the warp depends on the radius only, so the warp preserves volume and
    p(x) = 1/4 · 1/5 Σ_k N(f_k(x); (1, 0), diag(0.3², 0.1²)). The same warp serves all five arms,
    so the entropy is that of the unwarped mixture, by quadrature, plus ln 4.

    Source: after Johnson et al. 2016, arXiv 1603.06277, where the angle depends on f₁ instead of
    |f|.
    """

    name = "pinwheel"
    extent = 5.6
    step = 0.02
    arms: ClassVar[int] = 5
    scales: ClassVar[tuple[float, float]] = (0.3, 0.1)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = _choice(self.arms, n, generator)
        f = _normal(n, generator) * _constant(self.scales, generator.device)
        f = f + _constant((1.0, 0.0), generator.device)
        return 2 * _rotate(f, 2 * math.pi / self.arms * k + self._twist(f))

    def _log_prob(self, x: Tensor) -> Tensor:
        f = x / 2
        return self._unwarped_log_prob(_rotate(f, -self._twist(f))) - math.log(4)

    @property
    def entropy(self) -> float:
        """H = H[unwarped mixture] + ln 4, in nats, by quadrature."""
        return _pinwheel_entropy()

    def _twist(self, f: Tensor) -> Tensor:
        return torch.linalg.vector_norm(f, dim=-1).exp() / 4

    def _unwarped_log_prob(self, f: Tensor) -> Tensor:
        """log 1/5 Σ_k N(Rot(-2πk/5) f; (1, 0), diag(0.3², 0.1²)): (n,)."""
        back = -2 * math.pi / self.arms * torch.arange(self.arms, dtype=f.dtype, device=f.device)
        f = _rotate(f[:, None], back)  # (n, 5, 2)
        d = (f - _constant((1.0, 0.0), f.device)) / _constant(self.scales, f.device)
        log_p = -_LOG_2PI - math.log(math.prod(self.scales)) - 0.5 * d.square().sum(-1)
        return torch.logsumexp(log_p, -1) - math.log(self.arms)


@cache
def _pinwheel_entropy() -> float:
    return grid_entropy(Pinwheel()._unwarped_log_prob, 2.8, 0.04) + math.log(4)


class _Conditional(SyntheticDataset2d):
    """p(x) = N(a; 0, s²) N(b; m(a), σ²): one coordinate a normal, the other b normal given a.

    Entropy: ln(2πe) + ln(sσ).
    """

    entropy_method = "closed form"
    first: ClassVar[int]  # index of a in x
    scale: ClassVar[float]  # s
    noise: ClassVar[float]  # σ

    @abstractmethod
    def _mean(self, a: Tensor) -> Tensor:
        """m(a), elementwise."""

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        a, b = _normal(n, generator).unbind(-1)
        a = self.scale * a
        pair = torch.stack([a, self._mean(a) + self.noise * b], dim=-1)
        return pair.flip(-1) if self.first == 1 else pair

    def _log_prob(self, x: Tensor) -> Tensor:
        a, b = x[:, self.first], x[:, 1 - self.first]
        squares = (a / self.scale).square() + ((b - self._mean(a)) / self.noise).square()
        return -_LOG_2PI - math.log(self.scale * self.noise) - 0.5 * squares

    @property
    def entropy(self) -> float:
        """H = ln(2πe) + ln(sσ), in nats."""
        return _LOG_2PI + 1 + math.log(self.scale * self.noise)


class Sinusoid(_Conditional):
    """p(x) = N(x1; 0, 1.5²) N(x2; 2 sin(πx1/2), 0.3²). Entropy: ln(2πe) + ln 0.45."""

    name = "sinusoid"
    window = 5.0
    extent = 9.0
    step = 0.06
    first = 0
    scale = 1.5
    noise = 0.3

    def _mean(self, a: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 2 * a)


class Banana(_Conditional):
    """p(x) = N(x2; 0, 2²) N(x1; x2²/4, 1). Entropy: ln(2πe) + ln 2.

    Source: Papamakarios et al. 2017, arXiv 1705.07057, figure 1.
    """

    name = "banana"
    window = 8.0
    extent = 32.0
    step = 0.25
    first = 1
    scale = 2.0
    noise = 1.0

    def _mean(self, a: Tensor) -> Tensor:
        return a.square() / 4


DATASETS: dict[str, type[SyntheticDataset2d]] = {
    cls.name: cls
    for cls in (
        Checkerboard,
        Corners,
        EightGaussians,
        FourCircles,
        TwoMoons,
        FoldedMoons,
        Spirals,
        Rings,
        Pinwheel,
        GaussianGrid,
        SwissRoll,
        Sinusoid,
        Banana,
        Gaussian,
        LinearGaussian,
    )
}


def make_dataset(name: str) -> SyntheticDataset2d:
    """``DATASETS[name]()``.

    Args:
        name: a key of ``DATASETS``.

    Returns:
        the dataset.

    Raises:
        ValueError: if the name is unknown; names the valid ones and the closest.
    """
    if isinstance(name, str) and name in DATASETS:
        return DATASETS[name]()
    close = difflib.get_close_matches(str(name), DATASETS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}{hint}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(what: str, size: object) -> None:
    if not _is_int(size) or size < 1:
        raise ValueError(f"{what}: expected a positive integer, got {size!r}")


def _open_uniform(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """Uniform on the 2^21 midpoints (k + ½) / 2^21: (rows, n), float64.

    Never 0 or 1, and coarse enough that the datasets' bounded maps of it are exact in float32.
    """
    k = torch.randint(1 << 21, (rows, n), generator=generator, device=generator.device)
    return (k.to(torch.float64) + 0.5) / (1 << 21)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64, device=generator.device)


def _choice(k: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(k, (n,), generator=generator, device=generator.device)


def _coins(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (rows, n), generator=generator, device=generator.device).bool()


def _constant(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """x (*, 2) turned anticlockwise by angle (*)."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * x[..., 0] - s * x[..., 1], s * x[..., 0] + c * x[..., 1]], dim=-1)


@cache
def _gauss_legendre(low: float, high: float, panels: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of composite Gauss-Legendre quadrature, 32 nodes a panel."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    half = (high - low) / (2 * panels)
    middles = low + half * (2 * np.arange(panels) + 1)
    return (middles[:, None] + half * nodes).ravel(), np.tile(half * weights, panels)
