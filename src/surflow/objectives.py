"""What is maximised and what is reported: pure functions of a flow and data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surflow.checks import require_at_least
from surflow.flow import Flow
from surflow.score_function import close_tape, open_tape


def elbo(flow: Flow, x: Tensor, context: Tensor | None = None, num_samples: int = 1) -> Tensor:
    r"""The evidence lower bound, or the log-likelihood where the flow is exact.

    .. math:: \mathcal L(x) = \frac1S \sum_{s=1}^S \log p(z_s) + V(x, z_s),\quad z_s \sim q(z|x)

    Its gradient is unbiased where layers draw from learned discrete distributions too.

    Args:
        flow: the model.
        x: (B, *event).
        context: (B, ...) or None.
        num_samples: S, draws averaged per row.

    Returns:
        (B,), nats.

    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 2.
    """
    values, score = _samples(flow, x, context, num_samples)
    bound = values.mean(0)
    if score is None:
        return bound
    with torch.no_grad():
        if num_samples > 1:
            signal = (values - bound) / (num_samples - 1)
        else:
            signal = _less_other_rows(values)
    return bound + (_zero_valued(score) * signal).sum(0)


def iwbo(flow: Flow, x: Tensor, context: Tensor | None = None, num_samples: int = 10) -> Tensor:
    r"""The importance-weighted bound; equal to the log-likelihood where the flow is exact.

    .. math:: \mathcal L_K(x) = \log \frac1K \sum_{k=1}^K p(z_k)\, e^{V(x, z_k)}

    Its gradient is unbiased where layers draw from learned discrete distributions too, with the
    leave-one-out baselines of Mnih & Rezende 2016, arXiv 1602.06725.

    Args:
        flow: the model.
        x: (B, *event).
        context: (B, ...) or None.
        num_samples: K.

    Returns:
        (B,), nats.

    Raises:
        ValueError: for K > 1 draws of a flow with estimated log-determinants: the mean of the
            exponential of an unbiased estimate is biased upwards, and no bound.

    Source: Burda et al. 2016, arXiv 1509.00519, Sec. 3.
    """
    check_iwbo(flow, num_samples)
    values, score = _samples(flow, x, context, num_samples)
    bound = torch.logsumexp(values, 0) - math.log(values.shape[0])
    if score is None:
        return bound
    with torch.no_grad():
        if num_samples > 1:
            signal = bound - _leave_one_out(values)
        else:
            signal = _less_other_rows(values)
    return bound + (_zero_valued(score) * signal).sum(0)


def check_iwbo(flow: Flow, num_samples: int) -> None:
    """Raise ValueError where K draws of this flow give no bound: see :func:`iwbo`."""
    if num_samples > 1 and flow.lower_bound and flow.estimated:
        raise ValueError(
            "iwbo: expected exact contributions for num_samples > 1, got a flow with estimated "
            "log-determinants; take num_samples=1, or trace='exact' in those layers"
        )


def _samples(
    flow: Flow, x: Tensor, context: Tensor | None, num_samples: int
) -> tuple[Tensor, Tensor | None]:
    """Independent draws of the bound, (K, B), and the log-probability of the discrete draws in
    them, (K, B); None where there are none to be learned. One draw of an exact flow."""
    require_at_least("elbo, iwbo", 1, num_samples=num_samples)
    if not flow.lower_bound:
        return flow.log_prob(x, context).unsqueeze(0), None
    tape = open_tape()
    try:
        values = flow.log_prob_samples(x, context, num_samples)
    finally:
        close_tape()
    learned = [log_q for log_q in tape if log_q.shape == (values.numel(),)]
    return values, sum(learned[1:], learned[0]).unflatten(0, values.shape) if learned else None


def _zero_valued(score: Tensor) -> Tensor:
    """Zero, with the gradient of ``score``."""
    return score - score.detach()


def _less_other_rows(values: Tensor) -> Tensor:
    """Each value less the mean of the other rows', which no draw of this row has touched."""
    count = values.shape[1]
    if count == 1:
        return values
    return (values - values.mean(1, keepdim=True)) * (count / (count - 1))


def _leave_one_out(values: Tensor) -> Tensor:
    """The bound with draw k's weight replaced by the geometric mean of the others, (K, B)."""
    count = values.shape[0]
    others = ~torch.eye(count, dtype=torch.bool, device=values.device)
    table = values.unsqueeze(0).expand(count, *values.shape)  # (K, K, B)
    mean = (values.sum(0) - values) / (count - 1)
    filled = torch.where(others.unsqueeze(-1), table, mean.unsqueeze(1))
    return torch.logsumexp(filled, 1) - math.log(count)


def bits_per_dim(nats: Tensor, num_dims: int) -> Tensor:
    r"""Negative log-likelihood in bits a dimension: :math:`-\log p(x) / (D \ln 2)`.

    Args:
        nats: log-likelihood (or bound) in nats, any shape.
        num_dims: D, the number of dimensions of one x.
    """
    require_at_least("bits_per_dim", 1, num_dims=num_dims)
    return -nats / (num_dims * math.log(2.0))
