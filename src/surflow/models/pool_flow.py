"""PoolFlow: a multi-scale flow of images around any downsampling surjection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from surflow.checks import require_at_least
from surflow.distributions.base import Distribution
from surflow.draws import apart
from surflow.errors import check_choice
from surflow.flow import Flow, FlowDistribution
from surflow.models.contract import SurjectionError, takes
from surflow.models.downsampling import Shape, max_pool
from surflow.models.glow import image_shape
from surflow.models.split_priors import channel_normal
from surflow.nets import DenseNet, ImageEmbedding
from surflow.transforms import (
    ActNorm,
    Affine,
    AffineCoupling,
    Conv1x1,
    Dequantization,
    Inverse,
    Sequential,
    Sigmoid,
    Squeeze,
    Transform,
    Unsqueeze,
)

Downsampling = Callable[[Shape], Transform | Sequence[Transform]]
"""Layers that take images of the shape (C, H, W) to smaller ones."""

DEQUANTIZATIONS = ("uniform", "variational")


def dense_nets(*sizes: int) -> Callable[[int, int], DenseNet]:
    """``net(in_channels, out_channels)`` makes a :class:`DenseNet` of these sizes, in its order."""
    return lambda *channels: DenseNet(*channels, *sizes, zero_init=True)


def coupling_steps(
    channels: int,
    num_steps: int,
    net: Callable[..., DenseNet],
    actnorm: bool = False,
) -> list[Transform]:
    """Steps of ([activation normalisation,] 1×1 convolution, affine coupling).

    Args:
        channels: C.
        num_steps: how many.
        net: ``net(in_channels, out_channels)`` makes a coupling's net.
        actnorm: whether a step begins with an activation normalisation.

    Raises:
        ValueError: for a single channel, which no coupling can part.
    """
    if channels < 2:
        raise ValueError(f"model: expected at least 2 channels for a coupling, got {channels}")
    seen = channels // 2
    layers: list[Transform] = []
    for _ in range(num_steps):
        if actnorm:
            layers.append(ActNorm(channels))
        layers.append(Conv1x1(channels))
        layers.append(AffineCoupling(net(seen, 2 * (channels - seen)), scale="tanh_exp"))
    return layers


def _squeezed(shape: Shape) -> Shape:
    """(4 C, H / 2, W / 2)."""
    c, h, w = shape
    if h % 2 or w % 2:
        raise ValueError(f"model.shape: expected an even height and width, got {h} x {w}")
    return 4 * c, h // 2, w // 2


def flow_noise(
    shape: Sequence[int],
    num_steps: int = 4,
    context_channels: int = 32,
    mid_channels: int = 64,
    depth: int = 10,
    growth: int = 64,
    gated: bool = True,
    num_blocks: int = 1,
) -> FlowDistribution:
    """A flow on the unit box given an image: the noise of variational dequantization.

    base -> steps of (1×1 convolution, coupling given the context) -> 1×1 convolution -> unsqueeze
    -> sigmoid, in the direction that draws. The context is an :class:`ImageEmbedding` of the image.

    Args:
        shape: (C, H, W), H and W even.
        num_steps: number of steps.
        context_channels: channels of the context.
        mid_channels, depth, growth, gated, num_blocks: of the couplings' :class:`DenseNet`.

    Raises:
        ValueError: for an odd height or width.

    Source: Ho et al. 2019, arXiv 1902.00275, Sec. 3.1; as built by Nielsen et al. 2020, arXiv
    2007.02731.
    """
    latent = _squeezed(shape)
    net = dense_nets(mid_channels, depth, growth, gated, num_blocks, context_channels)
    steps = coupling_steps(latent[0], num_steps, net)
    draws = Sequential([*steps, Conv1x1(latent[0]), Unsqueeze(), Sigmoid()])
    embed = ImageEmbedding(shape[0], context_channels, mid_channels, gated=gated)
    return FlowDistribution(Flow(channel_normal(latent), Inverse(draws)), shape, embed=embed)


def _between_scales(
    downsampling: Downsampling, shape: Shape, where: str
) -> tuple[list[Transform], Shape]:
    """The layers between two scales, and the shape of what comes out of them."""
    try:
        with apart():
            made = downsampling(shape)
    except ValueError as error:
        raise ValueError(
            f"model.shape: expected a height and width for {where}: {error}"
        ) from error
    layers = [made] if isinstance(made, Transform) else list(made)
    after = layers[-1]._shape_of_latent()
    if after is None or None in after:
        with torch.no_grad():
            after = Sequential(layers)(torch.zeros(1, *shape))[0].shape[1:]
    if len(after) != 3 or after[1] * after[2] >= shape[1] * shape[2]:
        raise SurjectionError(
            "needs layers that make an image smaller, such as max_pool or slice, got "
            f"{tuple(after)} of {tuple(shape)}"
        )
    return layers, tuple(after)


@takes("image", facts=("shape", "num_levels"), surjection="downsampling", between=True)
def pool_flow(
    shape: Sequence[int] = (3, 32, 32),
    downsampling: Downsampling = max_pool,
    num_levels: int = 256,
    num_scales: int = 2,
    num_steps: int = 12,
    mid_channels: int = 64,
    depth: int = 10,
    growth: int = 64,
    gated: bool = True,
    num_blocks: int = 1,
    dequantization: str = "variational",
    dequant_steps: int = 4,
    context_channels: int = 32,
    actnorm: bool = False,
) -> Flow:
    """Dequantization -> shift by -1/2 -> squeeze -> steps, and between scales a surjection -> base.

    A step is a 1×1 convolution and an affine coupling with a :class:`DenseNet`. The base has a
    learned location and scale a channel. At the published sizes, which are the defaults,
    105.02 million parameters whatever of max pooling and slicing lies between the scales.

    Args:
        shape: (C, H, W), H and W divisible by 2 and by what each downsampling divides them.
        downsampling: ``f(shape)`` gives the layers between two scales for latents (C, H, W), one
            transform or several; see :mod:`surflow.models.downsampling`.
        num_levels: K: data are integers 0 ... K - 1.
        num_scales, num_steps: scales, and steps a scale.
        mid_channels, depth, growth, gated, num_blocks: of the couplings' :class:`DenseNet`.
        dequantization: "uniform" or "variational" (:func:`flow_noise`).
        dequant_steps, context_channels: of the variational dequantizer.
        actnorm: an activation normalisation at the start of each step, and one at the end.

    Returns:
        A flow over integer images (B, C, H, W), a lower bound through the dequantization.

    Raises:
        ValueError: for an unknown name, sizes that are not positive, or an image that cannot be
            made smaller so often.

    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 5 and image experiments.

    >>> flow = pool_flow((3, 8, 8), num_steps=1, mid_channels=8, depth=1, growth=4)
    >>> x = torch.randint(256, (2, 3, 8, 8))
    >>> tuple(flow.encode(x).shape), tuple(flow.sample(5).shape)
    ((2, 12, 2, 2), (5, 3, 8, 8))
    """
    shape = image_shape(shape, num_scales, 0)
    require_at_least("model.", 1, num_scales=num_scales)
    require_at_least("model.", 2, num_levels=num_levels)
    require_at_least("model.", 0, num_steps=num_steps, dequant_steps=dequant_steps)
    now = _squeezed(shape)
    check_choice("model.dequantization", dequantization, DEQUANTIZATIONS)
    sizes = (mid_channels, depth, growth, gated, num_blocks)
    net = dense_nets(*sizes)
    noise: Distribution | None = None
    if dequantization == "variational":
        noise = flow_noise(shape, dequant_steps, context_channels, *sizes)
    layers = [Dequantization(num_levels, noise), Affine(shape, shift=-0.5), Squeeze()]
    where = f"{num_scales} scales, got {shape[1]} x {shape[2]}"
    for scale in range(num_scales):
        layers += coupling_steps(now[0], num_steps, net, actnorm)
        if scale < num_scales - 1:
            smaller, now = _between_scales(downsampling, now, where)
            layers += smaller
    if actnorm:
        layers.append(ActNorm(now[0]))
    return Flow(channel_normal(now), layers)
