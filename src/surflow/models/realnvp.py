"""RealNVP for images: checkerboard and channel couplings over several scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from surflow.checks import require_at_least
from surflow.distributions import StandardNormal
from surflow.errors import check_choice
from surflow.flow import Flow
from surflow.models.contract import takes
from surflow.models.glow import image_shape
from surflow.nets import ResNet, TanhScale
from surflow.transforms import (
    ActNorm,
    Affine,
    AffineCoupling,
    BatchNorm,
    Dequantization,
    Logit,
    Permute,
    Slice,
    Squeeze,
    Transform,
    checkerboard_mask,
)

NORMS: dict[str, Callable[[int], Transform]] = {
    "batch_norm": lambda channels: BatchNorm(channels, affine=False),
    "actnorm": ActNorm,
}
DIAGONAL_FIRST = (0, 3, 1, 2)  # the pixels of a 2×2 block, in raster order


def diagonal_first(channels: int) -> Permute:
    """Squeezed channels in the order in which RealNVP cuts them off: (B, 4 C, H, W) -> the same.

    After a :class:`Squeeze` of C channels: all channels of the upper left pixel of each block, then
    of the lower right, the upper right and the lower left one. The first half is one colour of a
    checkerboard.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.6; the order of the authors' code.

    >>> diagonal_first(2).permutation.tolist()
    [0, 4, 3, 7, 1, 5, 2, 6]
    """
    return Permute([4 * c + pixel for pixel in DIAGONAL_FIRST for c in range(channels)])


@takes("image", facts=("shape", "num_levels"))
def realnvp(
    shape: Sequence[int] = (3, 32, 32),
    num_levels: int = 256,
    num_scales: int = 2,
    mid_channels: int = 64,
    num_blocks: int = 8,
    alpha: float = 0.05,
    norm: str = "batch_norm",
) -> Flow:
    r"""Dequantization -> logit(α + (1 − 2α) x) -> scales of affine couplings -> standard normal.

    A scale is 3 couplings with alternating checkerboard masks, a squeeze, 3 couplings of
    alternating halves of the channels, and the half of the dimensions that goes to a standard
    normal (:class:`Slice`); the last scale is 4 couplings with alternating checkerboard masks. A
    coupling is :math:`z_2 = x_2 e^{f \tanh s(x_1)} + t(x_1)` with a learned factor f a channel,
    s and t from a :class:`ResNet` that starts at zero; a normalisation follows each. Feature
    maps double at every scale, and within it for the squeezed half.

    The defaults are the published CIFAR-10 configuration, 19.6 million parameters;
    ``num_scales=4, mid_channels=32, num_blocks=4`` is that of 32×32 ImageNet, 46.3 million, and
    ``num_scales=5, mid_channels=32, num_blocks=2`` that of 64×64 images, 96.4 million.

    Other than in the authors' code: all convolutions have a gain, batch normalisation between the
    couplings takes all pixels and not only those just transformed, and its statistics are of the
    batch alone.

    Args:
        shape: (C, H, W), H and W divisible by 2 ** (num_scales - 1).
        num_levels: K: data are integers 0 ... K - 1.
        num_scales: number of scales.
        mid_channels: feature maps of the first checkerboard couplings.
        num_blocks: residual blocks a coupling.
        alpha: α, what keeps the logit off its edges, in (0, 1/2).
        norm: "batch_norm", between the couplings and inside their nets, as published; or
            "actnorm", between the couplings, with nets of weight normalisation alone, so that a
            row depends on itself only in training too.

    Returns:
        A flow over integer images (B, C, H, W), a lower bound through the dequantization.

    Raises:
        ValueError: for sizes that are not positive, an α out of range, an unknown norm, or an
            image that cannot be halved so often.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.4 to 3.7 and 4.1.

    >>> import torch
    >>> flow = realnvp((3, 8, 8), mid_channels=4, num_blocks=1)
    >>> x = torch.randint(256, (2, 3, 8, 8))
    >>> tuple(flow.encode(x).shape), tuple(flow.sample(5).shape)
    ((2, 6, 4, 4), (5, 3, 8, 8))
    """
    require_at_least(
        "model.", 1, num_scales=num_scales, mid_channels=mid_channels, num_blocks=num_blocks
    )
    require_at_least("model.", 2, num_levels=num_levels)
    if not 0 < alpha < 0.5:
        raise ValueError(f"model.alpha: expected a number in (0, 0.5), got {alpha}")
    check_choice("model.norm", norm, NORMS)
    halvings = num_scales - 1
    c, h, w = shape = image_shape(shape, num_scales, halvings)
    normalise = NORMS[norm]

    def net(seen: int, changed: int, width: int, **others) -> nn.Module:
        inner = ResNet(
            seen, 2 * changed, width, num_blocks, norm == "batch_norm", zero_init=True, **others
        )
        return TanhScale(inner, changed)

    def checkerboard(count: int, width: int) -> list[Transform]:
        masks = [checkerboard_mask(h, w, invert=i % 2 == 1) for i in range(count)]
        return [
            layer
            for mask in masks
            for layer in (AffineCoupling(net(c, c, width, mask=mask), mask=mask), normalise(c))
        ]

    def channelwise(width: int) -> list[Transform]:
        return [
            layer
            for swap in (False, True, False)
            for layer in (AffineCoupling(net(2 * c, 2 * c, width), swap=swap), normalise(4 * c))
        ]

    layers: list[Transform] = [
        Dequantization(num_levels),
        Affine(shape, shift=alpha, scale=1 - 2 * alpha),
        Logit(),
    ]
    for scale in range(halvings):
        width = mid_channels * 2**scale
        layers += [*checkerboard(3, width), Squeeze(), *channelwise(2 * width)]
        h, w = h // 2, w // 2
        layers += [diagonal_first(c), Slice(StandardNormal((2 * c, h, w)), keep=2 * c)]
        c = 2 * c
    layers += checkerboard(4, mid_channels * 2**halvings)
    return Flow(StandardNormal((c, h, w)), layers)
