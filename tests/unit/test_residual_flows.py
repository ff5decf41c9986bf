"""Values of planar, radial, Sylvester, residual and continuous flows, and of their nets."""

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from surflow.distributions import DiagonalNormal
from surflow.flow import Flow, FlowDistribution
from surflow.nets import MLP, LipschitzMLP
from surflow.nets.lipschitz import LIPSCHITZ_ACTIVATIONS, LipschitzLinear, LipSwish
from surflow.objectives import iwbo
from surflow.transforms import (
    Augment,
    Continuous,
    Inverse,
    Planar,
    Radial,
    Residual,
    Sequential,
    Slice,
    Sylvester,
)
from surflow.transforms.bijections.planar import MARGIN, slope_of, solve_tanh
from surflow.transforms.bijections.residual import value_and_jacobian
from surflow.transforms.bijections.sylvester import orthonormal_columns


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def set_params(layer: nn.Module, *parts) -> nn.Module:
    with torch.no_grad():
        flat = torch.cat([torch.as_tensor(p, dtype=layer.params.dtype).flatten() for p in parts])
        layer.params.copy_(flat)
    return layer


def stretched(net: LipschitzMLP, factor: float = 4.0) -> LipschitzMLP:
    with torch.no_grad():
        for layer in net.linears:
            layer.weight.mul_(factor)
    return net


def slogdet(layer: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """log |det dz/dx| row by row, by autograd."""
    found = []
    for i in range(len(x)):
        c = None if context is None else context[i : i + 1]
        row = x[i : i + 1]
        matrix = torch.autograd.functional.jacobian(lambda r, c=c: layer(r, c)[0], row)
        found.append(torch.linalg.slogdet(matrix.reshape(row.numel(), row.numel()))[1])
    return torch.stack(found)


# The scalar equation --------------------------------------------------------------------------


def test_solve_tanh_agrees_with_bisection(double):
    slope = torch.logspace(-4, 6, 60).unsqueeze(1)
    c = torch.cat([-torch.logspace(-6, 4, 40), torch.zeros(1), torch.logspace(-6, 4, 40)])
    y = solve_tanh(c, slope)
    c, m = torch.broadcast_tensors(c, slope - 1)
    low, high = c - m.abs() - 1, c + m.abs() + 1
    for _ in range(200):
        middle = (low + high) / 2
        below = middle + m * torch.tanh(middle) < c
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # the bisection itself is uncertain by the rounding of its test over the slope at the root
    assert ((y - low).abs() / (1 + low.abs())).max() < 1e-9
    assert ((y + m * torch.tanh(y) - c).abs() / (1 + c.abs())).max() < 1e-15


def test_solve_tanh_gradient(double):
    c = torch.tensor([-3.0, -0.2, 0.1, 2.0, 40.0], requires_grad=True)
    slope = torch.tensor([0.05, 0.4, 1.0, 3.0, 30.0], requires_grad=True)
    assert gradcheck(solve_tanh, (c, slope))


def test_slope_of_is_one_at_zero_increasing_and_bounded_below(double):
    raw = torch.linspace(-50, 5, 2001)
    slope = slope_of(raw)
    assert (slope.diff() >= 0).all() and slope.min() >= MARGIN
    assert slope_of(torch.zeros(())).item() == pytest.approx(1.0, abs=1e-15)
    assert torch.allclose(slope_of(raw[raw > 0]), 1 + raw[raw > 0])
    edge = torch.tensor([-1e-7, 1e-7])
    assert slope_of(edge).diff().item() / 2e-7 == pytest.approx(1.0, abs=1e-6)


# Planar -----------------------------------------------------------------------------------------


def test_planar_is_its_formula_where_u_is_admissible(double):
    u, w, b = torch.tensor([0.5, -0.2]), torch.tensor([1.0, 0.7]), 0.3
    layer = set_params(Planar(2), u, w, [b])
    x = torch.randn(7, 2)
    z, ldj = layer(x)
    y = x @ w + b
    assert torch.allclose(z, x + torch.tanh(y).unsqueeze(1) * u)
    psi = (1 - torch.tanh(y) ** 2).unsqueeze(1) * w
    assert torch.allclose(ldj, torch.log((1 + psi @ u).abs()))


@pytest.mark.parametrize("strength", [-1.5, -10.0, -1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planar_where_the_constraint_is_active(strength: float, dtype):
    w = torch.tensor([0.6, -0.8])
    layer = set_params(Planar(2), strength * w, w, [0.1]).to(dtype)
    u, w, _, slope = layer._unpack(layer.params.unsqueeze(0))
    assert torch.allclose(
        1 + (u * w).sum(1, keepdim=True), slope, atol=1e-6 if dtype == torch.float32 else 1e-12
    )
    assert slope.item() >= MARGIN * (1 - 1e-6)
    x = torch.cat([torch.randn(200, 2), torch.zeros(1, 2), -0.1 * w.detach()]).to(dtype)
    z, ldj = layer(x)
    assert ldj.isfinite().all() and ldj.min() >= math.log(MARGIN) - 1e-3
    (gradient,) = torch.autograd.grad(ldj.sum() + z.sum(), layer.params)
    assert gradient.isfinite().all()
    back, again = layer.inverse_and_ldj(z.detach())
    # the slope of 1e-4 amplifies rounding by 1e4
    assert torch.allclose(back, x, atol=1e-2 if dtype == torch.float32 else 1e-10)
    (gradient,) = torch.autograd.grad(again.sum() + back.sum(), layer.params)
    assert gradient.isfinite().all()
    if dtype == torch.float64:
        assert torch.allclose(ldj[:8], slogdet(layer, x[:8]), atol=1e-8)


def test_planar_takes_w_of_zero():
    layer = set_params(Planar(2), [0.5, -1.0], [0.0, 0.0], [0.7])
    z, ldj = layer(torch.zeros(3, 2))
    assert torch.allclose(z, math.tanh(0.7) * torch.tensor([[0.5, -1.0]]).expand(3, 2))
    assert torch.equal(ldj, torch.zeros(3))
    # log(1 + w·u s) has the slope u s in w
    (gradient,) = torch.autograd.grad(layer(torch.zeros(1, 2))[1].sum(), layer.params)
    s = 1 - math.tanh(0.7) ** 2
    assert torch.allclose(gradient[2:4], s * torch.tensor([0.5, -1.0]))
    assert torch.allclose(layer.inverse(z), torch.zeros(3, 2), atol=1e-6)


@pytest.mark.parametrize("layer", [lambda: Planar(4), lambda: Radial(4), lambda: Sylvester(4)])
@pytest.mark.parametrize("size", [1e-30, 1e3, 1e6])
def test_extreme_inputs_in_float32(layer, size: float):
    layer = layer()
    nn.init.normal_(layer.params)
    x = size * torch.randn(100, 4)
    x.requires_grad_()
    z, ldj = layer(x)
    gradients = torch.autograd.grad(z.sum() + ldj.sum(), [x, layer.params])
    assert all(v.isfinite().all() for v in (z, ldj, *gradients))
    back, again = layer.inverse_and_ldj(z.detach().requires_grad_())
    gradients = torch.autograd.grad(back.sum() + again.sum(), [layer.params])
    assert all(v.isfinite().all() for v in (back, again, *gradients))
    assert ((back - x).abs() / (1 + x.abs())).max() < 1e-4


# Radial -----------------------------------------------------------------------------------------


def test_radial_is_the_formula_of_the_source(double):
    centre = torch.tensor([0.3, -0.4, 0.1])
    layer = set_params(Radial(3), centre, [0.4, -0.9])
    alpha, gamma = (MARGIN + math.log1p(math.exp(a)) for a in (0.4, -0.9))
    beta = gamma - alpha
    x = 2 * torch.randn(9, 3)
    r = (x - centre).norm(dim=1, keepdim=True)
    h = 1 / (alpha + r)
    z, ldj = layer(x)
    assert torch.allclose(z, x + beta * h * (x - centre))
    expected = 2 * torch.log(1 + beta * h) + torch.log(1 + beta * h - beta * r * h**2)
    assert torch.allclose(ldj, expected.squeeze(1))


@pytest.mark.parametrize(
    "raw", [(0.5, 0.5), (3.0, -40.0), (-40.0, 3.0), (-300.0, -300.0), (1e3, 1)]
)
def test_radial_at_its_centre_and_at_extreme_radii(raw):
    layer = set_params(Radial(2), [0.25, -0.5], raw)
    x = torch.tensor([[0.25, -0.5], [0.2501, -0.5], [10.0, 3.0]]).requires_grad_()
    z, ldj = layer(x)
    alpha, gamma = (MARGIN + torch.nn.functional.softplus(torch.tensor(float(a))) for a in raw)
    assert torch.equal(z[0], x[0])
    assert torch.allclose(ldj[0], 2 * torch.log(gamma / alpha), atol=1e-5)
    back, again = layer.inverse_and_ldj(z)
    assert torch.allclose(layer(back)[0], z, atol=1e-5)  # x itself only up to gamma / alpha
    wide = copy.deepcopy(layer).double()
    z64, ldj64 = wide(x.double())
    for ours, theirs in zip(wide.inverse_and_ldj(z64), (x.double(), ldj64), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)
    for value in (z.sum() + ldj.sum(), back.sum() + again.sum()):
        gradients = torch.autograd.grad(value, [x, layer.params], retain_graph=True)
        assert all(g.isfinite().all() for g in gradients)


# Sylvester --------------------------------------------------------------------------------------


def test_orthonormal_columns_are_those_of_the_product_of_reflections(double):
    v = torch.randn(2, 3, 5) * torch.tensor([1.0, 1e-8, 1e5]).view(3, 1)
    expected = torch.eye(5).expand(2, 5, 5)
    for k in range(3):
        unit = v[:, k] / v[:, k].norm(dim=1, keepdim=True)
        expected = expected @ (torch.eye(5) - 2 * unit.unsqueeze(2) * unit.unsqueeze(1))
    found = orthonormal_columns(v, 4)
    assert torch.allclose(found, expected[:, :, :4], atol=1e-12)


def test_reflection_by_a_vector_of_zeros_is_orthogonal_and_differentiable():
    v = torch.zeros(2, 3, requires_grad=True)
    q = orthonormal_columns(v, 3)
    assert torch.allclose(q.T @ q, torch.eye(3))
    assert torch.autograd.grad(q.sum(), v)[0].isfinite().all()


def test_sylvester_of_one_direction_is_planar(double):
    layer = Sylvester(3, 1)
    nn.init.normal_(layer.params)
    q, r, r_tilde, b = (part[0] for part in layer._unpack(layer.params.unsqueeze(0)))
    product = (r * r_tilde).item()
    same = set_params(Planar(3), q * r, q * r_tilde, b)
    if product < 0:  # u is then admissible, but planar bends it: undo its map of w·u
        share = 1 - MARGIN
        raw = share * math.log1p(product / share)
        w = (q * r_tilde).flatten()
        same = set_params(
            Planar(3), (q * r).flatten() + (raw - product) * w / w.square().sum(), w, b
        )
    x = torch.randn(6, 3)
    for ours, theirs in zip(layer(x), same(x), strict=True):
        assert torch.allclose(ours, theirs)
    assert torch.allclose(layer.inverse(x), same.inverse(x))


def test_sylvester_where_its_slopes_are_least():
    layer = Sylvester(3)
    params = layer.params.detach().clone()
    params[9:18] = torch.tensor([50.0, 0.3, -0.2, 0.1, 50.0, 0.4, 0.2, 0.1, 50.0])
    params[18:21] = -50.0
    layer = set_params(layer, params)
    x = torch.cat([torch.zeros(1, 3), 0.1 * torch.randn(20, 3), torch.randn(20, 3)])
    z, ldj = layer(x)
    assert ldj.isfinite().all() and ldj[0].item() == pytest.approx(3 * math.log(1e-4), abs=1e-2)
    back, again = layer.inverse_and_ldj(z)
    assert back.isfinite().all() and again.isfinite().all()
    assert torch.allclose(layer(back)[0], z, atol=1e-5)
    double = copy.deepcopy(layer).double()
    assert torch.allclose(double.inverse(double(x.double())[0]), x.double(), atol=1e-6)


# Gradients through the inverse ------------------------------------------------------------------


def implicit_layers():
    return {
        "Planar": Planar(2),
        "Radial": Radial(2),
        "Sylvester": Sylvester(2),
        "Residual": Residual(stretched(LipschitzMLP(2, 2, [6], "tanh", 0.8))),
        "Residual-series": Residual(
            stretched(LipschitzMLP(2, 2, [6], "tanh", 0.6)), "power_series", gradient_iterations=60
        ),
        "Continuous-rk4": Continuous(MLP(3, 2, [6], "tanh"), solver="rk4"),
        "Continuous-adjoint": Continuous(
            MLP(3, 2, [6], "tanh"), atol=1e-10, rtol=1e-10, adjoint=True
        ),
    }


@pytest.mark.parametrize("name", list(implicit_layers()))
def test_gradient_through_the_inverse_agrees_with_finite_differences(name: str, double):
    torch.manual_seed(1)
    layer = implicit_layers()[name]
    z, weight = torch.randn(2, 2, requires_grad=True), torch.randn(2, 2)
    inputs = [z, *layer.parameters()]
    gradients = torch.autograd.grad((layer.inverse(z) * weight).sum(), inputs, allow_unused=True)
    directions = [torch.randn_like(p) for p in inputs]
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)

    @torch.no_grad()
    def moved(step: float) -> Tensor:
        for p, d in zip(inputs, directions, strict=True):
            p.add_(step * d)
        value = (layer.inverse(z) * weight).sum()
        for p, d in zip(inputs, directions, strict=True):
            p.sub_(step * d)
        return value

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert along.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)


# Nets with a bound ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIPSCHITZ_ACTIVATIONS)
def test_activations_have_slopes_of_at_most_one(name: str, double):
    x = torch.linspace(-30, 30, 60_001, requires_grad=True)
    activation = LIPSCHITZ_ACTIVATIONS[name]()
    for beta in (0.5, -3.0, 4.0) if isinstance(activation, LipSwish) else (None,):
        if beta is not None:
            nn.init.constant_(activation.beta, beta)
        (slope,) = torch.autograd.grad(activation(x).sum(), x)
        assert slope.abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("norm", ["exact", "power"])
def test_lipschitz_mlp_keeps_its_coefficient(norm: str):
    net = stretched(LipschitzMLP(3, 3, [16, 16], coefficient=0.7, context_features=2, norm=norm))
    net.eval()
    x, context = 2 * torch.randn(500, 3), 10 * torch.randn(500, 2)
    jacobian = value_and_jacobian(lambda rows: net(rows, context), x)[1]
    worst = torch.linalg.matrix_norm(jacobian, 2).max()
    assert 0.05 < worst <= 0.7 + 1e-5
    product = math.prod(torch.linalg.matrix_norm(w, 2).item() for w in net.prepared().weights)
    assert product == pytest.approx(0.7, abs=1e-5)


def test_a_weight_within_its_bound_is_left_alone():
    layer = LipschitzLinear(4, 3, 0.9)
    nn.init.uniform_(layer.weight, -0.1, 0.1)
    assert torch.equal(layer.bounded_weight(), layer.weight)
    x = torch.randn(5, 4)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias)


def test_power_iteration_learns_in_training_alone():
    layer = LipschitzLinear(6, 5, 0.5, "power")
    nn.init.normal_(layer.weight)  # another weight than the one it started from
    before = layer.right.clone()
    layer.eval()
    assert torch.linalg.matrix_norm(layer.bounded_weight(), 2).item() == pytest.approx(0.5, 1e-5)
    assert torch.equal(layer.right, before)
    layer.train()
    for _ in range(100):
        weight = layer.bounded_weight()
    assert not torch.equal(layer.right, before)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(0.5, rel=1e-3)
    first, second = layer(torch.randn(2, 6)), layer(torch.randn(2, 6))  # buffers written between
    (first.sum() + second.sum()).backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LipschitzMLP(0, 2), "LipschitzMLP: expected positive sizes"),
        (lambda: LipschitzMLP(2, 2, activation="relu"), "expected activation to be one of"),
        (lambda: LipschitzMLP(2, 2, coefficient=0.0), "expected coefficient > 0, got 0.0"),
        (lambda: LipschitzMLP(2, 2, norm="frobenius"), "expected norm to be one of exact, power"),
        (lambda: LipschitzLinear(2, 2, -1.0), "LipschitzLinear: expected bound > 0, got -1.0"),
        (lambda: LipschitzLinear(2, 2, 0.5, "power", 0), "expected num_iterations >= 1, got 0"),
    ],
)
def test_bad_nets(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


# Residual: estimates of the log-determinant -----------------------------------------------------


class Bend(nn.Module):
    """g(x) = tanh(W x + b) with a Jacobian of eigenvalues about 0.6 in absolute value."""

    in_features = 3

    def __init__(self) -> None:
        super().__init__()
        matrix = [[0.7, 0.2, -0.1], [-0.2, 0.6, 0.1], [0.1, 0.1, 0.5]]
        self.weight = nn.Parameter(torch.tensor(matrix))
        self.bias = nn.Parameter(torch.tensor([0.2, -0.1, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + self.bias)


POINT = [[0.1, -0.2, -0.3]]


def residual_pair(trace: str, **kwargs) -> tuple[Residual, Residual]:
    """A layer that estimates its log-determinant, and one of the same net that does not."""
    net = Bend()
    return Residual(net, trace, **kwargs), Residual(net)


def test_a_power_series_is_unbiased_for_its_cut_series(double):
    layer, exact = residual_pair("power_series", num_terms=3)
    x = torch.tensor(POINT)
    jacobian = value_and_jacobian(layer.net, x)[1][0]
    powers = [torch.linalg.matrix_power(jacobian, k).trace() for k in range(1, 4)]
    cut = sum((-1) ** (k + 1) / k * p for k, p in enumerate(powers, 1))
    with torch.no_grad():
        estimates = layer(x.expand(20_000, 3))[1]
        error = estimates.std() / 20_000**0.5
        assert abs(estimates.mean() - cut) < 4 * error
        assert abs(cut - exact(x)[1]) > 8 * error  # what is left out is seen at this precision


def test_a_long_power_series_is_the_log_determinant_up_to_its_probe(double):
    layer, exact = residual_pair("power_series", num_terms=40)
    x = torch.tensor(POINT)
    with torch.no_grad():
        estimates = layer(x.expand(20_000, 3))[1]
        error = estimates.std() / 20_000**0.5
        assert abs(estimates.mean() - exact(x)[1]) < 4 * error


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_russian_roulette_is_unbiased(direction: str, double):
    layer, exact = residual_pair("russian_roulette", num_terms=1, stop=0.3)
    x = torch.tensor(POINT)
    z, expected = exact(x)
    calls = 1500
    with torch.no_grad():  # the length is one for a batch: a batch counts as one estimate
        if direction == "forward":
            parts = [layer(x.expand(16, 3))[1].mean() for _ in range(calls)]
        else:
            layer.max_iterations = 24  # x itself is exact enough for the mean
            parts = [layer.inverse_and_ldj(z.expand(4, 3))[1].mean() for _ in range(calls // 3)]
    estimates = torch.stack(parts)
    error = estimates.std() / len(estimates) ** 0.5
    assert error < 0.03
    first = value_and_jacobian(layer.net, x)[1].diagonal(dim1=1, dim2=2).sum()
    assert abs(first - expected) > 8 * error  # the first term alone would be found out
    assert abs(estimates.mean() - expected) < 4 * error


@pytest.mark.parametrize("gradient", ["neumann", "series"])
@pytest.mark.parametrize("trace", ["power_series", "russian_roulette"])
def test_gradients_of_the_estimates_are_unbiased(trace: str, gradient: str, double):
    num_terms, calls, rows = (40, 40, 256) if trace == "power_series" else (2, 600, 16)
    layer, exact = residual_pair(trace, num_terms=num_terms, stop=0.4, gradient=gradient)
    x = torch.tensor(POINT).requires_grad_()
    wanted = [x, layer.net.weight, layer.net.bias]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact(x)[1].sum(), wanted)])
    found = []
    for _ in range(calls):
        ldj = layer(x.expand(rows, 3))[1].mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(ldj, wanted)]))
    found = torch.stack(found)
    error = found.std(0) / calls**0.5
    assert ((found.mean(0) - expected).abs() < 4.5 * error + 1e-9).all()
    assert error.max() < 0.1 * expected.abs().max()


def test_the_memory_saving_gradient_keeps_one_term():
    def nodes(gradient: str, num_terms: int) -> int:
        """The size of the graph that waits for a backward pass."""
        layer, _ = residual_pair("power_series", num_terms=num_terms, gradient=gradient)
        found, todo = set(), [layer(torch.randn(8, 3))[1].grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in found:
                found.add(node)
                todo.extend(parent for parent, _ in node.next_functions)
        return len(found)

    assert nodes("neumann", 4) == nodes("neumann", 16)
    assert nodes("series", 16) > nodes("series", 4) > nodes("neumann", 4)


def test_estimated_says_what_is_estimated():
    for trace, estimated in (("exact", False), ("power_series", True), ("russian_roulette", True)):
        assert residual_pair(trace)[0].estimated is estimated
    field = MLP(3, 2, [4], "tanh")
    assert not Continuous(field, solver="rk4").estimated
    assert Continuous(field, solver="rk4", trace="hutchinson").estimated


def test_an_estimate_inside_a_distribution_is_not_called_exact():
    inner = Flow(DiagonalNormal((3,)), [residual_pair("power_series")[0]])
    q = FlowDistribution(inner)
    as_layer, as_base = Flow(DiagonalNormal((1,)), [Slice(q, keep=1)]), Flow(q, [])
    x = torch.randn(5, 4)
    assert as_layer.estimated
    assert [row.number for row in as_layer.ledger(x)] == ["estimate", "exact"]
    assert as_base.estimated
    assert [row.number for row in as_base.ledger(x[:, :3])] == ["estimate"]
    assert not Flow(DiagonalNormal((3,)), [residual_pair("exact")[0]]).estimated
    with pytest.raises(ValueError, match="expected exact contributions"):
        iwbo(Flow(DiagonalNormal((4,)), [Augment(q, keep=1)]), x[:, :1], num_samples=2)


def test_an_adaptive_solver_takes_half_precision_under_autocast():
    layer = Continuous(MLP(3, 2, [4], "tanh", context_features=1))
    x, context = torch.randn(4, 2), torch.randn(4, 1)
    expected, expected_ldj = layer(x.bfloat16().float(), context.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        z, ldj = layer(x.bfloat16(), context.bfloat16())
    assert z.dtype == torch.bfloat16
    assert torch.allclose(z.float(), expected, rtol=0.01, atol=0.01)
    assert torch.allclose(ldj, expected_ldj, atol=1e-4)


def test_an_estimating_layer_undoes_itself_and_follows_the_generator():
    layer, _ = residual_pair("russian_roulette")
    x = torch.randn(20, 3)
    torch.manual_seed(3)
    z, first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x)[1], first)
    assert not torch.equal(layer(x)[1], first)
    assert torch.allclose(layer.inverse(z), x, atol=1e-5)


def test_a_net_that_does_not_contract_is_found_out():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(3 * torch.eye(2))
    with pytest.raises(ValueError, match=r"Residual.inverse: expected a contraction"):
        Residual(net, event_shape=2).inverse(torch.randn(4, 2))


def test_the_inverse_stops_when_all_rows_stand_still():
    calls = []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(1)
            return 0.1 * torch.tanh(x)

    layer = Residual(Counted(), "power_series", event_shape=2, max_iterations=500)
    with torch.no_grad():
        layer.inverse(torch.randn(8, 2))
    assert len(calls) < 30


# Continuous -------------------------------------------------------------------------------------


class LinearField(nn.Module):
    """f(y, t) = (1 + t) A y: z = expm(1.5 A) x and ldj = 1.5 tr A at T = 1."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.in_features = matrix.shape[0] + 1

    def forward(self, x: Tensor) -> Tensor:
        y, t = x[:, :-1], x[:, -1:]
        return (1 + t) * (y @ self.matrix.T)


MATRIX = [[0.3, -0.8], [0.5, -0.1]]


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "rk4", "num_steps": 60},
        {"solver": "dopri5", "rtol": 1e-10, "atol": 1e-10},
        {"solver": "dopri8", "rtol": 1e-10, "atol": 1e-10, "adjoint": True},
        {"solver": "bosh3", "rtol": 1e-8, "atol": 1e-8},
    ],
    ids=lambda o: o["solver"],
)
def test_a_linear_field_has_its_closed_form(options, trace: str, double):
    matrix = torch.tensor(MATRIX)
    layer = Continuous(LinearField(matrix.clone()), trace=trace, **options)
    x = torch.randn(400, 2, requires_grad=True)
    z, ldj = layer(x)
    flow = torch.linalg.matrix_exp(1.5 * matrix)
    assert torch.allclose(z, x @ flow.T, atol=1e-7)
    expected = torch.full((400,), 1.5 * matrix.trace().item())
    if trace == "exact":
        assert torch.allclose(ldj, expected, atol=1e-8)
    else:
        error = ldj.std() / 20
        assert error > 0.01 and abs(ldj.mean() - expected[0]) < 4 * error
    back, pair = layer.inverse_and_ldj(z)
    assert torch.allclose(back, x, atol=1e-7)
    assert torch.allclose(layer.inverse(z), x, atol=1e-7)
    assert trace == "hutchinson" or torch.allclose(pair, expected, atol=1e-8)
    (gradient,) = torch.autograd.grad(z.sum(), x)
    assert torch.allclose(gradient, flow.sum(0).expand(400, 2), atol=1e-7)


def test_hutchinson_is_unbiased_for_a_field_that_bends(double):
    net = MLP(3, 2, [8], "tanh")
    exact = Continuous(net, solver="rk4", num_steps=8)
    estimate = Continuous(net, solver="rk4", num_steps=8, trace="hutchinson")
    x = torch.randn(1, 2)
    with torch.no_grad():
        ldj = estimate(x.expand(20_000, 2))[1]
        assert abs(ldj.mean() - exact(x)[1]) < 4 * ldj.std() / 20_000**0.5
        assert torch.allclose(estimate(x)[0], exact(x)[0])


def test_the_adjoint_gradient_is_that_of_the_solver(double):
    net = MLP(3, 2, [8], "tanh", context_features=2)
    x, context = torch.randn(5, 2), torch.randn(5, 2).requires_grad_()
    found = []
    for adjoint in (False, True):
        layer = Continuous(net, rtol=1e-10, atol=1e-10, adjoint=adjoint)
        z, ldj = layer(x, context)
        gradients = torch.autograd.grad(
            z.square().sum() + ldj.sum(), [context, *layer.parameters()]
        )
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert found[0].norm() > 1
    assert torch.allclose(*found, atol=1e-7)


def test_a_solver_of_ours_loads_no_other(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)  # importing it would raise
    Continuous(MLP(3, 2, [4]), solver="rk4")(torch.randn(2, 2))


def test_a_missing_solver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"need torchdiffeq .*solver='rk4' works without"):
        Continuous(MLP(3, 2, [4]))
    Continuous(MLP(3, 2, [4]), solver="rk4")


# A posterior ------------------------------------------------------------------------------------


def test_planar_layers_make_a_posterior_in_their_cheap_direction(double, monkeypatch):
    layers = [Inverse(Planar(3, net=MLP(5, 7, [8], "tanh"))) for _ in range(4)]
    flow = Flow(DiagonalNormal(3, net=MLP(5, 6, [8], "tanh")), layers)
    posterior = FlowDistribution(flow)
    context = torch.randn(50, 5)
    assert posterior.conditional and posterior.event_shape == (3,)

    def no_root(*_):
        raise AssertionError("the slow direction was asked for")

    with monkeypatch.context() as patched:
        patched.setattr(Planar, "_solve", no_root)
        z, log_q = posterior.sample_and_log_prob(context=context)
        objective = (log_q - z.square().sum(1)).mean()
        gradients = torch.autograd.grad(objective, list(flow.parameters()))
    assert all(g.isfinite().all() and g.norm() > 0 for g in gradients)
    assert torch.allclose(posterior.log_prob(z, context), log_q, atol=1e-9)


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sylvester(3, 4), r"Sylvester: expected 1 <= num_directions <= 3, got 4"),
        (lambda: Sylvester(3, 2, 0), r"Sylvester: expected num_reflections >= 1, got 0"),
        (lambda: Residual(nn.Identity(), "trace"), r"Residual: expected trace in exact"),
        (lambda: Residual(nn.Identity(), gradient="none"), r"expected gradient in neumann"),
        (lambda: Residual(nn.Identity(), stop=1.0), r"expected 0 < stop < 1, got 1.0"),
        (lambda: Residual(nn.Identity(), num_terms=0), r"expected num_terms >= 1, got 0"),
        (lambda: Residual(nn.Identity(), tolerance=0.0), r"expected tolerance > 0, got 0.0"),
        (lambda: Continuous(nn.Identity(), solver="euler"), r"expected solver to be one of rk4"),
        (lambda: Continuous(nn.Identity(), trace="none"), r"expected trace to be one of exact"),
        (lambda: Continuous(nn.Identity(), rtol=0.0), r"Continuous: expected rtol > 0, got 0.0"),
        (lambda: Continuous(nn.Identity(), end_time=-1.0), r"expected end_time > 0, got -1.0"),
        (
            lambda: Continuous(nn.Identity(), solver="rk4", adjoint=True),
            r"adjoint is for the solvers dopri5, dopri8, bosh3, got 'rk4'",
        ),
    ],
)
def test_bad_options(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Planar(3)(torch.randn(2, 4)), r"Planar.forward: expected shape \(batch, 3\)"),
        (lambda: Radial(3).inverse(torch.randn(2, 4)), r"Radial.inverse: expected shape"),
        (lambda: Sylvester(3)(torch.ones(2, 3).long()), r"Sylvester.forward: expected a floating"),
        (
            lambda: Planar(3, net=MLP(2, 7))(torch.randn(2, 3)),
            r"Planar.forward: expected a context, got none",
        ),
        (
            lambda: Planar(3, net=MLP(2, 6)).inverse(torch.randn(4, 3), torch.randn(4, 2)),
            r"Planar.inverse: expected the net to give shape \(4, 7\), got \(4, 6\)",
        ),
        (
            lambda: Residual(LipschitzMLP(3, 3))(torch.randn(2, 4)),
            r"Residual.forward: expected shape \(batch, 3\), got \(2, 4\)",
        ),
        (
            lambda: Residual(LipschitzMLP(3, 2))(torch.randn(2, 3)),
            r"Residual.forward: expected the net to give shape \(2, 3\), got \(2, 2\)",
        ),
        (
            lambda: Residual(LipschitzMLP(3, 3, context_features=2)).inverse(torch.randn(2, 3)),
            r"Residual.inverse: expected a context with 2 features, got none",
        ),
        (
            lambda: Continuous(MLP(4, 3), solver="rk4").inverse(torch.randn(2, 4)),
            r"Continuous.inverse: expected shape \(batch, 3\), got \(2, 4\)",
        ),
        (
            lambda: Continuous(MLP(4, 4), solver="rk4")(torch.randn(2, 3)),
            r"Continuous.forward: expected the net to give shape \(2, 3\), got \(2, 4\)",
        ),
    ],
)
def test_bad_inputs(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


# Compiled ---------------------------------------------------------------------------------------


def test_a_power_series_compiles_and_roulette_says_why_not():
    layer, _ = residual_pair("power_series", num_terms=4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3)
    z, ldj = compiled(x)
    assert torch.allclose(z, layer(x)[0], atol=1e-6) and ldj.isfinite().all()
    ldj.sum().backward()
    assert layer.net.weight.grad.norm() > 0
    for layer in (residual_pair("russian_roulette")[0], Continuous(MLP(3, 2, [4]))):
        assert not layer.compiles and layer.why_not_compiled
    assert not Sequential([Continuous(MLP(3, 2, [4]))]).compiles
