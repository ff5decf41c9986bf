"""What the figures share: colours, files of runs, panels, saving."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from surflow.files import write_bytes
from surflow.record import RECORD_NAME, Record, load_record
from surflow.reporting.spec import ColumnSpec
from surflow.reporting.table import Table

Cells = Mapping[str, Mapping[str, "str | Path | None"]]
"""cells[row label][column label]: the file of a run, None where there is none."""

DPI = 120
PANEL = 2.15  # inches
INK, GREY = "#222222", "#8a8a8a"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
COLORMAP = "magma"
UNDEFINED = "#4f8f8f"  # colour of a density that is no number
DOTS = "#3b2a6b"  # colour of samples shown as points
CAUTION = "#b00020"
HOLLOW = {"ls": "none", "mfc": "white", "ms": 6.5, "mew": 1.3, "zorder": 3}  # of marks


def run_files(table: Table, name: str) -> dict[str, dict[str, Path | None]]:
    """The file `name` of the first accepted run of each cell: cells[row label][column label], None
    where there is no such run or file. Rows that are quoted only are left out."""
    cells: dict[str, dict[str, Path | None]] = {}
    columns = columns_of(table)
    for row in table.spec.rows:
        if row.experiment is None:
            continue
        files = cells.setdefault(row.label, {})
        for label, shown in columns.items():
            records = (table.cells[row.name, column.name].records[:1] for column in shown)
            found = (first.run_dir / name for record in records for first in record)
            files[label] = next(filter(Path.is_file, found), None)
    return cells


def columns_of(table: Table) -> dict[str, list[ColumnSpec]]:
    """The columns of each column label of `run_files`.

    Columns that show several metrics of the same data are one, named after it. Columns of known
    densities have their own labels.
    """
    if table.of_known_densities:
        return {column.label: [column] for column in table.spec.columns}
    own = next((record.data for record in table.records), "data")  # where the rows choose it
    columns: dict[str, list[ColumnSpec]] = {}
    for column in table.spec.columns:
        columns.setdefault(column.data if column.names_data else own, []).append(column)
    return columns


def any_file(files: Cells) -> bool:
    """Whether any cell has a file."""
    return any(file for row in files.values() for file in row.values())


def of_files(
    name: str, caption: str, picture: str, draw: Callable[[Table, Path], Any]
) -> Callable[[Table, Path], dict[str, str]]:
    """The figure of a table whose runs have the file `name`; none for another table."""

    def figure(table: Table, folder: Path) -> dict[str, str]:
        if not any_file(run_files(table, name)):
            return {}
        draw(table, folder / picture)
        return {caption: picture}

    return figure


def sheet_of(down: int, across: int, count: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure of `size` inches and the axes of its panels, row by row; unused ones are removed."""
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def show_density(axes: Axes, values: np.ndarray, extent: tuple[float, ...], **options: Any) -> Any:
    """Colours of values (X, Y), [i, j] at (x_i, y_j); those that are no number have their own."""
    return axes.imshow(
        np.ma.masked_invalid(values.T),
        origin="lower",
        extent=extent,
        interpolation="nearest",
        **{"cmap": colormaps[COLORMAP].with_extremes(bad=UNDEFINED), **options},
    )


def show_dots(axes: Axes, points: np.ndarray) -> None:
    """The first 5000 points, (N, 2), as dots."""
    axes.scatter(*points[:5000].T, s=1.6, alpha=0.45, color=DOTS, linewidths=0)


def legend_below(figure: Figure, handles: Sequence[Any], columns: int, size: float) -> None:
    """A legend without a frame, under the panels."""
    place = {"loc": "outside lower center", "frameon": False}
    figure.legend(handles=handles, ncols=columns, fontsize=size, **place)


def record_of(file: str | Path | None) -> Record | None:
    """The record of a run's file; None where there is no file or no record."""
    if file is None or not (Path(file).parent / RECORD_NAME).is_file():
        return None
    return load_record(Path(file).parent)


def existing(cells: Cells) -> dict[str, dict[str, Path | None]]:
    """The cells with every column in every row, None for files that are not there."""
    columns = dict.fromkeys(column for row in cells.values() for column in row)
    if not columns:
        raise ValueError("cells is empty: expected cells[row label][column label] = file or None")

    def path(file: str | Path | None) -> Path | None:
        return Path(file) if file is not None and Path(file).is_file() else None

    return {row: {c: path(files.get(c)) for c in columns} for row, files in cells.items()}


def caution_of(records: Iterable[Record | None]) -> str:
    """A line for runs of another profile than paper; empty where there is none."""
    profiles = sorted({record.profile for record in records if record} - {"paper"})
    return f"not a reproduction (profile {', '.join(profiles)})" if profiles else ""


def load_arrays(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of an npz, among them these."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, AttributeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{file}: not readable as npz ({error}); evaluate the run again") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(missing)}; evaluate the run again")
    return found


def load_picture(file: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of an npz over a 2-D grid, among them these, as floats."""
    arrays = load_arrays(file, ("grid_low", "grid_high", *names))
    found = {name: np.asarray(value, float) for name, value in arrays.items()}
    for name in ("grid_low", "grid_high"):
        found[name] = np.broadcast_to(found[name], (2,))
    return found


def extent_of(picture: Mapping[str, np.ndarray]) -> tuple[float, float, float, float]:
    """Left, right, low, high of a grid."""
    low, high = picture["grid_low"], picture["grid_high"]
    return low[0], high[0], low[1], high[1]


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all; returns the path."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())


def warn(figure: Figure, caution: str) -> None:
    """Write a caution, where there is one, over a figure."""
    if caution:
        figure.suptitle(caution, fontsize=9, color=CAUTION)


def frame(axes: Axes) -> None:
    """A thin frame without ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GREY)
        spine.set_linewidth(0.6)


def not_run(axes: Axes) -> None:
    """A panel of a run that is not there."""
    frame(axes)
    axes.set_facecolor("#f4f4f4")
    say(axes, "not run", 0.5, 0.5, ha="center", va="center", size=10)


def say(axes: Axes, text: str, x: float, y: float, **options: Any) -> None:
    """Write into a panel, at a place in parts of its sides."""
    axes.text(x, y, text, transform=axes.transAxes, **{"color": GREY, **options})


def plot_axes(axes: Axes) -> None:
    """Axes of a plot of numbers: a grid, small labels, no frame above and on the right."""
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def color_bar(figure: Figure, image: Any, axes: Axes, clipped: bool) -> Any:
    """A slim scale of colours; `clipped`: there are values above it."""
    bar = figure.colorbar(image, cax=axes, extend="max" if clipped else "neither")
    bar.outline.set_linewidth(0.5)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=7, length=2, width=0.5, color=GREY, labelcolor=INK, pad=2)
    return bar


class Sheet:
    """A sheet of square panels, a dataset a row: Data, then each model; a slim axis for a scale.

    All measures in inches. The caption under a panel is one small line, or as many as `lines`. More
    panels than `most` go on in further rows, each panel with its model's name above it.
    """

    LEFT, TOP, BOTTOM, GAP, CAPTION, LINE = 0.42, 0.38, 0.12, 0.10, 0.27, 0.16
    HEAD = 0.30  # above every row of panels that is not the first one of its dataset

    def __init__(
        self,
        cells: dict[str, dict[str, Path | None]],
        title: str,
        panel: float = PANEL,
        lines: int = 1,
        right: float = 0.62,
        most: int | None = None,
    ) -> None:
        self.panel = panel
        self.below = self.CAPTION + (lines - 1) * self.LINE
        self.models = list(cells)
        self.datasets = list(next(iter(cells.values())))
        self.top = self.TOP + (0.26 if title else 0.0)
        count = len(self.models) + 1
        self.deep = math.ceil(count / (most or count))  # rows of panels a dataset
        self.across = math.ceil(count / self.deep)
        self.head = self.HEAD if self.deep > 1 else 0.0
        self.width = self.LEFT + self.across * panel + (self.across - 1) * self.GAP + right
        down = len(self.datasets)
        rows = down * self.deep
        self.height = self.top + rows * (panel + self.below) + (rows - 1) * self.head + self.BOTTOM
        self.figure = Figure(figsize=(self.width, self.height))
        if title:
            y = 1 - 0.12 / self.height
            self.figure.text(0.5, y, title, ha="center", va="top", color=CAUTION, size=9)
        self.panels = [[self._panel(i, j) for j in range(count)] for i in range(down)]
        for panels in self.panels if self.head else self.panels[:1]:
            for axes, label in zip(panels, ["Data", *self.models], strict=True):
                axes.set_title(label, fontsize=11, color=INK, pad=6)
        for row, label in zip(self.panels, self.datasets, strict=True):
            row[0].set_ylabel(label, fontsize=11, color=INK, labelpad=7)

    def _bottom(self, line: int) -> float:
        step = self.panel + self.below + self.head
        return self.height - self.top - line * step - self.panel

    def _axes(self, x: float, line: int, width: float) -> Axes:
        w, h = self.width, self.height
        return self.figure.add_axes((x / w, self._bottom(line) / h, width / w, self.panel / h))

    def _panel(self, i: int, j: int) -> Axes:
        line, place = divmod(j, self.across)
        x = self.LEFT + place * (self.panel + self.GAP)
        axes = self._axes(x, i * self.deep + line, self.panel)
        frame(axes)
        return axes

    def caption(self, i: int, j: int, text: str) -> None:
        axes = self.panels[i][j]
        axes.set_xlabel(text, fontsize=8.5, color=INK, labelpad=3)

    def scale(self, i: int, image, clipped: bool) -> None:
        x = self.LEFT + self.across * (self.panel + self.GAP) - self.GAP + 0.09
        axes = self._axes(x, i, 0.09)
        color_bar(self.figure, image, axes, clipped).outline.set_edgecolor(GREY)
