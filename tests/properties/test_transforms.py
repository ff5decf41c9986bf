"""The contract, proved for every transform of the catalogue and for the instances that matter."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from surflow.distributions import DiagonalNormal, Distribution, HalfNormal, StandardNormal, Uniform
from surflow.distributions.base import sum_event
from surflow.nets import MLP
from surflow.proofs import CHECKS, Proof, double_precision, example_of, prove, turned
from surflow.transforms import (
    AbsGenerative,
    AbsInference,
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    AffineMap,
    BoxToReal,
    Coupling,
    Elementwise,
    Example,
    Inverse,
    LeakyReLU,
    LogisticMixtureCoupling,
    LogisticMixtureMap,
    Permute,
    RationalQuadraticSpline,
    RationalQuadraticSplineCoupling,
    Reverse,
    Rotation,
    Sequential,
    Sigmoid,
    Softplus,
    Transform,
    catalogue,
)
from surflow.transforms.bijections.affine import LOG_SCALES

# Instances --------------------------------------------------------------------------------------


class PartlyHalfNormal(Distribution):
    """Half-normal on some channels, normal on the others."""

    def __init__(self, event_shape: Sequence[int], folded: Sequence[int], scale: float = 1.0):
        super().__init__(event_shape)
        mask = torch.zeros(self.event_shape, dtype=torch.bool)
        mask[list(folded)] = True
        self.register_buffer("mask", mask)
        self.half = HalfNormal(event_shape, scale=scale)
        self.whole = DiagonalNormal(event_shape, scale=scale)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        log_normal = self.whole._standard_log_prob(x / self.whole.log_scale.exp())
        log_normal = log_normal - self.whole.log_scale
        log_half = torch.where(x >= 0, log_normal + torch.tensor(2.0).log(), -torch.inf)
        return sum_event(torch.where(self.mask, log_half, log_normal))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        x = self.whole.sample(n, temperature=temperature)
        return torch.where(self.mask, x.abs(), x)


class ConvNet(nn.Module):
    """A convolution of the input and, if there is one, of a context image."""

    def __init__(self, in_channels: int, out_channels: int, context_features: int = 0) -> None:
        super().__init__()
        self.context_features = context_features
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels + context_features, 6, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(6, out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x if context is None else torch.cat([x, context], dim=1))


def real(
    transform: Transform,
    shape: Sequence[int],
    context: Callable[[int], Tensor] | None = None,
    wide: float = 1.4,
) -> Example:
    """R^d to R^d: wide normal inputs, a standard normal base."""
    return Example(
        transform,
        DiagonalNormal(shape, scale=wide).sample_and_log_prob,
        StandardNormal(shape),
        context=context,
    )


def vector(n: int) -> Tensor:
    return torch.randn(n, 2)


def picture(n: int) -> Tensor:
    return torch.randn(n, 1, 2, 2)


def checkerboard() -> Tensor:
    return (torch.arange(2).view(1, 2, 1) + torch.arange(2).view(1, 1, 2)) % 2 == 0


def unit_box(transform: Transform, features: int) -> Example:
    box = Uniform((features,))
    return Example(transform, box.sample_and_log_prob, box)


def fold(shape: Sequence[int], element=None, context=None, **kwargs) -> Example:
    folded = range(shape[0]) if element is None else [element] if element == 0 else element
    return Example(
        AbsInference(shape, element, **kwargs),
        DiagonalNormal(shape, scale=1.2).sample_and_log_prob,
        PartlyHalfNormal(shape, folded),
        context=context,
    )


def unfold(shape: Sequence[int], element=None, context=None, **kwargs) -> Example:
    folded = range(shape[0]) if element is None else [element] if element == 0 else element
    return Example(
        AbsGenerative(shape, element, **kwargs),
        PartlyHalfNormal(shape, folded, scale=1.3).sample_and_log_prob,
        DiagonalNormal(shape, loc=0.3, scale=0.9),
        context=context,
    )


def initialised_actnorm(channels: int, shape: Sequence[int]) -> Example:
    transform = ActNorm(channels)
    transform.initialise(0.8 * torch.randn(64, *shape) - 0.4)
    return real(transform, shape)


def noisy(transform: Elementwise, std: float = 0.5) -> Elementwise:
    nn.init.normal_(transform.params, std=std)
    return transform


def flow_like() -> Example:
    layers = [
        AffineCoupling(MLP(1, 2, [8], "tanh", context_features=2), "tanh_exp"),
        Rotation(2, angle=0.7),
        Sequential([RationalQuadraticSplineCoupling(MLP(1, 11, [8], "tanh"), 4, swap=True)]),
        Inverse(Affine((2,), 0.2, [1.1, -0.8], learn=True)),
    ]
    return real(Sequential(layers), (2,), vector, wide=2.0)


def surjective_sequence() -> Example:
    layers = [
        BoxToReal([-4.0, -4.0], [4.0, 4.0]),
        AffineCoupling(MLP(1, 2, [8], "tanh")),
        AbsInference((2,), net=MLP(2, 2, [8], "tanh")),
        Softplus(),
        Affine((2,), shift=-float(torch.tensor(2.0).log())),
    ]
    box = Uniform((2,), -4.0, 4.0)
    return Example(Sequential(layers), box.sample_and_log_prob, HalfNormal((2,)))


def bound_sequence() -> Example:
    layers = [
        AbsGenerative((2,), net=MLP(2, 2, [8], "tanh", context_features=2)),
        AffineCoupling(MLP(1, 2, [8], "tanh"), "softplus"),
        Permute([1, 0]),
    ]
    half = HalfNormal((2,), scale=1.5)
    return Example(
        Sequential(layers), half.sample_and_log_prob, StandardNormal((2,)), context=vector
    )


EXTRA: dict[str, Callable[[], Example]] = {
    **{
        f"AffineCoupling-{scale}": lambda scale=scale: real(
            AffineCoupling(MLP(2, 4, [8], "tanh"), scale, swap=True), (4,), wide=2.0
        )
        for scale in LOG_SCALES
    },
    **{
        f"AffineCoupling-{split}-{'swap' if swap else 'straight'}": (
            lambda split=split, swap=swap, sizes=sizes: real(
                AffineCoupling(
                    MLP(sizes[swap], 2 * sizes[not swap], [8], "tanh"), split=split, swap=swap
                ),
                (5,),
                wide=2.0,
            )
        )
        for split, sizes in (("half", (2, 3)), ("alternate", (3, 2)), (1, (1, 4)), (4, (4, 1)))
        for swap in (False, True)
    },
    "AffineCoupling-mask-swap": lambda: real(
        AffineCoupling(MLP(3, 6, [8], "tanh"), mask=torch.tensor([True, True, False]), swap=True),
        (3,),
    ),
    "AffineCoupling-context": lambda: real(
        AffineCoupling(MLP(2, 4, [8], "tanh", context_features=2)), (4,), vector
    ),
    "AffineCoupling-image-half": lambda: real(AffineCoupling(ConvNet(1, 4)), (3, 2, 2), wide=1.2),
    "AffineCoupling-image-alternate-context": lambda: real(
        AffineCoupling(ConvNet(2, 2, 1), split="alternate"), (3, 2, 2), picture, wide=1.2
    ),
    "AffineCoupling-image-checkerboard": lambda: real(
        AffineCoupling(ConvNet(2, 4), "sigmoid", mask=checkerboard()), (2, 2, 2), wide=1.5
    ),
    "AffineCoupling-image-checkerboard-swap-context": lambda: real(
        AffineCoupling(ConvNet(2, 4, 1), mask=checkerboard(), swap=True), (2, 2, 2), picture
    ),
    "AdditiveCoupling-image": lambda: real(AdditiveCoupling(ConvNet(1, 1)), (2, 2, 2)),
    "SplineCoupling-narrow-tails": lambda: real(
        RationalQuadraticSplineCoupling(MLP(2, 2 * 14, [8], "tanh"), 5, bound=0.8), (4,)
    ),
    "SplineCoupling-no-tails": lambda: unit_box(
        RationalQuadraticSplineCoupling(MLP(2, 2 * 16, [8], "tanh"), 5, bound=None), 4
    ),
    "SplineCoupling-checkerboard-context": lambda: real(
        RationalQuadraticSplineCoupling(ConvNet(2, 2 * 8, 1), 3, mask=checkerboard()),
        (2, 2, 2),
        picture,
    ),
    "LogisticMixtureCoupling-mask-context": lambda: real(
        LogisticMixtureCoupling(
            MLP(3, 3 * 8, [8], "tanh", context_features=2),
            2,
            mask=torch.tensor([True, False, True]),
        ),
        (3,),
        vector,
    ),
    "Coupling-logistic-image-alternate": lambda: real(
        Coupling(LogisticMixtureMap(2), ConvNet(1, 8), split="alternate"), (2, 1, 2)
    ),
    "Elementwise-logistic-mixture": lambda: real(
        noisy(Elementwise((3,), LogisticMixtureMap(3))), (3,), wide=2.5
    ),
    "Elementwise-logistic-mixture-context": lambda: real(
        Elementwise((2,), LogisticMixtureMap(2), MLP(2, 16, [8], "tanh")), (2,), vector, wide=2.5
    ),
    "Elementwise-affine-image": lambda: real(
        noisy(Elementwise((2, 2, 1), AffineMap("softplus"))), (2, 2, 1), wide=2.5
    ),
    "Elementwise-spline-no-tails": lambda: unit_box(
        noisy(Elementwise((3,), RationalQuadraticSpline(4, bound=None)), 1.0), 3
    ),
    "Elementwise-spline-context-image": lambda: real(
        Elementwise((2, 2, 2), RationalQuadraticSpline(3), ConvNet(1, 16)), (2, 2, 2), picture
    ),
    "Affine-fixed": lambda: real(Affine((3,), [0.1, 0.2, 0.3], -1.3), (3,)),
    "Affine-learned-image": lambda: real(
        Affine((2, 2, 2), torch.full((2, 1, 1), 0.3), 0.9, learn=True), (2, 2, 2)
    ),
    "Affine-context-image": lambda: real(Affine((2, 2, 2), net=ConvNet(1, 4)), (2, 2, 2), picture),
    "ActNorm-vector": lambda: initialised_actnorm(3, (3,)),
    "ActNorm-image": lambda: initialised_actnorm(2, (2, 2, 2)),
    "Permute-last-dimension": lambda: real(Permute.random(4, dim=3), (1, 2, 4)),
    "Reverse-second-dimension": lambda: real(Reverse(2), (2, 3)),
    "Rotation-angle": lambda: Example(
        Rotation(2, angle=0.6),
        DiagonalNormal((2,), scale=1.5).sample_and_log_prob,
        DiagonalNormal((2,), loc=[0.5, 0.0], scale=[0.7, 1.2]),
    ),
    "Rotation-fixed": lambda: real(Rotation(4, learn=False, seed=3), (4,)),
    "LeakyReLU-steep": lambda: real(LeakyReLU(2.0), (3,)),
    "AbsInference-fixed": lambda: fold((2,)),
    "AbsInference-learned": lambda: fold((3,), probability=0.7, learn=True),
    "AbsInference-one": lambda: fold((3,), 0, probability=0.2, learn=True),
    "AbsInference-several": lambda: fold((4,), [3, 1], probability=0.8),
    "AbsInference-net": lambda: fold((3,), [0, 2], net=MLP(3, 2, [8], "tanh")),
    "AbsInference-net-context": lambda: fold(
        (2,), 0, vector, net=MLP(2, 1, [8], "tanh", context_features=2)
    ),
    "AbsInference-image": lambda: fold((2, 2, 2), [1], probability=0.6, learn=True),
    "AbsInference-image-net-context": lambda: fold((2, 2, 2), None, picture, net=ConvNet(2, 2, 1)),
    "AbsGenerative-fixed": lambda: unfold((2,)),
    "AbsGenerative-one": lambda: unfold((3,), 0, probability=0.4, learn=True),
    "AbsGenerative-several": lambda: unfold((3,), [0, 2]),
    "AbsGenerative-net": lambda: unfold((2,), net=MLP(2, 2, [8], "tanh")),
    "AbsGenerative-image-net-context": lambda: unfold(
        (2, 2, 1), [1], picture_21, net=ConvNet(2, 1, 1)
    ),
    "Sequential-flow-context": flow_like,
    "Sequential-surjections": surjective_sequence,
    "Sequential-bound-context": bound_sequence,
    "Sequential-empty": lambda: real(Sequential([]), (2,)),
    "Inverse-of-AbsGenerative": lambda: Example(
        Inverse(AbsGenerative((2,), probability=0.7, learn=True)),
        DiagonalNormal((2,), scale=1.2).sample_and_log_prob,
        HalfNormal((2,)),
    ),
}


def picture_21(n: int) -> Tensor:
    return torch.randn(n, 1, 2, 1)


CATALOGUE = {cls.__name__: lambda cls=cls: example_of(cls) for cls in catalogue()}
INSTANCES = {**CATALOGUE, **EXTRA}


def build(name: str) -> Example:
    with double_precision():
        return INSTANCES[name]()


# Proofs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", INSTANCES)
def test_contract(name: str, check: str, double):
    proof = CHECKS[check](build(name))
    assert proof.ok, proof.message


@pytest.mark.parametrize("name", [n for n in INSTANCES if build(n).transform.bijective])
def test_contract_of_the_inverse(name: str, double):
    example = turned(build(name))
    proofs = [check(example) for check in CHECKS.values()]
    assert [f"{p.check}: {p.message}" for p in proofs if not p.ok] == []
    applied = {p.check for p in proofs if p.applies}
    assert {"round_trip", "jacobian", "agreement", "flags", "dtypes"} <= applied


@pytest.mark.parametrize("name", INSTANCES)
def test_the_checks_that_apply_are_those_of_the_kind(name: str, double):
    example = build(name)
    t = example.transform
    learned = any(p.requires_grad for p in t.parameters())
    for check, applies in (("jacobian", t.bijective), ("gradients", learned)):
        assert CHECKS[check](example).applies == applies


def test_turning_round_asks_for_a_bijection():
    with pytest.raises(ValueError, match=r"expected a bijection, got AbsInference"):
        turned(example_of(AbsInference))


def test_a_check_leaves_the_random_state_as_it_was(double):
    example = build("AbsInference")
    before = torch.random.get_rng_state()
    first, second = CHECKS["unit_mass"](example), CHECKS["unit_mass"](example)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == second
    assert first.measured["mass"] != CHECKS["unit_mass"](example, seed=1).measured["mass"]


def test_prove_runs_every_check():
    proofs = prove(example_of(Sigmoid), n=10_000)
    assert [p.check for p in proofs] == list(CHECKS)
    assert all(isinstance(p, Proof) and p.ok and p.message for p in proofs)
    assert torch.get_default_dtype() == torch.float32


# Mutations: what is wrong must fail, in the check that is there for it ---------------------------


class WrongSign(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, -ldj


class MissingConstant(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, ldj + 0.1


class WrongInverse(Affine):
    def _inverse(self, z, context):
        return super()._inverse(z, context) + 1e-3


class ContributionPerElement(Affine):
    def _forward(self, x, context):
        z, _ = super()._forward(x, context)
        return z, self.log_scale.expand(x.shape)


class OtherPairScore(Affine):
    def _inverse_and_ldj(self, z, context):
        x, ldj = super()._inverse_and_ldj(z, context)
        return x, -ldj


class Detached(Affine):
    def _scale_and_shift(self, context):
        log_scale, shift = super()._scale_and_shift(context)
        return log_scale, shift.detach()


class DeclaredStochasticForward(Affine):
    bijective = False
    stochastic_forward = True


class DeclaredStochasticInverse(Affine):
    bijective = False
    stochastic_inverse = True


class DeclaredNothing(Affine):
    bijective = False


class CentredByTheBatch(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z - z.mean(0), ldj


class NoisyForward(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z + 1e-12 * torch.randn_like(z), ldj


class CoarseUnderAutocast(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z @ torch.eye(z.shape[1], dtype=z.dtype), ldj


class FillsInTheContext(Affine):
    def _scale_and_shift(self, context):
        return super()._scale_and_shift(torch.zeros(1, 2) if context is None else context)


class ReadsAStrayContext(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return (z if context is None else z + 1.0), ldj


class FoldWithoutItsLikelihood(AbsInference):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, torch.zeros_like(ldj)


class FoldThatDrawsTheOtherSign(AbsInference):
    def _inverse(self, z, context):
        return -super()._inverse(z, context)


class FoldDeclaredBijective(AbsInference):
    bijective = True
    stochastic_inverse = False


class UnfoldWithTheWrongSign(AbsGenerative):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, -ldj


def affine(cls: type[Affine], net: nn.Module | None = None) -> Example:
    return real(
        cls((2,), [0.3, -0.2], [1.4, 0.8], learn=True, net=net), (2,), vector if net else None
    )


def folding(cls: type[AbsInference]) -> Example:
    return Example(
        cls((2,), probability=0.8), StandardNormal((2,)).sample_and_log_prob, HalfNormal((2,))
    )


MUTANTS: dict[str, tuple[Callable[[], Example], set[str]]] = {
    "wrong sign": (lambda: affine(WrongSign), {"jacobian", "unit_mass", "generation"}),
    "missing constant": (lambda: affine(MissingConstant), {"jacobian", "unit_mass"}),
    "wrong inverse": (lambda: affine(WrongInverse), {"round_trip", "agreement"}),
    "wrong ldj shape": (
        lambda: affine(ContributionPerElement),
        {"round_trip", "jacobian", "unit_mass", "batch_of_one", "dtypes"},
    ),
    "other pair score": (lambda: affine(OtherPairScore), {"agreement"}),
    "detached parameter": (lambda: affine(Detached), {"gradients"}),
    "declared stochastic forward": (lambda: affine(DeclaredStochasticForward), {"flags"}),
    "declared stochastic inverse": (lambda: affine(DeclaredStochasticInverse), {"flags"}),
    "declared nothing": (lambda: affine(DeclaredNothing), {"flags"}),
    "centred by the batch": (
        lambda: affine(CentredByTheBatch),
        {"row_independence", "round_trip"},
    ),
    "a little noise": (lambda: affine(NoisyForward), {"flags"}),
    "coarse under autocast": (lambda: affine(CoarseUnderAutocast), {"dtypes"}),
    "fills in the context": (
        lambda: affine(FillsInTheContext, MLP(2, 4, [8], "tanh")),
        {"contexts"},
    ),
    "reads a stray context": (lambda: affine(ReadsAStrayContext), {"contexts"}),
    "no likelihood of the sign": (lambda: folding(FoldWithoutItsLikelihood), {"unit_mass"}),
    "draws the other sign": (lambda: folding(FoldThatDrawsTheOtherSign), {"generation"}),
    "fold declared bijective": (
        lambda: folding(FoldDeclaredBijective),
        {"flags", "round_trip"},
    ),
    "wrong sign of a bound": (
        lambda: Example(
            UnfoldWithTheWrongSign((2,)),
            HalfNormal((2,), scale=1.5).sample_and_log_prob,
            StandardNormal((2,)),
        ),
        {"unit_mass"},
    ),
    "a sampler without tails": (
        lambda: real(Affine((2,)), (2,), wide=0.5),
        {"unit_mass"},
    ),
    "a sampler that misses half": (
        lambda: Example(
            Affine((1,)), HalfNormal((1,), scale=1.5).sample_and_log_prob, StandardNormal((1,))
        ),
        {"unit_mass", "generation"},
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_found(mutant: str, double):
    make, expected = MUTANTS[mutant]
    example = make()
    failing = {
        p.check: p.message for p in (check(example) for check in CHECKS.values()) if not p.ok
    }
    assert expected <= set(failing), failing


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: affine(DeclaredStochasticForward), "stochastic_forward is True, but two runs are"),
        (lambda: affine(NoisyForward), "stochastic_forward is False, but two runs differ"),
        (lambda: affine(DeclaredNothing), "stochastic in no direction"),
        (lambda: folding(FoldDeclaredBijective), "stochastic_inverse is False"),
    ],
)
def test_the_message_names_the_flag(make, message, double):
    proof = CHECKS["flags"](make())
    assert not proof.ok and message in proof.message


def test_an_error_of_the_transform_fails_the_check(double):
    example = real(Affine((3,)), (2,))
    proof = CHECKS["round_trip"](example)
    assert not proof.ok
    assert "raised ValueError: Affine.forward: expected shape (batch, 3)" in proof.message


def test_the_right_layers_beside_the_mutants_pass(double):
    for example in (affine(Affine), folding(AbsInference)):
        assert [p.message for p in (c(example) for c in CHECKS.values()) if not p.ok] == []
