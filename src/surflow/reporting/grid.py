"""The layout `grid`: a cell a number, as Markdown, CSV and text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from surflow.reporting.spec import ColumnSpec, Setting, TableSpec
from surflow.reporting.statistics import LEVEL
from surflow.reporting.table import NO_SUCH_NUMBER, Cell, Table, column_floor, distinct, protocol_of
from surflow.reporting.text import (
    bullets,
    closing,
    csv_text,
    describe,
    duration,
    figure_links,
    machine_facts,
    markdown_grid,
    number,
    short_digests,
    titled,
)
from surflow.reporting.verdicts import FEWEST, ordering_verdict

NUMBERS = ("published", "ours", "std", "delta", "floor", "excess", "excess_std")
CSV_FIELDS = ("row", "column", "metric", "unit", "estimator", *NUMBERS)
CSV_FIELDS += ("verdict", "seeds", "profile", "commit")


def ordering_lines(table: Table) -> list[str]:
    """One line for each claimed ordering: does it hold, column by column? Each metric once."""
    labels = {row.name: row.label for row in table.spec.rows}
    shown = {(column.metric, column.data): column for column in table.spec.columns}
    lines = []
    for ordering in table.spec.orderings:
        better, worse = ordering.better, ordering.worse
        parts = [
            f"{column.label} "
            + ordering_verdict(table.cells[better, column.name], table.cells[worse, column.name])
            for column in shown.values()
        ]
        lines.append(f"{labels[better]} better than {labels[worse]}: {'; '.join(parts)}.")
    return lines


def _fields(table: Table, cell: Cell) -> dict[str, str]:
    """The fields of `CSV_FIELDS` for one cell, as text."""
    digits, excess = cell.digits, cell.excess
    return {
        "row": cell.row.name,
        "column": cell.column.name,
        "metric": cell.column.metric,
        "unit": cell.unit,
        "estimator": cell.estimator,
        "published": number(cell.published, cell.column.published_digits),
        "ours": number(cell.ours, digits),
        "std": number(cell.std, digits),
        "delta": number(cell.delta, digits, sign=True),
        "floor": number(cell.floor, 4),
        "excess": number(excess.ours, excess.digits),
        "excess_std": number(excess.std, excess.digits),
        "verdict": cell.verdict,
        "seeds": " ".join(str(seed) for seed in cell.seeds),
        "profile": table.profile,
        "commit": " ".join(cell.commits),
    }


def render_csv(table: Table) -> str:
    """The table as CSV: a header of `CSV_FIELDS`, then one line a cell, row by row."""
    return csv_text(CSV_FIELDS, [_fields(table, cell) for cell in table.cells.values()])


def cell_text(cell: Cell, wanted: int) -> str:
    """A cell as a person reads it: ours ± std (published)."""
    digits = cell.digits
    published = ""
    if cell.published is not None:
        published = f"({number(cell.published, cell.column.published_digits)})"
    if cell.row.experiment is None or cell.verdict == NO_SUCH_NUMBER:
        return published or "–"
    if cell.ours is None:
        text = cell.verdict.partition(":")[0]  # the reason stands in the long table
    else:
        text = number(cell.ours, digits)
        text += "" if cell.spread is None else f" ± {number(cell.spread, digits)}"
        text += " bound" if cell.kind == "bound" else ""
        text += f" [{len(cell.seeds)} of {wanted} seeds]" if len(cell.seeds) < wanted else ""
    return f"{text} {published}".rstrip()


def _first_lines(table: Table) -> list[str]:
    """What a reader must know of the profile before the first number."""
    seeds = " ".join(str(seed) for seed in table.seeds)
    full = "budgets and data as published"
    if not table.spec.published:
        full = "the full budget; nothing is published"
    elif table.spec.deviations:
        full = "the full budget; the settings below differ from the published ones"
    first = f"**Profile `{table.profile}`**" + (
        f": {full}. Seeds: {seeds}."
        if table.profile == "paper"
        else f": **not a reproduction.** Budgets or data differ from the publication, so no number"
        f" below reproduces a published one. Seeds: {seeds}."
    )
    released = (
        "**Released weights**: ours are the models that the authors trained and released, "
        "evaluated by this code; nothing was trained here."
    )
    return [first, released] if table.released else [first]


def _legend(table: Table) -> list[str]:
    """What the cells show: one line, or a line a column where columns have metrics of their own."""
    spec = table.spec
    spread = " ± sample standard deviation over the seeds"
    points = "standard error over test points, which is no spread of trainings"
    if len(table.seeds) == 1:
        spread = f" ± {points}"
    cell = f"Each cell: ours{spread} (published)."
    if len(table.seeds) > 1 and any(len(cell.records) == 1 for cell in table.cells.values()):
        cell += f" Of a single seed, ± is the {points}."
    if spec.one_metric:
        return [f"`{spec.metric}` in {spec.unit}, {spec.direction} is better. {cell}"]
    alone = any(row.experiment is None for row in spec.rows)
    quoted = " A row with numbers in brackets alone is quoted only." if alone else ""
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


def _lines(table: Table) -> list[list[str]]:
    """The label of each row and the text of its cells."""
    columns, wanted = table.spec.columns, len(table.seeds)
    return [
        [row.label, *(cell_text(table.cells[row.name, c.name], wanted) for c in columns)]
        for row in table.spec.rows
    ]


def _grid(table: Table) -> str:
    spec, lines = table.spec, _lines(table) + floor_lines(table)
    return markdown_grid(header(spec), lines, range(1, len(spec.columns) + 1))


def _excess(table: Table) -> list[str]:
    """The excess over the entropy of the test draw: the rows and the data that have it."""
    cells = {key: cell.excess for key, cell in table.cells.items()}
    there = [key for key, cell in cells.items() if cell.records]
    rows = [row for row in table.spec.rows if any(row.name == name for name, _ in there)]
    shown = [c for c in table.spec.columns if any(c.name == name for _, name in there)]
    columns = {column.data: column for column in shown}.values()
    if not rows:
        return []
    wanted = len(table.seeds)
    lines = [
        [row.label, *(cell_text(cells[row.name, c.name], wanted) for c in columns)] for row in rows
    ]
    return [
        "Excess over the entropy of the test draw, nats: mean of log p(x) − log q(x) over the test "
        "points, p the density of the data. It has little of the noise of the draw.",
        markdown_grid(["", *(c.label for c in columns)], lines, range(1, len(columns) + 1)),
    ]


def floor_lines(table: Table) -> list[list[str]]:
    """The line of the floors; none where no run names one."""
    floors = [column_floor(table, column.name) for column in table.spec.columns]
    texts = ("" if f is None else distinct(number(v, 4) for v in f) for f in floors)
    return [["entropy (floor)", *(" to ".join(text) for text in texts)]] if any(floors) else []


def header(spec: TableSpec) -> list[str]:
    """The labels of the columns after an empty one."""
    return ["", *(column.label for column in spec.columns)]


def _not_run(table: Table, shown: Table) -> list[str]:
    """One line for the rows that were never run and have no published value."""
    rows = [row for row in table.spec.rows if row not in shown.spec.rows]
    if not rows:
        return []
    of_cost: dict[str, list[str]] = {}
    for row in rows:
        of_cost.setdefault(table.costs.get(row.name, "").rstrip("."), []).append(row.label)
    told = (" / ".join(labels) + (cost and f" ({cost})") for cost, labels in of_cost.items())
    names = ",".join(row.name for row in rows)
    return [f"Not run: {'; '.join(told)}. `ROWS={names}` after the command below runs them."]


def conditions(table: Table) -> list[str]:
    """What the numbers depend on besides the models: protocols of scores, data, weights."""
    protocols = distinct(
        f"{column.label}: {describe(protocol_of(metric))}"
        for column in table.spec.columns
        for cell in table.of_column(column)
        for metric in cell.metrics
        if metric.protocol
    )
    weights = distinct(
        f"{cell.row.label}, {record.data}: "
        + describe(
            {k: Path(str(v)).name if k == "path" and v else v for k, v in record.weights.items()}
        )
        for cell in table.cells.values()
        for record in cell.records
        if record.weights
    )
    return [
        *titled("Protocol of the scores:", [short_digests(line) for line in protocols]),
        *titled("Data:", _data(table)),
        *titled("Released weights:", [short_digests(line) for line in weights]),
    ]


def _data(table: Table) -> list[str]:
    """A line a dataset: its splits; where seeds draw their own, those of the first."""
    found: dict[str, dict[str, None]] = {}
    for record in table.records:
        told = describe({k: v for k, v in record.provenance.items() if k != "name"})
        if told:
            found.setdefault(record.data, {})[told] = None
    return [
        short_digests(f"{name}: {next(iter(told))}")
        + (f"; {len(told)} draws in all, see the records" if len(told) > 1 else "")
        for name, told in found.items()
    ]


def _placed(table: Table, settings: Iterable[Setting]) -> Iterator[tuple[Setting, str, str]]:
    """The settings that are of the table, with their rows and columns in words."""
    for setting in settings:
        rows = [row.label for row in table.spec.rows if setting.applies(row.name)]
        columns = [c.label for c in table.spec.columns if c.name in setting.columns]
        if rows and (columns or not setting.columns):
            yield setting, " / ".join(rows), f" ({', '.join(columns)})" if columns else ""


def _deviations(table: Table) -> list[str]:
    """A line a setting that is not the published one, with the rows and columns it is of."""
    return [
        f"{rows}{where}: {setting.text}{' (decides)' if setting.matters else ''}"
        for setting, rows, where in _placed(table, table.spec.deviations)
    ]


def _compared(table: Table) -> list[str]:
    """The settings of rows that are not those of others, a line a setting."""
    labels = {row.name: row.label for row in table.spec.rows}
    lines: dict[tuple[str, ...], list[str]] = {}
    compared = (setting for setting in table.spec.settings if setting.than)
    for setting, rows, where in _placed(table, compared):
        others = ", ".join(f"{labels.get(k, k)} {_word(v)}" for k, v in setting.than.items())
        key = (rows, setting.setting, others)
        lines.setdefault(key, []).append(f"{_word(setting.ours)}{where}")
    body = [[rows, name, ", ".join(ours), others] for (rows, name, others), ours in lines.items()]
    title = "Settings of rows that are not those of another:"
    return (
        [title, markdown_grid(["row", "setting", "value", "other row"], body, ())] if body else []
    )


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _every_cell(table: Table) -> list[str]:
    long = []
    for cell in table.cells.values():
        quoted = "; ".join(quote.text for quote in cell.quoted)
        long.append([*_fields(table, cell).values(), quoted])
    flush = [CSV_FIELDS.index(field) for field in NUMBERS]
    return [
        "## Every cell",
        f"`delta` is ours − published. `reproduced`: the published value lies in the {LEVEL:.0%} "
        "prediction interval for one more run of ours (t, s √(1 + 1/n)), widened by the rounding "
        f"of the published digits; fewer than {FEWEST} seeds decide nothing. A quoted value is "
        "never the basis of a verdict.",
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

    return [
        *titled("Missing metrics:", told("missing")),
        *titled("Refused records:", told("refusals")),
        *titled("Unreadable records of no known cell:", table.problems),
    ]


def run_facts(table: Table) -> list[str]:
    """Times, commits, machines and versions of the runs."""
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
            markdown_grid(header(spec), times, range(1, len(spec.columns) + 1)),
        ]
    else:
        blocks.append("No run entered this table.")
    facts = machine_facts(table)
    versions = distinct(
        ", ".join(f"{k} {r.versions[k]}" for k in ("python", "torch") if k in r.versions)
        for r in table.records
    )
    facts += [f"Versions: {text}" for text in versions if text]
    return [*blocks, bullets(facts)] if facts else blocks


def render_markdown(
    table: Table, *, command: str, figures: Mapping[str, str | Path] | None = None
) -> str:
    """The table as Markdown. `command` regenerates it; `figures` are files in its folder."""
    spec, shown = table.spec, table.without_empty_rows()
    blocks = [f"# {spec.title}", *_first_lines(table), *_legend(table), _grid(shown)]
    blocks += [*_excess(shown), *_not_run(table, shown), *conditions(table)]
    if spec.orderings:
        said = f" (profile {table.profile}: says nothing about the publication)"
        caution = "" if table.profile == "paper" else said
        how = f"mean difference, paired by seed, and its {LEVEL:.0%} interval"
        blocks += [f"Orderings ({how}){caution}:", bullets(ordering_lines(table))]
    if table.profile == "paper":  # the others differ by their budgets alone
        blocks += titled("Settings that are not the published ones:", _deviations(table))
        blocks += _compared(table)
    blocks += titled("Warnings:", table.warnings)
    blocks += [*figure_links(figures), *_every_cell(shown), *run_facts(shown)]
    return "\n\n".join([*blocks, *closing(table, command)]) + "\n"


def summary(table: Table) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and lines of the table as text."""
    spec = table.spec
    unit = f" ({spec.unit})" if spec.one_metric else ""
    return f"{spec.title}{unit}, profile {table.profile}", header(spec), _lines(table)
