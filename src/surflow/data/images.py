"""DataModules of images: 8-bit tensors, resident where they fit, augmented on their device."""

from __future__ import annotations

import hashlib
import math
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.augment import Augmentation
from surflow.data.batches import TensorBatches
from surflow.data.downloads import Published, check_file, data_root, fetch
from surflow.data.module import TensorDataModule, spaced_rows
from surflow.data.sources import (
    image_files,
    npz_shape,
    pack,
    read_array,
    read_cifar_batch,
    read_image,
)
from surflow.errors import UserError

SPLITS = ("train", "valid", "test")
_SHARE_OF_DEVICE = 1 / 3  # of its free memory, that images may take


class ImageBatches:
    """Batches of uint8 images, gathered and augmented on the device they are wanted on.

    Order and augmentation follow from seed, epoch and the image's row. A state taken after some
    batches of an epoch makes another such object go on with the next one.

    Args:
        images: (N, C, H, W), uint8, on the device or on the host, memory-mapped or not.
        batch_size, seed, epoch, drop_last, rank, world_size, whole: see
            :class:`~surflow.data.batches.TensorBatches`.
        augmentation: what is done to the images of a batch; None: nothing.
        device: where batches are wanted; None: where the images are.

    Raises:
        ValueError: as :class:`~surflow.data.batches.TensorBatches`.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        whole: bool = False,
        augmentation: Augmentation | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.images = images
        self.device = images.device if device is None else torch.device(device)
        self.augmentation = augmentation or None
        self.seed = seed
        self.epoch = epoch
        rows = torch.arange(len(images), device=images.device)
        self.rows = TensorBatches(rows, batch_size, seed, epoch, drop_last, rank, world_size, whole)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        draws = None
        if self.augmentation is not None:
            n, _, height, width = self.images.shape
            draws = self.augmentation.draws(n, height, width, self.seed or 0, self.epoch())
            draws = draws.to(self.device)
        for rows in self.rows:
            batch = self._to_device(self.images[rows])
            if draws is not None:
                batch = Augmentation.apply(batch, draws.of(rows.to(self.device)))
            yield batch

    def _to_device(self, batch: Tensor) -> Tensor:
        if batch.device == self.device:
            return batch
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # so that the copy runs beside what the device does
        return batch.to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many of its batches were given out."""
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass behind these batches, if it is still that epoch."""
        self.rows.load_state_dict(state)


class ImageData(TensorDataModule):
    """Images as integers 0 ... K - 1: uint8 (N, C, H, W) in three splits.

    A subclass reads whole splits in :meth:`load`. Where the source has no validation split of its
    own, the last ``valid_size`` rows of its training images, in the published order, are it.
    A split that is cut short keeps rows evenly spaced over it.

    Args:
        name: of the data, in records and run folders.
        event_shape: (C, H, W) that the images must have.
        root: the folder that datasets are in; None: the environment's ``SURFLOW_DATA``, else
            ``data``.
        num_levels: K, at most 256.
        train_size, valid_size, test_size: images to keep of each split; None: all.
        batch_size, eval_batch_size, seed: see :class:`TensorDataModule`.
        flip, pad, translate: augmentation of the training images, see
            :class:`~surflow.data.augment.Augmentation`.
        on_device: keep the images on the training device: True, False, or "auto", where they take
            at most a third of its free memory.

    Raises:
        ValueError: for sizes, levels or an augmentation out of range; from :meth:`setup` for
            images of another shape or more levels, or splits larger than what there is.
        UserError: from :meth:`setup` for files that are missing or damaged.
    """

    unit = "bpd"
    version = ""

    def __init__(
        self,
        name: str,
        event_shape: Sequence[int],
        root: str | None = None,
        num_levels: int = 256,
        train_size: int | None = None,
        valid_size: int | None = None,
        test_size: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        seed: int = 0,
        flip: bool = False,
        pad: int = 0,
        translate: float = 0.0,
        on_device: bool | str = "auto",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        shape = tuple(event_shape)
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"data.event_shape: expected [C, H, W], got {list(shape)}")
        if not isinstance(num_levels, int) or not 2 <= num_levels <= 256:
            raise ValueError(f"data.num_levels: expected 2 to 256, got {num_levels}")
        sizes = {"train": train_size, "valid": valid_size, "test": test_size}
        for split, size in sizes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            if size is not None and (not whole or size < 1):
                raise ValueError(
                    f"data.{split}_size: expected a positive whole number or null, got {size}"
                )
        if on_device not in (True, False, "auto"):
            raise ValueError(f"data.on_device: expected auto, true or false, got {on_device!r}")
        self.name = name
        self.event_shape = shape
        self.root = data_root(root)
        self.num_levels = num_levels
        self.sizes = sizes
        self.augmentation = Augmentation(flip, pad, translate)
        self.augmentation.check(shape[1], shape[2])
        self.on_device = on_device

    # What a model and a table must know --------------------------------------------------------

    @property
    def num_dims(self) -> int:
        """D = C H W: nats / (D log 2) are bits per dimension."""
        return math.prod(self.event_shape)

    @property
    def box(self) -> tuple[list[float], list[float]]:
        """Edges that hold every image, flattened."""
        return [0.0] * self.num_dims, [self.num_levels - 1.0] * self.num_dims

    def fingerprint(self, split: str) -> str:
        """SHA-256 of a split's pixels and shape, 64 hex digits."""
        images = self.splits[split]
        digest = hashlib.sha256(repr(tuple(images.shape)).encode())
        for rows in images.split(4096):
            digest.update(rows.cpu().contiguous().numpy())
        return digest.hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What to write beside a score: the version, and rows and fingerprint of every split."""
        splits = {
            s: {"rows": len(x), "sha256": self.fingerprint(s)} for s, x in self.splits.items()
        }
        return {"name": self.name, "version": self.version, "splits": splits}

    # Splits ------------------------------------------------------------------------------------

    def load(self) -> dict[str, Tensor]:
        """Whole splits as published: uint8 (N, C, H, W) for train, test, and maybe valid."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        whole = self.load()
        for split, images in whole.items():
            self._check_images(split, images)
        if "valid" not in whole:
            whole["train"], whole["valid"] = self._hold_out(whole["train"], "valid")
        splits = {s: self._cut(s, whole[s]) for s in SPLITS}
        if self.batch_size > len(splits["train"]):
            raise ValueError(
                f"data.batch_size: expected at most the {len(splits['train'])} training images "
                f"of {self.name}, got {self.batch_size}"
            )
        self.splits = splits

    def _check_images(self, split: str, images: Tensor) -> None:
        expected = ", ".join(map(str, self.event_shape))
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.event_shape:
            raise ValueError(
                f"data.event_shape: {split} images of {self.name}: expected uint8 (N, {expected}), "
                f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            )
        if len(images) == 0:
            raise ValueError(f"data: {self.name} has no {split} images")
        if self.num_levels < 256 and int(images.max()) >= self.num_levels:
            raise ValueError(
                f"data.num_levels: {split} images of {self.name}: expected levels 0 to "
                f"{self.num_levels - 1}, got {int(images.max())}"
            )

    def _hold_out(self, images: Tensor, split: str) -> tuple[Tensor, Tensor]:
        """The rows before the last ``size`` ones, and those; views, no copies."""
        size = self.sizes[split]
        if size is None:
            raise ValueError(
                f"data.{split}_size: {self.name} has no {split} split of its own; expected how "
                "many of the last training images to hold out, got null"
            )
        if size >= len(images):
            raise ValueError(
                f"data.{split}_size: expected fewer than the {len(images)} training images of "
                f"{self.name}, got {size}"
            )
        return images[: len(images) - size], images[len(images) - size :]

    def _cut(self, split: str, images: Tensor) -> Tensor:
        return spaced_rows(images, self.sizes[split], f"{split} images of {self.name}", split)

    # Batches -----------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

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

    def resident(self, split: str) -> Tensor:
        """A split where its batches are gathered: on the trainer's device if it fits there."""
        if split not in self._resident:
            device = self._device()
            images = self.splits[split]
            self._resident[split] = images.to(device) if self.fits(device) else images
        return self._resident[split]

    def batches(self, split: str, batch_size: int, **keys: Any) -> ImageBatches:
        augmentation = self.augmentation if split == "train" else None
        return ImageBatches(
            self.resident(split),
            batch_size,
            augmentation=augmentation,
            device=self._device(),
            **keys,
        )


# Published data


class CIFAR10(ImageData):
    """CIFAR-10: 50,000 and 10,000 colour images of 32x32, every file checked by its MD5.

    Read from the unpacked ``cifar-10-batches-py`` or from ``cifar-10-python.tar.gz`` in the root
    (or its folder ``cifar10``); downloaded where there is neither. The release is pickles; they
    are read without unpickling, see :func:`~surflow.data.sources.read_cifar_batch`.

    Args:
        download: download what is missing.
        others: see :class:`ImageData`.

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """

    version = "cifar-10-python"
    folder: ClassVar[str] = "cifar-10-batches-py"
    rows: ClassVar[int] = 10_000  # a batch

    def __init__(self, download: bool = True, **others: Any) -> None:
        super().__init__(**others)
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
            parts = [read_cifar_batch(contents[b.filename], b.filename) for b in batches]
            for part, batch in zip(parts, batches, strict=True):
                if len(part) != self.rows:
                    raise UserError(
                        f"data.root: {batch.filename}: expected {self.rows} images, got {len(part)}"
                    )
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
        wanted = {f"{self.folder}/{b.filename}": b for b in batches}
        found = {}
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if member.name in wanted and member.isfile():
                    found[wanted[member.name].filename] = tar.extractfile(member).read()
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

    def __init__(self, download: bool = True, **others: Any) -> None:
        super().__init__(**others)
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
    of images tells them apart and is checked. Reading them takes minutes, once: they are kept in
    one memory-mapped file.

    Args:
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

    def __init__(self, release: str = "png", complete: bool = True, **others: Any) -> None:
        super().__init__(**others)
        if release not in self.counts:
            raise ValueError(f"data.release: expected png or npz, got {release!r}")
        self.release = release
        self.complete = complete
        side = self.event_shape[1]
        if self.event_shape not in ((3, 32, 32), (3, 64, 64)):
            raise ValueError(
                "data.event_shape: downsampled ImageNet has [3, 32, 32] or [3, 64, 64], got "
                f"{list(self.event_shape)}"
            )
        self.side = side
        self.version = self.origin[release]

    def load(self) -> dict[str, Tensor]:
        if self.root.is_dir() is False:
            raise UserError(f"data.root: no folder {self.root}; {self._expected()}")
        for folder in (self.root / f"imagenet{self.side}", self.root):
            files = self._files(folder, self.release)
            if all(files.values()):
                return self._read(folder, files)
        found = ""
        for folder in (self.root / f"imagenet{self.side}", self.root):
            for other in self.counts:
                if other != self.release and all(self._files(folder, other).values()):
                    found = (
                        f"; there is the {self.origin[other]} version: data.release={other} takes "
                        "it, and its bits/dim compare only with others on that version"
                    )
            if not found and self._pickles(folder):
                found = (
                    "; there are pickles, which are not read because they can run anything: "
                    "take the npz files of the same release, and data.release=npz"
                )
        raise UserError(
            f"data.root: no {self.release} release of ImageNet {self.side} in {self.root}; "
            f"{self._expected()}{found}"
        )

    def _expected(self) -> str:
        s = self.side
        if self.release == "png":
            names = f"train_{s}x{s}/ and valid_{s}x{s}/ with PNG files"
        else:
            names = "train_data_batch_1.npz to _10.npz and val_data.npz"
        return f"expected imagenet{s}/ in it with {names}"

    def _files(self, folder: Path, release: str) -> dict[str, list[Path]]:
        s = self.side
        if release == "png":
            names = {"train": f"train_{s}x{s}", "test": f"valid_{s}x{s}"}
            return {
                k: image_files(folder / n) if (folder / n).is_dir() else []
                for k, n in names.items()
            }

        def number(path: Path) -> int:
            return int(path.stem.rsplit("_", 1)[1])

        # each zip unpacks into a folder of its own, for 64x64 in two parts
        train = [*folder.glob("train_data_batch_*.npz"), *folder.glob("*/train_data_batch_*.npz")]
        train = [p for p in train if p.stem.rsplit("_", 1)[1].isdigit()]
        test = [*folder.glob("val_data.npz"), *folder.glob("*/val_data.npz")]
        return {"train": sorted(train, key=number), "test": test[:1]}

    def _pickles(self, folder: Path) -> bool:
        return any((*folder.glob("train_data_batch_1"), *folder.glob("*/train_data_batch_1")))

    def _read(self, folder: Path, files: dict[str, list[Path]]) -> dict[str, Tensor]:
        counts = {split: [self._count(p) for p in paths] for split, paths in files.items()}
        totals = tuple(sum(counts[split]) for split in ("train", "test"))
        if totals != self.counts[self.release]:
            self._incomplete(folder, totals)
        label = f"imagenet{self.side}-{self.release}"
        return {
            split: pack(
                paths, folder, f"{label}-{split}", self.event_shape, counts[split], self._images
            )
            for split, paths in files.items()
        }

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


# Any images


class ImageArrays(ImageData):
    """Arrays of images in files: ``train``, ``test`` and maybe ``valid`` in one folder.

    Each is an .npz or .safetensors file with a uint8 array ``images`` (N, C, H, W), or an .npy
    file that is one.

    Args:
        folder: in the root, or an absolute path.
        others: see :class:`ImageData`.
    """

    def __init__(self, folder: str, **others: Any) -> None:
        super().__init__(**others)
        self.folder = self.root / Path(folder).expanduser()

    def load(self) -> dict[str, Tensor]:
        splits = {}
        for split in SPLITS:
            paths = [self.folder / f"{split}{s}" for s in (".npz", ".npy", ".safetensors")]
            path = next((p for p in paths if p.is_file()), None)
            if path is not None:
                splits[split] = torch.from_numpy(read_array(path))
            elif split != "valid":
                raise UserError(
                    f"data.folder: expected {split}.npz, .npy or .safetensors in {self.folder}, "
                    f"got {'none of them' if self.folder.is_dir() else 'no such folder'}"
                )
        return splits


class ImageFolder(ImageData):
    """Image files of a folder and its subfolders, as training data.

    With subfolders ``train`` and ``test`` (and maybe ``valid``) those are the splits. Without,
    the last ``test_size`` files are test and the ``valid_size`` before them validation, in the
    order of :func:`~surflow.data.sources.image_files`, which follows from the files' names.
    The decoded images are kept in one memory-mapped file.

    Args:
        folder: in the root, or an absolute path.
        resize: cut out the centre and scale images of another size; False: refuse them.
        others: see :class:`ImageData`; one channel makes images grey, three RGB.
    """

    def __init__(self, folder: str, resize: bool = False, **others: Any) -> None:
        super().__init__(**others)
        if self.event_shape[0] not in (1, 3):
            raise ValueError(
                f"data.event_shape: expected 1 or 3 channels, got {self.event_shape[0]}"
            )
        self.folder = self.root / Path(folder).expanduser()
        self.resize = resize

    def load(self) -> dict[str, Tensor]:
        if not self.folder.is_dir():
            raise UserError(f"data.folder: no folder {self.folder}; expected one of image files")
        if all((self.folder / split).is_dir() for split in ("train", "test")):
            names = [s for s in SPLITS if (self.folder / s).is_dir()]
            return {split: self._read(self.folder / split, split) for split in names}
        train, test = self._hold_out(self._read(self.folder, "all"), "test")
        return {"train": train, "test": test}

    def _read(self, folder: Path, label: str) -> Tensor:
        files = image_files(folder)
        if not files:
            raise UserError(f"data.folder: no image files in {folder}")

        def read(path: Path) -> np.ndarray:
            return read_image(path, self.event_shape, self.resize)[None]

        counts = [1] * len(files)
        return pack(
            files, self.folder, label, self.event_shape, counts, read, f"resize={self.resize}"
        )


# Embedded data


class PhotoPatches(ImageData):
    """32x32 patches of scikit-learn's two sample photographs: small, embedded, for smoke runs.

    Each photograph (427x640) is cut into three regions, side by side: columns 0-383 are train,
    384-511 validation, 512-639 test. Training patches overlap; those of the other two do not, so
    that a standard error over them means something. The photographs were JPEG files, and two of
    them say nothing about images at large: a check that things run and learn.

    Args:
        stride: pixels between training patches.
        others: see :class:`ImageData`.
    """

    version = "scikit-learn sample photographs"
    regions: ClassVar[dict[str, tuple[int, int]]] = {
        "train": (0, 384),
        "valid": (384, 512),
        "test": (512, 640),
    }

    def __init__(self, stride: int = 8, **others: Any) -> None:
        super().__init__(**others)
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
            raise ValueError(f"data.stride: expected a positive whole number, got {stride}")
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
        others: see :class:`ImageData`.

    Source: Alpaydin & Kaynak 1998, optical recognition of handwritten digits, UCI.
    """

    version = "scikit-learn digits"
    ends: ClassVar[tuple[int, int]] = (1297, 1497)

    def load(self) -> dict[str, Tensor]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise _needs_sklearn("digits") from None
        images = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)
        train, valid, test = images.tensor_split(self.ends)
        return {"train": train, "valid": valid, "test": test}


def _needs_sklearn(name: str) -> UserError:
    return UserError(f"data={name}: it comes with scikit-learn: pip install scikit-learn")
