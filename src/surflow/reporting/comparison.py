"""The layout `comparison`: means over seeds, and their differences from the first row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surflow.record import SCORES_NAME, Record
from surflow.reporting import statistics
from surflow.reporting.grid import conditions, floor_lines, header, run_facts
from surflow.reporting.question import BUDGET
from surflow.reporting.statistics import FEW, LEVEL, POWER, Interval
from surflow.reporting.table import Cell, Table, distinct
from surflow.reporting.text import closing, csv_text, figure_links, markdown_grid, number, titled

DIFFERENCE = ("difference", "difference_low", "difference_high", "over", "p", "p_holm", "p_signs")
DIFFERENCE += ("could_be_shown", "outcome")
CSV_FIELDS = ("row", "column", "metric", "unit", "estimator", "seeds", "mean", "std", "low", "high")
CSV_FIELDS += (*DIFFERENCE, *BUDGET, "profile", "commit")


@dataclass(frozen=True)
class Difference:
    """A cell less that of the first row in its column.

    `over` says what the pairs are, seeds or test points; `interval` is of the mean difference; `p`
    and `p_signs` are of the t test and of the flips of signs, `p_holm` is `p` adjusted for the rows
    of the column; `smallest` is what so many seeds show with power 0.8, None for test points.
    """

    over: str = ""
    interval: Interval | None = None
    p: float | None = None
    p_signs: float | None = None
    p_holm: float | None = None
    smallest: float | None = None

    def outcome(self, cell: Cell) -> str:
        """What is decided, in words."""
        if self.interval is None or self.p_holm is None:
            return "not decided" if self.over else ""
        points = " on these points" if self.smallest is None else ""
        if self.p_holm < 1 - LEVEL:
            worse = cell.column.worse_by(self.interval.mean, 0.0) > 0
            return f"{'worse' if worse else 'better'}{points}"
        shown = points or f", {number(self.smallest, cell.digits)} could be shown"
        return f"no difference found{shown}"


def differences(table: Table) -> dict[tuple[str, str], Difference]:
    """Every cell but those of the first row against it, column by column."""
    first, *others = table.spec.rows
    found = {}
    for column in table.spec.columns:
        reference = table.cells[first.name, column.name]
        keys = [(row.name, column.name) for row in others]
        found |= {key: difference(table.cells[key], reference) for key in keys}
        for over_points in (True, False):
            same = [k for k in keys if found[k].p is not None]
            same = [k for k in same if (found[k].smallest is None) == over_points]
            adjusted = statistics.holm([found[key].p for key in same])
            found |= {k: replace(found[k], p_holm=p) for k, p in zip(same, adjusted, strict=True)}
    return found


def difference(cell: Cell, reference: Cell) -> Difference:
    """Paired by seed; by test point where both have one seed in common and the points are known."""
    seeds = [seed for seed in cell.seeds if seed in reference.seeds]
    values = statistics.differences(cell.values, reference.values)
    if len(seeds) == 1:
        pair = [record for c in (cell, reference) for record in c.records if record.seed in seeds]
        points = [_scores(record, cell.column.metric) for record in pair]
        if None not in points and points[0][1:] == points[1][1:]:
            values = np.subtract(points[0][0], points[1][0], dtype=np.float64)
            over = f"{len(values)} test points of seed {seeds[0]}"
            return Difference(over, statistics.of_mean(values), statistics.paired_t_p(values))
    if not seeds:
        return Difference("no common seed" if cell.records else "")
    tests = statistics.paired_t_p(values), statistics.sign_flip_p(values)
    smallest = statistics.smallest_found(values)
    over = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return Difference(over, statistics.of_mean(values), *tests, smallest=smallest)


def _scores(record: Record, metric: str) -> tuple[np.ndarray, int, object] | None:
    """The scores of the test points, how many, and what tells which points they are."""
    path = record.run_dir / SCORES_NAME
    if record.path.stem != "record" or not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        if metric not in file.files:
            return None
        scores = file[metric]
    return scores, len(scores), record.provenance.get("splits", {}).get("test")


def _lines(table: Table) -> list[list[str]]:
    """The label of each row, and its cells such as "3.0250 ± 0.0012 [3]"."""
    lines = []
    for row in table.spec.rows:
        line = [row.label]
        for cell in (table.cells[row.name, column.name] for column in table.spec.columns):
            wide = cell.interval
            half = f" ± {number(wide.high - wide.mean, cell.digits)}" if wide else ""
            bound = " bound" if cell.kind == "bound" else ""
            text = f"{number(cell.ours, cell.digits)}{half}{bound} [{len(cell.records)}]"
            line.append(text if cell.records else "–")
        lines.append(line)
    return lines


def _fields(table: Table) -> list[dict[str, str]]:
    """The fields of `CSV_FIELDS`, a line a cell with records."""
    against, lines = differences(table), []
    for key, cell in ((key, cell) for key, cell in table.cells.items() if cell.records):
        found = against.get(key, Difference())
        mean, gap, budget = cell.interval, found.interval, table.budgets[key]
        values = {
            "mean": cell.ours,
            "std": cell.std,
            "low": mean and mean.low,
            "high": mean and mean.high,
            "difference": gap and gap.mean,
            "difference_low": gap and gap.low,
            "difference_high": gap and gap.high,
            "could_be_shown": found.smallest,
        }
        known = {n: v if v is not None and math.isfinite(v) else None for n, v in values.items()}
        ps = {name: getattr(found, name) for name in DIFFERENCE if name.startswith("p")}
        lines.append(
            {
                "row": cell.row.label,
                "column": cell.column.label,
                "metric": cell.column.metric,
                "unit": cell.unit,
                "estimator": cell.estimator,
                "seeds": " ".join(map(str, cell.seeds)),
                **{n: number(v, cell.digits, sign=n in DIFFERENCE[:3]) for n, v in known.items()},
                "over": found.over,
                **{name: "" if p is None else f"{p:.2g}" for name, p in ps.items()},
                "outcome": found.outcome(cell),
                **{name: number(budget[name], int(name.endswith("_s"))) for name in BUDGET},
                "profile": table.profile,
                "commit": " ".join(cell.commits),
            }
        )
    return lines


def render_csv(table: Table) -> str:
    """The table as CSV: a line a cell with its mean, its difference and its budget."""
    return csv_text(CSV_FIELDS, _fields(table))


def _grid(lines: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    """Some fields as Markdown."""
    names = ("column", "row", *names)
    flush = [i for i, name in enumerate(names) if i > 1 and name not in ("over", "outcome")]
    titles = [name.replace("_", " ") for name in names]
    return markdown_grid(titles, [[line[name] for name in names] for line in lines], flush)


def render_markdown(
    table: Table, *, command: str, figures: Mapping[str, str | Path] | None = None
) -> str:
    """The table as Markdown. `command` regenerates it; `figures` are files in its folder."""
    spec, lines, fields = table.spec, _lines(table), _fields(table)
    places = [column.label for column in spec.columns]
    compared = [f for place in places for f in fields if f["column"] == place and f["over"]]
    estimators = distinct(f"{line['column']}: {line['estimator']}" for line in fields)
    blocks = [
        f"# {spec.title}",
        f"`{spec.metric}` in {spec.unit}, {spec.direction} is better. Each cell: mean ± half of "
        f"the {LEVEL:.0%} interval of the mean over seeds (t) [number of seeds]. One seed has no "
        f"interval. Profile: {table.profile}.",
        markdown_grid(header(spec), lines + floor_lines(table), range(1, len(lines[0]))),
        *titled("Warnings:", table.warnings),
    ]
    if compared:
        blocks += [
            f"## Differences from {spec.rows[0].label}",
            f"Each row less {spec.rows[0].label}, paired by seed, with the {LEVEL:.0%} interval. "
            "`p`: paired t test, two-sided. `p holm`: adjusted for the rows of a column; the "
            f"outcome goes by it. `p signs`: all flips of signs, up to {FEW} seeds; at least "
            "2^(1 − n) of n seeds. `could be shown`: the smallest difference that so many seeds "
            f"show with power {POWER} at level {1 - LEVEL:.2f}; a smaller one could not have been "
            "found. Of one seed, the interval is over test points, not over trainings.",
            _grid(compared, DIFFERENCE),
        ]
    blocks += [*figure_links(figures), "## Budgets", _grid(fields, BUDGET)]
    blocks += [*titled("Estimators:", estimators), *conditions(table)]
    blocks += titled("Left out, unreadable:", table.problems)
    return "\n\n".join([*blocks, *run_facts(table), *closing(table, command)]) + "\n"


def summary(table: Table) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and lines of the table as text."""
    return f"{table.spec.title} ({table.spec.unit})", header(table.spec), _lines(table)
