"""Draw samples from a trained run: an .npz file or a folder of PNG files, and a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from surflow.cli.common import (
    check_everything,
    guarded,
    load_flow,
    one_line_errors,
    relative,
    use_threads,
)
from surflow.config import conf_dir, register_resolvers, run_dir
from surflow.errors import UserError

GRID = 64  # images of the picture
NOTE = "samples.json"  # in a folder of PNG files: what they are samples of


def sample_run(cfg: DictConfig) -> Path:
    """Draw ``n`` samples with the weights of a checkpoint; returns the file or the folder.

    The draws follow from checkpoint, ``n``, ``seed`` and ``temperature``; no batch size changes
    them. A folder that was begun is completed.
    """
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    register_resolvers()
    check_everything(cfg)
    if not isinstance(cfg.n, int) or isinstance(cfg.n, bool) or cfg.n < 1:
        raise UserError(f"n: expected a positive whole number, got {cfg.n}")
    if not isinstance(cfg.temperature, int | float) or not cfg.temperature > 0:
        raise UserError(f"temperature: expected a positive number, got {cfg.temperature}")
    from hydra.utils import instantiate

    shape = instantiate(cfg.data.module).image_shape
    images = shape is not None
    out = Path(cfg.out) if cfg.out else run_dir(cfg) / "samples.npz"
    if out.suffix == ".png":
        wanted = "an .npz file or a folder for PNG files" if images else "an .npz file"
        raise UserError(f"out: expected {wanted}, got {cfg.out}")
    to_folder = images and out.suffix != ".npz"
    if to_folder and shape[0] not in (1, 3):
        raise UserError(f"out: PNG files have 1 or 3 channels, not {shape[0]}; give an .npz file")
    use_threads(cfg)
    flow, data, path = load_flow(cfg)
    write = _write_pngs if to_folder else _write_images if images else _write_points
    picture = write(cfg, flow, data, path, out)
    print(f"{relative(out)}: {cfg.n} samples from {relative(path)}")
    if picture is not None:
        print(relative(picture))
    return out


def _drawn(cfg: DictConfig, flow: Any, unit: int, done: int = 0) -> Iterator[Any]:
    """The units of ``n`` draws behind the first ``done``, on the CPU; progress is shown."""
    from surflow.metrics.command import shown_progress
    from surflow.metrics.samples import draw_unit, num_units

    with shown_progress() as progress:
        for index in range(done, num_units(cfg.n, unit)):
            progress("samples", index * unit, cfg.n)
            yield draw_unit(flow, index, cfg.n, cfg.seed, cfg.temperature, unit).cpu()
        progress("samples", cfg.n, cfg.n)


def _write_npz(cfg: DictConfig, out: Path, **arrays: Any) -> None:
    import numpy as np

    from surflow.reporting.records import write_bytes_atomic

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, seed=cfg.seed, temperature=cfg.temperature)
    write_bytes_atomic(out, buffer.getvalue())


def _write_points(cfg: DictConfig, flow: Any, data: Any, path: Path, out: Path) -> Path | None:
    """Samples that are no images, and a scatter plot of those in the plane."""
    import torch

    from surflow.metrics.samples import POINT_UNIT
    from surflow.reporting import figures

    samples = torch.cat(list(_drawn(cfg, flow, POINT_UNIT))).numpy()
    _write_npz(cfg, out, samples=samples)
    if data.kind == "set":
        from surflow.reporting.point_sets import clouds_figure

        shown = {f"{len(samples[:GRID])} samples": samples[:GRID]}
        return clouds_figure(shown, data.width, out.with_suffix(".png"))
    if data.kind != "points":
        return None
    window = data.dataset.window
    picture = out.with_suffix(".png")
    figures.scatter_figure(samples, picture, -window, window)
    return picture


def _write_images(cfg: DictConfig, flow: Any, data: Any, path: Path, out: Path) -> Path | None:
    """Images as one uint8 array (n, C, H, W), and a grid of the first ones.

    Of a VAE over bits or levels also ``means``, the decoder's for the same latents as grey images,
    which the picture then shows beside the draws.
    """
    import torch

    from surflow.cli.decoded import decoded_of
    from surflow.data.pixels import full_range
    from surflow.metrics.samples import IMAGE_UNIT
    from surflow.reporting.images import image_sheet

    parts = decoded_of(flow)
    found = [data.pixels(drawn) for drawn in _drawn(cfg, flow, IMAGE_UNIT)]
    samples, levels = torch.cat([pixels for pixels, _ in found]), found[0][1]
    if parts is None or not parts.has_grey:
        _write_npz(cfg, out, samples=samples.numpy())
        return (
            _grid(samples.numpy(), out.with_suffix(".png"), levels) if _drawable(samples) else None
        )
    means = torch.cat([parts.pixels(drawn, data)[0] for drawn in _drawn(cfg, parts, IMAGE_UNIT)])
    _write_npz(cfg, out, samples=samples.numpy(), means=means.numpy())
    if not _drawable(samples):
        return None
    grids = [means[:GRID].numpy(), full_range(samples[:GRID], levels).numpy()]
    return image_sheet(grids, out.with_suffix(".png"), columns=8)


def _drawable(samples: Any) -> bool:
    """Whether they are grey or have three colours."""
    return samples.shape[1] in (1, 3)


def _write_pngs(cfg: DictConfig, flow: Any, data: Any, path: Path, out: Path) -> Path:
    """One PNG file an image, each whole or not there; units that are complete are kept."""
    import numpy as np
    from PIL import Image

    from surflow.metrics.samples import IMAGE_UNIT
    from surflow.reporting.images import write_image

    _claim(cfg, path, out)
    files = [out / f"{i:06d}.png" for i in range(cfg.n)]
    units = [files[i : i + IMAGE_UNIT] for i in range(0, cfg.n, IMAGE_UNIT)]
    there = {file.name for file in out.glob("*.png")}
    done = next((i for i, unit in enumerate(units) if {f.name for f in unit} - there), len(units))
    with ThreadPoolExecutor() as pool:
        for unit, drawn in zip(units[done:], _drawn(cfg, flow, IMAGE_UNIT, done), strict=True):
            images, levels = data.pixels(drawn)
            list(pool.map(write_image, images.numpy(), unit, [levels] * len(unit)))
    first = [np.atleast_3d(np.asarray(Image.open(file))) for file in files[:GRID]]
    return _grid(np.stack(first).transpose(0, 3, 1, 2), out.with_name(f"{out.name}.png"))


def _claim(cfg: DictConfig, path: Path, out: Path) -> None:
    """Say in the folder what its files are; refuse one whose files are of something else."""
    from surflow.metrics.inception import sha256_of
    from surflow.reporting.records import write_json_atomic

    note = {
        "checkpoint_sha256": sha256_of(path),
        "n": cfg.n,
        "seed": cfg.seed,
        "temperature": float(cfg.temperature),
    }
    if (out / NOTE).is_file():
        try:
            found = json.loads((out / NOTE).read_text())
            other = [f"{key} {found.get(key)}" for key in note if found.get(key) != note[key]]
        except (ValueError, AttributeError):
            other = [f"a damaged {NOTE}"]
        if other:
            raise UserError(
                f"out: {relative(out)} holds samples of other settings ({', '.join(other)}); "
                "delete it or give another folder"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: {relative(out)} is there and not a folder of ours; give another one")
    write_json_atomic(out / NOTE, note)


def _grid(images: Any, picture: Path, levels: int = 256) -> Path:
    from surflow.reporting.images import image_grid

    return image_grid(images[:GRID], picture, columns=8, num_levels=levels)


@hydra.main(config_path=conf_dir(), config_name="sample", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        sample_run(cfg)


main = guarded(_main)

if __name__ == "__main__":
    main()
