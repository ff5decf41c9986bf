"""Which figures a table gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from surflow.reporting.figures import curves, densities, gaps, grids, latents, published, sets
from surflow.reporting.table import Table

FIGURES: tuple[Callable[[Table, Path], dict[str, str]], ...] = (
    gaps.gaps,
    densities.compared,
    densities.one_by_one,
    published.published,
    grids.samples,
    sets.samples,
    grids.pyramids,
    published.depths,
    grids.reconstructions,
    latents.latents,
    curves.learning_curves,
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
