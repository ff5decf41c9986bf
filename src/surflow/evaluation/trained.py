"""A trained model, and the measures that give its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surflow.data.module import TensorDataModule
from surflow.draws import device_of, evaluating
from surflow.errors import UserError
from surflow.flow import Flow, Ledger
from surflow.metric import Metric


@dataclass
class Trained:
    """A trained model and what its measures depend on.

    Attributes:
        flow: on the device to compute on.
        data: the DataModule, set up.
        split: which split is scored: train, valid or test.
        unit: of likelihoods and bounds: nats or bpd.
        eval_samples: draws a point averaged in the ELBO.
        iwbo_samples: K of the IWBO; 0 for none.
        folder: of the run: pictures, and what an interrupted measure resumes from.
        cache: a folder that several runs share.
        ledger: the likelihood layer by layer; set by the measure ``likelihood``.
        scores: of every row, (N,), by the name of the metric; set by the measure ``likelihood``.
        details: further fields of the record, by name.
        missing: why a metric could not be computed, by its name.
    """

    flow: Flow
    data: TensorDataModule
    split: str
    seed: int
    unit: str
    eval_samples: int
    iwbo_samples: int
    folder: Path
    cache: Path
    ledger: Ledger | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> Tensor:
        """The rows of the split, (N, *event)."""
        return self.data.splits[self.split]

    def on_device(self, rows: Tensor) -> Tensor:
        """Rows on the flow's device; reals in the type of its parameters."""
        rows = rows.to(device_of(self.flow))
        weight = next(self.flow.parameters(), None)
        return rows if weight is None or not rows.is_floating_point() else rows.to(weight.dtype)


Measure = Callable[[Trained], Metric | Iterable[Metric]]


def evenly_spaced(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    count = min(most, len(rows))
    return rows[torch.arange(count) * len(rows) // max(count, 1)]


def run_measures(trained: Trained, measures: Mapping[str, Measure]) -> dict[str, Metric]:
    """Call the measures in order; the flow is in evaluation mode, without gradients.

    The random numbers of a measure follow from ``trained.seed``; the random state of the caller
    is restored. Returns the metrics by their names.

    Raises UserError for a value that is not finite, two metrics of one name, or what is no Metric.
    """
    found: dict[str, Metric] = {}
    for key, measure in measures.items():
        with evaluating(trained.flow, trained.seed):
            given = measure(trained)
            given = [given] if isinstance(given, Metric) else list(given)
        for metric in given:
            if not isinstance(metric, Metric):
                raise UserError(f"measures.{key}: expected Metrics, got {type(metric).__name__}")
            if metric.name in found:
                raise UserError(f"measures.{key}: another measure gives {metric.name} too")
            check_finite(metric)
            found[metric.name] = metric
    return found


def check_finite(metric: Metric) -> None:
    """Raise UserError for a value that is not finite: no record can hold it."""
    advice = (
        ": the weights give some points no likelihood; try objective.scored=best, a smaller "
        "optimizer.lr or trainer.gradient_clip_val"
    )
    if not math.isfinite(metric.value):
        advice = "" if metric.kind == "score" else advice
        raise UserError(f"{metric.name}: not finite ({metric.value}){advice}")
