"""Train one run, or a sweep of them with -m; evaluate it on test; write its record."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from surflow.cli.common import (
    build_data,
    build_flow,
    check_everything,
    guarded,
    one_line_errors,
    relative,
    truth_of,
)
from surflow.config import conf_dir, config_hash, register_resolvers, resolved, run_dir
from surflow.errors import UserError
from surflow.reporting.records import load_record, write_json_atomic

GRID = 256
PICTURE_SAMPLES = 50_000


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder; a second process is told so instead of writing into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(
            f"run.root: cannot write to {relative(folder)} ({error.strerror}); choose a folder "
            "that can be written to: run.root=<folder>"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{relative(folder)}: another process is training this run; wait for it, or "
                "change seed or run.root"
            ) from None
        yield


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


def train(cfg: DictConfig) -> dict[str, float]:
    """Run one config to its record; resume it if it was interrupted; reuse it if it is complete.

    Returns:
        the test metrics by name.
    """
    register_resolvers()
    check_everything(cfg)
    digest = config_hash(cfg)
    folder = run_dir(cfg)
    record = None if cfg.run.force else complete_record(folder, digest)
    if record is not None:
        metrics = {name: m.value for name, m in record.metrics.items()}
        print(f"{relative(folder)}: already complete ({_summary(metrics)}); run.force=true repeats")
        return metrics
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()  # before Lightning, which imports torchvision
    with locked(folder) if first_process() else contextlib.nullcontext():
        return _train_locked(cfg, digest, folder)


def first_process() -> bool:
    """Whether this is the only process of the run, or the first of several: it keeps the folder."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return rank_zero_only.rank == 0 and node == "0"


def _train_locked(cfg: DictConfig, digest: str, folder: Path) -> dict[str, float]:
    start = time.monotonic()
    import pytorch_lightning as pl
    import torch
    from hydra.utils import instantiate
    from pytorch_lightning.callbacks import ModelCheckpoint

    from surflow.training.callbacks import EMA, RunProgress
    from surflow.training.checkpoint import (
        AtomicCheckpointIO,
        check_same_config,
        flow_state,
        load_checkpoint,
    )
    from surflow.training.logging import CSVMetrics, wandb_logger
    from surflow.training.module import FlowModule, Objective, can_compile
    from surflow.training.record import commit

    quiet_lightning()
    commit()  # of the code that runs, whatever is there when it ends
    if cfg.trainer.threads is not None:
        torch.set_num_threads(cfg.trainer.threads)
    if cfg.run.force and first_process():
        for name in ("last.ckpt", "best.ckpt", "record.json", "metrics.csv", "picture.npz"):
            (folder / name).unlink(missing_ok=True)
    plain = resolved(cfg)
    data = build_data(cfg)
    flow = build_flow(cfg, data)
    num_dims = 1
    for size in data.event_shape:
        num_dims *= size
    objective = Objective(cfg.objective.num_samples, cfg.objective.unit, num_dims)
    compile_ = cfg.trainer.compile
    if compile_ == "auto":
        compile_ = can_compile()
    elif compile_ and not can_compile():
        raise UserError("trainer.compile=true: no C++ compiler found; use trainer.compile=auto")
    module = FlowModule(
        flow,
        optimizer=instantiate(_without(cfg.optimizer, "name")),
        schedule=instantiate(_partial(_without(cfg.schedule, "name"))),
        objective=objective,
        seed=cfg.seed,
        config_hash=digest,
        compile=bool(compile_),
        finite_check_every=cfg.trainer.finite_check_every,
        log_every=cfg.trainer.log_every,
    )
    last = folder / "last.ckpt"
    resumed_step = 0
    if last.is_file():
        checkpoint = load_checkpoint(last)
        check_same_config(checkpoint, digest, relative(last))
        resumed_step = int(checkpoint["global_step"])
        if first_process():
            print(
                f"{relative(folder)}: resuming after epoch {int(checkpoint['epoch']) + 1}",
                file=sys.stderr,
            )
    csv = CSVMetrics(folder / "metrics.csv", [module.train_key, module.val_key, "lr"])
    loggers: list[Any] = [csv]
    if cfg.logger.name == "wandb":
        loggers.append(wandb_logger(plain, folder, digest))
    title = f"{cfg.row} {cfg.data.name} seed {cfg.seed}"
    saving: dict[str, Any] = {
        "dirpath": folder,
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    callbacks: list[Any] = [
        RunProgress(title),
        # its own save_last skips the epochs that are not the best: so two of them, best first
        ModelCheckpoint(filename="best", monitor=module.val_key, **saving),
        ModelCheckpoint(filename="last", **saving),
    ]
    if cfg.trainer.ema_decay is not None:
        # before the checkpoint, so that what is saved is this epoch's average
        callbacks.insert(1, EMA(cfg.trainer.ema_decay, cfg.trainer.ema_every))
    strategy = cfg.trainer.strategy
    trainer = pl.Trainer(
        max_epochs=cfg.trainer.max_epochs,
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=strategy,
        precision=cfg.trainer.precision,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        deterministic=cfg.trainer.deterministic,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=cfg.trainer.log_every,
        use_distributed_sampler=False,
    )
    csv.start(resumed_step)
    fit_start = time.monotonic()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None)
    except SystemExit:  # what Lightning makes of ctrl-c
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    train_time = time.monotonic() - fit_start
    if trainer.interrupted:
        raise KeyboardInterrupt
    if not trainer.is_global_zero:
        return {}
    # what is scored is what the checkpoint holds, also where there was nothing left to train
    flow.load_state_dict(flow_state(load_checkpoint(last)))
    return _finish(cfg, plain, digest, folder, module, data, loggers, start, train_time)


def _finish(
    cfg: DictConfig,
    plain: dict[str, Any],
    digest: str,
    folder: Path,
    module: Any,
    data: Any,
    loggers: list[Any],
    start: float,
    train_time: float,
) -> dict[str, float]:
    """Evaluate on test once, draw the pictures, write the record last."""
    from dataclasses import asdict

    from surflow.training.evaluation import evaluate
    from surflow.training.record import origin, peak_memory_mib

    flow = module.flow
    device = next(flow.parameters()).device
    test = data.splits["test"].to(device)
    estimates, ledger = evaluate(
        flow,
        test,
        data.eval_batch_size,
        seed=cfg.seed,
        eval_samples=cfg.objective.eval_samples,
        iwbo_samples=cfg.objective.iwbo_samples,
        unit=cfg.objective.unit,
    )
    comparison = None
    truth = truth_of(cfg)
    if truth is not None:
        comparison = truth.compare(flow, test, seed=cfg.seed)
        estimates |= comparison.metrics()
    values = {name: e.value for name, e in estimates.items()}
    wandb_run = next(
        (log.experiment for log in loggers if type(log).__name__ == "WandbLogger"), None
    )
    pictures = {}
    if cfg.run.pictures and tuple(data.event_shape) == (2,):
        pictures = _pictures(cfg, folder, flow, data)
    floor = {}
    if data.floor is not None:
        floor = {n: {"value": data.floor.value, "source": data.floor.source} for n in values}
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
        "config": plain,
        "status": "complete",
        "metrics": {name: asdict(e) for name, e in estimates.items()},
        "floor": floor,
        "ledger": {
            "unit": "nats per data point, mean",
            "rows": [asdict(r) for r in ledger.rows],
            "total": ledger.total,
            "lower_bound": ledger.lower_bound,
        },
        **({"truth": comparison.plain()} if comparison is not None else {}),
        "parameters": sum(p.numel() for p in flow.parameters()),
        **origin(),
        "train_time_s": round(train_time, 2),
        "wall_time_s": round(time.monotonic() - start, 2),
        "peak_memory_mib": peak_memory_mib(),
    }
    if wandb_run is not None:
        import wandb

        from surflow.training.logging import ledger_table

        floors = {f"floor/{name}": f["value"] for name, f in floor.items()}
        wandb_run.summary.update({**values, **floors})
        wandb_run.log({"test/ledger": ledger_table(ledger)})
        if cfg.logger.images and pictures:
            wandb_run.log({k: wandb.Image(str(p)) for k, p in pictures.items()})
        wandb.finish()
    write_json_atomic(folder / "record.json", record)
    print(f"{relative(folder)}: {_summary(values)}")
    return values


def _pictures(cfg: DictConfig, folder: Path, flow: Any, data: Any) -> dict[str, Path]:
    """Density and samples of a 2-D model: picture.npz for the tables' figures, two PNGs."""
    import io

    import numpy as np
    import torch

    from surflow.data.module import QuantizedData
    from surflow.reporting import figures
    from surflow.reporting.records import write_bytes_atomic
    from surflow.training.evaluation import density_grid, mass_table

    split = "test" if len(data.splits["test"]) >= PICTURE_SAMPLES else "train"
    shown = data.splits[split][:PICTURE_SAMPLES]
    torch.manual_seed(cfg.seed)
    with torch.no_grad():
        samples = flow.sample(PICTURE_SAMPLES).cpu()
    if isinstance(data, QuantizedData):
        low, high, size = -0.5, data.num_levels - 0.5, data.num_levels
        density = mass_table(flow, size, lower_bound_samples=32)
        true = data.probabilities
        # a point anywhere in its cell, so that equal ones do not hide each other
        samples, shown = (v + torch.rand(v.shape) - 0.5 for v in (samples, shown))
    else:
        low, high = -data.dataset.window, data.dataset.window
        # a bound takes many draws a cell
        size = GRID // 2 if flow.lower_bound else GRID
        density = density_grid(flow, low, high, size, box=data.box, lower_bound_samples=32)
        step = (high - low) / size
        centres = low + step * (torch.arange(size) + 0.5)
        true = data.dataset.log_prob(torch.cartesian_prod(centres, centres)).exp()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        grid_low=np.float64(low),
        grid_high=np.float64(high),
        density=density.numpy().astype(np.float32),
        true_density=true.reshape(size, size).numpy().astype(np.float32),
        samples=samples.numpy().astype(np.float32),
        data_samples=shown.numpy().astype(np.float32),
    )
    path = write_bytes_atomic(folder / "picture.npz", buffer.getvalue())
    cells = {cfg.row: {cfg.data.name: path}}
    return {
        "figures/density": figures.density_figure(cells, folder / "density.png"),
        "figures/samples": figures.sample_figure(cells, folder / "samples.png"),
    }


def _summary(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _without(cfg: DictConfig, key: str) -> DictConfig:
    from omegaconf import OmegaConf

    copy = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    copy.pop(key, None)
    return copy


def _partial(cfg: DictConfig) -> DictConfig:
    cfg["_partial_"] = True
    return cfg


def quiet_lightning() -> None:
    """Keep what Lightning says for itself out of a run's output; our own lines say what matters."""
    import logging

    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_utilities")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")


@hydra.main(config_path=conf_dir(), config_name="train", version_base="1.3")
def _main(cfg: DictConfig) -> dict[str, float]:
    with one_line_errors():  # inside Hydra, which would print lines of its own
        return train(cfg)


main = guarded(_main)

if __name__ == "__main__":
    main()
