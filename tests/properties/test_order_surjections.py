"""The contract for sorting, max, max pooling, rectifying and permuting, beyond the catalogue."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from surflow.distributions import (
    DiagonalNormal,
    Distribution,
    Exponential,
    HalfNormal,
    OrderStatistics,
    StandardNormal,
    TruncatedNormal,
    ZeroInflated,
)
from surflow.distributions.order import score_order
from surflow.nets import MLP
from surflow.proofs import CHECKS, compiles, double_precision
from surflow.transforms import (
    Affine,
    Example,
    Inverse,
    MaxGenerative,
    MaxInference,
    MaxPool2d,
    MaxPool2dGenerative,
    ReLUGenerative,
    ReLUInference,
    Sequential,
    SortGenerative,
    SortInference,
    StochasticPermutation,
    Transform,
)

Draw = Callable[[int], Tensor]


class SetNet(nn.Module):
    """An MLP on a flattened set, to one number an element."""

    def __init__(self, shape: Sequence[int], context_features: int = 0) -> None:
        super().__init__()
        size = 1
        for s in shape:
            size *= s
        self.context_features = context_features
        self.net = MLP(size, shape[0], [8], "tanh", context_features=context_features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x.flatten(1), context) if self.context_features else self.net(x.flatten(1))


class ConvNet(nn.Module):
    """Convolutions of the input and, if there is one, of a context image."""

    def __init__(self, in_channels: int, out_channels: int, context_features: int = 0) -> None:
        super().__init__()
        self.context_features = context_features
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels + context_features, 6, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(6, out_channels, 1),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x if context is None else torch.cat([x, context], dim=1))


def spread(module: nn.Module, std: float = 0.4) -> nn.Module:
    """Learned logits and scales away from where they start."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("logits", "log_scale")):
                parameter.add_(std * torch.randn_like(parameter))
    return module


def vector(n: int) -> Tensor:
    return torch.randn(n, 2)


def wide(shape: Sequence[int], scale: float = 1.3) -> Callable[[int], tuple[Tensor, Tensor]]:
    return DiagonalNormal(shape, scale=scale).sample_and_log_prob


def sorting(shape, by=None, context: Draw | None = None, **kwargs) -> Example:
    return Example(
        spread(SortInference(shape, by, **kwargs)),
        wide(shape),
        OrderStatistics(StandardNormal(shape), by),
        context,
    )


def uneven(shape: Sequence[int], scale: float = 1.0) -> DiagonalNormal:
    """Normals whose means differ from element to element."""
    loc = torch.linspace(-0.4, 0.4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return DiagonalNormal(shape, loc, scale)


def unsorting(shape, by=None, context: Draw | None = None, **kwargs) -> Example:
    return Example(
        spread(SortGenerative(shape, by, **kwargs)),
        OrderStatistics(DiagonalNormal(shape, scale=1.4), by).sample_and_log_prob,
        uneven(shape),
        context,
    )


def below(shape, transform: Transform, make: Callable[[Distribution], Transform], context=None):
    """A surjection onto a max: inputs from the same structure with wider parts."""

    def sample(n: int) -> tuple[Tensor, Tensor]:
        z, log_r = DiagonalNormal(transform.latent_shape, scale=1.3).sample_and_log_prob(n)
        same = make(Exponential(transform.decoder.event_shape, 1.2))
        x, ldj = same.inverse_and_ldj(z)
        return x, log_r + ldj

    base = DiagonalNormal(transform.latent_shape, scale=0.9)
    return Example(spread(transform), sample, base, context)


def maximum(shape, decoder=None, context: Draw | None = None, **kwargs) -> Example:
    transform = MaxInference(shape, decoder, **kwargs)
    return below(shape, transform, lambda d: MaxInference(shape, d), context)


def pooling(shape, k=2, decoder=None, context: Draw | None = None, **kwargs) -> Example:
    transform = MaxPool2d(shape, k, decoder, **kwargs)
    return below(shape, transform, lambda d: MaxPool2d(shape, k, d), context)


def unpooling(transform: Inverse, context: Draw | None = None) -> Example:
    return Example(
        spread(transform),
        DiagonalNormal(transform.event_shape, 0.8, 1.2).sample_and_log_prob,
        DiagonalNormal(transform.latent_shape, scale=0.8),
        context,
    )


def rectifying(shape, context: Draw | None = None, **kwargs) -> Example:
    return Example(
        spread(ReLUInference(shape, **kwargs)),
        wide(shape, 1.8),
        ZeroInflated(shape, 0.45, 1.1),
        context,
    )


def unrectifying(shape, context: Draw | None = None, **kwargs) -> Example:
    return Example(
        spread(ReLUGenerative(shape, **kwargs), 0.1),
        ZeroInflated(shape, 0.4, 1.3).sample_and_log_prob,
        DiagonalNormal(shape, 0.2, 0.75),
        context,
    )


def permuting(shape, context: Draw | None = None, *args, **kwargs) -> Example:
    return Example(
        spread(StochasticPermutation(*args, **kwargs)),
        wide(shape, 1.4),
        uneven(shape, 0.9),
        context,
    )


def scale_net(shape: Sequence[int], in_channels: int, at: float = -0.2) -> ConvNet:
    net = ConvNet(in_channels, shape[0])
    nn.init.constant_(net.layers[-1].bias, at)
    return net


def sorted_flow() -> Example:
    """Exchangeable data: sort, and a layer behind it that keeps the order."""
    layers = [SortInference((3, 2), 1), Affine((3, 2), 0.3, 1.2, learn=False)]
    z = OrderStatistics(DiagonalNormal((3, 2), 0.3, 1.2), 1)
    return Example(Sequential(layers), wide((3, 2)), z)


def picture(n: int) -> Tensor:
    return torch.randn(n, 1, 2, 1)


INSTANCES: dict[str, Callable[[], Example]] = {
    "sort-uniform": lambda: sorting((4,)),
    "sort-learned": lambda: sorting((3,), learn=True),
    "sort-net": lambda: sorting((3,), net=MLP(3, 3, [8], "tanh")),
    "sort-points": lambda: sorting((3, 2)),
    "sort-points-by-second-learned": lambda: sorting((3, 2), 1, learn=True),
    "sort-points-net-context": lambda: sorting((3, 2), 1, vector, net=SetNet((3, 2), 2)),
    "sort-images-net": lambda: sorting((2, 2, 2), (1, 0), net=SetNet((2, 2, 2))),
    "sort-generative-uniform": lambda: unsorting((3,)),
    "sort-generative-points-learned": lambda: unsorting((3, 2), 1, learn=True),
    "sort-generative-net-context": lambda: unsorting(
        (3,), None, vector, net=MLP(3, 3, [8], "tanh", context_features=2)
    ),
    "sort-in-a-sequence": sorted_flow,
    "max-half-normal": lambda: maximum((3,)),
    "max-two-learned": lambda: maximum((2,), learn=True),
    "max-learned-scale-and-index": lambda: maximum(
        (3, 2), Exponential((2, 2), 0.8, True), learn=True
    ),
    "max-half-normal-scale-net": lambda: maximum(
        (3,),
        TruncatedNormal((2,), low=0.0, learn_loc=False, net=MLP(1, 2, [8], "tanh")),
    ),
    "max-truncated-net-context": lambda: maximum(
        (3,),
        TruncatedNormal((2,), low=0.0, net=MLP(1, 4, [8], "tanh")),
        vector,
        net=MLP(1, 3, [8], "tanh", context_features=2),
    ),
    "max-values": lambda: maximum(
        (3,),
        TruncatedNormal((2,), [0.2, -0.1], 0.8, high="context", learn=True),
        differences=False,
        learn=True,
    ),
    "max-image": lambda: maximum(
        (2, 2, 1), TruncatedNormal((1, 2, 1), 0.1, 0.7, high="context"), differences=False
    ),
    "max-image-net-context": lambda: maximum(
        (2, 2, 1),
        Exponential((1, 2, 1), net=scale_net((1, 2, 1), 1)),
        picture,
        net=ConvNet(1, 2, 1),
    ),
    "max-generative-half-normal": lambda: unpooling(
        MaxGenerative((3,), HalfNormal((2,), scale=1.6))
    ),
    "max-generative-values": lambda: unpooling(
        MaxGenerative(
            (3,),
            TruncatedNormal((2,), 0.0, 1.1, high="context", learn=True),
            differences=False,
            net=MLP(1, 3, [8], "tanh"),
        )
    ),
    "max-generative-image-context": lambda: unpooling(
        MaxGenerative((2, 2, 1), Exponential((1, 2, 1), 1.4), net=ConvNet(1, 2, 1)), picture
    ),
    "pool-uniform": lambda: pooling((2, 2, 2)),
    "pool-learned": lambda: pooling(
        (1, 4, 2), decoder=Exponential((3, 2, 1), 0.7, True), learn=True
    ),
    "pool-3x3": lambda: pooling((1, 3, 3), 3, Exponential((8, 1, 1), 0.9)),
    "pool-conditional": lambda: pooling(
        (2, 2, 2), decoder=Exponential((6, 1, 1), net=scale_net((6, 1, 1), 2)), net=ConvNet(2, 8)
    ),
    "pool-conditional-context": lambda: pooling(
        (1, 4, 2),
        decoder=Exponential((3, 2, 1), net=scale_net((3, 2, 1), 1)),
        context=picture,
        net=ConvNet(1, 4, 1),
    ),
    "pool-generative": lambda: unpooling(
        MaxPool2dGenerative((1, 4, 2), decoder=Exponential((3, 2, 1), 1.4)), None
    ),
    "pool-generative-conditional-context": lambda: unpooling(
        MaxPool2dGenerative(
            (1, 4, 2),
            decoder=Exponential((3, 2, 1), net=scale_net((3, 2, 1), 1, 0.4)),
            net=ConvNet(1, 4, 1),
        ),
        picture,
    ),
    "relu-fixed": lambda: rectifying((2,), scale=[0.7, 1.2]),
    "relu-learned-image": lambda: rectifying((1, 2, 1), learn=True),
    "relu-net": lambda: rectifying((2,), net=MLP(2, 2, [8], "tanh")),
    "relu-image-net-context": lambda: rectifying((2, 2, 1), picture, net=ConvNet(2, 2, 1)),
    "relu-generative-fixed": lambda: unrectifying((2,)),
    "relu-generative-net-context": lambda: unrectifying(
        (2,), vector, net=MLP(2, 2, [8], "tanh", context_features=2)
    ),
    "relu-generative-image": lambda: unrectifying((1, 2, 1), learn=True),
    "permutation-uniform": lambda: permuting((3,)),
    "permutation-points": lambda: permuting((3, 2), None, 3),
    "permutation-learned": lambda: permuting((3,), None, 3, True),
    "permutation-encoder": lambda: permuting((3, 2), None, 3, encoder_net=SetNet((3, 2))),
    "permutation-decoder-context": lambda: permuting(
        (3,), vector, 3, True, decoder_net=SetNet((3,), 2)
    ),
    "permutation-encoder-context-images": lambda: permuting(
        (2, 2, 1), vector, 2, encoder_net=SetNet((2, 2, 1), 2), decoder_net=SetNet((2, 2, 1), 2)
    ),
}


def build(name: str) -> Example:
    torch.manual_seed(0)
    with double_precision():
        return INSTANCES[name]()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", INSTANCES)
def test_contract(name: str, check: str, double):
    proof = CHECKS[check](build(name))
    assert proof.ok, proof.message


COMPILED = {
    "sort-points-net-context": (),
    "max-image-net-context": (),
    "pool-conditional-context": (),
    "permutation-points": (),
    "relu-image-net-context": (),
    "max-truncated-net-context": pytest.mark.slow,
    "max-generative-values": pytest.mark.slow,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=mark) for name, mark in COMPILED.items()]
)
def test_compiles(name: str, double):
    proof = compiles(build(name))
    assert proof.ok and proof.applies, proof.message


# Mistakes that the suite must find ---------------------------------------------------------------


class SortScoresTheOtherPermutation(SortInference):
    """Scores argsort(x) where the ranks of x are drawn: a mass still, of another conditional."""

    def _forward(self, x, context):
        z = super()._forward(x, context)[0]
        order = self._key(x).argsort(1)
        return z, score_order(self._order_logits(z, context), order, z)


class SortWithoutTheFactorial(SortInference):
    def _forward(self, x, context):
        return super()._forward(x, context)[0], torch.zeros(len(x), dtype=x.dtype)


class SortSortsTheFeaturesApart(SortInference):
    def _forward(self, x, context):
        return x.sort(1).values, super()._forward(x, context)[1]


class MaxDrawsAnyPlace(MaxInference):
    """Draws the index uniformly and scores it by the learned logits."""

    def _draw(self, z, event, table):
        return super()._draw(z, event, None)


class MaxWithoutTheIndex(MaxInference):
    def _score_index(self, table, index, z):
        return torch.zeros(len(z), dtype=z.dtype)


class PoolUnpacksInAnotherOrder(MaxPool2d):
    def _unpack(self, event):
        return super()._unpack(event).flip(2)


class ReLUWithoutTheHalf(ReLUInference):
    """Scores by the normal, not the half-normal."""

    def _score(self, eps, below_zero, log_scale):
        return super()._score(eps, below_zero, log_scale) - torch.tensor(
            2.0
        ).log() * below_zero.sum(1)


class PermutationForgetsToInvert(StochasticPermutation):
    def _forward(self, x, context):
        p, q = self._p(x, context), self._q(x, context)
        order = self._draw(q, x)
        z = x.gather(1, order)
        return z, self._score(p, order, z) - self._score(q, order, x)


def skewed(transform: Transform) -> Transform:
    with torch.no_grad():
        for name, parameter in transform.named_parameters():
            if name.endswith("logits"):
                parameter.copy_(torch.tensor([-2.0, 1.0, 2.0]))  # a 3-cycle unlike its inverse
    return transform


def sort_mistake(cls: type[SortInference], shape=(3,), learn: bool = True) -> Example:
    transform = skewed(cls(shape, learn=learn))
    return Example(transform, wide(shape), OrderStatistics(StandardNormal(shape)))


def max_mistake(cls: type[MaxInference]) -> Example:
    example = maximum((3,), learn=True)
    transform = skewed(cls((3,), learn=True))
    return Example(transform, example.sample, example.base)


def pool_mistake() -> Example:
    decoder = Exponential((3, 1, 1), torch.tensor([0.4, 0.8, 1.1]).view(3, 1, 1))
    example = pooling((1, 2, 2))
    return Example(PoolUnpacksInAnotherOrder((1, 2, 2), 2, decoder), example.sample, example.base)


def relu_mistake() -> Example:
    return Example(ReLUWithoutTheHalf((2,)), wide((2,), 1.8), ZeroInflated((2,), 0.45))


def permutation_mistake() -> Example:
    base = DiagonalNormal((3,), [1.0, -1.0, 0.0], 0.9)
    wrong = PermutationForgetsToInvert(3, True)
    with torch.no_grad():
        wrong.decoder_logits.copy_(torch.tensor([-2.0, 1.0, 2.0]))
    return Example(wrong, wide((3,), 1.6), base)


MISTAKES = {
    "the other permutation": (
        lambda: sort_mistake(SortScoresTheOtherPermutation),
        {"generation"},
    ),
    "no factorial": (
        lambda: sort_mistake(SortWithoutTheFactorial, learn=False),
        {"unit_mass", "generation"},
    ),
    "features apart": (
        lambda: sort_mistake(SortSortsTheFeaturesApart, (3, 2), False),
        {"round_trip", "generation", "agreement"},
    ),
    "any place": (lambda: max_mistake(MaxDrawsAnyPlace), {"generation"}),
    "no index": (lambda: max_mistake(MaxWithoutTheIndex), {"unit_mass", "generation"}),
    "another order": (pool_mistake, {"generation", "agreement"}),
    "no half": (relu_mistake, {"unit_mass"}),
    "not inverted": (permutation_mistake, {"generation"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, double):
    make, expected = MISTAKES[mistake]
    example = make()
    failing = {
        p.check: p.message for p in (check(example) for check in CHECKS.values()) if not p.ok
    }
    assert expected <= set(failing), failing
