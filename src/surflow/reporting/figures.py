"""Figures of a table from the files of its runs. matplotlib's object API, no pyplot state.

Every panel belongs to one run: the number under its title is that run's own, read from the
`record.json` beside the file drawn. PNG bytes depend on the input alone.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from surflow.reporting.bounds import BoundsRow
from surflow.reporting.images import tile
from surflow.reporting.records import RECORD_NAME, Record, load_record, write_bytes_atomic
from surflow.reporting.spec import ColumnSpec
from surflow.reporting.table import Cell, Table, distinct

Cells = Mapping[str, Mapping[str, "str | Path | None"]]

DPI = 120
PANEL = 2.15  # inches
IMAGE_PANEL = 3.2  # inches: 384 pixels, for 8 x 8 images of 32 to 64
INK, GREY = "#222222", "#8a8a8a"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
DASHES = ("-", "--", ":")  # of as many lines of each colour
COLORMAP = "magma"
GAP_FLOOR = 1e-5  # nats; smaller gaps are drawn at the edge


def run_files(table: Table, name: str) -> dict[str, dict[str, Path | None]]:
    """`cells` for the functions below: cells[row label][column label] is the file `name` of the
    cell's first accepted run, or None where there is no such run or file.

    Rows that are quoted only are left out. In a table of images the columns go by their data: those
    that show several metrics of the same data are one, named after it.
    """
    cells: dict[str, dict[str, Path | None]] = {}
    for row in table.spec.rows:
        if row.experiment is None:
            continue
        files = cells.setdefault(row.label, {})
        for label, shown in _columns_of(table).items():
            found = (_run_file(table.cells[row.name, column.name], name) for column in shown)
            files[label] = next(filter(None, found), None)
    return cells


def _run_file(cell: Cell, name: str) -> Path | None:
    file = cell.records[0].run_dir / name if cell.records else None
    return file if file is not None and file.is_file() else None


def _record(file: str | Path | None) -> Record | None:
    """The record beside a run's file; None where there is no file or no record."""
    if file is None or not (Path(file).parent / RECORD_NAME).is_file():
        return None
    return load_record(Path(file).parent)


def _existing(cells: Cells) -> dict[str, dict[str, Path | None]]:
    columns = dict.fromkeys(column for row in cells.values() for column in row)
    if not columns:
        raise ValueError("cells is empty: expected cells[row label][column label] = file or None")

    def path(file: str | Path | None) -> Path | None:
        return Path(file) if file is not None and Path(file).is_file() else None

    return {row: {c: path(files.get(c)) for c in columns} for row, files in cells.items()}


def _caution(records: list[Record | None]) -> str:
    """A line for runs of another profile than paper; empty where there is none."""
    profiles = sorted({record.profile for record in records if record} - {"paper"})
    return f"not a reproduction (profile {', '.join(profiles)})" if profiles else ""


def _load_arrays(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
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


def _load_picture(file: Path, *names: str) -> dict[str, np.ndarray]:
    arrays = _load_arrays(file, ("grid_low", "grid_high", *names))
    found = {name: np.asarray(value, float) for name, value in arrays.items()}
    for name in ("grid_low", "grid_high"):
        found[name] = np.broadcast_to(found[name], (2,))
    return found


def _extent(picture: Mapping[str, np.ndarray]) -> tuple[float, float, float, float]:
    low, high = picture["grid_low"], picture["grid_high"]
    return low[0], high[0], low[1], high[1]


def _save(figure: Figure, path: str | Path) -> Path:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return write_bytes_atomic(path, buffer.getvalue())


def _frame(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GREY)
        spine.set_linewidth(0.6)


def _not_run(axes: Axes) -> None:
    _frame(axes)
    axes.set_facecolor("#f4f4f4")
    axes.text(
        0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color=GREY, size=10
    )


class _Sheet:
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
            self.figure.text(0.5, y, title, ha="center", va="top", color="#b00020", size=9)
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
        _frame(axes)
        return axes

    def caption(self, i: int, j: int, text: str) -> None:
        axes = self.panels[i][j]
        axes.set_xlabel(text, fontsize=8.5, color=INK, labelpad=3)

    def scale(self, i: int, image, clipped: bool) -> None:
        x = self.LEFT + self.across * (self.panel + self.GAP) - self.GAP + 0.09
        axes = self._axes(x, i, 0.09)
        bar = self.figure.colorbar(image, cax=axes, extend="max" if clipped else "neither")
        bar.outline.set_linewidth(0.5)
        bar.outline.set_edgecolor(GREY)
        bar.locator = MaxNLocator(4)
        bar.update_ticks()
        axes.tick_params(labelsize=7, length=2, width=0.5, color=GREY, labelcolor=INK, pad=2)


def _captions(
    sheet: _Sheet,
    i: int,
    records: list[Record | None],
    metric: str,
    label: str,
) -> None:
    floors = [r.floor[metric].value for r in records if r and metric in r.floor]
    if floors:
        sheet.caption(i, 0, f"entropy {floors[0]:.4f}")
    for j, record in enumerate(records, 1):
        if record and metric in record.metrics:
            found = record.metrics[metric]
            bound = "≤ " if found.kind == "bound" else ""
            sheet.caption(i, j, f"{label} {bound}{found.value:.3f} {found.unit}")


def density_figure(
    cells: Cells, path: str | Path, *, metric: str = "test/nll_nats", label: str = "NLL"
) -> Path:
    """Draw the densities p(x) on their plot window, one colour scale a dataset.

    `cells[row label][column label]` is a run's `picture.npz` or None. A row of panels is a dataset:
    the data's own density, then each model's. The scale ends at the highest true density; what a
    model has above it is clipped. `metric` is read from the records; returns the path.
    """
    files = _existing(cells)
    records = {m: {d: _record(f) for d, f in row.items()} for m, row in files.items()}
    sheet = _Sheet(files, _caution([r for row in records.values() for r in row.values()]))
    cmap = colormaps[COLORMAP].with_extremes(bad="#4f8f8f")  # a density that is no number shows
    for i, dataset in enumerate(sheet.datasets):
        pictures = [
            None if file is None else _load_picture(file, "density", "true_density")
            for file in (files[model][dataset] for model in sheet.models)
        ]
        first = next((picture for picture in pictures if picture is not None), None)
        panels = [
            None if first is None else (first, first["true_density"]),
            *(None if picture is None else (picture, picture["density"]) for picture in pictures),
        ]
        top = 1.0 if first is None else float(np.nanmax(first["true_density"]))
        top = top if math.isfinite(top) and top > 0 else 1.0
        image, clipped = None, False
        for axes, panel in zip(sheet.panels[i], panels, strict=True):
            if panel is None:
                _not_run(axes)
                continue
            picture, density = panel
            shown = np.ma.masked_invalid(density.T)  # density[i, j] is at (x1_i, x2_j)
            clipped |= bool(shown.max() > 1.02 * top)
            image = axes.imshow(
                shown,
                origin="lower",
                extent=_extent(picture),
                cmap=cmap,
                vmin=0.0,
                vmax=top,
                aspect="auto",
                interpolation="nearest",
            )
        if image is not None:
            sheet.scale(i, image, clipped)
        _captions(sheet, i, [records[m][dataset] for m in sheet.models], metric, label)
    return _save(sheet.figure, path)


def sample_figure(
    cells: Cells, path: str | Path, *, metric: str = "test/nll_nats", label: str = "NLL"
) -> Path:
    """Draw samples as densities (2-D histograms), or as points where there are under 20,000.

    `cells` and the panels are those of `density_figure`, the data's samples first. The share of
    samples outside the window is written into a panel where it is 0.1 % or more.
    """
    files = _existing(cells)
    records = {m: {d: _record(f) for d, f in row.items()} for m, row in files.items()}
    sheet = _Sheet(files, _caution([r for row in records.values() for r in row.values()]))
    for i, dataset in enumerate(sheet.datasets):
        pictures = [
            None if file is None else _load_picture(file, "samples", "data_samples")
            for file in (files[model][dataset] for model in sheet.models)
        ]
        first = next((picture for picture in pictures if picture is not None), None)
        panels = [
            None if first is None else (first, first["data_samples"]),
            *(None if picture is None else (picture, picture["samples"]) for picture in pictures),
        ]
        smallest = min((len(panel[1]) for panel in panels if panel is not None), default=0)
        bins = int(np.clip(math.sqrt(smallest / 12), 32, 112)) // 16 * 16  # edges on grid lines
        top, image, clipped = 0.0, None, False
        for axes, panel in zip(sheet.panels[i], panels, strict=True):
            if panel is None:
                _not_run(axes)
                continue
            picture, points = panel
            left, right, low, high = extent = _extent(picture)
            inside = (points >= (left, low)).all(1) & (points <= (right, high)).all(1)
            if smallest < 20_000:
                kept = points[inside][:5000]
                axes.scatter(*kept.T, s=1.6, alpha=0.45, color="#3b2a6b", linewidths=0)
                axes.set_xlim(left, right)
                axes.set_ylim(low, high)
            else:
                counts, _, _ = np.histogram2d(
                    *points[inside].T, bins=bins, range=((left, right), (low, high))
                )
                area = (right - left) * (high - low) / bins**2
                density = counts / (max(len(points), 1) * area)  # (bins, bins), per unit of area
                top = top or float(np.quantile(density, 0.999)) or 1.0
                clipped |= bool(density.max() > top)
                image = axes.imshow(
                    density.T,
                    origin="lower",
                    extent=extent,
                    cmap=COLORMAP,
                    vmin=0.0,
                    vmax=top,
                    aspect="auto",
                    interpolation="nearest",
                )
            outside = 1 - inside.mean() if len(points) else 0.0
            if outside >= 0.001:
                axes.text(
                    0.97,
                    0.03,
                    f"{100 * outside:.1f} % outside",
                    transform=axes.transAxes,
                    ha="right",
                    va="bottom",
                    fontsize=7.5,
                    color=INK,
                    bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5},
                )
        if image is not None:
            sheet.scale(i, image, clipped)
        _captions(sheet, i, [records[m][dataset] for m in sheet.models], metric, label)
    return _save(sheet.figure, path)


MOST_ACROSS = 6
"""Panels of images beside each other; more go on below."""


def image_figure(table: Table, path: str | Path) -> Path:
    """Draw the samples of the models side by side: a row of panels a dataset, the data first.

    Each panel is the grid of `images.npz` of the cell's first run, and names its data, its profile
    and the table's own numbers of that run. Returns the path.
    """
    return _draw_grids(table, path, "images.npz", "samples", "test images")


def reconstruction_figure(table: Table, path: str | Path) -> Path:
    """Draw the first training images, and what each model makes of them: a grid of 10 by 10 each.

    The panels are those of `image_figure`, from `reconstructions.npz`. Returns the path.
    """
    return _draw_grids(
        table, path, "reconstructions.npz", "reconstructions", "the first training images", 10
    )


def pyramid_figures(table: Table, folder: str | Path) -> dict[str, Path]:
    """Draw what models of several resolutions make of `pyramid.npz`: super_resolution.png and
    levels.png, a row of each panel a test image or a draw.

    Returns the paths by name: "super_resolution" (test images of every resolution, and several
    finest images given the coarsest one) and "levels" (the same, and unconditional draws coarse to
    fine).
    """
    data = "test images, coarse to fine"
    with np.load(_first_file(table, "pyramid.npz")) as arrays:
        columns = int(arrays["columns"])
    return {
        name: _draw_grids(table, Path(folder) / f"{name}.png", "pyramid.npz", name, data, columns)
        for name in ("super_resolution", "levels")
    }


def _first_file(table: Table, name: str) -> Path:
    """The file `name` of the first run that has it."""
    return next(f for row in run_files(table, name).values() for f in row.values() if f)


def _draw_grids(
    table: Table, path: str | Path, name: str, array: str, data: str, columns: int = 8
) -> Path:
    """A row of panels a dataset: `data` of the runs' file `name`, then `array` of each model."""
    files = run_files(table, name)
    caution = _caution(list(table.records))
    lines = 2 + max(len(shown) for shown in _columns_of(table).values())
    lines += table.spec.figure == "vae"  # what is shown: a draw, or a mean
    sheet = _Sheet(files, caution, IMAGE_PANEL, lines, right=0.12, most=MOST_ACROSS)
    for i, label in enumerate(sheet.datasets):
        shown = _columns_of(table)[label]
        found = [files[model][label] for model in sheet.models]
        grids = [None if f is None else _load_arrays(f, (array, "data")) for f in found]
        pairs = list(zip(grids, found, strict=True))
        first = next((pair for pair in pairs if pair[0] is not None), (None, None))
        panels = [(*first, "data"), *((*pair, array) for pair in pairs)]
        for axes, (grid, file, which) in zip(sheet.panels[i], panels, strict=True):
            if grid is None:
                _not_run(axes)
            else:
                pixels = tile(grid[which], columns, gap=1, num_levels=_levels(grid, file))
                pixels = np.repeat(pixels, 3 // pixels.shape[2], axis=2)  # grey is shown as colours
                axes.imshow(pixels, interpolation="antialiased")
        sheet.caption(i, 0, data)
        rows = [row for row in table.spec.rows if row.experiment is not None]
        for j, (row, (grid, _)) in enumerate(zip(rows, pairs, strict=True), 1):
            if grid is not None:
                said = [str(grid["shown"])] if "shown" in grid else []
                sheet.caption(i, j, "\n".join([_image_caption(table, row.name, shown), *said]))
    return _save(sheet.figure, path)


def _levels(grid: Mapping[str, np.ndarray], file: Path) -> int:
    """The levels of a run's images: as their file says, else as the run's config does."""
    if "num_levels" in grid:
        return int(grid["num_levels"])
    record = _record(file)
    return record.config["data"]["num_levels"] if record and "data" in record.config else 256


def _columns_of(table: Table) -> dict[str, list[ColumnSpec]]:
    """The columns behind each column label of `run_files`."""
    own = next((record.data for record in table.records), "data")  # where the rows choose it

    def label(column: ColumnSpec) -> str:
        if table.spec.figure == "vae" and not column.names_data:
            return own
        return column.data if table.spec.figure in ("images", "vae", "sets") else column.label

    columns: dict[str, list[ColumnSpec]] = {}
    for column in table.spec.columns:
        columns.setdefault(label(column), []).append(column)
    return columns


def _image_caption(table: Table, row: str, columns: Sequence[ColumnSpec]) -> str:
    record = next(record for column in columns for record in table.cells[row, column.name].records)
    said = "" if record.profile == "paper" else ": not a reproduction"
    released = ", released weights" if record.weights else ""
    lines = [
        f"{record.data}, seed {record.seed}{released}",
        f"profile {record.profile}{said}",
    ]
    for column in columns:
        metric = record.metrics.get(column.metric)
        if metric is not None:
            bound = "≤ " if metric.kind == "bound" else ""
            unit = f" {metric.unit}" if metric.kind != "score" else ""
            lines.append(f"{column.metric} {bound}{metric.value:.{column.digits}f}{unit}")
    return "\n".join(lines)


PUBLISHED, OURS, OTHERS = LINES[1], LINES[0], GREY
WIDE_LABEL = 52  # letters; a panel's width


def published_figure(table: Table, path: str | Path) -> Path:
    """Draw published values beside ours: a panel a column, a line a row of the table.

    Ours: filled circles with bars, the sample standard deviation over the seeds, or the metric's
    standard error where there is one seed. Published: hollow diamonds; values of other sources:
    hollow squares. Rows that are quoted only have hollow marks only. Returns the path.
    """
    spec = table.spec
    across = min(len(spec.columns), 3)
    down = math.ceil(len(spec.columns) / across)
    height = down * (0.34 * len(spec.rows) + 1.0) + 0.8
    figure = Figure(figsize=(1.6 + 3.1 * across, height), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.ravel()[len(spec.columns) :]:
        axes.remove()
    for index, (axes, column) in enumerate(zip(grid.ravel(), spec.columns, strict=False)):
        _published_panel(axes, table, column)
        axes.set_yticks(range(len(spec.rows)))
        axes.set_yticklabels([row.label for row in spec.rows] if index % across == 0 else [])
    caution = _caution(list(table.records))
    published = any(cell.published is not None for cell in table.cells.values())
    ours = any(cell.ours is not None for cell in table.cells.values())
    both = "Published values and ours" if ours else "Published values; none of ours is there"
    title = both if published else "Ours; nothing is published"
    title += f"; {caution}" if caution else ""
    figure.suptitle(title, fontsize=9.5, color="#b00020" if caution else INK)
    figure.legend(
        handles=_published_legend(table),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return _save(figure, path)


def _published_panel(axes: Axes, table: Table, column: ColumnSpec) -> None:
    cells = table.of_column(column)
    hollow = {"ls": "none", "mfc": "white", "ms": 6.5, "mew": 1.3, "zorder": 3}
    unit = next((cell.unit for cell in cells if cell.unit and cell.kind != "score"), "")
    seen = False
    for line, cell in enumerate(cells):
        if cell.published is not None:
            axes.plot(cell.published, line, marker="D", color=PUBLISHED, **hollow)
        for quote in cell.quoted:
            axes.plot(quote.value, line, marker="s", color=OTHERS, **hollow)
        if cell.ours is not None:
            error = _spread(cell)
            bars = {"xerr": error, "capsize": 3, "elinewidth": 1.2}
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
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not seen:
        axes.set_xticks([])
        axes.text(
            0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color=GREY
        )


def _spread(cell: Cell) -> float | None:
    """The half-width of a cell's error bar; None where nothing is known of it."""
    if cell.std is not None:
        return cell.std
    errors = [metric.standard_error for metric in cell.metrics]
    return errors[0] if len(errors) == 1 else None


def _published_legend(table: Table, cells: Sequence[Cell] | None = None) -> list[Line2D]:
    """What each mark is, of those that the figure has; `cells` None: all of the table."""
    cells = list(table.cells.values()) if cells is None else cells
    ours = "ours, released weights" if table.released else "ours"
    if any(cell.std is not None for cell in cells):
        ours += " (bar: standard deviation over seeds)"
    elif any(_spread(cell) is not None for cell in cells):
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
    """Draw likelihoods and bounds against the number of flow layers: a panel a metric of the table,
    a line a family of flows.

    Ours: filled circles with bars, the standard deviation over seeds, or the standard error where
    there is one seed. Published: hollow diamonds in the family's colour; values of other sources:
    hollow squares. The row without flow layers begins every line. Returns the path.

    Raises:
        ValueError: where no row has a depth.
    """
    if all(row.depth is None for row in table.spec.rows):
        raise ValueError(f"{table.spec.path}: no row has a 'depth', expected one for depth_figure")
    columns = [c for c in table.spec.columns if _is_likelihood(table, c)] or table.spec.columns[:1]
    across = min(len(columns), 2)
    down = math.ceil(len(columns) / across)
    caution = _caution(list(table.records))
    names = list(depth_points(table, columns[0]))
    height = 3.0 * down + 0.5 + 0.2 * math.ceil((len(names) + 3) / 3 / across)
    figure = Figure(figsize=(4.9 * across, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(columns) :]:
        axes.remove()
    for axes, column in zip(grid, columns, strict=False):
        _depth_panel(axes, table, column)
    lines = [
        Line2D([], [], color=color, lw=1.4, label=name)
        for name, color in zip(names, _colors(len(names)), strict=True)
    ]
    cells = [cell for column in columns for cell in table.of_column(column)]
    marks = _published_legend(table, [cell for cell in cells if cell.row.depth is not None])
    for mark in marks:  # the colours are those of the families here
        mark.set(color=INK, mfc="white" if mark.get_mfc() == "white" else INK)
    figure.legend(
        handles=[*lines, *marks],
        loc="outside lower center",
        ncols=3 if across == 2 else 2,
        frameon=False,
        fontsize=8,
    )
    if caution:
        figure.suptitle(caution, fontsize=9, color="#b00020")
    return _save(figure, path)


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
    hollow = {"ls": "none", "mfc": "white", "ms": 6.5, "mew": 1.3, "zorder": 3}
    seen: set[int] = set()
    unit = ""
    for points, color in zip(families.values(), _colors(len(families)), strict=True):
        ours = [(depth, cell) for depth, cell in points if cell.ours is not None]
        if len(ours) > 1 or (ours and ours[0][0]):
            axes.plot(
                [depth for depth, _ in ours], [cell.ours for _, cell in ours], color=color, lw=1.2
            )
        for depth, cell in points:
            ink = color if depth else INK  # what is in every family has no colour of one
            if cell.published is not None:
                axes.plot(depth, cell.published, marker="D", color=ink, **hollow)
            for quote in cell.quoted:
                axes.plot(depth, quote.value, marker="s", color=ink, **hollow)
            if cell.ours is not None:
                bars = {"yerr": _spread(cell), "capsize": 3, "elinewidth": 1.2}
                axes.errorbar(depth, cell.ours, fmt="o", color=ink, ms=5, zorder=4, **bars)
            if cell.ours is not None or cell.published is not None or cell.quoted:
                seen.add(depth)
                unit = unit or (cell.unit if cell.unit else "")
    axes.set_title("\n".join(textwrap.wrap(column.label, 44)), fontsize=9.5, color=INK)
    axes.set_xlabel("flow layers", fontsize=9, color=INK)
    unit = unit or column.unit or ""
    name = f"{column.metric} ({unit})" if unit else column.metric
    axes.set_ylabel(f"{name}\n{column.direction} is better", fontsize=8, color=INK)
    axes.set_xticks(sorted(seen))
    axes.margins(x=0.06, y=0.12)
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not seen:
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color=GREY
        )


LATENT_PANEL = 2.5  # inches
LATENT_ARRAYS = ("aggregated", "prior", "kl", "points")


def latent_figure(table: Table, path: str | Path) -> Path:
    """Draw 2-D latents: a row a model, and of each dataset the aggregated posterior and the prior.

    From `latent.npz` of the cells' first runs. The two have one scale of colours, which ends where
    all but a thousandth of the mass lies below it; under them stand the run and the divergence.
    Rows without such a file are left out. Returns the path.

    Raises:
        ValueError: where no run has a `latent.npz`, or one is damaged.
    """
    files = {
        row: found
        for row, found in run_files(table, "latent.npz").items()
        if any(file for file in found.values())
    }
    if not files:
        raise ValueError("latent_figure: expected a run with latent.npz, got none")
    datasets = list(next(iter(files.values())))
    across, down = 2 * len(datasets), len(files)
    caution = _caution(list(table.records))
    size = (0.5 + (LATENT_PANEL + 0.25) * across, (LATENT_PANEL + 0.35) * down + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for line, (row, found) in zip(panels, files.items(), strict=True):
        for k, file in enumerate(found.values()):
            pair = line[2 * k : 2 * k + 2]
            if file is None:
                for axes in pair:
                    _not_run(axes)
                continue
            _latent_pair(figure, pair, _load_picture(file, *LATENT_ARRAYS), _record(file))
        line[0].set_ylabel("\n".join(textwrap.wrap(row, 28)), fontsize=9.5, color=INK)
    for k, dataset in enumerate(datasets):
        for axes, what in zip(panels[0, 2 * k :], ("aggregated posterior", "prior"), strict=False):
            axes.set_title(f"{dataset}: {what}" if len(datasets) > 1 else what, fontsize=10)
    if caution:
        figure.suptitle(caution, fontsize=9, color="#b00020")
    return _save(figure, path)


def _latent_frame(axes: Axes) -> None:
    """A thin frame with few ticks: the scale of a latent is the model's own choice."""
    _frame(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=6.5, length=2, width=0.5, color=GREY, labelcolor=GREY, pad=1.5)


def _latent_pair(
    figure: Figure,
    pair: Sequence[Axes],
    picture: Mapping[str, np.ndarray],
    record: Record | None,
) -> None:
    """The aggregated posterior beside the prior, and what is said of them."""
    densities = [picture["aggregated"], picture["prior"]]
    top = max(_highest(density) for density in densities) or 1.0
    for axes, density in zip(pair, densities, strict=True):
        _latent_frame(axes)
        image = axes.imshow(
            np.ma.masked_invalid(density.T),
            origin="lower",
            extent=_extent(picture),
            cmap=colormaps[COLORMAP].with_extremes(bad="#4f8f8f"),
            norm=PowerNorm(SHADE, vmin=0.0, vmax=top),
            interpolation="nearest",
        )
    for axes in pair:
        axes.set(**dict(zip(("xlim", "ylim"), _window(picture), strict=True)), facecolor="black")
    clipped = any(float(np.nanmax(density)) > 1.02 * top for density in densities)
    slim = pair[1].inset_axes((1.04, 0.0, 0.035, 1.0))  # as high as the panels
    bar = figure.colorbar(image, cax=slim, extend="max" if clipped else "neither")
    bar.outline.set_linewidth(0.5)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=7, length=2, width=0.5, color=GREY, labelcolor=INK, pad=2)
    if record is not None:
        said = f"{record.data}, seed {record.seed}, {record.profile}"
        pair[0].set_xlabel(said, fontsize=8, color=INK)
    kl = float(picture["kl"])
    text = (
        f"KL(posterior ‖ prior) {kl:.3f} nats"
        if not math.isnan(kl)
        else "posterior drawn: no divergence"
    )
    pair[1].set_xlabel(text, fontsize=8, color=INK)


SHADE = 0.4
"""Colours follow a density to this power, so that thin regions are seen beside dense ones."""

SHOWN_MASS = 0.98
"""Of the aggregated posterior and of the prior, along each axis, in the window of a picture."""


def _window(picture: Mapping[str, np.ndarray]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The limits of z1 and z2 between which nearly all mass lies: a square on the grid."""
    left, right, low, high = _extent(picture)
    limits = []
    for axis, (start, end) in enumerate(((left, right), (low, high))):
        found = []
        for name in ("aggregated", "prior"):
            share = np.nansum(picture[name], axis=1 - axis).cumsum()
            rest = (1 - SHOWN_MASS) / 2
            first, last = np.searchsorted(share, np.array([rest, 1 - rest]) * share[-1])
            found += [first, min(last + 1, len(share))]
        cell = (end - start) / len(share)
        limits.append((start + cell * min(found), start + cell * max(found)))
    half = max(b - a for a, b in limits) / 2
    centres = [(a + b) / 2 for a, b in limits]
    return tuple((c - half, c + half) for c in centres)


def _highest(density: np.ndarray) -> float:
    """The density that all but a thousandth of its mass lies at or below."""
    values = np.sort(density[np.isfinite(density)])
    share = np.cumsum(values)
    if not len(values) or share[-1] <= 0:
        return 0.0
    return float(values[min(np.searchsorted(share, 0.999 * share[-1]), len(values) - 1)])


def latent_run_figure(file: str | Path, path: str | Path, title: str = "") -> Path:
    """Draw one run's `latent.npz`: aggregated posterior, prior, posterior means by class.

    Returns the path.
    """
    picture = _load_picture(Path(file), *LATENT_ARRAYS)
    figure = Figure(figsize=(3 * LATENT_PANEL + 1.4, LATENT_PANEL + 0.75), layout="constrained")
    panels = figure.subplots(1, 3)
    _latent_pair(figure, panels[:2], picture, _record(file))
    for axes, text in zip(
        panels, ("aggregated posterior", "prior", "posterior means"), strict=True
    ):
        axes.set_title(text, fontsize=10, color=INK)
    axes = panels[2]
    _latent_frame(axes)
    points = picture["points"]
    across, up = _window(picture)
    dots = {"s": 2.0, "alpha": 0.6, "linewidths": 0}
    if "labels" in picture:
        labels = picture["labels"].astype(int)
        for k in np.unique(labels):
            color = colormaps["tab10"](k % 10)
            axes.scatter(*points[labels == k].T, color=color, label=str(k), **dots)
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            fontsize=7,
            markerscale=3,
            handletextpad=0.1,
        )
    else:
        axes.scatter(*points.T, color="#3b2a6b", **dots)
    axes.set(xlim=across, ylim=up, aspect="equal")
    axes.set_xlabel(f"{len(points)} test points", fontsize=8, color=INK)
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    return _save(figure, path)


CURVE_WORDS = {"nll": "NLL", "elbo": "negative ELBO", "iwbo": "negative IWBO"}
CURVE_UNITS = {"bpd": "bits/dim"}
LONG_LABEL = 32  # letters; half a panel's width


def curve_label(column: str) -> str:
    """Such as "validation negative ELBO (bits/dim)" for ``val/elbo_bpd``."""
    name, _, unit = column.rpartition("/")[2].partition("_")
    return f"validation {CURVE_WORDS.get(name, name)} ({CURVE_UNITS.get(unit, unit)})"


def validation_columns(file: Path) -> list[str]:
    """The validation metrics that a run has logged in its metrics.csv: the objective's, not always
    the table's."""
    with open(file, newline="", encoding="utf-8") as lines:
        return [name for name in next(csv.reader(lines), ()) if name.startswith("val/")]


def _read_curve(file: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values), both (N,), from the lines of a metrics.csv where both are given."""
    with open(file, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in ("epoch", column) if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file}: lacks column {', '.join(missing)}; expected epoch, {column}")
        pairs = []
        for number, line in enumerate(reader, 2):
            if not (line["epoch"] or "").strip() or not (line[column] or "").strip():
                continue
            try:
                pairs.append((float(line["epoch"]), float(line[column])))
            except ValueError:
                raise ValueError(
                    f"{file}: line {number}: epoch and {column} must be numbers"
                ) from None
    values = np.array(pairs, float).reshape(-1, 2)
    values = values[np.isfinite(values).all(1)]
    return values[:, 0], values[:, 1]


def learning_curve_figure(
    cells: Cells,
    path: str | Path,
    *,
    column: str | Mapping[str, str] = "val/nll_nats",
    metric: str = "test/nll_nats",
    label: str | None = None,
    scale: float = 1.0,
) -> Path:
    """Draw `column` of each run's metrics.csv against the epoch: a panel a dataset, a line a model.

    `cells[row label][column label]` is a run's `metrics.csv` or None. A dashed line marks the floor
    that the records name for `metric`. The first twentieth of a curve does not stretch the scale.
    `column` may be one for each row label; `label` None makes one of `column`. Values are shown
    times `scale`; where it is negative, higher is better.
    """
    label = curve_label(column) if label is None else label
    of_model = column if isinstance(column, Mapping) else dict.fromkeys(cells, column)
    files = _existing(cells)
    records = {m: {d: _record(f) for d, f in row.items()} for m, row in files.items()}
    caution = _caution([r for row in records.values() for r in row.values()])
    models, datasets = list(files), list(next(iter(files.values())))
    across = min(len(datasets), 2)
    down = math.ceil(len(datasets) / across)
    legend_columns = (1 if max(map(len, models)) > LONG_LABEL else 2) * across
    legend_rows = math.ceil((len(models) + 1) / legend_columns)  # a line more: the floor
    height = 2.7 * down + 0.3 + 0.2 * legend_rows + (0.25 if caution else 0)
    figure = Figure(figsize=(4.3 * across, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    handles: dict[str, object] = {}
    for axes, dataset in zip(grid, datasets, strict=False):
        axes.set_title(dataset, fontsize=11, color=INK)
        curves = {}
        for model in models:
            if files[model][dataset] is not None:
                epochs, values = _read_curve(files[model][dataset], of_model[model])
                if len(values):
                    curves[model] = (epochs, scale * values)
        if not curves:
            _not_run(axes)
            continue
        seen = []
        for index, (model, color) in enumerate(
            zip(models, LINES * math.ceil(len(models) / len(LINES)), strict=False)
        ):
            if model not in curves:
                continue
            epochs, values = curves[model]
            mark = "o" if len(values) < 3 else None
            dashes = DASHES[index // len(LINES) % len(DASHES)]
            (line,) = axes.plot(
                epochs, values, dashes, color=color, lw=1.4, marker=mark, ms=3, zorder=3 + index
            )
            handles.setdefault(model, line)
            late = values[len(values) // 20 :] if len(values) >= 20 else values
            best, worst = (values.min(), 0.995) if scale > 0 else (values.max(), 0.005)
            seen += [float(best), float(np.quantile(late, worst))]
        floors = [
            record.floor[metric].value
            for record in (records[model][dataset] for model in models)
            if record and metric in record.floor
        ]
        if floors:
            line = axes.axhline(floors[0], color=INK, lw=1.0, ls=(0, (5, 3)), zorder=2)
            handles.setdefault("entropy (floor)", line)
            seen.append(floors[0])
        low, high = min(seen), max(seen)
        margin = 0.06 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
        axes.margins(x=0.02)
        missing = [model for model in models if model not in curves]
        if missing:
            text = "\n".join(f"{model}: not run" for model in missing)
            axes.text(
                0.98, 0.95, text, transform=axes.transAxes, ha="right", va="top", color=GREY, size=8
            )
        axes.grid(color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, color=GREY, labelcolor=INK, width=0.6)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        axes.set_ylabel(label, fontsize=9, color=INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
            spine.set_linewidth(0.6)
    for axes in grid[len(datasets) :]:
        axes.remove()
    if handles:
        order = [name for name in (*models, "entropy (floor)") if name in handles]
        figure.legend(
            [handles[name] for name in order],
            order,
            loc="outside lower center",
            ncols=min(len(order), legend_columns),
            frameon=False,
            fontsize=9,
        )
    if caution:
        figure.suptitle(caution, fontsize=9, color="#b00020")
    return _save(figure, path)


def scatter_figure(samples: np.ndarray, path: str | Path, low: float, high: float) -> Path:
    """Draw 2-D samples, (N, 2), in the square [low, high]^2: points, or a histogram of many."""
    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    window = [[low, high], [low, high]]
    if len(samples) >= 20_000:
        axes.hist2d(samples[:, 0], samples[:, 1], bins=200, range=window, cmap="viridis")
    else:
        axes.scatter(samples[:, 0], samples[:, 1], s=2, alpha=0.5, linewidths=0)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal", xlabel="x₁", ylabel="x₂")
    axes.set_title(f"{len(samples)} samples")
    return _save(figure, path)


def model_figure(
    file: str | Path, path: str | Path, title: str, *, metric: str = "test/nll_nats"
) -> Path:
    """Draw one 2-D model from its `picture.npz`: data and model, density above samples.

    The metric of the record beside the file, with its kind and unit, stands under the title.
    """
    picture = _load_picture(Path(file), "density", "true_density", "samples", "data_samples")
    record = _record(file)
    figure = Figure(figsize=(6.4, 6.9), dpi=120, layout="constrained")
    found = record.metrics.get(metric) if record is not None else None
    lines = [title]
    if found is not None:
        kind = "NLL" if found.kind == "likelihood" else "bound on NLL"
        floor = record.floor.get(metric)
        entropy = f", entropy {floor.value:.3f}" if floor is not None else ""
        lines.append(f"{kind} {found.value:.3f} {found.unit}{entropy}")
        lines += textwrap.wrap(found.estimator, 80)
    caution = _caution([record])
    figure.suptitle("\n".join(lines), fontsize=10)
    if caution:
        figure.supxlabel(caution, fontsize=8, color="#b00020")
    panels = figure.subplots(2, 2)
    extent = _extent(picture)
    left, right, low, high = extent
    top = float(np.nanmax(picture["true_density"])) or 1.0
    for axes, name, label in zip(
        panels[0], ("true_density", "density"), ("Data, density", "Model, density"), strict=True
    ):
        axes.imshow(
            np.ma.masked_invalid(picture[name].T),
            origin="lower",
            extent=extent,
            cmap=COLORMAP,
            vmin=0.0,
            vmax=top,
            interpolation="nearest",
        )
        axes.set_title(label, fontsize=9)
    for axes, name, label in zip(
        panels[1], ("data_samples", "samples"), ("Data, samples", "Model, samples"), strict=True
    ):
        axes.scatter(*picture[name][:5000].T, s=1.6, alpha=0.45, color="#3b2a6b", linewidths=0)
        axes.set_title(label, fontsize=9)
        axes.set_aspect("equal")
    for axes in panels.flat:
        axes.set(xlim=(left, right), ylim=(low, high))
        axes.tick_params(labelsize=7)
    return _save(figure, path)


def gap_figure(rows: Sequence[BoundsRow], path: str | Path, *, profile: str) -> Path:
    """Draw log p(x) - IWBO against K, a panel a model, with 95 % intervals; log-log.

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
        counts = sorted(row.gaps)
        for k in counts:
            _, _, gap, error = row.gaps[k]
            low, high = gap - 1.96 * error, gap + 1.96 * error
            axes.plot([k, k], [max(low, GAP_FLOOR), max(high, GAP_FLOOR)], color=LINES[0], lw=1.2)
            seen = gap > GAP_FLOOR
            axes.plot(
                k,
                max(gap, GAP_FLOOR),
                marker="o",
                ms=4.5,
                color=LINES[0],
                mfc=LINES[0] if seen else "white",
                clip_on=False,
                zorder=3,
            )
        shown = [(k, row.gaps[k][2]) for k in counts if row.gaps[k][2] > GAP_FLOOR]
        axes.plot(
            *zip(*shown, strict=True) if shown else ([], []), color=LINES[0], lw=0.8, alpha=0.6
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(GAP_FLOOR, 2 * max(top, 10 * GAP_FLOOR))
        axes.set_xlim(counts[0] / 1.5, counts[-1] * 1.5)
        axes.set_title(row.label, fontsize=8.5, color=INK)
        axes.grid(True, which="major", color="#dddddd", lw=0.5)
        axes.tick_params(labelsize=7, which="both")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.supxlabel("K, samples of the importance-weighted bound", fontsize=9)
    figure.supylabel("log p(x) − IWBO, nats a point", fontsize=9)
    note = "" if profile == "paper" else f"  (profile {profile}: a smaller budget)"
    figure.suptitle(
        "Gap between bound and likelihood; bars: 95 %, open marker: below the scale" + note,
        fontsize=9.5,
    )
    return _save(figure, path)
