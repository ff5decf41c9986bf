"""2-D latents of a VAE: aggregated posterior and prior, from `latent.npz`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from surflow.record import Record
from surflow.reporting.figures import layout
from surflow.reporting.figures.layout import DOTS, GREY, INK
from surflow.reporting.table import Table

LATENT_PANEL = 2.5  # inches
LATENT_ARRAYS = ("aggregated", "prior", "kl", "points")
SHADE = 0.4
"""Colours follow a density to this power, so that thin regions are seen next to dense ones."""
SHOWN_MASS = 0.98
"""Of the aggregated posterior and of the prior, along each axis, in the window of a picture."""


def latent_figure(table: Table, path: str | Path) -> Path:
    """Plot 2-D latents: a row a model, and of each dataset the aggregated posterior and the prior.

    From `latent.npz` of the cells' first runs. The two have one scale of colours, which ends where
    all but a thousandth of the mass lies below it; under them stand the run and the divergence.
    Rows without such a file are left out. Returns the path. Raises ValueError where no run has one,
    or one is damaged.
    """
    files = {
        r: found
        for r, found in layout.run_files(table, "latent.npz").items()
        if any(found.values())
    }
    if not files:
        raise ValueError("latent_figure: expected a run with latent.npz, got none")
    datasets = list(next(iter(files.values())))
    across, down = 2 * len(datasets), len(files)
    caution = layout.caution_of(table.records)
    size = (0.5 + (LATENT_PANEL + 0.25) * across, (LATENT_PANEL + 0.35) * down + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for line, (row, found) in zip(panels, files.items(), strict=True):
        for k, file in enumerate(found.values()):
            pair = line[2 * k : 2 * k + 2]
            if file is not None:
                _latent_pair(
                    figure, pair, layout.load_picture(file, *LATENT_ARRAYS), layout.record_of(file)
                )
                continue
            for axes in pair:
                layout.not_run(axes)
        line[0].set_ylabel("\n".join(textwrap.wrap(row, 28)), fontsize=9.5, color=INK)
    for k, dataset in enumerate(datasets):
        for axes, what in zip(panels[0, 2 * k :], ("aggregated posterior", "prior"), strict=False):
            axes.set_title(f"{dataset}: {what}" if len(datasets) > 1 else what, fontsize=10)
    layout.warn(figure, caution)
    return layout.save(figure, path)


def _latent_frame(axes: Axes) -> None:
    """A thin frame with few ticks: the scale of a latent is the model's own choice."""
    layout.frame(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=6.5, length=2, width=0.5, color=GREY, labelcolor=GREY, pad=1.5)


def _latent_pair(
    figure: Figure, pair: Sequence[Axes], picture: Mapping[str, np.ndarray], record: Record | None
) -> None:
    """The aggregated posterior, the prior, and their captions."""
    densities = [picture["aggregated"], picture["prior"]]
    top = max(_highest(density) for density in densities) or 1.0
    for axes, density in zip(pair, densities, strict=True):
        _latent_frame(axes)
        norm = PowerNorm(SHADE, vmin=0.0, vmax=top)
        image = layout.show_density(axes, density, layout.extent_of(picture), norm=norm)
    for axes in pair:
        axes.set(**dict(zip(("xlim", "ylim"), _window(picture), strict=True)), facecolor="black")
    clipped = any(float(np.nanmax(density)) > 1.02 * top for density in densities)
    slim = pair[1].inset_axes((1.04, 0.0, 0.035, 1.0))  # as high as the panels
    layout.color_bar(figure, image, slim, clipped)
    if record is not None:
        said = f"{record.data}, seed {record.seed}, {record.profile}"
        pair[0].set_xlabel(said, fontsize=8, color=INK)
    kl = float(picture["kl"])
    drawn = "posterior drawn: no divergence"
    text = drawn if math.isnan(kl) else f"KL(posterior ‖ prior) {kl:.3f} nats"
    pair[1].set_xlabel(text, fontsize=8, color=INK)


def _window(picture: Mapping[str, np.ndarray]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The limits of z1 and z2 between which nearly all mass lies: a square on the grid."""
    left, right, low, high = layout.extent_of(picture)
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
    """Plot one run's `latent.npz`: aggregated posterior, prior, posterior means by class.

    Returns the path.
    """
    picture = layout.load_picture(Path(file), *LATENT_ARRAYS)
    figure = Figure(figsize=(3 * LATENT_PANEL + 1.4, LATENT_PANEL + 0.75), layout="constrained")
    panels = figure.subplots(1, 3)
    _latent_pair(figure, panels[:2], picture, layout.record_of(file))
    titles = ("aggregated posterior", "prior", "posterior means")
    for axes, text in zip(panels, titles, strict=True):
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
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
        axes.legend(fontsize=7, markerscale=3, handletextpad=0.1, **place)
    else:
        axes.scatter(*points.T, color=DOTS, **dots)
    axes.set(xlim=across, ylim=up, aspect="equal")
    axes.set_xlabel(f"{len(points)} test points", fontsize=8, color=INK)
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    return layout.save(figure, path)
