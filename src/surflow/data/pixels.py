"""Values as 8-bit images."""

from __future__ import annotations

import torch
from torch import Tensor


class BrokenSamples(ValueError):
    """Samples that are no images: not finite, or outside the levels there are."""


def to_pixels(values: Tensor, num_levels: int) -> Tensor:
    """Images of levels as bytes: integers stay as they are, reals go to the nearest level.

    Args:
        values: (N, C, H, W).
        num_levels: K: levels are 0 ... K - 1.

    Raises:
        BrokenSamples: for values that are not finite, or integers that are no levels.
    """
    if values.is_floating_point():
        broken = (~values.isfinite()).flatten(1).any(1).sum().item()
        if broken:
            raise BrokenSamples(
                f"samples: expected finite values, got others in {broken} of {len(values)} images"
            )
        values = values.round().clamp(0, num_levels - 1)
    return as_images(values.long(), num_levels)  # a byte compared with 256 is compared with 0


def as_images(samples: Tensor, num_levels: int = 256) -> Tensor:
    """Images of integers as uint8.

    Args:
        samples: (B, C, H, W), integers.
        num_levels: K: levels are 0 ... K - 1, at most 256 of them.

    Raises:
        ValueError: for more levels than a byte holds.
        BrokenSamples: for reals, or levels outside 0 ... K - 1. A draw that was not finite is
            rounded to such a level.
    """
    if not 1 <= num_levels <= 256:
        raise ValueError(f"num_levels: expected 1 to 256, got {num_levels}")
    if samples.is_floating_point():
        raise BrokenSamples(f"samples: expected integer levels, got {samples.dtype}: no images")
    outside = ((samples < 0) | (samples >= num_levels)).flatten(1).any(1).sum().item()
    if outside:
        raise BrokenSamples(
            f"samples: expected levels 0 to {num_levels - 1}, got others (or values that are not "
            f"finite) in {outside} of {len(samples)} images"
        )
    return samples.to(torch.uint8)


def full_range(images: Tensor, num_levels: int = 256) -> Tensor:
    """Images of levels 0 ... K - 1 as 0 ... 255: level times 255/(K - 1), rounded; uint8."""
    if num_levels == 256:
        return images
    return (images.float() * (255 / max(num_levels - 1, 1))).round().to(torch.uint8)
