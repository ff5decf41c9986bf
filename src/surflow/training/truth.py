"""A trained model's bounds beside its likelihood itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from surflow.evaluation.marginal import Grid, Marginal, marginal_log_prob
from surflow.flow import Flow
from surflow.objectives import iwbo
from surflow.training.evaluation import Estimate

ROWS = 1 << 17
"""Rows times draws at a time: fixed, so that the draws do not depend on the machine."""


@dataclass(frozen=True)
class Gap:
    """How far a bound lies below the likelihood, on the same points.

    Attributes:
        num_samples: K of the IWBO.
        bound: mean of the bound over the points, nats.
        bound_error: its standard error over the points.
        mean: mean of log p(x) - bound, nats.
        standard_error: of that mean: both are of the same points, so it is the difference's own.
    """

    num_samples: int
    bound: float
    bound_error: float
    mean: float
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """Bounds against the truth.

    Attributes:
        log_prob: mean of log p(x), nats.
        standard_error: of that mean over the points.
        count: the number of points.
        method: how log p(x) was obtained.
        error: numerical error of log p(x): greatest difference from a coarser rule, nats.
        mean_error: the same of the mean.
        exact: whether the flow gives a likelihood rather than a bound.
        worst: where exact, the greatest |log_prob of the flow - truth|, nats; else None.
        gaps: one for each K; empty where exact.
    """

    log_prob: float
    standard_error: float
    count: int
    method: str
    error: float
    mean_error: float
    exact: bool
    worst: float | None
    gaps: tuple[Gap, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def metrics(self, split: str = "test") -> dict[str, Estimate]:
        """The truth and the IWBO of every K, negated: lower is better."""
        found = {
            f"{split}/true_nll_nats": Estimate(
                -self.log_prob,
                "nats",
                "likelihood",
                f"log p(x) by {self.method}, mean over {self.count} {split} points",
                self.standard_error,
                self.count,
            )
        }
        for gap in self.gaps:
            found[f"{split}/iwbo{gap.num_samples}_nats"] = Estimate(
                -gap.bound,
                "nats",
                "bound",
                f"IWBO, K = {gap.num_samples}, mean over {self.count} {split} points",
                gap.bound_error,
                self.count,
            )
        return found


class Truth:
    """How the likelihood of a model is to be computed, and which bounds stand beside it.

    Args:
        grids: [half-width, points a dimension] for each layer whose latent is integrated, data side
            first, or a single one for all; see :class:`surflow.evaluation.marginal.Grid`.
        cell_nodes: nodes a dimension in the cell of a dequantization.
        closed_form: (flow, x) -> log p(x), where there is one.
        num_samples: the K of the IWBOs.

    Raises:
        ValueError: for a K that is not positive, or a grid that is no pair.
    """

    def __init__(
        self,
        grids: Sequence[Sequence[float]] = (),
        cell_nodes: int = 20,
        closed_form: Callable[[Flow, Tensor], Tensor] | None = None,
        num_samples: Sequence[int] = (1, 10, 100, 1000),
    ) -> None:
        if not num_samples or min(num_samples) < 1:
            raise ValueError(f"truth.num_samples: expected numbers >= 1, got {list(num_samples)}")
        if any(len(g) != 2 for g in grids):
            raise ValueError(f"truth.grids: expected pairs [half-width, points], got {list(grids)}")
        self.grids = [Grid(float(h), int(n)) for h, n in grids]
        self.cell_nodes = cell_nodes
        self.closed_form = closed_form
        self.num_samples = sorted(num_samples)

    @torch.no_grad()
    def marginal(self, flow: Flow, x: Tensor) -> Marginal:
        """log p(x) of every row."""
        if self.closed_form is not None:
            return Marginal(self.closed_form(flow, x), torch.zeros(len(x)), "closed form")
        grids = self.grids[0] if len(self.grids) == 1 else self.grids
        return marginal_log_prob(flow, x, grids, self.cell_nodes)

    @torch.no_grad()
    def compare(
        self,
        flow: Flow,
        data: Tensor,
        seed: int = 0,
        progress: Callable[[str], None] = lambda what: None,
    ) -> Comparison:
        """Bounds and truth of every row of ``data``, in float64, on the CPU.

        Args:
            flow: the model; left as it is.
            data: (N, *event).
            seed: of the draws.
            progress: told what is being computed.
        """
        flow = copy.deepcopy(flow).cpu().double().eval()
        x = data.cpu().double() if data.is_floating_point() else data.cpu()
        progress("likelihood")
        truth = self.marginal(flow, x)
        count = len(x)

        def error(values: Tensor) -> float:
            return (values.std() / count**0.5).item() if count > 1 else math.nan

        gaps = []
        worst = None
        if flow.lower_bound:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for k in self.num_samples:
                    progress(f"IWBO, K = {k}")
                    rows = max(1, ROWS // k)
                    bound = torch.cat([iwbo(flow, part, num_samples=k) for part in x.split(rows)])
                    gap = truth.log_prob - bound
                    gaps.append(
                        Gap(k, bound.mean().item(), error(bound), gap.mean().item(), error(gap))
                    )
        else:
            worst = (flow.log_prob(x) - truth.log_prob).abs().max().item()
        return Comparison(
            log_prob=truth.log_prob.mean().item(),
            standard_error=error(truth.log_prob),
            count=count,
            method=truth.method,
            error=truth.difference.abs().max().item(),
            mean_error=abs(truth.difference.mean().item()),
            exact=not flow.lower_bound,
            worst=worst,
            gaps=tuple(gaps),
        )
