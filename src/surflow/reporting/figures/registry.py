"""Which figures a table gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from surflow.reporting.figures import (
    curves,
    densities,
    gaps,
    grids,
    latents,
    published,
    sets,
    spikes,
)
from surflow.reporting.figures.layout import of_files
from surflow.reporting.table import Table

SAMPLES = "Samples: data and models"
FINEST = "Test images, and draws of the finest given the coarsest"
LEVELS = "Unconditional draws, level by level"
RECONSTRUCTED = "Reconstructions of training images"

FIGURES: tuple[Callable[[Table, Path], dict[str, str]], ...] = (
    gaps.gaps,
    densities.compared,
    densities.one_by_one,
    published.means,
    published.published,
    of_files("images.npz", SAMPLES, "samples.png", grids.image_figure),
    of_files("points.npz", SAMPLES, "samples.png", sets.set_figure),
    of_files("pyramid.npz", FINEST, "super_resolution.png", grids.pyramid_figure),
    of_files("pyramid.npz", LEVELS, "levels.png", grids.pyramid_figure),
    published.depths,
    of_files(
        "reconstructions.npz", RECONSTRUCTED, "reconstructions.png", grids.reconstruction_figure
    ),
    of_files("latent.npz", "Aggregated posterior and prior", "latent.png", latents.latent_figure),
    curves.learning_curves,
    spikes.spikes,
)
"""In the order of the table's figures. Each writes into a folder what the table has the values and
the files for, and returns the files by caption; nothing where it has none."""


def write_figures(table: Table, folder: Path) -> dict[str, str]:
    """Write every figure of a table. Rows without a run and without a value are left out.

    Returns:
        files by caption.
    """
    table = table.without_empty_rows()
    found: dict[str, str] = {}
    for figure in FIGURES:
        found |= figure(table, folder)
    return found
