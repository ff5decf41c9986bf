"""Progress on stderr: bars on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[str, int, int], None]
"""Told what is done, how many units of it, and of how many."""

LINE_EVERY_S = 30.0
"""Seconds between lines where there is no terminal."""


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def shown_progress(unit: str = "") -> Iterator[Progress]:
    """Show what the yielded function is told; ``unit`` names what is counted."""
    if sys.stderr.isatty():
        with _bars(unit) as progress:
            yield progress
    else:
        yield _Lines(unit)


@contextlib.contextmanager
def _bars(unit: str) -> Iterator[Progress]:
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
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


class _Lines:
    """A line every :data:`LINE_EVERY_S` seconds for each task, with the time that is left."""

    def __init__(self, unit: str) -> None:
        self.unit = f" {unit}" if unit else ""
        self.begun: dict[str, tuple[float, int]] = {}
        self.said: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        start, first = self.begun.setdefault(what, (now, done))
        if now - self.said.setdefault(what, now) < LINE_EVERY_S or done == first:
            return
        self.said[what] = now
        left = (total - done) * (now - start) / (done - first) / 60
        print(
            f"{what}: {done:,} of {total:,}{self.unit} ({100 * done / total:.0f} %), about "
            f"{left:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
