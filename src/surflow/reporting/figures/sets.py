"""Sets of points: clouds of data and of models side by side, from `points.npz`."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from surflow.record import Record
from surflow.reporting.figures import layout
from surflow.reporting.figures.layout import INK, LINES
from surflow.reporting.table import Table

CLOUDS = 25
"""Of a panel of a table's figure."""

PANEL = 3.1  # inches


def cloud_panel(axes: Axes, clouds: np.ndarray, width: float, color: str) -> int:
    """Plot sets of points, (M, N, 2), as a square of little frames of [0, width]², row by row.

    Returns how many points lie outside their frame; they are left out.
    """
    across = math.ceil(math.sqrt(len(clouds)))
    down = math.ceil(len(clouds) / across)
    pitch = 1.08 * width
    numbers = np.arange(len(clouds))
    corners = pitch * np.stack([numbers % across, down - 1 - numbers // across], 1)
    inside = ((clouds >= 0) & (clouds <= width)).all(2)
    points = (clouds + corners[:, None])[inside]
    for x, y in corners:
        edge = [x, x + width, x + width, x, x], [y, y, y + width, y + width, y]
        axes.plot(*edge, color="#dddddd", lw=0.5, zorder=1)
    axes.scatter(*points.T, s=180 / (across * width), color=color, linewidths=0, zorder=2)
    margin = 0.04 * pitch
    right, top = (pitch * count - 0.08 * width + margin for count in (across, down))
    axes.set(xlim=(-margin, right), ylim=(-margin, top), aspect="equal")
    axes.set_axis_off()
    return int((~inside).sum())


def clouds_figure(
    clouds: dict[str, np.ndarray], width: float, path: str | Path, title: str = ""
) -> Path:
    """Plot a panel of clouds for every entry, by its name. Returns the path."""
    figure = Figure(figsize=(PANEL * len(clouds), PANEL + 0.45), layout="constrained")
    panels = figure.subplots(1, len(clouds), squeeze=False)[0]
    for index, (axes, (name, sets)) in enumerate(zip(panels, clouds.items(), strict=True)):
        left_out = cloud_panel(axes, sets, width, INK if index == 0 else LINES[0])
        axes.set_title(name, fontsize=10, color=INK)
        if left_out:
            _below(axes, f"{left_out} of {sets.shape[0] * sets.shape[1]} points outside")
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    return layout.save(figure, path)


def set_figure(table: Table, path: str | Path) -> Path:
    """Plot clouds of points: a row a dataset, the data and then the models that were run.

    From `points.npz` of the cells' first runs; under a panel stand its run and its scores a point.
    Returns the path. Raises ValueError where no run has such a file, or one is damaged.
    """
    files = layout.run_files(table, "points.npz")
    datasets = [d for d in next(iter(files.values())) if any(row[d] for row in files.values())]
    if not datasets:
        raise ValueError("set_figure: expected a run with points.npz, got none")
    rows = [label for label, found in files.items() if any(found.values())]
    across = len(rows) + 1
    size = (PANEL * across, (PANEL + 0.95) * len(datasets) + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(datasets), across, squeeze=False)
    for line, dataset in zip(panels, datasets, strict=True):
        found = {row: files[row][dataset] for row in rows}
        first = layout.load_arrays(next(filter(None, found.values())), ARRAYS)
        cloud_panel(line[0], first["data"][:CLOUDS], float(first["width"]), INK)
        line[0].set_title(f"data: {dataset}", fontsize=10, color=INK)
        for index, (axes, row) in enumerate(zip(line[1:], rows, strict=True)):
            axes.set_title("\n".join(textwrap.wrap(row, 34)), fontsize=10, color=INK)
            if found[row] is None:
                layout.not_run(axes)
                continue
            arrays = layout.load_arrays(found[row], ARRAYS)
            shown = arrays["samples"][:CLOUDS]
            color = LINES[index % len(LINES)]
            left_out = cloud_panel(axes, shown, float(arrays["width"]), color)
            said = _said(layout.record_of(found[row]))
            if left_out:
                said.append(f"{left_out} of {shown.shape[0] * shown.shape[1]} points outside")
            _below(axes, "\n".join(said))
    layout.warn(figure, layout.caution_of(table.records))
    return layout.save(figure, path)


ARRAYS = ("samples", "data", "width")


def _said(record: Record | None) -> list[str]:
    """The run, and its scores a point."""
    if record is None:
        return []
    lines = [f"seed {record.seed}, profile {record.profile}"]
    for name, metric in record.metrics.items():
        if name.startswith("test/point_"):
            sign = "≥" if metric.kind == "bound" else "="
            words = name.removeprefix("test/point_").removesuffix("_nats").replace("_", "-")
            words = words.upper() if metric.kind == "bound" else words
            lines.append(f"log p / N {sign} {metric.value:.3f} nats ({words})")
    return lines


def _below(axes: Axes, text: str) -> None:
    layout.say(axes, text, 0.5, -0.02, ha="center", va="top", size=7.5)
