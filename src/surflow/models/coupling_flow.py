"""Flows of couplings for vectors, after any surjection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from surflow.checks import require_at_least
from surflow.distributions import Distribution, HalfNormal, StandardNormal, Uniform
from surflow.errors import check_choice
from surflow.flow import Flow
from surflow.models.contract import takes
from surflow.nets import MLP, FourierFeatures
from surflow.transforms import (
    ActNorm,
    AdditiveCoupling,
    Affine,
    BoxToReal,
    Coupling,
    ElementwiseMap,
    Rotation,
    Transform,
)

MappedAndBase = tuple[list[Transform], Distribution]


def real_line(low: list[float], high: list[float], sharpness: float) -> MappedAndBase:
    """Every interval mapped onto the line, and a standard normal there."""
    infinite = all(math.isinf(a) and math.isinf(b) for a, b in zip(low, high, strict=True))
    return [] if infinite else [BoxToReal(low, high, sharpness)], StandardNormal(len(low))


def unmapped(low: list[float], high: list[float], sharpness: float) -> MappedAndBase:
    """The latents as they are, and a standard normal."""
    return [], StandardNormal(len(low))


def unit_box(
    low: list[float], high: list[float], sharpness: float, reach: float = 5.0
) -> MappedAndBase:
    """A finite box scaled to the unit box, with a uniform base; half-lines x >= 0 scaled by
    1/reach, with a half-normal base, so that the data's bulk lies in the unit box."""
    if all(math.isfinite(a) and math.isfinite(b) for a, b in zip(low, high, strict=True)):
        widths = [b - a for a, b in zip(low, high, strict=True)]
        shift = [-a / w for a, w in zip(low, widths, strict=True)]
        return [Affine(len(low), shift, [1 / w for w in widths])], Uniform(len(low))
    if all(a == 0 and math.isinf(b) for a, b in zip(low, high, strict=True)):
        return [Affine(len(low), scale=1 / reach)], HalfNormal(len(low), scale=2.0 / reach)
    raise ValueError(
        "model.support: expected a finite box or half-lines x >= 0 for 'unit_box', got edges "
        f"{low} and {high}; choose 'real_line'"
    )


SUPPORTS: dict[str, Callable[..., tuple[list[Transform], Distribution]]] = {
    "unmapped": unmapped,
    "real_line": real_line,
    "unit_box": unit_box,
}


def support_of(
    features: int,
    support: str,
    surjection: Transform | None,
    low: Sequence[float] | None,
    high: Sequence[float] | None,
    sharpness: float = 1.0,
) -> tuple[list[Transform], Distribution]:
    """The surjection and the layers that map its latents, and the base that a support leaves.

    Raises:
        ValueError: for an unknown support, or one that does not fit the latents.
    """
    check_choice("model.support", support, SUPPORTS)
    low = list(low) if low is not None else [-math.inf] * features
    high = list(high) if high is not None else [math.inf] * features
    if surjection is None:
        return SUPPORTS[support](low, high, sharpness)
    onto_space = surjection.onto_space()
    fitting = ("real_line",) if onto_space else ("real_line", "unit_box")
    if surjection.constraint and support not in fitting:
        raise ValueError(
            f"model.support: expected {' or '.join(fitting)} after {surjection.label}, got "
            f"{support!r}: {surjection.constraint}, and a model of the whole space would put mass "
            "where no data come from"
        )
    if onto_space:
        return [surjection, onto_space], StandardNormal(features)
    mapped, base = SUPPORTS[support](*surjection.image(low, high), sharpness)
    return [surjection, *mapped], base


@takes("points", "table", "image", facts=("features", "low", "high"), surjection="surjection")
def coupling_flow(
    features: int,
    map: ElementwiseMap,
    net: Callable[..., nn.Module],
    num_couplings: int,
    support: str = "unmapped",
    sharpness: float = 1.0,
    actnorm: bool = False,
    rotation: float | None = None,
    shear: float | None = None,
    surjection: Transform | None = None,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> Flow:
    """surjection -> support -> couplings that take turns in the half they transform -> base.

    Args:
        features: D.
        map: the couplings' elementwise map.
        net: ``net(in_features, out_features)`` makes a coupling's net.
        num_couplings: how many.
        support: "unmapped", "real_line" or "unit_box": how the latents' box is mapped, and which
            base that leaves; see the functions of these names.
        sharpness: of the map of half-lines in "real_line"; see :class:`BoxToReal`.
        actnorm: an activation normalisation before each coupling.
        shear: initial coefficient k of a learned shear z2 + k z1 after the support (D = 2,
            latents on the whole plane); None for none.
        rotation: initial angle, in radians, of a learned rotation between couplings (D = 2, latents
            on the whole plane); None for none.
        surjection: the first layer, None for a plain flow.
        low, high: edges of the data, (D,) each; None: infinite.

    Raises:
        ValueError: for an unknown support, a negative number of couplings, or a box that the
            support cannot take.

    Source: Nielsen et al. 2020, arXiv 2007.02731, experiments on symmetric data.
    """
    require_at_least("model.", 0, num_couplings=num_couplings)
    require_at_least("model.", 2, features=features)
    if (rotation is not None or shear is not None) and (support == "unit_box" or features != 2):
        raise ValueError(
            "model.rotation, model.shear: for two features on the whole plane (support real_line "
            f"or unmapped), got {features} features and support {support}"
        )
    transforms, base = support_of(features, support, surjection, low, high, sharpness)
    if shear is not None:
        slope = nn.Linear(1, 1, bias=False)
        nn.init.constant_(slope.weight, shear)
        transforms.append(AdditiveCoupling(slope))
    first = features // 2
    for i in range(num_couplings):
        swap = bool(i % 2)
        seen, changed = (features - first, first) if swap else (first, features - first)
        if rotation is not None and i:
            transforms.append(Rotation(features, angle=rotation))
        if actnorm:
            transforms.append(ActNorm(features))
        transforms.append(Coupling(map, net(seen, changed * map.num_params), swap=swap))
    return Flow(base, transforms)


def coupling_net(
    in_features: int,
    out_features: int,
    hidden_features: Sequence[int],
    activation: str = "relu",
    zero_init: bool = False,
    num_frequencies: int = 0,
    period: float = 1.0,
) -> nn.Module:
    """An MLP, after Fourier features where ``num_frequencies`` is positive.

    Args:
        in_features, out_features, hidden_features, activation, zero_init: see :class:`MLP`.
        num_frequencies, period: see :class:`FourierFeatures`.
    """
    require_at_least("coupling_net", 0, num_frequencies=num_frequencies)
    width = in_features * (1 + 2 * num_frequencies)
    net = MLP(width, out_features, hidden_features, activation, zero_init=zero_init)
    return FourierFeatures(net, num_frequencies, period) if num_frequencies else net
