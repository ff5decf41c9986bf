"""Prepare a dataset: find or download its files, check them, make what is kept of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surflow.cli.common import build_data, guarded, relative
from surflow.config import compose
from surflow.errors import UserError

SHOWN = 64  # sets of points in a picture


def prepare(name: str, overrides: Sequence[str] = (), picture: str | None = None) -> Any:
    """Set a dataset up as a run would, and say what it is.

    Args:
        name: an option of the config group ``data``.
        overrides: keys of it, such as ``data.root=folder``.
        picture: a PNG of some sets, for data that are sets of points; None: beside their cache, if
            they have one.

    Returns:
        the DataModule, set up.

    Raises:
        UserError: for an unknown name or key, files that are missing or damaged, or a picture of
            data of another kind.
    """
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    if "=" in name:
        raise UserError(f"expected the name of a dataset first, got {name!r}")
    cfg = compose([f"data={name}", *overrides])
    data = build_data(cfg)
    for split, rows in data.splits.items():
        event = " x ".join(map(str, rows.shape[1:]))
        print(f"{name} {split}: {len(rows):,} rows of {event}, {rows.dtype}"[:200])
    if hasattr(data, "provenance"):
        for split, told in data.provenance().get("splits", {}).items():
            print(f"{split} sha256 {told['sha256']}")
    if hasattr(data, "file"):
        print(f"kept in {relative(data.file)}")
    if not hasattr(data, "num_points"):
        if picture is not None:
            raise UserError(f"picture: expected sets of points, got data={name}")
        return data
    path = Path(picture) if picture else None
    if path is None and hasattr(data, "cache"):
        path = data.cache / f"{name}.png"
    if path is not None:
        print(relative(draw(data, path)))
    return data


def draw(data: Any, path: Path) -> Path:
    """The first sets of the training split as clouds of points."""
    from surflow.reporting.figures.sets import clouds_figure

    shown = data.splits["train"][:SHOWN].numpy()
    title = f"{data.name}, sets of {data.num_points} points"
    return clouds_figure({title: shown}, data.width, path)


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="surflow-data",
        description="Prepare a dataset: find or download its files, check them, keep what is made "
        "of them. Such as: surflow-data spatial_mnist data.root=folder",
    )
    parser.add_argument("name", help="an option of conf/data")
    parser.add_argument("overrides", nargs="*", help="keys of it, such as data.root=folder")
    parser.add_argument("--picture", help="a PNG file with some sets of points")
    given = parser.parse_args()
    prepare(given.name, given.overrides, given.picture)


main = guarded(_main)

if __name__ == "__main__":
    main()
