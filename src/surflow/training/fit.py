"""Training one run with Lightning: its module, callbacks, loggers and checkpoints put together."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from surflow.config import build
from surflow.files import relative
from surflow.flow import Flow
from surflow.memory import set_memory
from surflow.training.callbacks import Elapsed, RunProgress
from surflow.training.checkpoint import (
    AtomicCheckpointIO,
    check_same_run,
    flow_state,
    load_checkpoint,
    resume_point,
)
from surflow.training.hardware import what_to_compile
from surflow.training.loggers import CSVMetrics
from surflow.training.module import FlowModule

if TYPE_CHECKING:
    from surflow.training.run import Run

FILES = (
    "last.ckpt",
    "best.ckpt",
    "record.json",
    "scores.npz",
    "metrics.csv",
    "picture.npz",
    "images.npz",
    "generation.npz",
    "reconstructions.npz",
    "latent.npz",
    "pyramid.npz",
    "points.npz",
)
"""Files of a run that a repetition replaces."""


FIXED = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}
"""Lightning's options that every run has."""

TRAINER_GIVEN = ("callbacks", "logger", "profiler", "plugins", "default_root_dir", *FIXED)
"""Lightning's options that a run sets itself."""


def fit(run: Run, times: Elapsed) -> Flow | None:
    """Train a run to its last epoch, from its last checkpoint where there is one.

    Args:
        run: not yet trained.
        times: counts the seconds.

    Returns:
        the flow on its device with the weights to be scored; None in a process other than the
        first.
    """
    quiet_lightning()
    module = flow_module(run)
    watched = [key for callback in run.callbacks for key in getattr(callback, "watched", ())]
    columns = [module.train_key, module.val_key, "lr", *watched]
    csv = CSVMetrics(run.folder / "metrics.csv", columns)
    last = run.folder / "last.ckpt"
    csv.start(_resumed_step(run, last))
    trainer = make_trainer(run, module, times, csv)
    try:
        trainer.fit(module, datamodule=run.data, ckpt_path=str(last) if last.is_file() else None)
    except SystemExit:  # what Lightning makes of ctrl-c
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    if not trainer.is_global_zero:
        return None
    set_memory(module.flow, "stored")
    # what is scored is what the checkpoint holds, also where there was nothing left to train
    state = load_checkpoint(run.folder / f"{run.objective.scored}.ckpt")
    module.flow.load_state_dict(flow_state(state))
    return module.flow.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU


def flow_module(run: Run) -> FlowModule:
    """The LightningModule of a run."""
    flow, compute = run.build_flow(), run.config["compute"]
    shape = run.data.event_shape
    compiled = what_to_compile(compute, len(shape))
    channels_last = compute["channels_last"]
    if channels_last == "auto":
        channels_last = run.device.type == "cuda"
    set_memory(flow, compute["memory"], compile_nets=compiled == "nets")
    return FlowModule(
        flow,
        optimizer=build(run.config["optimizer"]),
        schedule=build(run.config["schedule"]),
        objective=run.objective,
        unit=run.unit,
        num_dims=math.prod(shape),
        seed=run.seed,
        config_hash=run.hash,
        data_digest=run.data_digest(),
        compile=compiled == "loss",
        finite_check_every=compute["finite_check_every"],
        channels_last=channels_last and len(shape) == 3,
    )


def make_trainer(run: Run, module: FlowModule, times: Elapsed, csv: CSVMetrics) -> pl.Trainer:
    """Lightning's trainer with the callbacks and loggers of the config, and the run's own."""
    saving: dict[str, Any] = {
        "dirpath": run.folder,
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    row, data = run.config["row"], run.data.name
    callbacks = [
        RunProgress(f"{row} {data} seed {run.seed}"),
        times,
        # those of the config come first: a checkpoint holds this epoch's average
        *run.callbacks,
        # its own save_last skips the epochs that are not the best: so two of them, best first
        ModelCheckpoint(filename="best", monitor=module.val_key, **saving),
        ModelCheckpoint(filename="last", **saving),
    ]
    return build(
        run.config["trainer"],
        callbacks=callbacks,
        logger=[csv, *run.loggers],
        profiler=build(run.config["profiler"]),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run.folder),
        **FIXED,
    )


def _resumed_step(run: Run, last: Path) -> int:
    """The optimizer steps that the last checkpoint has; 0 without one."""
    if not last.is_file():
        return 0
    checkpoint = load_checkpoint(last)
    check_same_run(checkpoint, run.hash, run.data_digest(), relative(last))
    print(f"{relative(run.folder)}: resuming {resume_point(checkpoint)}", file=sys.stderr)
    return int(checkpoint["global_step"])


def quiet_lightning() -> None:
    """Keep Lightning's own messages out of a run's output."""
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_utilities")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
