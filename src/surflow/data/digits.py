r"""Handwritten digits for VAEs: grey images, and the binary ones that follow from them.

.. math:: b_d \sim \mathrm{Bernoulli}(x_d / (K - 1)), \quad x_d \in \{0, \dots, K - 1\}

Published log-likelihoods of "binarized MNIST" mean one of two sets: bits drawn anew whenever an
image is trained on (dynamic binarization, :class:`MNIST`), or one published draw
(:class:`BinarizedMNIST`). They do not compare with each other, nor with the cross-entropy of grey
values.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.downloads import Published, check_file, fetch
from surflow.data.images import SPLITS, Digits, ImageBatches, ImageData
from surflow.data.sources import pack, read_array
from surflow.errors import UserError, close_match

_EPOCHS = 0x42494E31  # keep these random numbers apart from others of the same seed and epoch
_ONCE = 0x42494E32

DTYPES = {"float32": torch.float32, "uint8": torch.uint8}


# Binarization


def thresholds(count: int, most: int, key: Sequence[int]) -> np.ndarray:
    """Independent uniform integers 0 ... most - 1: uint8 (count,).

    They follow from the key alone, on any machine and with any version of NumPy (PCG64's raw
    stream), and a longer array begins with the shorter ones of its key.

    Args:
        count: how many.
        most: 1 to 256.
        key: whole numbers >= 0; zeros at its end do not tell keys apart.

    Cost: one random byte a number; about 40 ms for the 47 million pixels of MNIST.
    """
    limit = 256 - 256 % most  # bytes from here on would favour small remainders: drawn again

    def drawn(n: int, stage: int) -> np.ndarray:
        words = np.random.PCG64([*key, stage]).random_raw(-(-n // 8))
        return words.astype("<u8", copy=False).view(np.uint8)[:n]

    u = drawn(count, 0)
    again = np.flatnonzero(u >= limit) if limit < 256 else np.empty(0, np.int64)
    stage = 1
    while len(again):
        u[again] = drawn(len(again), stage)
        again = again[u[again] >= limit]
        stage += 1
    return u if limit == most else u % most if most < 256 else u


def draw_bits(levels: Tensor, most: int, key: Sequence[int]) -> Tensor:
    r"""One binary image for every grey one.

    .. math:: b = 1[u < x], \quad u \sim \mathrm{Uniform}\{0, \dots, K - 2\}
              \quad\Rightarrow\quad P(b = 1) = x / (K - 1)

    exactly: level 0 never gives 1, level K - 1 always.

    Args:
        levels: (N, *event), uint8 with values 0 ... K - 1, on any device.
        most: K - 1.
        key: see :func:`thresholds`; the bits of a row depend on nothing but it, the row's number
            and the row.

    Returns:
        uint8 (N, *event) of 0 and 1, on the device of the levels.
    """
    u = torch.from_numpy(thresholds(levels.numel(), most, key)).view(levels.shape)
    return (u.to(levels.device) < levels).view(torch.uint8)


@dataclass(frozen=True)
class Binarization:
    """What becomes of grey images.

    Attributes:
        values: ``values(levels, most, key)``: what a model is given for them.
        meaning: what a score then is a score of.
        levels: whether the levels stay as they are.
        drawn: whether validation and test images are one random draw.
        redrawn: whether the training images are drawn anew in every epoch.
    """

    values: Callable[[Tensor, int, Sequence[int]], Tensor]
    meaning: str
    levels: bool = False
    drawn: bool = False
    redrawn: bool = False


BINARIZATIONS: dict[str, Binarization] = {
    "none": Binarization(lambda x, most, key: x, "the grey levels as published", levels=True),
    "dynamic": Binarization(
        draw_bits,
        "binary images: training images drawn anew in every epoch, the others once",
        drawn=True,
        redrawn=True,
    ),
    "fixed": Binarization(draw_bits, "binary images, all drawn once", drawn=True),
    "threshold": Binarization(
        lambda x, most, key: (x >= (most + 1) // 2).view(torch.uint8),
        "binary images: 1 from half of the largest level on",
    ),
    "grey": Binarization(
        lambda x, most, key: x.to(torch.float32) / most,
        "grey values in [0, 1]: under a Bernoulli a cross-entropy, no likelihood of them",
    ),
}


class DigitBatches(ImageBatches):
    """Batches of images in the shape and type that a model takes, drawn anew where that is wanted.

    Args:
        images: (N, C, H, W), what is batched, or what it is drawn from.
        event_shape: of one row of a batch.
        dtype: of a batch.
        redraw: ``redraw(images, epoch)`` gives the images of an epoch; None: they stay.
        others: see :class:`~surflow.data.images.ImageBatches`.

    Cost: a redraw at the start of every epoch (:func:`thresholds`), then indexing.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        *,
        event_shape: Sequence[int],
        dtype: torch.dtype,
        redraw: Callable[[Tensor, int], Tensor] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(images, batch_size, **others)
        self.source = images
        self.event_shape = tuple(event_shape)
        self.dtype = dtype
        self.redraw = redraw

    def __iter__(self) -> Iterator[Tensor]:
        if self.redraw is not None:
            self.images = self.redraw(self.source, self.epoch())
        for batch in super().__iter__():
            yield batch.reshape(len(batch), *self.event_shape).to(self.dtype)


# Data


class DigitData(ImageData):
    """Grey images of one channel, as bits, grey values or levels, flat or as images.

    A subclass says ``image_shape`` and ``source_levels`` and reads whole splits in :meth:`read`.
    ``splits`` holds what a model is scored on. With a dynamic binarization ``splits["train"]`` is
    one draw too, and training batches are drawn anew: the bits of an epoch follow from seed, epoch
    and the image's row.

    Args:
        event_shape: ``image_shape``, or [D] for models of vectors.
        binarization: one of

            - ``dynamic``: Bernoulli(level / largest level), for training anew in every epoch;
            - ``fixed``: the same, drawn once for all splits;
            - ``threshold``: 1 from half of the largest level on;
            - ``grey``: the grey values in [0, 1]. A Bernoulli's log-probability of them is a
              cross-entropy. As it is linear in the pixels, ELBO and IWBO with it are lower bounds
              on the *mean* log-likelihood of the dynamic binarization, given by an encoder that
              does not see the bits; they are no likelihood of the grey image;
            - ``none``: the levels themselves.
        binarization_seed: of the bits that are drawn once, so that all runs are scored on the same.
        dtype: float32, as a Bernoulli takes them, or uint8, for layers over integers.
        num_levels: 2, or with ``none`` the levels of the source.
        valid_within_train: validation images are trained on, too, where the source has none of
            its own; validation then says nothing about other images.
        others: see :class:`~surflow.data.images.ImageData`.

    Raises:
        ValueError: for another shape, binarization or type, or a number of levels that does not
            fit it.

    Source: bits from grey values: Salakhutdinov & Murray 2008, "On the quantitative analysis of
    deep belief networks"; grey values under a Bernoulli: Loaiza-Ganem & Cunningham 2019, arXiv
    1907.06845.
    """

    unit = "nats"
    image_shape: ClassVar[tuple[int, int, int]]
    source_levels: ClassVar[int]
    binarizations: ClassVar[dict[str, Binarization]] = BINARIZATIONS

    def __init__(
        self,
        event_shape: Sequence[int],
        binarization: str = "dynamic",
        binarization_seed: int = 0,
        dtype: str = "float32",
        num_levels: int = 2,
        valid_within_train: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(event_shape=self.image_shape, num_levels=num_levels, **others)
        flat = (math.prod(self.image_shape),)
        if tuple(event_shape) not in (self.image_shape, flat):
            raise ValueError(
                f"data.event_shape: {self.name} has {list(self.image_shape)} or {list(flat)}, got "
                f"{list(event_shape)}"
            )
        if binarization not in self.binarizations:
            raise ValueError(
                f"data.binarization: expected one of {', '.join(self.binarizations)}, got "
                f"{binarization!r}" + close_match(str(binarization), self.binarizations)
            )
        whole = isinstance(binarization_seed, int) and not isinstance(binarization_seed, bool)
        if not whole or binarization_seed < 0:
            raise ValueError(
                f"data.binarization_seed: expected a whole number >= 0, got {binarization_seed}"
            )
        if dtype not in DTYPES or (binarization == "grey" and dtype != "float32"):
            expected = "float32" if binarization == "grey" else " or ".join(DTYPES)
            raise ValueError(
                f"data.dtype: expected {expected} with data.binarization={binarization}, got "
                f"{dtype!r}"
            )
        self.event_shape = tuple(event_shape)
        self.binarization = binarization
        self.binarization_seed = binarization_seed
        self.dtype = DTYPES[dtype]
        self.valid_within_train = valid_within_train
        self.rule = self.binarizations[binarization]
        self.levels: Tensor | None = None
        levels = self.source_levels if self.rule.levels else 2
        if num_levels != levels:
            raise ValueError(
                f"data.num_levels: expected {levels} with data.binarization={binarization}, got "
                f"{num_levels}"
            )

    # What a subclass writes --------------------------------------------------------------------

    def read(self) -> dict[str, Tensor]:
        """Whole splits as published, uint8 (N, C, H, W): train, test, and maybe valid."""
        raise NotImplementedError

    def read_labels(self) -> dict[str, Tensor]:
        """The classes of the same rows, int64 (N,)."""
        raise ValueError(f"data={self.name} has no labels")

    # Splits ------------------------------------------------------------------------------------

    @property
    def meaning(self) -> str:
        """What a score on these data is a score of."""
        return self.rule.meaning

    def provenance(self) -> dict[str, Any]:
        """As of other images, and how they were binarized."""
        made: dict[str, Any] = {"kind": self.binarization, "meaning": self.meaning}
        if self.rule.drawn:
            made["seed"] = self.binarization_seed
        if self.valid_within_train:
            made["valid_within_train"] = True
        return {**super().provenance(), "binarization": made}

    def labels(self, split: str) -> Tensor:
        """The classes of a split's rows, int64 (N,).

        Raises:
            ValueError: for data without labels.
        """
        return self._parted(self.read_labels())[split]

    def load(self) -> dict[str, Tensor]:
        levels = self.read()
        if self.rule.redrawn:
            self.levels = self._parted(levels)["train"]
        values = {split: self._values(split, x) for split, x in levels.items()}
        return self._parted(values)

    def _values(self, split: str, levels: Tensor) -> Tensor:
        # of the whole published split: a row keeps its bits whatever is held out or cut
        key = (_ONCE, self.binarization_seed, SPLITS.index(split))
        values = self.rule.values(levels, self.source_levels - 1, key)
        return values.reshape(len(levels), *self.event_shape).to(self.dtype)

    def _parted(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Validation held out and every split cut, alike for images and labels."""
        whole = dict(whole)
        if "valid" not in whole:
            rest, whole["valid"] = self._hold_out(whole["train"], "valid")
            whole["train"] = whole["train"] if self.valid_within_train else rest
        elif self.valid_within_train:
            raise ValueError(
                f"data.valid_within_train: {self.name} has a validation split of its own; expected "
                "false, got true"
            )
        return {split: self._cut(split, x) for split, x in whole.items()}

    def _check_images(self, split: str, images: Tensor) -> None:
        """The readers have checked them, as levels."""

    # Batches -----------------------------------------------------------------------------------

    def batches(self, split: str, batch_size: int, **keys: Any) -> DigitBatches:
        train = split == "train"
        drawn = train and self.levels is not None
        images = self._resident_levels() if drawn else self.resident(split)
        return DigitBatches(
            images.view(-1, *self.image_shape),
            batch_size,
            event_shape=self.event_shape,
            dtype=self.dtype,
            redraw=self._drawn if drawn else None,
            augmentation=self.augmentation if train else None,
            device=self._device(),
            **keys,
        )

    def _drawn(self, levels: Tensor, epoch: int) -> Tensor:
        return draw_bits(levels, self.source_levels - 1, (_EPOCHS, self.seed, epoch))

    def _resident_levels(self) -> Tensor:
        if "levels" not in self._resident:
            device = self._device()
            self._resident["levels"] = self.levels.to(device) if self.fits(device) else self.levels
        return self._resident["levels"]


class MNIST(DigitData):
    """MNIST: 60,000 + 10,000 images of 28x28 with 256 levels, checked by MD5.

    The last ``valid_size`` of the training images are validation. Read from ``MNIST/raw`` in the
    root, or the root itself, as the published gzip files or unpacked; downloaded into the former
    where they are missing.

    Args:
        download: download what is missing.
        others: see :class:`DigitData`.

    Source: LeCun et al. 1998, gradient-based learning applied to document recognition.
    """

    version = "LeCun et al. 1998"
    image_shape = (1, 28, 28)
    source_levels = 256
    unpacked: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def __init__(self, download: bool = True, **others: Any) -> None:
        super().__init__(**others)
        self.download = download

    def read(self) -> dict[str, Tensor]:
        names = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
        return {split: self._file(name).unsqueeze(1) for split, name in names.items()}

    def read_labels(self) -> dict[str, Tensor]:
        names = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
        return {split: self._file(name).long() for split, name in names.items()}

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
        try:
            return fetch(file, folder)
        except UserError:
            continue
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
    ``binarized_mnist_train.amat``, ``..._valid.amat``, ``..._test.amat``, which may lie in the root
    itself; these are downloaded where nothing is there (110 MB), read once and kept packed.
    Both are checked to be what was published.

    Args:
        download: download what is missing.
        others: see :class:`DigitData`, without what concerns its own binarization.

    Source: Salakhutdinov & Murray 2008, "On the quantitative analysis of deep belief networks";
    as files, Larochelle & Murray 2011, "The neural autoregressive distribution estimator".
    """

    version = "Larochelle & Murray 2011"
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

    def __init__(self, download: bool = True, **others: Any) -> None:
        super().__init__(binarization="published", **others)
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
        places = [folder / file.filename, self.root / file.filename]
        found = next((p for p in places if p.is_file()), None)
        if found is not None:
            return found
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


class GreyDigits(DigitData):
    """scikit-learn's 8x8 digits, 17 levels, embedded: MNIST's stand-in where a run must be short.

    Splits are those of :class:`~surflow.data.images.Digits`: 1,297 + 200 + 300.

    Args:
        others: see :class:`DigitData`.
    """

    version = Digits.version
    image_shape = (1, 8, 8)
    source_levels = 17

    def read(self) -> dict[str, Tensor]:
        whole = Digits(name=self.name, event_shape=self.image_shape, num_levels=17)
        return whole.load()

    def read_labels(self) -> dict[str, Tensor]:
        from sklearn.datasets import load_digits

        labels = torch.from_numpy(load_digits().target).long().tensor_split(Digits.ends)
        return dict(zip(SPLITS, labels, strict=True))
