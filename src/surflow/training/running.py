"""Means over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class RunningMean(Metric):
    """Sum over count, over all processes where it is computed; reading neither waits for a device.

    Args:
        dtype: of the sum before the first update; a sum of wider values is as wide as they are.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int = 1) -> None:
        """Add the sum of so many values."""
        self.total = self.total + total
        self.count = self.count + count

    def compute(self) -> float:
        """The mean, divided in float64; NaN without values."""
        count = self.count.item()
        return self.total.item() / count if count else float("nan")
