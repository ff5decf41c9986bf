"""What a person sees of a run, and the average of its weights."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, WeightAveraging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.optim.swa_utils import get_ema_multi_avg_fn

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
        return f"{estimator} {module.last_train:.4f}{val} {module.objective.unit}"


class EMA(WeightAveraging):
    """Exponential moving average of the weights, evaluated in their place.

    Args:
        decay: in (0, 1); the average reaches back about 1/(1 - decay) steps.
        every: steps between updates, each then with decay^every: the same reach for less work.
    """

    def __init__(self, decay: float, every: int = 1) -> None:
        # buffers are copied, not averaged: a mean of infinite edges is not a number
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay**every))
        self.every = every

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every == 0
