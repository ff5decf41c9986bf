"""The pictures of one run: densities and samples of 2-D data, samples of images, and of a VAE what
its posterior and its prior look like.
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from surflow.cli.common import one_line, relative
from surflow.cli.decoded import GRID, decoded_of, drawing, latent_arrays
from surflow.errors import UserError
from surflow.reporting import figures
from surflow.reporting.records import write_bytes_atomic

POINTS = 50_000
IMAGES = 64
SETS = 64
RECONSTRUCTIONS = 100
PYRAMIDS = 8


def draw_pictures(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """What a run leaves to look at, by name; nothing for data of another kind."""
    shape = data.image_shape
    if data.kind == "points":
        return _draw_plane(cfg, folder, flow, data)
    if data.kind == "set":
        return _draw_sets(cfg, folder, flow, data)
    if shape is not None and shape[0] in (1, 3):
        return {
            **_draw_images(cfg, folder, flow, data),
            **_draw_reconstructions(cfg, folder, flow, data),
            **_draw_latent(cfg, folder, flow, data),
            **_draw_pyramid(cfg, folder, flow, data),
        }
    return {}


def _write_arrays(file: Path, **arrays: Any) -> Path:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return write_bytes_atomic(file, buffer.getvalue())


def _draw_images(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """Samples of the model and images of the test split: images.npz, samples.png.

    Where the decoder of a VAE is of bits or levels, ``samples`` are its means, as grey images, and
    ``draws`` what is drawn for the same latents; samples.png then has both.
    """
    from surflow.cli.interpolate import interpolation_figure
    from surflow.data.pixels import BrokenSamples, full_range
    from surflow.metrics import draw_unit
    from surflow.reporting.images import image_sheet

    test = data.splits["test"]
    shown = test[torch.arange(min(IMAGES, len(test))) * len(test) // min(IMAGES, len(test))]
    arrays: dict[str, Any] = {}
    try:
        draws, levels = data.pixels(draw_unit(flow, 0, IMAGES, cfg.seed).cpu())
        samples, real = draws, data.pixels(shown)[0]
        parts = decoded_of(flow)
        if parts is not None and parts.has_grey:
            means = draw_unit(parts, 0, IMAGES, cfg.seed)
            samples, arrays["shown"] = parts.pixels(means, data)[::2]
            draws, real = (full_range(images, levels) for images in (draws, real))
            arrays["draws"], levels = draws.numpy(), 256
    except BrokenSamples as error:  # the scores are there all the same
        print(f"no picture of samples: {error}", file=sys.stderr)
        return {}
    arrays |= {"samples": samples.numpy(), "data": real.numpy(), "num_levels": np.int64(levels)}
    _write_arrays(folder / "images.npz", **arrays)
    grids = [arrays[name] for name in ("samples", "draws") if name in arrays]
    path = image_sheet(grids, folder / "samples.png", columns=8, num_levels=levels)
    pictures = {"figures/samples": path}
    try:
        between = interpolation_figure(flow, data, folder, pairs=4, seed=cfg.seed)
        pictures["figures/interpolation"] = between
    except ValueError as error:  # some models have no path through all their latents
        print(f"{relative(folder)}: no interpolation.png: {one_line(error)}", file=sys.stderr)
    return pictures


def _draw_sets(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """Sets of points from the model and from the test split: points.npz, samples.png."""
    from surflow.metrics import draw_unit
    from surflow.reporting.point_sets import clouds_figure

    samples = draw_unit(flow, 0, SETS, cfg.seed).cpu().numpy()
    if not np.isfinite(samples).all():
        print("no picture of samples: some are not finite", file=sys.stderr)
        return {}
    test = data.splits["test"]
    real = test[torch.arange(min(SETS, len(test))) * len(test) // min(SETS, len(test))].numpy()
    arrays = {"samples": samples.astype(np.float32), "data": real}
    _write_arrays(folder / "points.npz", **arrays, width=np.float64(data.width))
    clouds = {"data": real, "model": arrays["samples"]}
    return {"figures/samples": clouds_figure(clouds, data.width, folder / "samples.png")}


def _draw_reconstructions(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """The first training images, and what a draw of their posterior looks like decoded:
    reconstructions.npz, reconstructions.png (10 by 10, the images on the left)."""
    from surflow.data.pixels import BrokenSamples, full_range
    from surflow.reporting.images import image_sheet

    parts = decoded_of(flow)
    if parts is None:
        return {}
    x = data.splits["train"][:RECONSTRUCTIONS]
    with drawing(flow, cfg.seed):
        values = parts.images(parts.posterior(x))
    try:
        found, levels, shown = parts.pixels(values, data)
        real, own = data.pixels(x.cpu())
    except BrokenSamples as error:
        print(f"no picture of reconstructions: {error}", file=sys.stderr)
        return {}
    real = full_range(real, own) if levels == 256 else real
    arrays = {"data": real.numpy(), "reconstructions": found.numpy()}
    _write_arrays(folder / "reconstructions.npz", **arrays, num_levels=levels, shown=shown)
    path = folder / "reconstructions.png"
    image_sheet([*arrays.values()], path, columns=10, num_levels=levels)
    return {"figures/reconstructions": path}


def _draw_latent(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """Aggregated posterior and prior of a 2-D latent: latent.npz, latent.png."""
    parts = decoded_of(flow)
    if parts is None or tuple(parts.vae.latent_shape) != (2,):
        return {}
    try:
        with drawing(flow, cfg.seed):
            arrays = latent_arrays(parts, data.splits["test"])
    except ValueError as error:
        print(f"{relative(folder)}: no latent.png: {one_line(error)}", file=sys.stderr)
        return {}
    labels = _labels(data)
    if labels is not None:
        arrays["labels"] = labels
    file = _write_arrays(folder / "latent.npz", **arrays)
    if not math.isnan(arrays["kl"]):
        print(
            f"{relative(file)}: KL(aggregated posterior || prior) {arrays['kl']:.3f} nats, by the "
            f"sum over {GRID} x {GRID} cells"
        )
    return {"figures/latent": figures.latent_run_figure(file, folder / "latent.png")}


def _draw_pyramid(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """Of a model of several resolutions: test images level by level, drawings of the finest image
    given their coarsest one, and unconditional draws level by level. pyramid.npz holds as many of
    each a row as there are levels, all brought to the finest size; super_resolution.png and
    levels.png have the test images on the left."""
    from surflow.models import PyramidFlow
    from surflow.reporting.images import image_sheet

    if not isinstance(flow, PyramidFlow):
        return {}
    test = data.splits["test"]
    rows = min(PYRAMIDS, len(test))
    x = test[torch.arange(rows) * len(test) // rows].to(next(flow.parameters()).device)
    count = len(flow.sides)
    with drawing(flow, cfg.seed):
        seen = flow.coarsened(x)[::-1]
        finer = [flow.images(seen[0])[-1] for _ in range(count)]
        drawn = flow.images(flow.base.sample(rows))
    levels = data.num_levels
    arrays = {
        name: _side_by_side(images, levels, flow.sides[0])
        for name, images in (("data", seen), ("super_resolution", finer), ("levels", drawn))
    }
    _write_arrays(folder / "pyramid.npz", **arrays, num_levels=np.int64(levels), columns=count)
    pictures = {}
    for name in ("super_resolution", "levels"):
        path = folder / f"{name}.png"
        image_sheet([arrays["data"], arrays[name]], path, columns=count, num_levels=levels)
        pictures[f"figures/{name}"] = path
    return pictures


def _side_by_side(images: list[torch.Tensor], num_levels: int, side: int) -> np.ndarray:
    """Images in [0, 1) of several sizes, (N, C, s, s) each, as integers of one size: those of row n
    behind each other. For the eye: what lies outside [0, 1) is shown as its edge."""
    found = []
    for image in images:
        whole = (image.float().nan_to_num(0.0) * num_levels).floor().clamp(0, num_levels - 1)
        whole = whole.repeat_interleave(side // image.shape[-1], -1)
        found.append(whole.repeat_interleave(side // image.shape[-2], -2))
    return torch.stack(found, dim=1).flatten(0, 1).to(torch.uint8).cpu().numpy()


def _labels(data: Any) -> np.ndarray | None:
    """The classes of the test split, (N,), of data that have them."""
    try:
        labels = data.labels("test")
    except (UserError, OSError):  # their files are missing: no colours
        return None
    return None if labels is None else labels.numpy()


def _draw_plane(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """Density and samples of a 2-D model: picture.npz for the tables' figures, two PNGs."""
    from surflow.data.points import QuantizedData
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
