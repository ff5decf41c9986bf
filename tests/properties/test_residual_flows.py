"""The contract of planar, radial, Sylvester, residual and continuous flows, beyond the examples."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.nets import MLP, LipschitzMLP
from surflow.proofs import CHECKS, double_precision, turned
from surflow.transforms import (
    Continuous,
    Example,
    Inverse,
    Planar,
    Radial,
    Residual,
    Sequential,
    Sylvester,
    Transform,
)

MASS_DRAWS = 20_000


def real(
    transform: Transform,
    shape: Sequence[int],
    context: Callable[[int], Tensor] | None = None,
    wide: float = 1.7,
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


def with_params(transform: Transform, values: Sequence[float]) -> Transform:
    with torch.no_grad():
        transform.params.copy_(torch.tensor(values))
    return transform


def noisy(transform: Transform, std: float = 0.8) -> Transform:
    nn.init.normal_(transform.params, std=std)
    return transform


def stretched(net: LipschitzMLP, factor: float = 4.0) -> LipschitzMLP:
    """Weights beyond their bound, so that the bound is at work."""
    with torch.no_grad():
        for layer in net.linears:
            layer.weight.mul_(factor)
    return net


class SmallConv(nn.Module):
    """A convolution whose kernel's absolute values sum to less than one: a contraction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.uniform_(self.conv.weight, -0.9 / 9 / channels, 0.9 / 9 / channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


class FieldOfPictures(nn.Module):
    """A field of pictures of one channel; the second is time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


def posterior() -> Transform:
    """Planar, radial and Sylvester layers in the direction that a posterior is drawn in."""
    layers = [
        Planar(2, net=MLP(2, 5, [8], "tanh")),
        Radial(2, net=MLP(2, 4, [8], "tanh")),
        Sylvester(2, net=MLP(2, 12, [8], "tanh")),
    ]
    return Sequential([Inverse(layer) for layer in layers])


INSTANCES: dict[str, Callable[[], Example]] = {
    "Planar-free": lambda: real(noisy(Planar(2)), (2,), wide=2.0),
    "Planar-image": lambda: real(noisy(Planar((1, 2, 2)), 0.5), (1, 2, 2)),
    "Planar-one-dimension": lambda: real(with_params(Planar(1), [0.7, 0.9, 0.2]), (1,)),
    "Planar-constrained": lambda: real(
        with_params(Planar(2), [-2.0, -3.0, 0.6, 0.5, 0.3]), (2,), wide=2.5
    ),
    "Radial-free": lambda: real(noisy(Radial(2)), (2,), wide=2.0),
    "Radial-pulls": lambda: real(with_params(Radial(2), [0.3, -0.2, 1.0, -1.5]), (2,), wide=2.0),
    "Radial-pushes": lambda: real(with_params(Radial(3), [0.1, 0.2, 0.0, -0.3, 1.0]), (3,)),
    "Radial-image": lambda: real(noisy(Radial((1, 2, 2)), 0.5), (1, 2, 2)),
    "Radial-one-dimension": lambda: real(with_params(Radial(1), [0.2, 0.1, 1.0]), (1,)),
    "Sylvester-full": lambda: real(noisy(Sylvester(3), 0.7), (3,)),
    "Sylvester-one-direction": lambda: real(noisy(Sylvester(3, 1), 0.7), (3,)),
    "Sylvester-one-reflection": lambda: real(noisy(Sylvester(3, 2, 1), 0.7), (3,)),
    "Sylvester-image": lambda: real(noisy(Sylvester((2, 2, 1), 2), 0.5), (2, 2, 1)),
    "Residual-lipswish": lambda: real(
        Residual(stretched(LipschitzMLP(2, 2, [8, 8], coefficient=0.8))), (2,), wide=2.0
    ),
    "Residual-elu": lambda: real(Residual(LipschitzMLP(2, 2, [8], "elu")), (2,), wide=2.0),
    "Residual-power-in-evaluation": lambda: real(
        Residual(stretched(LipschitzMLP(2, 2, [8], "tanh", 0.8, norm="power"))).eval(),
        (2,),
        wide=2.0,
    ),
    "Residual-image": lambda: real(
        Residual(SmallConv(1), event_shape=(1, 2, 2)), (1, 2, 2), wide=1.4
    ),
    "Continuous-dopri5-context": lambda: real(
        Continuous(MLP(3, 2, [8], "tanh", context_features=2), rtol=1e-10, atol=1e-10),
        (2,),
        vector,
    ),
    "Continuous-dopri8-adjoint-context": lambda: real(
        Continuous(
            MLP(3, 2, [8], "tanh", context_features=2),
            solver="dopri8",
            rtol=1e-9,
            atol=1e-9,
            adjoint=True,
        ),
        (2,),
        vector,
    ),
    "Continuous-image": lambda: real(
        Continuous(FieldOfPictures(), (1, 1, 2), "rk4", 5, end_time=0.25), (1, 1, 2)
    ),
    "Inverse-amortised": lambda: real(posterior(), (2,), vector, wide=2.0),
}


def build(name: str) -> Example:
    with double_precision():
        torch.manual_seed(0)
        return INSTANCES[name]()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", INSTANCES)
def test_contract(name: str, check: str, double):
    arguments = {"n": MASS_DRAWS} if check == "unit_mass" else {}
    proof = CHECKS[check](build(name), **arguments)
    assert proof.ok, proof.message


@pytest.mark.parametrize("name", INSTANCES)
def test_contract_of_the_inverse(name: str, double):
    example = turned(build(name))
    proofs = [check(example) for check in CHECKS.values()]
    assert [f"{p.check}: {p.message}" for p in proofs if not p.ok] == []
    applied = {p.check for p in proofs if p.applies}
    assert {"round_trip", "jacobian", "gradients", "agreement", "flags", "dtypes"} <= applied


class HalfTheTrace(Residual):
    def _value_and_ldj(self, function, rows):
        value, ldj = super()._value_and_ldj(function, rows)
        return value, 0.5 * ldj


class UnboundSlope(Planar):
    def _unpack(self, params):
        _, w, b, slope = super()._unpack(params)
        return params[:, : self.features], w, b, slope


class InverseWithoutGradient(Planar):
    def _solve(self, z, params):
        x, ldj = super()._solve(z, params)
        return x.detach(), ldj


class ForgetsThatTimeRunsBackwards(Continuous):
    def _inverse_and_ldj(self, z, context):
        x, ldj = super()._inverse_and_ldj(z, context)
        return x, -ldj


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (lambda: real(HalfTheTrace(LipschitzMLP(2, 2, [8], "tanh")), (2,)), "jacobian"),
        (
            lambda: real(with_params(UnboundSlope(2), [-2.0, -3.0, 0.6, 0.5, 0.3]), (2,)),
            "round_trip",
        ),
        (lambda: turned(real(InverseWithoutGradient(2), (2,))), "jacobian"),
        (
            lambda: real(ForgetsThatTimeRunsBackwards(MLP(3, 2, [8], "tanh"), solver="rk4"), (2,)),
            "agreement",
        ),
    ],
)
def test_the_checks_see_what_is_wrong(wrong, check: str, double):
    torch.manual_seed(0)
    assert not CHECKS[check](wrong()).ok
