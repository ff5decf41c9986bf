"""Running many commands at once: how GPUs are shared among them, and where they run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from surflow.errors import UserError


@dataclass(frozen=True)
class Allotment:
    """What one run gets: ``devices`` on each of ``nodes`` machines."""

    devices: int = 1
    nodes: int = 1

    @property
    def processes(self) -> int:
        """One a device."""
        return self.devices * self.nodes

    def overrides(self, cpu: bool = False) -> list[str]:
        """What tells ``surflow.cli.train`` of it; nothing for a single process."""
        if self.processes == 1:
            return []
        found = [f"trainer.devices={self.devices}", f"trainer.num_nodes={self.nodes}"]
        return [*found, "trainer.strategy=ddp", *(["trainer.accelerator=cpu"] if cpu else [])]


def share(num_runs: int, devices: int, nodes: int = 1) -> list[Allotment]:
    """Share G = ``devices`` * ``nodes`` devices among runs: floor(G / num_runs) each, 1 at least.

    A run that gets less than a machine stays on one, so it gets the most with which all still fit;
    one that gets more than a machine has whole ones.

    >>> share(2, devices=8, nodes=2)
    [Allotment(devices=8, nodes=1), Allotment(devices=8, nodes=1)]
    >>> share(3, devices=8)[0]
    Allotment(devices=2, nodes=1)
    >>> share(20, devices=8, nodes=2)[0]
    Allotment(devices=1, nodes=1)

    Args:
        num_runs: R.
        devices: on each machine.
        nodes: machines.

    Returns:
        R allotments. Where R > G they take turns, one a device at a time.

    Raises:
        ValueError: for a number below 1 (``num_runs`` may be 0).
    """
    if num_runs < 0 or devices < 1 or nodes < 1:
        raise ValueError(
            "share: expected num_runs >= 0, devices >= 1 and nodes >= 1, got "
            f"{num_runs}, {devices}, {nodes}"
        )
    if not num_runs:
        return []
    if num_runs <= nodes:
        return [Allotment(devices, nodes // num_runs)] * num_runs
    runs_a_node = math.ceil(num_runs / nodes)
    return [Allotment(max(1, devices // runs_a_node))] * num_runs


def fitting(allotment: Allotment, batch_size: int) -> Allotment:
    """The largest part of an allotment over whose processes a global batch divides evenly.

    >>> fitting(Allotment(6), batch_size=32)
    Allotment(devices=4, nodes=1)
    """
    parts = (
        Allotment(devices, nodes)
        for nodes in range(allotment.nodes, 0, -1)
        for devices in range(allotment.devices, 0, -1)
        if batch_size % (devices * nodes) == 0
    )
    return max(parts, key=lambda part: part.processes)


@dataclass
class Job:
    """A command to run in a process of its own; ``log`` takes what it prints."""

    name: str
    command: list[str]
    log: Path
    allotment: Allotment = Allotment()
    process: Any = None
    code: int | None = None
    gpu: str | None = None
    started: float = field(default_factory=time.monotonic)

    def last_line(self) -> str:
        """The last line the process has printed."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""


def number_of_workers(wanted: int | str) -> int:
    """Cells at a time: one a GPU where there are GPUs, else one a CPU core."""
    if wanted != "auto":
        return int(wanted)
    import torch

    from surflow.training.origin import cores

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return cores()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class Places:
    """Where jobs run on this machine: how many at a time, and the GPUs of each place.

    ``gpus`` holds values of CUDA_VISIBLE_DEVICES; it is empty where there is no GPU.
    """

    workers: int
    gpus: tuple[str, ...] = ()


def places_here(
    devices: int | None, workers: int | str, allotment: Allotment, gpus: Sequence[str]
) -> Places:
    """The places on this machine for jobs of one allotment.

    Args:
        devices: that may be used in all; None: every GPU, or as many CPU processes as ``workers``.
        workers: jobs at a time, or auto.
        allotment: of each job.
        gpus: the machine's, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        UserError: for more devices than there are.
    """
    if devices is None:
        return Places(number_of_workers(workers), tuple(gpus))
    if gpus and devices > len(gpus):
        raise UserError(f"devices={devices}: this machine has {len(gpus)} GPU(s)")
    size = allotment.devices
    count = devices // size
    groups = [",".join(gpus[i * size : (i + 1) * size]) for i in range(count)] if gpus else []
    return Places(count if workers == "auto" else int(workers), tuple(groups))


def run_local(jobs: Sequence[Job], workers: int, gpus: Sequence[str] = ()) -> None:
    """Run the jobs in processes here, ``workers`` at a time.

    Args:
        jobs: to run.
        workers: at a time.
        gpus: values of CUDA_VISIBLE_DEVICES: each job sees the one with the fewest jobs on it.
    """
    run_jobs(jobs, Places(workers, tuple(gpus)), _start_here)


def run_submitit(
    jobs: Sequence[Job],
    cluster: str,
    folder: str | Path,
    slurm: Mapping[str, Any] | None,
    counted: bool,
    places: Places,
) -> None:
    """Run the jobs through submitit: on a Slurm cluster, or as its local processes.

    Slurm gets them all, and starts a job's command once a process of its allotment; local jobs
    wait for a place of their own, like those of :func:`run_local`.

    Args:
        jobs: to run.
        cluster: slurm or local.
        folder: of submitit's files.
        slurm: its parameters, such as timeout_min.
        counted: whether Slurm is asked for the devices of each allotment.
        places: for local jobs.
    """
    import submitit

    executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
    own = dict(slurm or {})

    def start(job: Job, environment: Mapping[str, str]) -> _Submitted:
        asked = slurm_parameters(job.allotment) if cluster == "slurm" and counted else {}
        executor.update_parameters(**{"timeout_min": DAY, **asked, **own})
        submitted = executor.submit(run_logged, job.command, str(job.log), dict(environment))
        return _Submitted(submitted, job.log)

    everything = Places(max(len(jobs), 1))
    run_jobs(jobs, everything if cluster == "slurm" else places, start, pause=1.0)


DAY = 24 * 60  # minutes


def slurm_parameters(allotment: Allotment) -> dict[str, int]:
    """What submitit asks of Slurm for a run: a task a GPU, as Lightning expects it there."""
    return {
        "nodes": allotment.nodes,
        "gpus_per_node": allotment.devices,
        "tasks_per_node": allotment.devices,
    }


Start = Callable[[Job, Mapping[str, str]], Any]
"""Starts a job with these additions to its environment; the process has poll, terminate, wait."""


def run_jobs(jobs: Sequence[Job], places: Places, start: Start, pause: float = 0.2) -> None:
    """Run the jobs, so many at a time as there are places; show how they get on."""
    waiting, running = list(jobs), []
    live = sys.stderr.isatty()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not live) as bar:
            task = bar.add_task("runs", total=len(jobs), status="")
            while waiting or running:
                while waiting and len(running) < places.workers:
                    running.append(_begin(waiting.pop(0), running, places, start))
                time.sleep(pause)
                for job in list(running):
                    job.code = job.process.poll()
                    if job.code is None:
                        continue
                    running.remove(job)
                    bar.advance(task)
                    if not live:
                        seconds = time.monotonic() - job.started
                        print(f"{job.name}  {seconds:.0f} s  {job.last_line()}", flush=True)
                bar.update(task, status=" | ".join(j.last_line()[:60] for j in running))
    except KeyboardInterrupt:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
        raise


def _begin(job: Job, running: Sequence[Job], places: Places, start: Start) -> Job:
    environment = {}
    if places.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = "1"
    if places.gpus:
        busy = [other.gpu for other in running]
        job.gpu = min(places.gpus, key=busy.count)
        environment["CUDA_VISIBLE_DEVICES"] = job.gpu
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.started = time.monotonic()
    job.process = start(job, environment)
    return job


def _start_here(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
    with open(job.log, "w") as log:
        return subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )


@dataclass
class _Submitted:
    """A job of submitit's, as :func:`run_jobs` needs it."""

    job: Any
    log: Path

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return max(self.job.results(), key=abs)
        except Exception as error:  # the scheduler's own failure
            with open(self.log, "a") as log:
                log.write(f"\nsubmitit: {error}\n")
            return 1

    def terminate(self) -> None:
        self.job.cancel(check=False)

    def wait(self) -> None:
        """Nothing to wait for: the scheduler ends what was cancelled."""


def run_logged(command: list[str], log: str, environment: Mapping[str, str]) -> int:
    """Run a command in one task of a job; other tasks than the first have logs of their own."""
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    with open(f"{log}.{rank}" if rank else log, "w") as file:
        return subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        ).returncode
