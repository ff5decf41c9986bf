"""Run the cells of a published table that have no record yet, then write the table."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from surflow.cli.common import check_everything, guarded, one_line_errors, relative
from surflow.cli.launch import (
    Allotment,
    Job,
    fitting,
    places_here,
    run_local,
    run_submitit,
    share,
    visible_gpus,
)
from surflow.cli.report import Cells, Key, load_table_spec, plan_cells, write_report
from surflow.cli.request import check_request, settle
from surflow.config import conf_dir, register_resolvers
from surflow.errors import UserError


def reproduce(cfg: DictConfig) -> int:
    """Train what is missing, report; returns the number of runs that failed."""
    register_resolvers()
    check_request(cfg)
    print(settle(cfg), flush=True)
    spec = load_table_spec(cfg.artefact, cfg.profile.name)
    cells = plan_cells(cfg, spec)
    for config in cells.configs.values():
        check_everything(config)
    missing = cells.missing()
    total = len(cells.runs())
    seeds = ",".join(map(str, cfg.seeds))
    print(
        f"{cfg.artefact}: profile {cfg.profile.name}, seeds {seeds}: {total} runs, "
        f"{total - len(missing)} complete, {len(missing)} to do",
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


def run_missing(cfg: DictConfig, cells: Cells, missing: Sequence[Key]) -> list[Job]:
    """Run these cells where the request says; returns their jobs, done."""
    here = cfg.launcher != "submitit_slurm"
    gpus = visible_gpus() if here else []
    allotment = allot(cfg, len(missing))
    places = places_here(cfg.devices if here else None, cfg.workers, allotment, gpus)
    jobs = [_job(cells, key, allotment, cpu=here and not gpus) for key in missing]
    if cfg.launcher == "local":
        run_local(jobs, places.workers, places.gpus)
    else:
        run_submitit(jobs, cfg.launcher.removeprefix("submitit_"), cfg, places)
    return jobs


def allot(cfg: DictConfig, num_runs: int) -> Allotment:
    """What each run gets: one device where none were counted out, or where nothing is trained."""
    if cfg.devices is None or cfg.weights is not None or not num_runs:
        return Allotment()
    return share(num_runs, cfg.devices, cfg.nodes)[0]


def _job(cells: Cells, key: Key, allotment: Allotment, cpu: bool) -> Job:
    fits = fitting(allotment, cells.configs[key].data.batch_size)
    overrides = [*cells.overrides[key], *fits.overrides(cpu)]
    command = [sys.executable, "-m", "surflow.cli.train", *overrides]
    name = f"{key[0]} {cells.columns[key[1]].data} seed {key[2]}"
    return Job(name, command, cells.folder(key) / "train.log", fits)


@hydra.main(config_path=conf_dir(), config_name="reproduce", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        failed = reproduce(cfg)
        if failed:
            raise UserError(
                f"{failed} run(s) failed, for the reasons above; the table is of the others"
            )


main = guarded(_main)

if __name__ == "__main__":
    main()
