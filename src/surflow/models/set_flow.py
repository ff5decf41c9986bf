"""Flows of sets: models in which the order of the points says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from surflow.checks import require_at_least
from surflow.distributions import StandardNormal
from surflow.draws import apart
from surflow.errors import check_choice
from surflow.flow import Flow
from surflow.models.contract import takes
from surflow.nets import SetTransformer
from surflow.transforms import (
    ActNorm,
    Affine,
    AffineCoupling,
    Permute,
    Reverse,
    RunningMaxToReal,
    SortInference,
    StochasticPermutation,
    Transform,
)

NetOf = Callable[..., SetTransformer]
"""``net(in_features, out_features, num_positions=...)``: a transformer of the model's sizes."""


class PointParameters(nn.Module):
    """A net of points as a coupling along the points wants it: (B, N1, C) -> (B, N2 P, C).

    Args:
        net: (B, N1, C) -> (B, N1, C P), one point transformed for each one seen.
        num_points: N2, at most N1; the outputs of later points are left out.
        num_features: C.
    """

    def __init__(self, net: nn.Module, num_points: int, num_features: int) -> None:
        super().__init__()
        self.net = net
        self.num_points = num_points
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)[:, : self.num_points].unflatten(2, (self.num_features, -1))
        return out.transpose(2, 3).flatten(1, 2)


@dataclass(frozen=True)
class Points:
    """What the layers of a set flow are told: N points of C features in a box of a width, and how
    soft a running maximum is, in units of the data."""

    number: int
    features: int
    width: float
    softness: float | None

    def scaled(self) -> Affine:
        """[0, width] to [-1/2, 1/2]."""
        return Affine((self.number, self.features), shift=-0.5, scale=1 / self.width)


def dimension_wise(points: Points, net: NetOf) -> list[Transform]:
    """The first half of the features sets an affine map of the others, point by point, given all
    points; then the features change places."""
    seen = points.features // 2
    scales_and_shifts = net(seen, 2 * (points.features - seen))
    return [AffineCoupling(scales_and_shifts, "softplus", dim=2), Reverse(dim=2)]


def length_wise(points: Points, net: NetOf, positional: bool) -> list[Transform]:
    """The first half of the points sets an affine map of the others."""
    seen = points.number - points.number // 2
    inner = net(points.features, 2 * points.features, num_positions=seen if positional else None)
    per_point = PointParameters(inner, points.number - seen, points.features)
    return [AffineCoupling(per_point, "softplus", split=seen)]


@dataclass(frozen=True)
class Order:
    """How a model deals with the order of the points.

    Attributes:
        front: (points, net) -> the layers next to the data.
        step: (index, points, net) -> the couplings and permutations of one flow.
    """

    front: Callable[[Points, NetOf], list[Transform]]
    step: Callable[[int, Points, NetOf], list[Transform]]


def _sorted(points: Points, net: NetOf) -> list[Transform]:
    sort = SortInference((points.number, points.features))
    onto = [] if points.softness is None else [RunningMaxToReal(points.softness)]
    return [sort, *onto, points.scaled()]


def _permuted(points: Points, net: NetOf) -> list[Transform]:
    return [points.scaled(), StochasticPermutation()]


def _learned(points: Points, net: NetOf) -> list[Transform]:
    logits = nn.Sequential(net(points.features, 1), nn.Flatten())
    return [points.scaled(), StochasticPermutation(points.number, encoder_net=logits)]


def _placed_step(index: int, points: Points, net: NetOf) -> list[Transform]:
    shuffle = Permute.random(points.number, dim=1, seed=index)
    return [*dimension_wise(points, net), *length_wise(points, net, positional=True), shuffle]


def _random_step(index: int, points: Points, net: NetOf) -> list[Transform]:
    shuffle = StochasticPermutation()
    return [*dimension_wise(points, net), *length_wise(points, net, positional=False), shuffle]


def _equivariant_step(index: int, points: Points, net: NetOf) -> list[Transform]:
    return [*dimension_wise(points, net), *dimension_wise(points, net)]


ORDERS: dict[str, Order] = {
    "sort": Order(_sorted, _placed_step),
    "permute": Order(_permuted, _random_step),
    "plackett_luce": Order(_learned, _placed_step),
    "none": Order(lambda points, net: [points.scaled()], _equivariant_step),
}


@takes("set", facts=("num_points", "num_features", "width"))
def set_flow(
    num_points: int = 50,
    num_features: int = 2,
    order: str = "sort",
    width: float = 28.0,
    softness: float | None = 0.1,
    num_flows: int = 32,
    features: int = 64,
    num_heads: int = 8,
    num_layers: int = 2,
    feedforward_features: int | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Flow:
    r"""A flow of sets: order -> couplings of the features and of the points, actnorm -> normal.

    .. math:: p(x_1, \dots, x_N) = p(x_{\pi_1}, \dots, x_{\pi_N}) \quad \text{for every order } \pi

    A flow is a dimension-wise coupling (one coordinate sets the scale and shift of the other, given
    all points), a length-wise one (half of the points sets those of the other half), a permutation
    of the points and a normalisation a coordinate. Scales are softplus(s), nets transformers over
    the points. What makes it exchangeable:

    - ``sort`` (SortFlow): the points are sorted by their first feature, and one of N! orders is
      drawn to generate: exact. Length-wise nets know places, and permutations are fixed.
      :class:`~surflow.transforms.RunningMaxToReal` gives unsorted latents sorted points, so that
      the density is normalised. The authors' code has no such layer (``softness=None``): what
      it gives of a set is a lower bound on the log-density of its samples.
    - ``permute`` (PermuteFlow): an order is drawn uniformly before and after every length-wise
      coupling, in both directions: a bound, V = 0 in each.
    - ``plackett_luce``: an order is drawn first, q(order | x) being Plackett-Luce with logits from
      a transformer that does not know places; p(order) is uniform, V = -log N! - log q. The flows
      after it are those of ``sort``. A bound.
    - ``none``: no order and no permutation. Two dimension-wise couplings a flow, each equivariant,
      and a base of independent points: exact.

    The defaults are the published sizes, about 6.4 million parameters; its dropout was 0.2 with
    ``sort`` and 0.1 with ``permute``.

    Args:
        num_points: N, at least 2.
        num_features: C, at least 2; coordinates of a point.
        order: sort, permute, plackett_luce or none.
        width: data lie in [0, width] along each coordinate.
        softness: of the running maximum of ``sort``, as a share of the width; None for none; see
            docs/pointcloud.md.
        num_flows: number of flows.
        features, num_heads, num_layers, feedforward_features, activation, dropout: of the nets, see
            :class:`~surflow.nets.SetTransformer`.

    Returns:
        A flow over sets (B, N, C), in the units of the data.

    Raises:
        ValueError: for an unknown order, or sizes out of range.

    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 5 (exchangeable data), and its code;
    ``plackett_luce`` and ``none`` are this library's.

    >>> import torch
    >>> flow = set_flow(4, order="sort", num_flows=2, features=8, num_heads=2, num_layers=1)
    >>> x = 28 * torch.rand(3, 4, 2)
    >>> flow.eval().lower_bound, torch.equal(flow.log_prob(x), flow.log_prob(x.flip(1)))
    (False, True)
    """
    check_choice("model.order", order, ORDERS)
    require_at_least("model.", 2, num_points=num_points, num_features=num_features)
    require_at_least("model.", 1, num_flows=num_flows)
    for name, value in (("width", width), ("softness", softness)):
        if value is not None and not value > 0:
            raise ValueError(f"model.{name}: expected a positive number, got {value}")
    net = partial(
        SetTransformer,
        features=features,
        num_heads=num_heads,
        num_layers=num_layers,
        feedforward_features=feedforward_features,
        activation=activation,
        dropout=dropout,
    )
    softness = None if softness is None else softness * width
    points = Points(num_points, num_features, width, softness)
    how = ORDERS[order]
    with apart():
        layers = how.front(points, net)
    for index in range(num_flows):
        layers += [*how.step(index, points, net), ActNorm(num_features, dim=2)]
    return Flow(StandardNormal((num_points, num_features)), layers)
