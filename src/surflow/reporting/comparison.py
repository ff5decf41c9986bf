"""The layout `comparison`: means over seeds, and their differences from the first row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surflow.record import SCORES_NAME, Record
from surflow.reporting import statistics
from surflow.reporting.grid import conditions, floor_lines, run_facts
from surflow.reporting.statistics import FEW, LEVEL, POWER, Interval
from surflow.reporting.table import Cell, Table, distinct
from surflow.reporting.text import (
    closing,
    csv_text,
    figure_links,
    markdown_grid,
    number,
    titled,
)


@dataclass(frozen=True)
class Difference:
    """A cell less that of the first row in its column, paired by seed, or by test point.

    Attributes:
        over: what the pairs are, in words; the reason where there is none.
        interval: of the mean difference; None without a pair.
        p, flip_p, holm_p: of the paired t test, of the flips of signs, and the former adjusted for
            the rows of the column; None where there is none.
        smallest: difference that so many seeds show with power 0.8; infinite for one.
    """

    cell: Cell
    over: str
    interval: Interval | None = None
    p: float | None = None
    flip_p: float | None = None
    holm_p: float | None = None
    smallest: float | None = None

    @property
    def outcome(self) -> str:
        """What is decided at the level of the intervals, in words."""
        if self.interval is None:
            return "not compared"
        if self.holm_p is None:
            return "not decided"
        points = "" if self.smallest is not None else " on these points"
        if self.holm_p < 1 - LEVEL:
            worse = self.cell.column.worse_by(self.interval.mean, 0.0) > 0
            return f"{'worse' if worse else 'better'}{points}"
        if self.smallest is None:
            return f"no difference found{points}"
        shown = number(self.smallest, self.cell.digits)
        return f"no difference found, of {shown} or more"


def differences(table: Table) -> list[Difference]:
    """Every row against the first one, column by column."""
    first, *others = table.spec.rows
    found = []
    for column in table.spec.columns:
        reference = table.cells[first.name, column.name]
        of_column = [_difference(table.cells[row.name, column.name], reference) for row in others]
        for points in (True, False):
            same = [d for d in of_column if d.p is not None and (d.smallest is None) == points]
            adjusted = dict(zip(map(id, same), statistics.holm([d.p for d in same]), strict=True))
            of_column = [replace(d, holm_p=adjusted.get(id(d), d.holm_p)) for d in of_column]
        found += of_column
    return found


def _difference(cell: Cell, reference: Cell) -> Difference:
    values = statistics.differences(cell.values, reference.values)
    if len(values) == 1:
        return _over_points(cell, reference)
    if not values:
        return Difference(cell, "no common seed")
    return Difference(
        cell,
        f"{len(values)} seeds",
        statistics.of_mean(values),
        statistics.paired_t_p(values),
        statistics.sign_flip_p(values),
        smallest=statistics.smallest_found(values),
    )


def _over_points(cell: Cell, reference: Cell) -> Difference:
    """The difference of one seed over the test points that both runs have scored."""
    import numpy as np

    (seed,) = set(cell.seeds) & set(reference.seeds)
    both = [next(r for r in c.records if r.seed == seed) for c in (cell, reference)]
    one, other = (_scores(record, cell.column.metric) for record in both)
    mean = cell.values[seed] - reference.values[seed]
    if (
        one is None
        or other is None
        or len(one) != len(other)
        or _points(both[0]) != _points(both[1])
    ):
        alone = Interval(mean, -math.inf, math.inf, 1)
        return Difference(cell, "1 seed", alone, smallest=math.inf)
    values = one.astype(np.float64) - other
    over = f"{len(values)} test points of seed {seed}"
    return Difference(cell, over, statistics.of_mean(values), statistics.paired_t_p(values))


def _scores(record: Record, metric: str):  # -> np.ndarray | None, and numpy is loaded late
    import numpy as np

    path = record.run_dir / SCORES_NAME
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return file[metric] if metric in file.files else None


def _points(record: Record) -> object:
    """What tells the test points of a run."""
    return record.data, record.provenance.get("splits", {}).get("test")


def _mean(cell: Cell) -> str:
    """Such as "3.0250 ± 0.0012 [3]"."""
    if cell.ours is None:
        return "–"
    wide = cell.interval
    spread = "" if wide is None else f" ± {number(wide.high - wide.mean, cell.digits)}"
    bound = " bound" if cell.kind == "bound" else ""
    return f"{number(cell.ours, cell.digits)}{spread}{bound} [{len(cell.records)}]"


def _lines(table: Table) -> list[list[str]]:
    columns = table.spec.columns
    return [
        [row.label, *(_mean(table.cells[row.name, column.name]) for column in columns)]
        for row in table.spec.rows
    ]


def _header(table: Table) -> list[str]:
    return ["", *(column.label for column in table.spec.columns)]


DIFFERENCE = ("difference", "difference_low", "difference_high", "over", "p", "p_holm", "p_signs")
DIFFERENCE += ("could_be_shown", "outcome")
BUDGET = ("parameters", "optimizer_steps", "samples_seen", "wall_time_s")
CSV_FIELDS = ("row", "column", "metric", "unit", "estimator", "seeds", "mean", "std", "low", "high")
CSV_FIELDS += (*DIFFERENCE, *BUDGET, "profile", "commit")
WORDS = ("row", "column", "metric", "unit", "estimator", "seeds", "over", "outcome")


def _fields(table: Table) -> list[dict[str, str]]:
    """The fields of `CSV_FIELDS`, a line a cell with records."""
    against = {id(found.cell): found for found in differences(table)}
    return [
        _fields_of(table, cell, key, against.get(id(cell), Difference(cell, "")))
        for key, cell in table.cells.items()
        if cell.records
    ]


def _fields_of(table: Table, cell: Cell, key: tuple[str, str], found: Difference) -> dict[str, str]:
    def shown(value: float | None, sign: bool = False) -> str:
        finite = value is not None and math.isfinite(value)
        return number(value, cell.digits, sign) if finite else ""

    mean, gap, budget = cell.interval, found.interval, table.budgets[key]
    ends = {"low": mean and mean.low, "high": mean and mean.high}
    gaps = {"difference": gap and gap.mean, "difference_low": gap and gap.low}
    gaps["difference_high"] = gap and gap.high
    ps = {"p": found.p, "p_holm": found.holm_p, "p_signs": found.flip_p}
    return {
        "row": cell.row.label,
        "column": cell.column.label,
        "metric": cell.column.metric,
        "unit": cell.unit,
        "estimator": cell.estimator,
        "seeds": " ".join(map(str, cell.seeds)),
        "mean": shown(cell.ours),
        "std": shown(cell.std),
        **{name: shown(value) for name, value in ends.items()},
        **{name: shown(value, sign=True) for name, value in gaps.items()},
        "over": found.over,
        **{name: "" if p is None else f"{p:.2g}" for name, p in ps.items()},
        "could_be_shown": shown(found.smallest),
        "outcome": found.outcome if found.over else "",
        **{name: number(getattr(budget, name), 0) for name in BUDGET},
        "profile": table.profile,
        "commit": " ".join(cell.commits),
    }


def render_csv(table: Table) -> str:
    """The table as CSV: a line a cell with its mean, its difference and its budget."""
    return csv_text(CSV_FIELDS, _fields(table))


def _grid(lines: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    """Some fields as Markdown."""
    flush = [index for index, name in enumerate(names) if name not in WORDS]
    header = [name.replace("_", " ") for name in names]
    return markdown_grid(header, [[line[name] for name in names] for line in lines], flush)


def render_markdown(
    table: Table, *, command: str, figures: Mapping[str, str | Path] | None = None
) -> str:
    """The table as Markdown. `command` regenerates it; `figures` are files in its folder."""
    spec, lines, fields = table.spec, _lines(table), _fields(table)
    grid = markdown_grid(_header(table), lines + floor_lines(table), range(1, len(lines[0])))
    estimators = distinct(f"{line['column']}: {line['estimator']}" for line in fields)
    blocks = [
        f"# {spec.title}",
        f"`{spec.metric}` in {spec.unit}, {spec.direction} is better. Each cell: mean ± half of "
        f"the {LEVEL:.0%} interval of the mean over seeds (t) [number of seeds]. One seed has no "
        f"interval. Profile: {table.profile}.",
        grid,
        *titled("Warnings:", table.warnings),
    ]
    if len(spec.rows) > 1:
        blocks += [
            f"## Differences from {spec.rows[0].label}",
            f"Each row less {spec.rows[0].label}, paired by seed, with the {LEVEL:.0%} interval. "
            "`p`: paired t test, two-sided. `p holm`: adjusted for the rows of a column; the "
            f"outcome goes by it. `p signs`: all flips of signs, up to {FEW} seeds; at least "
            "2^(1 − n) of n seeds. `could be shown`: the smallest difference that so many seeds "
            f"show with power {POWER} at level {1 - LEVEL:.2f}; a smaller one could not have been "
            "found. Of one seed, the interval is over test points, not over trainings.",
            _grid([line for line in fields if line["over"]], ("column", "row", *DIFFERENCE)),
        ]
    blocks += [*figure_links(figures), "## Budgets", _grid(fields, ("row", "column", *BUDGET))]
    blocks += [*titled("Estimators:", estimators), *conditions(table)]
    blocks += titled("Left out, unreadable:", table.problems)
    return "\n\n".join([*blocks, *run_facts(table), *closing(table, command)]) + "\n"


def summary(table: Table) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and lines of the table as text."""
    return f"{table.spec.title} ({table.spec.unit})", _header(table), _lines(table)
