"""Evaluate a trained run: the ledger layer by layer, the metrics with unit and estimator."""

from __future__ import annotations

import math
from typing import Any

import hydra
from omegaconf import DictConfig

from surflow.cli.common import (
    check_everything,
    guarded,
    load_flow,
    one_line_errors,
    relative,
    use_threads,
)
from surflow.cli.result import measures_of, plain_rows, trained_of
from surflow.config import conf_dir, config_hash, register_resolvers, run_dir
from surflow.errors import UserError
from surflow.reporting.records import write_json_atomic


def evaluate_run(cfg: DictConfig) -> dict[str, float]:
    """Score a split with the weights of a checkpoint; print, write and log what comes out.

    One that is cut off goes on where it was when the same command is given again.
    """
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    from surflow.evaluation.likelihood import forget
    from surflow.evaluation.trained import run_measures
    from surflow.training.record import commit

    register_resolvers()
    check_everything(cfg)
    if cfg.split not in ("train", "valid", "test"):
        raise UserError(f"split: expected train, valid or test, got {cfg.split!r}")
    use_threads(cfg)
    flow, data, path = load_flow(cfg)
    if cfg.iwbo_samples is not None and not flow.lower_bound:
        raise UserError("iwbo_samples: the likelihood of this model is no bound; leave it out")
    rows = data.splits[cfg.split]
    folder = run_dir(cfg)
    trained = trained_of(cfg, flow, data, cfg.split, folder)
    measures = measures_of(cfg)
    wanted = {key: measures[key] for key in ("likelihood", "truth") if key in measures}
    estimates = run_measures(trained, wanted)
    ledger = trained.ledger
    print(f"{relative(path)}, {len(rows)} {cfg.split} points, profile {cfg.profile.name}\n")
    print(ledger)
    print()
    for metric in estimates.values():
        print(metric)
    if data.floor is not None:
        print(_floor_line(data, cfg.objective.unit))
    head, dirty = commit()
    result = {
        "schema": 1,
        "checkpoint": relative(path),
        "config_hash": config_hash(cfg),
        "profile": cfg.profile.name,
        "split": cfg.split,
        "metrics": {name: e.to_json() for name, e in estimates.items()},
        "ledger": plain_rows(ledger),
        "commit": head,
        "dirty": dirty,
    }
    write_json_atomic(folder / f"evaluation_{cfg.split}.json", result)
    forget(folder, cfg.split)
    _log(cfg, {name: e.value for name, e in estimates.items()}, ledger)
    return {name: e.value for name, e in estimates.items()}


def _floor_line(data: Any, unit: str) -> str:
    """What no model can beat, in the unit of the scores."""
    line = f"floor = {data.floor.value:.4f} nats"
    if unit == "bpd":
        bits = data.floor.value / (math.prod(data.event_shape) * math.log(2))
        line = f"floor = {bits:.4f} bpd"
    return f"{line}  ({data.floor.source})"


def _log(cfg: DictConfig, values: dict[str, float], ledger: object) -> None:
    """Add the evaluation to the run's wandb run, where one is kept."""
    if cfg.logger.name != "wandb":
        return
    import wandb

    from surflow.config import resolved
    from surflow.training.logging import ledger_table, wandb_logger

    logger = wandb_logger(resolved(cfg), run_dir(cfg), config_hash(cfg))
    asked = (cfg.checkpoint, cfg.iwbo_samples, cfg.eval_samples)
    if any(value is not None for value in asked):  # beside the run's own scores, not in their place
        values = {f"evaluate/{name}": value for name, value in values.items()}
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
