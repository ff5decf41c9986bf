"""Transforms at the edges: extreme parameters, supports, dtypes, messages, state."""

import copy
import importlib
import inspect
import math
import pkgutil
import re

import pytest
import torch
from torch import nn

import surflow.transforms
from surflow.nets import MLP
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
    Exp,
    Inverse,
    LeakyReLU,
    Log,
    LogisticMixtureCoupling,
    LogisticMixtureMap,
    Logit,
    Permute,
    RationalQuadraticSpline,
    RationalQuadraticSplineCoupling,
    Reverse,
    Rotation,
    Sequential,
    Sigmoid,
    Softplus,
    SoftplusInverse,
    Tanh,
    Transform,
    catalogue,
    check_values,
)
from surflow.transforms.bijections.affine import LOG_SCALES

# Rational-quadratic splines ---------------------------------------------------------------------

SPLINES = [RationalQuadraticSpline(6, bound=2.0), RationalQuadraticSpline(5, bound=None)]
EXTREMES = [0.0, 1.0, 50.0, 1e3]


def spline_params(spline, scale, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(spline.num_params, generator=generator)
    return (scale * (signs if scale <= 1 else signs.sign())).to(dtype)


def at(params, x):
    return params.expand(*x.shape, -1)


@pytest.mark.parametrize("spline", SPLINES, ids=["tails", "no tails"])
def test_spline_with_zero_parameters_is_the_identity(spline, double):
    x = torch.linspace(spline.low, spline.high, 101)
    params = torch.zeros(spline.num_params)
    z, log_slope = spline.forward(x, at(params, x))
    torch.testing.assert_close(z, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("spline", SPLINES, ids=["tails", "no tails"])
def test_spline_at_its_knots(spline, double):
    params = spline_params(spline, 1.0, torch.float64)
    knots_x, knots_z, slopes = spline._bins(params)
    z, log_slope = spline.forward(knots_x, at(params, knots_x))
    torch.testing.assert_close(z, knots_z, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_slope, slopes.log(), atol=1e-10, rtol=0)
    torch.testing.assert_close(spline.inverse(z, at(params, z)), knots_x, atol=1e-12, rtol=0)
    assert knots_x[0] == spline.low and knots_x[-1] == spline.high
    # from either side of a knot the spline and its slope are the same
    inner = knots_x[1:-1]
    for side in (-1e-9, 1e-9):
        near, near_slope = spline.forward(inner + side, at(params, inner))
        torch.testing.assert_close(near, knots_z[1:-1], atol=1e-7, rtol=0)
        torch.testing.assert_close(near_slope, slopes[1:-1].log(), atol=1e-6, rtol=0)


def test_spline_tails_are_the_identity(double):
    spline = SPLINES[0]
    params = spline_params(spline, 1.0, torch.float64)
    x = torch.tensor([-100.0, -2.0 - 1e-9, -2.0, 2.0, 2.0 + 1e-9, 1e6])
    z, log_slope = spline.forward(x, at(params, x))
    torch.testing.assert_close(z, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(spline.inverse(x, at(params, x)), x, atol=1e-12, rtol=0)


def test_spline_without_tails_refuses_what_is_outside():
    spline = SPLINES[1]
    params = torch.zeros(2, spline.num_params)
    message = r"RationalQuadraticSpline.forward: expected values in \[0, 1\], got 1 values outside"
    with pytest.raises(ValueError, match=message):
        spline.forward(torch.tensor([0.5, 1.1]), params)
    with pytest.raises(ValueError, match=r"RationalQuadraticSpline.inverse: expected values in"):
        spline.inverse(torch.tensor([-0.1, 0.5]), params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", EXTREMES)
@pytest.mark.parametrize("spline", SPLINES, ids=["tails", "no tails"])
def test_spline_survives_extreme_parameters(spline, scale, dtype):
    edge = 3.0 if spline.tails else 0.0
    x = torch.linspace(spline.low - edge, spline.high + edge, 501).to(dtype)
    for seed in range(3):
        params = spline_params(spline, scale, dtype, seed).requires_grad_()
        value = x.clone().requires_grad_()
        for method in (spline.forward, spline.inverse_and_ldj):
            result, log_slope = method(value, at(params, value))
            assert result.dtype == dtype
            assert log_slope.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert result.isfinite().all() and log_slope.isfinite().all()
            # monotone, up to the rounding of x times a slope of up to 1e3
            slack = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
            assert (result[1:] - result[:-1] >= -slack).all()
            gradients = torch.autograd.grad(result.sum() + log_slope.sum(), [value, params])
            assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("scale", [1.0, 50.0, 1e3])
def test_spline_round_trip_with_extreme_parameters(scale, double):
    for spline in SPLINES:
        params = spline_params(spline, scale, torch.float64)
        z = torch.linspace(spline.low, spline.high, 301)
        x = spline.inverse(z, at(params, z))
        torch.testing.assert_close(
            spline.forward(x, at(params, x))[0], z, atol=1e-8 if scale <= 50 else 1e-6, rtol=0
        )


def test_spline_gradient_through_the_inverse(double):
    spline = SPLINES[0]
    params = at(spline_params(spline, 1.0, torch.float64), torch.empty(40)).clone()
    x = torch.linspace(-2.5, 2.5, 40).requires_grad_()
    z, log_slope = spline.forward(x, params)
    back = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(spline.inverse(back, params).sum(), back)
    torch.testing.assert_close(slope, torch.exp(-log_slope).detach(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_bins": 1}, "num_bins >= 2, got 1"),
        ({"bound": 0.0}, "expected bound > 0"),
        ({"num_bins": 10, "min_bin": 0.1}, "min_bin < 1/num_bins, got 0.1"),
        ({"min_bin": 0.0}, "min_bin < 1/num_bins"),
        ({"min_slope": 0.0}, "0 < min_slope < 1, got 0.0"),
        ({"min_slope": 1.0}, "0 < min_slope < 1, got 1.0"),
    ],
)
def test_spline_arguments(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RationalQuadraticSpline(**kwargs)


# Logistic mixtures ------------------------------------------------------------------------------


def mixture_params(scale=1.0, components=4, rows=200, dtype=torch.float64):
    params = torch.randn(rows, 3 * components + 2, dtype=torch.float64)
    return (scale * params).to(dtype)


def test_logistic_mixture_forward_is_the_formula(double):
    params = mixture_params(0.5)
    x = torch.linspace(-5, 5, 200)
    z, log_slope = LogisticMixtureMap(4, max_log_scale=1e6).forward(x, params)
    weight = params[:, :4].softmax(1)
    e = (x.unsqueeze(1) - params[:, 4:8]) * torch.exp(-params[:, 8:12])
    cdf = (weight * torch.sigmoid(e)).sum(1)
    torch.testing.assert_close(z, params[:, 12].exp() * torch.logit(cdf) + params[:, 13])
    density = (weight * torch.sigmoid(e) * torch.sigmoid(-e) * torch.exp(-params[:, 8:12])).sum(1)
    slope = params[:, 12].exp() * density / (cdf * (1 - cdf))
    torch.testing.assert_close(log_slope, slope.log())


def test_logistic_mixture_inverse(double):
    mixture, params = LogisticMixtureMap(4), mixture_params(1.5)
    for z in (torch.linspace(-30, 30, 200), torch.linspace(-500, 500, 200)):
        x = mixture.inverse(z, params)
        torch.testing.assert_close(mixture.forward(x, params)[0], z, atol=1e-9, rtol=1e-9)
    x = torch.linspace(-20, 20, 200)
    back = mixture.inverse(mixture.forward(x, params)[0], params)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=0)


def test_logistic_mixture_inverse_in_float32():
    mixture, params = LogisticMixtureMap(4), mixture_params(dtype=torch.float32)
    x = torch.linspace(-6, 6, 200)
    back = mixture.inverse(mixture.forward(x, params)[0], params)
    torch.testing.assert_close(back, x, atol=2e-4, rtol=0)


def test_logistic_mixture_gradient_through_the_inverse(double):
    mixture, params = LogisticMixtureMap(3), mixture_params(components=3, rows=30)
    params.requires_grad_()
    x = torch.linspace(-4, 4, 30, requires_grad=True)
    z, log_slope = mixture.forward(x, params)
    at_x = torch.autograd.grad(z.sum(), params, retain_graph=True)[0]
    latent = z.detach().requires_grad_()
    by_z, by_params = torch.autograd.grad(mixture.inverse(latent, params).sum(), [latent, params])
    # z(x(z, theta), theta) = z: dx/dz = 1/z', dx/dtheta = -(dz/dtheta) / z'
    slope = log_slope.detach().exp()
    torch.testing.assert_close(by_z, 1 / slope, rtol=1e-6, atol=0)
    torch.testing.assert_close(by_params, -at_x / slope.unsqueeze(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 50.0, 1e3])
def test_logistic_mixture_survives_extreme_parameters(scale, dtype):
    mixture = LogisticMixtureMap(3)
    x = torch.linspace(-10, 10, 301).to(dtype)
    for seed in range(3):
        torch.manual_seed(seed)
        params = (scale * torch.randn(11).sign()).to(dtype).requires_grad_()
        value = x.clone().requires_grad_()
        for method in (mixture.forward, mixture.inverse_and_ldj):
            result, log_slope = method(value, at(params, value))
            assert log_slope.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert result.isfinite().all() and log_slope.isfinite().all()
            gap = (result[1:] - result[:-1]).double()
            slack = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
            assert (gap >= -slack * (1 + result[1:].double().abs())).all()  # monotone
            gradients = torch.autograd.grad(result.sum() + log_slope.sum(), [value, params])
            assert all(g.isfinite().all() for g in gradients)


def test_logistic_mixture_arguments():
    with pytest.raises(ValueError, match="num_components >= 1, got 0"):
        LogisticMixtureMap(0)


# Affine maps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", LOG_SCALES)
def test_scale_functions_are_their_formulas(scale, double):
    s = torch.linspace(-20, 20, 41)
    expected = {
        "exp": s.exp(),
        "softplus": torch.log1p(s.exp()),
        "sigmoid": torch.sigmoid(s + 2) + 1e-3,
        "tanh_exp": torch.exp(2 * torch.tanh(s / 2)),
    }[scale]
    params = torch.stack([s, torch.full_like(s, 0.5)], -1)
    z, log_scale = AffineMap(scale).forward(torch.full_like(s, 2.0), params)
    torch.testing.assert_close(log_scale, expected.log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z, 2 * expected + 0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", ["softplus", "sigmoid", "tanh_exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_functions_survive_extreme_parameters(scale, dtype):
    s = torch.tensor([-1e3, -50.0, 0.0, 50.0, 1e3], dtype=dtype, requires_grad=True)
    params = torch.stack([s, torch.zeros_like(s)], -1)
    z, log_scale = AffineMap(scale).forward(torch.ones_like(s), params)
    assert z.isfinite().all() and log_scale.isfinite().all()
    assert torch.autograd.grad(z.sum() + log_scale.sum(), s)[0].isfinite().all()
    # the floor of the sigmoid is 1e-3: below it bfloat16 cannot tell neighbours apart
    assert (log_scale[1:] >= log_scale[:-1]).all()


def test_affine_keeps_the_sign_of_a_learned_scale():
    affine = Affine((2,), 1.0, [2.0, -0.5], learn=True)
    z, ldj = affine(torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(z, torch.tensor([[3.0, 0.5]]))
    torch.testing.assert_close(ldj, torch.tensor([0.0]))
    assert {name for name, _ in affine.named_parameters()} == {"shift", "log_scale"}
    assert list(Affine((2,), 1.0, 2.0).parameters()) == []


# Actnorm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5)])
def test_actnorm_standardises_its_first_batch(shape):
    layer = ActNorm(3)
    channel = (1, 3, *[1] * (len(shape) - 1))
    scale, shift = (torch.tensor(v).view(channel) for v in ([0.1, 1.0, 20.0], [5.0, 0.0, -3.0]))
    x = torch.randn(256, *shape) * scale + shift
    assert not layer.initialised
    z, ldj = layer(x)
    assert layer.initialised
    values = z.movedim(1, 0).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(1), torch.ones(3), atol=1e-5, rtol=0)
    positions = math.prod(shape[1:])
    deviations = x.movedim(1, 0).flatten(1).std(1)
    expected = -positions * deviations.log().sum()
    torch.testing.assert_close(ldj, expected.expand(256))
    # a later batch does not set it anew
    before = copy.deepcopy(layer.state_dict())
    layer(10 * torch.randn(8, *shape))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_actnorm_stays_initialised_through_a_state_dict():
    layer = ActNorm(2)
    layer(3 * torch.randn(50, 2) + 1)
    restored = ActNorm(2)
    restored.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2)
    torch.testing.assert_close(restored.train()(x)[0], layer(x)[0], rtol=0, atol=0)
    fresh = ActNorm(2)
    restored.load_state_dict(fresh.state_dict())  # and back to not initialised
    restored(3 * x)
    assert restored.initialised and not torch.equal(restored.shift, torch.zeros(2))
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x)[0], layer(x)[0])


def test_actnorm_does_not_initialise_in_evaluation():
    layer = ActNorm(2).eval()
    x = torch.randn(5, 2)
    assert torch.equal(layer(x)[0], x) and not layer.initialised


def test_actnorm_learns_in_the_step_that_initialises():
    layer = ActNorm(2)
    z, ldj = layer(torch.randn(20, 2) + 1)
    (z.pow(4).sum(1) - ldj).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_actnorm_mistakes():
    with pytest.raises(ValueError, match="num_channels >= 1, got 0"):
        ActNorm(0)
    with pytest.raises(ValueError, match="expected at least 2 values a channel"):
        ActNorm(2)(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"ActNorm.forward: expected 3 channels, got shape \(4, 2"):
        ActNorm(3)(torch.ones(4, 2))
    # a constant channel has no deviation, and still gives finite numbers
    z, ldj = ActNorm(1)(torch.ones(4, 1))
    assert z.isfinite().all() and ldj.isfinite().all()


# Rotations --------------------------------------------------------------------------------------


def test_rotation_turns_counter_clockwise_by_its_angle():
    z, ldj = Rotation(2, angle=math.pi / 2)(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(z, torch.tensor([[0.0, 1.0]]), atol=1e-6, rtol=0)
    assert ldj.item() == 0
    assert torch.equal(Rotation(3)(torch.ones(1, 3))[0], torch.ones(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_orthogonal_in_half_precision_and_under_autocast(dtype):
    rotation = Rotation(5, seed=2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matrix = rotation.matrix()
        z, _ = rotation(torch.ones(2, 5, dtype=dtype))
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(5), atol=1e-5, rtol=0)
    assert z.dtype == dtype
    torch.testing.assert_close(
        z.float().norm(dim=1), torch.full((2,), math.sqrt(5)), rtol=1e-2, atol=0
    )


# Supports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "method", "value", "message"),
    [
        (Exp(), "inverse", -1.0, "Exp.inverse: expected values > 0"),
        (Log(), "forward", 0.0, "Log.forward: expected values > 0"),
        (Sigmoid(), "inverse", 1.0, "Sigmoid.inverse: expected values in (0, 1)"),
        (Logit(), "forward", 0.0, "Logit.forward: expected values in (0, 1)"),
        (Softplus(), "inverse", -2.0, "Softplus.inverse: expected values > 0"),
        (SoftplusInverse(), "forward", 0.0, "SoftplusInverse.forward: expected values > 0"),
        (Tanh(), "inverse", -1.0, "Tanh.inverse: expected values in (-1, 1)"),
        (
            BoxToReal([-1.0], [2.0]),
            "forward",
            2.0,
            "BoxToReal.forward: expected values in (-1, 2)",
        ),
        (AbsInference((1,)), "inverse", -0.5, "AbsInference.inverse: expected values >= 0"),
        (AbsGenerative((1,)), "forward", -0.5, "AbsGenerative.forward: expected values >= 0"),
    ],
)
def test_a_value_outside_the_support(layer, method, value, message):
    x = torch.tensor([[0.5], [value], [0.25]])
    with pytest.raises(ValueError) as error:
        getattr(layer, method)(x)
    assert message in str(error.value)
    assert f"got 1 values outside it, from {value:.6g} to {value:.6g}" in str(error.value)
    with check_values(False):
        getattr(layer, method)(x)  # silent
    with pytest.raises(ValueError):
        getattr(layer, method)(x)  # and on again


def test_not_a_number_is_outside_every_support():
    with pytest.raises(ValueError, match=r"Logit\.forward: expected values"):
        Logit()(torch.tensor([[float("nan")]]))


def test_check_values_comes_back_after_an_error():
    with pytest.raises(RuntimeError), check_values(False):
        raise RuntimeError
    with pytest.raises(ValueError):
        Logit()(torch.tensor([[2.0]]))
    with check_values(False), check_values(True), pytest.raises(ValueError):
        Logit()(torch.tensor([[2.0]]))


def test_checks_of_shape_stay_on():
    with check_values(False), pytest.raises(ValueError, match="expected shape"):
        Affine((2,))(torch.ones(1, 3))


def test_partly_folded_values_may_be_negative_where_they_pass():
    layer = AbsInference((2,), element=1)
    z = torch.tensor([[-3.0, 1.0]])
    assert torch.equal(layer(layer.inverse(z))[0], z)
    with pytest.raises(ValueError, match="at the folded coordinates"):
        layer.inverse(-z)


def test_a_pair_at_zero_is_scored_by_the_sign_that_was_drawn():
    layer = AbsInference((1,), probability=0.9)
    _, ldj = layer.inverse_and_ldj(torch.zeros(20_000, 1))
    share = (ldj > math.log(0.5)).float().mean().item()
    assert share == pytest.approx(0.9, abs=0.01)
    assert torch.allclose(ldj.exp().unique(), torch.tensor([0.1, 0.9]), atol=1e-6)


def test_box_to_real_follows_a_state_dict_with_other_edges():
    layer = BoxToReal([0.0], [1.0])
    layer.load_state_dict(BoxToReal([-2.0], [math.inf]).state_dict())
    x = torch.tensor([[5.0]])
    expected = BoxToReal([-2.0], [math.inf])(x)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match=r"expected values in \(-2, inf\)"):
        layer(torch.tensor([[-3.0]]))


# Shapes and dtypes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Affine((2,))(torch.ones(3)), "Affine.forward: expected (batch, *event), got"),
        (lambda: Tanh()(torch.ones(3)), "Tanh.forward: expected (batch, *event), got shape (3,)"),
        (lambda: Affine((2,))(torch.ones(3, 4)), "expected shape (batch, 2), got (3, 4)"),
        (lambda: Affine((2,)).inverse(torch.ones(3, 4)), "Affine.inverse: expected shape (batch"),
        (lambda: Inverse(Affine((2,)))(torch.ones(3, 4)), "Inverse.forward: expected shape (batch"),
        (lambda: Affine((2,))(torch.ones(3, 2).long()), "floating-point tensor, got torch.int64"),
        (lambda: Tanh()(torch.ones(3, 2, dtype=torch.bool)), "tensor, got torch.bool"),
        (lambda: Tanh()(torch.ones(3, 2, dtype=torch.complex64)), "tensor, got torch.complex64"),
        (lambda: Tanh()([[1.0]]), "Tanh.forward: expected a tensor, got list"),
        (lambda: Tanh()(torch.ones(3, 2), torch.ones(2, 1)), "expected a context of 3 rows, got"),
        (lambda: Tanh()(torch.ones(1, 2), [1.0]), "expected the context as a tensor, got list"),
        (lambda: Affine((2,), scale=0.0), "expected a scale other than 0"),
        (
            lambda: Affine((2,), shift=[1.0, 2.0, 3.0]),
            "broadcast to the event (2,), got shapes (3,)",
        ),
        (
            lambda: Affine((2,), net=MLP(1, 3, [2]))(torch.ones(4, 2), torch.ones(4, 1)),
            "Affine.forward: expected the net to give shape (batch, 4), got (4, 3)",
        ),
        (
            lambda: Affine((2,), net=MLP(1, 4, [2]))(torch.ones(4, 2)),
            "Affine.forward: expected a context, got none",
        ),
        (
            lambda: Elementwise((2,), AffineMap(), MLP(1, 3, [2]))(
                torch.ones(4, 2), torch.ones(4, 1)
            ),
            "Elementwise.forward: expected the net to give shape (4, 4), got (4, 3)",
        ),
        (
            lambda: Elementwise((2,), AffineMap(), MLP(1, 4, [2]))(torch.ones(4, 2)),
            "Elementwise.forward: expected a context, got none",
        ),
        (
            lambda: AffineCoupling(MLP(1, 2, [2], context_features=3))(
                torch.ones(4, 2), torch.ones(4, 2)
            ),
            "AffineCoupling.forward: expected a context with 3 features, got shape (4, 2)",
        ),
        (
            lambda: AffineCoupling(MLP(1, 3, [2]))(torch.ones(4, 2)),
            "AffineCoupling.forward: expected the net to give shape (4, 2), got (4, 3)",
        ),
        (
            lambda: AffineCoupling(MLP(2, 4, [2]))(torch.ones(4, 6)),
            "AffineCoupling.forward: expected 2 features for the net, got shape (4, 3)",
        ),
        (
            lambda: Reverse(dim=2).inverse(torch.ones(4, 2)),
            "Reverse.inverse: expected a dimension 2, got shape (4, 2)",
        ),
        (lambda: AffineCoupling(MLP(1, 2), split="odd"), "one of half, alternate or a positive"),
        (lambda: AffineCoupling(MLP(1, 2), split=0), "positive int, got 0"),
        (
            lambda: AffineCoupling(MLP(1, 2), split=2).inverse(torch.ones(1, 2)),
            "AffineCoupling.inverse: expected channels that split 2 parts in two, got shape (1, 2)",
        ),
        (
            lambda: AdditiveCoupling(MLP(2, 2), mask=torch.ones(3))(torch.ones(1, 2)),
            "expected a mask that broadcasts to (2,), got (3,)",
        ),
        (
            lambda: AffineMap("square"),
            "AffineMap: expected scale to be one of exp, softplus, sigmoid, tanh_exp",
        ),
        (lambda: LeakyReLU(0.0), "expected slope > 0, got 0.0"),
        (lambda: BoxToReal([0.0], [0.0]), "expected low < high"),
        (lambda: BoxToReal([0.0], [1.0, 2.0]), "expected low < high"),
        (lambda: Permute([0, 0, 1]), "expected each of 0 to 2 once, got [0, 0, 1]"),
        (lambda: Permute([0, 1], dim=0), "expected dim >= 1, got 0"),
        (lambda: Permute([1, 0])(torch.ones(1, 3)), "expected size 2 along dimension 1, got"),
        (lambda: Permute([1, 0], 2)(torch.ones(1, 2)), "expected size 2 along dimension 2, got"),
        (lambda: Reverse(0), "expected dim >= 1, got 0"),
        (lambda: Rotation(1), "expected features >= 2, got 1"),
        (lambda: Rotation(3, angle=1.0), "an angle is for features = 2, got features = 3"),
        (lambda: AbsInference((2,), element=2), "expected elements in 0 to 1, got [2]"),
        (lambda: AbsInference((2,), element=[]), "expected elements in 0 to 1, got []"),
        (lambda: AbsInference((2,), probability=1.0), "expected 0 < probability < 1, got 1.0"),
        (
            lambda: AbsInference((2,), net=MLP(2, 1, [2]))(torch.ones(3, 2)),
            "AbsInference.forward: expected the net to give shape (3, 2), got (3, 1)",
        ),
        (
            lambda: AbsGenerative((2,), net=MLP(2, 2, [2], context_features=1))(torch.ones(3, 2)),
            "AbsGenerative.forward: expected a context with 1 features, got none",
        ),
    ],
)
def test_a_mistake_is_explained(action, message):
    with pytest.raises(ValueError) as error:
        action()
    assert message in str(error.value)


@pytest.mark.parametrize("cls", catalogue(), ids=lambda c: c.__name__)
def test_integer_input_is_rejected(cls):
    example = cls.example()
    x = example.sample(2)[0]
    context = example.context(2) if example.context else None
    if not example.transform.integer_data:
        with pytest.raises(ValueError, match=r"a floating-point tensor, got torch\.int64"):
            example.transform(torch.ones_like(x).long(), context)


@pytest.mark.parametrize("wrong", ["a string", nn.Linear(2, 2)])
def test_composites_take_transforms_alone(wrong):
    with pytest.raises(TypeError, match="Sequential: layer 1 must be a Transform, got"):
        Sequential([Tanh(), wrong])
    with pytest.raises(TypeError, match="Inverse: expected a Transform, got"):
        Inverse(wrong)


# Couplings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("split", "conditioning"), [("half", [0, 1]), ("alternate", [0, 2, 4]), (3, [0, 1, 2])]
)
def test_coupling_leaves_the_conditioning_part(split, conditioning, swap):
    kept = [i for i in range(5) if (i in conditioning) != swap]
    net = MLP(len(kept), 2 * (5 - len(kept)), [8])
    x = torch.randn(6, 5)
    z, _ = AffineCoupling(net, split=split, swap=swap)(x)
    assert [i for i in range(5) if torch.equal(z[:, i], x[:, i])] == kept


def test_coupling_mask_true_conditions():
    mask = torch.tensor([True, False, True])
    x = torch.randn(6, 3)
    for swap in (False, True):
        z, _ = AffineCoupling(MLP(3, 6, [8]), mask=mask, swap=swap)(x)
        assert [torch.equal(z[:, i], x[:, i]) for i in range(3)] == (mask ^ swap).tolist()


def test_couplings_that_start_at_zero_start_as_the_identity():
    x = torch.randn(20, 4)
    for layer in (
        AffineCoupling(MLP(2, 4, [8], zero_init=True)),
        AdditiveCoupling(MLP(2, 2, [8], zero_init=True)),
        RationalQuadraticSplineCoupling(MLP(2, 2 * 23, [8], zero_init=True)),
        Coupling(LogisticMixtureMap(1), MLP(2, 2 * 5, [8], zero_init=True)),
    ):
        z, ldj = layer(x)
        torch.testing.assert_close(z, x, atol=1e-5, rtol=0)
        torch.testing.assert_close(ldj, torch.zeros(20), atol=1e-5, rtol=0)


def test_couplings_in_bfloat16_give_finite_numbers():
    x = torch.randn(32, 4, dtype=torch.bfloat16)
    for split in ("half", "alternate"):
        for layer in (
            AffineCoupling(MLP(2, 4, [8]), "softplus", split=split),
            RationalQuadraticSplineCoupling(MLP(2, 2 * 23, [8]), split=split),
            LogisticMixtureCoupling(MLP(2, 2 * 14, [8]), 4, split=split),
        ):
            z, ldj = layer.to(torch.bfloat16)(x)
            assert z.dtype == torch.bfloat16 and ldj.dtype == torch.float32
            assert z.isfinite().all() and ldj.isfinite().all()


# Declarations and composites --------------------------------------------------------------------


def test_catalogue_finds_every_class():
    for info in pkgutil.walk_packages(surflow.transforms.__path__, "surflow.transforms."):
        importlib.import_module(info.name)

    def below(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    expected = {
        cls
        for cls in below(Transform)
        if cls.__module__.startswith("surflow.transforms")
        and not cls.__name__.startswith("_")
        and not inspect.isabstract(cls)
    }
    assert set(catalogue()) == expected
    assert {AbsGenerative, ActNorm, Inverse, Sequential, Tanh} <= expected
    names = [cls.__name__ for cls in catalogue()]
    assert names == sorted(names)
    assert set(names) <= set(surflow.transforms.__all__)


def test_every_example_is_of_its_class():
    for cls in catalogue():
        assert type(cls.example().transform) is cls


@pytest.mark.parametrize("missing", ["bijective", "stochastic_forward", "stochastic_inverse"])
def test_flags_must_be_declared(missing):
    flags = {"bijective": True, "stochastic_forward": False, "stochastic_inverse": False}
    del flags[missing]
    methods = {
        "_forward": lambda self, x, context: (x, x.sum(1)),
        "_inverse": lambda self, z, context: z,
    }
    with pytest.raises(TypeError, match=f"Undeclared must declare {missing}"):
        type("Undeclared", (Transform,), {**flags, **methods})
    type("_Undeclared", (Transform,), {**flags, **methods})  # a private base may leave it open


def test_a_class_without_an_example_says_so():
    class Bare(Transform):
        bijective, stochastic_forward, stochastic_inverse = True, False, False

        def _forward(self, x, context):
            return x, x.new_zeros(len(x))

        def _inverse(self, z, context):
            return z

    with pytest.raises(NotImplementedError, match=r"Bare has no example\(\)"):
        Bare.example()


def test_a_stochastic_forward_must_say_how_to_score_a_pair():
    class Unscored(Transform):
        bijective, stochastic_forward, stochastic_inverse = False, True, False

        def _forward(self, x, context):
            return x, x.new_zeros(len(x))

        def _inverse(self, z, context):
            return z

    with pytest.raises(NotImplementedError, match="Unscored samples in its forward direction"):
        Inverse(Unscored())(torch.ones(1, 1))


FOLD, UNFOLD, BIJECTION = AbsInference((2,)), AbsGenerative((2,)), Tanh()


@pytest.mark.parametrize(
    ("parts", "bijective", "forward", "inverse", "kind"),
    [
        ([], True, False, False, "bijective"),
        ([BIJECTION, BIJECTION], True, False, False, "bijective"),
        ([BIJECTION, FOLD], False, False, True, "surjective (inference)"),
        ([UNFOLD, BIJECTION], False, True, False, "surjective (generative)"),
        ([UNFOLD, BIJECTION, FOLD], False, True, True, "stochastic"),
        ([Sequential([FOLD])], False, False, True, "surjective (inference)"),
        ([Inverse(Sequential([FOLD]))], False, True, False, "surjective (generative)"),
        ([Inverse(UNFOLD)], False, False, True, "surjective (inference)"),
    ],
)
def test_flags_of_a_sequence_follow_from_its_parts(parts, bijective, forward, inverse, kind):
    sequence = Sequential(parts)
    assert sequence.bijective is bijective
    assert sequence.stochastic_forward is forward
    assert sequence.stochastic_inverse is inverse
    assert sequence.lower_bound is forward
    assert sequence.kind == kind
    assert len(sequence) == len(parts) and list(sequence) == parts


def test_conditional_is_derived():
    conditional = AffineCoupling(MLP(1, 2, [2], context_features=1))
    assert conditional.conditional and not BIJECTION.conditional
    assert Sequential([BIJECTION, Sequential([conditional])]).conditional
    assert Inverse(conditional).conditional
    assert AbsGenerative((2,), net=MLP(2, 2, [2], context_features=1)).conditional
    assert not AbsGenerative((2,), net=MLP(2, 2, [2])).conditional
    assert Affine((2,), net=MLP(1, 4, [2])).conditional


def test_a_sequence_adds_contributions_and_runs_backwards():
    a, b = Affine((2,), 1.0, 2.0), Exp()
    x = torch.randn(5, 2)
    z, ldj = Sequential([a, b])(x)
    torch.testing.assert_close(z, torch.exp(2 * x + 1))
    torch.testing.assert_close(ldj, 2 * math.log(2) + (2 * x + 1).sum(1))
    back, again = Sequential([a, b]).inverse_and_ldj(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(again, ldj)
    z, ldj = Sequential([])(x)
    assert torch.equal(z, x) and torch.equal(ldj, torch.zeros(5))


class Halve(Transform):
    """(B, D) -> (B, D / 2, 2), for any D: a layer that changes the shape and declares none."""

    bijective, stochastic_forward, stochastic_inverse = True, False, False

    def _forward(self, x, context):
        return x.unflatten(1, (-1, 2)), x.new_zeros(len(x))

    def _inverse(self, z, context):
        return z.flatten(1)


def test_a_sequence_that_changes_the_shape_inverts():
    x = torch.randn(3, 4)
    for layer in (
        Sequential([Affine((4,)), Halve()]),
        Inverse(Inverse(Sequential([Tanh(), Halve()]))),
    ):
        z = layer(x)[0]
        assert z.shape == (3, 2, 2)
        torch.testing.assert_close(layer.inverse(z), x)
        turned = Inverse(layer)
        torch.testing.assert_close(turned(z)[0], x)
        torch.testing.assert_close(turned.inverse(x), z)


def test_trace_unfolds_nested_sequences():
    sequence = Sequential([Tanh(), Sequential([Reverse(), Inverse(Sigmoid())]), Logit()])
    x = torch.tensor([[0.2, 0.9]])
    with check_values(False):
        rows = list(sequence.trace(x))
    names = ["0.Tanh", "1.0.Reverse", "1.1.Inverse(Sigmoid)", "2.Logit"]
    assert [name for name, *_ in rows] == names
    torch.testing.assert_close(rows[0][2], x.tanh())


def test_turning_the_fold_round_is_the_unfold():
    fold = AbsInference((2,), net=MLP(2, 2, [4]))
    unfold = Inverse(fold)
    z, ldj = unfold(torch.rand(50, 2))
    _, expected = fold(z)
    torch.testing.assert_close(ldj, -expected)
    x, pair = unfold.inverse_and_ldj(z)
    torch.testing.assert_close(x, z.abs())
    torch.testing.assert_close(pair, -expected)
