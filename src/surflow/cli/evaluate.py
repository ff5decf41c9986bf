"""Evaluate a trained run: the ledger layer by layer, the metrics with unit and estimator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from surflow.cli.command import command
from surflow.errors import UserError, check_choice, is_whole
from surflow.evaluation.likelihood import forget
from surflow.evaluation.trained import Trained, run_measures
from surflow.files import relative, write_json
from surflow.metric import Metric
from surflow.training.loggers import log_result
from surflow.training.objective import scale_of
from surflow.training.origin import commit
from surflow.training.run import Run


def evaluate_run(cfg: DictConfig) -> dict[str, float]:
    """Score a split with the weights of a checkpoint; print, write and log the numbers.

    An interrupted evaluation resumes when the same command is given again.
    """
    check_choice("split", cfg.split, ("train", "valid", "test"), UserError)
    for key in ("eval_samples", "iwbo_samples"):
        if cfg[key] is not None and not is_whole(cfg[key]):
            raise UserError(f"{key}: expected a positive whole number, got {cfg[key]}")
    run = Run(cfg)
    for name in cfg.only or ():
        check_choice("only", name, cfg.measures, UserError)
    run.check_files()
    flow, path = run.load_flow(cfg.checkpoint)
    if cfg.iwbo_samples is not None and not flow.lower_bound:
        raise UserError("iwbo_samples: the likelihood of this model is no bound; leave it out")
    draws = {"eval_samples": cfg.eval_samples, "iwbo_samples": cfg.iwbo_samples}
    trained = run.trained(flow, cfg.split, **draws)
    chosen = {k: m for k, m in run.measures.items() if cfg.only is None or k in cfg.only}
    metrics = run_measures(trained, chosen)
    _show(run, trained, path, metrics)
    _write(run, trained, path, metrics)
    forget(run.folder, cfg.split)
    values = {name: metric.value for name, metric in metrics.items()}
    # other numbers of draws stand next to the run's own scores, not in their place
    asked = any(value is not None for value in (cfg.checkpoint, *draws.values()))
    logged = {f"evaluate/{name}" if asked else name: value for name, value in values.items()}
    tables = {f"{cfg.split}/ledger": trained.ledger} if trained.ledger else {}
    log_result(run.loggers, logged, tables, {})
    return values


def _show(run: Run, trained: Trained, path: Path, metrics: Mapping[str, Metric]) -> None:
    profile = run.config["profile"]["name"]
    print(f"{relative(path)}, {len(trained.rows)} {trained.split} points, profile {profile}\n")
    if trained.ledger is not None:
        print(f"{trained.ledger}\n")
    for metric in metrics.values():
        print(metric)
    floor = run.data.floor
    if floor is not None:
        value = floor.value * scale_of(trained.unit, math.prod(run.data.event_shape))
        print(f"floor = {value:.4f} {trained.unit}  ({floor.source})")


def _write(run: Run, trained: Trained, path: Path, metrics: Mapping[str, Metric]) -> None:
    head, dirty = commit()
    result = {
        "schema": 1,
        "checkpoint": relative(path),
        "config_hash": run.hash,
        "profile": run.config["profile"]["name"],
        "split": trained.split,
        "metrics": {name: metric.to_json() for name, metric in metrics.items()},
        "ledger": trained.ledger.to_json()["rows"] if trained.ledger else [],
        "commit": head,
        "dirty": dirty,
    }
    write_json(run.folder / f"evaluation_{trained.split}.json", result)


main = command("evaluate")(evaluate_run)

if __name__ == "__main__":
    main()
