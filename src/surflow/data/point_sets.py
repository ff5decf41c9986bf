r"""Sets of points: pictures as clouds, each point drawn from the ink.

.. math:: x = (c + u,\ H - 1 - r + v), \quad (r, c) \propto \mathrm{level}, \quad
          u, v \sim \mathrm{Uniform}[0, 1)

Coordinates are in pixels of the picture, x to the right and y upwards. A density of a point is one
per square pixel: scores in other units of length differ by a constant, see
:func:`other_units`.
"""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.embedded import Digits
from surflow.data.mnist import MNIST
from surflow.data.module import SPLITS, TensorDataModule, fingerprint
from surflow.errors import UserError, check_whole, is_whole
from surflow.files import locked, write_json, write_npz

_POINTS, _AGAIN = 0x504F494E, 0x504F494F  # keep these random numbers apart from others of the seed
_BLOCK = 512  # pictures at a time
_JITTER_BITS = 19  # pixel + jitter is then exact in float32, and stays inside its pixel

SAMPLING = (
    "pixels in proportion to their level, without replacement where at least as many have ink as "
    "points are wanted, else with; jitter uniform on a grid of 2^-19 pixels, drawn anew for a set "
    "with two equal coordinates along an axis"
)


def other_units(per_point: float, scale: float, num_features: int = 2) -> float:
    r"""A log-density a point, nats, in units of length ``scale`` times as long.

    .. math:: \log p' = \log p + C \log s

    Args:
        per_point: log p(set) / N in the old unit, nats.
        scale: s, old units in a new one.
        num_features: C, coordinates of a point.

    >>> round(other_units(-5.30, 28.0), 3)  # from pixels to the unit square
    1.364
    """
    return per_point + num_features * math.log(scale)


# Drawing


def draw_points(images: np.ndarray, num_points: int, key: Sequence[int]) -> np.ndarray:
    """Points of pictures, in the order they are drawn in.

    Pixels are drawn in proportion to their level: without replacement from a picture with at least
    ``num_points`` pixels of ink, else with replacement. A point is uniform in its pixel. No two
    points of a set share a coordinate. The draws follow from the key and the picture's row alone,
    on any machine and with any version of NumPy (PCG64's raw stream).

    Args:
        images: (M, H, W), uint8, H and W at most 32.
        num_points: N, of each.
        key: whole numbers >= 0.

    Returns:
        float32 (M, N, 2): x in [0, W) and y in [0, H), pixels, y upwards.

    Raises:
        ValueError: for a picture without ink, or larger than 32 pixels.

    Cost: sorting H W keys a picture; some seconds for MNIST.

    Source: Edwards & Storkey 2017, arXiv 1606.02185, Sec. 5.2, and its code by Durkan. An
    exponential race draws without replacement: Efraimidis & Spirakis 2006, Inf. Process. Lett. 97.
    """
    if max(images.shape[1:]) > 32:
        raise ValueError(f"draw_points: expected at most 32 x 32 pixels, got {images.shape[1:]}")
    blank = np.flatnonzero(images.max((1, 2), initial=0) == 0)
    if len(blank):
        raise ValueError(f"draw_points: expected ink in every picture, got none in row {blank[0]}")
    stream = np.random.PCG64([_POINTS, *key])
    blocks = [
        _drawn(images[start : start + _BLOCK], num_points, stream)
        for start in range(0, len(images), _BLOCK)
    ]
    if not blocks:
        return np.empty((0, num_points, 2), np.float32)
    corners, jitter = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    points = corners + jitter
    attempt = 0

    while len(tied := np.flatnonzero(_has_ties(points))):
        for row in tied:
            again = np.random.PCG64([_AGAIN, *key, int(row), attempt])
            points[row] = corners[row] + _jitter(again.random_raw((1, 2 * num_points)))[0]
        attempt += 1
    return points


def _drawn(
    images: np.ndarray, num_points: int, stream: np.random.PCG64
) -> tuple[np.ndarray, np.ndarray]:
    """Lower left corners of the pixels that were drawn, and where in them, float32 (M, N, 2)."""
    count, height, width = images.shape
    levels = images.reshape(count, -1).astype(np.int64)
    # as many random words for every picture, so that none depends on how many follow
    ends = np.cumsum([levels.shape[1], num_points])
    words = stream.random_raw(count * (ends[1] + 2 * num_points)).reshape(count, -1)
    race, spare, within = np.split(words, ends, axis=1)
    race, spare = ((words >> np.uint64(11)) * 2.0**-53 for words in (race, spare))
    pixels = np.empty((count, num_points), np.int64)
    enough = (levels > 0).sum(1) >= num_points
    if enough.any():  # there may be fewer pixels than points
        pixels[enough] = _race_winners(levels[enough], race[enough], num_points)
    pixels[~enough] = _with_replacement(levels[~enough], spare[~enough])
    rows, columns = np.divmod(pixels, width)
    return np.stack([columns, height - 1 - rows], 2).astype(np.float32), _jitter(within)


def _race_winners(levels: np.ndarray, u: np.ndarray, num_points: int) -> np.ndarray:
    """The pixels with the earliest times, exponential with the levels as rates."""
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(levels > 0, -np.log1p(-u) / levels, np.inf)
    first = np.argpartition(times, num_points - 1, axis=1)[:, :num_points]
    order = np.argsort(np.take_along_axis(times, first, 1), axis=1, kind="stable")
    return np.take_along_axis(first, order, 1)


def _with_replacement(levels: np.ndarray, u: np.ndarray) -> np.ndarray:
    below = levels.cumsum(1)
    wanted = np.floor(u * below[:, -1:]).astype(np.int64)  # 0 ... total - 1
    return (below[:, None, :] <= wanted[:, :, None]).sum(2)


def _has_ties(points: np.ndarray) -> np.ndarray:
    """Whether two points of a set share a coordinate, (M,)."""
    return (np.diff(np.sort(points, axis=1), axis=1) == 0).any((1, 2))


def _jitter(words: np.ndarray) -> np.ndarray:
    """Float32 (M, N, 2) in [0, 1), from (M, 2 N) random words."""
    u = (words >> np.uint64(64 - _JITTER_BITS)) * 2.0**-_JITTER_BITS
    return u.astype(np.float32).reshape(len(words), -1, 2)


# Data


class PointSets(TensorDataModule):
    """Sets of points in the plane: float32 (M, N, 2), in pixels.

    A subclass says ``side``, the pixels of a picture's side, and gives whole splits in
    :meth:`load`.

    Args:
        name: of the data, in records and run folders.
        event_shape: [N, 2].
        width: must be ``side``; models of the data are told it. None: ``side``.
        points_seed: of the draw; all seeds of a table share one draw of data.
        eval_batch_size, others: see :class:`~surflow.data.module.TensorDataModule`.

    Raises:
        ValueError: for a shape, a width, a seed or sizes out of range.
        UserError: from :meth:`setup` for files that are missing or damaged.
    """

    kind = "set"
    noun = "sets"
    side: ClassVar[int]

    def __init__(
        self,
        name: str,
        event_shape: Sequence[int] = (50, 2),
        width: float | None = None,
        points_seed: int = 0,
        eval_batch_size: int = 512,
        **others: Any,
    ) -> None:
        super().__init__(name, event_shape, eval_batch_size=eval_batch_size, **others)
        shape = self.event_shape
        if len(shape) != 2 or shape[1] != 2 or not is_whole(shape[0], least=2):
            raise ValueError(f"data.event_shape: expected [N, 2] with N >= 2, got {list(shape)}")
        if width not in (None, self.side):
            raise ValueError(f"data.width: {name} is {self.side} pixels wide, got {width}")
        check_whole("data.points_seed", points_seed, least=0)
        self.num_points = shape[0]
        self.width = float(self.side)
        self.points_seed = points_seed

    @property
    def box(self) -> tuple[list[float], list[float]]:
        return [0.0] * self.num_dims, [self.width] * self.num_dims

    def provenance(self) -> dict[str, Any]:
        points = {"number": self.num_points, "seed": self.points_seed, "unit": "pixels"}
        return {**super().provenance(), "points": points}

    def _points_of(self, images: Tensor, part: int) -> Tensor:
        pictures = images.numpy().reshape(-1, self.side, self.side)
        points = draw_points(pictures, self.num_points, (self.points_seed, part))
        return torch.from_numpy(points)


class SpatialMNIST(PointSets):
    """MNIST as clouds of points: 50,000 + 10,000 + 10,000.

    The last 10,000 of MNIST's training images are validation. Drawn once and kept in an .npz file
    with its recipe (``.json``), which has a checksum of every split. A cache that does not fit its
    recipe is drawn again.

    Args:
        cache: the folder of the cache; None: ``spatial_mnist`` in the root.
        download: download MNIST where it is missing.
        others: see :class:`PointSets`.

    Source: Edwards & Storkey 2017, arXiv 1606.02185, Sec. 5.2; MNIST: LeCun et al. 1998.
    """

    version = "MNIST, LeCun et al. 1998"
    side = 28
    valid_rows: ClassVar[int] = 10_000
    runtime = PointSets.runtime | {"cache", "download"}

    def __init__(
        self,
        name: str = "spatial_mnist",
        cache: str | None = None,
        download: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(name=name, **others)
        self.cache = Path(cache).expanduser() if cache else self.root / "spatial_mnist"
        self.download = download

    def images(self) -> MNIST:
        """The pictures that points are drawn from."""
        return MNIST(root=str(self.root), download=self.download)

    @property
    def file(self) -> Path:
        """The cache; its recipe is in the same folder."""
        return self.cache / f"points{self.num_points}-seed{self.points_seed}.npz"

    def load(self) -> dict[str, Tensor]:
        kept = _read(self.file, self.recipe())
        if kept is not None:
            return kept
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with locked(self.file.with_suffix(".lock")):  # where another process may be first
                return _read(self.file, self.recipe()) or self._make()
        except PermissionError as error:
            raise UserError(
                f"data.cache: cannot write to {self.cache} ({error.strerror}); set "
                "data.cache=<folder>"
            ) from None

    def recipe(self) -> dict[str, Any]:
        """What the points follow from."""
        return {
            "format": 1,
            "source": self.version,
            "source_md5": {k: v for k, v in sorted(MNIST.unpacked.items()) if "images" in k},
            "num_points": self.num_points,
            "seed": self.points_seed,
            "sampling": SAMPLING,
            "unit": "pixels; x to the right, y upwards",
        }

    def _make(self) -> dict[str, Tensor]:
        images = self.images().read()
        print(f"drawing points into {self.file}, once", file=sys.stderr)
        train, test = (self._points_of(images[s], i) for i, s in enumerate(("train", "test")))
        cut = len(train) - self.valid_rows
        splits = {"train": train[:cut], "valid": train[cut:], "test": test}
        write_npz(self.file, compressed=False, **{k: x.numpy() for k, x in splits.items()})
        write_json(self.file.with_suffix(".json"), {**self.recipe(), "splits": _described(splits)})
        return splits


class SpatialDigits(PointSets):
    """scikit-learn's 8x8 digits as clouds of points, embedded: for smoke runs.

    Splits are those of :class:`~surflow.data.embedded.Digits`: 1,297 + 200 + 300.

    Args:
        others: see :class:`PointSets`.
    """

    version = Digits.version
    side = 8

    def __init__(
        self, name: str = "spatial_digits", event_shape: Sequence[int] = (16, 2), **others: Any
    ) -> None:
        super().__init__(name=name, event_shape=event_shape, **others)

    def load(self) -> dict[str, Tensor]:
        whole = Digits().load()
        return {s: self._points_of(whole[s], i) for i, s in enumerate(SPLITS)}


def _described(splits: dict[str, Tensor]) -> dict[str, Any]:
    return {s: {"rows": len(x), "sha256": fingerprint(x)} for s, x in splits.items()}


def _read(file: Path, recipe: dict[str, Any]) -> dict[str, Tensor] | None:
    """The splits of a cache that agrees with its recipe and with this one; None for any other."""
    try:
        told = json.loads(file.with_suffix(".json").read_text())
        with np.load(file, allow_pickle=False) as arrays:
            splits = {s: torch.from_numpy(arrays[s]) for s in SPLITS}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    return splits if told == {**recipe, "splits": _described(splits)} else None
