"""A sweep goes on where one of its jobs fails; its end says which failed, why, and how to repeat
them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from surflow.errors import Stop
from surflow.files import write_json

FOLDER = "SURFLOW_SWEEP"
"""Names the folder of the outcomes to the jobs, which may be processes of their own."""

INTERRUPTED = 130
"""The exit code after ctrl-c."""


def sweeping() -> bool:
    """Whether this is a job of a sweep on this machine."""
    folder = os.environ.get(FOLDER)
    return (
        folder is not None and Path(folder).is_dir() and HydraConfig.get().mode == RunMode.MULTIRUN
    )


def job(call: Callable[[], Any]) -> Any:
    """Do one job; a failure is kept for :func:`outcomes`, not raised.

    Ctrl-c ends the whole sweep.
    """
    reason = None
    try:
        return call()
    except Stop as stop:
        if stop.code == INTERRUPTED:
            raise
        reason = stop.message
    except Exception as error:  # a fault of ours: seen whole, and the other jobs run
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    finally:
        hydra = HydraConfig.get()
        number, given = int(hydra.job.num), list(hydra.overrides.task)
        told = {"overrides": given, "reason": reason}
        write_json(Path(os.environ[FOLDER]) / f"{number:06d}.json", told)
        if reason is not None:
            print(f"surflow: job {number} failed: {' '.join(given)}", file=sys.stderr, flush=True)
    return None


@contextlib.contextmanager
def outcomes(command: str) -> Iterator[None]:
    """Around a command: where it is a sweep, list the jobs that failed at its end.

    Args:
        command: its name, to repeat them.

    Raises:
        SystemExit: with 1 where a job failed.
    """
    if not {"-m", "--multirun"} & set(sys.argv[1:]):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="surflow-sweep-") as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]
            told = [json.loads(p.read_text("utf-8")) for p in sorted(Path(folder).glob("*.json"))]
            lines = failures(command, told)
            print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
        if lines:
            raise SystemExit(1)


def failures(command: str, told: Sequence[Mapping[str, Any]]) -> list[str]:
    """The jobs that failed, by the keys that vary in the sweep, why, and how to repeat each.

    >>> told = [
    ...     {"overrides": ["seed=0", "optimizer.lr=1.0"], "reason": None},
    ...     {"overrides": ["seed=0", "optimizer.lr=1e30"], "reason": "the loss is not finite"},
    ... ]
    >>> print(*failures("train", told), sep="\\n")
    surflow: error: 1 of 2 jobs failed:
      optimizer.lr=1e30: the loss is not finite
        python -m surflow.cli.train seed=0 optimizer.lr=1e30
    """
    failed = [one for one in told if one["reason"] is not None]
    lines = [f"surflow: error: {len(failed)} of {len(told)} jobs failed:"] if failed else []
    for one in failed:
        own = [o for o in one["overrides"] if any(o not in other["overrides"] for other in told)]
        lines.append(f"  {' '.join(own or one['overrides'])}: {one['reason']}")
        lines.append(f"    python -m surflow.cli.{command} {shlex.join(one['overrides'])}")
    return lines
