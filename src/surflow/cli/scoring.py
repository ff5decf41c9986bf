"""Scoring a split for the commands that do it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

LINE_EVERY_S = 60.0
"""Seconds between lines of progress where there is no terminal."""


def score_split(
    cfg: DictConfig,
    flow: Any,
    data: Any,
    split: str,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    tf32: bool = False,
) -> tuple[dict[str, Any], Any]:
    """Score one split as the config says, in float32 whatever precision trained the flow.

    What is done is kept in a file of ``folder``; a second call goes on where the first was cut
    off. Call :func:`forget` once the numbers are written.

    Args:
        cfg: of the run: ``seed`` and ``objective``; ``eval_samples`` and ``iwbo_samples`` beside
            them, where a command has these keys, come first.
        flow: the model, on the device to compute on.
        data: the DataModule, set up.
        split: train, valid or test.
        folder: the run's.
        progress: told how many draws are done, and of how many; None: a bar on a terminal, else a
            line a minute, both on stderr.
        tf32: see :func:`surflow.training.evaluation.evaluate`.

    Returns:
        estimates by name, of sets those a point too, and the ledger.
    """
    from surflow.training.evaluation import evaluate, per_point

    shown = _shown(f"evaluating {split}") if progress is None else contextlib.nullcontext(progress)
    with shown as tell:
        estimates, ledger = evaluate(
            flow,
            data.splits[split],
            data.eval_batch_size,
            seed=cfg.seed,
            eval_samples=_asked(cfg, "eval_samples"),
            iwbo_samples=_asked(cfg, "iwbo_samples"),
            unit=cfg.objective.unit,
            split=split,
            progress=tell,
            resume=unfinished(folder, split),
            tf32=tf32,
        )
    if data.kind == "set":
        estimates |= per_point(estimates, data.num_points)
    return estimates, ledger


def _asked(cfg: DictConfig, key: str) -> int:
    """The command's own number of draws, or else the run's."""
    own = OmegaConf.select(cfg, key)
    return cfg.objective[key] if own is None else own


def unfinished(folder: Path, split: str) -> Path:
    """The file that keeps a split's scores until they are written."""
    return folder / f"evaluation_{split}.partial.npz"


def forget(folder: Path, split: str) -> None:
    """Delete what :func:`score_split` kept, once its numbers are written."""
    unfinished(folder, split).unlink(missing_ok=True)


@contextlib.contextmanager
def _shown(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on stderr: a bar on a terminal, else a line a minute."""
    if not sys.stderr.isatty():
        yield _Lines(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("draws"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Progress for a log: a line a minute, and none of what is quicker."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = self.last = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if now - self.last < LINE_EVERY_S or done == self.first:
            return
        self.last = now
        left = (total - done) * (now - self.start) / (done - self.first) / 60
        share = 100 * done / total
        print(
            f"{self.title}: {done:,} of {total:,} draws ({share:.0f} %), about {left:.0f} min left",
            file=sys.stderr,
        )
