"""Images and grids of them as PNG files, pixel for pixel."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from surflow.files import write_bytes

PAPER = 255  # grey level between and around the images
SHOWN_SIDE = 64  # pixels of the picture that a small image's side is brought up to


def tile(
    images: np.ndarray, columns: int = 8, gap: int = 2, num_levels: int = 256, scale: int = 1
) -> np.ndarray:
    """Images side by side, row by row, on white; the last row may be short.

    Args:
        images: (N, C, H, W), integer levels 0 ... K - 1; one channel is grey, three are RGB.
        columns: images a row.
        gap: white pixels of the picture between the images and around them.
        num_levels: K, 2 to 256; level K - 1 is white, or the full colour.
        scale: side of an image's pixel in the picture, with no smoothing.

    Returns:
        (rows * (H * scale + gap) + gap, columns * (W * scale + gap) + gap, C), uint8, of as many
        columns as there are images where they are fewer.

    Raises ValueError for another shape or number of channels, reals, or levels out of range.
    """
    for name, value, least in (("columns", columns, 1), ("scale", scale, 1), ("gap", gap, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    pixels = _pixels(images, num_levels)
    n, height, width, channels = pixels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    cell_height, cell_width = (side * scale + gap for side in (height, width))
    cells = np.full((rows * columns, cell_height, cell_width, channels), PAPER, np.uint8)
    cells[:n, gap:, gap:] = pixels.repeat(scale, 1).repeat(scale, 2)
    sheet = cells.reshape(rows, columns, cell_height, cell_width, channels)
    sheet = sheet.transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(rows * cell_height, columns * cell_width, channels)
    return np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=PAPER)


def image_grid(
    images: np.ndarray,
    path: str | Path,
    columns: int = 8,
    scale: int | None = None,
    num_levels: int = 256,
    gap: int = 2,
) -> Path:
    """Write images as :func:`tile` lays them out.

    `scale` None: 2, and more for images of fewer than 32 pixels a side. Returns the path; the file
    is written whole or not at all. Raises `ValueError` as :func:`tile`.
    """
    return image_sheet([images], path, columns, scale, num_levels, gap)


def image_sheet(
    grids: Sequence[np.ndarray],
    path: str | Path,
    columns: int = 8,
    scale: int | None = None,
    num_levels: int = 256,
    gap: int = 2,
) -> Path:
    """Write grids of images, as many in each, of one shape, side by side: see :func:`image_grid`.

    Between the grids is as much white as an eighth of one is wide.
    """
    if scale is None:
        scale = max(2, SHOWN_SIDE // max(np.shape(grids[0])[-2:], default=SHOWN_SIDE))
    sheets = [tile(images, columns, gap, num_levels, scale) for images in grids]
    height, width, channels = sheets[0].shape
    white = np.full((height, width // 8, channels), PAPER, np.uint8)
    parts = [part for sheet in sheets for part in (white, sheet)]
    return write_bytes(path, _png(np.concatenate(parts[1:], axis=1)))


def write_image(image: np.ndarray, path: str | Path, num_levels: int = 256) -> Path:
    """Write one image (C, H, W) of levels 0 ... K - 1 as a PNG file; see :func:`image_grid`."""
    return write_bytes(path, _png(_pixels(np.asarray(image)[None], num_levels)[0]))


def _pixels(images: np.ndarray, num_levels: int) -> np.ndarray:
    """uint8 (N, H, W, C) with levels 0 ... 255."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        want = "shape (N, C, H, W) with 1 or 3 channels"
        raise ValueError(f"images: expected {want}, got {images.shape}")
    if not np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"images: expected integer levels, got {images.dtype}")
    if not 2 <= num_levels <= 256:
        raise ValueError(f"num_levels: expected 2 to 256, got {num_levels}")
    low, high = int(images.min()), int(images.max())
    if low < 0 or high >= num_levels:
        want = f"levels 0 to {num_levels - 1}"
        raise ValueError(f"images: expected {want}, got some from {low} to {high}")
    if num_levels != 256:
        images = np.rint(images * (255 / (num_levels - 1)))
    return images.astype(np.uint8).transpose(0, 2, 3, 1)


def _png(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W, C), C = 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
