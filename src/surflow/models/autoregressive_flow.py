"""Masked autoregressive flows of vectors, after any surjection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from surflow.errors import check_choice, check_whole
from surflow.flow import Flow
from surflow.models.contract import takes
from surflow.models.coupling_flow import support_of
from surflow.nets import MADE
from surflow.transforms import (
    ActNorm,
    Autoregressive,
    BatchNorm,
    ElementwiseMap,
    Inverse,
    Transform,
)

NORMS: dict[str, type[Transform]] = {"actnorm": ActNorm, "batch_norm": BatchNorm}


@takes("points", "table", "image", facts=("features", "low", "high"), surjection="surjection")
def autoregressive_flow(
    features: int,
    map: ElementwiseMap,
    net: Callable[..., MADE],
    num_layers: int,
    support: str = "unmapped",
    sharpness: float = 1.0,
    norm: str | None = None,
    inverse: bool = False,
    surjection: Transform | None = None,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> Flow:
    """surjection -> support -> autoregressive layers, every second in reversed order -> base.

    Args:
        features: D.
        map: the layers' elementwise map.
        net: ``net(features, params_per_feature, ordering=...)`` makes a layer's :class:`MADE`.
        num_layers: how many.
        norm: "actnorm" or "batch_norm" before each layer; None for none.
        inverse: turn the layers round: fast samples instead of fast densities (an IAF).
        support, sharpness, surjection, low, high: see :func:`surflow.models.coupling_flow`.

    Raises:
        ValueError: for a negative number of layers, an unknown norm or support, or a box that the
            support cannot take.

    Source: Papamakarios et al. 2017, arXiv 1705.07057, Sec. 3; turned round, Kingma et al. 2016,
    arXiv 1606.04934.
    """
    check_whole("model.num_layers", num_layers, least=0)
    check_choice("model.norm", norm, (*NORMS, None))
    transforms, base = support_of(features, support, surjection, low, high, sharpness)
    for i in range(num_layers):
        if norm is not None:
            transforms.append(NORMS[norm](features))
        ordering = "reversed" if i % 2 else "natural"
        layer = Autoregressive(map, net(features, map.num_params, ordering=ordering))
        transforms.append(Inverse(layer) if inverse else layer)
    return Flow(base, transforms)
