r"""The likelihood itself, where a flow gives a bound: latents summed or integrated out.

A bound such as the ELBO says little without what it bounds. In two dimensions the likelihood can be
computed: discrete latents by enumeration, continuous ones by quadrature on a grid,

    p(x) = Σ_k w(k|z_k) |det T_k'(x)| p(z_k)         a choice among bijections
    p(x) = ∫ p(x|z) p(z) dz                          a VAE layer, a diffusion step
    p(x) = ∫ p(x, e) de                              an augmentation
    P(x) = ∫_cell p(z) dz                            a dequantization

layer by layer, from the data's side. A layer whose forward is deterministic is passed with its
log-determinant taken from autograd, not from the layer, so that an exact flow too is compared with
something computed otherwise. The rule is the trapezoidal one, which for smooth integrands that
decay converges faster than any power of the step, and Gauss-Legendre's in the cells of a
dequantization; :func:`marginal_log_prob` is repeated on a coarser grid to tell its own error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor

from surflow.checks import check_values
from surflow.distributions import DiagonalNormal
from surflow.distributions.base import Distribution
from surflow.flow import Flow
from surflow.transforms import (
    VAE,
    AbsInference,
    Inverse,
    Sequential,
    Transform,
)
from surflow.transforms.stochastic.indexed import DiscretelyIndexed
from surflow.transforms.surjections.interval_fold import IntervalFold
from surflow.transforms.surjections.rounding import Dequantization
from surflow.transforms.surjections.slicing import Slice

__all__ = ["Grid", "Marginal", "marginal_log_prob"]

_CHUNK = 1 << 23  # most elements of one table of pairs: 64 MiB in float64

Tail = Callable[[Tensor], Tensor]
"""log p of what comes out of a layer: (B, *event) -> (B,)."""


@dataclass(frozen=True)
class Grid:
    """Where a layer's latent is integrated.

    Attributes:
        half_width: h of the cube [-h, h]^d that holds the latent's mass.
        points: points a dimension.
    """

    half_width: float
    points: int

    def coarser(self) -> Grid:
        """Two thirds of the points."""
        return Grid(self.half_width, max(2, 2 * self.points // 3))

    def nodes(self, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, float]:
        """All nodes, (J, *shape), and the log of the volume that each stands for."""
        if self.points < 2 or not self.half_width > 0:
            raise ValueError(f"Grid: expected points >= 2 and half_width > 0, got {self}")
        dims = math.prod(shape)
        if dims > 3:
            raise ValueError(f"Grid: expected a latent of at most 3 dimensions, got shape {shape}")
        axis = torch.linspace(
            -self.half_width, self.half_width, self.points, dtype=like.dtype, device=like.device
        )
        nodes = torch.cartesian_prod(*[axis] * dims).reshape(-1, *shape)
        return nodes, dims * math.log(2 * self.half_width / (self.points - 1))


@dataclass(frozen=True)
class Marginal:
    """log p(x) of every row, and how far a coarser rule is from it.

    Attributes:
        log_prob: (B,), nats.
        difference: (B,), what the coarser rule gives more, nats; 0 where nothing is integrated.
        method: how it was obtained, in words.
    """

    log_prob: Tensor
    difference: Tensor
    method: str


@dataclass
class _Rules:
    """The grids not used yet, in order, and what has been done, for the method's words."""

    grids: list[Grid]
    cell_nodes: int
    done: list[str] = field(default_factory=list)

    def next_grid(self, layer: Transform) -> Grid:
        if not self.grids:
            raise ValueError(f"marginal_log_prob: no grid left for {layer.label}: give one more")
        return self.grids.pop(0)

    def say(self, word: str) -> None:
        if word not in self.done:
            self.done.append(word)


@torch.no_grad()
def marginal_log_prob(
    flow: Flow, x: Tensor, grids: Grid | Sequence[Grid] = (), cell_nodes: int = 10
) -> Marginal:
    """log p(x) by enumeration and quadrature.

    Args:
        flow: the model, of low dimension; its layers may be bijections, inference surjections,
            VAE layers, augmentations, absolute values, dequantizations, choices among bijections.
        x: data, (B, *event); use float64.
        grids: one for each layer that integrates over a continuous latent, data side first; a
            single one serves all.
        cell_nodes: nodes a dimension in a dequantization's cell.

    Returns:
        log-likelihoods in nats, their error against a rule with two thirds of the points.

    Raises:
        ValueError: for a layer whose latent it does not know how to sum out, a missing grid, or a
            latent of more than 3 dimensions.
    """
    layers = _unfold(flow.transforms)
    integrals = sum(isinstance(t, VAE) or _is_augment(t) for t in layers)
    chosen = [grids] * integrals if isinstance(grids, Grid) else list(grids)
    with check_values(False):
        rules = _Rules(list(chosen), cell_nodes)
        log_prob = _compile(layers, flow.base, rules)(x)
        difference = torch.zeros_like(log_prob)
        if integrals or any(isinstance(t, Dequantization) for t in layers):
            rougher = _Rules([g.coarser() for g in chosen], max(2, 2 * cell_nodes // 3))
            difference = _compile(layers, flow.base, rougher)(x) - log_prob
    return Marginal(log_prob, difference, ", ".join(rules.done) or "autograd Jacobian")


def _unfold(transform: Transform) -> list[Transform]:
    """The layers of nested sequences, data side first."""
    if isinstance(transform, Sequential):
        return [layer for part in transform for layer in _unfold(part)]
    if isinstance(transform, Inverse):
        inner = transform.transform
        if isinstance(inner, Inverse):
            return _unfold(inner.transform)
        if isinstance(inner, Sequential):
            return [layer for part in reversed(list(inner)) for layer in _unfold(Inverse(part))]
    return [transform]


def _is_augment(layer: Transform) -> bool:
    return isinstance(layer, Inverse) and isinstance(layer.transform, Slice)


def _compile(layers: Sequence[Transform], base: Distribution, rules: _Rules) -> Tail:
    """log p of the data as a function, from the base towards the data.

    Grids are handed out data side first, so the layers take theirs before their tails are built.
    """
    makers = [_marginalise(layer, rules) for layer in layers]
    tail: Tail = base.log_prob
    for make in reversed(makers):
        tail = make(tail)
    return tail


def _in_chunks(function: Tail, rows: int, x: Tensor) -> Tensor:
    return torch.cat([function(part) for part in x.split(max(1, rows))])


@singledispatch
def _marginalise(layer: Transform, rules: _Rules) -> Callable[[Tail], Tail]:
    """A function that makes log p before the layer from log p behind it."""
    if isinstance(layer, Inverse):
        if _is_augment(layer):
            return _augmentation(layer, rules)
        if isinstance(layer.transform, AbsInference):
            return _signs(layer.transform, rules)
    if layer.stochastic_forward:
        raise ValueError(f"marginal_log_prob: does not know how to sum out {layer.label}")
    if layer.bijective:
        return lambda tail: _bijection(layer, tail)
    return lambda tail: lambda x: _through(layer, tail, x)


def _through(layer: Transform, tail: Tail, x: Tensor) -> Tensor:
    z, ldj = layer(x)
    return tail(z) + ldj


def _bijection(layer: Transform, tail: Tail) -> Tail:
    """The log-determinant from autograd's Jacobian for few rows, from the layer for many."""

    def log_prob(x: Tensor) -> Tensor:
        if len(x) > 4096 or x[0].numel() > 16:
            return _through(layer, tail, x)
        matrix = torch.func.vmap(torch.func.jacrev(lambda row: layer(row.unsqueeze(0))[0][0]))(x)
        size = x[0].numel()
        return tail(layer(x)[0]) + torch.linalg.slogdet(matrix.reshape(-1, size, size))[1]

    return log_prob


@_marginalise.register
def _(layer: VAE, rules: _Rules) -> Callable[[Tail], Tail]:
    grid = rules.next_grid(layer)
    rules.say(f"quadrature on {grid.points} points a latent dimension")

    def make(tail: Tail) -> Tail:
        cache: list[Tensor] = []

        def log_prob(x: Tensor) -> Tensor:
            nodes, log_volume = grid.nodes(layer.latent_shape, x)
            if not cache:
                cache.append(tail(nodes) + log_volume)
            pair = _pairwise(layer.decoder, nodes)
            rows = _CHUNK // len(nodes)
            return _in_chunks(lambda part: torch.logsumexp(pair(part) + cache[0], 1), rows, x)

        return log_prob

    return make


def _pairwise(decoder: Distribution, nodes: Tensor) -> Callable[[Tensor], Tensor]:
    """(B, *event) -> log p(x_b | z_j), (B, J); the decoder's net sees each node once."""
    if isinstance(decoder, DiagonalNormal):
        loc, log_scale = decoder.parameters_of(nodes)
        loc, log_scale = loc.flatten(1), log_scale.expand_as(loc).flatten(1)
        constant = -(log_scale + 0.5 * math.log(2 * math.pi)).sum(1)
        precision = torch.exp(-log_scale)

        def normal(x: Tensor) -> Tensor:
            total = constant.expand(len(x), -1).clone()
            for d, column in enumerate(x.flatten(1).unbind(1)):  # over dimensions of the data
                total -= 0.5 * ((column.unsqueeze(1) - loc[:, d]) * precision[:, d]).square()
            return total

        return normal

    def general(x: Tensor) -> Tensor:
        count = len(nodes)
        rows = x.repeat_interleave(count, 0)
        return decoder.log_prob(rows, nodes.repeat(len(x), *[1] * (nodes.dim() - 1))).view(
            -1, count
        )

    return general


def _augmentation(layer: Inverse, rules: _Rules) -> Callable[[Tail], Tail]:
    grid = rules.next_grid(layer)
    rules.say(f"quadrature on {grid.points} points an added dimension")
    shape, dim = layer.transform.decoder.event_shape, layer.transform.dim

    def make(tail: Tail) -> Tail:
        def log_prob(x: Tensor) -> Tensor:
            nodes, log_volume = grid.nodes(shape, x)
            count = len(nodes)

            def rows(part: Tensor) -> Tensor:
                added = nodes.repeat(len(part), *[1] * (nodes.dim() - 1))
                joint = torch.cat([part.repeat_interleave(count, 0), added], dim=dim)
                return torch.logsumexp(tail(joint).view(-1, count), 1) + log_volume

            return _in_chunks(rows, (_CHUNK >> 5) // count, x)

        return log_prob

    return make


def _signs(layer: AbsInference, rules: _Rules) -> Callable[[Tail], Tail]:
    """x = |z|: every combination of signs of the folded coordinates."""
    rules.say("enumeration of signs")
    shape = layer.event_shape
    per_channel = math.prod(shape[1:])
    folded = len(layer.element) * per_channel

    def make(tail: Tail) -> Tail:
        def log_prob(x: Tensor) -> Tensor:
            parts = []
            for pattern in range(1 << folded):
                bits = [1.0 - 2.0 * (pattern >> i & 1) for i in range(folded)]
                signs = torch.ones(shape, dtype=x.dtype, device=x.device)
                signs[list(layer.element)] = x.new_tensor(bits).view(-1, *shape[1:])
                parts.append(tail(x * signs))
            return torch.logsumexp(torch.stack(parts), 0)

        return log_prob

    return make


@_marginalise.register
def _(layer: DiscretelyIndexed, rules: _Rules) -> Callable[[Tail], Tail]:
    rules.say(f"enumeration of {len(layer.transforms)} components")

    def make(tail: Tail) -> Tail:
        def log_prob(x: Tensor) -> Tensor:
            parts = []
            for k, (z, ldj) in enumerate(t(x) for t in layer.transforms):
                index = torch.full((len(x), 1), k, device=x.device)
                gate = layer.gate.log_prob(index, z if layer.gate.conditional else None)
                parts.append(tail(z) + ldj + gate)
            return torch.logsumexp(torch.stack(parts), 0)

        return log_prob

    return make


@_marginalise.register
def _(layer: IntervalFold, rules: _Rules) -> Callable[[Tail], Tail]:
    rules.say(f"enumeration of {layer.num_intervals} intervals")

    def make(tail: Tail) -> Tail:
        def log_prob(x: Tensor) -> Tensor:
            left, width = layer.edges()
            value, parts = x[:, layer.element], []
            for k in range(layer.num_intervals):
                place = (value - left[k]) / width[k]
                here = (place >= 0) & ((place < 1) | (k == layer.num_intervals - 1))
                z = x.clone()
                z[:, layer.element] = (1 - place if layer.turned[k] else place).clamp(0, 1)
                part = tail(z) + layer.log_gate(z, None)[:, k] - width[k].log()
                parts.append(torch.where(here, part, -torch.inf))
            return torch.logsumexp(torch.stack(parts), 0)

        return log_prob

    return make


@_marginalise.register
def _(layer: Dequantization, rules: _Rules) -> Callable[[Tail], Tail]:
    rules.say(f"Gauss-Legendre with {rules.cell_nodes} nodes a dimension of the cell")
    count, levels = rules.cell_nodes, layer.transform.num_levels
    scale = levels if layer.transform.scale else 1

    def make(tail: Tail) -> Tail:
        def log_prob(x: Tensor) -> Tensor:
            nodes, weights = _gauss_legendre(count, x.device)
            dims = x[0].numel()
            offsets = torch.cartesian_prod(*[nodes] * dims).view(-1, dims)
            log_weight = sum(torch.meshgrid(*[weights.log()] * dims, indexing="ij")).flatten()
            z = (x.flatten(1).unsqueeze(1) + offsets) / scale
            z = z.reshape(-1, *x.shape[1:])
            values = tail(z).view(len(x), -1) + log_weight
            return torch.logsumexp(values, 1) - dims * math.log(scale)

        return log_prob

    return make


def _gauss_legendre(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the rule on [0, 1]."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(count)
    make = {"dtype": torch.float64, "device": device}
    return torch.as_tensor((nodes + 1) / 2, **make), torch.as_tensor(weights / 2, **make)
