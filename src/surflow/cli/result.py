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
from surflow.errors import UserError
from surflow.reporting.records import load_record, protocol_value, write_json_atomic

SCORES = {
    "inception": ("sample/inception_score", "sample/fid"),
    "random_features": ("sample/fid_random_features",),
}
"""What each extractor of features gives."""

LATENT_ROWS = 4096
"""Test points, evenly spaced, that active units are counted over."""


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
    from surflow.cli.pictures import draw_pictures
    from surflow.cli.scoring import forget, score_split
    from surflow.training.record import origin, peak_memory_mib

    estimates, ledger = score_split(cfg, flow, data, "test", folder)
    check_finite(estimates)
    comparison = None
    truth = truth_of(cfg)
    if truth is not None:
        test = data.splits["test"].to(next(flow.parameters()).device)
        comparison = truth.compare(flow, test, seed=cfg.seed)
        estimates |= comparison.metrics()
    likelihoods = list(estimates)
    estimates |= _latents_used(cfg, flow, data) | _of_levels(flow, ledger)
    pictures = draw_pictures(cfg, folder, flow, data) if cfg.run.pictures else {}
    scores, missing = _samples_scored(cfg, flow, data, folder)
    estimates |= scores
    values = {name: e.value for name, e in estimates.items()}
    floor = {}
    if data.floor is not None:
        floor = {n: {"value": data.floor.value, "source": data.floor.source} for n in likelihoods}
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
        "metrics": {name: e.plain() for name, e in estimates.items()},
        **({"missing": missing} if missing else {}),
        "floor": floor,
        "provenance": data.provenance(),
        **({"weights": weights} if weights is not None else {}),
        "ledger": {
            "unit": "nats per data point, mean",
            "rows": plain_rows(ledger),
            "total": ledger.total,
            "lower_bound": ledger.lower_bound,
        },
        **({"truth": comparison.plain()} if comparison is not None else {}),
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


def _latents_used(cfg: DictConfig, flow: Any, data: Any) -> dict[str, Any]:
    """The active units of a model with a VAE layer, over the test split, one draw of a seed."""
    import torch

    from surflow.models import PyramidFlow
    from surflow.training.evaluation import Estimate
    from surflow.training.module import seed_draws
    from surflow.variational import active_units, has_vae_layer

    test = data.splits["test"]
    if not has_vae_layer(flow) or isinstance(flow, PyramidFlow) or len(test) < 2:
        return {}
    weight = next(flow.parameters())
    x = test[torch.arange(min(LATENT_ROWS, len(test))) * len(test) // min(LATENT_ROWS, len(test))]
    x = x.to(weight.device)
    flow.eval()
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        seed_draws(weight.device, cfg.seed)
        used = active_units(flow, x.to(weight.dtype) if x.is_floating_point() else x)
    how = f"latent dimensions of {used.of} whose posterior mean varies over test points, variance >"
    estimate = Estimate(
        value=float(used.count),
        unit="units",
        kind="score",
        estimator=f"{how} {used.threshold:g}",
        standard_error=math.nan,
        count=len(x),
        protocol={"of": used.of, "threshold": used.threshold, "rows": len(x)},
    )
    return {"test/active_units": estimate}


def _of_levels(flow: Any, ledger: Any) -> dict[str, Any]:
    """What every resolution of a pyramid takes, in bits per dimension of its own image."""
    from surflow.models import PyramidFlow
    from surflow.training.evaluation import Estimate

    if not isinstance(flow, PyramidFlow):
        return {}
    found = {}
    for side, (bits, error) in flow.level_bits(ledger).items():
        given = "unconditional" if side == min(flow.sides) else f"given {side // 2} x {side // 2}"
        found[f"test/level_{side}_bpd"] = Estimate(
            value=bits,
            unit="bpd",
            kind="bound",
            estimator=f"ELBO of the {side} x {side} image, {given}; bits per dimension of its own",
            standard_error=error,
            count=ledger.count,
            protocol={"dims": math.prod((flow.shape[0], side, side))},
        )
    return found


def check_finite(estimates: dict[str, Any]) -> None:
    """Refuse what no record can hold.

    Raises:
        UserError: for a likelihood or a bound that is not finite.
    """
    for name, e in estimates.items():
        if not math.isfinite(e.value):
            raise UserError(
                f"{name}: not finite ({e.value}): the weights give some points no likelihood; "
                "try trainer.scored=best, a smaller optimizer.lr or trainer.gradient_clip_val"
            )


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
    scores, missing = _samples_scored(cfg, flow, data, folder)
    record["metrics"] |= {name: e.plain() for name, e in scores.items()}
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


def _samples_scored(
    cfg: DictConfig, flow: Any, data: Any, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Scores of samples by name, and why those that are wanted and missing are."""
    if not cfg.metrics.n:
        return {}, {}
    from surflow.metrics import score_generation

    return score_generation(cfg, flow, data, folder)


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
