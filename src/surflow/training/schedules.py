"""Learning-rate schedules, as a factor on the optimizer's rate, stepped once per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _of_groups(optimizer: Optimizer, factor: Callable[[int], float]) -> LambdaLR:
    """The factor on the rate of every group; 0 before the step that a group's ``start`` names."""

    def begun(start: int) -> Callable[[int], float]:
        return lambda step: factor(step) if step >= start else 0.0

    return LambdaLR(optimizer, [begun(group.get("start", 0)) for group in optimizer.param_groups])


def _schedule(optimizer: Optimizer, factor: Callable[[int], float], warmup_steps: int) -> LambdaLR:
    if warmup_steps < 0:
        raise ValueError(f"schedule.warmup_steps: expected >= 0, got {warmup_steps}")
    return _of_groups(optimizer, lambda step: _warmup(step, warmup_steps) * factor(step))


def constant(
    optimizer: Optimizer, total_steps: int, steps_per_epoch: int, warmup_steps: int = 0
) -> LambdaLR:
    """A constant rate after a linear warm-up."""
    return _schedule(optimizer, lambda step: 1.0, warmup_steps)


def cosine(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: int,
    warmup_steps: int = 0,
    final: float = 0.0,
) -> LambdaLR:
    """Half a cosine from 1 to ``final`` over the run, after a linear warm-up."""
    if not 0 <= final <= 1:
        raise ValueError(f"schedule.final: expected 0 <= final <= 1, got {final}")

    def factor(step: int) -> float:
        share = min(1.0, step / max(1, total_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))

    return _schedule(optimizer, factor, warmup_steps)


def exponential(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: int,
    gamma: float,
    warmup_steps: int = 0,
) -> LambdaLR:
    """gamma to the power of the number of epochs done, after a linear warm-up."""
    if not 0 < gamma <= 1:
        raise ValueError(f"schedule.gamma: expected 0 < gamma <= 1, got {gamma}")
    return _schedule(optimizer, lambda step: gamma ** (step // steps_per_epoch), warmup_steps)


def staged(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: int,
    gamma: float,
    warmup_steps: int,
    main_epochs: int,
    cooldown_lr: float | None,
    warmup_overwrites_decay: bool,
) -> LambdaLR:
    r"""Warm-up by step and decay by epoch in a main phase, then a constant rate to cool down.

    .. math:: \mathrm{lr}_t = \mathrm{lr} \cdot \min(1, t / W) \cdot \gamma^{e_t}, \quad
              e_t = \lfloor t / S \rfloor < E; \qquad \mathrm{lr}_t = \mathrm{lr}_c
              \text{ from epoch } E

    t counts the optimizer steps done, so the first one has rate 0; S are the steps of an epoch.
    With ``warmup_overwrites_decay`` the factor of the decay is gamma in the first step of an epoch
    after the first one, and 1 in every other step. This is what a scheduler does that
    multiplies the current rate by gamma after an epoch, together with one that sets it to
    lr min(1, t/W) after every step: so the official code ran, and the published models trained
    at a constant rate.

    Args:
        optimizer: its rate is lr.
        total_steps: of the run, main phase and cooldown.
        steps_per_epoch: S.
        gamma: in (0, 1].
        warmup_steps: W, fewer than the steps of the main phase; 0 for none.
        main_epochs: E; the epochs left of the run are the cooldown.
        cooldown_lr: lr_c; None where no epoch is left.
        warmup_overwrites_decay: see above.

    Raises:
        ValueError: for a parameter out of range, a main phase that is longer than the run or
            shorter than its warm-up, or a cooldown without a rate.

    Source: Nielsen et al. 2020, arXiv 2007.02731, image experiments and their official code.
    """
    epochs = total_steps // steps_per_epoch
    if not 0 < gamma <= 1:
        raise ValueError(f"schedule.gamma: expected 0 < gamma <= 1, got {gamma}")
    if not 1 <= main_epochs <= epochs:
        raise ValueError(
            f"schedule.main_epochs: expected 1 to the {epochs} epochs of the run, got {main_epochs}"
        )
    main_steps = main_epochs * steps_per_epoch
    if not 0 <= warmup_steps < main_steps:
        raise ValueError(
            f"schedule.warmup_steps: expected 0 to {main_steps - 1}, fewer than the steps of the "
            f"main phase, got {warmup_steps}"
        )
    if main_epochs < epochs and (cooldown_lr is None or not cooldown_lr > 0):
        raise ValueError(
            f"schedule.cooldown_lr: expected a positive rate for the {epochs - main_epochs} "
            f"epochs after schedule.main_epochs, got {cooldown_lr}"
        )
    base = optimizer.param_groups[0]["lr"]

    def factor(step: int) -> float:
        epoch, within = divmod(step, steps_per_epoch)
        if epoch >= main_epochs and cooldown_lr is not None:
            return cooldown_lr / base
        warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        if warmup_overwrites_decay:
            return warm * (gamma if within == 0 and epoch > 0 else 1.0)
        return warm * gamma**epoch

    return _of_groups(optimizer, factor)
