"""The content of a `table.yaml`, read strictly: rows, columns, published values with sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from surflow.reading import Fields

DIRECTIONS = ("lower", "higher")
LAYOUTS = ("grid", "bounds")
PROFILES = ("paper", "short", "smoke")


@dataclass(frozen=True)
class RowSpec:
    """One model of the table. `target_excess`: nats over the entropy of the test draw.

    A row without `experiment` is quoted only: its values are somebody else's, and nothing of ours
    is run for it. `official` says that its authors have released weights. `family` and `depth`
    place a row in a figure against the number of flow layers; depth 0, without any, is in every
    family.
    """

    name: str
    label: str
    experiment: str | None = None
    overrides: tuple[str, ...] = ()
    target_excess: float | None = None
    official: bool = False
    family: str | None = None
    depth: int | None = None


@dataclass(frozen=True)
class ColumnSpec:
    """One dataset, or one metric of it, and the overrides that select it.

    `unit` None takes that of the records. `digits` are the decimals of our values,
    `published_digits` those of published ones. The column is there under `profiles`, and is about
    `rows` alone where it names any: other models have no such number.
    """

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    metric: str = ""
    unit: str | None = None
    direction: str = "lower"
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
    """A number of somebody else's for one cell; `source` is a key of `TableSpec.sources`.

    Where they ran several `seeds`, `value` is the mean and `std` the sample standard deviation.
    """

    row: str
    column: str
    value: float
    source: str
    std: float | None = None
    seeds: int | None = None

    @property
    def text(self) -> str:
        """As in "3.694 ± 0.036 (official, 16 seeds)"."""
        spread = "" if self.std is None else f" ± {self.std:g}"
        seeds = "" if self.seeds is None else f", {self.seeds} seeds"
        return f"{self.value:g}{spread} ({self.source}{seeds})"


@dataclass(frozen=True)
class Ordering:
    """The claim that row `better` beats row `worse` in every column."""

    better: str
    worse: str


@dataclass(frozen=True)
class Setting:
    """A setting of some rows and columns (empty: all): a key of the config, or words.

    It is compared with the `published` one, or with that of other rows: `than` is their values by
    name, None where they have no such key. `ours` None says that ours is the published one; else
    this is a deviation. One that `matters` decides the number: it is then not compared with the
    published one.
    """

    setting: str
    published: Any = None
    ours: Any = None
    matters: bool = False
    than: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def applies(self, row: str, column: str | None = None) -> bool:
        """Whether it is of a row, in a column or in any."""
        here = column is None or not self.columns or column in self.columns
        return here and (not self.rows or row in self.rows)

    @property
    def text(self) -> str:
        """Both values, as a line under the table."""
        return f"{self.setting}: published {self.published}, ours {self.ours}"


@dataclass(frozen=True)
class TableSpec:
    """The content of one `table.yaml`.

    Attributes:
        metric, unit, direction: what columns without their own take.
        runs: the artefact whose runs fill the cells: its own, or that of another table that reads
            other metrics of the same runs.
        layout: "grid" (a cell a number) or "bounds" (a row a model: bounds and the likelihood).
        profile: the profile that it is made under by default; "auto": paper on a GPU, else smoke.
    """

    path: Path
    artefact: str
    title: str
    metric: str | None
    unit: str | None
    direction: str | None
    rows: tuple[RowSpec, ...]
    columns: tuple[ColumnSpec, ...]
    sources: dict[str, str]
    published: tuple[Quote, ...] = ()
    quoted: tuple[Quote, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    settings: tuple[Setting, ...] = ()
    notes: tuple[str, ...] = ()
    layout: str = "grid"
    runs: str = ""
    profile: str = "paper"

    @property
    def one_metric(self) -> bool:
        """Whether every column shows the table's own metric."""
        return all(column.metric == self.metric for column in self.columns)

    @property
    def deviations(self) -> tuple[Setting, ...]:
        """The settings that are not the published ones."""
        return tuple(s for s in self.settings if s.ours is not None and not s.than)

    @property
    def own_data(self) -> bool:
        """Whether no column chooses data: the rows have data of their own."""
        return not any(column.names_data for column in self.columns)

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
        published, quoted = (
            tuple(quote for quote in quotes if quote.column in names)
            for quotes in (self.published, self.quoted)
        )
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


_MEASURE = {
    "metric": lambda fields: fields.text("metric"),
    "unit": lambda fields: fields.text("unit"),
    "direction": lambda fields: fields.word("direction", DIRECTIONS),
}
"""What a column has of its own, or takes from the table."""

_TABLE_KEYS = tuple(f.name for f in dataclasses.fields(TableSpec) if f.name != "path")
_ROW_KEYS = tuple(f.name for f in dataclasses.fields(RowSpec))
_COLUMN_KEYS = tuple(f.name for f in dataclasses.fields(ColumnSpec))
_QUOTE_KEYS = tuple(f.name for f in dataclasses.fields(Quote))
_SETTING_KEYS = tuple(f.name for f in dataclasses.fields(Setting))
_ORDERING_KEYS = tuple(f.name for f in dataclasses.fields(Ordering))


def load_spec(path: str | Path) -> TableSpec:
    """Read `table.yaml` strictly.

    Raises `ValueError` (one line: file, place, what is wrong, what would be right) for a missing
    file, broken YAML, an unknown or missing key, a cell given twice, an unknown row or column, and
    a value without a source.
    """
    path = Path(path)
    top = Fields(_read_yaml(path), lambda reason: ValueError(f"{path}: {reason}"), "", _TABLE_KEYS)
    measure = {key: read(top) if key in top else None for key, read in _MEASURE.items()}
    rows = tuple(_row(item) for item in top.items("rows", _ROW_KEYS, required=True))
    names = {"row": [row.name for row in rows]}
    columns = tuple(
        _column(item, measure, names["row"])
        for item in top.items("columns", _COLUMN_KEYS, required=True)
    )
    names["column"] = [column.name for column in columns]
    for what, entries in (("row", rows), ("column", columns)):
        _check_distinct(top, what, entries)
    _check_places(top, rows)
    given = Fields(top.mapping("sources", {}), top.error, "sources")
    sources = {str(key): given.text(key) for key in given.content}
    artefact = top.text("artefact")
    return TableSpec(
        path=path,
        artefact=artefact,
        title=top.text("title"),
        **measure,
        rows=rows,
        columns=columns,
        sources=sources,
        published=_quotes(top, "published", names, sources),
        quoted=_quotes(top, "quoted", names, sources),
        orderings=_orderings(top, [row.name for row in rows if row.experiment]),
        settings=_settings(top, names),
        notes=tuple(note.strip() for note in top.texts("notes")),
        layout=top.word("layout", LAYOUTS, TableSpec.layout),
        runs=top.text("runs", artefact),
        profile=top.word("profile", (*PROFILES, "auto"), TableSpec.profile),
    )


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; an artefact's table.yaml belongs there") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None


def _row(fields: Fields) -> RowSpec:
    experiment = fields.text("experiment") if "experiment" in fields else None
    if experiment is None:
        for key in ("overrides", "target_excess", "official"):
            if key in fields:
                raise fields.error(f"{key!r} needs 'experiment': a row without one is quoted only")
    return RowSpec(
        name=fields.text("name"),
        label=fields.text("label"),
        experiment=experiment,
        overrides=fields.texts("overrides"),
        target_excess=fields.number("target_excess", None, least=0),
        official=fields.flag("official", False),
        **_place(fields),
    )


def _place(fields: Fields) -> dict[str, Any]:
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


def _check_places(top: Fields, rows: Sequence[RowSpec]) -> None:
    """One row for a place in the figure of depths."""
    found: dict[tuple[str | None, int], str] = {}
    for index, row in enumerate(rows):
        if row.depth is None:
            continue
        other = found.setdefault((row.family, row.depth), row.name)
        if other != row.name:
            family = f"family {row.family!r}, " if row.family else ""
            raise top.error(f"rows[{index}] repeats {family}depth {row.depth} of row {other!r}")


def _column(fields: Fields, table: dict[str, Any], rows: Sequence[str]) -> ColumnSpec:
    own = {key: read(fields) if key in fields else table[key] for key, read in _MEASURE.items()}
    if "metric" in fields and "unit" not in fields:
        own["unit"] = None  # another metric than the table's: of its own unit
    for key, value in own.items():
        if value is None and key != "unit":
            raise fields.error(f"needs {key!r}, of its own or of the table")
    digits = fields.whole("digits", ColumnSpec.digits, most=9)
    return ColumnSpec(
        name=fields.text("name"),
        label=fields.text("label"),
        overrides=fields.texts("overrides"),
        **own,
        digits=digits,
        published_digits=fields.whole("published_digits", digits, most=9),
        profiles=fields.texts("profiles", PROFILES) if "profiles" in fields else PROFILES,
        rows=fields.texts("rows", rows) if "rows" in fields else (),
    )


def _check_distinct(top: Fields, what: str, entries: Sequence[Any]) -> None:
    for attribute in ("name", "label"):
        values = [getattr(entry, attribute) for entry in entries]
        for value in values:
            if values.count(value) > 1:
                raise top.error(f"{what} {attribute} {value!r} appears twice")


def _quotes(
    top: Fields, key: str, names: dict[str, list[str]], sources: dict[str, str]
) -> tuple[Quote, ...]:
    found: dict[tuple, Quote] = {}
    for fields in top.items(key, _QUOTE_KEYS):
        quote = Quote(
            fields.text("row"),
            fields.text("column"),
            fields.number("value"),
            fields.text("source"),
            fields.number("std", None, least=0),
            fields.whole("seeds", None),
        )
        for what, known in (*names.items(), ("source", sources)):
            found_name = getattr(quote, what)
            if found_name not in known:
                told = ", ".join(known) or "none"
                raise fields.error(f"unknown {what} {found_name!r}; known: {told}")
        cell = (quote.row, quote.column) + ((quote.source,) if key == "quoted" else ())
        if cell in found:
            raise fields.error(f"repeats cell {' / '.join(cell)}; give each cell once")
        found[cell] = quote
    return tuple(found.values())


def _settings(top: Fields, names: dict[str, list[str]]) -> tuple[Setting, ...]:
    settings = []
    for fields in top.items("settings", _SETTING_KEYS):
        than = fields.mapping("than", {})
        for row in than:
            if row not in names["row"]:
                told = ", ".join(names["row"])
                raise fields.error(f"unknown row {row!r} in 'than'; known: {told}")
        if bool(than) == ("published" in fields):
            raise fields.error("needs either 'published' or 'than', the values of other rows")
        if than and (fields.content.get("ours") is None or "rows" not in fields):
            raise fields.error("'than' needs 'ours', the value that differs, and its 'rows'")
        if fields.flag("matters", False) and fields.content.get("ours") is None:
            raise fields.error("'matters' needs 'ours', the value that differs")
        places = {
            f"{what}s": fields.texts(f"{what}s", known) if f"{what}s" in fields else ()
            for what, known in names.items()
        }
        setting = fields.text("setting")
        content = {**fields.content, "setting": setting, "than": than, **places}
        settings.append(Setting(**content))
    return tuple(settings)


def _orderings(top: Fields, rows: Sequence[str]) -> tuple[Ordering, ...]:
    orderings = []
    for fields in top.items("orderings", _ORDERING_KEYS):
        ordering = Ordering(fields.text("better"), fields.text("worse"))
        for name in (ordering.better, ordering.worse):
            if name not in rows:
                raise fields.error(f"unknown row {name!r}; known, with runs: {', '.join(rows)}")
        orderings.append(ordering)
    return tuple(orderings)
