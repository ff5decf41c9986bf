"""Prove transforms: the property suite on the catalogue, or on layers of one's own.

    python -m surflow.cli.verify
    python -m surflow.cli.verify 'layers=[AbsInference,my_package.my_module.MyLayer]'
    python -m surflow.cli.verify layers=./my_layer.py:MyLayer

Exit code 0 where every layer holds, 1 where one fails, 2 for a request that is not valid.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from surflow.cli.command import command
from surflow.errors import UserError, check_choice
from surflow.files import relative
from surflow.progress import shown_progress
from surflow.proofs.lookup import find_layers
from surflow.proofs.rows import COLUMNS, MEANING, Row, aligned, content, sentences, summary, write
from surflow.proofs.suite import prove_layers
from surflow.transforms import catalogue


def verify(cfg: DictConfig) -> bool:
    """Prove what was asked for, print the table, write it if asked; whether every layer holds."""
    from surflow.training.origin import cores, origin, origin_line

    specs = list({name: None for spec in _requested(cfg) for name in find_layers(spec)})
    setting = {"n": cfg.n, "seed": cfg.seed, "backend": cfg.backend}
    workers = min(cores() if cfg.workers == "auto" else cfg.workers, len(specs))
    code = {} if cfg.output is None else origin()  # of the code that runs
    start = time.perf_counter()
    found: dict[str, Row] = {}
    with shown_progress("layers") as progress:
        for row in prove_layers(specs, **setting, workers=workers):
            found[row.spec] = row
            progress("proving", len(found), len(specs))
    rows = [found[spec] for spec in specs]
    seconds = time.perf_counter() - start
    _print(rows, seconds)
    if cfg.output is not None:
        result = {"setting": setting, **content(rows, seconds), "workers": workers, **code}
        written = write(Path(cfg.output), rows, result, origin_line(result, "make verify"))
        print(", ".join(map(relative, written)))
    return all(row.ok for row in rows)


def _requested(cfg: DictConfig) -> Sequence[str]:
    """The layers that the options name; all options are checked."""
    layers = [cfg.layers] if isinstance(cfg.layers, str) else cfg.layers
    listed = isinstance(layers, list | ListConfig) and len(layers) > 0
    if layers is not None and not (listed and all(s and isinstance(s, str) for s in layers)):
        raise UserError(
            "layers: expected names, such as 'layers=[AbsInference,./my_layer.py:MyLayer]', or "
            f"null for the catalogue, got {layers}"
        )
    for key, low, high, expected in (
        ("n", 1000, float("inf"), "a whole number, 1000 or more"),
        ("seed", 0, 2**31 - 1, "a whole number from 0 to 2^31 - 1"),
        ("workers", 1, float("inf"), "a positive whole number or auto"),
    ):
        value = cfg[key]
        whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        if not whole and (key, value) != ("workers", "auto"):
            raise UserError(f"{key}: expected {expected}, got {value}")
    check_choice("backend", cfg.backend, ("aot_eager", "inductor"), UserError)
    if cfg.backend == "inductor":
        from surflow.training.hardware import can_compile

        if not can_compile():
            raise UserError("backend=inductor: no C++ compiler found; use backend=aot_eager")
    return [cls.__name__ for cls in catalogue()] if layers is None else layers


def _print(rows: Sequence[Row], seconds: float) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Column, Table

        table = Table(*(Column(column, overflow="fold") for column in COLUMNS))
        for row in rows:
            *texts, verdict = map(escape, row.texts())
            table.add_row(*texts, f"[{'green' if row.ok else 'red'}]{verdict}[/]")
        Console().print(table)
    else:
        print(aligned(rows))
    said = sentences(rows)
    print(*(["", *said] if said else []), "", MEANING, summary(rows, seconds), sep="\n")


def _main(cfg: DictConfig) -> None:
    if not verify(cfg):
        raise SystemExit(1)


main = command("verify")(_main)

if __name__ == "__main__":
    main()
