"""Pictures of a trained model, a function each; those of a run are drawn one after the other."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surflow.data.module import TensorDataModule
from surflow.data.pixels import full_range
from surflow.draws import device_of, evaluating
from surflow.errors import UserError
from surflow.evaluation.grids import density_grid, mass_table
from surflow.evaluation.sampling import draw_unit
from surflow.evaluation.trained import Trained, evenly_spaced
from surflow.evaluation.vae import GRID, decoded_of, latent_arrays
from surflow.files import relative, write_npz
from surflow.flow import Flow
from surflow.models import PyramidFlow, latent_interpolation
from surflow.reporting.figures.images import image_grid, image_sheet

POINTS = 50_000
IMAGES = 64
SETS = 64
RECONSTRUCTIONS = 100
PYRAMIDS = 8


def draw_pictures(trained: Trained, row: str = "model") -> dict[str, Path]:
    """Draw every picture that applies to the data and the flow into the run's folder.

    A picture that fails is left out, with a line on stderr. The random numbers follow from
    ``trained.seed``; mode and random state are restored. Returns PNG files by name, such as
    ``figures/samples``; ``row`` is the model's name in the pictures of densities.
    """
    found: dict[str, Path] = {}
    for picture in (plane, sets, images, interpolation, reconstructions, latent, pyramid):
        try:
            with evaluating(trained.flow, trained.seed):
                drawn = picture(trained, row)
        except ValueError as error:  # the numbers are there all the same
            reason = " ".join(str(error).split())
            where = relative(trained.folder)
            print(f"{where}: no picture of {picture.__name__}: {reason}", file=sys.stderr)
            continue
        found |= {f"figures/{name}": path for name, path in drawn.items()}
    return found


def _drawable(data: TensorDataModule) -> bool:
    """Whether the data are images that are grey or have three colours."""
    return data.kind == "image" and data.image_shape[0] in (1, 3)


def plane(trained: Trained, row: str) -> dict[str, Path]:
    """Density and samples of points of the plane: picture.npz, density.png, samples.png."""
    from surflow.reporting.figures.densities import density_figure, sample_figure

    flow, data, folder = trained.flow, trained.data, trained.folder
    if data.kind != "points" or tuple(data.event_shape) != (2,):
        return {}
    split = "test" if len(data.splits["test"]) >= POINTS else "train"
    shown = data.splits[split][:POINTS]
    samples = flow.sample(POINTS).cpu()
    if data.num_levels is not None:
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
    path = write_npz(
        folder / "picture.npz",
        grid_low=np.float64(low),
        grid_high=np.float64(high),
        density=density.numpy().astype(np.float32),
        true_density=true.reshape(size, size).numpy().astype(np.float32),
        samples=samples.numpy().astype(np.float32),
        data_samples=shown.numpy().astype(np.float32),
    )
    cells = {row: {data.name: path}}
    return {
        "density": density_figure(cells, folder / "density.png"),
        "samples": sample_figure(cells, folder / "samples.png"),
    }


def sets(trained: Trained, row: str) -> dict[str, Path]:
    """Sets of points from the model and from the test split: points.npz, samples.png."""
    from surflow.reporting.figures.sets import clouds_figure

    data, folder = trained.data, trained.folder
    if data.kind != "set":
        return {}
    samples = draw_unit(trained.flow, 0, SETS, trained.seed).cpu().numpy()
    if not np.isfinite(samples).all():
        raise ValueError("samples: expected finite points, got others")
    real = evenly_spaced(data.splits["test"], SETS).numpy()
    samples = samples.astype(np.float32)
    write_npz(folder / "points.npz", samples=samples, data=real, width=np.float64(data.width))
    clouds = {"data": real, "model": samples}
    return {"samples": clouds_figure(clouds, data.width, folder / "samples.png")}


def images(trained: Trained, row: str) -> dict[str, Path]:
    """Samples of the model and images of the test split: images.npz, samples.png.

    Where the decoder of a VAE is of bits or levels, ``samples`` are its means, as grey images, and
    ``draws`` are draws for the same latents; samples.png then has both.
    """
    flow, data, folder = trained.flow, trained.data, trained.folder
    if not _drawable(data):
        return {}
    arrays: dict[str, Any] = {}
    samples, levels = data.pixels(draw_unit(flow, 0, IMAGES, trained.seed).cpu())
    real, _ = data.pixels(evenly_spaced(data.splits["test"], IMAGES))
    parts = decoded_of(flow)
    if parts is not None and parts.has_grey:
        arrays["draws"] = full_range(samples, levels).numpy()
        real = full_range(real, levels)
        means = draw_unit(parts, 0, IMAGES, trained.seed)
        samples, levels, arrays["shown"] = parts.pixels(means, data)
    arrays |= {"samples": samples.numpy(), "data": real.numpy(), "num_levels": np.int64(levels)}
    write_npz(folder / "images.npz", **arrays)
    grids = [arrays[name] for name in ("samples", "draws") if name in arrays]
    return {"samples": image_sheet(grids, folder / "samples.png", columns=8, num_levels=levels)}


def interpolation(trained: Trained, row: str) -> dict[str, Path]:
    """The way between test images, of four pairs: interpolation.png."""
    flow, data, folder = trained.flow, trained.data, trained.folder
    if not _drawable(data):
        return {}
    return {"interpolation": interpolation_figure(flow, data, folder, pairs=4, seed=trained.seed)}


def interpolation_figure(
    flow: Flow,
    data: TensorDataModule,
    folder: str | Path,
    pairs: int = 8,
    steps: int = 9,
    path: str = "spherical",
    seed: int = 0,
    name: str = "interpolation.png",
) -> Path:
    """Draw a grid of images: a row for a pair of test images, the way between them in columns.

    Of a VAE over bits or levels, whose draws cannot be kept, the way is between draws of the two
    posteriors, through the latents of the prior, and the decoder's means are shown.

    Args:
        flow: a flow over images, on any device.
        data: a DataModule, set up, of the same images, flat or not.
        pairs: rows; as many as there are pairs of test images where there are fewer.
        steps: columns, the two images included.
        path: "spherical" or "linear"; see :func:`surflow.models.latent_interpolation`.
        seed: of the choice of images and of what inference draws.

    Raises ValueError as :func:`surflow.models.latent_interpolation`; for fewer than two images.
    """
    test = data.splits["test"]
    pairs = min(pairs, len(test) // 2)
    if pairs < 1:
        raise ValueError(f"interpolation: expected at least two test images, got {len(test)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(test), generator=generator)[: 2 * pairs]
    chosen = test[order.to(test.device)].to(device_of(flow))
    parts = decoded_of(flow)
    if parts is not None and parts.has_grey:
        with evaluating(parts, seed):
            ends = parts.posterior(chosen)
            way = latent_interpolation(parts.prior, *ends.split(pairs), steps, path, seed)
            pixels, levels, _ = parts.pixels(parts.images(way.flatten(0, 1)), data)
    else:
        way = latent_interpolation(flow, chosen[:pairs], chosen[pairs:], steps, path, seed)
        pixels, levels = data.pixels(way.flatten(0, 1).cpu())
    return image_grid(pixels.numpy(), Path(folder) / name, columns=steps, num_levels=levels)


def reconstructions(trained: Trained, row: str) -> dict[str, Path]:
    """The first training images, and the decoder's images of a draw of their posterior:
    reconstructions.npz, reconstructions.png (10 by 10, the training images on the left)."""
    data, folder = trained.data, trained.folder
    parts = decoded_of(trained.flow)
    if not _drawable(data) or parts is None:
        return {}
    x = data.splits["train"][:RECONSTRUCTIONS]
    found, levels, shown = parts.pixels(parts.images(parts.posterior(x)), data)
    real, own = data.pixels(x.cpu())
    real = full_range(real, own) if levels == 256 else real
    arrays = {"data": real.numpy(), "reconstructions": found.numpy()}
    write_npz(folder / "reconstructions.npz", **arrays, num_levels=levels, shown=shown)
    path = folder / "reconstructions.png"
    return {"reconstructions": image_sheet([*arrays.values()], path, 10, num_levels=levels)}


def latent(trained: Trained, row: str) -> dict[str, Path]:
    """Aggregated posterior and prior of a 2-D latent: latent.npz, latent.png."""
    from surflow.reporting.figures.latents import latent_run_figure

    data, folder = trained.data, trained.folder
    parts = decoded_of(trained.flow)
    if not _drawable(data) or parts is None or tuple(parts.vae.latent_shape) != (2,):
        return {}
    arrays = latent_arrays(parts, data.splits["test"])
    try:
        labels = data.labels("test")
    except UserError:  # their files are missing: a picture without colours
        labels = None
    if labels is not None:
        arrays["labels"] = labels.numpy()
    file = write_npz(folder / "latent.npz", **arrays)
    if not math.isnan(arrays["kl"]):
        kl = f"KL(aggregated posterior || prior) {arrays['kl']:.3f} nats"
        print(f"{relative(file)}: {kl}, by the sum over {GRID} x {GRID} cells")
    return {"latent": latent_run_figure(file, folder / "latent.png")}


def pyramid(trained: Trained, row: str) -> dict[str, Path]:
    """Of a model of several resolutions: test images level by level, draws of the finest image
    given their coarsest one, and unconditional draws level by level.

    pyramid.npz holds as many images of each row as there are levels, all brought to the finest
    size; super_resolution.png and levels.png have the test images on the left.
    """
    flow, data, folder = trained.flow, trained.data, trained.folder
    if not _drawable(data) or not isinstance(flow, PyramidFlow):
        return {}
    x = evenly_spaced(data.splits["test"], PYRAMIDS).to(device_of(flow))
    count = len(flow.sides)
    seen = flow.coarsened(x)[::-1]
    finer = [flow.images(seen[0])[-1] for _ in range(count)]
    drawn = flow.images(flow.base.sample(len(x)))
    levels = data.num_levels
    shown = {"data": seen, "super_resolution": finer, "levels": drawn}
    arrays = {name: side_by_side(x, levels, flow.sides[0]) for name, x in shown.items()}
    write_npz(folder / "pyramid.npz", **arrays, num_levels=np.int64(levels), columns=count)
    found = {}
    for name in ("super_resolution", "levels"):
        path, grids = folder / f"{name}.png", [arrays["data"], arrays[name]]
        found[name] = image_sheet(grids, path, count, num_levels=levels)
    return found


def side_by_side(images: list[Tensor], num_levels: int, side: int) -> np.ndarray:
    """Images in [0, 1) of several sizes, (N, C, s, s) each, as integers of one size: those of row n
    after each other. Values outside [0, 1) are shown as its edge."""
    found = []
    for image in images:
        whole = (image.float().nan_to_num(0.0) * num_levels).floor().clamp(0, num_levels - 1)
        whole = whole.repeat_interleave(side // image.shape[-1], -1)
        found.append(whole.repeat_interleave(side // image.shape[-2], -2))
    return torch.stack(found, dim=1).flatten(0, 1).to(torch.uint8).cpu().numpy()
