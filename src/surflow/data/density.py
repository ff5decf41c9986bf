"""What two-dimensional densities that can be sampled and evaluated exactly have in common."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.errors import check_whole, is_whole

LOG_2PI = math.log(2 * math.pi)
_CHUNK = 1 << 21  # most elements of one (points, components) table: 16 MiB in float64
_SPLITS = ("train", "valid", "test")


class SyntheticDataset2d(ABC):
    """p(x) on the plane, with a sampler, an exact log density and its entropy.

    A subclass sets the class attributes and implements ``_sample`` and ``_log_prob``, both in
    float64.

    Attributes:
        name: key in ``DATASETS``.
        bound: samples lie strictly inside (-bound, bound)^2; None where the support is unbounded.
        window: half-width of the square to plot.
        extent, step: half-width and grid step of the square that the entropy quadrature takes.
        positive: all samples lie in the positive quadrant.
        symmetry: "symmetric" (p is unchanged when the sign of either coordinate flips),
            "antisymmetric" (the flip maps the support to its complement in the square) or None.
        closed_entropy: the entropy in nats where it has a closed form; None: by quadrature.
    """

    name: ClassVar[str]
    bound: ClassVar[float | None] = None
    window: ClassVar[float] = 4.0
    extent: ClassVar[float]
    step: ClassVar[float]
    positive: ClassVar[bool] = False
    symmetry: ClassVar[str | None] = None
    closed_entropy: ClassVar[float | None] = None

    @abstractmethod
    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n float64 points, (n, 2), on the generator's device."""

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats, (n,), of float64 points (n, 2)."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """x_1, ..., x_n ~ p, independent, drawn in float64.

        Samples of a bounded dataset avoid every edge of the support exactly.

        Args:
            n: number of points.
            generator: the only source of randomness; its device is the result's.

        Returns:
            (n, 2), float32.

        Raises:
            ValueError: if n is not a positive integer or generator is not a torch.Generator.
        """
        check_whole("n", n)
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generator: expected a torch.Generator, got {generator!r}")
        return self._sample(n, generator).to(torch.float32)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (n,), in nats; -inf off the support.

        Computed in float64. The result is float64 for float64 input and float32 otherwise.

        Args:
            x: (n, 2), floating point.

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
        return self._quadrature() if self.closed_entropy is None else self.closed_entropy

    @classmethod
    @cache
    def _quadrature(cls) -> float:
        return grid_entropy(cls()._log_prob, cls.extent, cls.step)

    @property
    def entropy_method(self) -> str:
        """Either "closed form" or "quadrature"."""
        return "quadrature" if self.closed_entropy is None else "closed form"

    def splits(self, train: int, valid: int, test: int, seed: int) -> dict[str, Tensor]:
        """Independent splits, (train, 2), (valid, 2) and (test, 2), float32.

        Each has its own generator, seeded from (name, split, seed), and does not depend on the
        sizes of the others.

        Raises:
            ValueError: if a size is not a positive integer or seed is not an integer.
        """
        sizes = dict(zip(_SPLITS, (train, valid, test), strict=True))
        if not is_whole(seed, least=-math.inf):
            raise ValueError(f"seed: expected an integer, got {seed!r}")
        for split, size in sizes.items():
            check_whole(split, size)
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

    On a smooth density that vanishes at the border a step of 0.4 standard deviations of the
    narrowest Gaussian component gives better than 1e-5 nats, on a square that leaves out less than
    1e-7 of the mass. With a jump inside a cell the error is O(h).

    Args:
        log_prob: maps points (n, 2), float64, to log densities (n,) in nats.
        half_width: the grid covers [-half_width, half_width]^2.
        step: largest cell width; rounded down so that whole cells cover the square.

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


# Families


class GaussianMixture(SyntheticDataset2d):
    """p(x) = 1/K Σ_k N(x; c_k, σ² I)."""

    centres: ClassVar[tuple[tuple[float, float], ...]]
    noise: ClassVar[float]  # σ

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        centres = constant(self.centres, generator.device)
        k = choice(len(centres), n, generator)
        return centres[k] + self.noise * normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        d = x[:, None] - constant(self.centres, x.device)  # (n, K, 2)
        log_p = -LOG_2PI - 2 * math.log(self.noise) - 0.5 * (d / self.noise).square().sum(-1)
        return torch.logsumexp(log_p, -1) - math.log(len(self.centres))


class Circles(SyntheticDataset2d):
    """p(x) = 1/K Σ_k exp(-(ρ_k² + R_k²) / 2σ²) I₀(ρ_k R_k / σ²) / 2πσ², ρ_k = |x - c_k|."""

    centres: ClassVar[tuple[tuple[float, float], ...]]
    radii: ClassVar[tuple[float, ...]]
    noise: ClassVar[float]  # σ

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = choice(len(self.radii), n, generator)
        angle = 2 * math.pi * open_uniform(1, n, generator)[0]
        radius = constant(self.radii, generator.device)[k]
        circle = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
        centre = constant(self.centres, generator.device)[k]
        return centre + circle + self.noise * normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        centres, radii = constant(self.centres, x.device), constant(self.radii, x.device)
        rho = torch.linalg.vector_norm(x[:, None] - centres, dim=-1)  # (n, K)
        var = self.noise**2
        # exp(-(ρ² + R²) / 2σ²) I₀(κ) = exp(-(ρ - R)² / 2σ²) i0e(κ) with κ = ρR/σ²
        log_p = torch.log(torch.special.i0e(rho * radii / var)) - (rho - radii).square() / (2 * var)
        return torch.logsumexp(log_p, -1) - LOG_2PI - math.log(var * len(self.radii))


class Curves(SyntheticDataset2d):
    """p(x) = 1/K Σ_k ∫ w(t) N(x; c_k(t), σ² I) dt, by composite Gauss-Legendre quadrature.

    The density is accurate to about 1e-10 (relative) where there is mass.
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
        points = self._points(self._quantile(open_uniform(1, n, generator)[0]))  # (K, n, 2)
        k = choice(len(points), n, generator)
        points = points[k, torch.arange(n, device=points.device)]
        return points + self.noise * normal(n, generator)

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
        return torch.cat(mixed) - x.square().sum(-1) / (2 * var) - LOG_2PI - math.log(var)


class Conditional(SyntheticDataset2d):
    """p(x) = N(a; 0, s²) N(b; m(a), σ²): one coordinate a normal, the other b normal given a.

    Entropy: ln(2πe) + ln(sσ).
    """

    first: ClassVar[int]  # index of a in x
    scale: ClassVar[float]  # s
    noise: ClassVar[float]  # σ

    @abstractmethod
    def _mean(self, a: Tensor) -> Tensor:
        """m(a), elementwise."""

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        a, b = normal(n, generator).unbind(-1)
        a = self.scale * a
        pair = torch.stack([a, self._mean(a) + self.noise * b], dim=-1)
        return pair.flip(-1) if self.first == 1 else pair

    def _log_prob(self, x: Tensor) -> Tensor:
        a, b = x[:, self.first], x[:, 1 - self.first]
        squares = (a / self.scale).square() + ((b - self._mean(a)) / self.noise).square()
        return -LOG_2PI - math.log(self.scale * self.noise) - 0.5 * squares


# Draws


def open_uniform(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """Uniform on the 2^21 midpoints (k + ½) / 2^21, whose bounded maps here are exact in float32:
    (rows, n), float64."""
    k = torch.randint(1 << 21, (rows, n), generator=generator, device=generator.device)
    return (k.to(torch.float64) + 0.5) / (1 << 21)


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64, device=generator.device)


def choice(k: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(k, (n,), generator=generator, device=generator.device)


def coins(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (rows, n), generator=generator, device=generator.device).bool()


def constant(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
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
