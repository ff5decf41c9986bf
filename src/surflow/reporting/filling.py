"""Records into the cells of a table.

A number enters a table only with the hash of the configuration that the table asks for today; what
is stale, incomplete or of another profile is refused, and its cell says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surflow.record import Record, RecordError
from surflow.reporting.spec import ColumnSpec, RowSpec, TableSpec
from surflow.reporting.table import (
    NO_SUCH_NUMBER,
    NOT_RUN,
    QUOTED_ONLY,
    Cell,
    Key,
    Table,
    column_floor,
    distinct,
    protocol_of,
)
from surflow.reporting.verdicts import Refusal, refusal_of, verdict_of


def _homes(
    spec: TableSpec, expected: Mapping[Key, str], record: Record | RecordError
) -> list[ColumnSpec]:
    """The columns that a record belongs in: those of its data, else, where rows have data of their
    own, those that ask for its hash."""
    named = [column for column in spec.columns if column.data == record.data]
    if named or isinstance(record, RecordError):
        return named
    key = {c.name: (record.row, c.name, record.seed) for c in spec.columns if not c.names_data}
    return [c for c in spec.columns if expected.get(key.get(c.name)) == record.config_hash]


class _Sorter:
    """Sorts records into cells: those that are good, and why the others are not."""

    def __init__(
        self,
        spec: TableSpec,
        expected: Mapping[Key, str],
        protocols: Mapping[Key, Mapping[str, Any]],
        profile: str,
        seeds: Sequence[int],
    ) -> None:
        self.spec, self.expected, self.protocols = spec, expected, protocols
        self.profile, self.seeds = profile, seeds
        self.rows = {row.name: row for row in spec.rows if row.experiment is not None}
        self.good: dict[Key, list[Record]] = {}
        self.bad: dict[Key, list[Refusal]] = {}
        self.problems: list[str] = []

    def add(self, item: Record | RecordError) -> None:
        named = item.artefact == self.spec.runs
        homes = []
        if named and item.row in self.rows and item.seed in self.seeds:
            homes = _homes(self.spec, self.expected, item)
        if isinstance(item, RecordError) and not homes and (named or item.artefact is None):
            self.problems.append(str(item))
        for column in homes:
            key = (item.row, column.name, item.seed)
            why = self._refusal(item, column, key)
            if why is None:
                self.good.setdefault(key, []).append(item)
            else:
                self.bad.setdefault(key, []).append(why)

    def _refusal(self, item: Record | RecordError, column: ColumnSpec, key: Key) -> Refusal | None:
        if isinstance(item, RecordError):
            other = item.profile not in (None, self.profile)
            return Refusal(4 if other else 0, item.seed, item.reason)
        wanted, protocol = self.expected.get(key), self.protocols.get(key, {})
        return refusal_of(self.rows[item.row], column, item, wanted, protocol, self.profile)

    def cell(self, row: RowSpec, column: ColumnSpec) -> tuple[list[Record], list[Refusal]]:
        """The records of a cell, one a seed, and the refusals of the seeds without one."""
        used: list[Record] = []
        refusals: list[Refusal] = []
        for seed in self.seeds:
            key = (row.name, column.name, seed)
            found = self.good.get(key, [])
            if len(found) == 1:
                used += found
            elif found:
                places = ", ".join(str(record.run_dir) for record in found)
                why = f"{len(found)} runs of one configuration ({places}); keep one"
                refusals.append(Refusal(0, seed, why))
            else:
                refusals += self.bad.get(key, [])
        return used, sorted(refusals)


def build_table(
    spec: TableSpec,
    records: Iterable[Record | RecordError],
    expected: Mapping[Key, str],
    profile: str,
    seeds: Sequence[int],
    protocols: Mapping[Key, Mapping[str, Any]] | None = None,
) -> Table:
    """Fill the table with the records that belong in it.

    A record belongs to a cell by artefact, row, seed and its data being the column's; where no
    column is of its data, by its hash. Records of other artefacts, rows or seeds are ignored.

    A cell asks for the config hash in `expected` and the part of a score's protocol in `protocols`.
    Raises ValueError where likelihoods and bounds would be averaged in one cell.
    """
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")
    sorter = _Sorter(spec, expected, protocols or {}, profile, seeds)
    for item in records:
        sorter.add(item)
    cells = {
        (row.name, column.name): _fill_cell(
            spec, row, column, *sorter.cell(row, column), profile, len(seeds)
        )
        for row in spec.rows
        for column in spec.columns
    }
    table = Table(spec, profile, seeds, cells, tuple(sorter.problems))
    return replace(table, warnings=tuple(cautions(table)))


def without_stale(
    records: Iterable[Record | RecordError], expected: Mapping[Key, str], released: bool
) -> list[Record | RecordError]:
    """The records that a table counts, as accepted or as refused.

    A record of another configuration is left out where the right one is there. `released` says
    whether the table is of released weights: they and trained ones are no versions of each other.
    """
    records = list(records)
    hashes = set(expected.values())

    def stale(item: Record | RecordError) -> bool:
        return isinstance(item, Record) and item.config_hash not in hashes

    current = {
        (item.row, item.data, item.seed)
        for item in records
        if isinstance(item, Record) and not stale(item) and item.status == "complete"
    }
    return [
        item
        for item in records
        if not stale(item)
        or ((item.row, item.data, item.seed) not in current and bool(item.weights) == released)
    ]


def cautions(table: Table) -> list[str]:
    """What a reader must know before comparing the cells with each other."""
    found = []
    if len(table.commits) > 1:
        found.append(f"Mixed commits: {', '.join(table.commits)}.")
    for column in table.spec.columns:
        cells = [cell for cell in table.of_column(column) if cell.records]
        records = [record for cell in cells for record in cell.records]
        if len({record.data for record in records}) > 1:  # each row has data of its own
            continue
        low, high = column_floor(table, column.name) or (0.0, 0.0)
        if high - low > 5e-5:
            found.append(f"{column.label}: the runs name floors from {low:.4f} to {high:.4f}.")
        estimators = distinct(cell.estimator for cell in cells if cell.kind != "score")
        if len(estimators) > 1:
            found.append(f"{column.label}: estimators differ: {' | '.join(estimators)}.")
        for what, values in (
            ("protocols", [protocol_of(metric) for cell in cells for metric in cell.metrics]),
            *(
                ("data", [r.provenance for r in records if r.provenance and r.seed == seed])
                for seed in table.seeds  # each may draw its own
            ),
        ):
            keys = _differing(values)
            text = f"{column.label}: {what} of the runs differ in {', '.join(keys)}."
            if keys and text not in found:
                found.append(text)
    return found + [text for cell in table.cells.values() for text in _below_floor(cell)]


def _below_floor(cell: Cell) -> list[str]:
    """A warning where a cell is better than its floor beyond its standard error."""
    errors = [metric.standard_error for metric in cell.metrics]
    if cell.floor is None or None in errors:
        return []
    error = math.sqrt(sum(e * e for e in errors)) / len(errors)
    if cell.column.worse_by(cell.floor, cell.ours) <= 3 * error + 1e-4:
        return []
    return [
        f"{cell.row.label} / {cell.column.label}: {cell.ours:.4f} passes its floor {cell.floor:.4f}"
        " by more than 3 standard errors, which no normalised density can."
    ]


def _differing(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which some of the mappings differ."""
    keys = distinct(key for mapping in mappings for key in mapping)
    return [key for key in keys if any(m.get(key) != mappings[0].get(key) for m in mappings)]


def _fill_cell(
    spec: TableSpec,
    row: RowSpec,
    column: ColumnSpec,
    used: list[Record],
    refusals: list[Refusal],
    profile: str,
    wanted: int,
) -> Cell:
    place = (row.name, column.name)
    published = next((q.value for q in spec.published if (q.row, q.column) == place), None)
    quoted = tuple(q for q in spec.quoted if (q.row, q.column) == place)
    empty = Cell(row, column, published, quoted, unit=column.unit or "")
    if row.experiment is None:
        return replace(empty, verdict=QUOTED_ONLY)
    if not column.shows(row.name):
        return replace(empty, verdict=NO_SUCH_NUMBER)
    refused = tuple(f"seed {r.seed}: {r.reason}" for r in refusals if not r.missing)
    missing = tuple(f"seed {r.seed}: {r.reason}" for r in refusals if r.missing)
    empty = replace(empty, refusals=refused, missing=missing)
    if not used:
        return replace(empty, verdict=refusals[0].verdict if refusals else NOT_RUN)
    cell = filled(empty, used)
    matters = [d.setting for d in spec.deviations if d.matters and d.applies(*place)]
    return replace(cell, verdict=verdict_of(cell, profile, wanted, matters))


def filled(empty: Cell, used: Sequence[Record]) -> Cell:
    """A cell with its records, one a seed, and what they say together, but for the verdict.
    Raises ValueError where likelihoods and bounds would be averaged."""
    name = empty.column.metric
    metrics = [record.metrics[name] for record in used]
    kinds = distinct(metric.kind for metric in metrics)
    if len(kinds) > 1:
        seen = ", ".join(f"seed {r.seed} {m.kind}" for r, m in zip(used, metrics, strict=True))
        raise ValueError(
            f"cell {empty.row.name} / {empty.column.name}: {name} mixes kinds ({seen});"
            " a likelihood and a bound may not be averaged, evaluate every seed the same way"
        )
    values = [metric.value for metric in metrics]
    ours = statistics.fmean(values)
    floors = [r.floor[name].value for r in used if name in r.floor]
    estimator = "; ".join(distinct(metric.estimator for metric in metrics))
    if kinds[0] == "bound" and "bound" not in estimator:
        estimator = f"bound: {estimator}"
    times = [record.wall_time_s for record in used if record.wall_time_s is not None]
    return replace(
        empty,
        ours=ours,
        std=statistics.stdev(values) if len(values) > 1 else None,
        delta=None if empty.published is None else ours - empty.published,
        floor=statistics.fmean(floors) if floors else None,
        unit=metrics[0].unit,
        kind=kinds[0],
        estimator=estimator,
        wall_time_s=statistics.fmean(times) if times else None,
        records=tuple(used),
    )
