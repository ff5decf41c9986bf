"""A question put to records: which ones answer it, and the table of rows and columns they fill.

Rows and columns are keys of the config. What is in one cell differs by its seed alone.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from surflow.record import Record, RecordError
from surflow.reporting.filling import cautions, filled
from surflow.reporting.spec import ColumnSpec, RowSpec, TableSpec
from surflow.reporting.table import Budget, Cell, Table, distinct, protocol_of
from surflow.reporting.text import describe, number

LABELS = ("artefact", "row", "profile")
"""Keys of the config that name a run and change nothing in it."""

TOLERANCE = 0.05
"""By which budgets may differ."""

DIGITS = 4

Values = tuple[Any, ...]


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        metric: None: the only one that all runs have.
        rows, columns: keys of the config, such as ``surjection`` or ``optimizer.lr``; None: those
            that vary.
        where: the value of a key, or a list of values.
        reference: the row that the others are compared with; None: the first one.
        direction: lower or higher is better; None: lower, but for likelihoods a point of sets.
    """

    metric: str | None = None
    rows: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    where: Mapping[str, Any] | None = None
    reference: str | None = None
    direction: str | None = None


class Runs:
    """The records of a question with the values of their configs.

    Args:
        records: complete ones.
        option: the value at a key of a config, a default too; KeyError where it has none.
        counts: whether a key of a config decides what the run computes.
    """

    def __init__(
        self,
        records: Sequence[Record],
        option: Callable[[Mapping[str, Any], str], Any],
        counts: Callable[[Mapping[str, Any], str], bool],
    ) -> None:
        self.records, self._option, self._counts = records, option, counts

    def among(self, records: Sequence[Record]) -> Runs:
        """Some of the runs."""
        return Runs(records, self._option, self._counts)

    def value(self, record: Record, key: str) -> Any:
        """The value of a run at a key; None where it has none."""
        try:
            return self._option(record.config, key)
        except KeyError:
            return None

    def values(self, record: Record, keys: Iterable[str]) -> Values:
        """The values of a run, as they can be compared and counted."""
        found = (self.value(record, key) for key in keys)
        return tuple(v if isinstance(v, str) else json.dumps(v, default=str) for v in found)

    def check(self, name: str, keys: Iterable[str]) -> None:
        """Raise ValueError for a key that no run has."""
        for key in keys:
            for record in self.records:
                with contextlib.suppress(KeyError):
                    self._option(record.config, key)
                    break
            else:
                known = {k for r in self.records for k in (*r.config, *leaves(r.config))}
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                varying = ", ".join(self.varying()) or "none"
                raise ValueError(f"{name}: unknown key {key!r}; {hint}Keys that vary: {varying}")

    def varying(self) -> list[str]:
        """The keys of what is computed in which some runs differ, but for the seed; first the names
        of the groups."""
        keys = distinct(key for record in self.records for key in leaves(record.config))
        found = []
        for key in keys:
            name = key.removesuffix(".name") if key.count(".") == 1 else key
            if (
                len({self.values(record, [name]) for record in self.records}) > 1
                and any(self._counts(record.config, key) for record in self.records)
                and not self._follows_seed(key)
            ):
                found.append(name)
        return sorted(found, key=lambda name: "." in name)

    def _follows_seed(self, key: str) -> bool:
        named = key.endswith("seed")
        return named and all(self.value(record, key) == record.seed for record in self.records)

    def telling(self) -> list[str]:
        """Some of the varying keys that tell all runs apart that differ."""
        chosen: list[str] = []
        for key in self.varying():
            cells: dict[Values, set[Values]] = {}
            for record in self.records:
                own = self.values(record, [key])
                cells.setdefault(self.values(record, chosen), set()).add(own)
            if any(len(values) > 1 for values in cells.values()):
                chosen.append(key)
        return chosen


def leaves(config: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Every dotted key of a plain config whose value is no mapping."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}"


def answer(
    question: Question,
    found: Iterable[Record | RecordError],
    option: Callable[[Mapping[str, Any], str], Any],
    counts: Callable[[Mapping[str, Any], str], bool],
) -> Table:
    """The table of a question; `option` and `counts` are of :class:`Runs`.

    Raises:
        ValueError: one line: for no record, an unknown key, a metric that some runs lack, mixed
            estimators, two records of one seed, and runs of one cell that differ in another key.
    """
    found = list(found)
    complete = [r for r in found if isinstance(r, Record) and r.status == "complete"]
    if not complete:
        raise ValueError(f"roots: no record of a complete run among {len(found)} files")
    runs = _where(Runs(_once(complete), option, counts), question.where or {})
    rows, columns, notes = _keys(runs, question)
    metric = _metric(runs.records, question.metric)
    of_row, of_column = _grouped(runs, rows), _grouped(runs, columns)
    labels = {values: _label(runs, rows, group[0]) for values, group in of_row.items()}
    order = _reference_first(labels, question.reference)
    problems = tuple(str(item) for item in found if isinstance(item, RecordError))
    first = runs.records[0].metrics[metric]
    sets = first.unit == "nats/point" and first.kind != "score"
    direction = question.direction or ("higher" if sets else "lower")
    spec = TableSpec(
        path=Path(),
        artefact="comparison",
        title=f"{metric} by {' and '.join([*rows, *columns]) or 'seed'}",
        metric=metric,
        unit=first.unit,
        direction=direction,
        rows=tuple(RowSpec(_file_name(labels[v]), labels[v], experiment="") for v in order),
        columns=tuple(
            ColumnSpec(
                name=_file_name(label := _label(runs, columns, group[0])),
                label=label,
                overrides=tuple(f"data={group[0].data}" for key in columns if key == "data"),
                metric=metric,
                unit=first.unit,
                direction=direction,
                digits=DIGITS,
            )
            for group in of_column.values()
        ),
        sources={},
        notes=tuple(notes),
        layout="comparison",
    )
    places = (
        list(zip(spec.rows, order, strict=True)),
        list(zip(spec.columns, of_column, strict=True)),
    )
    cells: dict[tuple[str, str], Cell] = {}
    for row, row_values in places[0]:
        for column, column_values in places[1]:
            inside = [r for r in of_row[row_values] if r in of_column[column_values]]
            _check_cell(runs.among(inside), row.label, column.label)
            empty = Cell(row, column, None, (), unit=column.unit or "")
            inside = sorted(inside, key=lambda record: record.seed)
            cells[row.name, column.name] = (
                replace(filled(empty, inside), verdict="compared") if inside else empty
            )
    _check_estimators(spec, cells)
    seeds = tuple(sorted({record.seed for record in runs.records}))
    profile = ", ".join(distinct(record.profile for record in runs.records))
    table = Table(spec, profile, seeds, cells, problems)
    budgets = {key: _budget(runs, cell.records) for key, cell in cells.items() if cell.records}
    table = replace(table, budgets=budgets)
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
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        kept = [r for r in runs.records if runs.value(r, key) in (*values, wanted)]
        if not kept:
            known = distinct(describe(runs.value(record, key)) for record in runs.records)
            raise ValueError(
                f"where: no run has {key}={describe(wanted)}; known: {', '.join(known)}"
            )
        runs = runs.among(kept)
    return runs


def _metric(records: Sequence[Record], wanted: str | None) -> str:
    names = distinct(name for record in records for name in record.metrics)
    if wanted is None:
        common = [name for name in names if all(name in record.metrics for record in records)]
        if len(common) != 1:
            told = ", ".join(common or names)
            raise ValueError(f"metric: {len(common)} are in every run; choose one of {told}")
        return common[0]
    lacking = [record for record in records if wanted not in record.metrics]
    if lacking:
        raise ValueError(
            f"metric: {len(lacking)} of {len(records)} runs have no {wanted}, such as "
            f"{_place(lacking[0])} with {', '.join(lacking[0].metrics)}; leave them out by where"
        )
    return wanted


def _keys(runs: Runs, question: Question) -> tuple[Sequence[str], Sequence[str], list[str]]:
    """The keys of rows and columns, and what was found of them, in words."""
    rows, columns = question.rows, question.columns
    runs.check("rows", rows or ())
    runs.check("columns", columns or ())
    if rows is not None and columns is not None:
        return rows, columns, []
    found = [key for key in runs.telling() if key not in (rows or columns or ())]
    if rows is None and columns is None:
        columns = tuple(key for key in found if key == "data" and len(found) > 1)
        rows = tuple(key for key in found if key not in columns)
    rows, columns = (tuple(found) if keys is None else keys for keys in (rows, columns))
    told = " and ".join(
        f"{', '.join(k) or 'nothing'} ({n})" for k, n in ((rows, "rows"), (columns, "columns"))
    )
    return rows, columns, [f"Keys that vary were found: {told}."]


def _grouped(runs: Runs, keys: Sequence[str]) -> dict[Values, list[Record]]:
    """The runs by their values at some keys; numbers in order, other values as they come."""
    groups: dict[Values, list[Record]] = {}
    for record in runs.records:
        groups.setdefault(runs.values(record, keys), []).append(record)

    def rank(values: Values) -> list[float]:
        found = (runs.value(groups[values][0], key) for key in keys)
        return [float(v) if isinstance(v, int | float) else -1.0 for v in found]

    return {values: groups[values] for values in sorted(groups, key=rank)}


def _label(runs: Runs, keys: Sequence[str], record: Record) -> str:
    """Such as "abs, lr 0.001": the name of a group, the last word of another key and its value."""
    words = []
    for key in keys:
        value = runs.value(record, key)
        text = "–" if value is None else describe(value)
        words.append(f"{key.rpartition('.')[2]} {text}" if "." in key else text)
    return ", ".join(words) or "all runs"


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", label).strip("_") or "none"


def _reference_first(labels: Mapping[Values, str], reference: str | None) -> list[Values]:
    chosen = [v for v, label in labels.items() if reference in (label, ", ".join(v))]
    if reference is not None and not chosen:
        known = "; ".join(labels.values())
        raise ValueError(f"reference: no row {reference!r}; rows: {known}")
    return [*chosen, *(values for values in labels if values not in chosen)]


def _place(record: Record) -> str:
    """The folder of a run; the file of a record that is kept without it."""
    return str(record.run_dir if record.path.stem == "record" else record.path)


def _check_cell(runs: Runs, row: str, column: str) -> None:
    where = f"{row} / {column}"
    differing = runs.varying()
    if differing:
        key = differing[0]
        told = {describe(runs.value(record, key)): _place(record) for record in runs.records}
        others = f" (and in {', '.join(differing[1:4])})" if differing[1:] else ""
        shown = ", ".join(f"{value} in {place}" for value, place in list(told.items())[:3])
        raise ValueError(
            f"{where}: runs that differ in {key}{others} are not averaged; make it a row or a "
            f"column, or choose by where: {shown}"
        )
    for seed, same in groupby(sorted(runs.records, key=lambda r: r.seed), lambda r: r.seed):
        places = [_place(record) for record in same]
        if len(places) > 1:
            raise ValueError(f"{where}: {len(places)} records of seed {seed}: {', '.join(places)}")


def _check_estimators(spec: TableSpec, cells: Mapping[tuple[str, str], Cell]) -> None:
    """Raise ValueError where the numbers of a column were obtained in several ways."""
    for column in spec.columns:
        ways = {}
        for cell in (cells[row.name, column.name] for row in spec.rows):
            for metric in cell.metrics:
                estimator = "" if metric.kind == "score" else metric.estimator
                way = (metric.kind, metric.unit, estimator, describe(protocol_of(metric)))
                ways.setdefault(way, cell.row.label)
        if len(ways) > 1:
            told = "; ".join(
                f"{label}: {', '.join(filter(None, way))}" for way, label in ways.items()
            )
            raise ValueError(f"{column.label}: {column.metric} by several estimators: {told}")


def _confounded(runs: Runs, table: Table, rows: Sequence[str]) -> list[str]:
    """The keys besides those of the rows in which the rows of a column differ."""
    if set(rows) & set(LABELS):  # a row is then a recipe
        return []
    keys = []
    for column in table.spec.columns:
        records = [record for cell in table.of_column(column) for record in cell.records]
        groups = tuple(f"{row}." for row in rows if "." not in row)
        keys += [
            key
            for key in runs.among(records).varying()
            if key not in rows and not key.startswith(groups)
        ]
    keys = list(distinct(keys))
    return [f"The rows differ in {', '.join(keys)} as well."] if keys else []


def _budget(runs: Runs, records: Sequence[Record]) -> Budget:
    def mean(values: Iterable[float | None]) -> float | None:
        found = list(values)
        return None if None in found else fmean(found)  # type: ignore[arg-type]

    steps, samples = zip(*(_steps(runs, record) for record in records), strict=True)
    return Budget(
        mean(record.parameters for record in records),
        mean(steps),
        mean(samples),
        mean(record.wall_time_s for record in records),
    )


def _steps(runs: Runs, record: Record) -> tuple[int | None, int | None]:
    """Optimizer steps and samples of a training to its last epoch; an incomplete batch is left
    out."""
    trainer = record.config.get("trainer") or {}
    epochs, batch = trainer.get("max_epochs"), runs.value(record, "data.batch_size")
    rows = record.provenance.get("splits", {}).get("train", {}).get("rows")
    rows = rows or runs.value(record, "data.train_size")
    stops = {"max_steps", "max_time", "limit_train_batches"} & trainer.keys()
    if record.weights or stops or not (epochs and batch and rows) or record.config.get("callbacks"):
        return None, None
    batches = rows // batch
    return epochs * -(
        -batches // trainer.get("accumulate_grad_batches", 1)
    ), epochs * batches * batch


def _unequal(table: Table) -> list[str]:
    """A warning for each budget by which the rows of a column differ by more than 5 %."""
    found = []
    for name in Budget.__dataclass_fields__:
        worst: tuple[float, str] = (TOLERANCE, "")
        for column in table.spec.columns:
            told = [
                (value, row.label)
                for row in table.spec.rows
                if (row.name, column.name) in table.budgets
                and (value := getattr(table.budgets[row.name, column.name], name)) is not None
            ]
            if told and min(told)[0] > 0:
                (low, less), (high, more) = min(told), max(told)
                text = f"{number(low, 0)} ({less}) to {number(high, 0)} ({more}), {column.label}"
                worst = max(worst, (high / low - 1, text))
        if worst[1]:
            words = name.removesuffix("_s").replace("_", " ")
            unit = " in seconds" if name.endswith("_s") else ""
            found.append(f"Budgets differ by {worst[0]:.0%}: {words}{unit} {worst[1]}.")
    return found
