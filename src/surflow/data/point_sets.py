r"""Sets of points: pictures as clouds, each point drawn from the ink.

.. math:: x = (c + u,\ H - 1 - r + v), \quad (r, c) \propto \mathrm{level}, \quad
          u, v \sim \mathrm{Uniform}[0, 1)

Coordinates are in pixels of the picture, x to the right and y upwards. A density of a point is one
per square pixel: scores in other units of length differ by a constant, see
:func:`other_units`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.digits import MNIST
from surflow.data.downloads import data_root, locked
from surflow.data.images import SPLITS, Digits
from surflow.data.module import TensorDataModule, spaced_rows
from surflow.errors import UserError

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

    Pixels are drawn one after another in proportion to their level: without replacement from a
    picture with at least ``num_points`` pixels of ink, else with replacement. A point is uniform in
    its pixel. No two points of a set share a coordinate exactly. The draws follow from the key and
    the picture's row alone, on any machine and with any version of NumPy (PCG64's raw stream).

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
    race, spare, jitter = _uniform(race), _uniform(spare), _jitter(within)
    pixels = np.empty((count, num_points), np.int64)
    enough = (levels > 0).sum(1) >= num_points
    if enough.any():  # there may be fewer pixels than points
        pixels[enough] = _first_home(levels[enough], race[enough], num_points)
    pixels[~enough] = _with_replacement(levels[~enough], spare[~enough])
    rows, columns = np.divmod(pixels, width)
    return np.stack([columns, height - 1 - rows], 2).astype(np.float32), jitter


def _first_home(levels: np.ndarray, u: np.ndarray, num_points: int) -> np.ndarray:
    """The first ones of a race in which times are exponential with the levels as rates."""
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(levels > 0, -np.log1p(-u) / levels, np.inf)
    first = np.argpartition(times, num_points - 1, axis=1)[:, :num_points]
    order = np.argsort(np.take_along_axis(times, first, 1), axis=1, kind="stable")
    return np.take_along_axis(first, order, 1)


def _with_replacement(levels: np.ndarray, u: np.ndarray) -> np.ndarray:
    below = levels.cumsum(1)
    wanted = np.floor(u * below[:, -1:]).astype(np.int64)  # 0 ... total - 1
    return (below[:, None, :] <= wanted[:, :, None]).sum(2)


def _uniform(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)) * 2.0**-53


def _jitter(words: np.ndarray) -> np.ndarray:
    """Float32 (M, N, 2) in [0, 1), from (M, 2 N) random words."""
    u = (words >> np.uint64(64 - _JITTER_BITS)) * 2.0**-_JITTER_BITS
    return u.astype(np.float32).reshape(len(words), -1, 2)


def _has_ties(points: np.ndarray) -> np.ndarray:
    """Whether two points of a set share a coordinate, (M,)."""
    return (np.diff(np.sort(points, axis=1), axis=1) == 0).any((1, 2))


# Data


class PointSets(TensorDataModule):
    """Sets of points in the plane: float32 (M, N, 2), in pixels.

    A subclass says ``side``, the pixels of a picture's side, and gives whole splits in
    :meth:`load`. A split that is cut short keeps rows evenly spaced over it.

    Args:
        name: of the data, in records and run folders.
        event_shape: [N, 2].
        width: must be ``side``; models of the data are told it.
        root: the folder that datasets are in; None: the environment's ``SURFLOW_DATA``, else
            ``data``.
        points_seed: of the draw; all seeds of a table share one draw of data.
        train_size, valid_size, test_size: sets to keep of each split; None: all.
        batch_size, eval_batch_size, seed: see :class:`~surflow.data.module.TensorDataModule`.

    Raises:
        ValueError: for a shape, a width, a seed or sizes out of range.
        UserError: from :meth:`setup` for files that are missing or damaged.
    """

    unit = "nats"
    version = ""
    side: ClassVar[int]

    def __init__(
        self,
        name: str,
        event_shape: Sequence[int],
        width: float,
        root: str | None = None,
        points_seed: int = 0,
        train_size: int | None = None,
        valid_size: int | None = None,
        test_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        shape = tuple(event_shape)
        if len(shape) != 2 or shape[1] != 2 or not _whole(shape[0], 2):
            raise ValueError(f"data.event_shape: expected [N, 2] with N >= 2, got {list(shape)}")
        if width != self.side:
            raise ValueError(f"data.width: {name} is {self.side} pixels wide, got {width}")
        if not _whole(points_seed, 0):
            raise ValueError(f"data.points_seed: expected a whole number >= 0, got {points_seed}")
        sizes = {"train": train_size, "valid": valid_size, "test": test_size}
        for split, size in sizes.items():
            if size is not None and not _whole(size, 1):
                raise ValueError(
                    f"data.{split}_size: expected a positive whole number or null, got {size}"
                )
        self.name = name
        self.event_shape = shape
        self.num_points = shape[0]
        self.width = float(width)
        self.root = data_root(root)
        self.points_seed = points_seed
        self.sizes = sizes

    @property
    def box(self) -> tuple[list[float], list[float]]:
        """Edges that hold every set, flattened."""
        count = math.prod(self.event_shape)
        return [0.0] * count, [self.width] * count

    def provenance(self) -> dict[str, Any]:
        """What to write beside a score: how points were drawn, rows and checksum of every split."""
        return {
            "name": self.name,
            "version": self.version,
            "points": {"number": self.num_points, "seed": self.points_seed, "unit": "pixels"},
            "splits": {s: _described(x.numpy()) for s, x in self.splits.items()},
        }

    def load(self) -> dict[str, np.ndarray]:
        """Whole splits: train, valid, test, float32 (M, N, 2)."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        whole = self.load()
        splits = {
            s: spaced_rows(torch.from_numpy(whole[s]), self.sizes[s], f"{s} sets of {self.name}", s)
            for s in SPLITS
        }
        if self.batch_size > len(splits["train"]):
            raise ValueError(
                f"data.batch_size: expected at most the {len(splits['train'])} training sets of "
                f"{self.name}, got {self.batch_size}"
            )
        self.splits = splits

    def _points_of(self, images: Tensor, part: int) -> np.ndarray:
        pictures = images.numpy().reshape(-1, self.side, self.side)
        return draw_points(pictures, self.num_points, (self.points_seed, part))


class SpatialMNIST(PointSets):
    """MNIST as clouds of points: 50,000 + 10,000 + 10,000.

    The last 10,000 of MNIST's training images are validation. Drawn once and kept in a cache, an
    .npz file of float32 arrays with its recipe (``.json``): number of points, seed, what was drawn
    from, and a checksum of every split. A cache that does not have the checksums of its recipe is
    drawn again.

    Args:
        cache: the folder of the cache; None: ``spatial_mnist`` in the root.
        download: download MNIST where it is missing.
        others: see :class:`PointSets`.

    Source: Edwards & Storkey 2017, arXiv 1606.02185, Sec. 5.2; MNIST: LeCun et al. 1998.
    """

    version = "MNIST, LeCun et al. 1998"
    side = 28
    valid_rows: ClassVar[int] = 10_000

    def __init__(self, cache: str | None = None, download: bool = True, **others: Any) -> None:
        super().__init__(**others)
        self.cache = Path(cache).expanduser() if cache else self.root / "spatial_mnist"
        self.download = download

    def images(self) -> MNIST:
        """The pictures that points are drawn from."""
        return MNIST(
            name="mnist",
            event_shape=[1, 28, 28],
            root=str(self.root),
            download=self.download,
            valid_size=self.valid_rows,
        )

    @property
    def file(self) -> Path:
        """The cache; its recipe lies beside it."""
        return self.cache / f"points{self.num_points}-seed{self.points_seed}.npz"

    def load(self) -> dict[str, np.ndarray]:
        kept = _read(self.file, self.recipe())
        if kept is not None:
            return kept
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with locked(self.file.with_suffix(".lock")):
                kept = _read(self.file, self.recipe())
                if kept is not None:  # another process was first
                    return kept
                return self._make()
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

    def _make(self) -> dict[str, np.ndarray]:
        images = self.images().read()
        print(f"drawing points into {self.file}, once", file=sys.stderr)
        train, test = (self._points_of(images[s], i) for i, s in enumerate(("train", "test")))
        cut = len(train) - self.valid_rows
        splits = {"train": train[:cut], "valid": train[cut:], "test": test}
        buffer = io.BytesIO()
        np.savez(buffer, **splits)
        recipe = {**self.recipe(), "splits": {s: _described(x) for s, x in splits.items()}}
        _replace(self.file, buffer.getvalue())
        text = json.dumps(recipe, indent=2) + "\n"
        _replace(self.file.with_suffix(".json"), text.encode())
        return splits


class SpatialDigits(PointSets):
    """scikit-learn's 8x8 digits as clouds of points, embedded: for smoke runs.

    Splits are those of :class:`~surflow.data.images.Digits`: 1,297 + 200 + 300.

    Args:
        others: see :class:`PointSets`.
    """

    version = Digits.version
    side = 8

    def load(self) -> dict[str, np.ndarray]:
        whole = Digits(name=self.name, event_shape=[1, 8, 8], num_levels=17).load()
        return {s: self._points_of(whole[s], i) for i, s in enumerate(SPLITS)}


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _described(points: np.ndarray) -> dict[str, Any]:
    """Rows, and SHA-256 of shape and values as little-endian float32."""
    digest = hashlib.sha256(repr(tuple(points.shape)).encode())
    digest.update(np.ascontiguousarray(points, "<f4"))
    return {"rows": len(points), "sha256": digest.hexdigest()}


def _read(file: Path, recipe: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The splits of a cache that is what its recipe, and this one, say; None for any other."""
    try:
        told = json.loads(file.with_suffix(".json").read_text())
        with np.load(file, allow_pickle=False) as arrays:
            splits = {s: arrays[s] for s in SPLITS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    found = {**recipe, "splits": {s: _described(x) for s, x in splits.items()}}
    return splits if told == found else None


def _replace(file: Path, content: bytes) -> None:
    """Write a file that is whole or not there."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
