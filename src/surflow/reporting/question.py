"""A question put to records: which ones answer it, and the table of rows and columns they fill.

Rows and columns are keys of the config. What is in one cell differs by its seed alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from statistics import fmean
from typing import Any

from surflow.errors import close_match
from surflow.record import Record, RecordError
from surflow.reporting.filling import cautions, filled
from surflow.reporting.spec import ColumnSpec, RowSpec, TableSpec
from surflow.reporting.table import Cell, Table, distinct, protocol_of
from surflow.reporting.text import describe

BUDGET = ("parameters", "optimizer_steps", "samples_seen", "wall_time_s")

Lookup = Callable[[Mapping[str, Any], str], Any]


def leaves(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a plain config whose value is no mapping, and the value."""
    if not isinstance(config, Mapping) or (where and not config):
        yield where, config
        return
    for key, value in config.items():
        yield from leaves(value, f"{where}.{key}" if where else key)


@dataclass(frozen=True)
class Runs:
    """Records with the values of their configs: `option` gives that of a key, defaults too, or
    KeyError; `computed` what counts in a group, None where nothing does."""

    records: Sequence[Record]
    option: Lookup
    computed: Lookup

    def value(self, record: Record, key: str) -> Any:
        """The value of a run at a key; None where it has none."""
        with contextlib.suppress(KeyError):
            return self.option(record.config, key)
        return None

    def values(self, record: Record, keys: Iterable[str]) -> tuple[str, ...]:
        """The values of a run, as text that tells them apart."""
        found = (self.value(record, key) for key in keys)
        return tuple(v if isinstance(v, str) else json.dumps(v, default=str) for v in found)

    def check(self, name: str, keys: Iterable[str]) -> None:
        """Raise ValueError for a key that no run has."""
        for key in keys:
            for record in self.records:
                with contextlib.suppress(KeyError):
                    self.option(record.config, key)
                    break
            else:
                known = {k for r in self.records for k in (*r.config, *dict(leaves(r.config)))}
                varying = ", ".join(self.telling()) or "none"
                hint = close_match(key, known)
                raise ValueError(f"{name}: unknown key {key!r}{hint}; keys that vary: {varying}")

    def varying(self) -> list[str]:
        """The keys of what is computed in which some runs differ, but for the seed; first the names
        of the groups."""
        flat = [dict(leaves(record.config)) for record in self.records]
        found = []
        for key in distinct(key for one in flat for key in one):
            if len({json.dumps(one.get(key, "\0"), default=str) for one in flat}) == 1:
                continue
            follows = (self.value(record, key) == record.seed for record in self.records)
            if not self._counts(key) or (key.endswith("seed") and all(follows)):
                continue
            name = key.removesuffix(".name") if key.count(".") == 1 else key
            if len({self.values(record, [name]) for record in self.records}) > 1:
                found.append(name)
        return sorted(found, key=lambda name: "." in name)

    def _counts(self, key: str) -> bool:
        group, _, inner = key.partition(".")
        parts = (self.computed(record.config, group) for record in self.records)
        return any(inner in dict(leaves(part)) for part in parts if part)

    def telling(self) -> list[str]:
        """Some of the varying keys that tell all runs apart that differ."""
        chosen: list[str] = []
        for key in self.varying():
            groups = self.grouped(chosen).values()
            if any(len({self.values(r, [key]) for r in group}) > 1 for group in groups):
                chosen.append(key)
        return chosen

    def grouped(self, keys: Sequence[str]) -> dict[tuple[str, ...], list[Record]]:
        """The runs by their values at some keys, in order."""
        groups: dict[tuple[str, ...], list[Record]] = {}
        for record in self.records:
            groups.setdefault(self.values(record, keys), []).append(record)

        def rank(values: tuple[str, ...]) -> list[tuple[float, str]]:
            found = (self.value(groups[values][0], key) for key in keys)
            return [(v, "") if isinstance(v, int | float) else (-1, str(v)) for v in found]

        return {values: groups[values] for values in sorted(groups, key=rank)}


def answer(
    found: Iterable[Record | RecordError],
    option: Lookup,
    computed: Lookup,
    *,
    metric: str,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    where: Mapping[str, Any] | None = None,
    reference: str | None = None,
    direction: str | None = None,
) -> Table:
    """The table of a question to complete runs: see :class:`Runs` and conf/compare.yaml.

    Raises:
        ValueError: one line: for no record, an unknown key, a metric that some runs lack, mixed
            estimators, two records of one seed, and runs of one cell that differ in another key.
    """
    found = list(found)
    complete = [r for r in found if isinstance(r, Record) and r.status == "complete"]
    if not complete:
        raise ValueError(f"roots: no record of a complete run among {len(found)} files")
    runs = _where(Runs(_once(complete), option, computed), where or {})
    rows, columns, notes = _keys(runs, rows, columns)
    _check_metric(runs.records, metric)
    of_row, of_column = _axis(runs, rows), _axis(runs, columns)
    if reference is not None:
        if reference not in of_row:
            raise ValueError(f"reference: no row {reference!r}; rows: {'; '.join(of_row)}")
        of_row = {reference: of_row[reference], **of_row}
    first = runs.records[0].metrics[metric]
    sets = first.unit == "nats/point" and first.kind != "score"
    direction = direction or ("higher" if sets else "lower")
    measure = {"metric": metric, "unit": first.unit, "direction": direction}
    known = len(of_column) == 1 or "data" in columns
    data = {n: (f"data={of[0].data}",) if known else () for n, of in of_column.items()}
    spec = TableSpec(
        path=Path(),
        artefact="comparison",
        title=f"{metric} by {' and '.join([*rows, *columns]) or 'seed'}",
        **measure,
        rows=tuple(RowSpec(label, label, experiment="") for label in of_row),
        columns=tuple(
            ColumnSpec(label, label, data[label], **measure, digits=4) for label in of_column
        ),
        sources={},
        notes=notes,
        layout="comparison",
    )
    cells = {}
    for row, column in product(spec.rows, spec.columns):
        here = set(map(id, of_column[column.name]))
        inside = [record for record in of_row[row.name] if id(record) in here]
        cells[row.name, column.name] = _cell(row, column, replace(runs, records=inside))
    table = Table(
        spec,
        profile=", ".join(distinct(record.profile for record in runs.records)),
        seeds=tuple(sorted({record.seed for record in runs.records})),
        cells=cells,
        problems=tuple(str(item) for item in found if isinstance(item, RecordError)),
        budgets={key: _budget(runs, cell.records) for key, cell in cells.items() if cell.records},
    )
    _check_estimators(table)
    warnings = [*_confounded(runs, table, rows), *_unequal(table), *cautions(table)]
    return replace(table, warnings=tuple(warnings))


def _once(records: Sequence[Record]) -> list[Record]:
    """The records without copies: of one configuration with the same numbers."""
    kept: dict[Any, Record] = {}
    for record in records:
        numbers = tuple(sorted((name, metric.value) for name, metric in record.metrics.items()))
        kept.setdefault((record.config_hash, numbers), record)
    return list(kept.values())


def _where(runs: Runs, where: Mapping[str, Any]) -> Runs:
    runs.check("where", where)
    for key, wanted in where.items():
        values = [*wanted, wanted] if isinstance(wanted, list | tuple) else [wanted]
        kept = [record for record in runs.records if runs.value(record, key) in values]
        if not kept:
            known = ", ".join(distinct(describe(runs.value(r, key)) for r in runs.records))
            raise ValueError(f"where: no run has {key}={describe(wanted)}; known: {known}")
        runs = replace(runs, records=kept)
    return runs


def _check_metric(records: Sequence[Record], wanted: str) -> None:
    lacking = [record for record in records if wanted not in record.metrics]
    if lacking:
        raise ValueError(
            f"metric: {len(lacking)} of {len(records)} runs have no {wanted}, such as "
            f"{lacking[0].path} with {', '.join(lacking[0].metrics)}; leave them out by where"
        )


def _keys(
    runs: Runs, rows: Sequence[str] | None, columns: Sequence[str] | None
) -> tuple[Sequence[str], Sequence[str], tuple[str, ...]]:
    """The keys of rows and columns, and what was found of them, in words."""
    runs.check("rows", rows or ())
    runs.check("columns", columns or ())
    if rows is not None and columns is not None:
        return rows, columns, ()
    found = [key for key in runs.telling() if key not in (rows or columns or ())]
    if rows is None and columns is None:
        columns = [key for key in found if key == "data" and len(found) > 1]
    rows = [key for key in found if key not in columns] if rows is None else rows
    columns = found if columns is None else columns
    told = f"rows {', '.join(rows) or 'none'}; columns {', '.join(columns) or 'none'}"
    return rows, columns, (f"Found by what varies: {told}.",)


def _axis(runs: Runs, keys: Sequence[str]) -> dict[str, list[Record]]:
    """The runs by label, such as "abs, lr 0.001": names of groups, other keys with their value."""
    axis: dict[str, list[Record]] = {}
    for group in runs.grouped(keys).values():
        words = []
        for key in keys:
            value = runs.value(group[0], key)
            text = "–" if value is None else describe(value)
            words.append(f"{key.rpartition('.')[2]} {text}" if "." in key else text)
        axis.setdefault(", ".join(words) or "all runs", []).extend(group)
    return axis


def _cell(row: RowSpec, column: ColumnSpec, runs: Runs) -> Cell:
    """The cell of some runs; ValueError where they differ by more than their seed, or share one."""
    where = f"{row.label} / {column.label}"
    differing = runs.telling()
    if differing:
        key, *others = differing
        also = f" (and in {', '.join(others[:3])})" if others else ""
        told = {describe(runs.value(record, key)): record.path for record in runs.records}
        shown = ", ".join(f"{value} in {place}" for value, place in list(told.items())[:3])
        raise ValueError(
            f"{where}: runs that differ in {key}{also} are not averaged; make it a row or a "
            f"column, or choose by where: {shown}"
        )
    records = sorted(runs.records, key=lambda record: record.seed)
    for seed, same in groupby(records, lambda record: record.seed):
        places = [str(record.path) for record in same]
        if len(places) > 1:
            raise ValueError(f"{where}: {len(places)} records of seed {seed}: {', '.join(places)}")
    empty = Cell(row, column, None, (), unit=column.unit or "")
    return replace(filled(empty, records), verdict="compared") if records else empty


def _check_estimators(table: Table) -> None:
    """Raise ValueError where the numbers of a column were obtained in several ways."""
    for column in table.spec.columns:
        ways = {}
        for cell in table.of_column(column):
            for metric in cell.metrics:
                estimator = "" if metric.kind == "score" else metric.estimator
                way = (metric.kind, metric.unit, estimator, describe(protocol_of(metric)))
                ways.setdefault(", ".join(filter(None, way)), cell.row.label)
        if len(ways) > 1:
            told = "; ".join(f"{label}: {way}" for way, label in ways.items())
            raise ValueError(f"{column.label}: {column.metric} by several estimators: {told}")


def _confounded(runs: Runs, table: Table, rows: Sequence[str]) -> list[str]:
    """A warning of the keys besides those of the rows in which the rows of a column differ."""
    groups = tuple(f"{row}." for row in rows if "." not in row)
    columns = ([r for c in table.of_column(one) for r in c.records] for one in table.spec.columns)
    differing = distinct(k for found in columns for k in replace(runs, records=found).varying())
    keys = [key for key in differing if key not in rows and not key.startswith(groups)]
    return [f"The rows differ in {', '.join(keys)} as well."] if keys else []


def _budget(runs: Runs, records: Sequence[Record]) -> dict[str, float | None]:
    """What the trainings took, mean over the seeds; None where a record does not tell."""
    told = zip(*((r.parameters, *_steps(runs, r), r.wall_time_s) for r in records), strict=True)
    return {n: None if None in v else fmean(v) for n, v in zip(BUDGET, told, strict=True)}


def _steps(runs: Runs, record: Record) -> tuple[int | None, int | None]:
    """Optimizer steps and samples up to the last epoch; an incomplete batch is left out."""
    trainer = record.config.get("trainer") or {}
    epochs, batch = trainer.get("max_epochs"), runs.value(record, "data.batch_size")
    rows = record.provenance.get("splits", {}).get("train", {}).get("rows")
    rows = rows or runs.value(record, "data.train_size")
    stops = {"max_steps", "max_time", "limit_train_batches"} & trainer.keys()
    if record.weights or record.config.get("callbacks") or stops or not (epochs and batch and rows):
        return None, None
    batches, each = rows // batch, trainer.get("accumulate_grad_batches", 1)
    return epochs * -(-batches // each), epochs * batches * batch


def _unequal(table: Table) -> list[str]:
    """A warning for each budget in which the rows of a column differ by more than 5 %."""
    found = []
    for name in BUDGET:
        worst = (0.05, "")
        for column in table.spec.columns:
            cells = [c for c in table.of_column(column) if c.records]
            told = [(table.budgets[c.row.name, column.name][name], c.row.label) for c in cells]
            known = sorted(pair for pair in told if pair[0])
            if known:
                (low, less), (high, more) = known[0], known[-1]
                digits = int(name.endswith("_s"))
                text = f"{low:,.{digits}f} ({less}) to {high:,.{digits}f} ({more}), {column.label}"
                worst = max(worst, (high / low - 1, text))
        if worst[1]:
            words = name.replace("_time_s", " time in seconds").replace("_", " ")
            found.append(f"Budgets differ by {worst[0]:.0%}: {words} {worst[1]}.")
    return found
