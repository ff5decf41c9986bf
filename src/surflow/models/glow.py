"""Glow: activation normalisation, 1×1 convolutions and affine couplings over several scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from surflow.checks import require_at_least
from surflow.distributions.base import as_shape
from surflow.flow import Flow
from surflow.models.contract import takes
from surflow.models.split_priors import Prior, Shape, prior_called
from surflow.nets import GlowNet
from surflow.transforms import (
    ActNorm,
    Affine,
    AffineCoupling,
    Conv1x1,
    Dequantization,
    Slice,
    Squeeze,
    Transform,
)


def glow_coupling(
    channels: int, hidden_channels: int, standardise: bool, context_features: int = 0
) -> AffineCoupling:
    """An affine coupling of scale σ(s + 2) + 10⁻³ with a :class:`GlowNet`, for C channels."""
    seen = channels // 2
    changed = channels - seen
    net = GlowNet(seen, 2 * changed, hidden_channels, standardise, context_features)
    return AffineCoupling(net, scale="sigmoid")


def glow_steps(
    channels: int, num_steps: int, couple: Callable[[int], Transform]
) -> list[Transform]:
    """Activation normalisation, 1×1 convolution (PLU), coupling; ``num_steps`` times."""
    return [
        layer
        for _ in range(num_steps)
        for layer in (ActNorm(channels), Conv1x1(channels, "plu"), couple(channels))
    ]


def image_shape(shape: Sequence[int], num_scales: int, halvings: int) -> Shape:
    """(C, H, W) as a tuple.

    Raises:
        ValueError: for another number of dimensions, or sides that cannot be halved so often.
    """
    shape = as_shape(shape)
    if len(shape) != 3:
        raise ValueError(f"model.shape: expected (C, H, W), got {shape}")
    if any(side % 2**halvings for side in shape[1:]):
        raise ValueError(
            f"model.shape: expected a height and width divisible by {2**halvings}, for "
            f"{num_scales} scales, got {shape[1]} x {shape[2]}"
        )
    return shape


def multi_scale_flow(
    shape: Sequence[int],
    num_levels: int,
    num_scales: int,
    steps: Callable[[int], list[Transform]],
    prior: Prior,
) -> Flow:
    """Dequantization -> shift by -1/2 -> scales of (squeeze, steps, split) -> base.

    Args:
        shape: (C, H, W), H and W divisible by 2 ** num_scales.
        num_levels: K: data are integers 0 ... K - 1.
        num_scales: number of scales.
        steps: the layers between a squeeze and a split, from the number of channels.
        prior: of what is split off, given what is kept, and of the last latent.

    Raises:
        ValueError: for sizes that are not positive, an image that cannot be halved so often, or,
            where there are steps, one channel in the first scale.
    """
    require_at_least("model.", 1, num_scales=num_scales)
    require_at_least("model.", 2, num_levels=num_levels)
    c, h, w = shape = image_shape(shape, num_scales, num_scales)
    layers: list[Transform] = [Dequantization(num_levels), Affine(shape, shift=-0.5)]
    for scale in range(num_scales):
        c, h, w = 4 * c, h // 2, w // 2
        layers += [Squeeze(), *steps(c)]
        if scale < num_scales - 1:
            c //= 2
            layers.append(Slice(prior((c, h, w), c, scale), keep=c))
    return Flow(prior((c, h, w), 0, num_scales - 1), layers)


@takes("image", facts=("shape", "num_levels"))
def glow(
    shape: Sequence[int] = (3, 32, 32),
    num_levels: int = 256,
    num_scales: int = 3,
    num_steps: int = 32,
    hidden_channels: int = 512,
    parametrisation: str = "plu",
    standardise: bool = True,
    prior: str = "conditional",
) -> Flow:
    r"""Dequantization -> shift by -1/2 -> scales of (squeeze, steps, split) -> learned normal.

    A step is activation normalisation, an invertible 1×1 convolution and an affine coupling
    :math:`z_2 = \sigma'(s(x_1))\, x_2 + t(x_1)`, σ'(s) = σ(s + 2) + 10⁻³, with a
    :class:`GlowNet`. Between scales half of the channels go to a normal whose parameters one zero
    3×3 convolution gets from the other half. The base has a learned location and scale a channel.

    The defaults are the published CIFAR-10 configuration with affine couplings, 44.2 million
    parameters; ``num_steps=48`` is that of 32×32 ImageNet, 66.2 million, and
    ``num_scales=4, num_steps=48`` that of 64×64 ImageNet, 111.7 million.

    Other than in the authors' code: the scale has a floor of 10⁻³, the shift is added after it,
    images are padded with zeros alone (there a further channel marks the edge), and the log-scales
    of the activation normalisations are not multiplied by 3.

    Args:
        shape: (C, H, W), H and W divisible by 2 ** num_scales.
        num_levels: K: data are integers 0 ... K - 1; 2^b for images of b bits.
        num_scales: number of scales.
        num_steps: steps a scale.
        hidden_channels: of the couplings' nets.
        parametrisation: of the 1×1 convolutions, see :class:`Conv1x1`: "plu" or "full".
        standardise: whether the first batch standardises the hidden layers of the couplings' nets
            too, as published; False: plain convolutions with a bias.
        prior: of the channels split off and of the last latent: "conditional", as published,
            "independent" or "autoregressive"; see :data:`~surflow.models.split_priors.PRIORS`.

    Returns:
        A flow over integer images (B, C, H, W), a lower bound through the dequantization.

    Raises:
        ValueError: for an unknown prior, sizes that are not positive, or an image that cannot be
            halved so often.

    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, Sec. 3 and 5.

    >>> import torch
    >>> flow = glow((3, 8, 8), num_scales=2, num_steps=1, hidden_channels=8)
    >>> x = torch.randint(256, (2, 3, 8, 8))
    >>> tuple(flow.encode(x).shape), tuple(flow.sample(5).shape)
    ((2, 24, 2, 2), (5, 3, 8, 8))
    """
    require_at_least("model.", 1, hidden_channels=hidden_channels)

    def steps(channels: int) -> list[Transform]:
        layers: list[Transform] = []
        for _ in range(num_steps):  # the coupling's net is drawn before the convolution
            coupling = glow_coupling(channels, hidden_channels, standardise)
            layers += [ActNorm(channels), Conv1x1(channels, parametrisation), coupling]
        return layers

    return multi_scale_flow(shape, num_levels, num_scales, steps, prior_called(prior))
