"""Grids of images: samples, reconstructions, levels, from the runs' npz files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from surflow.reporting.figures import layout
from surflow.reporting.figures.images import tile
from surflow.reporting.figures.layout import Sheet
from surflow.reporting.spec import ColumnSpec
from surflow.reporting.table import Table

IMAGE_PANEL = 3.2  # inches: 384 pixels, for 8 x 8 images of 32 to 64
MOST_ACROSS = 6
"""Panels of images in one row; further ones are in rows below."""


def image_figure(table: Table, path: str | Path) -> Path:
    """Plot the samples of the models side by side: a row of panels a dataset, the data first.

    Each panel is the grid of `images.npz` of the cell's first run, and names its data, its profile
    and the table's own numbers of that run. Returns the path.
    """
    return _plot_grids(table, path, "images.npz", "samples", "test images")


def reconstruction_figure(table: Table, path: str | Path) -> Path:
    """Plot the first training images, and what each model makes of them: a grid of 10 by 10 each.

    The panels are those of `image_figure`, from `reconstructions.npz`. Returns the path.
    """
    data = "the first training images"
    return _plot_grids(table, path, "reconstructions.npz", "reconstructions", data, 10)


def pyramid_figure(table: Table, path: Path) -> Path:
    """Plot what models of several resolutions make of `pyramid.npz`: its array named as the path.

    A row of a panel is a test image of every resolution, and several finest images given the
    coarsest one (super_resolution) or unconditional draws coarse to fine (levels).
    """
    files = layout.run_files(table, "pyramid.npz")
    first = next(file for row in files.values() for file in row.values() if file)
    with np.load(first) as arrays:
        columns = int(arrays["columns"])
    data = "test images, coarse to fine"
    return _plot_grids(table, path, "pyramid.npz", path.stem, data, columns)


def _plot_grids(
    table: Table, path: str | Path, name: str, array: str, data: str, columns: int = 8
) -> Path:
    """A row of panels a dataset: `data` of the runs' file `name`, then `array` of each model."""
    files = layout.run_files(table, name)
    there = [file for row in files.values() for file in row.values() if file]
    found = {file: layout.load_arrays(file, (array, "data")) for file in there}
    lines = 2 + max(len(shown) for shown in layout.columns_of(table).values())
    lines += any("shown" in grid for grid in found.values())
    caution = layout.caution_of(table.records)
    sheet = Sheet(files, caution, IMAGE_PANEL, lines, right=0.12, most=MOST_ACROSS)
    rows = [row for row in table.spec.rows if row.experiment is not None]
    for i, (label, shown) in enumerate(layout.columns_of(table).items()):
        of_models = [files[model][label] for model in sheet.models]
        first = next(filter(None, of_models), None)
        panels = [(first, "data"), *((file, array) for file in of_models)]
        for axes, (file, which) in zip(sheet.panels[i], panels, strict=True):
            if file is None:
                layout.not_run(axes)
                continue
            grid = found[file]
            pixels = tile(grid[which], columns, gap=1, num_levels=_levels(grid, file))
            pixels = np.repeat(pixels, 3 // pixels.shape[2], axis=2)  # grey is shown as colours
            axes.imshow(pixels, interpolation="antialiased")
        sheet.caption(i, 0, data)
        for j, (row, file) in enumerate(zip(rows, of_models, strict=True), 1):
            if file is not None:
                said = [str(found[file]["shown"])] if "shown" in found[file] else []
                sheet.caption(i, j, "\n".join([image_caption(table, row.name, shown), *said]))
    return layout.save(sheet.figure, path)


def _levels(grid: Mapping[str, np.ndarray], file: Path) -> int:
    """The levels of a run's images: as their file says, else as the run's config does."""
    if "num_levels" in grid:
        return int(grid["num_levels"])
    record = layout.record_of(file)
    return record.config["data"]["num_levels"] if record and "data" in record.config else 256


def image_caption(table: Table, row: str, columns: Sequence[ColumnSpec]) -> str:
    record = next(record for column in columns for record in table.cells[row, column.name].records)
    said = "" if record.profile == "paper" else ": not a reproduction"
    released = ", released weights" if record.weights else ""
    lines = [f"{record.data}, seed {record.seed}{released}", f"profile {record.profile}{said}"]
    for column in columns:
        metric = record.metrics.get(column.metric)
        if metric is not None:
            bound = "≤ " if metric.kind == "bound" else ""
            unit = f" {metric.unit}" if metric.kind != "score" else ""
            lines.append(f"{column.metric} {bound}{metric.value:.{column.digits}f}{unit}")
    return "\n".join(lines)
