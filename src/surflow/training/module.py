"""One LightningModule for every flow: maximum likelihood, ELBO or K-sample IWBO."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from surflow.checks import check_values
from surflow.errors import UserError
from surflow.flow import Flow
from surflow.objectives import iwbo
from surflow.transforms import ActNorm


@dataclass(frozen=True)
class Objective:
    """What is maximised, and in which unit it is shown.

    Attributes:
        num_samples: K draws a point in training; 1 is the ELBO, more the IWBO. Of no effect on an
            exact flow.
        unit: "nats" (per data point) or "bpd" (bits per dimension).
        num_dims: D, for bits per dimension.
    """

    num_samples: int = 1
    unit: str = "nats"
    num_dims: int = 1

    def __post_init__(self) -> None:
        if self.unit not in ("nats", "bpd"):
            raise ValueError(f"objective.unit: expected nats or bpd, got {self.unit!r}")
        if self.num_samples < 1:
            raise ValueError(f"objective.num_samples: expected >= 1, got {self.num_samples}")

    @property
    def scale(self) -> float:
        """Nats of one data point times this is the unit."""
        return 1.0 if self.unit == "nats" else 1.0 / (self.num_dims * math.log(2.0))

    def estimator(self, flow: Flow) -> str:
        """nll, elbo or iwbo<K>: what the number is. All are shown negated: lower is better."""
        if not flow.lower_bound:
            return "nll"
        return "elbo" if self.num_samples == 1 else f"iwbo{self.num_samples}"


class FlowModule(pl.LightningModule):
    """Train a flow.

    Args:
        flow: the model.
        optimizer: parameters -> optimizer.
        schedule: (optimizer, total_steps, steps_per_epoch) -> learning-rate scheduler, stepped
            once per optimizer step.
        objective: what is maximised.
        seed: the random numbers of an epoch follow from it and the epoch's number, so that a run
            resumed at an epoch's start draws what the unbroken one drew.
        config_hash: names the config in checkpoints.
        compile: compile the loss with ``torch.compile``.
        finite_check_every: steps between checks of the loss on an accelerator, where reading it
            makes the device wait; on a CPU every step is checked.
        log_every: steps between logged training losses.
    """

    def __init__(
        self,
        flow: Flow,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., Any],
        objective: Objective | None = None,
        seed: int = 0,
        config_hash: str = "",
        compile: bool = False,
        finite_check_every: int = 50,
        log_every: int = 50,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.objective = objective or Objective()
        self.make_optimizer = optimizer
        self.make_schedule = schedule
        self.seed = seed
        self.config_hash = config_hash
        self.finite_check_every = finite_check_every
        self.log_every = log_every
        estimator = self.objective.estimator(flow)
        self.train_key = f"train/{estimator}_{self.objective.unit}"
        self.val_key = f"val/{estimator}_{self.objective.unit}"
        self._loss = torch.compile(self._eager_loss, dynamic=False) if compile else self._eager_loss
        self._sum: Tensor | None = None
        self._count = 0
        self._checked_values = False
        self.last_train: float | None = None
        self.last_val: float | None = None

    def _eager_loss(self, x: Tensor) -> Tensor:
        return -iwbo(self.flow, x, num_samples=self.objective.num_samples).mean()

    # Training ----------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.flow.parameters())
        total = int(self.trainer.estimated_stepping_batches)
        per_epoch = max(1, total // max(1, self.trainer.max_epochs or 1))
        scheduler = self.make_schedule(optimizer, total_steps=total, steps_per_epoch=per_epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_epoch_start(self) -> None:
        pl.seed_everything(
            ((self.seed << 20) + self.current_epoch * self.trainer.world_size + self.global_rank)
            % 2**32,
            verbose=False,
        )
        self._sum, self._count = None, 0

    def initialise(self, x: Tensor) -> None:
        """Let the data-dependent layers set themselves from a batch; check it value by value."""
        training = self.flow.training
        self.flow.train()
        with torch.no_grad():
            self.flow.log_prob(x)
        self.flow.train(training)

    def _whole_batch(self, batch: Tensor) -> Tensor:
        """The shares of all processes, so that each of them initialises alike."""
        if self.trainer.world_size == 1:
            return batch
        return self.all_gather(batch).flatten(0, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if not self._checked_values:
            # once, eagerly: values outside a layer's support are named here
            self._checked_values = True
            if any(isinstance(m, ActNorm) and not m.initialised for m in self.flow.modules()):
                self.initialise(self._whole_batch(batch))
            else:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    self.flow.log_prob(batch)
        with check_values(False):
            loss = self._loss(batch)
        detached = loss.detach()
        self._sum = detached if self._sum is None else self._sum + detached
        self._count += 1
        every = 1 if detached.device.type == "cpu" else self.finite_check_every
        if (batch_idx + 1) % every == 0 and not math.isfinite(self._sum.item()):
            self._stop(batch, batch_idx)
        if (batch_idx + 1) % self.log_every == 0:
            self._log_train(self.global_step + 1)  # this batch's step is still to come
        return loss * self.objective.scale

    def _log_train(self, step: int) -> None:
        if self._count:
            total = self.trainer.strategy.reduce(self._sum, reduce_op="mean")  # over processes
            self.last_train = total.item() / self._count * self.objective.scale
            lr = self.optimizers().param_groups[0]["lr"]
            self._log({self.train_key: self.last_train, "lr": lr}, step)
        self._sum, self._count = None, 0

    def _log(self, values: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=step)

    def on_train_epoch_end(self) -> None:
        self._log_train(self.global_step)

    def _stop(self, batch: Tensor, batch_idx: int) -> None:
        was_training = self.flow.training
        with check_values(False):
            layer = self.flow.first_non_finite(batch)
        self.flow.train(was_training)
        epoch = self.current_epoch
        where = f"epoch {epoch + 1}, step {batch_idx + 1}"
        kept = f"; the checkpoint of epoch {epoch} is kept" if epoch else ""
        if layer is None:
            layer = "none in a second pass over the same batch (stochastic layers draw anew)"
        raise UserError(
            f"the loss is not finite at {where}; first layer that is not finite: {layer}. "
            f"Try a smaller optimizer.lr or trainer.gradient_clip_val{kept}"
        )

    # Validation --------------------------------------------------------------------------------

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        score = iwbo(self.flow, batch, num_samples=self.objective.num_samples)
        value = -score.double().mean() * self.objective.scale
        self.log(
            self.val_key,
            value.float(),
            on_epoch=True,
            batch_size=len(batch),
            sync_dist=True,
            logger=False,  # Lightning would name the step before the one it belongs to
        )

    def on_validation_epoch_end(self) -> None:
        value = self.trainer.callback_metrics.get(self.val_key)
        self.last_val = None if value is None else float(value)
        if self.last_val is not None and not self.trainer.sanity_checking:
            self._log({self.val_key: self.last_val}, self.global_step)

    # Checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["surflow"] = {"config_hash": self.config_hash, "seed": self.seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        from surflow.training.checkpoint import check_same_config

        check_same_config(checkpoint, self.config_hash, "the checkpoint to resume from")


def can_compile() -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler, for code that runs on a CPU."""
    import os

    compiler = os.environ.get("CXX", "g++")
    return any(shutil.which(name) for name in (compiler, "g++", "clang++", "cl"))
