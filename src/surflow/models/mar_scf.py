"""mAR-SCF: a multi-scale flow whose split-off channels follow an autoregressive prior."""

from __future__ import annotations

from collections.abc import Sequence

from surflow.checks import require_at_least
from surflow.errors import check_choice
from surflow.flow import Flow
from surflow.models.contract import takes
from surflow.models.glow import glow_coupling, glow_steps, multi_scale_flow
from surflow.models.split_priors import prior_called
from surflow.nets import ConvAttentionNet
from surflow.transforms import LogisticMixtureCoupling, Transform

COUPLINGS = ("affine", "mixture")


@takes("image", facts=("shape", "num_levels"))
def mar_scf(
    shape: Sequence[int] = (3, 32, 32),
    num_levels: int = 256,
    num_scales: int = 3,
    num_steps: int = 32,
    hidden_channels: int = 512,
    coupling: str = "affine",
    standardise: bool = True,
    num_blocks: int = 10,
    num_components: int = 32,
    dropout: float = 0.2,
    attention: bool = True,
    prior: str = "autoregressive",
    prior_hidden_channels: int = 32,
    prior_layers: int = 3,
    prior_kernel_sizes: Sequence[int] = (5, 5, 3),
    prior_dilations: Sequence[int] = (2, 1, 1),
) -> Flow:
    r"""Dequantization -> shift by -1/2 -> scales of (squeeze, steps, split) -> prior.

    A step is activation normalisation, an invertible 1×1 convolution (PLU) and a coupling: affine,
    with a :class:`~surflow.nets.GlowNet` and the scale σ(s + 2) + 10⁻³, or a mixture of logistics,
    with a :class:`~surflow.nets.ConvAttentionNet`. What a split drops, given what is kept,
    and the last latent follow :class:`~surflow.distributions.ChannelAutoregressive`.

    The defaults are the published CIFAR-10 configuration with affine couplings; with mixtures
    ``hidden_channels=256`` is the largest published one. 64×64 images take ``num_scales=4``.

    Other than in the authors' code: the scale of an affine coupling has a floor of 10⁻³ and its
    shift is added after it; halves change places only in the 1×1 convolutions; the prior starts as
    a standard normal, and takes images of any size.

    Args:
        shape: (C, H, W), H and W divisible by 2 ** num_scales.
        num_levels: K: data are integers 0 ... K - 1.
        num_scales: L, number of scales.
        num_steps: K, steps a scale.
        hidden_channels: C, of the couplings' nets.
        coupling: "affine" or "mixture".
        standardise: of affine couplings: whether the first batch standardises their hidden layers.
        num_blocks, num_components, dropout, attention: of mixture couplings.
        prior: "autoregressive", or for comparison "conditional" or "independent"; see
            :data:`~surflow.models.split_priors.PRIORS`.
        prior_hidden_channels, prior_layers, prior_kernel_sizes, prior_dilations: of the
            autoregressive prior, the last two of each scale.

    Returns:
        A flow over integer images (B, C, H, W), a lower bound through the dequantization.

    Raises:
        ValueError: for an unknown name, sizes that are not positive, or an image that cannot be
            halved so often.

    Source: Mahajan, Bhattacharyya et al. 2020, arXiv 2004.03891, Sec. 4 and 5; sizes of the
    authors' code.

    >>> import torch
    >>> flow = mar_scf((3, 8, 8), num_scales=2, num_steps=1, hidden_channels=8)
    >>> x = torch.randint(256, (2, 3, 8, 8))
    >>> tuple(flow.encode(x).shape), tuple(flow.sample(5).shape)
    ((2, 24, 2, 2), (5, 3, 8, 8))
    """
    check_choice("model.coupling", coupling, COUPLINGS)
    require_at_least("model.", 1, hidden_channels=hidden_channels)
    require_at_least("model.", 0, num_steps=num_steps)

    def affine(channels: int) -> Transform:
        return glow_coupling(channels, hidden_channels, standardise)

    def mixture(channels: int) -> Transform:
        outputs = (channels - channels // 2) * (3 * num_components + 2)
        net = ConvAttentionNet(
            channels // 2, outputs, hidden_channels, num_blocks, dropout, attention
        )
        return LogisticMixtureCoupling(net, num_components)

    def steps(channels: int) -> list[Transform]:
        return glow_steps(channels, num_steps, affine if coupling == "affine" else mixture)

    chosen = prior_called(
        prior,
        hidden_channels=prior_hidden_channels,
        num_layers=prior_layers,
        kernel_sizes=prior_kernel_sizes,
        dilations=prior_dilations,
    )
    return multi_scale_flow(shape, num_levels, num_scales, steps, chosen)
