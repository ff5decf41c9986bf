"""Scores of samples as a config asks for them, with progress that a person can follow."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surflow.errors import UserError
from surflow.flow import Flow
from surflow.metrics.generation import (
    GenerationProtocol,
    Progress,
    Score,
    Stopwatch,
    generation_scores,
)
from surflow.metrics.inception import load_inception_weights

LINE_EVERY_S = 30.0
"""Seconds between lines of progress where there is no terminal."""


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Progress on stderr: bars on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        said = {"": time.monotonic()}

        def line(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            if now - said.setdefault(what, now) >= LINE_EVERY_S:
                said[what] = now
                print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield bar


def check_inception_weights(cfg: Any) -> None:
    """Read the named weights file of a config, so that a mistake shows before anything trains.

    Raises:
        UserError: for a file that is missing or damaged.
    """
    m = cfg.metrics
    if m.n and m.extractor == "inception" and m.inception_weights is not None:
        load_inception_weights(m.inception_weights)


def score_generation(
    cfg: Any, flow: Flow, data: Any, folder: Path, progress: Progress | None = None
) -> tuple[dict[str, Score], dict[str, str]]:
    """Score samples of a run's flow as ``cfg.metrics`` says.

    What is drawn is kept in ``generation.npz`` of the run's folder until it is scored, and the
    statistics of the reference images in ``.reference`` of the run root, for all runs there.

    Args:
        cfg: of the run: ``metrics``, ``seed``, ``run.root``.
        flow: the trained model, on the device to compute on.
        data: the DataModule of images, set up.
        folder: the run's.
        progress: see :func:`~surflow.metrics.generation.generation_scores`; None: shown on stderr.

    Returns:
        scores by name, and why those that are missing are, one line each.

    Raises:
        UserError: for data that are no images, or a weights file that is missing or damaged.
    """
    m = cfg.metrics
    if len(data.event_shape) != 3:
        raise UserError(f"metrics.n: scores of samples are for images, not data={data.name}")
    splits = (m.reference,) if isinstance(m.reference, str) else tuple(m.reference)
    for split in splits:
        if split not in data.splits:
            raise UserError(
                f"metrics.reference: expected some of {', '.join(data.splits)}, got {split!r}"
            )
    protocol = GenerationProtocol(
        n=m.n,
        extractor=m.extractor,
        reference=splits,
        temperature=float(m.temperature),
        seed=cfg.seed,
        batch_size=m.batch_size,
    )
    watch = Stopwatch()
    showing = shown_progress() if progress is None else contextlib.nullcontext(progress)
    with showing as told:
        found = generation_scores(
            flow,
            [data.splits[split] for split in splits],
            protocol,
            inception_weights=m.inception_weights,
            num_levels=data.num_levels,
            progress=told,
            resume=folder / "generation.npz",
            cache=Path(cfg.run.root) / ".reference",
            stopwatch=watch,
        )
    if watch.seconds:
        print(f"{m.n:,} samples scored: {watch}", file=sys.stderr)
    return found
