"""The base of all DataModules: data as tensors, with what a model and a table must know of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from surflow.data.batches import TensorBatches
from surflow.data.downloads import data_root
from surflow.data.pixels import BrokenSamples, to_pixels
from surflow.errors import check_whole
from surflow.metric import Floor

SPLITS = ("train", "valid", "test")

BLOCK_NUMBERS = 2**18
"""Numbers in a block of validation rows: 85 images of 32x32, 21 of 64x64."""


def block_rows(event_shape: tuple[int, ...]) -> int:
    """Rows of a block in validation, at most 4096: they follow from the shape of the data alone."""
    return min(4096, max(1, BLOCK_NUMBERS // math.prod(event_shape)))


def fingerprint(rows: Tensor) -> str:
    """SHA-256 of shape and values, 64 hex digits."""
    digest = hashlib.sha256(repr(tuple(rows.shape)).encode())
    for block in rows.split(4096):
        digest.update(block.cpu().contiguous().numpy())
    return digest.hexdigest()


class TensorDataModule(pl.LightningDataModule):
    """Train, validation and test tensors, held in memory and batched by indexing.

    A subclass reads whole splits in :meth:`load` and declares what they are. Where there is no
    validation split, the last ``valid_size`` training rows are held out. A split that is cut short
    keeps rows evenly spaced over it. A constructor with ``**others`` passes them on to its base.

    Args:
        name: of the data, in records and run folders.
        event_shape: of one row.
        root: the folder that datasets are in; None: the environment's ``SURFLOW_DATA``, else
            ``data``.
        train_size, valid_size, test_size: rows to keep of each split; None: all.
        batch_size: training rows a step, over all processes.
        eval_batch_size: rows at a time when a split is scored; never changes a result.
        seed: of the shuffling.

    Attributes:
        kind: points, table, image or set.
        noun: the rows in words, for messages.
        runtime: options that change no result.
        from_files: whether the rows come from files, not from the config alone.
        unit: of scores by default: nats, or bpd (bits a dimension).
        version: of the data, in records.
        dtype: of the rows.
        num_levels: K of data of integers 0 ... K - 1; None: real values.
        image_shape: (C, H, W) that a row is drawn in, flat or not; None: rows are no images.
        symmetry: of a 2-D density: symmetric, antisymmetric or None.
        floor: the lowest negative log-likelihood there is; None: unknown.
        log_prob: log density of rows that the data come from, (N, *event) -> (N,), nats, float64;
            None: unknown.
        file: a cache of whole splits; None: there is none.

    Raises:
        ValueError: for sizes that are not positive whole numbers; from :meth:`setup` for rows of
            another shape, type or range, or sizes larger than what there is.
    """

    kind: ClassVar[str] = "table"
    noun: ClassVar[str] = "rows"
    runtime: ClassVar[frozenset[str]] = frozenset({"root", "eval_batch_size"})
    from_files: ClassVar[bool] = True
    unit: ClassVar[str] = "nats"
    version: str = ""
    dtype: torch.dtype = torch.float32
    num_levels: int | None = None
    image_shape: tuple[int, int, int] | None = None
    symmetry: str | None = None
    floor: Floor | None = None
    log_prob: Callable[[Tensor], Tensor] | None = None
    file: Path | None = None

    def __init__(
        self,
        name: str,
        event_shape: Sequence[int],
        root: str | None = None,
        train_size: int | None = None,
        valid_size: int | None = None,
        test_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_whole("data.batch_size", batch_size)
        check_whole("data.eval_batch_size", eval_batch_size)
        self.sizes = dict(zip(SPLITS, (train_size, valid_size, test_size), strict=True))
        for split, size in self.sizes.items():
            check_whole(f"data.{split}_size", size, null=True)
        self.name = name
        self.event_shape = tuple(event_shape)
        self.root = data_root(root)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.splits: dict[str, Tensor] = {}
        self._sha256: dict[str, str] = {}
        self._resident: dict[str, Tensor] = {}
        self._train: Any = None
        self._state: dict[str, int] = {}

    # What a model and a table must know

    @property
    def num_dims(self) -> int:
        """D: nats / (D log 2) are bits per dimension."""
        return math.prod(self.event_shape)

    @property
    def box(self) -> tuple[list[float], list[float]]:
        """Edges that hold every row, flattened; infinite where there are none."""
        low, high = (-math.inf, math.inf) if self.num_levels is None else (0.0, self.num_levels - 1)
        return [low] * self.num_dims, [float(high)] * self.num_dims

    def labels(self, split: str) -> Tensor | None:
        """The classes of a split's rows, int64 (N,); None: there are none.

        Raises:
            UserError: for files that are missing or damaged.
        """
        return None

    def pixels(self, values: Tensor) -> tuple[Tensor, int]:
        """Rows, or draws of a model of them, as 8-bit images, and how many levels these have.

        Integers stay as they are; reals go to the nearest level.

        Args:
            values: (N, *event), flat or as images.

        Returns:
            uint8 (N, C, H, W), and K: levels are 0 ... K - 1.

        Raises:
            BrokenSamples: for values that are not finite, or integers that are no levels.
        """
        if self.image_shape is None or self.num_levels is None:
            raise BrokenSamples(f"data={self.name}: its rows are no images of levels")
        images = values.reshape(len(values), *self.image_shape)
        return to_pixels(images, self.num_levels), self.num_levels

    def fingerprint(self, split: str) -> str:
        """:func:`fingerprint` of a split, computed once."""
        if split not in self._sha256:
            self._sha256[split] = fingerprint(self.splits[split])
        return self._sha256[split]

    def provenance(self) -> dict[str, Any]:
        """For a record: name, version, and rows and SHA-256 of every split."""
        rows = self.splits.items()
        splits = {s: {"rows": len(x), "sha256": self.fingerprint(s)} for s, x in rows}
        return {"name": self.name, "version": self.version, "splits": splits}

    # Splits

    def load(self) -> dict[str, Tensor]:
        """Whole splits, (N, *event): train, test, and maybe valid."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        whole = self.load()
        for split, rows in whole.items():
            self._check_rows(split, rows)
        splits = self._parted(whole)
        if self.batch_size > len(splits["train"]):
            raise ValueError(
                f"data.batch_size: expected at most the {len(splits['train'])} training "
                f"{self.noun} of {self.name}, got {self.batch_size}"
            )
        self.splits = splits

    def _check_rows(self, split: str, rows: Tensor) -> None:
        what = f"{split} {self.noun} of {self.name}"
        if rows.dtype != self.dtype or tuple(rows.shape[1:]) != self.event_shape:
            dtype, got = (str(t).removeprefix("torch.") for t in (self.dtype, rows.dtype))
            expected = f"{dtype} ({', '.join(('N', *map(str, self.event_shape)))})"
            raise ValueError(
                f"data.event_shape: {what}: expected {expected}, got {got} {tuple(rows.shape)}"
            )
        if len(rows) == 0:
            raise ValueError(f"data: {self.name} has no {split} {self.noun}")
        if self.num_levels is None:
            if not rows.isfinite().all():
                raise ValueError(f"data: {what}: expected finite values")
        elif self.num_levels < 256 or rows.dtype != torch.uint8:
            low, high = rows.min().item(), rows.max().item()
            if low < 0 or high >= self.num_levels:
                raise ValueError(
                    f"data.num_levels: {what}: expected levels 0 to {self.num_levels - 1}, got "
                    f"{low if low < 0 else high}"
                )

    def _parted(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Validation held out and every split cut, alike for rows and labels."""
        if "valid" not in whole:
            train, valid = self.hold_out(whole["train"], "valid")
            whole = {**whole, "train": train, "valid": valid}
        return {split: self._cut(split, whole[split]) for split in SPLITS}

    def hold_out(self, rows: Tensor, split: str) -> tuple[Tensor, Tensor]:
        """The rows before the last ``size`` ones, and those; views, no copies."""
        size = self.sizes[split]
        if size is None:
            raise ValueError(
                f"data.{split}_size: {self.name} has no {split} split of its own; expected how "
                f"many of the last training {self.noun} to hold out, got null"
            )
        if size >= len(rows):
            raise ValueError(
                f"data.{split}_size: expected fewer than the {len(rows)} training {self.noun} of "
                f"{self.name}, got {size}"
            )
        return rows[: len(rows) - size], rows[len(rows) - size :]

    def _cut(self, split: str, rows: Tensor) -> Tensor:
        size = self.sizes[split]
        if size is None or size == len(rows):
            return rows
        if size > len(rows):
            raise ValueError(
                f"data.{split}_size: expected at most the {len(rows)} {split} {self.noun} of "
                f"{self.name}, got {size}"
            )
        return rows[torch.arange(size) * len(rows) // size]

    # Batches

    def device(self) -> torch.device:
        """The trainer's device; the CPU without a trainer."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def fits(self, device: torch.device) -> bool:
        """Whether splits are to be kept on a device."""
        return True

    def resident(self, split: str) -> Tensor:
        """A split where its batches are gathered: on the trainer's device if it fits there."""
        return self._keep(split, self.splits[split])

    def _keep(self, key: str, rows: Tensor) -> Tensor:
        if key not in self._resident:
            device = self.device()
            self._resident[key] = rows.to(device) if self.fits(device) else rows
        return self._resident[key]

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
        """Blocks of rows, with the same draws, for any batch size and number of processes."""
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
        """Resume training after the batches that it had."""
        self._state = dict(state_dict)

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, index: int) -> Tensor:
        return batch  # it is there already
