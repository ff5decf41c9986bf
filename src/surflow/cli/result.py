"""What a run ends with: its scores on test, its pictures, its record."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from surflow.cli.common import build_data, load_flow, relative, truth_of
from surflow.config import config_hash, resolved, run_dir
from surflow.reporting.records import load_record, protocol_value, write_json_atomic

SCORES = {
    "inception": ("sample/inception_score", "sample/fid"),
    "random_features": ("sample/fid_random_features",),
}
"""What each extractor of features gives."""


@dataclass(frozen=True)
class Times:
    """When a process began (``time.monotonic``), and how long its run trained, seconds.

    ``before`` is what the processes took that it resumes, seconds.
    """

    start: float
    train: float
    before: float = 0.0


def complete_record(folder: Path, digest: str) -> Any:
    """The record of a finished run of this config, None if there is none."""
    if not (folder / "record.json").is_file():
        return None
    try:
        record = load_record(folder)
    except ValueError:
        return None
    done = record.status == "complete" and record.config_hash == digest
    return record if done else None


def scores_due(cfg: DictConfig, record: Any) -> bool:
    """Whether a wanted score of samples is missing, or is of another protocol."""
    if not cfg.metrics.n:
        return False
    wanted = wanted_protocol(cfg)
    for name in SCORES[cfg.metrics.extractor]:
        metric = record.metrics.get(name)
        if metric is None:
            return True
        if any(protocol_value(metric.protocol, key) != value for key, value in wanted.items()):
            return True
    return False


def wanted_protocol(cfg: DictConfig) -> dict[str, Any]:
    """The part of a score's protocol that the config sets."""
    return {
        "n": cfg.metrics.n,
        "temperature": float(cfg.metrics.temperature),
        "reference.splits": list(cfg.metrics.reference),
    }


def write_result(
    cfg: DictConfig,
    digest: str,
    folder: Path,
    flow: Any,
    data: Any,
    times: Times,
    loggers: Iterable[Any] = (),
    weights: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Score the test split once, draw the pictures, write the record last.

    Returns:
        the metrics by name.
    """
    from surflow.evaluation.likelihood import forget
    from surflow.evaluation.pictures import draw_pictures
    from surflow.evaluation.trained import run_measures
    from surflow.training.record import origin, peak_memory_mib

    trained = trained_of(cfg, flow, data, "test", folder)
    measures = measures_of(cfg)
    samples = {"samples": measures.pop("samples")}
    estimates = run_measures(trained, measures)
    likelihoods = [name for name, e in estimates.items() if e.kind != "score"]
    pictures = draw_pictures(trained, cfg.row) if cfg.run.pictures else {}
    estimates |= run_measures(trained, samples)
    ledger, missing = trained.ledger, trained.missing
    values = {name: e.value for name, e in estimates.items()}
    floor = {}
    if data.floor is not None:
        floor = {n: {"value": data.floor.value, "source": data.floor.source} for n in likelihoods}
    provenance = data.provenance() if hasattr(data, "provenance") else None
    record = {
        "schema": 1,
        "experiment": f"{cfg.artefact}/{cfg.row}",
        "artefact": cfg.artefact,
        "row": cfg.row,
        "data": cfg.data.name,
        "model": cfg.model.name,
        "surjection": cfg.surjection.name,
        "profile": cfg.profile.name,
        "seed": cfg.seed,
        "config_hash": digest,
        "config": resolved(cfg),
        "status": "complete",
        "metrics": {name: e.to_json() for name, e in estimates.items()},
        **({"missing": missing} if missing else {}),
        "floor": floor,
        **({"provenance": provenance} if provenance is not None else {}),
        **({"weights": weights} if weights is not None else {}),
        "ledger": {
            "unit": "nats per data point, mean",
            "rows": plain_rows(ledger),
            "total": ledger.total,
            "lower_bound": ledger.lower_bound,
        },
        **trained.details,
        "parameters": sum(p.numel() for p in flow.parameters()),
        **origin(),
        "train_time_s": round(times.train, 2),
        "wall_time_s": round(times.before + time.monotonic() - times.start, 2),
        "peak_memory_mib": peak_memory_mib(),
    }
    _log_to_wandb(cfg, loggers, values, floor, ledger, pictures)
    write_json_atomic(folder / "record.json", record)
    forget(folder, "test")
    print(f"{relative(folder)}: {summary(values)}")
    _say_missing(missing)
    return values


def trained_of(cfg: DictConfig, flow: Any, data: Any, split: str, folder: Path) -> Any:
    """The trained model of a config; a command's own numbers of draws come first."""
    from omegaconf import OmegaConf

    from surflow.evaluation.trained import Trained

    def asked(key: str) -> int:
        own = OmegaConf.select(cfg, key)
        return cfg.objective[key] if own is None else own

    return Trained(
        flow=flow,
        data=data,
        split=split,
        seed=cfg.seed,
        unit=cfg.objective.unit,
        eval_samples=asked("eval_samples"),
        iwbo_samples=asked("iwbo_samples"),
        folder=folder,
        cache=Path(cfg.run.root) / ".reference",
    )


def measures_of(cfg: DictConfig) -> dict[str, Any]:
    """The measures of a config, by name."""
    from surflow.evaluation.generation import Samples
    from surflow.evaluation.latents import active_units, levels
    from surflow.evaluation.likelihood import likelihood

    m, truth = cfg.metrics, truth_of(cfg)
    return {
        "likelihood": likelihood,
        **({"truth": truth} if truth is not None else {}),
        "active_units": active_units,
        "levels": levels,
        "samples": Samples(
            m.n, m.extractor, m.reference, m.temperature, m.batch_size, m.inception_weights
        ),
    }


def plain_rows(ledger: Any) -> list[dict[str, Any]]:
    """A ledger's rows as JSON can hold them: no standard error of a single point."""
    rows = [asdict(row) for row in ledger.rows]
    for row in rows:
        if math.isnan(row["standard_error"]):
            row["standard_error"] = None
    return rows


def add_scores(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Add the scores of samples that a complete record lacks; nothing is trained or scored anew.

    Returns:
        the metrics by name.
    """
    record = json.loads((folder / "record.json").read_text())
    if cfg.weights.source is not None:
        from surflow.cli.common import build_flow, device_of, official_weights

        data = build_data(cfg)
        flow = build_flow(cfg, data)
        official_weights(cfg, flow)
        flow.to(device_of(cfg))
    else:
        flow, data, _ = load_flow(cfg, folder / f"{cfg.trainer.scored}.ckpt")
    from surflow.evaluation.trained import run_measures

    trained = trained_of(cfg, flow, data, "test", folder)
    scores = run_measures(trained, {"samples": measures_of(cfg)["samples"]})
    missing = trained.missing
    record["metrics"] |= {name: e.to_json() for name, e in scores.items()}
    record.pop("missing", None)
    if missing:
        record["missing"] = missing
    values = {name: e["value"] for name, e in record["metrics"].items()}
    _log_to_wandb(cfg, (), values, {})
    write_json_atomic(folder / "record.json", record)
    print(f"{relative(folder)}: {summary(values)}")
    _say_missing(missing)
    return values


def summary(metrics: dict[str, float]) -> str:
    """Such as "test/elbo_bpd 3.0812, sample/fid 49.1"."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _say_missing(missing: dict[str, str]) -> None:
    for name, reason in missing.items():
        print(f"{name}: missing: {reason}")


def _log_to_wandb(
    cfg: DictConfig,
    loggers: Iterable[Any],
    values: dict[str, float],
    floor: dict[str, Any],
    ledger: Any = None,
    pictures: Mapping[str, Path] | None = None,
) -> None:
    if cfg.logger.name != "wandb":
        return
    import wandb

    from surflow.training.logging import ledger_table, wandb_logger

    logger = next((log for log in loggers if type(log).__name__ == "WandbLogger"), None)
    if logger is None:
        logger = wandb_logger(resolved(cfg), run_dir(cfg), config_hash(cfg))
    run = logger.experiment
    floors = {f"floor/{name}": f["value"] for name, f in floor.items()}
    run.summary.update({**values, **floors})
    if ledger is not None:
        run.log({"test/ledger": ledger_table(ledger)})
    if cfg.logger.images and pictures:
        run.log({k: wandb.Image(str(p)) for k, p in pictures.items()})
    wandb.finish()
