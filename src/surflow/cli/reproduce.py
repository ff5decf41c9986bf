"""Run the cells of a published table that have no record yet, then write the table."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from surflow.cli.common import check_everything, guarded, one_line_errors, relative
from surflow.cli.report import Cells, load_table_spec, plan_cells, write_report
from surflow.config import conf_dir, register_resolvers
from surflow.errors import UserError, close_match

LAUNCHERS = ("local", "submitit_local", "submitit_slurm")


@dataclass
class Job:
    """A cell being trained in a process of its own."""

    name: str
    command: list[str]
    log: Path
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


def check_request(cfg: DictConfig) -> None:
    """Refuse a request that cannot be meant, before anything runs."""
    if cfg.launcher not in LAUNCHERS:
        raise UserError(
            f"launcher: expected one of {', '.join(LAUNCHERS)}, got {cfg.launcher!r}"
            + close_match(str(cfg.launcher), LAUNCHERS)
        )
    for key in ("seeds", "rows", "columns", "overrides"):
        value = cfg[key]
        if not (OmegaConf.is_list(value) or (value is None and key in ("rows", "columns"))):
            raise UserError(f"{key}: expected a list, such as {key}=[{value}], got {value}")
    seeds = list(cfg.seeds)
    if not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise UserError(f"seeds: expected whole numbers >= 0, such as [0,1,2], got {seeds}")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"seeds: expected each once, got {seeds}")
    if cfg.workers != "auto" and not (isinstance(cfg.workers, int) and cfg.workers > 0):
        raise UserError(f"workers: expected a positive whole number or auto, got {cfg.workers}")


def number_of_workers(wanted: int | str) -> int:
    """Cells at a time: one a GPU where there are GPUs, else one a CPU core."""
    if wanted != "auto":
        return int(wanted)
    import torch

    from surflow.training.record import cores

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


def reproduce(cfg: DictConfig) -> int:
    """Train what is missing, report; returns the number of cells that failed."""
    register_resolvers()
    check_request(cfg)
    spec = load_table_spec(cfg.artefact)
    cells = plan_cells(cfg, spec)
    for config in cells.configs.values():
        check_everything(config)
    missing = cells.missing()
    seeds = ",".join(map(str, cfg.seeds))
    print(
        f"{cfg.artefact}: profile {cfg.profile.name}, seeds {seeds}: {len(cells.chosen)} runs, "
        f"{len(cells.chosen) - len(missing)} complete, {len(missing)} to do",
        flush=True,
    )
    if cfg.profile.name != "paper":
        print(f"profile {cfg.profile.name}: nothing written below is a reproduction", flush=True)
    jobs = [_job(cells, key) for key in missing]
    started = time.monotonic()
    if cfg.launcher == "local":
        run_local(jobs, number_of_workers(cfg.workers), visible_gpus())
    else:
        run_submitit(jobs, cfg.launcher.removeprefix("submitit_"), cfg)
    failed = [job for job in jobs if job.code != 0]
    for job in failed:
        print(f"{job.name}: failed: {job.last_line()} (log: {relative(job.log)})", file=sys.stderr)
    if jobs:
        print(f"{len(jobs) - len(failed)} runs in {time.monotonic() - started:.0f} s", flush=True)
    write_report(cfg, spec, cells)
    return len(failed)


def _job(cells: Cells, key: tuple[str, str, int]) -> Job:
    folder = cells.folder(key)
    command = [sys.executable, "-m", "surflow.cli.train", *cells.overrides[key]]
    return Job(f"{key[0]} {key[1]} seed {key[2]}", command, folder / "train.log")


def run_local(jobs: Sequence[Job], workers: int, gpus: Sequence[str] = ()) -> None:
    """Run the jobs in processes here, ``workers`` at a time; each sees one GPU, where there are
    any: the one with the fewest jobs on it."""
    waiting, running = list(jobs), []
    console = Console(stderr=True)
    live = sys.stderr.isatty()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    try:
        with Progress(*columns, console=console, disable=not live) as bar:
            task = bar.add_task("runs", total=len(jobs), status="")
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    if gpus:
                        busy = [other.gpu for other in running]
                        job.gpu = min(gpus, key=busy.count)
                    _start(job, workers)
                    running.append(job)
                time.sleep(0.2)
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


def _start(job: Job, workers: int) -> None:
    environment = dict(os.environ)
    if workers > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    if job.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = job.gpu
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.started = time.monotonic()
    with open(job.log, "w") as log:
        job.process = subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def run_submitit(jobs: Sequence[Job], cluster: str, cfg: DictConfig) -> None:
    """Run the jobs through submitit: on a Slurm cluster, or as its local processes."""
    import submitit

    folder = Path(cfg.run_root) / ".submitit"
    executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
    parameters = OmegaConf.to_container(cfg.slurm) or {}
    executor.update_parameters(**{"timeout_min": 60, **parameters})
    for job in jobs:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.process = executor.submit(_run_logged, job.command, str(job.log))
    for job in jobs:
        try:
            job.code = job.process.result()
        except Exception as error:  # the scheduler's own failure
            job.code = 1
            with open(job.log, "a") as log:
                log.write(f"\nsubmitit: {error}\n")
        print(f"{job.name}  {job.last_line()}", flush=True)


def _run_logged(command: list[str], log: str) -> int:
    with open(log, "w") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode


@hydra.main(config_path=conf_dir(), config_name="reproduce", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        failed = reproduce(cfg)
        if failed:
            raise UserError(f"{failed} run(s) failed; their cells say so in the table")


main = guarded(_main)

if __name__ == "__main__":
    main()
