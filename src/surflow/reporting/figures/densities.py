"""Densities and samples of 2-D data, from `picture.npz`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from surflow.record import Record
from surflow.reporting.figures import layout
from surflow.reporting.figures.layout import CAUTION, COLORMAP, INK, Cells, Sheet
from surflow.reporting.table import Table
from surflow.reporting.text import file_name

FEW = 20_000
"""Fewer samples than these are shown as points, more as a histogram."""

Panel = tuple[Axes, Mapping[str, np.ndarray], np.ndarray]
"""Axes, the arrays of a file, and the one of them that is shown."""


def compared(table: Table, folder: Path) -> dict[str, str]:
    """Data and models side by side, where the columns choose the data."""
    files = layout.run_files(table, "picture.npz")
    if table.spec.own_data or not layout.any_file(files):
        return {}
    density_figure(files, folder / "density.png", metric=table.spec.metric)
    sample_figure(files, folder / "samples.png", metric=table.spec.metric)
    return {"Densities: data and models": "density.png", "Samples: data and models": "samples.png"}


def one_by_one(table: Table, folder: Path) -> dict[str, str]:
    """A figure for every model, where the rows have data of their own."""
    pictures, names = {}, {row.label: row.name for row in table.spec.rows}
    files = layout.run_files(table, "picture.npz") if table.spec.own_data else {}
    for row, found in files.items():
        for file in filter(None, found.values()):
            name = f"{file_name(names[row])}.png"
            model_figure(file, folder / name, title=row, metric=table.spec.metric)
            pictures[row] = name
    return pictures


def density_figure(cells: Cells, path: str | Path, *, metric: str = "test/nll_nats") -> Path:
    """Plot the densities p(x) on their window, one colour scale a dataset. Returns the path.

    A row of panels is a dataset: the density of the data, then each model's, from the runs'
    `picture.npz`; `metric` is that of the captions. The scale ends at the highest true density;
    what a model has above it is clipped.
    """
    return _compare(cells, path, metric, ("density", "true_density"), _show_densities)


def sample_figure(cells: Cells, path: str | Path, *, metric: str = "test/nll_nats") -> Path:
    """Plot samples as densities (2-D histograms), or as points where there are few.

    Arguments and panels are those of `density_figure`, the samples of the data first. The share of
    samples outside the window is written into a panel where it is 0.1 % or more.
    """
    return _compare(cells, path, metric, ("samples", "data_samples"), _show_samples)


def _compare(
    cells: Cells,
    path: str | Path,
    metric: str,
    arrays: tuple[str, str],
    show: Callable[[Sheet, int, Sequence[Panel]], None],
) -> Path:
    """A row of panels a dataset; `arrays` are those of a model and of the data."""
    files = layout.existing(cells)
    records = {m: {d: layout.record_of(f) for d, f in row.items()} for m, row in files.items()}
    sheet = Sheet(files, layout.caution_of([r for row in records.values() for r in row.values()]))
    for i, dataset in enumerate(sheet.datasets):
        found = [files[model][dataset] for model in sheet.models]
        pictures = [None if file is None else layout.load_picture(file, *arrays) for file in found]
        first = next((picture for picture in pictures if picture is not None), None)
        shown = [(first, arrays[1]), *((picture, arrays[0]) for picture in pictures)]
        panels = []
        for axes, (picture, name) in zip(sheet.panels[i], shown, strict=True):
            if picture is None:
                layout.not_run(axes)
            else:
                panels.append((axes, picture, picture[name]))
        if panels:
            show(sheet, i, panels)
        _captions(sheet, i, [records[model][dataset] for model in sheet.models], metric)
    return layout.save(sheet.figure, path)


def _captions(sheet: Sheet, i: int, records: Sequence[Record | None], metric: str) -> None:
    floors = [r.floor[metric].value for r in records if r and metric in r.floor]
    if floors:
        sheet.caption(i, 0, f"entropy {floors[0]:.4f}")
    for j, record in enumerate(records, 1):
        if record and metric in record.metrics:
            found = record.metrics[metric]
            bound = "≤ " if found.kind == "bound" else ""
            sheet.caption(i, j, f"NLL {bound}{found.value:.3f} {found.unit}")


def _show_densities(sheet: Sheet, i: int, panels: Sequence[Panel]) -> None:
    top = float(np.nanmax(panels[0][2]))
    top = top if math.isfinite(top) and top > 0 else 1.0
    clipped = False
    for axes, picture, density in panels:
        clipped |= bool(np.ma.masked_invalid(density).max() > 1.02 * top)
        image = layout.show_density(
            axes, density, layout.extent_of(picture), vmin=0.0, vmax=top, aspect="auto"
        )
    sheet.scale(i, image, clipped)


def _show_samples(sheet: Sheet, i: int, panels: Sequence[Panel]) -> None:
    smallest = min(len(points) for _, _, points in panels)
    bins = int(np.clip(math.sqrt(smallest / 12), 32, 112)) // 16 * 16  # edges on grid lines
    top, image, clipped = 0.0, None, False
    for axes, picture, points in panels:
        left, right, low, high = extent = layout.extent_of(picture)
        inside = (points >= (left, low)).all(1) & (points <= (right, high)).all(1)
        if smallest < FEW:
            layout.show_dots(axes, points[inside])
            axes.set_xlim(left, right)
            axes.set_ylim(low, high)
        else:
            window = ((left, right), (low, high))
            counts, _, _ = np.histogram2d(*points[inside].T, bins=bins, range=window)
            area = (right - left) * (high - low) / bins**2
            density = counts / (max(len(points), 1) * area)  # (bins, bins), per unit of area
            top = top or float(np.quantile(density, 0.999)) or 1.0
            clipped |= bool(density.max() > top)
            image = layout.show_density(axes, density, extent, vmin=0.0, vmax=top, aspect="auto")
        outside = 1 - inside.mean() if len(points) else 0.0
        if outside >= 0.001:
            text = f"{100 * outside:.1f} % outside"
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
            layout.say(
                axes, text, 0.97, 0.03, ha="right", va="bottom", size=7.5, color=INK, bbox=box
            )
    if image is not None:
        sheet.scale(i, image, clipped)


def scatter_figure(samples: np.ndarray, path: str | Path, low: float, high: float) -> Path:
    """Plot 2-D samples, (N, 2), in the square [low, high]^2: points, or a histogram of many."""
    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    window = [[low, high], [low, high]]
    if len(samples) >= FEW:
        axes.hist2d(samples[:, 0], samples[:, 1], bins=200, range=window, cmap="viridis")
    else:
        axes.scatter(samples[:, 0], samples[:, 1], s=2, alpha=0.5, linewidths=0)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal", xlabel="x₁", ylabel="x₂")
    axes.set_title(f"{len(samples)} samples")
    return layout.save(figure, path)


def model_figure(
    file: str | Path, path: str | Path, title: str, *, metric: str = "test/nll_nats"
) -> Path:
    """Plot one 2-D model from its `picture.npz`: data and model, densities above samples.

    The metric of its record, with kind and unit, stands under the title.
    """
    picture = layout.load_picture(Path(file), "density", "true_density", "samples", "data_samples")
    record = layout.record_of(file)
    figure = Figure(figsize=(6.4, 6.9), dpi=120, layout="constrained")
    figure.suptitle("\n".join([title, *_score_lines(record, metric)]), fontsize=10)
    caution = layout.caution_of([record])
    if caution:
        figure.supxlabel(caution, fontsize=8, color=CAUTION)
    panels = figure.subplots(2, 2)
    left, right, low, high = extent = layout.extent_of(picture)
    top = float(np.nanmax(picture["true_density"])) or 1.0
    names = (("Data", "true_density", "data_samples"), ("Model", "density", "samples"))
    for (upper, lower), (whose, density, samples) in zip(panels.T, names, strict=True):
        layout.show_density(upper, picture[density], extent, cmap=COLORMAP, vmin=0.0, vmax=top)
        upper.set_title(f"{whose}, density", fontsize=9)
        layout.show_dots(lower, picture[samples])
        lower.set_title(f"{whose}, samples", fontsize=9)
        lower.set_aspect("equal")
    for axes in panels.flat:
        axes.set(xlim=(left, right), ylim=(low, high))
        axes.tick_params(labelsize=7)
    return layout.save(figure, path)


def _score_lines(record: Record | None, metric: str) -> list[str]:
    """The metric of a record with its kind, its floor and its estimator."""
    found = record.metrics.get(metric) if record is not None else None
    if found is None:
        return []
    kind = "NLL" if found.kind == "likelihood" else "bound on NLL"
    floor = record.floor.get(metric)
    entropy = f", entropy {floor.value:.3f}" if floor is not None else ""
    line = f"{kind} {found.value:.3f} {found.unit}{entropy}"
    return [line, *textwrap.wrap(found.estimator, 80)]
