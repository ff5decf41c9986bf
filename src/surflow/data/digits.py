r"""Handwritten digits for VAEs: grey images, and the binary ones that follow from them.

.. math:: b_d \sim \mathrm{Bernoulli}(x_d / (K - 1)), \quad x_d \in \{0, \dots, K - 1\}

Published log-likelihoods of "binarized MNIST" are of bits drawn anew in every epoch
(:class:`~surflow.data.mnist.MNIST`) or of one published draw
(:class:`~surflow.data.mnist.BinarizedMNIST`). They do not compare with each other, nor with the
cross-entropy of grey values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.images import ImageBatches, ImageData
from surflow.data.module import SPLITS
from surflow.data.pixels import to_pixels
from surflow.errors import check_choice, check_whole

_EPOCHS = 0x42494E31  # keep these random numbers apart from others of the same seed and epoch
_ONCE = 0x42494E32

DTYPES = {"float32": torch.float32, "uint8": torch.uint8}


# Binarization


def thresholds(count: int, most: int, key: Sequence[int]) -> np.ndarray:
    """Independent uniform integers 0 ... most - 1: uint8 (count,).

    They follow from the key alone on any machine (PCG64's raw stream), and a longer array begins
    with the shorter ones of its key.

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
    return u % most if most < limit else u


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
        values: ``values(levels, most, key)``: the values that a model is given.
        meaning: what a score on these values means.
        levels: whether the levels stay as they are.
        unit_interval: whether the values are grey values in [0, 1].
        drawn: whether validation and test images are one random draw.
        redrawn: whether the training images are drawn anew in every epoch.
    """

    values: Callable[[Tensor, int, Sequence[int]], Tensor]
    meaning: str
    levels: bool = False
    unit_interval: bool = False
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
        unit_interval=True,
    ),
}


class DigitBatches(ImageBatches):
    """Batches of images in the shape and type that a model takes, redrawn in every epoch or not.

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
            self.images = self.redraw(self.source, self.rows.epoch())
        for batch in super().__iter__():
            yield batch.reshape(len(batch), *self.event_shape).to(self.dtype)


# Data


class DigitData(ImageData):
    """Grey images of one channel, as bits, grey values or levels, flat or as images.

    A subclass says ``image_shape`` and ``source_levels`` and reads whole splits in :meth:`read`.
    ``splits`` holds what a model is scored on. With a dynamic binarization training batches are
    redrawn: the bits of an epoch follow from seed, epoch and the image's row.

    Args:
        event_shape: ``image_shape``, or [D] for models of vectors; None: [D].
        binarization: one of

            - ``dynamic``: Bernoulli(level / largest level), for training anew in every epoch;
            - ``fixed``: the same, drawn once for all splits;
            - ``threshold``: 1 from half of the largest level on;
            - ``grey``: the grey values in [0, 1]. With a Bernoulli, ELBO and IWBO of them are lower
              bounds on the *mean* log-likelihood of the dynamic binarization, by an encoder that
              does not see the bits, and no likelihood of the grey image;
            - ``none``: the levels themselves.
        binarization_seed: of the bits that are drawn once, so that all runs are scored on the same.
        dtype: float32, as a Bernoulli takes them, or uint8, for layers over integers.
        num_levels: 2, or with ``none`` the levels of the source; None: these.
        valid_within_train: train on validation images too, where the source has none of its own.
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
        event_shape: Sequence[int] | None = None,
        binarization: str = "dynamic",
        binarization_seed: int = 0,
        dtype: str = "float32",
        num_levels: int | None = None,
        valid_within_train: bool = False,
        batch_size: int = 128,
        eval_batch_size: int = 1024,
        **others: Any,
    ) -> None:
        check_choice("data.binarization", binarization, self.binarizations)
        self.rule = self.binarizations[binarization]
        levels = self.source_levels if self.rule.levels else 2
        super().__init__(
            event_shape=self.image_shape,
            num_levels=levels if num_levels is None else num_levels,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            **others,
        )
        flat = (math.prod(self.image_shape),)
        event_shape = flat if event_shape is None else event_shape
        if tuple(event_shape) not in (self.image_shape, flat):
            raise ValueError(
                f"data.event_shape: {self.name} has {list(self.image_shape)} or {list(flat)}, got "
                f"{list(event_shape)}"
            )
        check_whole("data.binarization_seed", binarization_seed, least=0)
        if dtype not in DTYPES or (self.rule.unit_interval and dtype != "float32"):
            expected = "float32" if self.rule.unit_interval else " or ".join(DTYPES)
            raise ValueError(
                f"data.dtype: expected {expected} with data.binarization={binarization}, got "
                f"{dtype!r}"
            )
        self.event_shape = tuple(event_shape)
        self.binarization = binarization
        self.binarization_seed = binarization_seed
        self.dtype = DTYPES[dtype]
        self.valid_within_train = valid_within_train
        self.levels: Tensor | None = None
        if self.num_levels != levels:
            raise ValueError(
                f"data.num_levels: expected {levels} with data.binarization={binarization}, got "
                f"{num_levels}"
            )

    def read(self) -> dict[str, Tensor]:
        """Whole splits as published, uint8 (N, C, H, W)."""
        raise NotImplementedError

    def read_labels(self) -> dict[str, Tensor]:
        """The classes of the same rows, int64 (N,); none for data without labels."""
        return {}

    # Splits

    def provenance(self) -> dict[str, Any]:
        made: dict[str, Any] = {"kind": self.binarization, "meaning": self.rule.meaning}
        if self.rule.drawn:
            made["seed"] = self.binarization_seed
        if self.valid_within_train:
            made["valid_within_train"] = True
        return {**super().provenance(), "binarization": made}

    def labels(self, split: str) -> Tensor | None:
        labels = self.read_labels()
        return self._parted(labels)[split] if labels else None

    def pixels(self, values: Tensor) -> tuple[Tensor, int]:
        if not (self.rule.unit_interval and values.is_floating_point()):
            return super().pixels(values)
        return to_pixels(255 * values.reshape(len(values), *self.image_shape), 256), 256

    def load(self) -> dict[str, Tensor]:
        levels = self.read()
        if self.rule.redrawn:
            self.levels = self._parted(levels)["train"]
        return {split: self._values(split, x) for split, x in levels.items()}

    def _values(self, split: str, levels: Tensor) -> Tensor:
        # of the whole published split: a row keeps its bits whatever is held out or cut
        key = (_ONCE, self.binarization_seed, SPLITS.index(split))
        values = self.rule.values(levels, self.source_levels - 1, key)
        return values.reshape(len(levels), *self.event_shape).to(self.dtype)

    def _parted(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.valid_within_train and "valid" in whole:
            raise ValueError(
                f"data.valid_within_train: {self.name} has a validation split of its own; expected "
                "false, got true"
            )
        return super()._parted(whole)

    def hold_out(self, rows: Tensor, split: str) -> tuple[Tensor, Tensor]:
        rest, held = super().hold_out(rows, split)
        return rows if self.valid_within_train else rest, held

    # Batches

    def batches(self, split: str, batch_size: int, **keys: Any) -> DigitBatches:
        train = split == "train"
        drawn = train and self.levels is not None
        images = self._keep("levels", self.levels) if drawn else self.resident(split)
        return DigitBatches(
            images.view(-1, *self.image_shape),
            batch_size,
            event_shape=self.event_shape,
            dtype=self.dtype,
            redraw=self._drawn if drawn else None,
            augmentation=self.augmentation if train else None,
            device=self.device(),
            **keys,
        )

    def _drawn(self, levels: Tensor, epoch: int) -> Tensor:
        return draw_bits(levels, self.source_levels - 1, (_EPOCHS, self.seed, epoch))
