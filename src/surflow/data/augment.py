"""Augmentation of whole batches of images by indexing: on their device, no loop over images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from surflow.errors import check_whole

_STREAM = 0x41554731  # keeps these random numbers apart from others of the same seed and epoch


@dataclass(frozen=True)
class Draws:
    """What was drawn for every image, each (N,).

    Attributes:
        flip: mirrored left to right, bool.
        down, right: how far the content moves, pixels, int64.
    """

    flip: Tensor
    down: Tensor
    right: Tensor

    def to(self, device: torch.device) -> Draws:
        """The same draws on a device."""
        return Draws(self.flip.to(device), self.down.to(device), self.right.to(device))

    def of(self, rows: Tensor) -> Draws:
        """The draws of some of the images."""
        return Draws(self.flip[rows], self.down[rows], self.right[rows])


@dataclass(frozen=True)
class Augmentation:
    """Flip left to right; pad with the edge's pixels, translate, cut the centre out.

    The translation is uniform within ±translate times the padded side, in whole pixels.

    Args:
        flip: mirror every other image, on average.
        pad: pixels added on every side before the translation.
        translate: largest translation, as a share of the padded side.

    Raises:
        ValueError: for a negative or fractional pad, or a translate that is no share in [0, 1).
    """

    flip: bool = False
    pad: int = 0
    translate: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.flip, bool):
            raise ValueError(f"data.flip: expected true or false, got {self.flip!r}")
        check_whole("data.pad", self.pad, least=0)
        number = isinstance(self.translate, int | float) and not isinstance(self.translate, bool)
        if not number or not 0 <= self.translate < 1:
            raise ValueError(f"data.translate: expected a share in [0, 1), got {self.translate!r}")

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self.flip or self.translate > 0

    def reach(self, side: int) -> int:
        """The largest translation of a side of so many pixels, in whole pixels."""
        return round(self.translate * (side + 2 * self.pad))

    def check(self, height: int, width: int) -> None:
        """Raise ValueError where a translation would move more into view than was padded."""
        reach = max(self.reach(height), self.reach(width))
        if reach > self.pad:
            raise ValueError(
                f"data.translate: {self.translate:g} of a side moves images of {height}x{width} by "
                f"up to {reach} pixels; expected data.pad >= {reach}, got {self.pad}"
            )

    def draws(self, n: int, height: int, width: int, seed: int, epoch: int) -> Draws:
        """What happens to each of n images in an epoch: it follows from seed and epoch alone."""
        random = np.random.Generator(np.random.PCG64([_STREAM, seed, epoch]))
        u = torch.from_numpy(random.random((3, n)))  # float64

        def move(u: Tensor, side: int) -> Tensor:
            return ((2 * u - 1) * self.translate * (side + 2 * self.pad)).round().long()

        flip = u[0] < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
        return Draws(flip, move(u[1], height), move(u[2], width))

    @staticmethod
    def apply(images: Tensor, draws: Draws) -> Tensor:
        """Images as drawn: (B, C, H, W) -> (B, C, H, W), of the same dtype, by one indexing."""
        batch, channels, height, width = images.shape
        device = images.device
        # a pixel beyond the image is its nearest edge pixel, as padding would have made it
        y = torch.arange(height, device=device) - draws.down[:, None]
        x = torch.arange(width, device=device) - draws.right[:, None]
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
        x = torch.where(draws.flip[:, None], width - 1 - x, x)
        return images[
            torch.arange(batch, device=device)[:, None, None, None],
            torch.arange(channels, device=device)[None, :, None, None],
            y[:, None, :, None],
            x[:, None, None, :],
        ]
