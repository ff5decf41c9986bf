"""The least precision of a density: float32, also where nets run in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(*values: Tensor) -> torch.dtype:
    """The common dtype of some tensors, float32 or better."""
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def at_least_float32(value: Tensor) -> Tensor:
    """Lift half precision and integers to float32; float32 and float64 stay."""
    return value.to(working_dtype(value))


def repeat_rows(value: Tensor | None, num_samples: int) -> Tensor | None:
    """Copies of all rows: (B, ...) -> (K B, ...), row b of sample k at k B + b."""
    if value is None or num_samples == 1:
        return value
    return value.expand(num_samples, *value.shape).flatten(0, 1)
