"""Train one run, or a sweep of them with -m; evaluate it on test; write its record."""

from __future__ import annotations

import contextlib
import fcntl
import math
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
    device_of,
    guarded,
    official_weights,
    one_line_errors,
    relative,
    use_threads,
)
from surflow.cli.result import Times, add_scores, complete_record, scores_due, summary, write_result
from surflow.config import conf_dir, config_hash, register_resolvers, resolved, run_dir
from surflow.errors import UserError

RUN_FILES = (
    "last.ckpt",
    "best.ckpt",
    "record.json",
    "metrics.csv",
    "picture.npz",
    "images.npz",
    "generation.npz",
    "reconstructions.npz",
    "latent.npz",
    "pyramid.npz",
    "points.npz",
)


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
    if record is not None and cfg.weights.path is not None:
        _check_same_weights(cfg, record)
    if record is not None and not scores_due(cfg, record):
        metrics = {name: m.value for name, m in record.metrics.items()}
        print(f"{relative(folder)}: already complete ({summary(metrics)}); run.force=true repeats")
        return metrics
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()  # before Lightning, which imports torchvision
    from surflow.cli.result import measures_of

    measures_of(cfg)  # a mistake in them shows before anything trains
    use_threads(cfg)
    with locked(folder) if first_process() else contextlib.nullcontext():
        if record is not None:
            return add_scores(cfg, folder) if first_process() else {}
        if cfg.weights.source is not None:
            return _score_released(cfg, digest, folder) if first_process() else {}
        return _train_locked(cfg, digest, folder)


def first_process() -> bool:
    """Whether this is the only process of the run, or the first of several: it keeps the folder."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return rank_zero_only.rank == 0 and node == "0"


def _train_locked(cfg: DictConfig, digest: str, folder: Path) -> dict[str, float]:
    start = time.monotonic()
    import pytorch_lightning as pl
    from hydra.utils import instantiate
    from pytorch_lightning.callbacks import ModelCheckpoint

    from surflow.memory import set_memory
    from surflow.training.callbacks import EMA, RunProgress, TimedCheckpoint
    from surflow.training.checkpoint import (
        AtomicCheckpointIO,
        check_same_config,
        flow_state,
        load_checkpoint,
        resume_point,
    )
    from surflow.training.logging import CSVMetrics, Elapsed, run_name, wandb_logger
    from surflow.training.module import Annealing, FlowModule, Objective
    from surflow.training.record import commit

    quiet_lightning()
    commit()  # of the code that runs, whatever is there when it ends
    if cfg.run.force and first_process():
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
    plain = resolved(cfg)
    data = build_data(cfg)
    flow = build_flow(cfg, data)
    o = cfg.objective
    objective = Objective(
        o.num_samples,
        o.unit,
        math.prod(data.event_shape),
        Annealing(o.annealed, o.beta_start, o.beta_steps, o.free_bits),
    )
    compiled = what_to_compile(cfg)
    on_gpu = device_of(cfg).type == "cuda"
    channels_last = on_gpu if cfg.trainer.channels_last == "auto" else cfg.trainer.channels_last
    set_memory(flow, cfg.trainer.memory, compile_nets=compiled == "nets")
    module = FlowModule(
        flow,
        optimizer=instantiate(_without(cfg.optimizer, "name")),
        schedule=instantiate(_partial(_without(cfg.schedule, "name"))),
        objective=objective,
        seed=cfg.seed,
        config_hash=digest,
        compile=compiled == "loss",
        finite_check_every=cfg.trainer.finite_check_every,
        log_every=cfg.trainer.log_every,
        channels_last=channels_last and len(data.event_shape) == 3,
    )
    last = folder / "last.ckpt"
    resumed_step = 0
    if last.is_file():
        checkpoint = load_checkpoint(last)
        check_same_config(checkpoint, digest, relative(last))
        resumed_step = int(checkpoint["global_step"])
        if first_process():
            print(f"{relative(folder)}: resuming {resume_point(checkpoint)}", file=sys.stderr)
    csv = CSVMetrics(folder / "metrics.csv", [module.train_key, module.val_key, "lr"])
    loggers: list[Any] = [csv]
    if cfg.logger.name == "wandb":
        loggers.append(wandb_logger(plain, folder, digest))
    title = f"{run_name(plain)} {cfg.data.name} seed {cfg.seed}"
    saving: dict[str, Any] = {
        "dirpath": folder,
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    elapsed = Elapsed(start)
    callbacks: list[Any] = [
        RunProgress(title),
        elapsed,
        # its own save_last skips the epochs that are not the best: so two of them, best first
        ModelCheckpoint(filename="best", monitor=module.val_key, **saving),
        ModelCheckpoint(filename="last", **saving),
    ]
    if cfg.trainer.checkpoint_minutes is not None:
        callbacks.append(TimedCheckpoint(last, cfg.trainer.checkpoint_minutes))
    if cfg.trainer.ema_decay is not None:
        # before the checkpoint, so that what is saved is this epoch's average
        callbacks.insert(2, EMA(cfg.trainer.ema_decay, cfg.trainer.ema_every))
    trainer = pl.Trainer(
        max_epochs=cfg.trainer.max_epochs,
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=cfg.trainer.strategy,
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
    elapsed.fit_start = time.monotonic()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None)
    except SystemExit:  # what Lightning makes of ctrl-c
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    train_time = elapsed.train
    if trainer.interrupted:
        raise KeyboardInterrupt
    if not trainer.is_global_zero:
        return {}
    set_memory(flow, "stored")
    # what is scored is what the checkpoint holds, also where there was nothing left to train
    flow.load_state_dict(flow_state(load_checkpoint(folder / f"{cfg.trainer.scored}.ckpt")))
    flow.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
    times = Times(start, train_time, elapsed.wall_before)
    return write_result(cfg, digest, folder, flow, data, times, loggers)


def what_to_compile(cfg: DictConfig) -> str | None:
    """The whole "loss", only the couplings' "nets", or None.

    Of images and sets, and where stretches are inverted on the way back, it is the nets: they are
    what is heavy there, those of equal shape are compiled once, and the whole loss takes minutes.
    """
    from surflow.training.module import can_compile

    wanted = cfg.trainer.compile
    if wanted is False:
        return None
    if not can_compile():
        if wanted == "auto":
            return None
        raise UserError(
            f"trainer.compile={str(wanted).lower()}: no C++ compiler found; "
            "use trainer.compile=auto"
        )
    nets = len(cfg.data.event_shape) > 1 or cfg.trainer.memory == "reversible"
    return "nets" if wanted == "nets" or (wanted == "auto" and nets) else "loss"


def _score_released(cfg: DictConfig, digest: str, folder: Path) -> dict[str, float]:
    """Score the weights that somebody else has trained and released."""
    start = time.monotonic()
    data = build_data(cfg)
    flow = build_flow(cfg, data)
    weights = official_weights(cfg, flow)
    flow.to(device_of(cfg))
    return write_result(cfg, digest, folder, flow, data, Times(start, 0.0), weights=weights)


def _check_same_weights(cfg: DictConfig, record: Any) -> None:
    """Refuse released weights that are not those of the record: its hash does not see their file.

    Raises:
        UserError: where the file is another one, or is missing.
    """
    from surflow.models.official import find_checkpoint, sha256_of

    path = find_checkpoint(cfg.weights.path, cfg.data.name, cfg.surjection.name)
    if sha256_of(path) != record.weights.get("sha256"):
        raise UserError(
            f"weights.path: {relative(path)} is not the file that {relative(record.path)} is of; "
            "run.force=true scores it in its place"
        )


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
