"""Files that are published with a checksum: found, checked, downloaded where they are missing."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from surflow.errors import UserError
from surflow.files import locked, replacing

_TIMEOUT = 60


@dataclass(frozen=True)
class Published:
    """A file as its publisher describes it.

    Attributes:
        filename: its name.
        md5: its checksum, 32 hex digits.
        url: where it is; empty where it comes in an archive.
    """

    filename: str
    md5: str
    url: str = ""


def md5_of(path: Path) -> str:
    """The MD5 of a file, 32 hex digits: tells a damaged download from a whole one."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_file(path: Path, published: Published) -> Path:
    """The path, if the file there is what was published.

    Raises:
        UserError: for a file that is missing or damaged: which, what checksum, where to put it.
    """
    origin = f" from {published.url}" if published.url else ""
    if not path.is_file():
        raise UserError(
            f"data.root: no file {path}; put {published.filename} (md5 {published.md5}) "
            f"there{origin}"
        )
    got = md5_of(path)
    if got != published.md5:
        raise UserError(
            f"data.root: {path} is damaged: expected md5 {published.md5}, got {got}; delete it and "
            f"put {published.filename}{origin} there again"
        )
    return path


def fetch(published: Published, folder: Path) -> Path:
    """Download a file into a folder; it appears there only when it is whole.

    Raises:
        UserError: without a network, for a damaged download or a folder that cannot be written to.
    """
    path = folder / published.filename
    by_hand = f"put {published.filename} (md5 {published.md5}) into {folder}, or set data.root"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{published.filename}.lock"):
            if path.is_file():  # another process was first
                return check_file(path, published)
            print(f"downloading {published.url} to {path}", file=sys.stderr)
            with replacing(path) as part:
                with (
                    urllib.request.urlopen(published.url, timeout=_TIMEOUT) as source,
                    open(part, "wb") as target,
                ):
                    shutil.copyfileobj(source, target)
                got = md5_of(part)
                if got != published.md5:
                    raise UserError(
                        f"data.download: {published.url} came damaged: expected md5 "
                        f"{published.md5}, got {got}; try again, or {by_hand}"
                    )
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        why = getattr(error, "reason", error)
        raise UserError(
            f"data.download: cannot download {published.url} ({why}); {by_hand}"
        ) from None
    except PermissionError as error:
        raise UserError(
            f"data.root: cannot write to {folder} ({error.strerror}); set data.root=<folder>"
        ) from None
    return path


def data_root(root: str | os.PathLike | None) -> Path:
    """``root``, else the environment's ``SURFLOW_DATA``, else ``data`` in the working folder."""
    return Path(root or os.environ.get("SURFLOW_DATA") or "data").expanduser()
