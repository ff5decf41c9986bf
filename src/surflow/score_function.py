"""Gradients through discrete draws: what an objective must know of them.

A draw k ~ q(k|x) from a learned discrete distribution (a sign, an index, a permutation) has no
pathwise gradient. The layer that draws it records log q(k|x), and the objective adds the
score-function gradient, E_q[∇ log q (L - b)], with a baseline b that does not depend on the draw
(Mnih & Rezende 2016, arXiv 1602.06725). Values are not changed.
"""

from __future__ import annotations

from torch import Tensor

_tapes: list[list[Tensor]] = []


def open_tape() -> list[Tensor]:
    """Start to collect the log-probabilities of discrete draws."""
    tape: list[Tensor] = []
    _tapes.append(tape)
    return tape


def close_tape() -> None:
    """Stop collecting on the tape opened last."""
    _tapes.pop()


def record_score(log_q: Tensor) -> None:
    """Called by a layer after a discrete draw in a direction that samples.

    Args:
        log_q: log-probability of the draw, one a row, (B,), nats, differentiable in the
            parameters of q.
    """
    if _tapes and log_q.requires_grad:
        _tapes[-1].append(log_q)
