"""Published values and ours: by row, and against the number of flow layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from surflow.reporting.figures import layout
from surflow.reporting.figures.layout import CAUTION, GREY, HOLLOW, INK, LINES
from surflow.reporting.spec import ColumnSpec
from surflow.reporting.statistics import LEVEL
from surflow.reporting.table import Cell, Table, distinct

PUBLISHED, OURS, OTHERS = LINES[1], LINES[0], GREY
WIDE_LABEL = 52  # letters; a panel's width


def published(table: Table, folder: Path) -> dict[str, str]:
    """Every value of the table, ours and theirs; known densities are shown as such."""
    empty = all(cell.ours is None and cell.published is None for cell in table.cells.values())
    if empty or table.of_known_densities or table.spec.layout == "comparison":
        return {}
    published_figure(table, folder / "published.png")
    return {"Published values and ours": "published.png"}


def means(table: Table, folder: Path) -> dict[str, str]:
    """The means of a comparison with their intervals over seeds."""
    if table.spec.layout != "comparison":
        return {}
    figure = _panels(table, lambda cell: cell.interval and cell.interval.high - cell.interval.mean)
    title = f"Means with {LEVEL:.0%} intervals over seeds"
    figure.suptitle(title, fontsize=9.5, color=INK)
    layout.save(figure, folder / "means.png")
    return {title: "means.png"}


def depths(table: Table, folder: Path) -> dict[str, str]:
    """Values against the depth, where rows name theirs."""
    cells = [cell for cell in table.cells.values() if cell.row.depth is not None]
    if all(cell.ours is None and cell.published is None for cell in cells):
        return {}
    depth_figure(table, folder / "depth.png")
    return {"Against the number of flow layers": "depth.png"}


def published_figure(table: Table, path: str | Path) -> Path:
    """Plot published values and ours: a panel a column, a line a row of the table.

    Ours: filled circles with bars, the sample standard deviation over the seeds, or the metric's
    standard error where there is one seed. Published: hollow diamonds; values of other sources:
    hollow squares. Rows that are quoted only have hollow marks only. Returns the path.
    """
    figure = _panels(table, spread)
    caution = layout.caution_of(table.records)
    cells = table.cells.values()
    ours = any(cell.ours is not None for cell in cells)
    both = "Published values and ours" if ours else "Published values; none of ours is there"
    theirs = any(cell.published is not None for cell in cells)
    title = both if theirs else "Ours; nothing is published"
    title += f"; {caution}" if caution else ""
    figure.suptitle(title, fontsize=9.5, color=CAUTION if caution else INK)
    layout.legend_below(figure, published_legend(table), 3, 8)
    return layout.save(figure, path)


def _panels(table: Table, bar: Callable[[Cell], float | None]) -> Figure:
    """A panel a column, a line a row; `bar` is the half-width of a cell's error bar."""
    spec = table.spec
    across = min(len(spec.columns), 3)
    down = math.ceil(len(spec.columns) / across)
    height = down * (0.34 * len(spec.rows) + 1.0) + 0.8
    size = (1.6 + 3.1 * across, height)
    figure, panels = layout.sheet_of(down, across, len(spec.columns), size)
    for index, (axes, column) in enumerate(zip(panels, spec.columns, strict=True)):
        published_panel(axes, table, column, bar)
        axes.set_yticks(range(len(spec.rows)))
        axes.set_yticklabels([row.label for row in spec.rows] if index % across == 0 else [])
    return figure


def published_panel(
    axes: Axes, table: Table, column: ColumnSpec, bar: Callable[[Cell], float | None]
) -> None:
    cells = table.of_column(column)
    unit = next((cell.unit for cell in cells if cell.unit and cell.kind != "score"), "")
    seen = False
    for line, cell in enumerate(cells):
        if cell.published is not None:
            axes.plot(cell.published, line, marker="D", color=PUBLISHED, **HOLLOW)
        for quote in cell.quoted:
            axes.plot(quote.value, line, marker="s", color=OTHERS, **HOLLOW)
        if cell.ours is not None:
            bars = {"xerr": bar(cell), "capsize": 3, "elinewidth": 1.2}
            axes.errorbar(cell.ours, line, fmt="o", color=OURS, ms=5.5, zorder=4, **bars)
        seen |= cell.ours is not None or cell.published is not None or bool(cell.quoted)
    axes.set_title("\n".join(textwrap.wrap(column.label, 36)), fontsize=9.5, color=INK)
    name = f"{column.metric} ({unit})" if unit else column.metric
    better = f"{column.direction} is better"
    wide = len(name) + len(better) > WIDE_LABEL
    axes.set_xlabel(f"{name},{chr(10) if wide else ' '}{better}", fontsize=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.margins(x=0.12)
    layout.plot_axes(axes)
    if not seen:
        axes.set_xticks([])
        layout.say(axes, "not run", 0.5, 0.5, ha="center", va="center", size=10)


def spread(cell: Cell) -> float | None:
    """The half-width of a cell's error bar; None where nothing is known of it."""
    if cell.std is not None:
        return cell.std
    errors = [metric.standard_error for metric in cell.metrics]
    return errors[0] if len(errors) == 1 else None


def published_legend(table: Table, cells: Sequence[Cell] | None = None) -> list[Line2D]:
    """What each mark is, of those that the figure has; `cells` None: all of the table."""
    cells = list(table.cells.values()) if cells is None else cells
    ours = "ours, released weights" if table.released else "ours"
    if any(cell.std is not None for cell in cells):
        ours += " (bar: standard deviation over seeds)"
    elif any(spread(cell) is not None for cell in cells):
        ours += " (bar: standard error)"
    marks = (
        (any(c.ours is not None for c in cells), "o", OURS, OURS, ours),
        (any(c.published is not None for c in cells), "D", PUBLISHED, "white", "published"),
        (any(c.quoted for c in cells), "s", OTHERS, "white", "quoted from others"),
    )
    return [
        Line2D([], [], ls="none", marker=mark, color=color, mfc=face, ms=6, label=label)
        for there, mark, color, face, label in marks
        if there
    ]


def depth_points(table: Table, column: ColumnSpec) -> dict[str, list[tuple[int, Cell]]]:
    """The cells of a column by family, each list by depth; a row of depth 0 is first in every one.

    Rows without a depth are left out; with a row of depth 0 alone its label is the family.
    """
    cells = [cell for cell in table.of_column(column) if cell.row.depth is not None]
    points = sorted(((cell.row.depth, cell) for cell in cells), key=lambda point: point[0])
    none = [(depth, cell) for depth, cell in points if depth == 0]
    families = distinct(cell.row.family for cell in cells if cell.row.family)
    if not families:
        return {cell.row.label: none for _, cell in none}
    return {
        family: none + [point for point in points if point[1].row.family == family]
        for family in families
    }


def depth_figure(table: Table, path: str | Path) -> Path:
    """Plot likelihoods and bounds against the number of flow layers: a panel a metric of the table,
    a line a family of flows.

    Marks are those of `published_figure`, in the family's colour. The row without flow layers is
    the first of every line. Returns the path. Raises ValueError where no row has a depth.
    """
    if all(row.depth is None for row in table.spec.rows):
        raise ValueError(f"{table.spec.path}: no row has a 'depth', expected one for depth_figure")
    columns = [c for c in table.spec.columns if _is_likelihood(table, c)] or table.spec.columns[:1]
    across = min(len(columns), 2)
    down = math.ceil(len(columns) / across)
    caution = layout.caution_of(table.records)
    names = list(depth_points(table, columns[0]))
    height = 3.0 * down + 0.5 + 0.2 * math.ceil((len(names) + 3) / 3 / across)
    figure, panels = layout.sheet_of(down, across, len(columns), (4.9 * across, height))
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for axes, column in zip(panels, columns, strict=True):
        _depth_panel(axes, table, column)
    lines = [
        Line2D([], [], color=color, lw=1.4, label=name)
        for name, color in zip(names, _colors(len(names)), strict=True)
    ]
    cells = [cell for column in columns for cell in table.of_column(column)]
    marks = published_legend(table, [cell for cell in cells if cell.row.depth is not None])
    for mark in marks:  # the colours are those of the families here
        mark.set(color=INK, mfc="white" if mark.get_mfc() == "white" else INK)
    layout.legend_below(figure, [*lines, *marks], 3 if across == 2 else 2, 8)
    layout.warn(figure, caution)
    return layout.save(figure, path)


def _is_likelihood(table: Table, column: ColumnSpec) -> bool:
    """Whether a column's numbers, ours or published, are likelihoods or bounds on them."""
    cells = [cell for cell in table.of_column(column) if cell.row.depth is not None]
    kinds = {cell.kind for cell in cells if cell.ours is not None}
    told = any(cell.published is not None or cell.quoted for cell in cells)
    return "score" not in kinds and (bool(kinds) or told)


def _colors(count: int) -> list[str]:
    return [LINES[i % len(LINES)] for i in range(count)]


def _depth_panel(axes: Axes, table: Table, column: ColumnSpec) -> None:
    families = depth_points(table, column)
    seen: set[int] = set()
    unit = ""
    for points, color in zip(families.values(), _colors(len(families)), strict=True):
        ours = [(depth, cell) for depth, cell in points if cell.ours is not None]
        if len(ours) > 1 or (ours and ours[0][0]):
            depths = [depth for depth, _ in ours]
            axes.plot(depths, [cell.ours for _, cell in ours], color=color, lw=1.2)
        for depth, cell in points:
            ink = color if depth else INK  # what is in every family has no colour of one
            if cell.published is not None:
                axes.plot(depth, cell.published, marker="D", color=ink, **HOLLOW)
            for quote in cell.quoted:
                axes.plot(depth, quote.value, marker="s", color=ink, **HOLLOW)
            if cell.ours is not None:
                bars = {"yerr": spread(cell), "capsize": 3, "elinewidth": 1.2}
                axes.errorbar(depth, cell.ours, fmt="o", color=ink, ms=5, zorder=4, **bars)
            if cell.ours is not None or cell.published is not None or cell.quoted:
                seen.add(depth)
                unit = unit or cell.unit
    axes.set_title("\n".join(textwrap.wrap(column.label, 44)), fontsize=9.5, color=INK)
    axes.set_xlabel("flow layers", fontsize=9, color=INK)
    unit = unit or column.unit or ""
    name = f"{column.metric} ({unit})" if unit else column.metric
    axes.set_ylabel(f"{name}\n{column.direction} is better", fontsize=8, color=INK)
    axes.set_xticks(sorted(seen))
    axes.margins(x=0.06, y=0.12)
    layout.plot_axes(axes)
    if not seen:
        axes.set_yticks([])
        layout.say(axes, "not run", 0.5, 0.5, ha="center", va="center", size=10)
