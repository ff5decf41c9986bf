"""The likelihood of a trained model, and how far its bounds lie below."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from surflow.draws import evaluating
from surflow.evaluation.likelihood import standard_error
from surflow.evaluation.marginal import Grid, Marginal, marginal_log_prob
from surflow.evaluation.trained import Trained
from surflow.flow import Flow
from surflow.metric import Metric
from surflow.objectives import iwbo
from surflow.progress import Progress, shown_progress, silent

ROWS = 1 << 17
"""Rows times draws at a time: fixed, so that the draws do not depend on the machine."""


@dataclass(frozen=True)
class Gap:
    """How far a bound lies below the likelihood, on the same points, in nats.

    `bound` is the mean of the IWBO with K = `num_samples`, `mean` that of log p(x) - bound;
    `bound_error` and `standard_error` are their standard errors over the points.
    """

    num_samples: int
    bound: float
    bound_error: float | None
    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Comparison:
    """Bounds against the truth.

    Attributes:
        log_prob: mean of log p(x) over `count` points, nats, with its `standard_error`.
        method: how log p(x) was obtained.
        error: numerical error of log p(x): greatest difference from a coarser rule, nats.
        mean_error: the same of the mean.
        exact: whether the flow gives a likelihood rather than a bound.
        worst: where exact, the greatest |log_prob of the flow - truth|, nats; else None.
        gaps: one for each K; empty where exact.
    """

    log_prob: float
    standard_error: float | None
    count: int
    method: str
    error: float
    mean_error: float
    exact: bool
    worst: float | None
    gaps: tuple[Gap, ...]

    def metrics(self, split: str = "test") -> dict[str, Metric]:
        """The truth and the IWBO of every K, negated: lower is better."""
        words, error = f"log p(x) by {self.method}", self.standard_error
        found = [("true_nll", self.log_prob, "likelihood", words, error)]
        for gap in self.gaps:
            words = f"IWBO, K = {gap.num_samples}"
            found.append((f"iwbo{gap.num_samples}", gap.bound, "bound", words, gap.bound_error))
        return {
            f"{split}/{name}_nats": Metric(
                name=f"{split}/{name}_nats",
                value=-value,
                unit="nats",
                kind=kind,
                estimator=f"{words}, mean over {self.count} {split} points",
                standard_error=error,
                count=self.count,
            )
            for name, value, kind, words, error in found
        }


class Truth:
    """The measure of a model's likelihood, and of the gaps of its bounds.

    Args:
        grids: [half-width, points a dimension] for each layer whose latent is integrated, data side
            first, or a single one for all; see :class:`surflow.evaluation.marginal.Grid`.
        cell_nodes: nodes a dimension in the cell of a dequantization.
        closed_form: (flow, x) -> log p(x), where there is one.
        num_samples: the K of the IWBOs.

    Raises ValueError for a K that is not positive, or a grid that is no pair.
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

    def __call__(self, trained: Trained) -> list[Metric]:
        """The metrics of :meth:`compare`, whose details go into the record as ``truth``."""
        with shown_progress("estimates") as progress:
            found = self.compare(trained.flow, trained.rows, trained.seed, progress)
        trained.details["truth"] = asdict(found)
        return list(found.metrics(trained.split).values())

    @torch.no_grad()
    def marginal(self, flow: Flow, x: Tensor) -> Marginal:
        """log p(x) of every row."""
        if self.closed_form is not None:
            return Marginal(self.closed_form(flow, x), torch.zeros(len(x)), "closed form")
        grids = self.grids[0] if len(self.grids) == 1 else self.grids
        return marginal_log_prob(flow, x, grids, self.cell_nodes)

    @torch.no_grad()
    def compare(
        self, flow: Flow, data: Tensor, seed: int = 0, progress: Progress = silent
    ) -> Comparison:
        """Bounds and truth of every row of ``data``, (N, *event), in float64, on the CPU.

        The flow is left as it is; ``progress`` is told how many of the estimates are done.
        """
        flow = copy.deepcopy(flow).cpu().double().eval()
        x = data.cpu().double() if data.is_floating_point() else data.cpu()
        wanted = self.num_samples if flow.lower_bound else []
        progress("likelihood", 0, 1 + len(wanted))
        truth = self.marginal(flow, x)
        gaps = []
        with evaluating(flow, seed):
            for k in wanted:
                progress("likelihood", 1 + len(gaps), 1 + len(wanted))
                rows = max(1, ROWS // k)
                bound = torch.cat([iwbo(flow, part, num_samples=k) for part in x.split(rows)])
                gap = truth.log_prob - bound
                means = (bound.mean().item(), standard_error(bound), gap.mean().item())
                gaps.append(Gap(k, *means, standard_error(gap)))
        worst = None
        if not flow.lower_bound:
            worst = (flow.log_prob(x) - truth.log_prob).abs().max().item()
        progress("likelihood", 1 + len(wanted), 1 + len(wanted))
        return Comparison(
            log_prob=truth.log_prob.mean().item(),
            standard_error=standard_error(truth.log_prob),
            count=len(x),
            method=truth.method,
            error=truth.difference.abs().max().item(),
            mean_error=abs(truth.difference.mean().item()),
            exact=not flow.lower_bound,
            worst=worst,
            gaps=tuple(gaps),
        )
