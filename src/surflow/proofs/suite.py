"""The suite over layers: one at a time, or over processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence

import torch

from surflow.errors import UserError
from surflow.proofs import example_of, prove
from surflow.proofs.lookup import find_layers, one_line
from surflow.proofs.rows import Row
from surflow.transforms import Example


def prove_layer(spec: str, n: int, seed: int, backend: str) -> Row:
    """Run the suite on one class; a class that cannot give an example fails with what it said."""
    start = time.perf_counter()
    (cls,) = find_layers(spec).values()
    row = Row(cls.__name__, spec)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler; what matters is in the proofs
        try:
            example = example_of(cls, seed)
            if not isinstance(example, Example):
                raise TypeError(f"expected an Example, got {type(example).__name__}")
        except Exception as error:
            row.failures["example"] = f"example() raised {type(error).__name__}: {one_line(error)}"
        else:
            row.kind, row.number = example.transform.kind, example.transform.number
            row.proofs = prove(example, n, seed, backend)
            row.failures = {p.check: one_line(p.message) for p in row.proofs if not p.ok}
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def prove_layers(
    specs: Sequence[str], n: int, seed: int, backend: str, workers: int
) -> Iterator[Row]:
    """:func:`prove_layer` of each, in any order, over processes; UserError where one dies."""
    if workers == 1:
        yield from (prove_layer(spec, n, seed, backend) for spec in specs)
        return
    # Python's tracker frees the semaphores of a worker that dies or is stopped, and warns of it
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker)
    try:
        waiting = {pool.submit(prove_layer, s, n, seed, backend): s for s in specs}
        for future in concurrent.futures.as_completed(list(waiting)):
            yield future.result()
            del waiting[future]
    except BaseException as error:  # ctrl-c above all: a layer under way would go on for seconds
        for process in multiprocessing.active_children():
            process.terminate()
        if not isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise
        raise UserError(
            "a worker process died (out of memory?), with these not proved: "
            f"{', '.join(sorted(waiting.values()))}; workers=1 shows which one it is"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself answers ctrl-c
    torch.set_num_threads(1)
