"""Learning-rate schedules, as a factor on the optimizer's rate, stepped once per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _schedule(optimizer: Optimizer, factor: Callable[[int], float], warmup_steps: int) -> LambdaLR:
    if warmup_steps < 0:
        raise ValueError(f"schedule.warmup_steps: expected >= 0, got {warmup_steps}")
    return LambdaLR(optimizer, lambda step: _warmup(step, warmup_steps) * factor(step))


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
