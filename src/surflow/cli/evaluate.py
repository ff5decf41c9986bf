"""Evaluate a trained run: the ledger layer by layer, the metrics with unit and estimator."""

from __future__ import annotations

import sys
from dataclasses import asdict

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from surflow.cli.common import (
    check_everything,
    guarded,
    load_flow,
    one_line_errors,
    relative,
    truth_of,
)
from surflow.config import conf_dir, config_hash, register_resolvers, run_dir
from surflow.errors import UserError
from surflow.reporting.records import write_json_atomic


def evaluate_run(cfg: DictConfig) -> dict[str, float]:
    """Score a split with the weights of a checkpoint; print, write and log what comes out."""
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    from surflow.training.evaluation import evaluate
    from surflow.training.record import commit

    register_resolvers()
    check_everything(cfg)
    if cfg.split not in ("train", "valid", "test"):
        raise UserError(f"split: expected train, valid or test, got {cfg.split!r}")
    flow, data, path = load_flow(cfg)
    rows = data.splits[cfg.split]
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(f"evaluating {cfg.split}", total=len(rows))
        estimates, ledger = evaluate(
            flow,
            rows,
            data.eval_batch_size,
            seed=cfg.seed,
            eval_samples=cfg.objective.eval_samples,
            iwbo_samples=cfg.objective.iwbo_samples,
            unit=cfg.objective.unit,
            split=cfg.split,
            progress=lambda done: bar.update(task, completed=done),
        )
    truth = truth_of(cfg)
    if truth is not None:
        with console.status("likelihood itself") as status:
            comparison = truth.compare(flow, rows, seed=cfg.seed, progress=status.update)
        estimates |= comparison.metrics(cfg.split)
    print(f"{relative(path)}, {len(rows)} {cfg.split} points, profile {cfg.profile.name}\n")
    print(ledger)
    print()
    for name, e in estimates.items():
        print(
            f"{name} = {e.value:.4f} ± {e.standard_error:.4f} {e.unit}  ({e.kind}: {e.estimator})"
        )
    if data.floor is not None:
        print(f"floor = {data.floor.value:.4f} nats  ({data.floor.source})")
    head, dirty = commit()
    result = {
        "schema": 1,
        "checkpoint": relative(path),
        "config_hash": config_hash(cfg),
        "profile": cfg.profile.name,
        "split": cfg.split,
        "metrics": {name: asdict(e) for name, e in estimates.items()},
        "ledger": [asdict(r) for r in ledger.rows],
        "commit": head,
        "dirty": dirty,
    }
    folder = run_dir(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / f"evaluation_{cfg.split}.json", result)
    _log(cfg, {name: e.value for name, e in estimates.items()}, ledger)
    return {name: e.value for name, e in estimates.items()}


def _log(cfg: DictConfig, values: dict[str, float], ledger: object) -> None:
    """Add the evaluation to the run's wandb run, where one is kept."""
    if cfg.logger.name != "wandb":
        return
    import wandb

    from surflow.config import resolved
    from surflow.training.logging import ledger_table, wandb_logger

    logger = wandb_logger(resolved(cfg), run_dir(cfg), config_hash(cfg))
    logger.experiment.summary.update(values)
    logger.experiment.log({f"{cfg.split}/ledger": ledger_table(ledger)})
    wandb.finish()


@hydra.main(config_path=conf_dir(), config_name="evaluate", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        evaluate_run(cfg)


main = guarded(_main)

if __name__ == "__main__":
    main()
