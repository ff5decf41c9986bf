"""Batches of tensors that stay in memory, on the device: no workers, no copies, no collation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class TensorBatches:
    """Iterate over the rows of a tensor in batches.

    The order of an epoch follows from the seed and the epoch's number alone, so a run that is
    resumed at an epoch's start sees what the unbroken one saw.

    Args:
        data: (N, *event), on whichever device it is to stay.
        batch_size: rows a batch, over all ranks together.
        seed: of the shuffling; None keeps the order.
        epoch: gives the number of the current epoch.
        drop_last: leave out an incomplete last batch (for training only).
        rank, world_size: this process's share of every batch.

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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
        if batch_size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}"
            )
        if len(data) < world_size:
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

    def __len__(self) -> int:
        full, rest = divmod(len(self.data), self.batch_size)
        # a rest too small for every process to have a row of it joins the batch before it
        return full if self.drop_last else full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        data = self.data
        if self.seed is not None:
            generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch())
            order = torch.randperm(len(data), generator=generator).to(data.device)
        else:
            order = None
        for i in range(len(self)):
            start = i * self.batch_size
            whole = self.drop_last or i < len(self) - 1
            rows = self.batch_size if whole else len(data) - start
            # as many batches for every process, else one waits for another for ever
            first = start + rows * self.rank // self.world_size
            stop = start + rows * (self.rank + 1) // self.world_size
            yield data[first:stop] if order is None else data[order[first:stop]]
