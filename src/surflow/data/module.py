"""DataModules: data as tensors, with what a model and a table must know about them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor

from surflow.data.batches import TensorBatches
from surflow.data.synthetic import SyntheticDataset2d, make_dataset


@dataclass(frozen=True)
class Floor:
    """What no model can beat.

    Attributes:
        value: the entropy of the data, nats.
        source: how it was obtained.
    """

    value: float
    source: str


class TensorDataModule(pl.LightningDataModule):
    """Train, validation and test tensors, held in memory and batched by indexing.

    A subclass fills ``splits`` in :meth:`setup`.

    Args:
        batch_size: training rows a step, over all processes.
        eval_batch_size: rows at a time in validation and test; never changes a result.
        seed: of the shuffling.
    """

    event_shape: tuple[int, ...]
    name: str
    floor: Floor | None = None

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"data.{key}: expected a positive whole number, got {value}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.splits: dict[str, Tensor] = {}
        self._resident: dict[str, Tensor] = {}

    def resident(self, split: str) -> Tensor:
        """A split on the trainer's device, moved there once."""
        if split not in self._resident:
            device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
            self._resident[split] = self.splits[split].to(device)
        return self._resident[split]

    def train_dataloader(self) -> TensorBatches:
        trainer = self.trainer
        return TensorBatches(
            self.resident("train"),
            self.batch_size,
            self.seed,
            epoch=lambda: trainer.current_epoch,
            drop_last=True,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def val_dataloader(self) -> TensorBatches:
        trainer = self.trainer
        return TensorBatches(
            self.resident("valid"),
            self.eval_batch_size * trainer.world_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, index: int) -> Tensor:
        return batch  # it is there already


class SyntheticData(TensorDataModule):
    """A 2-D dataset with known density, drawn once from a seed.

    Args:
        name: a key of ``surflow.data.synthetic.DATASETS``.
        train_size, valid_size, test_size: points to draw for each split.
        batch_size, eval_batch_size, seed: see :class:`TensorDataModule`.
        data_seed: of the draw; all seeds of a table share one draw of data.
        edge: every sample that can occur lies within ±edge, for a dataset whose tails are so thin
            that a bounded support serves; None: the dataset's own bound.

    Raises:
        ValueError: for an unknown name or sizes that are not positive.
    """

    event_shape = (2,)

    def __init__(
        self,
        name: str,
        train_size: int,
        valid_size: int,
        test_size: int,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        data_seed: int,
        edge: float | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.dataset: SyntheticDataset2d = make_dataset(name)
        self.name = name
        sizes = {"train": train_size, "valid": valid_size, "test": test_size}
        for split, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"data.{split}_size: expected a positive whole number, got {size}")
        if batch_size > train_size:
            raise ValueError(
                f"data.batch_size: expected at most data.train_size = {train_size}, "
                f"got {batch_size}"
            )
        self.sizes = sizes
        self.data_seed = data_seed
        self.edge = edge if edge is not None else self.dataset.bound

    @property
    def floor(self) -> Floor:  # type: ignore[override]
        return Floor(self.dataset.entropy, f"entropy of the data, {self.dataset.entropy_method}")

    @property
    def box(self) -> tuple[list[float], list[float]]:
        """Edges that hold the whole support, infinite where there are none."""
        bound = self.edge if self.edge is not None else math.inf
        low = 0.0 if self.dataset.positive else -bound
        return [low] * 2, [bound] * 2

    def setup(self, stage: str | None = None) -> None:
        if not self.splits:
            s = self.sizes
            self.splits = self.dataset.splits(s["train"], s["valid"], s["test"], self.data_seed)
