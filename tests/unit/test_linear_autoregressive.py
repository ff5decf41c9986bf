"""Autoregressive and linear layers, convolutions, squeeze, masks, batch norm, by other means."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from surflow.distributions import StandardNormal
from surflow.models import autoregressive_flow
from surflow.nets import MADE, MaskedLinear
from surflow.transforms import (
    AbsInference,
    AffineCoupling,
    AffineMap,
    Autoregressive,
    BatchNorm,
    Conv1x1,
    FullLinear,
    HouseholderLinear,
    Inverse,
    LogisticMixtureMap,
    MaskedAffineAutoregressive,
    MaskedLogisticMixtureAutoregressive,
    MaskedSplineAutoregressive,
    PeriodicConv2d,
    PLULinear,
    QRLinear,
    Squeeze,
    Unsqueeze,
    channel_mask,
    checkerboard_mask,
)

ORDERINGS = ["natural", "reversed", "random", [2, 0, 3, 1]]
NETS = {
    "two layers": {"hidden_features": [9, 7]},
    "residual": {"hidden_features": [8, 8, 8], "residual": True},
    "narrow": {"hidden_features": [2, 3]},
    "no hidden layer": {"hidden_features": []},
}


def made(ordering="natural", net="two layers", context_features=0, features=4, params=3):
    return MADE(
        features,
        params,
        activation="tanh",
        context_features=context_features,
        ordering=ordering,
        seed=1,
        **NETS[net],
    )


def place_of(net):
    return torch.argsort(net.order)


def context_of(net, n):
    return torch.randn(n, net.context_features) if net.context_features else None


def run(net, x, context):
    return net(x) if context is None else net(x, context)


# MADE --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("ordering", ORDERINGS, ids=str)
@pytest.mark.parametrize("context_features", [0, 2])
def test_made_sees_what_comes_before_and_nothing_else(ordering, net, context_features, double):
    module = made(ordering, net, context_features)
    x, context = torch.randn(1, 4), context_of(module, 1)
    jacobian = torch.autograd.functional.jacobian(lambda v: run(module, v, context), x)
    seen = jacobian.view(4, 3, 4).ne(0)
    place = place_of(module)
    allowed = (place.view(4, 1, 1) > place.view(1, 1, 4)).expand(4, 3, 4)
    assert not (seen & ~allowed).any()
    if net != "narrow":  # a layer with fewer units than degrees cannot see everything
        assert torch.equal(seen, allowed)
    else:
        assert seen.any()
    if context is not None:
        by_context = torch.autograd.functional.jacobian(lambda c: run(module, x, c), context)
        assert by_context.ne(0).all()


def test_made_orderings():
    assert made("natural").order.tolist() == [0, 1, 2, 3]
    assert made("reversed").order.tolist() == [3, 2, 1, 0]
    assert made([2, 0, 3, 1]).order.tolist() == [2, 0, 3, 1]
    drawn = [MADE(20, 1, [4], ordering="random", seed=s).order.tolist() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == list(range(20))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("ordering", ["natural", [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("context_features", [0, 2])
def test_sequential_is_as_many_full_passes(ordering, net, context_features, double):
    module = made(ordering, net, context_features)
    z, context = torch.randn(5, 4), context_of(module, 5)

    def solve(d, params):
        return z[:, d] + params.sin().sum(1)

    x = torch.full((5, 4), math.nan)  # what is not known yet would show
    for d in module.order.tolist():
        params = run(module, x.nan_to_num(7.0), context)
        x[:, d] = solve(d, params[:, 3 * d : 3 * d + 3])
    found = module.sequential(solve, z, context)
    torch.testing.assert_close(found, x, atol=1e-14, rtol=1e-14)


def test_sequential_has_the_arithmetic_of_one_pass():
    module = MADE(16, 5, [64, 64])
    x = torch.randn(8, 16)
    with FlopCounterMode(display=False) as full:
        module(x)
    with FlopCounterMode(display=False) as stepwise:
        module.sequential(lambda d, params: params.sum(1), x)
    # less: a block never multiplies by the connections that the mask cuts
    assert 0.4 * full.get_total_flops() < stepwise.get_total_flops() < full.get_total_flops()


def test_made_carries_its_order_in_its_state(double):
    first = MaskedAffineAutoregressive(6, hidden_features=[8], ordering="random", seed=0)
    second = MaskedAffineAutoregressive(6, hidden_features=[8], ordering="random", seed=5)
    x = torch.randn(3, 6)
    assert not torch.equal(first(x)[0], second(x)[0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x)[0], second(x)[0])
    torch.testing.assert_close(second.inverse(first(x)[0]), x, atol=1e-12, rtol=0)


def test_made_with_zero_init_is_the_identity():
    x = torch.randn(7, 3)
    layer = MaskedSplineAutoregressive(3, hidden_features=[8], zero_init=True)
    z, ldj = layer(x)
    torch.testing.assert_close(z, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(ldj, torch.zeros(7), atol=1e-5, rtol=0)


def test_masked_linear_cuts_connections():
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    layer = MaskedLinear(2, 3, mask)
    x = torch.randn(4, 2)
    expected = torch.stack(
        [sum(layer.weight[o, i] * x[:, i] for i in range(2) if mask[o, i]) for o in range(3)], dim=1
    )
    torch.testing.assert_close(layer(x), expected + layer.bias)
    assert "mask" not in layer.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MADE(0, 1), "positive sizes, got features=0"),
        (lambda: MADE(2, 1, [0]), "positive sizes"),
        (lambda: MADE(2, 1, ordering="upwards"), "natural, reversed, random or a permutation"),
        (lambda: MADE(3, 1, ordering=[0, 1, 1]), "each of 0 to 2 once, got [0, 1, 1]"),
        (lambda: MADE(2, 1, [4, 5], residual=True), "hidden layers of one size"),
        (lambda: MADE(2, 1, activation="cube"), "expected one of relu"),
        (lambda: MaskedLinear(2, 3, torch.ones(2, 3)), "mask of shape (3, 2), got (2, 3)"),
        (
            lambda: Autoregressive(LogisticMixtureMap(2), MADE(2, 3)),
            "Autoregressive: expected a net with 8 parameters a feature, got 3",
        ),
    ],
)
def test_bad_arguments_of_the_nets(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# Autoregressive layers ---------------------------------------------------------------------------

LAYERS = {
    "affine": lambda **kw: MaskedAffineAutoregressive(4, "softplus", **kw),
    "spline": lambda **kw: MaskedSplineAutoregressive(4, 5, **kw),
    "mixture": lambda **kw: MaskedLogisticMixtureAutoregressive(4, 3, **kw),
}


def layer_of(name, **kwargs):
    settings = {"hidden_features": [10, 10], "activation": "tanh", "ordering": [2, 0, 3, 1]}
    return LAYERS[name](**{**settings, **kwargs})


def test_affine_autoregressive_in_closed_form(double):
    layer = MaskedAffineAutoregressive(2, hidden_features=[])
    weight, bias = layer.net.layers[0].weight.detach(), layer.net.layers[0].bias.detach()
    x = torch.randn(6, 2)
    z, ldj = layer(x)
    # output layout s0 t0 s1 t1; feature 0 sees nothing, feature 1 sees x0
    s1, t1 = (weight[k, 0] * x[:, 0] + bias[k] for k in (2, 3))
    expected = torch.stack([x[:, 0] * bias[0].exp() + bias[1], x[:, 1] * s1.exp() + t1], dim=1)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(ldj, bias[0] + s1)


@pytest.mark.parametrize("name", LAYERS)
def test_jacobian_is_triangular_in_the_order(name, double):
    layer = layer_of(name)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v)[0], torch.randn(1, 4))
    ordered = jacobian.view(4, 4)[layer.net.order][:, layer.net.order]
    assert torch.equal(ordered.triu(1), torch.zeros(4, 4))
    assert ordered.tril().ne(0).sum() == 10 and (ordered.diagonal() > 0).all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("residual", [False, True])
def test_the_inverse_carries_gradients(name, residual, double):
    layer = layer_of(name, residual=residual)
    z = 0.7 * torch.randn(1, 4)
    x = layer.inverse(z).detach()
    by_x = torch.autograd.functional.jacobian(lambda v: layer(v)[0], x).view(4, 4)
    by_z = torch.autograd.functional.jacobian(layer.inverse, z).view(4, 4)
    torch.testing.assert_close(by_z @ by_x, torch.eye(4), atol=1e-9, rtol=0)
    # with respect to the parameters, by the implicit function: dx = -(dz/dx)^-1 dz at a fixed x
    parameters = list(layer.parameters())
    direction = torch.randn(4)
    through = torch.autograd.grad(layer.inverse(z)[0] @ direction, parameters)
    pulled = -torch.linalg.solve(by_x.T, direction)
    implicit = torch.autograd.grad(layer(x)[0][0] @ pulled, parameters)
    for ours, theirs in zip(through, implicit, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-7)


def test_a_pair_is_scored_without_another_pass(monkeypatch, double):
    layer = layer_of("affine")
    z = torch.randn(5, 4)
    expected = layer(layer.inverse(z))[1]
    monkeypatch.setattr(layer.net, "forward", None)
    torch.testing.assert_close(layer.inverse_and_ldj(z)[1], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_round_trip_in_sixteen_dimensions(name):
    make = {
        "affine": MaskedAffineAutoregressive,
        "spline": MaskedSplineAutoregressive,
        "mixture": MaskedLogisticMixtureAutoregressive,
    }[name]
    layer = make(16, hidden_features=[64, 64])
    x = 2 * torch.randn(64, 16)
    z, ldj = layer(x)
    back, pair = layer.inverse_and_ldj(z)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pair, ldj, atol=1e-3, rtol=1e-4)


def test_inverse_autoregressive_samples_in_one_pass(monkeypatch, double):
    layer = layer_of("affine")
    x = torch.randn(5, 4)
    z = layer(x)[0]
    monkeypatch.setattr(layer.net, "sequential", None)
    torch.testing.assert_close(Inverse(layer).inverse(x), z)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: layer_of("affine")(torch.zeros(2, 3)),
            "MaskedAffineAutoregressive.forward: expected shape (batch, 4), got (2, 3)",
        ),
        (
            lambda: layer_of("affine", context_features=2)(torch.zeros(2, 4)),
            "MaskedAffineAutoregressive.forward: expected a context with 2 features, got none",
        ),
        (
            lambda: layer_of("affine", context_features=2).inverse(torch.zeros(2, 4)),
            "MaskedAffineAutoregressive.inverse: expected a context with 2 features, got none",
        ),
        (
            lambda: layer_of("affine", context_features=2).inverse(
                torch.zeros(2, 4), torch.zeros(2, 3)
            ),
            "expected a context with 2 features, got shape (2, 3)",
        ),
        (
            lambda: layer_of("spline", bound=None).inverse(torch.full((2, 4), 1.5)),
            "RationalQuadraticSpline.inverse: expected values in [0, 1]",
        ),
        (
            lambda: MaskedAffineAutoregressive(2, "cube"),
            "AffineMap: expected scale to be one of exp",
        ),
        (lambda: MaskedSplineAutoregressive(2, num_bins=1), "expected num_bins >= 2"),
        (lambda: MaskedLogisticMixtureAutoregressive(2, 0), "expected num_components >= 1"),
    ],
)
def test_bad_input_of_autoregressive_layers(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# Linear layers -----------------------------------------------------------------------------------

LINEAR = {
    "full": FullLinear,
    "plu": PLULinear,
    "householder": HouseholderLinear,
    "qr": QRLinear,
}


def moved(layer, std=0.2):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)])
def test_linear_is_its_matrix_at_every_position(name, shape, double):
    layer = moved(LINEAR[name](5))
    w = layer.weight_matrix().detach()
    x = torch.randn(4, *shape)
    z, ldj = layer(x)
    torch.testing.assert_close(z, torch.einsum("ij,bj...->bi...", w, x))
    positions = math.prod(shape[1:])
    expected = positions * torch.linalg.slogdet(w)[1].expand(4)
    torch.testing.assert_close(ldj, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.inverse(z), x, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["full", "plu"])
def test_linear_starts_as_it_is_told(name, double):
    eye = torch.eye(6)
    assert torch.equal(LINEAR[name](6, init="identity").weight_matrix(), eye)
    w = LINEAR[name](6).weight_matrix()
    torch.testing.assert_close(w @ w.T, eye, atol=1e-12, rtol=0)
    assert (w - eye).abs().max() > 0.1


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_householder_is_the_product_of_its_reflections(count, double):
    layer = HouseholderLinear(5, count)
    product = torch.eye(5)
    for v in layer.vectors.detach():
        product = product @ (torch.eye(5) - 2 * torch.outer(v, v) / v.dot(v))
    torch.testing.assert_close(layer.weight_matrix().detach(), product)
    assert torch.linalg.det(product).item() == pytest.approx((-1) ** count)


def test_householder_is_orthogonal_in_float32():
    w = HouseholderLinear(64).weight_matrix()
    torch.testing.assert_close(w @ w.T, torch.eye(64), atol=1e-5, rtol=0)


def test_householder_with_a_vanished_vector_stays_finite():
    layer = HouseholderLinear(3)
    with torch.no_grad():
        layer.vectors[1] = 0.0
    x = torch.randn(4, 3)
    z, _ = layer(x)
    torch.testing.assert_close(layer.inverse(z), x, atol=1e-5, rtol=0)
    z.square().sum().backward()
    assert layer.vectors.grad.isfinite().all()


def test_qr_is_orthogonal_times_triangular(double):
    layer = moved(QRLinear(4))
    orthogonal = HouseholderLinear(4)
    orthogonal.vectors = layer.vectors
    r = torch.linalg.solve(orthogonal.weight_matrix(), layer.weight_matrix())
    torch.testing.assert_close(r.tril(-1), torch.zeros(4, 4), atol=1e-12, rtol=0)
    torch.testing.assert_close(r.diagonal().log(), layer.log_scale)


def test_plu_carries_its_permutation_in_its_state(double):
    first, second = moved(PLULinear(6)), PLULinear(6)
    assert not torch.equal(first.permutation, second.permutation)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(first(x)[0], second(x)[0])
    assert torch.equal(first.inverse(x), second.inverse(x))


@pytest.mark.parametrize("name", LINEAR)
def test_linear_in_float32_with_many_features(name):
    layer = moved(LINEAR[name](64), 0.02)
    x = torch.randn(32, 64)
    z, ldj = layer(x)
    torch.testing.assert_close(layer.inverse(z), x, atol=2e-4, rtol=2e-4)
    exact = torch.linalg.slogdet(layer.weight_matrix().double())[1]
    torch.testing.assert_close(ldj.double(), exact.expand(32), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("make", [*LINEAR.values(), Conv1x1, PeriodicConv2d, BatchNorm])
def test_autocast_changes_nothing_in_a_linear_layer(make):
    layer = moved(make(3)).eval()
    x = torch.randn(4, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, ldj = layer(x)
        back = layer.inverse(z)
    assert torch.equal(z, layer(x)[0]) and torch.equal(ldj, layer(x)[1])
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: PLULinear(3)(torch.zeros(2, 4)),
            "PLULinear.forward: expected size 3 along dimension 1, got shape (2, 4)",
        ),
        (
            lambda: FullLinear(3).inverse(torch.zeros(2, 4, 3)),
            "FullLinear.inverse: expected size 3 along dimension 1",
        ),
        (lambda: QRLinear(0), "QRLinear: expected features >= 1, got 0"),
        (lambda: HouseholderLinear(3, 0), "HouseholderLinear: expected num_reflections >= 1"),
        (lambda: FullLinear(3, init="zeros"), "FullLinear: expected init to be one of orthogonal"),
        (
            lambda: BatchNorm(3)(torch.zeros(2, 4)),
            "BatchNorm.forward: expected size 3 along dimension 1",
        ),
        (
            lambda: BatchNorm(3)(torch.zeros(1, 3)),
            "BatchNorm.forward: expected at least 2 values a channel in training",
        ),
        (lambda: BatchNorm(0), "BatchNorm: expected num_channels >= 1"),
        (lambda: BatchNorm(2, momentum=0.0), "expected 0 < momentum <= 1 and eps > 0"),
        (lambda: BatchNorm(2, eps=0.0), "expected 0 < momentum <= 1 and eps > 0"),
        (lambda: Conv1x1(3, "lu"), "expected parametrisation to be one of full, plu, qr, orthog"),
        (lambda: Conv1x1(0), "Conv1x1: expected channels >= 1"),
        (
            lambda: Conv1x1(3)(torch.zeros(2, 3)),
            "Conv1x1.forward: expected shape (batch, 3, any, any), got (2, 3)",
        ),
        (
            lambda: Conv1x1(3, "plu").inverse(torch.zeros(2, 4, 2, 2)),
            "Conv1x1.inverse: expected shape (batch, 3, any, any)",
        ),
        (lambda: PeriodicConv2d(3, 0), "PeriodicConv2d: expected positive sizes"),
        (
            lambda: PeriodicConv2d(1, 3)(torch.zeros(1, 1, 2, 4)),
            "PeriodicConv2d.forward: expected an image of at least 3 x 3, the size of the kernel",
        ),
        (
            lambda: PeriodicConv2d(1, 3).inverse(torch.zeros(1, 1, 2, 4)),
            "PeriodicConv2d.inverse: expected an image of at least 3 x 3",
        ),
        (
            lambda: Squeeze()(torch.zeros(1, 1, 2, 3)),
            "Squeeze.forward: expected height and width divisible by 2, got shape (1, 1, 2, 3)",
        ),
        (
            lambda: Squeeze().inverse(torch.zeros(1, 6, 2, 2)),
            "Squeeze.inverse: expected channels divisible by 4, got shape (1, 6, 2, 2)",
        ),
        (
            lambda: Unsqueeze()(torch.zeros(1, 6, 2, 2)),
            "Unsqueeze.forward: expected channels divisible by 4",
        ),
        (
            lambda: Unsqueeze().inverse(torch.zeros(1, 1, 2, 3)),
            "Unsqueeze.inverse: expected height and width divisible by 2",
        ),
        (lambda: Squeeze()(torch.zeros(1, 4)), "Squeeze.forward: expected shape (batch, any"),
        (lambda: Squeeze(0), "Squeeze: expected factor >= 1, got 0"),
        (lambda: Unsqueeze(0), "Unsqueeze: expected factor >= 1, got 0"),
        (lambda: checkerboard_mask(1, 1), "checkerboard_mask: expected at least two pixels"),
        (lambda: channel_mask(1), "channel_mask: expected at least two channels, got 1"),
    ],
)
def test_bad_input_of_linear_layers(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# Convolutions ------------------------------------------------------------------------------------


def test_conv1x1_is_a_convolution_with_its_weight(double):
    layer = moved(Conv1x1(4))
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"weight": (4, 4)}
    x = torch.randn(3, 4, 5, 2)
    z, ldj = layer(x)
    torch.testing.assert_close(z, F.conv2d(x, layer.weight[:, :, None, None]))
    torch.testing.assert_close(ldj, 10 * torch.logdet(layer.weight.T @ layer.weight).expand(3) / 2)


@pytest.mark.parametrize("parametrisation", ["full", "plu", "qr", "orthogonal"])
def test_conv1x1_keeps_nothing_that_goes_stale(parametrisation, double):
    layer = Conv1x1(3, parametrisation)
    w = layer.weight_matrix()
    torch.testing.assert_close(w @ w.T, torch.eye(3), atol=1e-12, rtol=0)  # as it starts
    x = torch.randn(2, 3, 4, 4)
    before = layer(x)[0]
    layer.inverse(before)
    moved(layer)
    z, ldj = layer(x)
    assert (z - before).abs().max() > 1e-2
    torch.testing.assert_close(layer.inverse(z), x, atol=1e-10, rtol=0)
    expected = 16 * torch.linalg.slogdet(layer.weight_matrix())[1].expand(2)
    torch.testing.assert_close(layer.inverse_and_ldj(z)[1], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(ldj, expected, atol=1e-12, rtol=0)


def test_conv1x1_determinant_of_a_large_image_in_float32():
    layer = moved(Conv1x1(48), 0.05)
    ldj = layer(torch.randn(1, 48, 64, 64))[1]
    exact = 4096 * torch.linalg.slogdet(layer.weight.double())[1]
    assert ldj.dtype == torch.float32
    assert (ldj.double() - exact).abs().item() < 1e-6 * exact.abs().item() + 1e-3


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("image", [(4, 5), (5, 4)])
def test_periodic_convolution_is_a_circular_one(size, image, double):
    layer = moved(PeriodicConv2d(2, size), 0.1)
    x = torch.randn(3, 2, *image)
    before, after = size // 2, size - 1 - size // 2
    padded = F.pad(x, (before, after, before, after), mode="circular")
    z, ldj = layer(x)
    torch.testing.assert_close(z, F.conv2d(padded, layer.weight), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.inverse(z), x, atol=1e-9, rtol=0)
    # the determinant of the whole matrix, and its gradient
    count = 2 * image[0] * image[1]
    basis = torch.eye(count).view(count, 2, *image)
    padded = F.pad(basis, (before, after, before, after), mode="circular")
    exact = torch.linalg.slogdet(F.conv2d(padded, layer.weight).view(count, count))[1]
    torch.testing.assert_close(ldj, exact.expand(3), atol=1e-10, rtol=0)
    ours = torch.autograd.grad(ldj[0], layer.weight)[0]
    theirs = torch.autograd.grad(exact, layer.weight)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_periodic_convolution_in_float32():
    layer = PeriodicConv2d(12, 3)
    x = torch.randn(2, 12, 16, 16)
    z, ldj = layer(x)
    torch.testing.assert_close(layer.inverse(z), x, atol=1e-5, rtol=1e-5)
    exact = layer.double()(x.double())[1]
    torch.testing.assert_close(ldj.double(), exact, atol=1e-3, rtol=1e-5)
    with torch.no_grad():
        response = torch.linalg.svdvals(layer._response(x.double()))
    assert 0.4 < response.min() and response.max() < 1.6  # well conditioned as it starts


# Squeeze and masks -------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3])
def test_squeeze_puts_a_block_into_channels(factor):
    x = torch.randn(2, 3, 2 * factor, factor)
    z, ldj = Squeeze(factor)(x)
    assert z.shape == (2, 3 * factor**2, 2, 1) and torch.equal(ldj, torch.zeros(2))
    for c in range(3):
        for i in range(factor):
            for j in range(factor):
                channel = factor**2 * c + factor * i + j
                assert torch.equal(z[:, channel], x[:, c, i::factor, j::factor])
    assert torch.equal(Squeeze(factor).inverse(z), x)
    assert torch.equal(Unsqueeze(factor)(z)[0], x)


def test_masks():
    board = checkerboard_mask(3, 4)
    assert board.dtype == torch.bool and board.shape == (1, 3, 4)
    assert all(board[0, i, j] == ((i + j) % 2 == 0) for i in range(3) for j in range(4))
    assert torch.equal(checkerboard_mask(3, 4, invert=True), ~board)
    assert channel_mask(5).shape == (5, 1, 1)
    assert channel_mask(5).flatten().tolist() == [True, True, False, False, False]
    assert channel_mask(4, invert=True).flatten().tolist() == [False, False, True, True]
    alternate = channel_mask(5, alternate=True)
    assert alternate.flatten().tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("mask", [checkerboard_mask(4, 4), channel_mask(2)], ids=["board", "ch"])
def test_a_coupling_changes_what_its_mask_leaves_free(mask, double):
    layer = AffineCoupling(nn.Conv2d(2, 4, 3, padding=1), mask=mask)
    x = torch.randn(2, 2, 4, 4)
    z, _ = layer(x)
    assert torch.equal(z == x, mask.expand_as(x))
    torch.testing.assert_close(layer.inverse(z), x)


# Batch normalisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 2)])
def test_batch_norm_in_training_is_that_of_torch(shape, double):
    ours = moved(BatchNorm(3, momentum=0.3))
    theirs = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(3, momentum=0.3)
    with torch.no_grad():
        theirs.weight.copy_(ours.log_gamma.exp())
        theirs.bias.copy_(ours.beta)
    for _ in range(3):
        x = 2 * torch.randn(8, *shape) + 1
        ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        z, ldj = ours(ours_x)
        expected = theirs(theirs_x)
        torch.testing.assert_close(z, expected)
        direction = torch.randn_like(x)
        torch.testing.assert_close(
            torch.autograd.grad((z * direction).sum(), ours_x, retain_graph=True)[0],
            torch.autograd.grad((expected * direction).sum(), theirs_x)[0],
        )
        var = x.movedim(1, 0).flatten(1).var(1, correction=0)
        per_channel = ours.log_gamma - 0.5 * (var + 1e-5).log()
        torch.testing.assert_close(ldj, math.prod(shape[1:]) * per_channel.sum().expand(8))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x))


def test_batch_norm_inverts_by_the_running_statistics(double):
    layer = moved(BatchNorm(3))
    x = 3 * torch.randn(50, 3) + 2
    z, ldj = layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    trained = layer.inverse_and_ldj(z)
    assert (trained[0] - x).abs().max() > 0.1  # what training normalised by is not known here
    layer.eval()
    for ours, theirs in zip(trained, layer.inverse_and_ldj(z), strict=True):
        assert torch.equal(ours, theirs)
    again, other = layer(trained[0])
    torch.testing.assert_close(again, z)
    torch.testing.assert_close(other, trained[1])
    assert (other - ldj).abs().min() > 0.1
    for name, value in layer.state_dict().items():  # no inverse, and no evaluation, moves them
        assert torch.equal(value, state[name])


def test_batch_norm_of_constant_channels_stays_finite():
    layer = BatchNorm(2)
    x = torch.ones(4, 2, requires_grad=True)
    z, ldj = layer(x)
    assert torch.equal(z, torch.zeros(4, 2))
    (z.sum() + ldj.sum()).backward()
    assert ldj.isfinite().all() and x.grad.isfinite().all()


# A flow of them ----------------------------------------------------------------------------------


def maf(**kwargs):
    def net(*sizes, **made):
        return MADE(*sizes, hidden_features=[8], activation="tanh", **made)

    return autoregressive_flow(
        **{"features": 3, "map": AffineMap(), "net": net, "num_layers": 2, **kwargs}
    )


def test_autoregressive_flow_alternates_its_order():
    flow = maf(num_layers=3)
    assert [t.net.order.tolist() for t in flow.transforms] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    assert isinstance(flow.base, StandardNormal)
    assert [type(t) for t in maf(norm="batch_norm").transforms] == [BatchNorm, Autoregressive] * 2
    assert [type(t) for t in maf(inverse=True).transforms] == [Inverse, Inverse]


@pytest.mark.parametrize("kwargs", [{}, {"inverse": True}], ids=["maf", "iaf"])
def test_autoregressive_flow_gives_the_density_it_samples(kwargs, double):
    flow = maf(**kwargs)
    x = torch.randn(3, 3)
    log_prob = flow.log_prob(x)
    for i in range(3):
        row = x[i : i + 1]
        z = row
        for t in flow.transforms:
            z = t(z)[0]
        jacobian = torch.autograd.functional.jacobian(
            lambda v: flow.transforms[1](flow.transforms[0](v)[0])[0], row
        )
        log_det = torch.linalg.slogdet(jacobian.view(3, 3))[1]
        expected = -0.5 * z.square().sum() - 1.5 * math.log(2 * math.pi) + log_det
        torch.testing.assert_close(log_prob[i], expected)


def test_autoregressive_flow_behind_a_surjection(double):
    flow = maf(features=2, support="real_line", surjection=AbsInference(2), norm="actnorm")
    x = torch.randn(6, 2)
    torch.testing.assert_close(flow.log_prob(x), flow.log_prob(-x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layers": -1}, "model.num_layers: expected a whole number >= 0, got -1"),
        ({"norm": "layer_norm"}, "model.norm: expected one of actnorm, batch_norm"),
        ({"support": "circle"}, "model.support: expected one of unmapped"),
    ],
)
def test_bad_arguments_of_the_flow(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        maf(**kwargs)
