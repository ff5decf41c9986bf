"""Gaps between bounds and likelihoods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from surflow.reporting.bounds import BoundsRow, bounds_rows
from surflow.reporting.figures.layout import INK, LINES, save
from surflow.reporting.table import Table

GAP_FLOOR = 1e-5  # nats; smaller gaps are shown at the edge


def gaps(table: Table, folder: Path) -> dict[str, str]:
    """The gaps of a table of bounds."""
    rows = bounds_rows(table) if table.spec.layout == "bounds" else []
    if not any(row.gaps for row in rows):
        return {}
    gap_figure(rows, folder / "gap.png", profile=table.profile)
    return {"Gap against the number of samples": "gap.png"}


def gap_figure(rows: Sequence[BoundsRow], path: str | Path, *, profile: str) -> Path:
    """Plot log p(x) - IWBO against K, a panel a model, with 95 % intervals; log-log.

    The scale ends at `GAP_FLOOR`: an interval that reaches below, or below zero, runs to the edge,
    and a mean below it is an open marker on the edge.
    """
    rows = [row for row in rows if row.gaps]
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.2 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    top = max(gap + 2 * error for row in rows for _, _, gap, error in row.gaps.values())
    for axes in panels.flat[len(rows) :]:
        axes.axis("off")
    for axes, row in zip(panels.flat, rows, strict=False):
        _gap_panel(axes, row, top)
    figure.supxlabel("K, samples of the importance-weighted bound", fontsize=9)
    figure.supylabel("log p(x) − IWBO, nats a point", fontsize=9)
    note = "" if profile == "paper" else f"  (profile {profile}: a smaller budget)"
    title = "Gap between bound and likelihood; bars: 95 %, open marker: below the scale"
    figure.suptitle(title + note, fontsize=9.5)
    return save(figure, path)


def _gap_panel(axes: Axes, row: BoundsRow, top: float) -> None:
    counts = sorted(row.gaps)
    for k in counts:
        _, _, gap, error = row.gaps[k]
        low, high = gap - 1.96 * error, gap + 1.96 * error
        axes.plot([k, k], [max(low, GAP_FLOOR), max(high, GAP_FLOOR)], color=LINES[0], lw=1.2)
        fill = LINES[0] if gap > GAP_FLOOR else "white"
        mark = {"marker": "o", "ms": 4.5, "color": LINES[0], "mfc": fill}
        axes.plot(k, max(gap, GAP_FLOOR), clip_on=False, zorder=3, **mark)
    shown = [(k, row.gaps[k][2]) for k in counts if row.gaps[k][2] > GAP_FLOOR]
    axes.plot(*zip(*shown, strict=True) if shown else ([], []), color=LINES[0], lw=0.8, alpha=0.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(GAP_FLOOR, 2 * max(top, 10 * GAP_FLOOR))
    axes.set_xlim(counts[0] / 1.5, counts[-1] * 1.5)
    axes.set_title(row.label, fontsize=8.5, color=INK)
    axes.grid(True, which="major", color="#dddddd", lw=0.5)
    axes.tick_params(labelsize=7, which="both")
    axes.spines[["top", "right"]].set_visible(False)
