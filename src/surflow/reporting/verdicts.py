"""The verdict on a number, and why a record is not in its cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surflow.record import Record, protocol_value
from surflow.reporting.spec import ColumnSpec, RowSpec
from surflow.reporting.statistics import Interval, of_one_more, paired_difference
from surflow.reporting.table import Cell
from surflow.reporting.text import describe

_SLACK = 1e-9  # float noise allowed at the edge of an interval, in the unit of the metric

FEWEST = 5
"""Seeds that a verdict on a training needs."""


def verdict_of(cell: Cell, profile: str, wanted: int, matters: Sequence[str] = ()) -> str:
    """The verdict on a cell that has a number, from some of the `wanted` seeds.

    Args:
        matters: settings of the cell that differ from the published ones and decide the number.
    """
    released = "released weights: " if any(record.weights for record in cell.records) else ""
    if profile != "paper":
        return f"{released}not a reproduction (profile {profile})"
    done = len(cell.records)
    seeds = "" if done == wanted else f"{done} of {wanted} seeds: "
    if cell.published is None:
        return seeds + released + _target(cell)
    if matters:
        return f"{seeds}{released}not comparable: {', '.join(matters)}"
    return seeds + released + _comparison(cell, bool(released))


def _comparison(cell: Cell, released: bool) -> str:
    """The published number against the interval for one more run of ours.

    Released weights have no spread of trainings: their interval is two standard errors wide.
    """
    column = cell.column
    worse = column.worse_by(cell.ours, cell.published)
    gap = f"{'worse' if worse > 0 else 'better'} by {abs(worse):.{column.digits}f}"
    values = [metric.value for metric in cell.metrics]
    if released:
        error = 2 * max(metric.standard_error or 0.0 for metric in cell.metrics)
        interval = Interval(cell.ours, cell.ours - error, cell.ours + error, len(values))
    elif len(values) < FEWEST:
        return f"too few seeds ({len(values)}): {gap}"
    else:
        interval = of_one_more(values)
    rounding = 0.5 * 10.0**-column.published_digits + _SLACK
    if interval.low - rounding <= cell.published <= interval.high + rounding:
        return "reproduced"
    what = "within two standard errors" if released else "one more run"
    return f"differs: {gap} ({what}: {interval.text(column.digits)})"


def _target(cell: Cell) -> str:
    """The excess over the entropy of the test draw, where a row has a target for it: the target
    against the interval for one more run."""
    target, excess = cell.row.target_excess, cell.excess
    if target is None:
        return "published value not available"
    if len(excess.records) < len(cell.records):
        return f"no {excess.column.metric} in {len(cell.records) - len(excess.records)} record(s)"
    shown = f"excess over the entropy of the test draw {excess.ours:.{excess.digits}f}"
    if len(excess.records) < FEWEST:
        return f"too few seeds ({len(excess.records)}): {shown}, target {target:g}"
    interval = of_one_more([metric.value for metric in excess.metrics])
    word = "within" if interval.high <= target else "above"
    word = "not decided" if interval.low <= target < interval.high else word
    return f"{shown} (one more run: {interval.text(excess.digits)}), target {target:g}: {word}"


def ordering_verdict(better: Cell, worse: Cell) -> str:
    """Whether one row beats another in a column: the difference, paired by seed.

    Returns:
        "holds" or "fails" where the interval leaves zero out, else "not decided", with the numbers.
    """
    column = better.column
    interval = paired_difference(better.values, worse.values)
    if interval is None:
        return "not checked"
    shown = f"{interval.mean:+.{column.digits}f}"
    if interval.count < 2:
        return f"not decided ({shown}, one seed)"
    low, high = sorted(column.worse_by(end, 0.0) for end in (interval.low, interval.high))
    word = "holds" if high < 0 else "fails" if low > 0 else "not decided"
    return f"{word} ({shown}, {interval.text(column.digits, sign=True)}, {interval.count} seeds)"


@dataclass(frozen=True, order=True)
class Refusal:
    """Why a record is not in its cell; the lowest `rank` is the most telling reason."""

    rank: int
    seed: int
    reason: str
    missing: bool = False

    @property
    def verdict(self) -> str:
        return f"{'missing' if self.missing else 'refused'}: {self.reason}"


def refusal_of(
    row: RowSpec,
    column: ColumnSpec,
    record: Record,
    wanted: str | None,
    protocol: Mapping[str, Any],
    profile: str,
) -> Refusal | None:
    """Why a record may not enter its cell; None if it is good."""
    seed = record.seed
    if record.profile != profile:
        return Refusal(4, seed, f"profile {record.profile}, not {profile}")
    if record.status != "complete":
        return Refusal(0, seed, f"run {record.status}, not complete")
    if record.experiment != row.experiment:
        return Refusal(2, seed, f"experiment {record.experiment}, not {row.experiment}")
    if wanted is None:
        return Refusal(3, seed, "no configuration known for this cell")
    if record.config_hash != wanted:
        return Refusal(2, seed, f"stale config {record.config_hash}, now {wanted}")
    name = column.metric
    if name not in record.metrics:
        if name in record.missing:
            return Refusal(-1, seed, record.missing[name], missing=True)
        return Refusal(1, seed, f"record has no {name}")
    metric = record.metrics[name]
    if column.unit not in (None, metric.unit):
        return Refusal(1, seed, f"{name} in {metric.unit}, not {column.unit}")
    if metric.kind == "score":
        for key, value in protocol.items():
            found = protocol_value(metric.protocol, key)
            if found != value:
                return Refusal(1, seed, f"{name} with {key} {describe(found)}, now {value}")
    return None
