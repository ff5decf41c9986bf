"""What a layer asks of a net that gives it parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surflow.transforms.base import Transform, run_net


def net_output(
    layer: Transform,
    net: nn.Module,
    value: Tensor,
    context: Tensor | None,
    shape: tuple[int, ...],
    method: str,
) -> Tensor:
    """The net's output on ``value`` (and the context if it reads one), float32 or better.

    Args:
        layer: whose net it is, for messages.
        net: the net.
        value: x or z, (B, ...).
        context: (B, ...), or None.
        shape: what must come out, with the batch.
        method: forward or inverse, for messages.

    Raises:
        ValueError: for an output of another shape, or a context that is missing.
    """
    out = run_net(net, value, context, layer.where(method))
    if tuple(out.shape) != shape:
        raise ValueError(
            f"{layer.where(method)}: expected the net to give shape {shape}, got {tuple(out.shape)}"
        )
    return out.to(torch.promote_types(value.dtype, torch.float32))
