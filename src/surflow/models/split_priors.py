"""What the channels that a multi-scale flow splits off, and its last latent, are distributed as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from surflow.distributions import ChannelAutoregressive, DiagonalNormal
from surflow.distributions.base import Distribution
from surflow.errors import check_choice
from surflow.nets import ZeroConv2d

Shape = tuple[int, ...]
Prior = Callable[[Shape, int, int], Distribution]
"""``prior(shape, context_channels, scale)``: of events (C, H, W) given an image of that many
other channels, or of the last latent, where these are 0; ``scale`` counts from 0."""


def channel_normal(shape: Shape) -> DiagonalNormal:
    """A normal with a learned location and log-scale a channel, standard at the start."""
    return DiagonalNormal(shape, learn=True, parameter_shape=(shape[0], 1, 1))


def conditional(shape: Shape, context_channels: int, scale: int) -> Distribution:
    """Normals whose parameters one 3×3 convolution, zero at the start, gets from what was kept.

    Source: Kingma & Dhariwal 2018, arXiv 1807.03039.
    """
    if not context_channels:
        return channel_normal(shape)
    return DiagonalNormal(shape, net=ZeroConv2d(context_channels, 2 * shape[0]))


def autoregressive(
    shape: Shape,
    context_channels: int,
    scale: int,
    hidden_channels: int = 32,
    num_layers: int = 3,
    kernel_sizes: Sequence[int] = (5, 5, 3),
    dilations: Sequence[int] = (2, 1, 1),
) -> Distribution:
    """Normals channel by channel, each given those before it and what was kept.

    Args:
        shape, context_channels, scale: see :data:`Prior`.
        hidden_channels, num_layers: see :class:`~surflow.distributions.ChannelAutoregressive`.
        kernel_sizes, dilations: of each scale; those beyond the last entry take it.

    Raises:
        ValueError: for no kernel size or no dilation.

    Source: Mahajan, Bhattacharyya et al. 2020, arXiv 2004.03891; the authors' code.
    """
    if not kernel_sizes or not dilations:
        raise ValueError(
            "model: expected at least one of prior_kernel_sizes and of prior_dilations, got "
            f"{list(kernel_sizes)} and {list(dilations)}"
        )
    return ChannelAutoregressive(
        shape,
        context_channels,
        hidden_channels,
        num_layers,
        kernel_sizes[min(scale, len(kernel_sizes) - 1)],
        dilations[min(scale, len(dilations) - 1)],
    )


PRIORS: dict[str, Prior] = {
    "independent": lambda shape, context_channels, scale: channel_normal(shape),
    "conditional": conditional,
    "autoregressive": autoregressive,
}


def prior_called(name: str, **settings: object) -> Prior:
    """A prior by name.

    Args:
        name: a key of :data:`PRIORS`.
        settings: of the autoregressive one; the others have none, and leave them.

    Raises:
        ValueError: for an unknown name.
    """
    check_choice("model.prior", name, PRIORS)
    return partial(autoregressive, **settings) if name == "autoregressive" else PRIORS[name]
