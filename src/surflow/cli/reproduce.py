"""Run the cells of a published table that have no record yet, then write the table."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from surflow.cli.cells import Cell, plan_cells, runs_of, write_report
from surflow.cli.command import command
from surflow.cli.request import complete_request
from surflow.errors import UserError
from surflow.files import relative
from surflow.reporting import Key
from surflow.training.hardware import check_machine
from surflow.training.launch import (
    Allotment,
    Job,
    fitting,
    places_here,
    run_local,
    run_submitit,
    share,
    visible_gpus,
)


def reproduce(cfg: DictConfig) -> int:
    """Train what is missing, report; returns the number of runs that failed."""
    spec = complete_request(cfg)
    cells = plan_cells(cfg, spec)
    for cell in cells.values():
        check_machine(cell.run.config["trainer"], cell.run.data.batch_size)
    runs, missing = runs_of(cells), runs_of(cells, to_run=True)
    for run in {str(cells[key].run.config["measures"]): cells[key].run for key in missing}.values():
        run.check_files()
    seeds = ",".join(map(str, cfg.seeds))
    print(
        f"{cfg.artefact}: profile {cfg.profile.name}, seeds {seeds}: {len(runs)} runs, "
        f"{len(runs) - len(missing)} complete, {len(missing)} to do",
        flush=True,
    )
    if cfg.profile.name != "paper":
        print(f"profile {cfg.profile.name}: nothing written below is a reproduction", flush=True)
    started = time.monotonic()
    jobs = run_missing(cfg, cells, missing)
    failed = [job for job in jobs if job.code != 0]
    for job in failed:
        print(f"{job.name}: failed: {job.last_line()} (log: {relative(job.log)})", file=sys.stderr)
    if jobs:
        print(f"{len(jobs) - len(failed)} runs in {time.monotonic() - started:.0f} s", flush=True)
    write_report(cfg, spec, cells)
    return len(failed)


def run_missing(cfg: DictConfig, cells: Mapping[Key, Cell], missing: Sequence[Key]) -> list[Job]:
    """Run these cells where the request says; returns their jobs, done."""
    here = cfg.launcher != "submitit_slurm"
    gpus = visible_gpus() if here else []
    allotment = allot(cfg, len(missing))
    places = places_here(cfg.devices if here else None, cfg.workers, allotment, gpus)
    jobs = [_job(cells[key], key, allotment, cpu=here and not gpus) for key in missing]
    if cfg.launcher == "local":
        run_local(jobs, places.workers, places.gpus)
    else:
        folder = f"{cfg.run_root}/.submitit"
        cluster = cfg.launcher.removeprefix("submitit_")
        run_submitit(jobs, cluster, folder, cfg.slurm, cfg.devices is not None, places)
    return jobs


def allot(cfg: DictConfig, num_runs: int) -> Allotment:
    """What each run gets: one device where none were counted out, or where nothing is trained."""
    if cfg.devices is None or cfg.weights is not None or not num_runs:
        return Allotment()
    return share(num_runs, cfg.devices, cfg.nodes)[0]


def _job(cell: Cell, key: Key, allotment: Allotment, cpu: bool) -> Job:
    fits = fitting(allotment, cell.run.data.batch_size)
    command = [sys.executable, "-m", "surflow.cli.train", *cell.overrides, *fits.overrides(cpu)]
    return Job(f"{key[0]} {cell.data} seed {key[2]}", command, cell.run.folder / "train.log", fits)


def _main(cfg: DictConfig) -> None:
    failed = reproduce(cfg)
    if failed:
        raise UserError(
            f"{failed} run(s) failed, for the reasons above; the table is of the others"
        )


main = command("reproduce")(_main)

if __name__ == "__main__":
    main()
