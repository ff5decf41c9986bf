"""`table.yaml` and run records in; verdicts, CSV and Markdown out.

A number enters a table only with the hash of the configuration that the table asks for today; what
is stale, incomplete or of another profile is refused, and its cell says why.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surflow.reporting.records import Record, RecordError, write_text_atomic

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
_SLACK = 1e-9  # float noise allowed at the edge of a tolerance, in the unit of the metric


@dataclass(frozen=True)
class RowSpec:
    """One model of the table. `target_above_floor` is in the unit of the metric."""

    name: str
    label: str
    experiment: str
    overrides: tuple[str, ...] = ()
    target_above_floor: float | None = None


@dataclass(frozen=True)
class ColumnSpec:
    """One dataset of the table and the overrides that select it."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quote:
    """A number of somebody else's for one cell; `source` is a key of `TableSpec.sources`."""

    row: str
    column: str
    value: float
    source: str


@dataclass(frozen=True)
class Ordering:
    """The claim that row `better` beats row `worse` in every column."""

    better: str
    worse: str


@dataclass(frozen=True)
class TableSpec:
    """The content of one `table.yaml`; `tolerance` and all values are in `unit`.

    `figure` is "comparison" (models side by side, a row of panels a column of the table) or "each"
    (a picture of its own for every cell, where the cells have data of their own). `layout` is
    "grid" (a cell a number) or "bounds" (a row a model: bounds beside the likelihood).
    """

    path: Path
    artefact: str
    title: str
    metric: str
    unit: str
    direction: str
    tolerance: float
    rows: tuple[RowSpec, ...]
    columns: tuple[ColumnSpec, ...]
    sources: Mapping[str, str]
    published: tuple[Quote, ...] = ()
    quoted: tuple[Quote, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    notes: tuple[str, ...] = ()
    figure: str = "comparison"
    layout: str = "grid"


@dataclass(frozen=True)
class Cell:
    """One cell: mean `ours` and sample standard deviation `std` over the accepted `records`.

    `ours` is None where nothing was accepted; `verdict` then is ``not run`` or
    ``refused: <reason>``. `refusals` lists what was refused, seed by seed, also beside a number.
    """

    row: RowSpec
    column: ColumnSpec
    published: float | None
    quoted: tuple[Quote, ...]
    ours: float | None = None
    std: float | None = None
    delta: float | None = None
    floor: float | None = None
    kind: str = ""
    estimator: str = ""
    verdict: str = NOT_RUN
    wall_time_s: float | None = None
    records: tuple[Record, ...] = ()
    refusals: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds behind `ours`."""
        return tuple(record.seed for record in self.records)

    @property
    def commits(self) -> tuple[str, ...]:
        """The distinct short commits behind `ours`."""
        return distinct(record.short_commit for record in self.records)


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


def distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


# --------------------------------------------------------------------------- reading table.yaml


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a mapping with the same key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} appears twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Fields:
    """Strict access to one mapping of the YAML file; an unknown key is an error."""

    def __init__(self, path: Path, where: str, value: Any, known: Sequence[str]) -> None:
        self.path, self.where = path, where
        if not isinstance(value, dict):
            raise self.error(f"must be a mapping, got {value!r}")
        self.value = value
        for key in value:
            if key not in known:
                raise self.error(f"unknown key {key!r}; known keys: {', '.join(known)}")

    def error(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}: {self.where}{' ' if self.where else ''}{reason}")

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"needs {key!r}, a non-empty string; got {value!r}")
        return value.strip()

    def number(self, key: str, least: float | None = None) -> float:
        value = self.value.get(key)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or (least is not None and value < least):
            want = "a finite number" + ("" if least is None else f", {least:g} or more")
            raise self.error(f"needs {key!r}, {want}; got {value!r}")
        return float(value)

    def items(self, key: str, required: bool = False) -> list:
        value = self.value.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or (required and not value):
            raise self.error(f"needs {key!r}, a{' non-empty' * required} list; got {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.items(key)
        for item in value:
            if not isinstance(item, str):
                raise self.error(f"{key!r} must hold strings, got {item!r}")
        return tuple(value)


_TABLE_KEYS = (
    "artefact",
    "title",
    "metric",
    "unit",
    "direction",
    "tolerance",
    "rows",
    "columns",
    "sources",
    "published",
    "quoted",
    "orderings",
    "notes",
    "figure",
    "layout",
)
_ROW_KEYS = ("name", "label", "experiment", "overrides", "target_above_floor")
_COLUMN_KEYS = ("name", "label", "overrides")
_QUOTE_KEYS = ("row", "column", "value", "source")


def load_spec(path: str | Path) -> TableSpec:
    """Read `table.yaml` strictly.

    Raises `ValueError` (one line: file, place, what is wrong, what would be right) for a missing
    file, broken YAML, an unknown or missing key, a cell given twice, an unknown row or column, and
    a value without a source.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; an artefact's table.yaml belongs there") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None

    top = _Fields(path, "", content, _TABLE_KEYS)
    direction = top.text("direction")
    if direction not in ("lower", "higher"):
        raise top.error(f"'direction' must be lower or higher, got {direction!r}")
    figure = top.text("figure") if "figure" in top.value else "comparison"
    if figure not in ("comparison", "each"):
        raise top.error(f"'figure' must be comparison or each, got {figure!r}")
    layout = top.text("layout") if "layout" in top.value else "grid"
    if layout not in ("grid", "bounds"):
        raise top.error(f"'layout' must be grid or bounds, got {layout!r}")

    rows = []
    for index, item in enumerate(top.items("rows", required=True)):
        row = _Fields(path, f"rows[{index}]", item, _ROW_KEYS)
        target = None
        if "target_above_floor" in row.value:
            target = row.number("target_above_floor", least=0)
            if direction != "lower":
                raise row.error("'target_above_floor' needs direction: lower")
        rows.append(
            RowSpec(
                name=row.text("name"),
                label=row.text("label"),
                experiment=row.text("experiment"),
                overrides=row.texts("overrides"),
                target_above_floor=target,
            )
        )
    columns = []
    for index, item in enumerate(top.items("columns", required=True)):
        column = _Fields(path, f"columns[{index}]", item, _COLUMN_KEYS)
        columns.append(
            ColumnSpec(column.text("name"), column.text("label"), column.texts("overrides"))
        )
    for what, entries in (("row", rows), ("column", columns)):
        for attribute in ("name", "label"):
            values = [getattr(entry, attribute) for entry in entries]
            for value in values:
                if values.count(value) > 1:
                    raise top.error(f"{what} {attribute} {value!r} appears twice")
    names = {"row": [row.name for row in rows], "column": [column.name for column in columns]}

    source_value = top.value.get("sources")
    sources = _Fields(
        path,
        "sources",
        {} if source_value is None else source_value,
        list(source_value) if isinstance(source_value, dict) else (),
    )
    sources = {str(key): sources.text(key) for key in sources.value}

    def quotes(key: str) -> tuple[Quote, ...]:
        found: dict[tuple, Quote] = {}
        for index, item in enumerate(top.items(key)):
            fields = _Fields(path, f"{key}[{index}]", item, _QUOTE_KEYS)
            quote = Quote(
                fields.text("row"),
                fields.text("column"),
                fields.number("value"),
                fields.text("source"),
            )
            for what in ("row", "column"):
                if getattr(quote, what) not in names[what]:
                    raise fields.error(
                        f"unknown {what} {getattr(quote, what)!r}; known: {', '.join(names[what])}"
                    )
            if quote.source not in sources:
                raise fields.error(
                    f"unknown source {quote.source!r}; known: {', '.join(sources) or 'none'}"
                )
            cell = (quote.row, quote.column) + ((quote.source,) if key == "quoted" else ())
            if cell in found:
                raise fields.error(f"repeats cell {' / '.join(cell)}; give each cell once")
            found[cell] = quote
        return tuple(found.values())

    orderings = []
    for index, item in enumerate(top.items("orderings")):
        fields = _Fields(path, f"orderings[{index}]", item, ("better", "worse"))
        ordering = Ordering(fields.text("better"), fields.text("worse"))
        for name in (ordering.better, ordering.worse):
            if name not in names["row"]:
                raise fields.error(f"unknown row {name!r}; known: {', '.join(names['row'])}")
        orderings.append(ordering)

    return TableSpec(
        path=path,
        artefact=top.text("artefact"),
        title=top.text("title"),
        metric=top.text("metric"),
        unit=top.text("unit"),
        direction=direction,
        tolerance=top.number("tolerance", least=0),
        rows=tuple(rows),
        columns=tuple(columns),
        sources=sources,
        published=quotes("published"),
        quoted=quotes("quoted"),
        orderings=tuple(orderings),
        notes=tuple(note.strip() for note in top.texts("notes")),
        figure=figure,
        layout=layout,
    )


# --------------------------------------------------------------------------- filling the table


def verdict_of(
    spec: TableSpec,
    row: RowSpec,
    *,
    profile: str,
    ours: float,
    published: float | None,
    floor: float | None,
    done: int,
    wanted: int,
) -> str:
    """The verdict on one number (in the unit of the metric) from `done` of `wanted` seeds."""
    if profile != "paper":
        return f"not a reproduction (profile {profile})"
    if published is not None:
        worse = ours - published if spec.direction == "lower" else published - ours
        within = worse <= spec.tolerance + _SLACK
        text = "reproduced" if within else f"worse by {worse:.3f}"
    elif row.target_above_floor is None:
        text = "published value not available"
    elif floor is None:
        text = "floor not available"
    elif ours - floor <= row.target_above_floor + _SLACK:
        text = f"within {row.target_above_floor:.3f} of the floor"
    else:
        text = f"{ours - floor:.3f} above the floor, target {row.target_above_floor:.3f}"
    return text if done == wanted else f"{done} of {wanted} seeds: {text}"


def _refusal(
    spec: TableSpec, row: RowSpec, record: Record, wanted: str | None, profile: str
) -> tuple[int, str] | None:
    """Why a record may not enter its cell: (rank, reason), the lowest rank being the most telling.

    None if the record is good.
    """
    if record.profile != profile:
        return 4, f"profile {record.profile}, not {profile}"
    if record.status != "complete":
        return 0, f"run {record.status}, not complete"
    if record.experiment != row.experiment:
        return 2, f"experiment {record.experiment}, not {row.experiment}"
    if wanted is None:
        return 3, "no configuration known for this cell"
    if record.config_hash != wanted:
        return 2, f"stale config {record.config_hash}, now {wanted}"
    if spec.metric not in record.metrics:
        return 1, f"record has no {spec.metric}"
    if record.metrics[spec.metric].unit != spec.unit:
        return 1, f"{spec.metric} in {record.metrics[spec.metric].unit}, not {spec.unit}"
    return None


def build_table(
    spec: TableSpec,
    records: Iterable[Record | RecordError],
    expected: Mapping[tuple[str, str, int], str],
    profile: str,
    seeds: Sequence[int],
) -> Table:
    """Fill the table with the records that belong in it.

    `expected` maps (row, column, seed) to the config hash that the cell asks for. A record belongs
    to a cell by artefact, row, seed and its data being the column's name; where no column is named
    after its data, by that hash. Records of other artefacts, rows, columns or seeds are left alone.
    Raises `ValueError` where likelihoods and bounds would be averaged in one cell.
    """
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")
    rows = {row.name: row for row in spec.rows}
    columns = {column.name: column for column in spec.columns}
    good: dict[tuple[str, str, int], list[Record]] = {}
    bad: dict[tuple[str, str, int], list[tuple[int, str]]] = {}
    problems = []
    for item in records:
        if isinstance(item, RecordError):
            key = (item.row, item.data, item.seed)
            if item.artefact not in (None, spec.artefact):
                continue
            if item.artefact and item.row in rows and item.data in columns and item.seed in seeds:
                other = item.profile not in (None, profile)
                bad.setdefault(key, []).append((4 if other else 0, item.reason))
            else:
                problems.append(str(item))
            continue
        if item.artefact != spec.artefact or item.row not in rows or item.seed not in seeds:
            continue
        homes = [name for name in columns if name == item.data] or [
            name
            for name in columns
            if expected.get((item.row, name, item.seed)) == item.config_hash
        ]
        for name in homes:
            key = (item.row, name, item.seed)
            why = _refusal(spec, rows[item.row], item, expected.get(key), profile)
            if why is None:
                good.setdefault(key, []).append(item)
            else:
                bad.setdefault(key, []).append(why)

    published = {(quote.row, quote.column): quote.value for quote in spec.published}
    warnings: list[str] = []
    cells = {}
    for row in spec.rows:
        for column in spec.columns:
            used: list[Record] = []
            refusals: list[tuple[int, int, str]] = []
            for seed in seeds:
                key = (row.name, column.name, seed)
                found = good.get(key, [])
                if len(found) == 1:
                    used += found
                elif found:
                    places = ", ".join(str(record.run_dir) for record in found)
                    why = f"{len(found)} runs of one configuration ({places}); keep one"
                    refusals.append((0, seed, why))
                else:
                    refusals += [(rank, seed, why) for rank, why in bad.get(key, [])]
            cells[row.name, column.name] = _fill_cell(
                spec,
                row,
                column,
                used,
                sorted(refusals),
                published.get((row.name, column.name)),
                profile,
                len(seeds),
                warnings,
            )
    table = Table(spec, profile, seeds, cells, tuple(problems), tuple(warnings))
    more = []
    if len(table.commits) > 1:
        more.append(f"Mixed commits: {', '.join(table.commits)}.")
    for column in spec.columns:
        low, high = _column_floor(table, column.name) or (0.0, 0.0)
        if high - low > 5e-5 and spec.figure != "each":  # else each row has data of its own
            more.append(f"{column.label}: the runs name floors from {low:.4f} to {high:.4f}.")
    return Table(spec, profile, seeds, cells, tuple(problems), (*more, *warnings))


def _fill_cell(
    spec: TableSpec,
    row: RowSpec,
    column: ColumnSpec,
    used: list[Record],
    refusals: list[tuple[int, int, str]],
    published: float | None,
    profile: str,
    wanted: int,
    warnings: list[str],
) -> Cell:
    quoted = tuple(q for q in spec.quoted if (q.row, q.column) == (row.name, column.name))
    texts = tuple(f"seed {seed}: {why}" for _, seed, why in refusals)
    if not used:
        verdict = f"refused: {refusals[0][2]}" if refusals else NOT_RUN
        return Cell(row, column, published, quoted, verdict=verdict, refusals=texts)

    metrics = [record.metrics[spec.metric] for record in used]
    kinds = distinct(metric.kind for metric in metrics)
    if len(kinds) > 1:
        seen = ", ".join(f"seed {r.seed} {m.kind}" for r, m in zip(used, metrics, strict=True))
        raise ValueError(
            f"{spec.artefact}, cell {row.name} / {column.name}: {spec.metric} mixes kinds ({seen});"
            " a likelihood and a bound may not be averaged, evaluate every seed the same way"
        )
    values = [metric.value for metric in metrics]
    ours = statistics.fmean(values)
    floors = [r.floor[spec.metric].value for r in used if spec.metric in r.floor]
    floor = statistics.fmean(floors) if floors else None
    errors = [metric.standard_error for metric in metrics]
    if floor is not None and None not in errors:
        error = math.sqrt(sum(e * e for e in errors)) / len(errors)
        below = floor - ours if spec.direction == "lower" else ours - floor
        if below > 3 * error + 1e-4:
            warnings.append(
                f"{row.label} / {column.label}: {ours:.4f} passes its floor {floor:.4f} by more"
                " than 3 standard errors, which no normalised density can."
            )
    estimator = "; ".join(distinct(metric.estimator for metric in metrics))
    if kinds[0] == "bound" and "bound" not in estimator:
        estimator = f"bound: {estimator}"
    times = [record.wall_time_s for record in used if record.wall_time_s is not None]
    return Cell(
        row,
        column,
        published,
        quoted,
        ours=ours,
        std=statistics.stdev(values) if len(values) > 1 else None,
        delta=None if published is None else ours - published,
        floor=floor,
        kind=kinds[0],
        estimator=estimator,
        verdict=verdict_of(
            spec,
            row,
            profile=profile,
            ours=ours,
            published=published,
            floor=floor,
            done=len(used),
            wanted=wanted,
        ),
        wall_time_s=statistics.fmean(times) if times else None,
        records=tuple(used),
        refusals=texts,
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
    lower = table.spec.direction == "lower"
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
            holds = better < worse if lower else better > worse
            checked, held = checked + 1, held + holds
            sign = "<" if better < worse else ">" if better > worse else "="
            word = "holds" if holds else "FAILS"
            parts.append(f"{column.label} {word} ({better:.3f} {sign} {worse:.3f})")
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
    return {
        "row": cell.row.name,
        "column": cell.column.name,
        "metric": table.spec.metric,
        "unit": table.spec.unit,
        "estimator": cell.estimator,
        "published": _number(cell.published),
        "ours": _number(cell.ours),
        "std": _number(cell.std),
        "delta": _number(cell.delta, sign=True),
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
    if cell.ours is None:
        text = cell.verdict.partition(":")[0]  # the reason stands in the long table
    else:
        text = _number(cell.ours) + ("" if cell.std is None else f" ± {_number(cell.std)}")
        text += " bound" if cell.kind == "bound" else ""
        text += f" [{len(cell.seeds)} of {wanted} seeds]" if len(cell.seeds) < wanted else ""
    return text if cell.published is None else f"{text} ({_number(cell.published)})"


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


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(item.split())}" for item in items)


def render_markdown(
    table: Table, *, command: str, figures: Mapping[str, str | Path] | None = None
) -> str:
    """The table as a Markdown page.

    `command` regenerates it; `figures` maps a caption to a file, relative to the page.
    """
    spec = table.spec
    cells = table.cells
    seeds = " ".join(str(seed) for seed in table.seeds)
    paper = table.profile == "paper"
    first = f"**Profile `{table.profile}`**" + (
        f": budgets and data as published. Seeds: {seeds}."
        if paper
        else f": **not a reproduction.** Budgets or data differ from the publication, so no number"
        f" below reproduces a published one. Seeds: {seeds}."
    )
    spread = " ± sample standard deviation over the seeds" if len(table.seeds) > 1 else ""
    legend = (
        f"`{spec.metric}` in {spec.unit}, {spec.direction} is better. Each cell: ours{spread}"
        " (published)."
    )
    lines = [
        [
            row.label,
            *(cell_text(cells[row.name, c.name], len(table.seeds)) for c in spec.columns),
        ]
        for row in spec.rows
    ]
    floors = [_column_floor(table, column.name) for column in spec.columns]
    if any(floors):
        texts = ("" if f is None else distinct(_number(v, 4) for v in f) for f in floors)
        lines.append(["entropy (floor)", *(" to ".join(text) for text in texts)])
    numeric = range(1, len(spec.columns) + 1)
    header = ["", *(column.label for column in spec.columns)]
    blocks = [f"# {spec.title}", first, legend, markdown_grid(header, lines, numeric)]

    if spec.orderings:
        caution = "" if paper else f" (profile {table.profile}: says nothing about the publication)"
        blocks += [f"Orderings{caution}:", bullets(ordering_lines(table))]
    if table.warnings:
        blocks += ["Warnings:", bullets(table.warnings)]
    if figures:
        links = (f"![{caption}]({Path(file).as_posix()})" for caption, file in figures.items())
        blocks += ["## Figures", *links]

    long = []
    for cell in cells.values():
        quoted = "; ".join(f"{_number(quote.value)} ({quote.source})" for quote in cell.quoted)
        long.append([*_fields(table, cell).values(), quoted])
    flush = [CSV_FIELDS.index(f) for f in ("published", "ours", "std", "delta", "floor")]
    blocks += [
        "## Every cell",
        f"`delta` is ours − published. `reproduced` allows ours to be worse by {spec.tolerance:.3f}"
        f" {spec.unit} at most; a quoted value is never the basis of a verdict.",
        markdown_grid([*CSV_FIELDS, "quoted"], long, flush),
    ]
    refused = [
        f"{cell.row.name} / {cell.column.name}, {text}"
        for cell in cells.values()
        for text in cell.refusals
    ]
    if refused:
        blocks += ["Refused records:", bullets(refused)]
    if table.problems:
        blocks += ["Unreadable records of no known cell:", bullets(table.problems)]

    blocks.append("## Runs")
    if table.records:
        times = [
            [row.label, *(duration(cells[row.name, c.name].wall_time_s) for c in spec.columns)]
            for row in spec.rows
        ]
        blocks += [
            "Wall time of a run, mean over the seeds:",
            markdown_grid(header, times, numeric),
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
    blocks += [bullets(facts)] if facts else []
    if spec.notes:
        blocks += ["## Notes", bullets(spec.notes)]
    if spec.sources:
        blocks += ["## Sources", bullets(f"{key}: {text}" for key, text in spec.sources.items())]
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
