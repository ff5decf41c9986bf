"""Files that are whole or not there, locks between processes, checksums. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Yields a temporary path in the same folder. At the end of the block the file there is flushed
    to disk and renamed to ``path``; after an error it is removed. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write bytes by :func:`replacing`; returns the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 by :func:`replacing`, line ends untouched; returns the path."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, content: Any) -> Path:
    """Write indented JSON by :func:`replacing`; returns the path.

    Raises:
        ValueError: for NaN or infinity, before the file is touched.
        TypeError: for values that JSON has no form for, before the file is touched.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")


def write_npz(path: str | Path, compressed: bool = True, **arrays: Any) -> Path:
    """Write arrays by name as an .npz file by :func:`replacing`; returns the path."""
    import numpy as np

    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file between processes.

    Args:
        path: the lock file; its folder must exist.
        wait: wait until it is free.

    Raises:
        BlockingIOError: where another process holds it and ``wait`` is False.
    """
    try:
        with FileLock(str(path), timeout=-1 if wait else 0):
            yield
    except Timeout:
        raise BlockingIOError(f"{path} is held by another process") from None


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def relative(path: str | Path) -> str:
    """A path relative to the working folder where it lies below it, else as it is."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
