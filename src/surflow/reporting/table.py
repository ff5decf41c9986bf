"""A table's specification and run records in; verdicts, CSV and Markdown out.

A number enters a table only with the hash of the configuration that the table asks for today; what
is stale, incomplete or of another profile is refused, and its cell says why.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surflow.reporting.records import (
    Metric,
    Record,
    RecordError,
    protocol_value,
    write_text_atomic,
)
from surflow.reporting.spec import ColumnSpec, Quote, RowSpec, TableSpec

CSV_FIELDS = (
    "row",
    "column",
    "metric",
    "unit",
    "estimator",
    "published",
    "ours",
    "std",
    "delta",
    "floor",
    "verdict",
    "seeds",
    "profile",
    "commit",
)
NOT_RUN = "not run"
QUOTED_ONLY = "quoted only"
NO_SUCH_NUMBER = "no such number"
_SLACK = 1e-9  # float noise allowed at the edge of a tolerance, in the unit of the metric


Key = tuple[str, str, int]
"""Row, column and seed."""


@dataclass(frozen=True)
class Cell:
    """One cell: mean `ours` and sample standard deviation `std` over the accepted `records`.

    `ours` is None where nothing was accepted; `verdict` then is ``not run``, ``quoted only``,
    ``no such number`` (the column is not about this model), ``missing: <reason>`` (the run is
    there, the metric could not be computed) or ``refused: <reason>``. `refusals` and `missing` list
    what was refused, or is missing, seed by seed, also beside a number.
    """

    row: RowSpec
    column: ColumnSpec
    published: float | None
    quoted: tuple[Quote, ...]
    ours: float | None = None
    std: float | None = None
    delta: float | None = None
    floor: float | None = None
    unit: str = ""
    kind: str = ""
    estimator: str = ""
    verdict: str = NOT_RUN
    wall_time_s: float | None = None
    records: tuple[Record, ...] = ()
    refusals: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds behind `ours`."""
        return tuple(record.seed for record in self.records)

    @property
    def commits(self) -> tuple[str, ...]:
        """The distinct short commits behind `ours`."""
        return distinct(record.short_commit for record in self.records)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The column's metric of each record."""
        return tuple(record.metrics[self.column.metric] for record in self.records)


@dataclass(frozen=True)
class Table:
    """A filled table. `problems` are unreadable records of no known cell; `warnings` are ours."""

    spec: TableSpec
    profile: str
    seeds: tuple[int, ...]
    cells: Mapping[tuple[str, str], Cell]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def records(self) -> tuple[Record, ...]:
        """Every accepted record, row by row."""
        return tuple(record for cell in self.cells.values() for record in cell.records)

    @property
    def commits(self) -> tuple[str, ...]:
        """The distinct short commits behind the table."""
        return distinct(record.short_commit for record in self.records)

    @property
    def released(self) -> bool:
        """Whether its numbers are of released weights that nothing of ours trained."""
        return any(record.weights for record in self.records)

    def without_empty_rows(self) -> Table:
        """The same table without rows that have neither a value nor a run, for its pictures."""
        told = {c.row.name for c in self.cells.values() if c.records or c.published is not None}
        told |= {c.row.name for c in self.cells.values() if c.quoted}
        rows = tuple(row for row in self.spec.rows if row.name in told)
        cells = {key: cell for key, cell in self.cells.items() if cell.row.name in told}
        return replace(self, spec=replace(self.spec, rows=rows), cells=cells)

    def of_column(self, column: ColumnSpec) -> tuple[Cell, ...]:
        """The cells of a column, row by row."""
        return tuple(cell for cell in self.cells.values() if cell.column.name == column.name)


def distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


# --------------------------------------------------------------------------- filling the table


def verdict_of(
    column: ColumnSpec,
    row: RowSpec,
    *,
    profile: str,
    ours: float,
    published: float | None,
    floor: float | None,
    done: int,
    wanted: int,
    released: bool = False,
) -> str:
    """The verdict on one number (in the unit of the metric) from `done` of `wanted` seeds."""
    if profile != "paper":
        text = f"not a reproduction (profile {profile})"
        return f"released weights: {text}" if released else text
    text = _comparison(column, row, ours, published, floor)
    text = f"released weights: {text}" if released else text
    return text if done == wanted else f"{done} of {wanted} seeds: {text}"


def _comparison(
    column: ColumnSpec, row: RowSpec, ours: float, published: float | None, floor: float | None
) -> str:
    """Our number against the published one, or, where a row has a target, against the floor."""
    if published is not None:
        worse = column.worse_by(ours, published)
        if worse > column.tolerance + _SLACK:
            return f"worse by {worse:.{column.digits}f}"
        same = worse >= -column.tolerance - _SLACK
        return "reproduced" if same else f"reproduced, better by {-worse:.{column.digits}f}"
    if row.target_above_floor is None:
        return "published value not available"
    if floor is None:
        return "floor not available"
    above, target = ours - floor, row.target_above_floor
    if above <= target + _SLACK:
        return f"within {target:.{column.digits}f} of the floor"
    return f"{above:.{column.digits}f} above the floor, target {target:.{column.digits}f}"


@dataclass(frozen=True, order=True)
class _Refusal:
    """Why a record is not in its cell; the lowest `rank` is the most telling reason."""

    rank: int
    seed: int
    reason: str
    missing: bool = False

    @property
    def verdict(self) -> str:
        return f"{'missing' if self.missing else 'refused'}: {self.reason}"


def _refusal(
    row: RowSpec,
    column: ColumnSpec,
    record: Record,
    wanted: str | None,
    protocol: Mapping[str, Any],
    profile: str,
) -> _Refusal | None:
    """Why a record may not enter its cell; None if it is good."""
    seed = record.seed
    if record.profile != profile:
        return _Refusal(4, seed, f"profile {record.profile}, not {profile}")
    if record.status != "complete":
        return _Refusal(0, seed, f"run {record.status}, not complete")
    if record.experiment != row.experiment:
        return _Refusal(2, seed, f"experiment {record.experiment}, not {row.experiment}")
    if wanted is None:
        return _Refusal(3, seed, "no configuration known for this cell")
    if record.config_hash != wanted:
        return _Refusal(2, seed, f"stale config {record.config_hash}, now {wanted}")
    name = column.metric
    if name not in record.metrics:
        if name in record.missing:
            return _Refusal(-1, seed, record.missing[name], missing=True)
        return _Refusal(1, seed, f"record has no {name}")
    metric = record.metrics[name]
    if column.unit not in (None, metric.unit):
        return _Refusal(1, seed, f"{name} in {metric.unit}, not {column.unit}")
    if metric.kind == "score":
        for key, value in protocol.items():
            found = protocol_value(metric.protocol, key)
            if found != value:
                return _Refusal(1, seed, f"{name} with {key} {describe(found)}, now {value}")
    return None


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
        self.bad: dict[Key, list[_Refusal]] = {}
        self.problems: list[str] = []

    def add(self, item: Record | RecordError) -> None:
        if isinstance(item, RecordError):
            self._add_broken(item)
        elif item.artefact == self.spec.runs and item.row in self.rows and item.seed in self.seeds:
            self._add_record(item)

    def _add_broken(self, item: RecordError) -> None:
        if item.artefact not in (None, self.spec.runs):
            return
        homes = _homes(self.spec, self.expected, item)
        if item.artefact is None or item.row not in self.rows or item.seed not in self.seeds:
            homes = []
        if not homes:
            self.problems.append(str(item))
        rank = 4 if item.profile not in (None, self.profile) else 0
        for column in homes:
            key = (item.row, column.name, item.seed)
            self.bad.setdefault(key, []).append(_Refusal(rank, item.seed, item.reason))

    def _add_record(self, record: Record) -> None:
        for column in _homes(self.spec, self.expected, record):
            key = (record.row, column.name, record.seed)
            why = _refusal(
                self.rows[record.row],
                column,
                record,
                self.expected.get(key),
                self.protocols.get(key, {}),
                self.profile,
            )
            if why is None:
                self.good.setdefault(key, []).append(record)
            else:
                self.bad.setdefault(key, []).append(why)

    def cell(self, row: RowSpec, column: ColumnSpec) -> tuple[list[Record], list[_Refusal]]:
        """The records of a cell, one a seed, and the refusals of the seeds without one."""
        used: list[Record] = []
        refusals: list[_Refusal] = []
        for seed in self.seeds:
            key = (row.name, column.name, seed)
            found = self.good.get(key, [])
            if len(found) == 1:
                used += found
            elif found:
                places = ", ".join(str(record.run_dir) for record in found)
                why = f"{len(found)} runs of one configuration ({places}); keep one"
                refusals.append(_Refusal(0, seed, why))
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

    `expected` maps (row, column, seed) to the config hash that the cell asks for; `protocols` to
    the part of a score's protocol that it asks for. A record belongs to a cell by artefact, row,
    seed and its data being the column's; where no column is of its data, by that hash. Records of
    other artefacts, rows, columns or seeds are left alone.
    Raises `ValueError` where likelihoods and bounds would be averaged in one cell.
    """
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")
    sorter = _Sorter(spec, expected, protocols or {}, profile, seeds)
    for item in records:
        sorter.add(item)
    published = {(quote.row, quote.column): quote.value for quote in spec.published}
    warnings: list[str] = []
    cells = {}
    for row in spec.rows:
        for column in spec.columns:
            cells[row.name, column.name] = _fill_cell(
                spec,
                row,
                column,
                *sorter.cell(row, column),
                published.get((row.name, column.name)),
                profile,
                len(seeds),
                warnings,
            )
    table = Table(spec, profile, seeds, cells, tuple(sorter.problems))
    return replace(table, warnings=(*_table_warnings(table), *warnings))


def _table_warnings(table: Table) -> list[str]:
    """What a reader must know before comparing the cells with each other."""
    found = []
    if len(table.commits) > 1:
        found.append(f"Mixed commits: {', '.join(table.commits)}.")
    if table.spec.figure == "each":  # each row has data of its own
        return found
    for column in table.spec.columns:
        low, high = _column_floor(table, column.name) or (0.0, 0.0)
        if high - low > 5e-5:
            found.append(f"{column.label}: the runs name floors from {low:.4f} to {high:.4f}.")
        cells = [cell for cell in table.of_column(column) if cell.records]
        estimators = distinct(cell.estimator for cell in cells if cell.kind != "score")
        if len(estimators) > 1:
            found.append(f"{column.label}: estimators differ: {' | '.join(estimators)}.")
        for what, values in (
            ("protocols", [protocol_of(metric) for cell in cells for metric in cell.metrics]),
            ("data", [record.provenance for cell in cells for record in cell.records]),
        ):
            keys = _differing(values)
            if keys:
                found.append(f"{column.label}: {what} of the runs differ in {', '.join(keys)}.")
    return found


_OF_ONE_RUN = ("seed", "splits_standard_deviation")


def protocol_of(metric: Metric) -> dict[str, Any]:
    """The protocol of a score without what belongs to one run of it."""
    return {key: value for key, value in metric.protocol.items() if key not in _OF_ONE_RUN}


def _differing(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which some of the mappings differ."""
    keys = distinct(key for mapping in mappings for key in mapping)
    return [key for key in keys if any(m.get(key) != mappings[0].get(key) for m in mappings)]


def _fill_cell(
    spec: TableSpec,
    row: RowSpec,
    column: ColumnSpec,
    used: list[Record],
    refusals: list[_Refusal],
    published: float | None,
    profile: str,
    wanted: int,
    warnings: list[str],
) -> Cell:
    quoted = tuple(q for q in spec.quoted if (q.row, q.column) == (row.name, column.name))
    if row.experiment is not None and not column.shows(row.name):
        verdict = NO_SUCH_NUMBER
        return Cell(row, column, published, quoted, unit=column.unit or "", verdict=verdict)
    told = {
        absent: tuple(f"seed {r.seed}: {r.reason}" for r in refusals if r.missing == absent)
        for absent in (False, True)
    }
    empty = Cell(
        row,
        column,
        published,
        quoted,
        unit=column.unit or "",
        refusals=told[False],
        missing=told[True],
    )
    if row.experiment is None:
        return replace(empty, verdict=QUOTED_ONLY)
    if not used:
        return replace(empty, verdict=refusals[0].verdict if refusals else NOT_RUN)

    name = column.metric
    metrics = [record.metrics[name] for record in used]
    kinds = distinct(metric.kind for metric in metrics)
    if len(kinds) > 1:
        seen = ", ".join(f"seed {r.seed} {m.kind}" for r, m in zip(used, metrics, strict=True))
        raise ValueError(
            f"{spec.artefact}, cell {row.name} / {column.name}: {name} mixes kinds ({seen});"
            " a likelihood and a bound may not be averaged, evaluate every seed the same way"
        )
    values = [metric.value for metric in metrics]
    ours = statistics.fmean(values)
    floors = [r.floor[name].value for r in used if name in r.floor]
    floor = statistics.fmean(floors) if floors else None
    errors = [metric.standard_error for metric in metrics]
    if floor is not None and None not in errors:
        error = math.sqrt(sum(e * e for e in errors)) / len(errors)
        if column.worse_by(floor, ours) > 3 * error + 1e-4:
            warnings.append(
                f"{row.label} / {column.label}: {ours:.4f} passes its floor {floor:.4f} by more"
                " than 3 standard errors, which no normalised density can."
            )
    estimator = "; ".join(distinct(metric.estimator for metric in metrics))
    if kinds[0] == "bound" and "bound" not in estimator:
        estimator = f"bound: {estimator}"
    times = [record.wall_time_s for record in used if record.wall_time_s is not None]
    return replace(
        empty,
        ours=ours,
        std=statistics.stdev(values) if len(values) > 1 else None,
        delta=None if published is None else ours - published,
        floor=floor,
        unit=metrics[0].unit,
        kind=kinds[0],
        estimator=estimator,
        verdict=verdict_of(
            column,
            row,
            profile=profile,
            ours=ours,
            published=published,
            floor=floor,
            done=len(used),
            wanted=wanted,
            released=any(record.weights for record in used),
        ),
        wall_time_s=statistics.fmean(times) if times else None,
        records=tuple(used),
    )


def _column_floor(table: Table, column: str) -> tuple[float, float] | None:
    """The lowest and highest floor that the runs of a column name, in the unit of the metric."""
    floors = [
        cell.floor
        for (_, name), cell in table.cells.items()
        if name == column and cell.floor is not None
    ]
    return (min(floors), max(floors)) if floors else None


def ordering_lines(table: Table) -> list[str]:
    """One line for each claimed ordering: does it hold, column by column?"""
    labels = {row.name: row.label for row in table.spec.rows}
    lines = []
    for ordering in table.spec.orderings:
        parts, held, checked = [], 0, 0
        for column in table.spec.columns:
            better = table.cells[ordering.better, column.name].ours
            worse = table.cells[ordering.worse, column.name].ours
            if better is None or worse is None:
                parts.append(f"{column.label} not checked")
                continue
            holds = column.worse_by(better, worse) < 0
            checked, held = checked + 1, held + holds
            sign = "<" if better < worse else ">" if better > worse else "="
            word = "holds" if holds else "FAILS"
            shown = f"{better:.{column.digits}f} {sign} {worse:.{column.digits}f}"
            parts.append(f"{column.label} {word} ({shown})")
        claim = f"{labels[ordering.better]} better than {labels[ordering.worse]}"
        count = f"holds in {held} of {checked} checked columns" if checked else "not checked"
        lines.append(f"{claim}: {count}. {'; '.join(parts)}.")
    return lines


# --------------------------------------------------------------------------- writing


def _number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return f"+{text}" if sign and float(text) > 0 else text


def _fields(table: Table, cell: Cell) -> dict[str, str]:
    """The fields of `CSV_FIELDS` for one cell, as text."""
    digits = cell.column.digits
    return {
        "row": cell.row.name,
        "column": cell.column.name,
        "metric": cell.column.metric,
        "unit": cell.unit,
        "estimator": cell.estimator,
        "published": _number(cell.published, cell.column.published_digits),
        "ours": _number(cell.ours, digits),
        "std": _number(cell.std, digits),
        "delta": _number(cell.delta, digits, sign=True),
        "floor": _number(cell.floor, 4),
        "verdict": cell.verdict,
        "seeds": " ".join(str(seed) for seed in cell.seeds),
        "profile": table.profile,
        "commit": " ".join(cell.commits),
    }


def render_csv(table: Table) -> str:
    """The table as CSV: a header of `CSV_FIELDS`, then one line a cell, row by row."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_fields(table, cell) for cell in table.cells.values())
    return stream.getvalue()


def write_csv(table: Table, path: str | Path) -> Path:
    """Write `render_csv` atomically; returns the path."""
    return write_text_atomic(path, render_csv(table))


def markdown_grid(
    header: Sequence[str], lines: Iterable[Sequence[str]], numeric: Iterable[int]
) -> str:
    """A Markdown table; the columns in `numeric` are set flush right."""

    def line(fields: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(f.split()).replace("|", "\\|") for f in fields) + " |"

    right = set(numeric)
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    return "\n".join([line(header), line(rule), *(line(fields) for fields in lines)])


def cell_text(cell: Cell, wanted: int) -> str:
    """A cell as a person reads it: ours ± std (published)."""
    digits = cell.column.digits
    published = ""
    if cell.published is not None:
        published = f"({_number(cell.published, cell.column.published_digits)})"
    if cell.row.experiment is None or cell.verdict == NO_SUCH_NUMBER:
        return published or "–"
    if cell.ours is None:
        text = cell.verdict.partition(":")[0]  # the reason stands in the long table
    else:
        text = _number(cell.ours, digits)
        text += "" if cell.std is None else f" ± {_number(cell.std, digits)}"
        text += " bound" if cell.kind == "bound" else ""
        text += f" [{len(cell.seeds)} of {wanted} seeds]" if len(cell.seeds) < wanted else ""
    return f"{text} {published}".rstrip()


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def describe(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = (f"{k} {describe(v)}" for k, v in value.items() if v not in (None, "", [], {}))
        return ", ".join(parts)
    if isinstance(value, list | tuple):
        return ", ".join(describe(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


_DIGEST = re.compile(r"\b[0-9a-f]{13,}\b")


def short_digests(text: str) -> str:
    """The text with every checksum cut to twelve digits."""
    return _DIGEST.sub(lambda found: found[0][:12], text)


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(item.split())}" for item in items)


def _first_lines(table: Table) -> list[str]:
    """What a reader must know of the profile before the first number."""
    seeds = " ".join(str(seed) for seed in table.seeds)
    told = bool(table.spec.published)
    full = "budgets and data as published" if told else "the full budget; nothing is published"
    first = f"**Profile `{table.profile}`**" + (
        f": {full}. Seeds: {seeds}."
        if table.profile == "paper"
        else f": **not a reproduction.** Budgets or data differ from the publication, so no number"
        f" below reproduces a published one. Seeds: {seeds}."
    )
    lines = [first]
    if table.released:
        lines.append(
            "**Released weights**: ours are the models that the authors trained and released, "
            "evaluated by this code; nothing was trained here."
        )
    return lines


def _legend(table: Table) -> list[str]:
    """What the cells show: one line, or a line a column where columns have metrics of their own."""
    spec = table.spec
    spread = " ± sample standard deviation over the seeds" if len(table.seeds) > 1 else ""
    cell = f"Each cell: ours{spread} (published)."
    if spec.one_metric:
        return [f"`{spec.metric}` in {spec.unit}, {spec.direction} is better. {cell}"]
    quoted = ""
    if any(row.experiment is None for row in spec.rows):
        quoted = " A row with numbers in brackets alone is quoted only."
    return [
        f"{cell}{quoted} The columns:",
        bullets(_column_line(table, column) for column in spec.columns),
    ]


def _column_line(table: Table, column: ColumnSpec) -> str:
    cells = table.of_column(column)
    unit = next((cell.unit for cell in cells if cell.unit and cell.kind != "score"), "")
    line = f"{column.label}: `{column.metric}`{f' in {unit}' if unit else ''}"
    line += f", {column.direction} is better"
    estimators = distinct(cell.estimator for cell in cells if cell.estimator)
    if any(cell.kind == "score" for cell in cells) and len(estimators) > 1:
        return line  # each says what belongs to its run alone; the protocol stands below
    return f"{line}; ours: {' | '.join(estimators)}" if estimators else line


def _grid(table: Table) -> str:
    spec = table.spec
    lines = [
        [
            row.label,
            *(cell_text(table.cells[row.name, c.name], len(table.seeds)) for c in spec.columns),
        ]
        for row in spec.rows
    ]
    floors = [_column_floor(table, column.name) for column in spec.columns]
    if any(floors):
        texts = ("" if f is None else distinct(_number(v, 4) for v in f) for f in floors)
        lines.append(["entropy (floor)", *(" to ".join(text) for text in texts)])
    return markdown_grid(_header(spec), lines, _numeric(spec))


def _header(spec: TableSpec) -> list[str]:
    return ["", *(column.label for column in spec.columns)]


def _numeric(spec: TableSpec) -> range:
    return range(1, len(spec.columns) + 1)


def _conditions(table: Table) -> list[str]:
    """What the numbers depend on beside the models: protocols of scores, data, weights."""
    protocols = distinct(
        f"{column.label}: {describe(protocol_of(metric))}"
        for column in table.spec.columns
        for cell in table.of_column(column)
        for metric in cell.metrics
        if metric.protocol
    )
    data = distinct(
        f"{record.data}: {describe({k: v for k, v in record.provenance.items() if k != 'name'})}"
        for record in table.records
        if record.provenance
    )
    weights = distinct(
        f"{cell.row.label}, {record.data}: {describe(_weights(record))}"
        for cell in table.cells.values()
        for record in cell.records
        if record.weights
    )
    blocks = []
    for title, lines in (
        ("Protocol of the scores:", protocols),
        ("Data:", data),
        ("Released weights:", weights),
    ):
        if lines:
            blocks += [title, bullets(map(short_digests, lines))]
    return blocks


def _weights(record: Record) -> dict[str, Any]:
    """What is said of released weights: their file by its name, wherever it lies."""
    named = record.weights.get("path")
    return {**record.weights, **({"path": Path(str(named)).name} if named else {})}


def _every_cell(table: Table) -> list[str]:
    spec = table.spec
    tolerances = distinct(column.tolerance for column in spec.columns)
    most = f"{tolerances[0]:.3f} {spec.unit} at most"
    if not spec.one_metric or len(tolerances) > 1:
        each = (f"{c.label} {c.tolerance:g}" for c in spec.columns)
        most = f"its column's tolerance at most ({', '.join(each)})"
    long = []
    for cell in table.cells.values():
        digits = cell.column.published_digits
        quoted = "; ".join(
            f"{_number(quote.value, digits)} ({quote.source})" for quote in cell.quoted
        )
        long.append([*_fields(table, cell).values(), quoted])
    flush = [CSV_FIELDS.index(f) for f in ("published", "ours", "std", "delta", "floor")]
    return [
        "## Every cell",
        f"`delta` is ours − published. `reproduced` allows ours to be worse by {most}; a quoted "
        "value is never the basis of a verdict.",
        markdown_grid([*CSV_FIELDS, "quoted"], long, flush),
        *_left_out(table),
    ]


def _left_out(table: Table) -> list[str]:
    """What could not enter a cell, and why."""

    def told(attribute: str) -> list[str]:
        return [
            f"{cell.row.name} / {cell.column.name}, {text}"
            for cell in table.cells.values()
            for text in getattr(cell, attribute)
        ]

    blocks = []
    for title, lines in (
        ("Missing metrics:", told("missing")),
        ("Refused records:", told("refusals")),
        ("Unreadable records of no known cell:", table.problems),
    ):
        if lines:
            blocks += [title, bullets(lines)]
    return blocks


def _run_facts(table: Table) -> list[str]:
    spec, cells = table.spec, table.cells
    blocks = ["## Runs"]
    if table.records:
        times = [
            [row.label, *(duration(cells[row.name, c.name].wall_time_s) for c in spec.columns)]
            for row in spec.rows
            if row.experiment is not None
        ]
        blocks += [
            "Wall time of a run, mean over the seeds:",
            markdown_grid(_header(spec), times, _numeric(spec)),
        ]
    else:
        blocks.append("No run entered this table.")
    facts = [f"Commit: {', '.join(f'`{c}`' for c in table.commits)}"] if table.commits else []
    facts += [
        f"Machine: {text}" for text in distinct(describe(r.machine) for r in table.records) if text
    ]
    versions = distinct(
        ", ".join(f"{k} {r.versions[k]}" for k in ("python", "torch") if k in r.versions)
        for r in table.records
    )
    facts += [f"Versions: {text}" for text in versions if text]
    return [*blocks, bullets(facts)] if facts else blocks


def _source_lines(spec: TableSpec) -> list[str]:
    """The sources, and, where there are several of published values, which row has which."""
    blocks = ["## Sources", bullets(f"{key}: {text}" for key, text in spec.sources.items())]
    if len({quote.source for quote in spec.published}) > 1:
        labels = {row.name: row.label for row in spec.rows}
        whose = distinct((labels[quote.row], quote.source) for quote in spec.published)
        blocks.append(f"Published values: {', '.join(f'{row} ({key})' for row, key in whose)}.")
    return blocks


def render_markdown(
    table: Table, *, command: str, figures: Mapping[str, str | Path] | None = None
) -> str:
    """The table as a Markdown page.

    `command` regenerates it; `figures` maps a caption to a file, relative to the page.
    """
    spec = table.spec
    blocks = [f"# {spec.title}", *_first_lines(table), *_legend(table), _grid(table)]
    blocks += _conditions(table)
    if spec.orderings:
        caution = (
            ""
            if table.profile == "paper"
            else f" (profile {table.profile}: says nothing about the publication)"
        )
        blocks += [f"Orderings{caution}:", bullets(ordering_lines(table))]
    if table.warnings:
        blocks += ["Warnings:", bullets(table.warnings)]
    if figures:
        links = (f"![{caption}]({Path(file).as_posix()})" for caption, file in figures.items())
        blocks += ["## Figures", *links]
    blocks += [*_every_cell(table), *_run_facts(table)]
    if spec.notes:
        blocks += ["## Notes", bullets(spec.notes)]
    if spec.sources:
        blocks += _source_lines(spec)
    blocks += ["## Regenerate", f"```sh\n{command}\n```"]
    return "\n\n".join(blocks) + "\n"


def write_markdown(
    table: Table,
    path: str | Path,
    *,
    command: str,
    figures: Mapping[str, str | Path] | None = None,
) -> Path:
    """Write `render_markdown` atomically; returns the path."""
    return write_text_atomic(path, render_markdown(table, command=command, figures=figures))
