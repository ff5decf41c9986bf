"""The content of a `table.yaml`, read strictly: rows, columns, published values with sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

DIRECTIONS = ("lower", "higher")
FIGURES = ("comparison", "each", "images", "vae", "sets")
LAYOUTS = ("grid", "bounds")
PROFILES = ("paper", "short", "smoke")


@dataclass(frozen=True)
class RowSpec:
    """One model of the table. `target_above_floor` is in the unit of the metric.

    A row without `experiment` is quoted only: its values are somebody else's, and nothing of ours
    is run for it. `official` says that its authors have released weights. `family` and `depth`
    place a row in a figure against the number of flow layers; depth 0, without any, is in every
    family.
    """

    name: str
    label: str
    experiment: str | None = None
    overrides: tuple[str, ...] = ()
    target_above_floor: float | None = None
    official: bool = False
    family: str | None = None
    depth: int | None = None


@dataclass(frozen=True)
class ColumnSpec:
    """One dataset, or one metric of it, and the overrides that select it.

    `tolerance` is in `unit`; `unit` None takes that of the records. `digits` are the decimals of
    our values, `published_digits` those of published ones. The column is there under `profiles`,
    and is about `rows` alone where it names any: other models have no such number.
    """

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    metric: str = ""
    unit: str | None = None
    direction: str = "lower"
    tolerance: float = 0.0
    digits: int = 3
    published_digits: int = 3
    profiles: tuple[str, ...] = PROFILES
    rows: tuple[str, ...] = ()

    def shows(self, row: str) -> bool:
        """Whether a model has the column's number."""
        return not self.rows or row in self.rows

    @property
    def data(self) -> str:
        """The name of its data: what its overrides choose, else its own name."""
        return self._chosen_data or self.name

    @property
    def names_data(self) -> bool:
        """Whether its overrides choose its data; else the rows may have data of their own."""
        return self._chosen_data is not None

    @property
    def _chosen_data(self) -> str | None:
        chosen = [o.removeprefix("data=") for o in self.overrides if o.startswith("data=")]
        return chosen[-1] if chosen else None

    def worse_by(self, ours: float, other: float) -> float:
        """By how much `ours` is worse than `other`; negative where it is better."""
        return ours - other if self.direction == "lower" else other - ours


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
    """The content of one `table.yaml`. Each column has its metric, unit, direction and tolerance;
    those of the table, where given, are what columns without their own take.

    `runs` is the artefact whose runs fill the cells: its own, or that of another table that reads
    other metrics of the same runs. `figure` is "comparison" (models side by side, a row of panels a
    column of the table), "each" (a picture of its own for every cell, where the cells have data of
    their own), "images" (grids of samples, and published values beside ours), "vae" (the same,
    with reconstructions, latents and the bound against the depth) or "sets" (clouds of points, and
    published values beside ours). `layout` is "grid" (a
    cell a number) or "bounds" (a row a model: bounds beside the likelihood).
    """

    path: Path
    artefact: str
    title: str
    metric: str | None
    unit: str | None
    direction: str | None
    tolerance: float | None
    rows: tuple[RowSpec, ...]
    columns: tuple[ColumnSpec, ...]
    sources: dict[str, str]
    published: tuple[Quote, ...] = ()
    quoted: tuple[Quote, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    notes: tuple[str, ...] = ()
    figure: str = "comparison"
    layout: str = "grid"
    runs: str = ""

    @property
    def one_metric(self) -> bool:
        """Whether every column shows the table's own metric."""
        return all(column.metric == self.metric for column in self.columns)

    def of_profile(self, profile: str) -> TableSpec:
        """The table as it is under a profile: its columns, their values, and the rows that have
        runs or values there.

        Raises:
            ValueError: where no column is.
        """
        columns = tuple(c for c in self.columns if profile in c.profiles)
        if not columns:
            raise ValueError(f"{self.path}: no column has {profile!r} among its profiles")
        names = {column.name for column in columns}

        def kept(quotes: tuple[Quote, ...]) -> tuple[Quote, ...]:
            return tuple(quote for quote in quotes if quote.column in names)

        published, quoted = kept(self.published), kept(self.quoted)
        told = {quote.row for quote in (*published, *quoted)}
        rows = tuple(row for row in self.rows if row.experiment or row.name in told)
        return replace(self, rows=rows, columns=columns, published=published, quoted=quoted)


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

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def error(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}: {self.where}{' ' if self.where else ''}{reason}")

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"needs {key!r}, a non-empty string; got {value!r}")
        return value.strip()

    def word(self, key: str, known: Sequence[str]) -> str:
        value = self.text(key)
        if value not in known:
            choice = f"{', '.join(known[:-1])} or {known[-1]}"
            raise self.error(f"{key!r} must be {choice}, got {value!r}")
        return value

    def number(self, key: str, least: float | None = None) -> float:
        value = self.value.get(key)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or (least is not None and value < least):
            want = "a finite number" + ("" if least is None else f", {least:g} or more")
            raise self.error(f"needs {key!r}, {want}; got {value!r}")
        return float(value)

    def whole(self, key: str, most: int | None = None) -> int:
        value = self.value.get(key)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not good or (most is not None and value > most):
            want = "0 or more" if most is None else f"from 0 to {most}"
            raise self.error(f"needs {key!r}, a whole number {want}; got {value!r}")
        return value

    def flag(self, key: str) -> bool:
        value = self.value.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key!r} must be true or false, got {value!r}")
        return value

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

    def words(self, key: str, known: Sequence[str]) -> tuple[str, ...]:
        found = self.texts(key)
        for item in found:
            if item not in known:
                raise self.error(f"{key!r} must hold some of {', '.join(known)}, got {item!r}")
        if not found:
            raise self.error(f"needs {key!r}, some of {', '.join(known)}")
        return found


_MEASURE = {
    "metric": lambda fields: fields.text("metric"),
    "unit": lambda fields: fields.text("unit"),
    "direction": lambda fields: fields.word("direction", DIRECTIONS),
    "tolerance": lambda fields: fields.number("tolerance", least=0),
}
"""What a column has of its own, or takes from the table."""

_TABLE_KEYS = (
    "artefact",
    "title",
    *_MEASURE,
    "rows",
    "columns",
    "sources",
    "published",
    "quoted",
    "orderings",
    "notes",
    "figure",
    "layout",
    "runs",
)
_ROW_KEYS = (
    "name",
    "label",
    "experiment",
    "overrides",
    "target_above_floor",
    "official",
    "family",
    "depth",
)
_COLUMN_KEYS = (
    "name",
    "label",
    "overrides",
    *_MEASURE,
    "digits",
    "published_digits",
    "profiles",
    "rows",
)
_QUOTE_KEYS = ("row", "column", "value", "source")


def load_spec(path: str | Path) -> TableSpec:
    """Read `table.yaml` strictly.

    Raises `ValueError` (one line: file, place, what is wrong, what would be right) for a missing
    file, broken YAML, an unknown or missing key, a cell given twice, an unknown row or column, and
    a value without a source.
    """
    path = Path(path)
    top = _Fields(path, "", _read_yaml(path), _TABLE_KEYS)
    measure = {key: read(top) if key in top else None for key, read in _MEASURE.items()}
    rows = [
        _row(_Fields(path, f"rows[{index}]", item, _ROW_KEYS))
        for index, item in enumerate(top.items("rows", required=True))
    ]
    named = [row.name for row in rows]
    columns = [
        _column(_Fields(path, f"columns[{index}]", item, _COLUMN_KEYS), measure, named)
        for index, item in enumerate(top.items("columns", required=True))
    ]
    for what, entries in (("row", rows), ("column", columns)):
        _check_distinct(top, what, entries)
    _check_places(top, rows)
    for index, row in enumerate(rows):
        if row.target_above_floor is not None and any(c.direction == "higher" for c in columns):
            raise top.error(f"rows[{index}] 'target_above_floor' needs direction: lower")
    sources = _sources(top)
    names = {"row": [row.name for row in rows], "column": [column.name for column in columns]}
    artefact = top.text("artefact")
    return TableSpec(
        path=path,
        artefact=artefact,
        title=top.text("title"),
        **measure,
        rows=tuple(rows),
        columns=tuple(columns),
        sources=sources,
        published=_quotes(top, "published", names, sources),
        quoted=_quotes(top, "quoted", names, sources),
        orderings=_orderings(top, [row.name for row in rows if row.experiment]),
        notes=tuple(note.strip() for note in top.texts("notes")),
        figure=top.word("figure", FIGURES) if "figure" in top else "comparison",
        layout=top.word("layout", LAYOUTS) if "layout" in top else "grid",
        runs=top.text("runs") if "runs" in top else artefact,
    )


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; an artefact's table.yaml belongs there") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None


def _row(fields: _Fields) -> RowSpec:
    experiment = fields.text("experiment") if "experiment" in fields else None
    if experiment is None:
        for key in ("overrides", "target_above_floor", "official"):
            if key in fields:
                raise fields.error(f"{key!r} needs 'experiment': a row without one is quoted only")
    target = None
    if "target_above_floor" in fields:
        target = fields.number("target_above_floor", least=0)
    return RowSpec(
        name=fields.text("name"),
        label=fields.text("label"),
        experiment=experiment,
        overrides=fields.texts("overrides"),
        target_above_floor=target,
        official=fields.flag("official"),
        **_place(fields),
    )


def _place(fields: _Fields) -> dict[str, Any]:
    """Where a row stands in the figure of depths, if it does."""
    if "depth" not in fields:
        if "family" in fields:
            raise fields.error("'family' needs 'depth', its number of flow layers")
        return {}
    depth = fields.whole("depth")
    if depth == 0 and "family" in fields:
        raise fields.error("'family' is not for depth 0: no layers are in every family")
    if depth and "family" not in fields:
        raise fields.error(f"depth {depth} needs 'family', the line of the figure it is on")
    return {"depth": depth, "family": fields.text("family") if depth else None}


def _check_places(top: _Fields, rows: Sequence[RowSpec]) -> None:
    """One row for a place in the figure of depths."""
    found: dict[tuple[str | None, int], str] = {}
    for index, row in enumerate(rows):
        if row.depth is None:
            continue
        other = found.setdefault((row.family, row.depth), row.name)
        if other != row.name:
            family = f"family {row.family!r}, " if row.family else ""
            raise top.error(f"rows[{index}] repeats {family}depth {row.depth} of row {other!r}")


def _column(fields: _Fields, table: dict[str, Any], rows: Sequence[str]) -> ColumnSpec:
    own = {key: read(fields) if key in fields else table[key] for key, read in _MEASURE.items()}
    if "metric" in fields and "unit" not in fields:
        own["unit"] = None  # another metric than the table's: of its own unit
    for key, value in own.items():
        if value is None and key != "unit":
            raise fields.error(f"needs {key!r}, of its own or of the table")
    digits = fields.whole("digits", 9) if "digits" in fields else ColumnSpec.digits
    published = fields.whole("published_digits", 9) if "published_digits" in fields else digits
    return ColumnSpec(
        name=fields.text("name"),
        label=fields.text("label"),
        overrides=fields.texts("overrides"),
        **own,
        digits=digits,
        published_digits=published,
        profiles=fields.words("profiles", PROFILES) if "profiles" in fields else PROFILES,
        rows=fields.words("rows", rows) if "rows" in fields else (),
    )


def _check_distinct(top: _Fields, what: str, entries: Sequence[Any]) -> None:
    for attribute in ("name", "label"):
        values = [getattr(entry, attribute) for entry in entries]
        for value in values:
            if values.count(value) > 1:
                raise top.error(f"{what} {attribute} {value!r} appears twice")


def _sources(top: _Fields) -> dict[str, str]:
    value = top.value.get("sources")
    value = {} if value is None else value
    fields = _Fields(top.path, "sources", value, list(value) if isinstance(value, dict) else ())
    return {str(key): fields.text(key) for key in fields.value}


def _quotes(
    top: _Fields, key: str, names: dict[str, list[str]], sources: dict[str, str]
) -> tuple[Quote, ...]:
    found: dict[tuple, Quote] = {}
    for index, item in enumerate(top.items(key)):
        fields = _Fields(top.path, f"{key}[{index}]", item, _QUOTE_KEYS)
        quote = Quote(
            fields.text("row"), fields.text("column"), fields.number("value"), fields.text("source")
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


def _orderings(top: _Fields, rows: Sequence[str]) -> tuple[Ordering, ...]:
    orderings = []
    for index, item in enumerate(top.items("orderings")):
        fields = _Fields(top.path, f"orderings[{index}]", item, ("better", "worse"))
        ordering = Ordering(fields.text("better"), fields.text("worse"))
        for name in (ordering.better, ordering.worse):
            if name not in rows:
                raise fields.error(f"unknown row {name!r}; known, with runs: {', '.join(rows)}")
        orderings.append(ordering)
    return tuple(orderings)
