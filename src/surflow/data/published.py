"""Published image sets: files that are found, checked and downloaded where they are missing."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.downloads import Published, check_file, fetch
from surflow.data.images import ImageData
from surflow.data.sources import (
    image_files,
    npz_shape,
    pack,
    read_array,
    read_cifar_batch,
    read_image,
)
from surflow.errors import UserError, check_choice

_PICKLES = ("train_data_batch_1", "*/train_data_batch_1")


class CIFAR10(ImageData):
    """CIFAR-10: 50,000 and 10,000 colour images of 32x32, every file checked by its MD5.

    Read from the unpacked ``cifar-10-batches-py`` or from ``cifar-10-python.tar.gz`` in the root
    (or its folder ``cifar10``); downloaded where there is neither. No pickle is loaded: see
    :func:`~surflow.data.sources.read_cifar_batch`.

    Args:
        download: download what is missing.
        others: see :class:`ImageData`.

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """

    version = "cifar-10-python"
    folder: ClassVar[str] = "cifar-10-batches-py"
    rows: ClassVar[int] = 10_000  # a batch
    runtime = ImageData.runtime | {"download"}

    def __init__(
        self,
        name: str = "cifar10",
        valid_size: int | None = 5000,
        flip: bool = True,
        pad: int = 2,
        translate: float = 0.04,
        download: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(
            name=name, valid_size=valid_size, flip=flip, pad=pad, translate=translate, **others
        )
        self.download = download

    def published(self) -> tuple[Published, list[Published], list[Published]]:
        """The archive, its training batches and its test batch."""
        from torchvision.datasets import CIFAR10 as Facts

        archive = Published(Facts.filename, Facts.tgz_md5, Facts.url)
        train, test = ([Published(*f) for f in x] for x in (Facts.train_list, Facts.test_list))
        return archive, train, test

    def load(self) -> dict[str, Tensor]:
        archive, train, test = self.published()
        contents = self._contents(archive, [*train, *test])

        def images(batches: list[Published]) -> Tensor:
            parts = []
            for name in (b.filename for b in batches):
                parts.append(read_cifar_batch(contents[name], name))
                if (got := len(parts[-1])) != self.rows:
                    raise UserError(f"data.root: {name}: expected {self.rows} images, got {got}")
            return torch.from_numpy(np.concatenate(parts))

        return {"train": images(train), "test": images(test)}

    def _contents(self, archive: Published, batches: list[Published]) -> dict[str, bytes]:
        places = (self.root, self.root / "cifar10")
        for folder in (*(p / self.folder for p in places), *places):
            if any((folder / b.filename).is_file() for b in batches):
                return {
                    b.filename: check_file(folder / b.filename, b).read_bytes() for b in batches
                }
        paths = [p / archive.filename for p in places if (p / archive.filename).is_file()]
        if paths:
            path = check_file(paths[0], archive)
        elif self.download:
            path = fetch(archive, self.root / "cifar10")
        else:
            raise UserError(
                f"data.root: no CIFAR-10 in {self.root}: expected {self.folder}/ or "
                f"{archive.filename} (md5 {archive.md5}) from {archive.url}; or data.download=true"
            )
        wanted = {f"{self.folder}/{b.filename}": b.filename for b in batches}
        found = {}
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if member.name in wanted and member.isfile():
                    found[wanted[member.name]] = tar.extractfile(member).read()
        for b in batches:
            if b.filename not in found:
                raise UserError(f"data.root: {path} holds no {self.folder}/{b.filename}")
        return found


class SVHN(ImageData):
    """SVHN, cropped digits: 73,257 and 26,032 colour images of 32x32, each file checked by MD5.

    Read from ``train_32x32.mat`` and ``test_32x32.mat`` in the root or its folder ``svhn``, and
    downloaded there where they are missing. Needs SciPy, which reads that format.

    Args:
        download: download what is missing.
        others: see :class:`ImageData`.

    Source: Netzer et al. 2011, Reading digits in natural images.
    """

    version = "cropped digits"
    runtime = ImageData.runtime | {"download"}

    def __init__(
        self,
        name: str = "svhn",
        valid_size: int | None = 5000,
        download: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(name=name, valid_size=valid_size, **others)
        self.download = download

    def published(self) -> dict[str, Published]:
        """The file of each split."""
        from torchvision.datasets import SVHN as Facts

        entries = {split: Facts.split_list[split] for split in ("train", "test")}
        return {split: Published(name, md5, url) for split, (url, name, md5) in entries.items()}

    def load(self) -> dict[str, Tensor]:
        try:
            from scipy.io import loadmat
        except ImportError:
            raise UserError("data=svhn: its files need SciPy: pip install scipy") from None
        splits = {}
        for split, file in self.published().items():
            places = [self.root / "svhn" / file.filename, self.root / file.filename]
            path = next((p for p in places if p.is_file()), None)
            if path is not None or not self.download:
                path = check_file(path or places[0], file)
            else:
                path = fetch(file, places[0].parent)
            # stored as (H, W, C, N)
            pixels = loadmat(path, variable_names=["X"])["X"].transpose(3, 2, 0, 1)
            splits[split] = torch.from_numpy(np.ascontiguousarray(pixels))
        return splits


class DownsampledImageNet(ImageData):
    """ImageNet at 32x32 or 64x64, one of its two published versions; test is its validation set.

    They differ in how images were scaled and in a few images, so likelihoods do not compare:

    - ``png``, 2016: 1,281,149 and 49,999 PNG files in ``train_32x32`` and ``valid_32x32``, the
      version that published bits/dim are for;
    - ``npz``, 2017: 1,281,167 and 50,000 images in ``train_data_batch_1.npz`` to ``_10.npz`` and
      ``val_data.npz``. The same release as pickles is refused: a pickle can run anything.

    Both are looked for in ``imagenet32`` (or 64) of the root, then in the root itself; the number
    of images is checked. They are read once, and kept in one memory-mapped file.

    Args:
        name: None: imagenet32 or imagenet64.
        release: png or npz.
        complete: require all the images of the release; False takes what is there, and says so in
            ``version``.
        others: see :class:`ImageData`.

    Source: van den Oord et al. 2016, arXiv 1601.06759; Chrabaszcz et al. 2017, arXiv 1707.08819.
    """

    counts: ClassVar[dict[str, tuple[int, int]]] = {
        "png": (1_281_149, 49_999),
        "npz": (1_281_167, 50_000),
    }
    origin: ClassVar[dict[str, str]] = {
        "png": "2016, van den Oord et al. (PNG)",
        "npz": "2017, Chrabaszcz et al. (npz)",
    }

    def __init__(
        self,
        event_shape: Sequence[int] = (3, 32, 32),
        name: str | None = None,
        valid_size: int | None = 10_000,
        release: str = "png",
        complete: bool = True,
        **others: Any,
    ) -> None:
        shape = tuple(event_shape)
        if shape not in ((3, 32, 32), (3, 64, 64)):
            raise ValueError(
                "data.event_shape: downsampled ImageNet has [3, 32, 32] or [3, 64, 64], got "
                f"{list(shape)}"
            )
        check_choice("data.release", release, self.counts)
        self.side = shape[1]
        super().__init__(
            name=name or f"imagenet{self.side}", event_shape=shape, valid_size=valid_size, **others
        )
        self.release = release
        self.complete = complete
        self.version = self.origin[release]

    def load(self) -> dict[str, Tensor]:
        if not self.root.is_dir():
            raise UserError(f"data.root: no folder {self.root}; {self._expected()}")
        folders = (self.root / f"imagenet{self.side}", self.root)
        for folder in folders:
            files = self._files(folder, self.release)
            if all(files.values()):
                return self._read(folder, files)
        found = ""
        other = next(r for r in self.counts if r != self.release)
        if any(all(self._files(folder, other).values()) for folder in folders):
            found = (
                f"; there is the {self.origin[other]} version: data.release={other} takes it, and "
                "its bits/dim compare only with others on that version"
            )
        elif any(next(f.glob(n), None) for f in folders for n in _PICKLES):
            found = (
                "; there are pickles, which are not read because they can run anything: take the "
                "npz files of the same release, and data.release=npz"
            )
        raise UserError(
            f"data.root: no {self.release} release of ImageNet {self.side} in {self.root}; "
            f"{self._expected()}{found}"
        )

    def _expected(self) -> str:
        s = self.side
        names = {
            "png": f"train_{s}x{s}/ and valid_{s}x{s}/ with PNG files",
            "npz": "train_data_batch_1.npz to _10.npz and val_data.npz",
        }
        return f"expected imagenet{s}/ in it with {names[self.release]}"

    def _files(self, folder: Path, release: str) -> dict[str, list[Path]]:
        s = self.side
        if release == "png":
            names = {"train": f"train_{s}x{s}", "test": f"valid_{s}x{s}"}
            return {split: image_files(folder / name) for split, name in names.items()}

        def number(path: Path) -> int:
            return int(path.stem.rsplit("_", 1)[1])

        # each zip unpacks into a folder of its own, for 64x64 in two parts
        train = [*folder.glob("train_data_batch_*.npz"), *folder.glob("*/train_data_batch_*.npz")]
        train = [p for p in train if p.stem.rsplit("_", 1)[1].isdigit()]
        test = [*folder.glob("val_data.npz"), *folder.glob("*/val_data.npz")]
        return {"train": sorted(train, key=number), "test": test[:1]}

    def _read(self, folder: Path, files: dict[str, list[Path]]) -> dict[str, Tensor]:
        counts = {split: [self._count(p) for p in paths] for split, paths in files.items()}
        totals = tuple(sum(counts[split]) for split in ("train", "test"))
        if totals != self.counts[self.release]:
            self._incomplete(folder, totals)
        splits = {}
        for split, paths in files.items():
            label = f"imagenet{self.side}-{self.release}-{split}"
            of = (self.event_shape, counts[split], self._images)
            splits[split] = pack(paths, folder, label, *of)
        return splits

    def _incomplete(self, folder: Path, totals: tuple[int, int]) -> None:
        expected = self.counts[self.release]
        if self.complete:
            other = next((r for r, c in self.counts.items() if c == totals), None)
            hint = f" (that many has the {self.origin[other]} version)" if other else ""
            raise UserError(
                f"data.root: {folder}: the {self.release} release has {expected[0]} and "
                f"{expected[1]} images, got {totals[0]} and {totals[1]}{hint}; unpack it again, or "
                "data.complete=false takes what is there"
            )
        self.version += f", incomplete: {totals[0]} and {totals[1]} images"

    def _count(self, path: Path) -> int:
        if self.release == "png":
            return 1
        shape = npz_shape(path, "data")
        if len(shape) != 2 or shape[1] != self.num_dims:
            raise UserError(
                f"data.root: {path}: expected data of shape (N, {self.num_dims}), got {shape}"
            )
        return shape[0]

    def _images(self, path: Path) -> np.ndarray:
        if self.release == "png":
            return read_image(path, self.event_shape, resize=False)[None]
        pixels = read_array(path, "data")
        if pixels.dtype != np.uint8:
            raise UserError(f"data.root: {path}: expected uint8, got {pixels.dtype}")
        return pixels.reshape(-1, *self.event_shape)
