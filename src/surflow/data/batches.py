"""Batches of tensors that stay in memory, on the device: no workers, no copies, no collation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

_STREAM = 0x4F524432  # keeps these random numbers apart from others of the same seed and epoch


class TensorBatches:
    """Iterate over the rows of a tensor in batches.

    The order of an epoch follows from the seed and the epoch's number alone. A state makes another
    such object resume after the batches given out.

    Args:
        data: (N, *event), on whichever device it is to stay.
        batch_size: rows a batch, over all ranks together.
        seed: of the shuffling, >= 0; None keeps the order.
        epoch: gives the number of the current epoch.
        drop_last: leave out an incomplete last batch (for training only).
        rank, world_size: this process's share: of every batch an equal part, in order.
        whole: this process's share is every ``world_size``-th batch instead, with the same rows
            whatever the number of processes; the last one may have no rows.

    Raises:
        ValueError: for a batch that is not positive, does not divide over the ranks, or (with
            ``drop_last``) is larger than the data; for fewer rows than ranks.
    """

    def __init__(
        self,
        data: Tensor,
        batch_size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        whole: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
        if batch_size % world_size and not whole:
            raise ValueError(
                f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}"
            )
        if len(data) < world_size and not whole:
            raise ValueError(
                f"data: expected at least a row for each of the {world_size} processes, "
                f"got {len(data)}"
            )
        if drop_last and batch_size > len(data):
            raise ValueError(
                f"batch_size: expected at most the {len(data)} training points, got {batch_size}"
            )
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.drop_last = drop_last
        self.rank, self.world_size = rank, world_size
        self.whole = whole
        self._done = (-1, 0)  # epoch, batches of it that were given out
        self._resume = (-1, 0)

    def __len__(self) -> int:
        batches, rest = divmod(len(self.data), self.batch_size)
        if not self.drop_last:
            # a rest too small for every process to have a row of it joins the batch before it
            batches += rest >= (1 if self.whole else self.world_size)
        return -(-batches // self.world_size) if self.whole else batches

    def __iter__(self) -> Iterator[Tensor]:
        epoch = self.epoch()
        resumed, first = self._resume
        self._resume = (-1, 0)
        if resumed != epoch or first >= len(self):
            first = 0
        order = self._order(epoch)
        for i in range(first, len(self)):
            self._done = (epoch, i + 1)
            start, stop = self._rows(i)
            yield self.data[start:stop] if order is None else self.data[order[start:stop]]

    def _order(self, epoch: int) -> Tensor | None:
        if self.seed is None:
            return None
        random = np.random.Generator(np.random.PCG64([_STREAM, self.seed, epoch]))
        return torch.from_numpy(random.permutation(len(self.data))).to(self.data.device)

    def _rows(self, i: int) -> tuple[int, int]:
        """First and last row, exclusive, of this process's i-th batch."""
        if self.whole:
            count = len(self.data)
            count -= count % self.batch_size if self.drop_last else 0
            start = (i * self.world_size + self.rank) * self.batch_size
            return min(start, count), min(start + self.batch_size, count)
        start = i * self.batch_size
        last = not self.drop_last and i == len(self) - 1
        rows = len(self.data) - start if last else self.batch_size
        # as many batches for every process, so that none waits for another
        return (
            start + rows * self.rank // self.world_size,
            start + rows * (self.rank + 1) // self.world_size,
        )

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many of its batches were given out."""
        return {"epoch": self._done[0], "batches": self._done[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass after these batches, if it is still that epoch."""
        self._resume = (int(state["epoch"]), int(state["batches"]))
