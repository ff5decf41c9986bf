r"""Progressive flows of images: coarse first, then what each finer image adds.

An image of side 2^n is generated over images of sides 4, 8, 16 ... Two chains of the same parts:

    "published"   the coarse image is a latent: a VAE layer a level, with a narrow posterior about
                  the mean of 2×2 pixels; its decoder is a flow given the coarse image. A bound.
    "exact"       the coarse image is the first part of the fine one's Haar transform, and a density
                  gives the rest: a bijection and a slice a level.

docs/pronf.md has the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from surflow.checks import require_at_least
from surflow.distributions import DiagonalNormal
from surflow.distributions.base import Distribution, as_shape
from surflow.errors import check_choice
from surflow.flow import Flow, FlowDistribution, Ledger
from surflow.models.contract import takes
from surflow.models.glow import glow_coupling, glow_steps
from surflow.models.split_priors import Prior, prior_called
from surflow.nets.conv_resnet import PlainBlock
from surflow.transforms import VAE, Affine, Dequantization, Haar, Slice, Squeeze, Transform

COARSE_LOG_SCALE = -2.0


class Shifted(nn.Module):
    r"""Parameters of a normal about z - 1/2: (B, C, H, W) -> (B, 2 C, H, W).

    Args:
        log_scale: λ, the same everywhere; channels alternate location, λ.
    """

    def __init__(self, log_scale: float) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.tensor(log_scale))

    def location(self, z: Tensor) -> Tensor:
        return z - 0.5

    def forward(self, z: Tensor) -> Tensor:
        loc = self.location(z)
        return torch.stack([loc, self.log_scale.expand_as(loc)], dim=2).flatten(1, 2)


class BlockMeans(Shifted):
    r"""Parameters of a normal about the means of 2×2 pixels: (B, C, 2 H, 2 W) -> (B, 2 C, H, W)."""

    def location(self, z: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(z, 2)


@dataclass(frozen=True)
class Level:
    """The part of a pyramid's likelihood that belongs to one resolution.

    Attributes:
        side: height and width of its image.
        dims: D = C side², the dimensions of that image.
        layers: names of the ledger's rows that it takes.
        constant: what of the pyramid's constants goes with it, nats; over all levels they add up
            to zero. See docs/pronf.md.
    """

    side: int
    dims: int
    layers: tuple[str, ...]
    constant: float


class PyramidFlow(Flow):
    """A flow over images of several resolutions, and which layers are whose.

    Args:
        base, transforms: see :class:`~surflow.flow.Flow`.
        ends: index after the last transform of each level, finest first; the base is of the
            coarsest.
        shape: (C, H, W) of the finest image.
        num_levels: K, of whose cells of volume K^-D the constants are.
        level_rates: factors of the learning rate, finest level first; levels beyond the last entry
            take it.
    """

    def __init__(
        self,
        base: Distribution,
        transforms: Iterable[Transform],
        ends: Sequence[int],
        shape: Sequence[int],
        num_levels: int,
        level_rates: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(base, transforms)
        self.ends = tuple(ends)
        self.shape = tuple(shape)
        self.num_levels = num_levels
        self.level_rates = tuple(level_rates)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For an optimizer: the parameters of every level, with its learning rate."""
        layers = [*self.transforms, self.base]
        bounds = (0, *self.ends, len(layers))
        groups = []
        for i, (start, end) in enumerate(pairwise(bounds)):
            params = [p for layer in layers[start:end] for p in layer.parameters()]
            rate = self.level_rates[min(i, len(self.level_rates) - 1)]
            groups.append({"params": params, "lr": rate * lr})
        return groups

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of the images, the finest first."""
        return tuple(self.shape[1] >> i for i in range(len(self.ends) + 1))

    @property
    def levels(self) -> tuple[Level, ...]:
        """The finest level first."""
        names = [name for name, _ in self.layers()]
        cell = math.log(self.num_levels)
        dims = [self.shape[0] * side**2 for side in self.sides]
        found = []
        for i, (start, end) in enumerate(pairwise((0, *self.ends, len(names)))):
            constant = dims[i + 1] * cell if i + 1 < len(dims) else 0.0
            constant -= dims[i] * cell if i else 0.0
            found.append(Level(self.sides[i], dims[i], tuple(names[start:end]), constant))
        return tuple(found)

    def level_bits(self, ledger: Ledger) -> dict[int, tuple[float, float]]:
        r"""Bits per dimension of every level, of the dimensions of its own image.

        .. math:: b_l = -\frac{V_l + c_l}{D_l \log 2}, \qquad
                  \sum_l D_l\, b_l = D\, b

        with V_l the mean contribution of the level's layers, c_l its constant and b the bits per
        dimension of the whole flow.

        Returns:
            by side: the bits, and their standard error over the rows (taken as if the contributions
            of a level's layers were independent).
        """
        rows = {row.layer: row for row in ledger.rows}
        found = {}
        for level in self.levels:
            parts = [rows[name] for name in level.layers]
            value = sum(row.mean for row in parts) + level.constant
            error = math.sqrt(sum(row.standard_error**2 for row in parts))
            scale = level.dims * math.log(2.0)
            found[level.side] = (-value / scale, error / scale)
        return found

    def images(self, z: Tensor, steps: int | None = None) -> list[Tensor]:
        """From the image of one level down to the finest, a draw of each: (B, C, s, s) for growing
        s, in [0, 1) up to what a model puts outside.

        Args:
            z: an image of the coarsest level, or ``steps`` levels above the finest.
            steps: levels to go; None: all.
        """
        steps = len(self.ends) if steps is None else steps
        starts = (1, *self.ends)  # the first layer is the dequantization
        found = [z]
        for i in reversed(range(steps)):
            for layer in reversed([*self.transforms][starts[i] : self.ends[i]]):
                z = layer.inverse(z)
            found.append(z)
        return found

    def coarsened(self, x: Tensor) -> list[Tensor]:
        """The images of every level of data (B, C, H, W), the finest first; latents are drawn."""
        found = []
        for i, layer in enumerate(self.transforms):
            x = layer.latent(x)
            if i == 0 or i + 1 in self.ends:
                found.append(x)
        return found


@dataclass(frozen=True)
class Parts:
    """What all levels are made of.

    Attributes:
        num_steps: steps between two squeezes.
        hidden_channels: of the couplings' nets.
        prior: of what the details split off, and of their last latent.
        embed_channels: what a coarse image is embedded to, for the details.
        standardise: see :class:`~surflow.nets.GlowNet`.
    """

    num_steps: int
    hidden_channels: int
    prior: Prior
    embed_channels: int
    standardise: bool

    def steps(self, channels: int, context_features: int = 0) -> list[Transform]:
        """Activation normalisation, 1×1 convolution (PLU), affine coupling; so many times."""
        couple = partial(
            glow_coupling,
            hidden_channels=self.hidden_channels,
            standardise=self.standardise,
            context_features=context_features,
        )
        # a single channel has no halves
        return glow_steps(channels, self.num_steps, couple) if channels > 1 else []

    def scales(
        self, shape: tuple[int, ...], context_features: int
    ) -> tuple[Distribution, list[Transform]]:
        """Squeeze, steps, split; squeeze, steps: the base and the layers for images of ``shape``.
        Sides that are no multiple of 4 have one squeeze, odd ones none. The priors see the
        embedded context too, at their size."""
        c, h, w = shape
        layers: list[Transform] = []
        if h % 4 == 0:
            c, h, w = 4 * c, h // 2, w // 2
            keep = c // 2
            dropped = self.prior((c - keep, h, w), keep + context_features, 0)
            layers += [Squeeze(), *self.steps(c, context_features)]
            layers.append(Slice(dropped, keep=keep, context_features=context_features))
            c = keep
        if h % 2 == 0:
            c, h, w = 4 * c, h // 2, w // 2
            layers.append(Squeeze())
        layers += self.steps(c, context_features)
        return self.prior((c, h, w), context_features, 1), layers

    def details(self, shape: tuple[int, ...], seen_channels: int) -> FlowDistribution:
        """A density of details (9, h, w), say, given an image (seen, h, w)."""
        e = self.embed_channels
        embed = nn.Sequential(
            nn.Conv2d(seen_channels, e, 3, padding=1), PlainBlock(e, e), PlainBlock(e, e)
        )
        base, layers = self.scales(shape, e)
        return FlowDistribution(Flow(base, layers), shape, embed=embed)


def published_level(shape: tuple[int, ...], parts: Parts, log_scale: float) -> list[Transform]:
    r"""A VAE layer: the coarse image z ~ N(block means of x, e^{2 λ}), and x a flow given z.

    The flow takes x - 1/2 to a coarse part, N(z - 1/2, e^-4), and details, a density given both the
    coarse part and z.
    """
    c, h, w = shape
    coarse = (c, h // 2, w // 2)
    encoder = DiagonalNormal(coarse, net=BlockMeans(log_scale))
    details = parts.details((3 * c, h // 2, w // 2), 2 * c)
    layers = [
        Affine(shape, shift=-0.5),
        Haar(),
        *parts.steps(4 * c),
        Slice(details, keep=c, context_features=c),
    ]
    near = DiagonalNormal(coarse, net=Shifted(COARSE_LOG_SCALE))
    level = VAE(encoder, FlowDistribution(Flow(near, layers), shape))
    level.label = f"VAE[{h // 2} -> {h}]"
    return [level]


def exact_level(shape: tuple[int, ...], parts: Parts, log_scale: float) -> list[Transform]:
    """The Haar transform, whose details follow a density given the block means."""
    c, h, w = shape
    split = Slice(parts.details((3 * c, h // 2, w // 2), c), keep=c)
    split.label = f"Slice[{h // 2} -> {h}]"
    return [Haar(), split]


CHAINS: dict[str, Callable[[tuple[int, ...], Parts, float], list[Transform]]] = {
    "published": published_level,
    "exact": exact_level,
}


def _halvings(shape: tuple[int, ...], coarsest: int) -> int:
    halvings = 0
    if coarsest >= 1 and len(shape) == 3 and shape[1] >= coarsest:
        halvings = (shape[1] // coarsest).bit_length() - 1
    if coarsest < 1 or len(shape) != 3 or shape[1:] != (coarsest << halvings,) * 2:
        raise ValueError(
            "model.shape: expected (C, H, H) with H a power of two times coarsest, got "
            f"{shape} and {coarsest}"
        )
    return halvings


@takes("image", facts=("shape", "num_levels"))
def pronf(
    shape: Sequence[int] = (3, 32, 32),
    num_levels: int = 256,
    chain: str = "published",
    coarsest: int = 4,
    num_steps: int = 32,
    hidden_channels: int = 256,
    embed_channels: int = 32,
    standardise: bool = True,
    level_rates: Sequence[float] = (1.0,),
    prior: str = "autoregressive",
    prior_hidden_channels: int = 32,
    prior_layers: int = 3,
    prior_kernel_sizes: Sequence[int] = (3,),
    prior_dilations: Sequence[int] = (1,),
) -> PyramidFlow:
    r"""Dequantization -> a level for each halving -> a two-scale flow of the coarsest image.

    A step is activation normalisation, an invertible 1×1 convolution (PLU) and an affine coupling
    with a :class:`~surflow.nets.GlowNet`. Details of a level, 3 C channels at half its size, are
    two scales of steps whose nets see an embedding of the coarse image; what their split drops and
    their last latent follow the prior, which sees it too.

    In the chain "published" the posterior is :math:`\mathcal N(\text{block means}, \sigma^2)`, with
    the entropy of a uniform cell of 1/K. The only latents of the chain "exact" are the
    dequantization's noise.

    Args:
        shape: (C, H, H), H = coarsest · 2^n.
        num_levels: K: data are integers 0 ... K - 1.
        chain: "published" or "exact".
        coarsest: side of the coarsest image.
        num_steps: steps between two squeezes (of a level of "published", also in front of them).
        hidden_channels: of the couplings' nets.
        embed_channels: of the embedded coarse image.
        standardise: see :class:`~surflow.nets.GlowNet`.
        level_rates: see :class:`PyramidFlow`.
        prior, prior_hidden_channels, prior_layers, prior_kernel_sizes, prior_dilations: see
            :func:`~surflow.models.mar_scf`; the last two are of the two scales of the details.

    Returns:
        A flow over integer images (B, C, H, H), a lower bound.

    Raises:
        ValueError: for an unknown name, sizes that are not positive, or sides that do not fit.

    Source: the progressive flow of the mAR-SCF reproduction by Maleky, Kousha and Sham; "exact" as
    Yu et al. 2020 (Wavelet Flow), arXiv 2010.13821.

    >>> flow = pronf((3, 8, 8), num_steps=1, hidden_channels=8, prior_hidden_channels=4)
    >>> x = torch.randint(256, (2, 3, 8, 8))
    >>> tuple(flow.encode(x).shape), tuple(flow.sample(5).shape)
    ((2, 3, 4, 4), (5, 3, 8, 8))
    >>> [tuple(image.shape[1:]) for image in flow.images(flow.base.sample(1))]
    [(3, 4, 4), (3, 8, 8)]
    """
    shape = as_shape(shape)
    check_choice("model.chain", chain, CHAINS)
    require_at_least("model.", 2, num_levels=num_levels)
    require_at_least("model.", 1, hidden_channels=hidden_channels, embed_channels=embed_channels)
    require_at_least("model.", 0, num_steps=num_steps)
    if not level_rates or min(level_rates) <= 0:
        raise ValueError(f"model.level_rates: expected positive numbers, got {list(level_rates)}")
    halvings = _halvings(shape, coarsest)
    chosen = prior_called(
        prior,
        hidden_channels=prior_hidden_channels,
        num_layers=prior_layers,
        kernel_sizes=prior_kernel_sizes,
        dilations=prior_dilations,
    )
    parts = Parts(num_steps, hidden_channels, chosen, embed_channels, standardise)
    # the entropy of a normal is log(sigma sqrt(2 pi e))
    log_scale = -math.log(num_levels) - 0.5 * math.log(2 * math.pi * math.e)
    layers: list[Transform] = [Dequantization(num_levels)]
    ends = []
    c, side, _ = shape
    for _ in range(halvings):
        layers += CHAINS[chain]((c, side, side), parts, log_scale)
        ends.append(len(layers))
        side //= 2
    base, last = parts.scales((c, side, side), 0)
    coarse = Flow(base, [Affine((c, side, side), shift=-0.5), *last])
    base = FlowDistribution(coarse, (c, side, side))
    return PyramidFlow(base, layers, ends, shape, num_levels, level_rates)
