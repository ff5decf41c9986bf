"""What is maximised and what is reported: pure functions of a flow and data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surflow.flow import Flow


def elbo(flow: Flow, x: Tensor, context: Tensor | None = None, num_samples: int = 1) -> Tensor:
    r"""The evidence lower bound, or the log-likelihood where the flow is exact.

    .. math:: \mathcal L(x) = \frac1S \sum_{s=1}^S \log p(z_s) + V(x, z_s),\quad z_s \sim q(z|x)

    Args:
        flow: the model.
        x: (B, *event).
        context: (B, ...) or None.
        num_samples: S, draws averaged per row.

    Returns:
        (B,), nats.

    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 2.
    """
    if flow.lower_bound is False or num_samples == 1:
        if num_samples < 1:
            raise ValueError(f"elbo: expected num_samples >= 1, got {num_samples}")
        return flow.log_prob(x, context)
    return _samples(flow, x, context, num_samples).mean(0)


def iwbo(flow: Flow, x: Tensor, context: Tensor | None = None, num_samples: int = 10) -> Tensor:
    r"""The importance-weighted bound; equal to the log-likelihood where the flow is exact.

    .. math:: \mathcal L_K(x) = \log \frac1K \sum_{k=1}^K p(z_k)\, e^{V(x, z_k)}

    Args:
        flow: the model.
        x: (B, *event).
        context: (B, ...) or None.
        num_samples: K.

    Returns:
        (B,), nats.

    Source: Burda et al. 2016, arXiv 1509.00519, Sec. 3.
    """
    if not flow.lower_bound:
        return flow.log_prob(x, context)
    return torch.logsumexp(_samples(flow, x, context, num_samples), 0) - math.log(num_samples)


def _samples(flow: Flow, x: Tensor, context: Tensor | None, num_samples: int) -> Tensor:
    """Independent draws of the bound, (K, B)."""
    if num_samples < 1:
        raise ValueError(f"expected num_samples >= 1, got {num_samples}")
    x = x.expand(num_samples, *x.shape).flatten(0, 1)
    if context is not None:
        context = context.expand(num_samples, *context.shape).flatten(0, 1)
    return flow.log_prob(x, context).unflatten(0, (num_samples, -1))


def bits_per_dim(nats: Tensor, num_dims: int) -> Tensor:
    r"""Negative log-likelihood in bits a dimension: :math:`-\log p(x) / (D \ln 2)`.

    Args:
        nats: log-likelihood (or bound) in nats, any shape.
        num_dims: D, the number of dimensions of one x.
    """
    if num_dims < 1:
        raise ValueError(f"bits_per_dim: expected num_dims >= 1, got {num_dims}")
    return -nats / (num_dims * math.log(2.0))
