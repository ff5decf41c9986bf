"""DataModules: data as tensors, with what a model and a table must know about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
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


BLOCK_NUMBERS = 2**18
"""Numbers in a block of validation rows: 85 images of 32x32, 21 of 64x64."""

MOST_BLOCK_ROWS = 4096


def block_rows(event_shape: tuple[int, ...]) -> int:
    """Rows of a block in validation: they follow from the shape of the data alone."""
    return min(MOST_BLOCK_ROWS, max(1, BLOCK_NUMBERS // math.prod(event_shape)))


def spaced_rows(rows: Tensor, size: int | None, what: str, split: str) -> Tensor:
    """``size`` rows evenly spaced over them; None: all.

    Args:
        rows: (N, ...).
        size: at most N.
        what: the rows in words, for messages.
        split: whose size it is, for messages.

    Raises:
        ValueError: for more rows than there are.
    """
    if size is None or size == len(rows):
        return rows
    if size > len(rows):
        raise ValueError(f"data.{split}_size: expected at most the {len(rows)} {what}, got {size}")
    return rows[torch.arange(size) * len(rows) // size]


class TensorDataModule(pl.LightningDataModule):
    """Train, validation and test tensors, held in memory and batched by indexing.

    A subclass fills ``splits`` in :meth:`setup`.

    Args:
        batch_size: training rows a step, over all processes.
        eval_batch_size: rows at a time when a split is scored; never changes a result.
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
        self._train: Any = None
        self._state: dict[str, int] = {}

    def resident(self, split: str) -> Tensor:
        """A split on the trainer's device, moved there once."""
        if split not in self._resident:
            device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
            self._resident[split] = self.splits[split].to(device)
        return self._resident[split]

    def batches(self, split: str, batch_size: int, **keys: Any) -> Any:
        """Batches of a split; ``keys`` as of :class:`~surflow.data.batches.TensorBatches`."""
        return TensorBatches(self.resident(split), batch_size, **keys)

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        self._train = self.batches(
            "train",
            self.batch_size,
            seed=self.seed,
            epoch=lambda: trainer.current_epoch,
            drop_last=True,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        if self._state:
            self._train.load_state_dict(self._state)
            self._state = {}
        return self._train

    def val_dataloader(self) -> Any:
        """Blocks of rows that depend on neither batch size nor processes, and so do their draws."""
        return self.batches(
            "valid",
            block_rows(self.event_shape),
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            whole=True,
        )

    def state_dict(self) -> dict[str, int]:
        """Where in an epoch training is, for its checkpoint."""
        return {} if self._train is None else self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let training go on behind the batches that it had."""
        self._state = dict(state_dict)

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


class QuantizedData(SyntheticData):
    r"""A 2-D dataset cut into cells: integers 0 ... K - 1 with known probabilities.

    .. math:: x_d = \lfloor K (y_d + h) / 2h \rfloor, \quad
              P(x) = \int_{\mathrm{cell}(x)} p(y)\,dy

    Points beyond the square go into its outermost cells.

    Args:
        num_levels: K, cells a side.
        half_width: h, half the side of the square that is cut; it must hold the data but for a
            negligible part.
        others: see :class:`SyntheticData`.

    Raises:
        ValueError: for K < 2, or a square that leaves out more than 1e-6 of the mass.
    """

    def __init__(self, num_levels: int, half_width: float, **others) -> None:
        super().__init__(**others)
        if not isinstance(num_levels, int) or num_levels < 2:
            raise ValueError(f"data.num_levels: expected a whole number >= 2, got {num_levels}")
        if not half_width > 0:
            raise ValueError(f"data.half_width: expected a positive number, got {half_width}")
        self.num_levels = num_levels
        self.half_width = float(half_width)
        left_out = 1 - self.probabilities.sum().item()
        if left_out > 1e-6:
            raise ValueError(
                f"data.half_width: {half_width:g} leaves out {left_out:.1e} of the mass of "
                f"{self.name}; expected at most 1e-6"
            )

    @cached_property
    def probabilities(self) -> Tensor:
        """P(x), (K, K), index [x_0, x_1], float64: Gauss-Legendre, 12 x 12 nodes a cell."""
        nodes, weights = np.polynomial.legendre.leggauss(12)
        cell = 2 * self.half_width / self.num_levels
        left = torch.arange(self.num_levels, dtype=torch.float64) * cell - self.half_width
        axis = (left.unsqueeze(1) + cell * (torch.from_numpy(nodes) + 1) / 2).flatten()
        density = self.dataset.log_prob(torch.cartesian_prod(axis, axis)).exp()
        density = density.view(self.num_levels, 12, self.num_levels, 12)
        weight = torch.from_numpy(weights) * cell / 2
        return torch.einsum("aibj,i,j->ab", density, weight, weight)

    @property
    def floor(self) -> Floor:  # type: ignore[override]
        p = self.probabilities
        entropy = -torch.special.xlogy(p, p).sum().item()
        return Floor(entropy, "entropy of the quantized data, quadrature in every cell")

    @property
    def box(self) -> tuple[list[float], list[float]]:
        return [0.0, 0.0], [float(self.num_levels)] * 2

    def setup(self, stage: str | None = None) -> None:
        if not self.splits:
            super().setup(stage)
            scale = self.num_levels / (2 * self.half_width)
            self.splits = {
                name: ((y + self.half_width) * scale).floor().long().clamp(0, self.num_levels - 1)
                for name, y in self.splits.items()
            }
