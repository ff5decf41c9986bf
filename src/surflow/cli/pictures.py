"""The pictures of one run: densities and samples of 2-D data, samples of images."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from surflow.cli.common import one_line, relative
from surflow.reporting import figures
from surflow.reporting.records import write_bytes_atomic

GRID = 256
POINTS = 50_000
IMAGES = 64


def draw_pictures(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """What a run leaves to look at, by name; nothing for data of another kind."""
    shape = tuple(data.event_shape)
    if shape == (2,):
        return _draw_plane(cfg, folder, flow, data)
    if len(shape) == 3 and shape[0] in (1, 3):
        return _draw_images(cfg, folder, flow, data)
    return {}


def _draw_images(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """Samples of the model and images of the test split: images.npz, samples.png."""
    from surflow.cli.interpolate import interpolation_figure
    from surflow.metrics import BrokenSamples, as_images, draw_unit
    from surflow.reporting.images import image_grid

    test = data.splits["test"]
    shown = test[torch.arange(min(IMAGES, len(test))) * len(test) // min(IMAGES, len(test))]
    try:
        samples = as_images(draw_unit(flow, 0, IMAGES, cfg.seed).cpu(), data.num_levels)
    except BrokenSamples as error:  # the scores are there all the same
        print(f"no picture of samples: {error}", file=sys.stderr)
        return {}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, samples=samples.numpy(), data=shown.numpy())
    write_bytes_atomic(folder / "images.npz", buffer.getvalue())
    path = folder / "samples.png"
    image_grid(samples.numpy(), path, columns=8, num_levels=data.num_levels)
    pictures = {"figures/samples": path}
    try:
        between = interpolation_figure(flow, data, folder, pairs=4, seed=cfg.seed)
        pictures["figures/interpolation"] = between
    except ValueError as error:  # some models have no path through all their latents
        print(f"{relative(folder)}: no interpolation.png: {one_line(error)}", file=sys.stderr)
    return pictures


def _draw_plane(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """Density and samples of a 2-D model: picture.npz for the tables' figures, two PNGs."""
    from surflow.data.module import QuantizedData
    from surflow.training.evaluation import density_grid, mass_table

    split = "test" if len(data.splits["test"]) >= POINTS else "train"
    shown = data.splits[split][:POINTS]
    torch.manual_seed(cfg.seed)
    with torch.no_grad():
        samples = flow.sample(POINTS).cpu()
    if isinstance(data, QuantizedData):
        low, high, size = -0.5, data.num_levels - 0.5, data.num_levels
        density = mass_table(flow, size, lower_bound_samples=32)
        true = data.probabilities
        # a point anywhere in its cell, so that equal ones do not hide each other
        samples, shown = (v + torch.rand(v.shape) - 0.5 for v in (samples, shown))
    else:
        low, high = -data.dataset.window, data.dataset.window
        # a bound takes many draws a cell
        size = GRID // 2 if flow.lower_bound else GRID
        density = density_grid(flow, low, high, size, box=data.box, lower_bound_samples=32)
        step = (high - low) / size
        centres = low + step * (torch.arange(size) + 0.5)
        true = data.dataset.log_prob(torch.cartesian_prod(centres, centres)).exp()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        grid_low=np.float64(low),
        grid_high=np.float64(high),
        density=density.numpy().astype(np.float32),
        true_density=true.reshape(size, size).numpy().astype(np.float32),
        samples=samples.numpy().astype(np.float32),
        data_samples=shown.numpy().astype(np.float32),
    )
    path = write_bytes_atomic(folder / "picture.npz", buffer.getvalue())
    cells = {cfg.row: {cfg.data.name: path}}
    return {
        "figures/density": figures.density_figure(cells, folder / "density.png"),
        "figures/samples": figures.sample_figure(cells, folder / "samples.png"),
    }
