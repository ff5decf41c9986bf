"""The verdict on a number, and why a record is not in its cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surflow.record import Record, protocol_value
from surflow.reporting.spec import ColumnSpec, RowSpec
from surflow.reporting.table import Cell
from surflow.reporting.text import describe

_SLACK = 1e-9  # float noise allowed at the edge of a tolerance, in the unit of the metric


def verdict_of(cell: Cell, profile: str, wanted: int) -> str:
    """The verdict on a cell that has a number, from some of the `wanted` seeds."""
    released = "released weights: " if any(record.weights for record in cell.records) else ""
    if profile != "paper":
        return f"{released}not a reproduction (profile {profile})"
    done = len(cell.records)
    seeds = "" if done == wanted else f"{done} of {wanted} seeds: "
    return seeds + released + _comparison(cell)


def _comparison(cell: Cell) -> str:
    """Our number against the published one, or, where a row has a target, against the floor."""
    column, target = cell.column, cell.row.target_above_floor
    if cell.published is not None:
        worse = column.worse_by(cell.ours, cell.published)
        if worse > column.tolerance + _SLACK:
            return f"worse by {worse:.{column.digits}f}"
        same = worse >= -column.tolerance - _SLACK
        return "reproduced" if same else f"reproduced, better by {-worse:.{column.digits}f}"
    if target is None:
        return "published value not available"
    if cell.floor is None:
        return "floor not available"
    above = cell.ours - cell.floor
    if above <= target + _SLACK:
        return f"within {target:.{column.digits}f} of the floor"
    return f"{above:.{column.digits}f} above the floor, target {target:.{column.digits}f}"


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
