"""Draws from a flow in numbered units of a fixed size, so that no batch size changes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surflow.data.module import TensorDataModule
from surflow.data.pixels import full_range
from surflow.draws import evaluating
from surflow.errors import UserError
from surflow.evaluation.vae import decoded_of
from surflow.files import relative, sha256_of, write_json, write_npz
from surflow.flow import Flow
from surflow.progress import shown_progress

IMAGE_UNIT = 256
"""Images drawn at a time, each time from a seed of their own."""

POINT_UNIT = 4096
"""The same for data of one dimension, such as points of the plane."""

SHOWN = 64  # samples of a picture
NOTE = "samples.json"  # in a folder of PNG files: what they are samples of


def num_units(n: int, unit: int) -> int:
    """Units that n rows take, the last one maybe smaller."""
    return -(-n // unit)


def draw_unit(
    flow: Flow, index: int, n: int, seed: int, temperature: float = 1.0, unit: int = IMAGE_UNIT
) -> Tensor:
    """Rows ``index * unit`` and on of n draws, (B, *event), on the flow's device.

    B is ``unit``, or less in the last one. They follow from the arguments and the device's kind
    alone; mode and random state are restored. Raises ValueError for an index beyond the last one.
    """
    rows = min(unit, n - index * unit)
    if index < 0 or rows < 1:
        raise ValueError(f"index: expected 0 to {num_units(n, unit) - 1}, got {index}")
    low, high = np.random.SeedSequence((seed, index)).generate_state(2)
    with evaluating(flow, int(high) << 31 ^ int(low)):
        return flow.sample(rows, temperature=temperature)


def draw(
    flow: Flow, n: int, seed: int, temperature: float = 1.0, unit: int = IMAGE_UNIT, first: int = 0
) -> Iterator[Tensor]:
    """The units of n draws from number ``first`` on, with progress; see :func:`draw_unit`."""
    with shown_progress() as progress:
        for index in range(first, num_units(n, unit)):
            progress("samples", index * unit, n)
            yield draw_unit(flow, index, n, seed, temperature, unit)
        progress("samples", n, n)


@dataclass(frozen=True)
class SampleWriter:
    """n samples of a trained model for a user; no batch size changes them. ``data`` are set up."""

    flow: Flow
    data: TensorDataModule
    n: int
    seed: int
    temperature: float

    def _draw(self, flow: Flow, unit: int, first: int = 0) -> Iterator[Tensor]:
        units = draw(flow, self.n, self.seed, self.temperature, unit, first)
        return (rows.cpu() for rows in units)

    def write_array(self, out: Path) -> Path | None:
        """Write an .npz file; returns the picture of the first ones, where there is one."""
        write = self._write_images if self.data.kind == "image" else self._write_points
        return write(out, out.with_suffix(".png"))

    def _write_points(self, out: Path, picture: Path) -> Path | None:
        """Points of the plane have a scatter plot, sets of points clouds."""
        from surflow.reporting.figures.densities import scatter_figure
        from surflow.reporting.figures.sets import clouds_figure

        samples = torch.cat(list(self._draw(self.flow, POINT_UNIT))).numpy()
        write_npz(out, samples=samples, seed=self.seed, temperature=self.temperature)
        if self.data.kind == "set":
            shown = {f"{len(samples[:SHOWN])} samples": samples[:SHOWN]}
            return clouds_figure(shown, self.data.width, picture)
        if self.data.kind != "points" or samples.shape[1:] != (2,):
            return None
        window = self.data.dataset.window
        return scatter_figure(samples, picture, -window, window)

    def _write_images(self, out: Path, picture: Path) -> Path | None:
        """Images as one uint8 array (n, C, H, W).

        Of a VAE over bits or levels also ``means``, the decoder's for the same latents as grey
        images; the picture then shows both.
        """
        from surflow.reporting.figures.images import image_sheet

        found = [self.data.pixels(rows) for rows in self._draw(self.flow, IMAGE_UNIT)]
        samples, levels = torch.cat([pixels for pixels, _ in found]), found[0][1]
        arrays, grids = {"samples": samples.numpy()}, [samples[:SHOWN].numpy()]
        parts = decoded_of(self.flow)
        if parts is not None and parts.has_grey:
            means = [parts.pixels(rows, self.data)[0] for rows in self._draw(parts, IMAGE_UNIT)]
            arrays["means"] = torch.cat(means).numpy()
            grids = [arrays["means"][:SHOWN], full_range(samples[:SHOWN], levels).numpy()]
            levels = 256
        write_npz(out, **arrays, seed=self.seed, temperature=self.temperature)
        if samples.shape[1] not in (1, 3):
            return None
        return image_sheet(grids, picture, columns=8, num_levels=levels)

    def write_files(self, out: Path, checkpoint: Path) -> Path:
        """One PNG file an image, each whole or not there; complete units are kept.

        A folder ``out`` that was begun is completed; it keeps the checksum of the ``checkpoint``.
        Returns the picture of the first ones. Raises UserError for a folder of other files.
        """
        from PIL import Image

        from surflow.reporting.figures.images import image_grid, write_image

        self._claim(out, checkpoint)
        files = [out / f"{i:06d}.png" for i in range(self.n)]
        units = [files[i : i + IMAGE_UNIT] for i in range(0, self.n, IMAGE_UNIT)]
        there = {file.name for file in out.glob("*.png")}
        whole = [{file.name for file in unit} <= there for unit in units]
        done = whole.index(False) if False in whole else len(units)
        with ThreadPoolExecutor() as pool:
            drawn = self._draw(self.flow, IMAGE_UNIT, done)
            for unit, rows in zip(units[done:], drawn, strict=True):
                images, levels = self.data.pixels(rows)
                list(pool.map(write_image, images.numpy(), unit, [levels] * len(unit)))
        first = [np.atleast_3d(np.asarray(Image.open(file))) for file in files[:SHOWN]]
        images = np.stack(first).transpose(0, 3, 1, 2)
        return image_grid(images, out.with_name(f"{out.name}.png"), columns=8)

    def _claim(self, out: Path, checkpoint: Path) -> None:
        """Say in the folder what its files are; refuse one whose files are of something else."""
        note = {"checkpoint_sha256": sha256_of(checkpoint), "n": self.n, "seed": self.seed}
        note["temperature"] = float(self.temperature)
        if (out / NOTE).is_file():
            try:
                found = json.loads((out / NOTE).read_text())
                other = [f"{key} {found.get(key)}" for key in note if found.get(key) != note[key]]
            except (ValueError, AttributeError):
                other = [f"a damaged {NOTE}"]
            if other:
                why = f"holds samples of other settings ({', '.join(other)})"
                raise UserError(f"out: {relative(out)} {why}; delete it or give another folder")
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            why = "is there and not a folder of samples"
            raise UserError(f"out: {relative(out)} {why}; give another one")
        write_json(out / NOTE, note)
