"""Callbacks: progress, times, the average of the weights, checkpoints by the clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, WeightAveraging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from surflow.errors import check_whole
from surflow.training.module import FlowModule


class RunProgress(Callback):
    """A rich progress bar on a terminal, with the loss in its unit; else a line an epoch.

    The loss is the one the module has logged last: showing it reads nothing from the device.

    Args:
        title: what is being trained.
        interval: seconds between refreshes.
    """

    def __init__(self, title: str, interval: float = 0.2) -> None:
        self.title = title
        self.interval = interval
        self._bar: Progress | None = None
        self._task: Any = None
        self._next = 0.0
        self._epoch_start = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: FlowModule) -> None:
        self._epoch_start = time.monotonic()  # a run resumed within an epoch does not start one
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("epoch {task.fields[epoch]}  {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._bar.start()
        total = trainer.num_training_batches * (trainer.max_epochs or 1)
        done = trainer.current_epoch * trainer.num_training_batches
        self._task = self._bar.add_task(self.title, total=total, completed=done, epoch="", loss="")

    def on_train_epoch_start(self, trainer: pl.Trainer, module: FlowModule) -> None:
        self._epoch_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: FlowModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.interval
            done = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
            self._bar.update(
                self._task,
                completed=done,
                epoch=f"{trainer.current_epoch + 1}/{trainer.max_epochs}",
                loss=self._losses(module),
                refresh=True,
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: FlowModule) -> None:
        module.log_train(trainer.global_step)  # this epoch's; callbacks come before the module
        if self._bar is None and trainer.is_global_zero:
            seconds = time.monotonic() - self._epoch_start
            print(
                f"{self.title}  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  "
                f"{self._losses(module)}  {seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: pl.Trainer, module: FlowModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: FlowModule, error: BaseException) -> None:
        self._close()

    @staticmethod
    def _losses(module: FlowModule) -> str:
        """Such as "nll 3.5132 (val 3.4907) nats"; empty before the first loss."""
        if module.last_train is None:
            return ""
        estimator = module.train_key.split("/")[1].rsplit("_", 1)[0]
        val = "" if module.last_val is None else f" (val {module.last_val:.4f})"
        return f"{estimator} {module.last_train:.4f}{val} {module.unit}"


class EMA(WeightAveraging):
    """Exponential moving average of the weights, evaluated in their place.

    Up to its first update it is the weights themselves. Buffers, such as running statistics, are
    those of the last update, and not averaged.

    Args:
        decay: in (0, 1); the average reaches back about 1/(1 - decay) steps.
        every: steps between updates, each then with decay^every: the same reach for less work.
    """

    def __init__(self, decay: float, every: int = 1) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"callbacks.ema.decay: expected a number in (0, 1), got {decay}")
        check_whole("callbacks.ema.every", every)
        # buffers are copied, not averaged: a mean of infinite edges is not a number
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay**every))
        self.every = every

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: FlowModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if self._latest_update_step == 0:
            self._average_model.module.load_state_dict(module.state_dict())


class GradientNorm(Callback):
    """Log the largest norm of a gradient, before clipping, of the steps since the last line of the
    loss; that of the line's own batch is in the next one."""

    runtime = "all"  # it changes no result
    watched = ("train/gradient_norm_max",)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: FlowModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm, (key,) = torch.nn.utils.get_total_norm(gradients), self.watched
        module.watched[key] = torch.maximum(norm, module.watched.get(key, norm))


class TimedCheckpoint(Checkpoint):
    """Write a checkpoint every so many minutes, within an epoch, after an optimizer step.

    What resumes from it continues the unbroken run exactly: weights, optimizer, schedule, average,
    the place in the epoch's order and the running sum of the next logged loss are in it, and what
    layers draw follows from the place in the epoch (:class:`FlowModule`). None is written at the
    end of an epoch, which has one of its own.

    The file is last.ckpt in the trainer's folder, replaced each time.

    Args:
        minutes: between two of them, and from an epoch's start to the first; 0: at every step.
        look_every: optimizer steps between looks at the clock where several processes must agree.
        clock: seconds, as of ``time.monotonic``.

    Raises:
        ValueError: for negative minutes, or a ``look_every`` that is not positive.
    """

    runtime = "all"  # it changes no result

    def __init__(
        self,
        minutes: float,
        look_every: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not minutes >= 0:
            raise ValueError(
                f"callbacks.timed_checkpoint.minutes: expected minutes >= 0, got {minutes}"
            )
        if look_every < 1:
            raise ValueError(f"look_every: expected a positive number, got {look_every}")
        self.seconds = 60.0 * minutes
        self.look_every = look_every
        self.clock = clock
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: FlowModule) -> None:
        self._last = self.clock()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: FlowModule) -> None:
        self._last = self.clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: FlowModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        steps, rest = divmod(done, trainer.accumulate_grad_batches)
        if rest or done >= trainer.num_training_batches:
            return
        if trainer.world_size == 1:
            due = self._due()
        else:
            look = steps % self.look_every == 0
            due = look and bool(trainer.strategy.broadcast(self._due()))
        if due:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
            self._last = self.clock()

    def _due(self) -> bool:
        return self.clock() - self._last >= self.seconds


class Elapsed(Callback):
    """How long a run has taken, the earlier processes that it resumes included.

    Args:
        clock: seconds, as of ``time.monotonic``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.start = clock()
        self.fit_start: float | None = None
        self.fitted = self.train_before = self.wall_before = 0.0

    @property
    def train(self) -> float:
        """Seconds of training."""
        if self.fit_start is None:
            return self.train_before + self.fitted
        return self.train_before + self.clock() - self.fit_start

    @property
    def wall(self) -> float:
        """Seconds in all."""
        return self.wall_before + self.clock() - self.start

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.fit_start = self.clock()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.fitted = self.clock() - self.fit_start
        self.fit_start = None

    def state_dict(self) -> dict[str, float]:
        return {"train_s": self.train, "wall_s": self.wall}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.train_before, self.wall_before = state_dict["train_s"], state_dict["wall_s"]
