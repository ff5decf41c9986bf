"""Evaluation: over every point, in batches whose size changes no result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surflow.flow import Flow, Ledger
from surflow.objectives import elbo, iwbo

STOCHASTIC_BLOCK = 256
"""Rows at a time where layers draw: fixed, so that the draws do not depend on the batch."""


@dataclass(frozen=True)
class Estimate:
    """A mean over data points.

    Attributes:
        value: the mean, negated log-likelihood or bound: lower is better.
        unit: nats or bpd.
        kind: "likelihood" or "bound".
        estimator: how it was obtained.
        standard_error: of the mean over data points.
        count: the number of points.
    """

    value: float
    unit: str
    kind: str
    estimator: str
    standard_error: float
    count: int


@torch.no_grad()
def evaluate(
    flow: Flow,
    data: Tensor,
    batch_size: int,
    seed: int = 0,
    eval_samples: int = 1,
    iwbo_samples: int = 0,
    unit: str = "nats",
    split: str = "test",
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Estimate], Ledger]:
    """Score every row of ``data``.

    A flow with stochastic layers is scored in blocks of a fixed size, so that what is drawn, and
    with it the result, depends on the seed and not on ``batch_size``.

    Args:
        flow: the model; evaluated in evaluation mode.
        data: (N, *event), on the flow's device.
        batch_size: rows at a time.
        seed: of the draws.
        eval_samples: S, draws averaged in the ELBO.
        iwbo_samples: K of an IWBO beside it; 0 for none.
        unit: nats or bpd.
        split: which split these rows are, for the names.
        progress: told the number of rows done.

    Returns:
        metrics by name (``test/nll_nats`` or ``test/elbo_nats``, ``test/iwbo_nats``), and the
        ledger over all rows.
    """
    flow.eval()
    num_dims = math.prod(data.shape[1:])
    scale = 1.0 if unit == "nats" else 1.0 / (num_dims * math.log(2.0))
    wanted: dict[str, Callable[[Tensor], Tensor]] = {}
    if not flow.lower_bound:
        wanted["nll"] = flow.log_prob
    else:
        wanted["elbo"] = lambda x: elbo(flow, x, num_samples=eval_samples)
        if iwbo_samples:
            wanted["iwbo"] = lambda x: iwbo(flow, x, num_samples=iwbo_samples)
    dtype = next(flow.parameters(), data).dtype
    block = STOCHASTIC_BLOCK if flow.lower_bound else batch_size
    values: dict[str, list[Tensor]] = {name: [] for name in wanted}
    ledgers = []
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    for start in range(0, len(data), block):
        x = data[start : start + block]
        x = x.to(dtype) if x.is_floating_point() else x
        for name, function in wanted.items():
            values[name].append(function(x).double())
        ledgers.append(flow.ledger(x))
        progress(start + len(x))
    torch.random.set_rng_state(generator_state)
    words = {
        "nll": (
            "likelihood",
            "unbiased estimate of the log-likelihood" if flow.estimated else "exact log-likelihood",
        ),
        "elbo": ("bound", f"ELBO, {eval_samples} sample(s) a point"),
        "iwbo": ("bound", f"IWBO, K = {iwbo_samples}"),
    }
    estimates = {}
    for name, parts in values.items():
        rows = -torch.cat(parts) * scale
        kind, how = words[name]
        estimates[f"{split}/{name}_{unit}"] = Estimate(
            value=rows.mean().item(),
            unit=unit,
            kind=kind,
            estimator=f"{how}, mean over {len(rows)} {split} points",
            standard_error=(rows.std() / len(rows) ** 0.5).item() if len(rows) > 1 else math.nan,
            count=len(rows),
        )
    return estimates, Ledger.merge(ledgers)


@torch.no_grad()
def density_grid(
    flow: Flow,
    low: float,
    high: float,
    size: int,
    box: tuple[Sequence[float], Sequence[float]] | None = None,
    lower_bound_samples: int = 64,
) -> Tensor:
    """exp(log p) at the cell centres of a square grid, (size, size), index [i, j] = (x_i, y_j).

    Args:
        flow: a model of 2-D data.
        low, high: the square's edges.
        size: cells a side.
        box: lower and upper edges of the model's support; the density is 0 outside.
        lower_bound_samples: K of the IWBO where the flow is a bound.
    """
    flow.eval()
    step = (high - low) / size
    centres = low + step * (torch.arange(size) + 0.5)
    # a fifth of a cell off, so that no point lies on a diagonal, the edge of a folded model
    x = torch.cartesian_prod(centres + 0.2 * step, centres).to(next(flow.parameters(), centres))
    inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if box is not None:
        edges = x.new_tensor(box[0]), x.new_tensor(box[1])
        inside = ((x > edges[0]) & (x < edges[1])).all(1)
    parts = [iwbo(flow, p, num_samples=lower_bound_samples) for p in x[inside].split(4096)]
    density = x.new_zeros(len(x))
    density[inside] = torch.cat(parts).exp()
    return density.reshape(size, size).cpu()


@torch.no_grad()
def mass_table(flow: Flow, num_levels: int, lower_bound_samples: int = 64) -> Tensor:
    """exp(log P) of every pair of integers 0 ... K - 1, (K, K), index [x_0, x_1].

    Args:
        flow: a model of pairs of integers.
        num_levels: K.
        lower_bound_samples: draws of the IWBO where the flow is a bound.
    """
    flow.eval()
    device = next(flow.parameters(), torch.zeros(())).device
    levels = torch.arange(num_levels, device=device)
    pairs = torch.cartesian_prod(levels, levels)
    parts = [iwbo(flow, p, num_samples=lower_bound_samples) for p in pairs.split(4096)]
    return torch.cat(parts).exp().reshape(num_levels, num_levels).cpu()
