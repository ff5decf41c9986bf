"""One LightningModule for every flow: maximum likelihood, ELBO or K-sample IWBO."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from surflow.checks import check_values
from surflow.draws import seed_draws
from surflow.errors import UserError, named_errors
from surflow.flow import Flow
from surflow.memory import use_channels_last
from surflow.objectives import iwbo
from surflow.training.checkpoint import check_same_run
from surflow.training.objective import Objective, scale_of
from surflow.training.running import RunningMean
from surflow.variational import annealed_elbo, has_vae_layer

_START, _TRAINING, _VALIDATION = range(3)  # what random numbers are drawn for


class FlowModule(pl.LightningModule):
    """Train a flow.

    What a layer draws follows from the seed, the epoch, the batch's number in it and the process,
    and from nothing before it: a run that goes on from a checkpoint, at the end of an epoch or
    within one, draws what the unbroken one drew. In validation it follows from the seed and the
    rows alone, each epoch alike, so that epochs are compared on the same draws, whatever the
    number of processes.

    The gradient of a step is that of the mean loss over all rows of the step: the same for one
    large batch, several accumulated ones (an incomplete last group too), and shares of several
    processes. What layers draw differs between these; with given draws the steps are equal. Batch
    normalisation in training is the exception: it takes its statistics from the rows that one
    process has at once. Validation then has the first process's running ones, in every process.

    Args:
        flow: the model.
        optimizer: parameters -> optimizer.
        schedule: (optimizer, total_steps, steps_per_epoch) -> learning-rate scheduler, stepped
            once per optimizer step.
        objective: what is maximised.
        unit: of what is logged: nats (a data point) or bpd (bits a dimension).
        num_dims: D, for bits a dimension.
        seed: of what the layers draw, >= 0.
        config_hash: names the config in checkpoints.
        data_digest: SHA-256 of each split, for checkpoints; empty where the config says all.
        compile: compile the loss with ``torch.compile``.
        finite_check_every: steps between checks of the loss on an accelerator, where reading it
            makes the device wait; on a CPU every step is checked.
        channels_last: lay out images, and the weights of convolutions, with the channels last.
    """

    def __init__(
        self,
        flow: Flow,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., Any],
        objective: Objective | None = None,
        unit: str = "nats",
        num_dims: int = 1,
        seed: int = 0,
        config_hash: str = "",
        data_digest: Mapping[str, str] | None = None,
        compile: bool = False,
        finite_check_every: int = 50,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.objective = objective or Objective()
        if self.objective.anneals and not has_vae_layer(flow):
            raise ValueError(
                "objective.beta_steps, objective.free_bits: expected a model with a VAE layer, got "
                "one without"
            )
        self.flow = use_channels_last(flow) if channels_last else flow
        self.channels_last = channels_last
        self.unit, self.scale = unit, scale_of(unit, num_dims)
        self.make_optimizer = optimizer
        self.make_schedule = schedule
        self.seed = seed
        self.config_hash = config_hash
        self.finite_check_every = finite_check_every
        self.data_digest = dict(data_digest or {})
        estimator = self.objective.estimator(flow)
        changed = "annealed_" if self.objective.anneals else ""
        self.train_key = f"train/{changed}{estimator}_{self.unit}"
        self.val_key = f"val/{estimator}_{self.unit}"
        self._loss = torch.compile(self._eager_loss, dynamic=False) if compile else self._eager_loss
        self.train_mean = RunningMean()  # since the last log line
        self.val_mean = RunningMean(torch.float64)
        self.watched: dict[str, Tensor] = {}  # of callbacks: logged with the loss, then forgotten
        self._checked_values = False
        self.last_train: float | None = None
        self.last_val: float | None = None

    def _eager_loss(self, x: Tensor, beta: Tensor | None = None) -> Tensor:
        if beta is None:
            return -iwbo(self.flow, x, num_samples=self.objective.num_samples).mean()
        how = self.objective
        return -annealed_elbo(
            self.flow, x, beta=beta, free_bits=how.free_bits, annealed=how.annealed
        ).mean()

    def _beta(self) -> tuple[Tensor, ...]:
        """The loss's second argument, none where nothing is annealed: a tensor, so that one
        compiled loss does for all steps."""
        if not self.objective.anneals:
            return ()
        value = self.objective.beta(self.global_step)
        return (torch.full((), value, device=self.device),)

    # Training ----------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        with named_errors("optimizer"):
            optimizer = self.make_optimizer(self._parameters_with_rates())
        total = int(self.trainer.estimated_stepping_batches)
        start = max(group.get("start", 0) for group in optimizer.param_groups)
        if start >= total:
            raise ValueError(
                f"model.posterior_start: expected fewer than the {total} optimizer steps of the "
                f"run, got {start}"
            )
        per_epoch = max(1, total // max(1, self.trainer.max_epochs or 1))
        with named_errors("schedule"):
            scheduler = self.make_schedule(optimizer, total_steps=total, steps_per_epoch=per_epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _parameters_with_rates(self) -> Iterable[Any]:
        """The flow's parameters, in groups where its parts have learning rates of their own."""
        groups = getattr(self.flow, "parameter_groups", None)
        option = inspect.signature(self.make_optimizer).parameters.get("lr")
        known = option is not None and isinstance(option.default, int | float)
        return groups(option.default) if groups is not None and known else self.flow.parameters()

    def on_train_epoch_start(self) -> None:
        self.train_mean.reset()

    def _laid_out(self, batch: Tensor) -> Tensor:
        if self.channels_last and batch.dim() == 4:
            return batch.contiguous(memory_format=torch.channels_last)
        return batch

    def initialise(self, x: Tensor) -> None:
        """Let the data-dependent layers set themselves from a batch; check it value by value."""
        training = self.flow.training
        self.flow.train()
        with torch.no_grad():
            self.flow.log_prob(x)
        self.flow.train(training)

    def _whole_batch(self, batch: Tensor) -> Tensor:
        """The shares of all processes, so that each of them initialises alike."""
        return self._gathered(batch).flatten(0, 1)

    def _gathered(self, value: Tensor) -> Tensor:
        """A tensor of every process, stacked: (processes, *shape)."""
        parts = [torch.empty_like(value) for _ in range(self.trainer.world_size)]
        if len(parts) == 1:
            return value.unsqueeze(0)
        torch.distributed.all_gather(parts, value)
        return torch.stack(parts)

    def _first_batch(self, batch: Tensor) -> None:
        """Once, eagerly: values outside a layer's support are named here."""
        seed_draws(self.device, _START, self.seed)  # the same draws in every process
        if any(not getattr(m, "initialised", True) for m in self.flow.modules()):
            self.initialise(self._whole_batch(batch))
            return
        kept = [b.clone() for b in self.flow.buffers()]  # running statistics would move
        with torch.no_grad():
            self.flow.log_prob(batch)
            for buffer, value in zip(self.flow.buffers(), kept, strict=True):
                buffer.copy_(value)

    def _group_share(self, batch_idx: int) -> float:
        """Lightning divides by the batches that a step accumulates; fewer may be left for the last
        step of an epoch, and this makes up for it."""
        group = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % group
        return group / min(group, self.trainer.num_training_batches - first)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.flow.at_step(self.global_step)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = self._laid_out(batch)
        if not self._checked_values:
            self._checked_values = True
            self._first_batch(batch)
        place = self.seed, self.current_epoch, batch_idx, self.global_rank
        seed_draws(self.device, _TRAINING, *place)
        with check_values(False):
            loss = self._loss(batch, *self._beta())
        self.train_mean.update(loss.detach())
        every = 1 if loss.device.type == "cpu" else self.finite_check_every
        if (batch_idx + 1) % every == 0 and not math.isfinite(self.train_mean.total.item()):
            self._stop(batch, batch_idx)
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:
            self.log_train(self.global_step + 1)  # this batch's step is still to come
        return loss * (self.scale * self._group_share(batch_idx))

    def log_train(self, step: int) -> None:
        if self.train_mean.update_called:
            self.last_train = self.train_mean.compute() * self.scale
            lr = self.optimizers().param_groups[0]["lr"]
            watched = {key: value.item() for key, value in self.watched.items()}
            self._log({self.train_key: self.last_train, "lr": lr, **watched}, step)
            self.watched.clear()
        self.train_mean.reset()

    def _log(self, values: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=step)

    def on_train_epoch_end(self) -> None:
        self.log_train(self.global_step)

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

    def on_validation_epoch_start(self) -> None:
        self.val_mean.reset()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if len(batch) == 0:  # this process's share of the last blocks may be none
            return
        block = batch_idx * self.trainer.world_size + self.global_rank
        seed_draws(self.device, _VALIDATION, self.seed, block)
        score = iwbo(self.flow, self._laid_out(batch), num_samples=self.objective.num_samples)
        self.val_mean.update(score.double().sum(), len(batch))

    def on_validation_epoch_end(self) -> None:
        mean = -self.val_mean.compute() * self.scale
        self.last_val = torch.tensor(mean, dtype=torch.float32).item()
        # for the choice of the best checkpoint; Lightning's loggers would name an earlier step
        self.log(self.val_key, self.last_val, logger=False)
        if not self.trainer.sanity_checking:
            self._log({self.val_key: self.last_val}, self.global_step)

    # Checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own: dict[str, Any] = {
            "config_hash": self.config_hash,
            "data": self.data_digest,
            "seed": self.seed,
        }
        mean = self.train_mean
        if mean.update_called:  # within an epoch: every process's sum since the last log line
            sums = self._gathered(mean.total)
            own["running"] = {"sums": sums.cpu(), "count": int(mean.count)}
        checkpoint["surflow"] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_run(
            checkpoint, self.config_hash, self.data_digest, "the checkpoint to resume from"
        )
        running = checkpoint["surflow"].get("running")
        if running is not None:
            sums = running["sums"].to(self.device)
            same = len(sums) == self.trainer.world_size
            total = sums[self.global_rank] if same else sums.mean()
            self.train_mean.update(total, int(running["count"]))
