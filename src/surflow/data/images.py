"""The base of image data: 8-bit tensors, resident where they fit, augmented on their device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from surflow.data.augment import Augmentation
from surflow.data.batches import TensorBatches
from surflow.data.module import TensorDataModule
from surflow.errors import is_whole

_SHARE_OF_DEVICE = 1 / 3  # of its free memory, that images may take


class ImageBatches:
    """Batches of uint8 images, gathered and augmented on the device they are wanted on.

    Order and augmentation follow from seed, epoch and the image's row.

    Args:
        images: (N, C, H, W), uint8, on the device or on the host, memory-mapped or not.
        batch_size, seed, order: see :class:`~surflow.data.batches.TensorBatches`.
        augmentation: what is done to the images of a batch; None: nothing.
        device: where batches are wanted; None: where the images are.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        seed: int | None = None,
        augmentation: Augmentation | None = None,
        device: torch.device | None = None,
        **order: Any,
    ) -> None:
        self.images = images
        self.device = images.device if device is None else torch.device(device)
        self.augmentation = augmentation or None
        rows = torch.arange(len(images), device=images.device)
        self.rows = TensorBatches(rows, batch_size, seed, **order)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        draws = None
        if self.augmentation is not None:
            n, _, height, width = self.images.shape
            seed, epoch = self.rows.seed or 0, self.rows.epoch()
            draws = self.augmentation.draws(n, height, width, seed, epoch).to(self.device)
        for rows in self.rows:
            batch = self._to_device(self.images[rows])
            if draws is not None:
                batch = Augmentation.apply(batch, draws.of(rows.to(self.device)))
            yield batch

    def _to_device(self, batch: Tensor) -> Tensor:
        if batch.device == self.device:
            return batch
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # so that copy and computation overlap
        return batch.to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, int]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rows.load_state_dict(state)


class ImageData(TensorDataModule):
    """Images as integers 0 ... K - 1: uint8 (N, C, H, W) in three splits.

    Args:
        name: of the data, in records and run folders.
        event_shape: (C, H, W) that the images must have.
        num_levels: K, at most 256.
        flip, pad, translate: augmentation of the training images, see
            :class:`~surflow.data.augment.Augmentation`.
        on_device: keep the images on the training device: True, False, or "auto", where they take
            at most a third of its free memory.
        batch_size, eval_batch_size, others: see :class:`~surflow.data.module.TensorDataModule`.

    Raises:
        ValueError: for levels or an augmentation out of range, and as the base.
        UserError: from :meth:`setup` for files that are missing or damaged.
    """

    kind = "image"
    noun = "images"
    unit = "bpd"
    runtime = TensorDataModule.runtime | {"on_device"}
    dtype = torch.uint8

    def __init__(
        self,
        name: str,
        event_shape: Sequence[int] = (3, 32, 32),
        num_levels: int = 256,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        flip: bool = False,
        pad: int = 0,
        translate: float = 0.0,
        on_device: bool | str = "auto",
        **others: Any,
    ) -> None:
        super().__init__(
            name, event_shape, batch_size=batch_size, eval_batch_size=eval_batch_size, **others
        )
        shape = self.event_shape
        if len(shape) != 3 or not all(map(is_whole, shape)):
            raise ValueError(f"data.event_shape: expected [C, H, W], got {list(shape)}")
        if not is_whole(num_levels, least=2) or num_levels > 256:
            raise ValueError(f"data.num_levels: expected 2 to 256, got {num_levels}")
        if on_device not in (True, False, "auto"):
            raise ValueError(f"data.on_device: expected auto, true or false, got {on_device!r}")
        self.image_shape = shape
        self.num_levels = num_levels
        self.augmentation = Augmentation(flip, pad, translate)
        self.augmentation.check(shape[1], shape[2])
        self.on_device = on_device

    def fits(self, device: torch.device) -> bool:
        """Whether the training and validation images are to be kept on a device."""
        if device.type == "cpu":
            return True
        if self.on_device != "auto":
            return bool(self.on_device)
        if device.type != "cuda":
            return True
        needed = sum(self.splits[s].nbytes for s in ("train", "valid"))
        moved = sum(t.nbytes for t in self._resident.values())
        free, _ = torch.cuda.mem_get_info(device)
        return needed <= (free + moved) * _SHARE_OF_DEVICE

    def batches(self, split: str, batch_size: int, **keys: Any) -> ImageBatches:
        augmentation = self.augmentation if split == "train" else None
        keys |= {"augmentation": augmentation, "device": self.device()}
        return ImageBatches(self.resident(split), batch_size, **keys)
