"""Image sets that come with scikit-learn: small, without a download, for smoke runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.digits import DigitData
from surflow.data.images import ImageData
from surflow.data.module import SPLITS
from surflow.errors import UserError, check_whole


class PhotoPatches(ImageData):
    """32x32 patches of scikit-learn's two sample photographs: small, embedded, for smoke runs.

    Each photograph (427x640) is cut into three regions: columns 0-383 are train, 384-511
    validation, 512-639 test. Training patches overlap, others do not. For checks that things run.

    Args:
        stride: pixels between training patches.
        others: see :class:`~surflow.data.images.ImageData`.
    """

    version = "scikit-learn sample photographs"
    regions: ClassVar[dict[str, tuple[int, int]]] = {
        "train": (0, 384),
        "valid": (384, 512),
        "test": (512, 640),
    }

    def __init__(self, name: str = "photo_patches", stride: int = 8, **others: Any) -> None:
        super().__init__(name=name, **others)
        check_whole("data.stride", stride)
        height, width = self.event_shape[1:]
        if self.event_shape[0] != 3 or max(height, width) > 128:
            raise ValueError(
                "data.event_shape: photo_patches has [3, H, W] with sides of at most 128, got "
                f"{list(self.event_shape)}"
            )
        self.stride = stride

    @staticmethod
    def photographs() -> Tensor:
        """Both photographs: uint8 (2, 3, 427, 640)."""
        try:
            from sklearn.datasets import load_sample_images
        except ImportError:
            raise _needs_sklearn("photo_patches") from None
        photos = np.stack(load_sample_images().images)
        return torch.from_numpy(np.ascontiguousarray(photos.transpose(0, 3, 1, 2)))

    def load(self) -> dict[str, Tensor]:
        photos = self.photographs()
        height, width = self.event_shape[1:]
        splits = {}
        for split, (left, right) in self.regions.items():
            down, along = (self.stride,) * 2 if split == "train" else (height, width)
            patches = photos[..., left:right].unfold(2, height, down).unfold(3, width, along)
            patches = patches.permute(0, 2, 3, 1, 4, 5)  # photo, row, column, C, H, W
            splits[split] = patches.reshape(-1, 3, height, width)
        return splits


class Digits(ImageData):
    """1,797 handwritten digits of 8x8 with 17 levels, embedded in scikit-learn.

    In the order they are kept in, in which one writer's digits lie together: the first 1,297 are
    train, the next 200 validation, the last 300 test.

    Args:
        others: see :class:`~surflow.data.images.ImageData`.

    Source: Alpaydin & Kaynak 1998, optical recognition of handwritten digits, UCI.
    """

    version = "scikit-learn digits"
    ends: ClassVar[tuple[int, int]] = (1297, 1497)

    def __init__(
        self,
        name: str = "digits",
        event_shape: Sequence[int] = (1, 8, 8),
        num_levels: int = 17,
        **others: Any,
    ) -> None:
        super().__init__(name=name, event_shape=event_shape, num_levels=num_levels, **others)

    def load(self) -> dict[str, Tensor]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise _needs_sklearn("digits") from None
        images = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)
        train, valid, test = images.tensor_split(self.ends)
        return {"train": train, "valid": valid, "test": test}


class GreyDigits(DigitData):
    """scikit-learn's 8x8 digits, 17 levels, embedded: MNIST's stand-in where a run must be short.

    Splits are those of :class:`Digits`: 1,297 + 200 + 300.

    Args:
        others: see :class:`~surflow.data.digits.DigitData`.
    """

    version = Digits.version
    image_shape = (1, 8, 8)
    source_levels = 17

    def __init__(self, name: str = "digits_binary", **others: Any) -> None:
        super().__init__(name=name, **others)

    def read(self) -> dict[str, Tensor]:
        return Digits().load()

    def read_labels(self) -> dict[str, Tensor]:
        from sklearn.datasets import load_digits

        labels = torch.from_numpy(load_digits().target).long().tensor_split(Digits.ends)
        return dict(zip(SPLITS, labels, strict=True))


def _needs_sklearn(name: str) -> UserError:
    return UserError(f"data={name}: it comes with scikit-learn: pip install scikit-learn")
