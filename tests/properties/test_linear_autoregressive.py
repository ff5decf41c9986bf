"""The contract for autoregressive and linear layers, convolutions, squeeze, masks, batch norm."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from surflow.distributions import DiagonalNormal, StandardNormal, Uniform
from surflow.nets import MADE
from surflow.proofs import CHECKS, compiles, double_precision, turned
from surflow.transforms import (
    AdditiveMap,
    AffineCoupling,
    AffineMap,
    Autoregressive,
    BatchNorm,
    Conv1x1,
    Example,
    FullLinear,
    HouseholderLinear,
    Inverse,
    MaskedAffineAutoregressive,
    MaskedLogisticMixtureAutoregressive,
    MaskedSplineAutoregressive,
    PeriodicConv2d,
    PLULinear,
    QRLinear,
    Squeeze,
    Transform,
    Unsqueeze,
    channel_mask,
    checkerboard_mask,
)


def real(
    transform: Transform,
    shape: Sequence[int],
    context: Callable[[int], Tensor] | None = None,
    wide: float = 1.4,
) -> Example:
    """R^d to R^d: wide normal inputs, a normal base off the origin, which sees a rotation."""
    return Example(
        transform,
        DiagonalNormal(shape, scale=wide).sample_and_log_prob,
        DiagonalNormal(shape, loc=0.2),
        context=context,
    )


def vector(n: int) -> Tensor:
    return torch.randn(n, 2)


def moved(transform: Transform, std: float = 0.1) -> Transform:
    """Its parameters moved from where they start."""
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return transform


def unit_box(transform: Transform, features: int) -> Example:
    box = Uniform((features,))
    return Example(transform, box.sample_and_log_prob, box)


def trained(channels: int, shape: Sequence[int], **kwargs) -> Example:
    """A batch norm in evaluation mode, its running statistics from a few batches."""
    layer = moved(BatchNorm(channels, momentum=0.5, **kwargs))
    for _ in range(3):
        layer(0.8 * torch.randn(32, *shape) - 0.3)
    return real(layer.eval(), shape, wide=1.6)


def reshaping(transform: Transform, x: Sequence[int], z: Sequence[int]) -> Example:
    return Example(transform, StandardNormal(x).sample_and_log_prob, StandardNormal(z))


def conv_net(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.Tanh())


MADE_ARGS = {"hidden_features": [8, 8], "activation": "tanh"}
INSTANCES: dict[str, Callable[[], Example]] = {
    "affine-exp-context-random": lambda: real(
        MaskedAffineAutoregressive(4, context_features=2, ordering="random", seed=3, **MADE_ARGS),
        (4,),
        vector,
        wide=1.8,
    ),
    "affine-tanh_exp-residual": lambda: real(
        MaskedAffineAutoregressive(
            4, "tanh_exp", hidden_features=[8, 8, 8], activation="silu", residual=True
        ),
        (4,),
        wide=1.8,
    ),
    "affine-sigmoid-no-hidden-layer": lambda: real(
        MaskedAffineAutoregressive(3, "sigmoid", hidden_features=[]), (3,), wide=2.5
    ),
    "affine-no-hidden-layer-context": lambda: real(
        MaskedAffineAutoregressive(2, hidden_features=[], context_features=2), (2,), vector, 2.0
    ),
    "affine-narrow-net": lambda: real(
        MaskedAffineAutoregressive(5, hidden_features=[2, 3], activation="tanh"), (5,), wide=1.6
    ),
    "affine-one-feature-context": lambda: real(
        MaskedAffineAutoregressive(1, context_features=2, **MADE_ARGS), (1,), vector, 2.0
    ),
    "additive-reversed": lambda: real(
        Autoregressive(AdditiveMap(), MADE(3, 1, ordering="reversed", **MADE_ARGS)), (3,)
    ),
    "spline-context-given-order": lambda: real(
        MaskedSplineAutoregressive(
            3, 4, (-2.0, 3.0), context_features=2, ordering=[2, 0, 1], **MADE_ARGS
        ),
        (3,),
        vector,
        wide=1.6,
    ),
    "spline-no-tails": lambda: unit_box(MaskedSplineAutoregressive(3, 4, None, **MADE_ARGS), 3),
    "mixture-context-residual": lambda: real(
        MaskedLogisticMixtureAutoregressive(2, 2, context_features=2, residual=True, **MADE_ARGS),
        (2,),
        vector,
        wide=2.0,
    ),
    "inverse-affine-softplus": lambda: real(
        Inverse(MaskedAffineAutoregressive(3, "softplus", **MADE_ARGS)), (3,), wide=1.8
    ),
    "inverse-spline-context": lambda: real(
        Inverse(MaskedSplineAutoregressive(3, 4, context_features=2, **MADE_ARGS)),
        (3,),
        vector,
        wide=1.6,
    ),
    "full-vector": lambda: real(moved(FullLinear(4)), (4,)),
    "full-image-identity": lambda: real(moved(FullLinear(2, init="identity")), (2, 2, 2)),
    "plu-image": lambda: real(moved(PLULinear(3)), (3, 2, 1)),
    "plu-sequence-identity": lambda: real(moved(PLULinear(3, init="identity")), (3, 2)),
    "householder-one-reflection-image": lambda: real(HouseholderLinear(3, 1), (3, 1, 2)),
    "householder-many-reflections": lambda: real(HouseholderLinear(3, 7), (3,)),
    "qr-vector": lambda: real(moved(QRLinear(4)), (4,)),
    "qr-two-reflections-image": lambda: real(moved(QRLinear(3, 2)), (3, 2, 1)),
    "linear-one-feature": lambda: real(moved(FullLinear(1)), (1,)),
    **{
        f"conv1x1-{name}": lambda name=name: real(moved(Conv1x1(3, name)), (3, 1, 2))
        for name in ("full", "plu", "qr", "orthogonal")
    },
    "periodic-3x3-odd": lambda: real(moved(PeriodicConv2d(1, 3), 0.05), (1, 3, 3), wide=1.2),
    "periodic-3x3-even": lambda: real(moved(PeriodicConv2d(1, 3), 0.05), (1, 3, 4), wide=1.2),
    "periodic-1x1": lambda: real(moved(PeriodicConv2d(2, 1), 0.05), (2, 1, 2)),
    "squeeze-3": lambda: reshaping(Squeeze(3), (1, 3, 3), (9, 1, 1)),
    "unsqueeze-3": lambda: reshaping(Unsqueeze(3), (9, 1, 1), (1, 3, 3)),
    "squeeze-channels": lambda: reshaping(Squeeze(), (2, 2, 2), (8, 1, 1)),
    "batch-norm-vector-fixed": lambda: trained(3, (3,), affine=False),
    "batch-norm-image": lambda: trained(2, (2, 2, 2)),
    "coupling-checkerboard": lambda: real(
        AffineCoupling(conv_net(2, 4), "softplus", mask=checkerboard_mask(2, 2)), (2, 2, 2)
    ),
    "coupling-channels-inverted": lambda: real(
        AffineCoupling(conv_net(3, 6), "softplus", mask=channel_mask(3, invert=True)), (3, 2, 1)
    ),
}


def build(name: str) -> Example:
    with double_precision():
        return INSTANCES[name]()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", INSTANCES)
def test_contract(name: str, check: str, double):
    proof = CHECKS[check](build(name))
    assert proof.ok, proof.message


@pytest.mark.parametrize("name", INSTANCES)
def test_contract_of_the_inverse(name: str, double):
    example = turned(build(name))
    proofs = [check(example) for check in CHECKS.values()]
    assert [f"{p.check}: {p.message}" for p in proofs if not p.ok] == []
    applied = {p.check for p in proofs if p.applies}
    assert {"round_trip", "jacobian", "agreement", "flags", "dtypes"} <= applied


# Compiling ---------------------------------------------------------------------------------------

# instances that are not the example of their class, which test_compile.py compiles
COMPILED = ("conv1x1-full", "conv1x1-plu", "coupling-checkerboard")


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name: str, double):
    proof = compiles(build(name))
    assert proof.ok and proof.applies, proof.message


def test_batch_norm_compiles_in_training(double):
    plain, layer = BatchNorm(2), BatchNorm(2)
    x = 1.5 * torch.randn(16, 2, 2, 2) + 0.5
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        (z, ldj), (expected, expected_ldj) = compiled(x), plain(x)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(ldj, expected_ldj)
    torch._dynamo.reset()
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer)
    assert not torch.equal(layer.running_mean, torch.zeros(2))


# What is wrong must fail -------------------------------------------------------------------------


class SeesItself(MADE):
    """An output sees its own feature: the layer is no longer triangular."""

    def _derive(self):
        super()._derive()
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(1, self.features + 1)
        first, last = self.layers
        own = self._hidden_degrees[0]
        last.set_mask(place.repeat_interleave(self.params_per_feature).unsqueeze(1) >= own)
        first.set_mask(own.unsqueeze(1) >= place)


class OneDeterminantAnImage(Conv1x1):
    """The determinant of one pixel instead of one for each."""

    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, ldj / x[0, 0].numel()


class InvertsTheTranspose(HouseholderLinear):
    def _solve(self, columns):
        return self._multiply(columns)


class EachFrequencyOnce(PeriodicConv2d):
    """Forgets that an inner frequency of a real transform stands for two."""

    def _log_abs_det(self, response, x):
        return torch.linalg.slogdet(response)[1].sum().expand(x.shape[0])


class WithoutItsGamma(BatchNorm):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, ldj - x[0, 0].numel() * self.log_gamma.sum()


MUTANTS: dict[str, tuple[Callable[[], Example], set[str]]] = {
    "an output sees its own feature": (
        lambda: real(Autoregressive(AffineMap(), SeesItself(3, 2, [12], "tanh")), (3,)),
        {"jacobian", "round_trip", "agreement"},
    ),
    "one determinant an image": (
        lambda: real(moved(OneDeterminantAnImage(2)), (2, 2, 2)),
        {"jacobian", "agreement"},
    ),
    "inverts the transpose": (
        lambda: real(InvertsTheTranspose(3), (3,)),
        {"round_trip", "agreement", "generation"},
    ),
    "each frequency once": (
        lambda: real(moved(EachFrequencyOnce(1), 0.1), (1, 3, 4), wide=1.2),
        {"jacobian"},
    ),
    "batch norm without its gamma": (
        lambda: real(moved(WithoutItsGamma(2), 0.3).eval(), (2, 2)),
        {"jacobian"},
    ),
    "batch norm left in training": (
        lambda: real(moved(BatchNorm(2), 0.3), (2,)),
        {"row_independence", "round_trip", "agreement", "batch_of_one"},
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
