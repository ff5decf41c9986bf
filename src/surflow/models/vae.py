"""A VAE of vectors, after any surjection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from surflow.checks import require_at_least
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.flow import Flow
from surflow.models.contract import takes
from surflow.models.coupling_flow import support_of
from surflow.transforms import VAE, Transform


@takes("points", "table", "image", facts=("features", "low", "high"), surjection="surjection")
def vae_flow(
    features: int,
    latent_features: int,
    net: Callable[..., nn.Module],
    support: str = "unmapped",
    surjection: Transform | None = None,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> Flow:
    """surjection -> support -> VAE layer with diagonal-normal encoder and decoder -> normal base.

    Args:
        features: D, the size of x.
        latent_features: the size of z.
        net: ``net(in_features, out_features)`` makes the nets of encoder and decoder.
        support, surjection, low, high: see :func:`surflow.models.coupling_flow`.

    Raises:
        ValueError: for sizes that are not positive, or an unknown support.

    Source: Kingma & Welling 2014, arXiv 1312.6114.
    """
    require_at_least("model.", 1, latent_features=latent_features)
    first, _ = support_of(features, support, surjection, low, high)
    vae = VAE(
        encoder=DiagonalNormal(latent_features, net=net(features, 2 * latent_features)),
        decoder=DiagonalNormal(features, net=net(latent_features, 2 * features)),
    )
    return Flow(StandardNormal(latent_features), [*first, vae])
