"""MNIST in its two published forms: grey images, and one draw of binary ones."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.digits import Binarization, DigitData
from surflow.data.downloads import Published, check_file, fetch
from surflow.data.module import SPLITS
from surflow.data.sources import pack, read_array
from surflow.errors import UserError


class MNIST(DigitData):
    """MNIST: 60,000 + 10,000 images of 28x28 with 256 levels, checked by MD5.

    The last ``valid_size`` of the training images are validation. Read from ``MNIST/raw`` in the
    root, or the root itself, as the published gzip files or unpacked; downloaded into the former
    where they are missing.

    Args:
        download: download what is missing.
        others: see :class:`~surflow.data.digits.DigitData`.

    Source: LeCun et al. 1998, gradient-based learning applied to document recognition.
    """

    version = "LeCun et al. 1998"
    runtime = DigitData.runtime | {"download"}
    image_shape = (1, 28, 28)
    source_levels = 256
    unpacked: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def __init__(
        self,
        name: str = "mnist",
        valid_size: int | None = 10_000,
        download: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(name=name, valid_size=valid_size, **others)
        self.download = download

    def read(self) -> dict[str, Tensor]:
        names = {"train": "train", "test": "t10k"}
        return {s: self._file(f"{n}-images-idx3-ubyte").unsqueeze(1) for s, n in names.items()}

    def read_labels(self) -> dict[str, Tensor]:
        names = {"train": "train", "test": "t10k"}
        return {s: self._file(f"{n}-labels-idx1-ubyte").long() for s, n in names.items()}

    def published(self, name: str) -> list[Published]:
        """A file as it is published, packed, at each of its mirrors."""
        from torchvision.datasets import MNIST as Facts

        md5 = dict(Facts.resources)[f"{name}.gz"]
        return [Published(f"{name}.gz", md5, f"{mirror}{name}.gz") for mirror in Facts.mirrors]

    def _file(self, name: str) -> Tensor:
        mirrors = self.published(name)
        packed, plain = mirrors[0], Published(name, self.unpacked[name])
        folder = self.root / "MNIST" / "raw"
        kinds = [(place, file) for place in (folder, self.root) for file in (packed, plain)]
        found = next(((p, f) for p, f in kinds if (p / f.filename).is_file()), None)
        if found is None and self.download:
            path = _fetch_any(mirrors, folder)
        else:
            place, file = found or (folder, packed)
            path = check_file(place / file.filename, file)
        content = path.read_bytes()
        return torch.from_numpy(read_idx(gzip.decompress(content) if path.suffix else content))


def _fetch_any(mirrors: Sequence[Published], folder: Path) -> Path:
    """Download from the first mirror that has the file."""
    for file in mirrors[:-1]:
        with contextlib.suppress(UserError):
            return fetch(file, folder)
    return fetch(mirrors[-1], folder)


def read_idx(content: bytes) -> np.ndarray:
    """The array in an idx file of bytes: 0, 0, 8, the number of dimensions, each as a big-endian
    32-bit integer, the values.

    Raises:
        ValueError: for anything else.

    >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    array([7, 9], dtype=uint8)
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"idx: expected to begin with 0, 0, 8, got {list(content[:3])}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"idx: expected {content[3]} dimensions, got {len(content)} bytes")
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    values = np.array(memoryview(content)[start:], np.uint8)
    if math.prod(shape) != len(values):
        raise ValueError(f"idx: expected {shape} values, got {len(values)}")
    return values.reshape(shape)


class BinarizedMNIST(DigitData):
    """The published binary MNIST: 50,000 + 10,000 + 10,000 images, drawn once by its makers.

    Training and validation images are MNIST's 60,000 training images in another order. The test
    split is sorted by class: its first rows are all 0, so a part of it must be spaced over it, as
    ``test_size`` does.

    Read from ``binarized_mnist`` in the root: train.npz, valid.npz and test.npz (``bits``, uint8
    (N, 98), eight pixels a byte, the first one highest), or the published text files
    ``binarized_mnist_{train,valid,test}.amat``, also from the root itself; these are downloaded
    where nothing is there (110 MB), read once and kept packed. Both are checked.

    Args:
        download: download what is missing.
        others: see :class:`~surflow.data.digits.DigitData`, but for its binarization.

    Source: Salakhutdinov & Murray 2008, "On the quantitative analysis of deep belief networks";
    as files, Larochelle & Murray 2011, "The neural autoregressive distribution estimator".
    """

    version = "Larochelle & Murray 2011"
    runtime = DigitData.runtime | {"download"}
    image_shape = (1, 28, 28)
    source_levels = 2
    rows: ClassVar[dict[str, int]] = {"train": 50_000, "valid": 10_000, "test": 10_000}
    bits_sha256: ClassVar[dict[str, str]] = {
        "train": "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
        "valid": "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
        "test": "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
    }
    text_md5: ClassVar[dict[str, str]] = {
        "train": "db28b1a6ae0fe70cbd3da91acf46e477",
        "valid": "bf37822a04e94123630de6a7dfd9c9ef",
        "test": "14e41ae11040adba6ab8cb291eda0dd8",
    }
    binarizations: ClassVar[dict[str, Binarization]] = {
        "published": Binarization(
            lambda x, most, key: x, "binary images, one published draw", levels=True
        )
    }
    address: ClassVar[str] = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"

    def __init__(self, name: str = "binarized_mnist", download: bool = True, **others: Any) -> None:
        super().__init__(name=name, binarization="published", **others)
        self.download = download

    def read(self) -> dict[str, Tensor]:
        return {split: self._images(split) for split in SPLITS}

    def published(self, split: str) -> Published:
        """The text file of a split."""
        name = f"binarized_mnist_{split}.amat"
        return Published(name, self.text_md5[split], f"{self.address}/{name}")

    def _images(self, split: str) -> Tensor:
        folder = self.root / "binarized_mnist"
        path = folder / f"{split}.npz"
        bits = read_array(path, "bits") if path.is_file() else None
        if bits is None:
            path = self._text(split, folder)
            bits = self._packed(split, path)
        if hashlib.sha256(np.ascontiguousarray(bits)).hexdigest() != self.bits_sha256[split]:
            raise UserError(
                f"data.root: {path} does not hold the published {split} bits, uint8 "
                f"({self.rows[split]}, 98); delete it and put the right one there, or "
                f"{self.published(split).filename} from {self.address}"
            )
        pixels = np.unpackbits(np.ascontiguousarray(bits), axis=1)
        return torch.from_numpy(pixels.reshape(-1, *self.image_shape))

    def _text(self, split: str, folder: Path) -> Path:
        file = self.published(split)
        for place in (folder, self.root):
            if (place / file.filename).is_file():
                return place / file.filename
        if self.download:
            return fetch(file, folder)
        raise UserError(
            f"data.root: no file {folder / split}.npz; put it there, or {file.filename} (md5 "
            f"{file.md5}) from {file.url}"
        )

    def _packed(self, split: str, path: Path) -> np.ndarray:
        def read(path: Path) -> np.ndarray:
            check_file(path, self.published(split))
            text = np.fromfile(path, np.uint8)  # "0 1 ... 0\n": a digit, then what ends it
            return np.packbits((text[::2] - ord("0")).reshape(-1, 784), axis=1)

        label = f"binarized-mnist-{split}"
        return pack([path], path.parent, label, (98,), [self.rows[split]], read).numpy()
