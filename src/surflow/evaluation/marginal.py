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
decay converges faster than any power of the step, and Gauss-Legendre's in a dequantization's cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surflow.checks import check_values
from surflow.flow import Flow
from surflow.transforms import Inverse, Transform
from surflow.transforms.base import Tail

__all__ = ["Grid", "Marginal", "Rule", "marginal_log_prob"]

_CHUNK = 1 << 23  # most elements of one table of pairs: 64 MiB in float64


@dataclass(frozen=True)
class Grid:
    """Where a layer's latent is integrated: the cube [-half_width, half_width]^d, `points` a
    dimension."""

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
    """log p(x) of every row, (B,), nats, and the method in words.

    `difference` is what a coarser rule gives more, (B,), nats; 0 where nothing is integrated.
    """

    log_prob: Tensor
    difference: Tensor
    method: str


class _Rules:
    """The grids not used yet, data side first, and what has been done, in words."""

    def __init__(self, grids: Grid | Sequence[Grid], cell_nodes: int) -> None:
        self.grids = grids if isinstance(grids, Grid) else list(grids)
        self.cell_nodes = cell_nodes
        self.done: list[str] = []
        self.integrated = False

    def next_grid(self, label: str) -> Grid:
        if isinstance(self.grids, Grid):
            return self.grids
        if not self.grids:
            raise ValueError(f"marginal_log_prob: no grid left for {label}: give one more")
        return self.grids.pop(0)


class Rule:
    """How one layer sums out what it draws. What it needs again is found once."""

    def __init__(self, layer: Transform, rules: _Rules) -> None:
        self._label = layer.label
        self._rules = rules
        self._nodes: tuple[Tensor, Tensor | float] | None = None
        self._held: Tensor | None = None

    def say(self, what: str) -> None:
        """Note what is done, for the method of the :class:`Marginal`."""
        if what not in self._rules.done:
            self._rules.done.append(what)

    def line(self, shape: tuple[int, ...], like: Tensor, which: str) -> tuple[Tensor, float]:
        """The nodes of the layer's grid, (J, *shape), and the log of the volume of each.

        `which` dimension it is, in words: "a latent" or "an added". Raises ValueError for a missing
        grid, or more than 3 dimensions.
        """
        if self._nodes is None:
            grid = self._rules.next_grid(self._label)
            self.say(f"quadrature on {grid.points} points {which} dimension")
            self._rules.integrated = True
            self._nodes = grid.nodes(shape, like)
        return self._nodes

    def cell(self, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Gauss-Legendre's nodes in the unit cell, (J, dims), and their log-weights, (J,)."""
        if self._nodes is None:
            count = self._rules.cell_nodes
            self.say(f"Gauss-Legendre with {count} nodes a dimension of the cell")
            self._rules.integrated = True
            nodes, weights = _gauss_legendre(count, device)
            log_weight = sum(torch.meshgrid(*[weights.log()] * dims, indexing="ij")).flatten()
            self._nodes = torch.cartesian_prod(*[nodes] * dims).view(-1, dims), log_weight
        return self._nodes

    def once(self, find: Callable[[], Tensor]) -> Tensor:
        """What ``find`` gives at the first call."""
        if self._held is None:
            self._held = find()
        return self._held

    def in_chunks(self, function: Tail, x: Tensor, numbers: int) -> Tensor:
        """``function`` of the rows of x, some at a time: for one it holds that many numbers."""
        return torch.cat([function(part) for part in x.split(max(1, _CHUNK // numbers))])


@torch.no_grad()
def marginal_log_prob(
    flow: Flow, x: Tensor, grids: Grid | Sequence[Grid] = (), cell_nodes: int = 10
) -> Marginal:
    """log p(x) by enumeration and quadrature.

    Args:
        flow: the model, of low dimension. A layer that draws in inference must know how to sum out
            its draw (:meth:`~surflow.transforms.Transform.summed`).
        x: data, (B, *event); use float64.
        grids: one for each layer that integrates over a continuous latent, data side first; a
            single one serves all.
        cell_nodes: nodes a dimension in a dequantization's cell.

    Raises:
        ValueError: for a layer that does not know how to sum out its draw, a missing grid, or a
            latent of more than 3 dimensions.
    """
    layers = [Inverse(t) if turned else t for t, turned in flow.transforms.unfold()]

    def evaluate(rules: _Rules) -> Tensor:
        tail: Tail = flow.base.log_prob
        for layer in reversed(layers):
            tail = _before(layer, tail, Rule(layer, rules))
        return tail(x)

    with check_values(False):
        rules = _Rules(grids, cell_nodes)
        log_prob = evaluate(rules)
        difference = torch.zeros_like(log_prob)
        if rules.integrated:
            fewer = grids.coarser() if isinstance(grids, Grid) else [g.coarser() for g in grids]
            difference = evaluate(_Rules(fewer, max(2, 2 * cell_nodes // 3))) - log_prob
    return Marginal(log_prob, difference, ", ".join(rules.done) or "autograd Jacobian")


def _before(layer: Transform, tail: Tail, rule: Rule) -> Tail:
    """log p of what goes into a layer. For few rows of a bijection the log-determinant is that of
    autograd's Jacobian, for many the layer's."""

    def log_prob(x: Tensor) -> Tensor:
        size = x[0].numel()
        if not layer.bijective or len(x) > 4096 or size > 16:
            return layer.summed(x, tail, rule)
        matrix = torch.func.vmap(torch.func.jacrev(lambda row: layer(row.unsqueeze(0))[0][0]))(x)
        return tail(layer(x)[0]) + torch.linalg.slogdet(matrix.reshape(-1, size, size))[1]

    return log_prob


def _gauss_legendre(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the rule on [0, 1]."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(count)
    make = {"dtype": torch.float64, "device": device}
    return torch.as_tensor((nodes + 1) / 2, **make), torch.as_tensor(weights / 2, **make)
