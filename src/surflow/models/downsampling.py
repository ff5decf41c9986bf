"""Surjections between the scales of an image flow: functions of the shape of an image.

Each takes (C, H, W) and gives layers, data side first, whose latent is a smaller image. Hydra names
one by ``_target_``, with options and ``_partial_: true``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from surflow.distributions import ChannelAutoregressive, DiagonalNormal, Exponential, StandardNormal
from surflow.distributions.base import Distribution
from surflow.transforms import MaxPool2d, Slice, Squeeze, Transform

Shape = tuple[int, ...]


def downsampling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare that a surjection stands between the scales of an image: models without such a place
    refuse it by name. One that is not declared goes where the model has its place."""
    function.between = True
    return function


@downsampling
def max_pool(
    shape: Shape,
    kernel_size: int = 2,
    learn: bool = False,
    decoder: Callable[[Shape], Distribution] | None = None,
    index_net: Callable[[int, int], nn.Module] | None = None,
) -> list[Transform]:
    """k × k max pooling: (C, H, W) -> (C, H / k, W / k).

    Args:
        shape: of the image.
        kernel_size: k >= 2, a divisor of H and W.
        learn: exponential remainders and an index with learned parameters a channel; False:
            half-normal remainders and a uniform index.
        decoder: ``decoder(shape)`` makes the distribution of the remainders, (C (k² - 1), H / k,
            W / k), on >= 0; a conditional one sees z.
        index_net: ``index_net(in_channels, out_channels)`` makes a net from z to the logits of the
            index, C -> C k² channels.

    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 5.
    """
    c, h, w = _divided(shape, kernel_size, "max_pool: kernel_size")
    k = kernel_size**2
    remainders = (c * (k - 1), h, w)
    below = None
    if decoder is not None:
        below = decoder(remainders)
    elif learn:
        below = Exponential(remainders, learn=True, parameter_shape=(remainders[0], 1, 1))
    net = None if index_net is None else index_net(c, c * k)
    return [MaxPool2d(shape, kernel_size, below, learn, net)]


@downsampling
def slice_off(shape: Shape, factor: int = 2) -> list[Transform]:
    """A squeeze, of whose f² C channels all but the first C go to a standard normal."""
    return _squeeze_and_slice(shape, factor, StandardNormal)


@downsampling
def conditional_slice(shape: Shape, factor: int = 2, kernel_size: int = 3) -> list[Transform]:
    """A squeeze, of whose f² C channels all but the first C go to a normal given the first C.

    Its parameters come from one convolution of odd ``kernel_size``, zero at the start.

    Source: Kingma & Dhariwal 2018, arXiv 1807.03039.
    """

    def normal(rest: Shape) -> Distribution:
        net = nn.Conv2d(shape[0], 2 * rest[0], kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        return DiagonalNormal(rest, net=net)

    return _squeeze_and_slice(shape, factor, normal)


@downsampling
def autoregressive_slice(shape: Shape, factor: int = 2, **options: Any) -> list[Transform]:
    """A squeeze, of whose f² C channels all but the first C go to normals channel by channel, each
    given the first C and those before it.

    Args:
        options: of :class:`~surflow.distributions.ChannelAutoregressive`.

    Source: Mahajan, Bhattacharyya et al. 2020, arXiv 2004.03891.
    """
    return _squeeze_and_slice(
        shape, factor, lambda rest: ChannelAutoregressive(rest, shape[0], **options)
    )


def _squeeze_and_slice(
    shape: Shape, factor: int, decoder: Callable[[Shape], Distribution]
) -> list[Transform]:
    c, h, w = _divided(shape, factor, "slice: factor")
    return [Squeeze(factor), Slice(decoder(((factor**2 - 1) * c, h, w)), keep=c)]


def _divided(shape: Shape, factor: int, where: str) -> Shape:
    """(C, H / f, W / f)."""
    c, h, w = shape
    if factor < 2 or h % factor or w % factor:
        raise ValueError(
            f"{where}: expected a number >= 2 that divides height and width, got {factor} for "
            f"{h} x {w}"
        )
    return c, h // factor, w // factor
