"""Reading published image formats as uint8 arrays (N, C, H, W); nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surflow.errors import UserError
from surflow.files import locked, replacing

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_BLOCK = 1024  # image files decoded at a time


# CIFAR batches: pickles of a dict, read with stand-ins for everything they may build


class _Inert:
    """Stands for an array or its type in a pickle: keeps the state, runs nothing."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _InertUnpickler(pickle.Unpickler):
    """Knows the names in a pickled NumPy array, each as a stand-in, and refuses all others."""

    _arrays = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._arrays:
            return _Inert
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_cifar_batch(content: bytes, where: str) -> np.ndarray:
    """The images of a batch of the CIFAR-10 release: uint8 (N, 3, 32, 32).

    The release is pickles. They are read without running anything that they name: an array's
    bytes are taken from its state.

    Raises:
        UserError: where the content is anything but such a batch.
    """
    try:
        entry = _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
        data = entry.get(b"data", entry.get("data"))
        return np.frombuffer(data.state[-1], np.uint8).reshape(-1, 3, 32, 32)
    except Exception as error:
        raise UserError(f"data.root: {where} is no batch of CIFAR-10 ({error})") from None


# Arrays


def read_array(path: Path, key: str = "images") -> np.ndarray:
    """An array from an .npz or .safetensors file (by key) or an .npy file; never a pickle.

    Raises:
        UserError: for a damaged file, one that holds Python objects, or one without the key.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), "numpy") as file:
                _check_key(path, key, list(file.keys()))
                return file.get_tensor(key)
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="c", allow_pickle=False)
        with np.load(path, allow_pickle=False) as file:
            _check_key(path, key, file.files)
            return file[key]
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"data.root: {path} is damaged or holds no plain array ({error})") from None


def npz_shape(path: Path, key: str) -> tuple[int, ...]:
    """The shape of an array in an .npz file, from its header alone.

    Raises:
        UserError: for a damaged file, or one without the key.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [n.removesuffix(".npy") for n in file.namelist()]
            _check_key(path, key, names)
            with file.open(f"{key}.npy") as member:
                first = np.lib.format.read_magic(member) == (1, 0)
                kinds = np.lib.format
                read = kinds.read_array_header_1_0 if first else kinds.read_array_header_2_0
                return read(member)[0]
    except (zipfile.BadZipFile, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"data.root: {path} is damaged ({error})") from None


def _check_key(path: Path, key: str, known: Sequence[str]) -> None:
    if key not in known:
        raise UserError(f"data.root: {path}: expected an array {key!r}, got {', '.join(known)}")


# Image files


def image_files(folder: Path) -> list[Path]:
    """The image files under a folder, in an order that is the same everywhere.

    The order is that of the SHA-256 of their path in the folder: any stretch is a random sample.
    """
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())

    def key(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()

    return sorted(found, key=key)


def read_image(path: Path, shape: tuple[int, int, int], resize: bool) -> np.ndarray:
    """An image file as uint8 (C, H, W): grey for one channel, RGB for three.

    Args:
        path: the file.
        shape: (C, H, W) that it must have.
        resize: cut the centre out and scale it, where the size differs.

    Raises:
        UserError: for a file that is damaged, of another size, or of more than 8 bits.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise UserError(f"data.root: {path}: expected 8 bits a channel, got {image.mode}")
            image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"data.root: {path} is damaged or no image ({error})") from None
    if image.size != (width, height):
        if not resize:
            raise UserError(
                f"data.root: {path}: expected {height}x{width} pixels, got "
                f"{image.size[1]}x{image.size[0]}; data.resize=true scales every image"
            )
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.uint8).reshape(height, width, channels)
    return pixels.transpose(2, 0, 1)


# One memory-mapped file for what takes long to read


def pack(
    files: Sequence[Path],
    root: Path,
    label: str,
    shape: tuple[int, int, int],
    counts: Sequence[int],
    read: Callable[[Path], np.ndarray],
    options: str = "",
) -> Tensor:
    """The images of many files as one memory-mapped tensor, read once and kept in a cache.

    The cache is ``.surflow`` in ``root``, or ``surflow`` in the user's cache folder where that
    cannot be written to. It is rebuilt when a file changes.

    Args:
        files: in order.
        root: the folder that they are in.
        label: what the cache file's name starts with.
        shape: (C, H, W).
        counts: images in each file.
        read: a file's images, (n, C, H, W).
        options: whatever else the result depends on.

    Returns:
        uint8 (N, C, H, W), mapped from disk copy-on-write.
    """
    digest = hashlib.sha256(f"1 {shape} {options}".encode())
    for file in files:
        stat = file.stat()
        name = os.path.relpath(file, root)
        digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    path = _cache_folder(root) / f"{label}-{digest.hexdigest()[:16]}.npy"
    total = sum(counts)
    with locked(path.with_suffix(".lock")):
        kept = _mapped(path, (total, *shape))
        if kept is not None:
            return kept
        print(f"reading {total} images into {path}, once", file=sys.stderr)
        with replacing(path) as part:
            array = np.lib.format.open_memmap(part, "w+", np.uint8, (total, *shape))
            start = 0
            for images in _read_in_order(files, read):
                array[start : start + len(images)] = images
                start += len(images)
            array.flush()
            del array
        kept = _mapped(path, (total, *shape))
        if kept is None:
            raise UserError(f"data.root: the cache {path} cannot be read back; delete it")
        return kept


def _read_in_order(
    files: Sequence[Path], read: Callable[[Path], np.ndarray]
) -> Iterable[np.ndarray]:
    """Each file's images in order; many small files by several threads."""
    if len(files) < 64:
        yield from map(read, files)
        return
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), _BLOCK):
            yield np.concatenate(list(pool.map(read, files[start : start + _BLOCK])))


def _cache_folder(root: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (root / ".surflow", home / "surflow"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UserError(f"data.root: can write neither to {root} nor to the user's cache folder")


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor in an .npy file, mapped; None where there is no whole one."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return torch.from_numpy(array) if array.shape == shape and array.dtype == np.uint8 else None
