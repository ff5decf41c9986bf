"""Two-dimensional densities that can be both sampled and evaluated exactly.

The expected negative log-likelihood of any model of one is at least its ``entropy``.
"""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from surflow.data.density import (
    LOG_2PI,
    Circles,
    Conditional,
    Curves,
    GaussianMixture,
    SyntheticDataset2d,
    choice,
    coins,
    constant,
    grid_entropy,
    normal,
    open_uniform,
    rotate,
)
from surflow.errors import check_choice


class Checkerboard(SyntheticDataset2d):
    """p(x) = 1/32 where |x1|, |x2| < 4 and ⌊x1/2⌋ + ⌊x2/2⌋ is even, else 0.

    Entropy: ln 32.

    Source: Nielsen et al. 2020, arXiv 2007.02731, synthetic experiments.
    """

    name = "checkerboard"
    bound = 4.0
    extent = 4.0
    step = 0.05
    symmetry = "antisymmetric"
    closed_entropy = math.log(32)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        u, v = open_uniform(2, n, generator)
        x1, v = 8 * u - 4, 4 * v
        low = torch.where(v < 2, v - 4, v - 2)  # [-4, -2] ∪ [0, 2]
        odd = torch.floor(x1 / 2).remainder(2)
        return torch.stack([x1, low + 2 * odd], dim=-1)

    def _log_prob(self, x: Tensor) -> Tensor:
        even = torch.floor(x / 2).sum(-1).remainder(2) == 0
        return torch.log(((x.abs() < 4).all(-1) & even).to(x.dtype) / 32)


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
    closed_entropy = 2 / 3 * math.log(24) + 1 / 3 * math.log(12)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        short, long = open_uniform(2, n, generator)
        bar = torch.stack([1 + short, 1 + 3 * long], dim=-1)  # (n, 2)
        upright, *signs = coins(3, n, generator)
        bar = torch.where(upright[:, None], bar, bar.flip(-1))
        return torch.where(torch.stack(signs, dim=-1), bar, -bar)

    def _log_prob(self, x: Tensor) -> Tensor:
        a = x.abs()
        inside = ((a > 1) & (a < 4)).all(-1)
        bars = inside * (a < 2).sum(-1)  # 0, 1 or 2
        return torch.log(bars.to(x.dtype) / 24)


class EightGaussians(GaussianMixture):
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


class GaussianGrid(GaussianMixture):
    """p(x) = 1/25 Σ_k N(x; c_k, 0.15² I), c_k ∈ {-3, -1.5, 0, 1.5, 3}².

    Source: the 5 × 5 grid as in Dumoulin et al. 2017, arXiv 1606.00704; spacing and width are ours.
    """

    name = "gaussian_grid"
    extent = 4.2
    step = 0.05
    symmetry = "symmetric"
    noise = 0.15
    centres = tuple((1.5 * i, 1.5 * j) for i in range(-2, 3) for j in range(-2, 3))


class Gaussian(GaussianMixture):
    """p(x) = N(x; 0, I). Entropy: ln(2πe)."""

    name = "gaussian"
    extent = 7.0
    step = 0.25
    symmetry = "symmetric"
    closed_entropy = LOG_2PI + 1
    noise = 1.0
    centres = ((0.0, 0.0),)


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
    mean = (0.5, -0.3)
    loading = (1.5, 0.8)
    noise = 0.4
    determinant = noise**2 * (noise**2 + sum(w * w for w in loading))
    closed_entropy = LOG_2PI + 1 + 0.5 * math.log(determinant)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, 1, generator=generator, dtype=torch.float64, device=generator.device)
        mean, loading = (constant(v, generator.device) for v in (self.mean, self.loading))
        return mean + z * loading + self.noise * normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        d = x - constant(self.mean, x.device)
        along = d @ constant(self.loading, x.device)
        var = self.noise**2
        # the inverse of σ² I + w wᵀ, by Sherman and Morrison
        length = sum(w * w for w in self.loading)
        square = (d.square().sum(-1) - along.square() / (var + length)) / var
        return -LOG_2PI - 0.5 * math.log(self.determinant) - 0.5 * square


class FourCircles(Circles):
    """:class:`Circles` of radius 2 around (±1, ±1), σ = 0.1.

    Source: Nielsen et al. 2020, arXiv 2007.02731, synthetic experiments.
    """

    name = "four_circles"
    extent = 3.8
    step = 0.04
    symmetry = "symmetric"
    centres = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))
    radii = (2.0, 2.0, 2.0, 2.0)
    noise = 0.1


class Rings(Circles):
    """:class:`Circles` around the origin of radius 0.75 k, k = 1, ..., 4, σ = 0.08.

    Source: after Grathwohl et al. 2019, arXiv 1810.01367, toy experiments.
    """

    name = "rings"
    extent = 3.6
    step = 0.03
    symmetry = "symmetric"
    centres = ((0.0, 0.0),) * 4
    radii = (0.75, 1.5, 2.25, 3.0)
    noise = 0.08


class TwoMoons(Curves):
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


class Spirals(Curves):
    """c(t) = ±(-t cos t, t sin t) / 3, t = 3π √u, u ~ U(0, 1).

    x = c(t) + N(0, 0.1² I): two arms.

    Source: Grathwohl et al. 2019, arXiv 1810.01367, toy experiments; their uniform noise left out.
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


class SwissRoll(Curves):
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


class Pinwheel(SyntheticDataset2d):
    """x = 2 Rot(2πk/5 + exp(|f|)/4) f, f ~ N((1, 0), diag(0.3², 0.1²)), k uniform on 0, ..., 4.

    The warp preserves volume: p(x) = 1/4 · 1/5 Σ_k N(f_k(x); (1, 0), diag(0.3², 0.1²)), and the
    entropy is that of the unwarped mixture, by quadrature, plus ln 4.

    Source: Johnson et al. 2016, arXiv 1603.06277, where the angle depends on f₁ instead of |f|.
    """

    name = "pinwheel"
    extent = 5.6
    step = 0.02
    arms: ClassVar[int] = 5
    scales: ClassVar[tuple[float, float]] = (0.3, 0.1)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = choice(self.arms, n, generator)
        f = normal(n, generator) * constant(self.scales, generator.device)
        f = f + constant((1.0, 0.0), generator.device)
        return 2 * rotate(f, 2 * math.pi / self.arms * k + self._twist(f))

    def _log_prob(self, x: Tensor) -> Tensor:
        f = x / 2
        return self._unwarped_log_prob(rotate(f, -self._twist(f))) - math.log(4)

    @classmethod
    @cache
    def _quadrature(cls) -> float:
        """H = H[unwarped mixture] + ln 4, in nats."""
        return grid_entropy(cls()._unwarped_log_prob, 2.8, 0.04) + math.log(4)

    def _twist(self, f: Tensor) -> Tensor:
        return torch.linalg.vector_norm(f, dim=-1).exp() / 4

    def _unwarped_log_prob(self, f: Tensor) -> Tensor:
        """log 1/5 Σ_k N(Rot(-2πk/5) f; (1, 0), diag(0.3², 0.1²)): (n,)."""
        back = -2 * math.pi / self.arms * torch.arange(self.arms, dtype=f.dtype, device=f.device)
        f = rotate(f[:, None], back)  # (n, 5, 2)
        d = (f - constant((1.0, 0.0), f.device)) / constant(self.scales, f.device)
        log_p = -LOG_2PI - math.log(math.prod(self.scales)) - 0.5 * d.square().sum(-1)
        return torch.logsumexp(log_p, -1) - math.log(self.arms)


class Sinusoid(Conditional):
    """p(x) = N(x1; 0, 1.5²) N(x2; 2 sin(πx1/2), 0.3²). Entropy: ln(2πe) + ln 0.45."""

    name = "sinusoid"
    window = 5.0
    extent = 9.0
    step = 0.06
    first = 0
    scale = 1.5
    noise = 0.3
    closed_entropy = LOG_2PI + 1 + math.log(scale * noise)

    def _mean(self, a: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 2 * a)


class Banana(Conditional):
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
    closed_entropy = LOG_2PI + 1 + math.log(scale * noise)

    def _mean(self, a: Tensor) -> Tensor:
        return a.square() / 4


DATASETS: dict[str, type[SyntheticDataset2d]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, SyntheticDataset2d) and "name" in vars(cls)
}


def make_dataset(name: str) -> SyntheticDataset2d:
    """``DATASETS[name]()``; ValueError for an unknown name, with the closest known one."""
    check_choice("data.name", name, DATASETS)
    return DATASETS[name]()
