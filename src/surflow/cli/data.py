"""Prepare a dataset: find or download its files, check them, make what is kept of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from surflow.cli.command import guarded
from surflow.config import build, check_options, compose, resolved
from surflow.errors import UserError
from surflow.files import relative

SHOWN = 64  # sets of points in a picture


def prepare(name: str, overrides: Sequence[str] = (), picture: str | None = None) -> None:
    """Set a dataset up as a run does, and print what it is.

    Args:
        name: an option of the config group ``data``.
        overrides: keys of it, such as ``data.root=folder``.
        picture: a PNG of some sets of points; None: one in their cache, if they have one.
    """
    if "=" in name:
        raise UserError(f"expected the name of a dataset first, got {name!r}")
    config = resolved(compose([f"data={name}", *overrides]))
    check_options(config, {})
    data = build(config["data"])
    data.setup()
    for split, rows in data.splits.items():
        event = " x ".join(map(str, rows.shape[1:]))
        print(f"{name} {split}: {len(rows):,} rows of {event}, {rows.dtype}"[:200])
    for split, told in data.provenance()["splits"].items():
        print(f"{split} sha256 {told['sha256']}")
    if data.file is not None:
        print(f"kept in {relative(data.file)}")
    if picture is not None and data.kind != "set":
        raise UserError(f"picture: expected sets of points, got data={name}")
    path = Path(picture) if picture else data.file and data.file.with_name(f"{name}.png")
    if data.kind == "set" and path is not None:
        from surflow.reporting.figures.sets import clouds_figure

        title = f"{data.name}, sets of {data.num_points} points"
        shown = data.splits["train"][:SHOWN].numpy()
        print(relative(clouds_figure({title: shown}, data.width, path)))


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="surflow-data",
        description=f"{__doc__} Such as: surflow-data spatial_mnist data.root=folder",
    )
    parser.add_argument("name", help="an option of conf/data, such as spatial_mnist")
    parser.add_argument("overrides", nargs="*", help="keys of it, such as data.root=folder")
    parser.add_argument("--picture", help="a PNG file with some sets of points")
    given = parser.parse_args()
    prepare(given.name, given.overrides, given.picture)


main = guarded(_main)

if __name__ == "__main__":
    main()
