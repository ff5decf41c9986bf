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
