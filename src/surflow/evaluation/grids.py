"""Densities of a flow on a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surflow.draws import device_of
from surflow.flow import Flow
from surflow.objectives import iwbo

ROWS = 4096  # points at a time


def density_grid(
    flow: Flow,
    low: float,
    high: float,
    size: int,
    box: tuple[Sequence[float], Sequence[float]] | None = None,
    lower_bound_samples: int = 64,
) -> Tensor:
    """exp(log p) at the cell centres of the square [low, high]², (size, size), [i, j] = (x_i, y_j).

    ``box`` has the lower and upper edges of the model's support; the density is 0 outside. Of a
    flow with a bound it is the IWBO with K = ``lower_bound_samples``.
    """
    step = (high - low) / size
    centres = low + step * (torch.arange(size) + 0.5)
    # a fifth of a cell off, so that no point lies on a diagonal, the edge of a folded model
    x = torch.cartesian_prod(centres + 0.2 * step, centres).to(next(flow.parameters(), centres))
    low_edge, high_edge = (-math.inf, math.inf) if box is None else map(x.new_tensor, box)
    inside = ((x > low_edge) & (x < high_edge)).all(1)
    density = x.new_zeros(len(x))
    density[inside] = _densities(flow, x[inside], lower_bound_samples)
    return density.reshape(size, size).cpu()


def mass_table(flow: Flow, num_levels: int, lower_bound_samples: int = 64) -> Tensor:
    """exp(log P) of every pair of K integers, (K, K), [x_0, x_1]; see :func:`density_grid`."""
    levels = torch.arange(num_levels, device=device_of(flow))
    pairs = torch.cartesian_prod(levels, levels)
    return _densities(flow, pairs, lower_bound_samples).reshape(num_levels, num_levels).cpu()


@torch.no_grad()
def _densities(flow: Flow, x: Tensor, num_samples: int) -> Tensor:
    flow.eval()
    parts = [iwbo(flow, part, num_samples=num_samples) for part in x.split(ROWS)]
    return torch.cat(parts).exp()
