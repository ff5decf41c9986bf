"""Draws from a flow in numbered units of a fixed size, so that no batch size changes them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from surflow.flow import Flow

IMAGE_UNIT = 256
"""Images drawn at a time, each time from a seed of their own."""

POINT_UNIT = 4096
"""The same for data of one dimension, such as points of the plane."""


class BrokenSamples(ValueError):
    """Samples that are no images: not finite, or outside the levels there are."""


def flow_device(flow: Flow) -> torch.device:
    """Where a flow's parameters are; the CPU for one without any."""
    return next((p.device for p in flow.parameters()), torch.device("cpu"))


def num_units(n: int, unit: int) -> int:
    """Units that n rows take, the last one maybe smaller."""
    return -(-n // unit)


@torch.no_grad()
def draw_unit(
    flow: Flow, index: int, n: int, seed: int, temperature: float = 1.0, unit: int = IMAGE_UNIT
) -> Tensor:
    """Rows ``index * unit`` and on of n draws.

    They follow from the arguments and the kind of device alone; the random state of the process
    is what it was.

    Args:
        flow: the model, in the mode it is to be sampled in.
        index: of the unit, from 0.
        n: all draws; the last unit has what is left.
        seed: of all draws.
        temperature: of the base distribution.
        unit: rows a unit.

    Returns:
        (B, *event), B = ``unit``, or less in the last one, on the flow's device.

    Raises:
        ValueError: for an index beyond the last unit.
    """
    rows = min(unit, n - index * unit)
    if index < 0 or rows < 1:
        raise ValueError(f"index: expected 0 to {num_units(n, unit) - 1}, got {index}")
    device = flow_device(flow)
    low, high = np.random.SeedSequence((seed, index)).generate_state(2)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(high) << 31 ^ int(low))
        return flow.sample(rows, temperature=temperature)


def draw(
    flow: Flow, n: int, seed: int, temperature: float = 1.0, unit: int = IMAGE_UNIT
) -> Iterator[Tensor]:
    """All units of n draws, in order; see :func:`draw_unit`."""
    for index in range(num_units(n, unit)):
        yield draw_unit(flow, index, n, seed, temperature, unit)


def as_images(samples: Tensor, num_levels: int = 256) -> Tensor:
    """Draws as uint8 images.

    Args:
        samples: (B, C, H, W), integers.
        num_levels: K: levels are 0 ... K - 1, at most 256 of them.

    Raises:
        ValueError: for more levels than a byte holds.
        BrokenSamples: for reals, or levels outside 0 ... K - 1; that is also what a draw that was
            not finite is rounded to.
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
