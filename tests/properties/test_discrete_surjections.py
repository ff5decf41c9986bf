"""Rounding, slicing and argmax: the contract for the instances that matter, and what breaks it."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from surflow.distributions import (
    Categorical,
    DiagonalNormal,
    Gumbel,
    Logistic,
    LogitLogistic,
    StandardNormal,
    Uniform,
)
from surflow.distributions.base import Distribution
from surflow.flow import Flow, FlowDistribution
from surflow.nets import MLP
from surflow.proofs import CHECKS, double_precision
from surflow.transforms import (
    Affine,
    AffineCoupling,
    ArgmaxGenerative,
    ArgmaxInference,
    Augment,
    BinaryArgmaxGenerative,
    BinaryArgmaxInference,
    Dequantization,
    Example,
    GumbelArgmaxGenerative,
    GumbelArgmaxInference,
    Inverse,
    Logit,
    Rounding,
    Sequential,
    Slice,
    Transform,
)
from surflow.transforms.surjections.argmax import scores_below_a_greatest
from surflow.transforms.surjections.rounding import uniform_integers

# Nets and noise -----------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """A convolution of the input and, if there is one, of a context image."""

    def __init__(self, in_channels: int, out_channels: int, context_features: int = 0) -> None:
        super().__init__()
        self.context_features = context_features
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels + context_features, 4, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, out_channels, 1),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x if context is None else torch.cat([x, context], dim=1))


def small(net: nn.Module, gain: float = 0.5) -> nn.Module:
    """The net with its outputs scaled down: perturbed from trivial, yet of bounded weights."""
    with torch.no_grad():
        for p in [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)][
            -1
        ].parameters():
            p.mul_(gain)
    return net


def vector(n: int) -> Tensor:
    return torch.randn(n, 2)


def mlp(features: int, out: int, **kwargs) -> nn.Module:
    return small(MLP(features, out, [8], "tanh", **kwargs))


def flow_noise(features: int, embed: int = 3) -> Distribution:
    """A variational dequantizer: a coupling that sees an embedding of the levels."""
    coupling = AffineCoupling(
        mlp(features // 2, 2 * (features - features // 2), context_features=embed)
    )
    scale = Affine((features,), scale=0.9)
    flow = Flow(Logistic(features), [Logit(), scale, coupling])
    return FlowDistribution(flow, embed=mlp(features, embed))


def image_flow_noise(channels: int, size: int) -> Distribution:
    shape = (channels, size, size)
    coupling = AffineCoupling(small(ConvNet(channels // 2, 2 * (channels - channels // 2), 3)))
    flow = Flow(Logistic(shape), [Logit(), coupling])
    return FlowDistribution(flow, event_shape=shape, embed=ConvNet(channels, 3))


def real_flow(features: int, seen: int) -> Distribution:
    """A flow on the whole space that sees what a layer shows it."""
    layers = [
        AffineCoupling(mlp(features // 2, 2 * (features - features // 2), context_features=seen)),
        Affine((features,), net=mlp(seen, 2 * features)),
    ]
    return FlowDistribution(Flow(Logistic(features), layers))


# Instances --------------------------------------------------------------------------------------


def rounding(shape: Sequence[int], k: int, context=None, **kwargs) -> Example:
    top = 1.0 if kwargs.get("scale", True) else float(k)
    base = Categorical(shape, k, torch.linspace(-0.5, 0.5, k))
    box = Uniform(shape, 0.0, top)
    return Example(Rounding(k, **kwargs), box.sample_and_log_prob, base, context)


class Stretched(Distribution):
    """A density on [0, K)."""

    def __init__(self, shape: Sequence[int], k: int) -> None:
        super().__init__(shape)
        self.k = k
        self.inner = LogitLogistic(shape, loc=0.3, scale=0.8)

    def _log_prob(self, x, context):
        return self.inner.log_prob(x / self.k) - math.prod(self.event_shape) * math.log(self.k)

    def _sample(self, n, context, temperature):
        return self.k * self.inner.sample(n)


def dequantization(shape: Sequence[int], k: int, context=None, **kwargs) -> Example:
    base = Stretched(shape, 1 if kwargs.get("scale", True) else k)
    return Example(Dequantization(k, **kwargs), uniform_integers(tuple(shape), k), base, context)


def slicing(kept: Sequence[int], decoder: Distribution, context=None, dim: int = 1, **kwargs):
    transform = Slice(decoder, kept[dim - 1], dim, **kwargs)
    wide = Logistic(transform.event_shape, scale=1.3)
    return Example(transform, wide.sample_and_log_prob, StandardNormal(kept), context)


def augmenting(kept: Sequence[int], encoder: Distribution, context=None, dim: int = 1, **kwargs):
    transform = Augment(encoder, kept[dim - 1], dim, **kwargs)
    wide = DiagonalNormal(kept, scale=1.3)
    base = DiagonalNormal(transform.latent_shape, loc=0.2, scale=0.9)
    return Example(transform, wide.sample_and_log_prob, base, context)


def scores(shape: Sequence[int], k: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Inputs for an argmax from scores of any shape (C, ...)."""
    flat = scores_below_a_greatest(math.prod(shape), k)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        x, log_r = flat(n)
        x = x.reshape(n, *shape, k).movedim(-1, 2)
        return x.reshape(n, shape[0] * k, *shape[1:]), log_r

    return sample


def argmax(cls: type, shape: Sequence[int], k: int, context=None, **kwargs) -> Example:
    """Either direction of any of the three."""
    transform = cls(shape, k, **kwargs)
    if isinstance(transform, Inverse):
        latents = transform._shape_of_latent()
        size = math.prod(latents)
        family = Gumbel if cls is GumbelArgmaxGenerative else Logistic
        loc = torch.linspace(-0.2, 0.4, size).reshape(latents)
        base = family(latents, loc=loc)
        return Example(transform, uniform_integers(tuple(shape), k), base, context)
    base = Categorical(shape, k, torch.linspace(-0.5, 0.5, k))
    if cls is ArgmaxInference:
        return Example(transform, scores(shape, k), base, context)
    family = Gumbel if cls is GumbelArgmaxInference else Logistic
    wide = family(transform.event_shape, scale=1.4)
    return Example(transform, wide.sample_and_log_prob, base, context)


def logistic(features: int, out: int | None = None, **kwargs) -> Distribution:
    out = out or features
    return Logistic((out,), net=mlp(features, 2 * out, **kwargs))


def dequantized_flow() -> Example:
    layers = [
        Dequantization(4, noise=flow_noise(2)),
        Logit(),
        Affine((2,), [0.1, -0.2], [0.8, 0.9], learn=True),
        AffineCoupling(mlp(1, 2), "tanh_exp"),
    ]
    return Example(Sequential(layers), uniform_integers((2,), 4), Logistic((2,)))


def multi_scale() -> Example:
    """Half of the channels leave early; the rest are transformed on, and halved again."""
    layers = [
        AffineCoupling(mlp(2, 4)),
        Slice(StandardNormal((2,)), keep=2),
        AffineCoupling(mlp(1, 2)),
        Slice(DiagonalNormal((1,), net=mlp(1, 2)), keep=1),
    ]
    wide = Logistic((4,), scale=1.2)
    return Example(Sequential(layers), wide.sample_and_log_prob, StandardNormal((1,)))


def augmented_flow() -> Example:
    layers = [
        Augment(DiagonalNormal((2,), scale=1.2, net=None), keep=2),
        AffineCoupling(mlp(2, 4)),
        AffineCoupling(mlp(2, 4), swap=True),
    ]
    wide = DiagonalNormal((2,), scale=1.6)
    return Example(Sequential(layers), wide.sample_and_log_prob, StandardNormal((4,)))


EXTRA: dict[str, Callable[[], Example]] = {
    "Rounding-uniform": lambda: rounding((2,), 3),
    "Rounding-uniform-image": lambda: rounding((1, 2, 2), 256),
    "Rounding-level": lambda: rounding((2,), 3, scale=False),
    "Rounding-level-noise": lambda: rounding(
        (2,), 4, scale=False, noise=LogitLogistic((2,), loc=0.3, learn=True)
    ),
    "Rounding-flow": lambda: rounding((2,), 4, noise=flow_noise(2)),
    "Rounding-context": lambda: rounding(
        (2,), 5, vector, noise=LogitLogistic((2,), net=mlp(4, 4)), context_features=2
    ),
    "Rounding-image-flow": lambda: rounding((2, 2, 2), 3, noise=image_flow_noise(2, 2)),
    "Dequantization-uniform": lambda: dequantization((2,), 3),
    "Dequantization-uniform-image": lambda: dequantization((1, 2, 2), 4),
    "Dequantization-one-level": lambda: dequantization((2,), 1),
    "Dequantization-level": lambda: dequantization((2,), 4, scale=False),
    "Dequantization-level-noise": lambda: dequantization(
        (2,), 3, scale=False, noise=LogitLogistic((2,), net=mlp(2, 4)), clamp=False
    ),
    "Dequantization-flow": lambda: dequantization((2,), 4, noise=flow_noise(2)),
    "Dequantization-context": lambda: dequantization(
        (2,), 5, vector, noise=LogitLogistic((2,), net=mlp(4, 4)), context_features=2
    ),
    "Dequantization-image-flow": lambda: dequantization((2, 2, 2), 3, noise=image_flow_noise(2, 2)),
    "Dequantization-image-context": lambda: dequantization(
        (1, 2, 2),
        3,
        vector,
        noise=LogitLogistic((1, 2, 2), net=small(ConvNet(3, 2))),
        context_features=2,
    ),
    "Inverse-of-Rounding": lambda: Example(
        Inverse(Rounding(3)), uniform_integers((2,), 3), Uniform((2,))
    ),
    "Inverse-of-Dequantization": lambda: Example(
        Inverse(Dequantization(3, noise=flow_noise(2), clamp=False)),
        Uniform((2,)).sample_and_log_prob,
        Categorical((2,), 3),
    ),
    "Sequential-dequantized": dequantized_flow,
    "Slice-fixed": lambda: slicing((2,), StandardNormal((1,))),
    "Slice-learned": lambda: slicing((1,), Logistic((2,), loc=0.3, scale=0.8, learn=True)),
    "Slice-net": lambda: slicing((2,), DiagonalNormal((2,), net=mlp(2, 4))),
    "Slice-flow": lambda: slicing((1,), real_flow(2, 1)),
    "Slice-context-alone": lambda: slicing(
        (2,), DiagonalNormal((1,), net=mlp(4, 2)), vector, context_features=2
    ),
    "Slice-last-dimension": lambda: slicing((1, 2), DiagonalNormal((1, 3), scale=0.7), dim=2),
    "Slice-image-net": lambda: slicing(
        (1, 2, 2), DiagonalNormal((1, 2, 2), net=small(ConvNet(1, 2)))
    ),
    "Slice-image-context": lambda: slicing(
        (1, 2, 2),
        DiagonalNormal((1, 2, 2), net=small(ConvNet(3, 2))),
        vector,
        context_features=2,
    ),
    "Slice-multi-scale": multi_scale,
    "Augment-fixed": lambda: augmenting((2,), StandardNormal((1,))),
    "Augment-flow": lambda: augmenting((2,), real_flow(2, 2)),
    "Augment-context": lambda: augmenting(
        (1,), Logistic((1,), net=mlp(3, 2)), vector, context_features=2
    ),
    "Augment-last-dimension": lambda: augmenting((1, 2), Logistic((1, 1)), dim=2),
    "Augment-image-net": lambda: augmenting(
        (1, 2, 2), Logistic((1, 2, 2), net=small(ConvNet(1, 2), 0.3))
    ),
    "Augment-then-couplings": augmented_flow,
    "Inverse-of-Augment": lambda: Example(
        Inverse(Augment(DiagonalNormal((1,), net=mlp(1, 2)), keep=1)),
        Logistic((2,), scale=1.2).sample_and_log_prob,
        StandardNormal((1,)),
    ),
    "ArgmaxInference-default": lambda: argmax(ArgmaxInference, (2,), 3),
    "ArgmaxInference-flow": lambda: argmax(ArgmaxInference, (1,), 4, noise=real_flow(4, 4)),
    "ArgmaxInference-context": lambda: argmax(
        ArgmaxInference, (2,), 2, vector, noise=logistic(6, 4), context_features=2
    ),
    "ArgmaxInference-image": lambda: argmax(
        ArgmaxInference, (1, 2, 1), 3, noise=Logistic((3, 2, 1), net=small(ConvNet(3, 6)))
    ),
    "ArgmaxGenerative-default": lambda: argmax(ArgmaxGenerative, (2,), 3),
    "ArgmaxGenerative-flow": lambda: argmax(ArgmaxGenerative, (1,), 4, noise=real_flow(4, 4)),
    "ArgmaxGenerative-context": lambda: argmax(
        ArgmaxGenerative, (2,), 2, vector, noise=logistic(6, 4), context_features=2
    ),
    "ArgmaxGenerative-image": lambda: argmax(
        ArgmaxGenerative, (2, 1, 2), 2, noise=Logistic((4, 1, 2), net=small(ConvNet(4, 8)))
    ),
    "GumbelArgmaxInference-default": lambda: argmax(GumbelArgmaxInference, (2,), 3),
    "GumbelArgmaxInference-learned": lambda: argmax(
        GumbelArgmaxInference, (2,), 3, logits=[0.2, -0.3, 0.1], learn=True
    ),
    "GumbelArgmaxInference-image": lambda: argmax(
        GumbelArgmaxInference, (2, 1, 2), 2, net=small(ConvNet(4, 4))
    ),
    "GumbelArgmaxGenerative-fixed": lambda: argmax(
        GumbelArgmaxGenerative, (2,), 3, logits=[[-0.4, -0.3, -0.2], [0.0, -0.1, 0.1]]
    ),
    "GumbelArgmaxGenerative-learned": lambda: argmax(
        GumbelArgmaxGenerative, (2, 2), 2, logits=[-0.3, -0.2], learn=True
    ),
    "GumbelArgmaxGenerative-context": lambda: argmax(
        GumbelArgmaxGenerative, (1,), 4, vector, net=mlp(4, 4, context_features=2)
    ),
    "BinaryArgmaxInference-default": lambda: argmax(BinaryArgmaxInference, (1,), 8),
    "BinaryArgmaxInference-image": lambda: argmax(
        BinaryArgmaxInference, (1, 2, 1), 4, noise=Logistic((2, 2, 1), net=small(ConvNet(2, 4)))
    ),
    "BinaryArgmaxInference-context": lambda: argmax(
        BinaryArgmaxInference, (2,), 2, vector, noise=logistic(4, 2), context_features=2
    ),
    "BinaryArgmaxGenerative-default": lambda: argmax(BinaryArgmaxGenerative, (1,), 8),
    "BinaryArgmaxGenerative-flow": lambda: argmax(
        BinaryArgmaxGenerative, (1,), 4, noise=real_flow(2, 2)
    ),
    "BinaryArgmaxGenerative-context": lambda: argmax(
        BinaryArgmaxGenerative, (2,), 2, vector, noise=logistic(4, 2), context_features=2
    ),
}


def build(name: str) -> Example:
    with double_precision():
        return EXTRA[name]()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", EXTRA)
def test_contract(name: str, check: str, double):
    proof = CHECKS[check](build(name))
    assert proof.ok, proof.message
    if check == "unit_mass":
        assert proof.applies and proof.measured["standard_error"] < 0.02


# Mutations ----------------------------------------------------------------------------------------


class WithoutItsVolume(Rounding):
    def _volume(self, x):
        return 0.0


class TurnedWithoutItsVolume(Inverse):
    def __init__(self):
        super().__init__(WithoutItsVolume(3))


class NoiseOfAnotherLevel(Rounding):
    def _inverse_and_ldj(self, z, context):
        x, ldj = super()._inverse_and_ldj(self.num_levels - 1 - z, context)
        return x, ldj


class SliceWithoutItsDecoder(Slice):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, torch.zeros_like(ldj)


class SliceOfTheOtherEnd(Slice):
    def _inverse_and_ldj(self, z, context):
        x, ldj = super()._inverse_and_ldj(z, context)
        return x.flip(1), ldj


class SliceThatSeesNothing(Slice):
    def _inverse_and_ldj(self, z, context):
        _, ldj = super()._inverse_and_ldj(z, context)
        x, _ = super()._inverse_and_ldj(torch.zeros_like(z), context)
        return torch.cat([z, x[:, self.keep :]], 1), ldj


class ArgmaxWithoutItsSlope(ArgmaxInference):
    def _unthresholded(self, x, z):
        v, slope = super()._unthresholded(x, z)
        return v, torch.zeros_like(slope)

    def _thresholded(self, v, z):
        x, slope = super()._thresholded(v, z)
        return x, torch.zeros_like(slope)


class ArgmaxWithoutAThreshold(ArgmaxInference):
    def _thresholded(self, v, z):
        return v, torch.zeros_like(v)


class ArgmaxOfTheLeast(ArgmaxInference):
    def _category(self, x):
        return x.argmin(2)


class GumbelAtTheWrongTop(GumbelArgmaxInference):
    def _score(self, x, z, context):
        return super()._score(x, z, context) + 0.1


class BinaryBackwards(BinaryArgmaxInference):
    def _sign(self, z):
        return super()._sign(z).flip(2)


def mutant(transform: Transform, like: str) -> Example:
    right = build(like)
    return Example(transform, right.sample, right.base, right.context)


def noisy(cls: type[Rounding]) -> Rounding:
    return cls(4, noise=LogitLogistic((2,), net=MLP(2, 4, [8], "tanh")))


def conditional(cls: type[Slice]) -> Slice:
    return cls(DiagonalNormal((2,), net=MLP(2, 4, [8], "tanh")), keep=2)


MUTANTS: dict[str, tuple[Callable[[], Example], set[str]]] = {
    "rounding without its volume": (
        lambda: mutant(WithoutItsVolume(3), "Rounding-uniform"),
        {"unit_mass", "generation"},
    ),
    "dequantization without its volume": (
        lambda: mutant(TurnedWithoutItsVolume(), "Dequantization-uniform"),
        {"unit_mass"},
    ),
    "noise of another level": (
        lambda: mutant(noisy(NoiseOfAnotherLevel), "Rounding-flow"),
        {"round_trip", "agreement", "generation"},
    ),
    "slice without its decoder": (
        lambda: mutant(conditional(SliceWithoutItsDecoder), "Slice-net"),
        {"unit_mass", "gradients", "agreement"},
    ),
    "slice of the other end": (
        lambda: mutant(conditional(SliceOfTheOtherEnd), "Slice-net"),
        {"round_trip", "agreement", "generation"},
    ),
    "slice that sees nothing": (
        lambda: mutant(conditional(SliceThatSeesNothing), "Slice-net"),
        {"agreement"},
    ),
    "argmax without its slope": (
        lambda: mutant(ArgmaxWithoutItsSlope((2,), 3), "ArgmaxInference-default"),
        {"unit_mass"},
    ),
    "argmax without a threshold": (
        lambda: mutant(ArgmaxWithoutAThreshold((2,), 3), "ArgmaxInference-default"),
        {"round_trip", "generation"},
    ),
    "argmax of the least": (
        lambda: mutant(ArgmaxOfTheLeast((2,), 3), "ArgmaxInference-default"),
        {"round_trip"},
    ),
    "gumbel off by a constant": (
        lambda: mutant(GumbelAtTheWrongTop((2,), 3), "GumbelArgmaxInference-default"),
        {"unit_mass", "agreement"},
    ),
    "binary digits backwards": (
        lambda: mutant(BinaryBackwards((1,), 8), "BinaryArgmaxInference-default"),
        {"round_trip"},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_found(name: str, double):
    make, expected = MUTANTS[name]
    example = make()
    failing = {
        p.check: p.message for p in (check(example) for check in CHECKS.values()) if not p.ok
    }
    assert expected <= set(failing), failing
