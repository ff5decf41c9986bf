"""Rational-quadratic splines where they break elsewhere: knots, edges, floors, float32, half."""

import itertools

import pytest
import torch
from torch import nn

from surflow.nets import MLP
from surflow.transforms import (
    Elementwise,
    RationalQuadraticSpline,
    RationalQuadraticSplineCoupling,
    check_values,
)

TAILS = RationalQuadraticSpline(8, bound=3.0)
UNIT = RationalQuadraticSpline(8, bound=None)
SKEWED = RationalQuadraticSpline(5, bound=(-1.0, 4.0), min_bin=1e-2, min_slope=1e-2)
FINEST = RationalQuadraticSpline(4, bound=3.0, min_bin=1e-5, min_slope=1e-5)
SPLINES = [TAILS, UNIT, SKEWED, FINEST]
NAMES = ["tails", "unit", "skewed", "finest"]
SCALES = [0.0, 1.0, 50.0, 1e3]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def parameters(spline, scale, dtype, rows=4, seed=0):
    """Rows of parameters: random ones, or, from scale 2 on, all at plus or minus that scale, so
    that bins and slopes lie at their floors beside bins and slopes that take everything."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, spline.num_params, generator=generator)
    return (scale * (drawn if scale < 2 else drawn.sign())).to(dtype)


def hard_values(spline, row, axis, dtype):
    """The knots of one row of parameters, their neighbours in ``dtype``, both ends and, with
    tails, what lies just beyond them and far away."""
    knots = spline._bins(row.to(torch.float32 if dtype.itemsize < 4 else dtype))[axis].to(dtype)
    # in half precision a knot may round to beyond the end
    knots = knots.clamp(spline.low, spline.high)
    up, down = (torch.full_like(knots, end) for end in (torch.inf, -torch.inf))
    low, high = (torch.tensor([end], dtype=dtype) for end in (spline.low, spline.high))
    between = torch.linspace(spline.low, spline.high, 41).to(dtype)
    values = torch.cat([knots, knots.nextafter(up), knots.nextafter(down), between, low, high])
    if not spline.tails:
        return values[(values >= 0) & (values <= 1)]
    far = torch.tensor([1e4, -1e4, 1e6, -1e6], dtype=dtype).clamp(
        torch.finfo(dtype).min, torch.finfo(dtype).max
    )
    return torch.cat([values, low.nextafter(down[:1]), high.nextafter(up[:1]), far])


def rows_of_hard_values(spline, scale, dtype, axis):
    """All hard values with the row of parameters that they belong to: (N,) and (N, P)."""
    params = parameters(spline, scale, dtype)
    values = [hard_values(spline, row, axis, dtype) for row in params]
    counts = torch.tensor([len(v) for v in values])
    return torch.cat(values), params.repeat_interleave(counts, 0)


# No NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spline", SPLINES, ids=NAMES)
def test_everything_is_finite_where_it_is_hard(spline, scale, dtype):
    for axis, method in enumerate(["forward", "inverse_and_ldj"]):
        values, params = rows_of_hard_values(spline, scale, dtype, axis)
        values, params = values.requires_grad_(), params.requires_grad_()
        result, log_slope = getattr(spline, method)(values, params)
        assert result.dtype == dtype
        assert log_slope.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert result.isfinite().all() and log_slope.isfinite().all()
        outputs = [result, log_slope]
        if axis == 1:
            outputs.append(spline.inverse(values, params))
            torch.testing.assert_close(outputs[2], result, rtol=0, atol=0)
        for out in outputs:
            gradients = torch.autograd.grad(out.float().sum(), [values, params], retain_graph=True)
            assert not any(g.isnan().any() for g in gradients)
            if dtype != torch.float16:  # whose numbers end at 65504: gradients there need scaling
                assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_parameters_far_beyond_any_use_stay_finite(scale):
    for spline, method in itertools.product(SPLINES, ["forward", "inverse_and_ldj"]):
        values, params = rows_of_hard_values(spline, scale, torch.float32, 0)
        params = params.requires_grad_()
        result, log_slope = getattr(spline, method)(values, params)
        (gradient,) = torch.autograd.grad(result.sum() + log_slope.sum(), params)
        assert result.isfinite().all() and log_slope.isfinite().all() and gradient.isfinite().all()


def test_tails_take_infinity_to_itself():
    values = torch.tensor([torch.inf, -torch.inf, 3.5, -1e30], requires_grad=True)
    params = parameters(TAILS, 1.0, torch.float32).requires_grad_()
    for method in (TAILS.forward, TAILS.inverse_and_ldj):
        result, log_slope = method(values, params)
        assert torch.equal(result, values) and torch.equal(log_slope, torch.zeros(4))
        by_value, by_params = torch.autograd.grad(result[2:].sum(), [values, params])
        assert torch.equal(by_value[2:], torch.ones(2)) and by_value.isfinite().all()
        assert torch.equal(by_params, torch.zeros_like(params))


def test_unit_spline_takes_rounding_past_its_ends_and_refuses_what_is_beyond():
    params = torch.zeros(1, UNIT.num_params)
    for end, rounded in ((1.0, torch.tensor([1.0]).nextafter(torch.tensor([2.0]))), (0.0, -1e-7)):
        z, _ = UNIT.forward(torch.as_tensor(rounded).reshape(1), params)
        assert z == end
    for beyond in (torch.tensor([1.0 + 1e-6]), torch.tensor([-1e-6])):
        for method in (UNIT.forward, UNIT.inverse, UNIT.inverse_and_ldj):
            with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got 1 values"):
                method(beyond, params)
    for nothing in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="expected values in"):
            UNIT.forward(torch.tensor([nothing]), params)
    with check_values(False):  # as under torch.compile: the nearer end
        z, log_slope = UNIT.forward(torch.tensor([1.5]), params)
        assert z == 1 and log_slope.isfinite().all()


# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spline", SPLINES, ids=NAMES)
def test_ends_keep_to_themselves_and_nothing_leaves_the_interval(spline, scale, dtype):
    ends = torch.tensor([spline.low, spline.high], dtype=dtype)
    for axis, method in enumerate([spline.forward, spline.inverse_and_ldj]):
        values, params = rows_of_hard_values(spline, scale, dtype, axis)
        result, _ = method(values, params)
        inside = (values >= spline.low) & (values <= spline.high)
        # with tails one unit in the last place is no matter: what lies outside is the identity
        slack = 2 * torch.finfo(dtype).eps * abs(spline.high) if spline.tails else 0.0
        assert (result[inside] >= spline.low - slack).all()
        assert (result[inside] <= spline.high + slack).all()
        for row in params[:: len(params) // 4]:
            at_ends, log_slope = method(ends, row.expand(2, -1))
            torch.testing.assert_close(at_ends, ends, atol=slack, rtol=0)
            if spline.tails:
                torch.testing.assert_close(
                    log_slope, torch.zeros(2, dtype=dtype), atol=1e-5, rtol=0
                )


@pytest.mark.parametrize("spline", SPLINES, ids=NAMES)
def test_stacked_unit_splines_never_leave_their_own_support(spline):
    # a value that rounds to beyond an end would be refused by the next layer
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20_000, generator=generator) * (spline.high - spline.low) + spline.low
    x[:2] = torch.tensor([spline.low, spline.high])
    for seed, scale in enumerate([1.0, 50.0, 1e3, 5.0, 1.0]):
        params = parameters(spline, scale, torch.float32, 1, seed).expand(len(x), -1)
        x = spline.forward(spline.inverse(spline.forward(x, params)[0], params), params)[0]
        if spline is UNIT:
            assert (x >= 0).all() and (x <= 1).all()
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-3)], ids=["double", "float"]
)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spline", [TAILS, UNIT, SKEWED], ids=NAMES[:3])
def test_round_trip_from_z(spline, scale, dtype, tolerance):
    """x carries z no better than one unit in its last place times the slope there, which is up to
    1000 s here: so z comes back within 2e-3 in float32 and 1e-11 in float64, at every scale."""
    z, params = rows_of_hard_values(spline, scale, dtype, 1)
    back = spline.forward(spline.inverse(z, params), params)[0]
    torch.testing.assert_close(back, z, atol=tolerance, rtol=1e-6 if dtype.itemsize == 4 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spline", SPLINES, ids=NAMES)
def test_monotone_up_to_rounding(spline, scale, dtype):
    for axis, method in enumerate([spline.forward, spline.inverse_and_ldj]):
        for row in parameters(spline, scale, dtype):
            values = hard_values(spline, row, axis, dtype).sort().values
            result, _ = method(values, row.expand(len(values), -1))
            steps = result.diff() / result[1:].abs().clamp_min(1.0)
            assert (steps >= -8 * torch.finfo(dtype).eps * abs(spline.high)).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spline", SPLINES, ids=NAMES)
def test_log_slope_is_the_derivative(spline, scale, double):
    for axis, method in enumerate([spline.forward, spline.inverse_and_ldj]):
        values, params = rows_of_hard_values(spline, scale, torch.float64, axis)
        values = values.requires_grad_()
        result, log_slope = method(values, params)
        (slope,) = torch.autograd.grad(result.sum(), values)
        sign = 1 if axis == 0 else -1
        torch.testing.assert_close(slope.log(), sign * log_slope.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spline", SPLINES, ids=NAMES)
def test_gradients_against_differences(spline, double):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, generator=generator) * (spline.high - spline.low) * 0.98 + spline.low + 0.01
    params = parameters(spline, 1.0, torch.float64, 6)
    for method in (spline.forward, spline.inverse_and_ldj):
        inputs = (x.clone().requires_grad_(), params.clone().requires_grad_())
        assert torch.autograd.gradcheck(method, inputs)
        assert torch.autograd.gradgradcheck(method, inputs)


def test_gradient_of_the_inverse_in_the_middle_of_a_bin(double):
    # the identity's g is 0 there: the two forms of the root meet, and so must their derivatives
    for spline in (RationalQuadraticSpline(5, bound=2.0), TAILS, UNIT):
        knots = spline._bins(torch.zeros(spline.num_params))[0]
        z = ((knots[1:] + knots[:-1]) / 2).requires_grad_()
        params = torch.zeros(len(z), spline.num_params)
        (slope,) = torch.autograd.grad(spline.inverse(z, params).sum(), z)
        torch.testing.assert_close(slope, torch.ones_like(z), atol=1e-12, rtol=0)


def paper(x, widths, heights, slopes, low):
    """One spline as the paper's equations 4 and 5 write it, one number at a time."""
    left, bottom = low, low
    for k, (w, h) in enumerate(zip(widths, heights, strict=True)):
        if x <= left + w or k == len(widths) - 1:
            break
        left, bottom = left + w, bottom + h
    s, xi, d0, d1 = h / w, (x - left) / w, slopes[k], slopes[k + 1]
    both, lower = xi * (1 - xi), s + (d1 + d0 - 2 * s) * xi * (1 - xi)
    z = bottom + h * (s * xi**2 + d0 * both) / lower
    slope = s**2 * (d1 * xi**2 + 2 * s * both + d0 * (1 - xi) ** 2) / lower**2
    return z, slope


@pytest.mark.parametrize("spline", [TAILS, UNIT, SKEWED], ids=NAMES[:3])
def test_against_the_papers_equations(spline, double):
    k, length = spline.num_bins, spline.high - spline.low
    for row in parameters(spline, 1.0, torch.float64, 3, seed=5):
        share = [torch.softmax(u, 0) for u in (row[:k], row[k : 2 * k])]
        sizes = [length * (spline.min_bin + (1 - k * spline.min_bin) * s) for s in share]
        offset = torch.tensor(1.0 - spline.min_slope).expm1().log()
        free = spline.min_slope + torch.log1p(torch.exp(row[2 * k :] + offset))
        slopes = [1.0, *free.tolist(), 1.0] if spline.tails else free.tolist()
        x = torch.linspace(spline.low, spline.high, 97)
        expected = [
            paper(v, sizes[0].tolist(), sizes[1].tolist(), slopes, spline.low) for v in x.tolist()
        ]
        z, slope = (torch.tensor(column) for column in zip(*expected, strict=True))
        ours, log_slope = spline.forward(x, row.expand(len(x), -1))
        torch.testing.assert_close(ours, z, atol=1e-12, rtol=0)
        torch.testing.assert_close(log_slope, slope.log(), atol=1e-10, rtol=0)
        back, back_slope = spline.inverse_and_ldj(z, row.expand(len(x), -1))
        torch.testing.assert_close(back, x, atol=1e-10, rtol=0)
        torch.testing.assert_close(back_slope, slope.log(), atol=1e-8, rtol=0)


def naive_inverse(spline, z, params):
    """The inverse as the paper's equations 6 to 8 have it: what cancels in float32."""
    x0, z0, width, height, s, delta0, delta1 = spline._bin(z, params, axis=1)
    d0, d1 = delta0 * s, delta1 * s
    curve = (z - z0) * (d1 + d0 - 2 * s)
    a, b, c = height * (s - d0) + curve, height * d0 - curve, -s * (z - z0)
    root = (b.square() - 4 * a * c).clamp_min(0).sqrt()
    return x0 + width * (2 * c / (-b - root)).clamp(0, 1)


@pytest.mark.parametrize("scale", [1.0, 50.0, 1e3])
def test_float32_inverse_is_as_good_as_its_knots(scale):
    params = parameters(TAILS, scale, torch.float32, 20_000)
    z = torch.rand(20_000, generator=torch.Generator().manual_seed(2)) * 6 - 3
    x, log_slope = TAILS.inverse_and_ldj(z, params)
    _, true_slope = TAILS.inverse_and_ldj(z.double(), params.double())

    def residual(x):
        return (TAILS.forward(x.double(), params.double())[0] - z).abs().max()

    assert residual(x) < 2e-3
    assert (log_slope - true_slope).abs().max() < 5e-2  # of slopes from 1e-9 to 1e6
    if scale == 1e3:  # the test has power: the textbook form misses z by a third
        assert residual(naive_inverse(TAILS, z, params)) > 0.1


# Half precision around the spline ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [3.0, None])
def test_autocast_nets_leave_the_spline_in_float32(dtype, bound):
    torch.manual_seed(0)
    count = 2 * (23 if bound else 25)
    layer = RationalQuadraticSplineCoupling(MLP(2, count, [16]), 8, bound)
    with torch.no_grad():
        # bins and slopes at their floors; the net's own gradients overflow sooner in float16
        layer.net.layers[-1].weight.mul_(200 if dtype == torch.bfloat16 else 20)
    z = torch.rand(256, 4)
    z[:8] = torch.tensor([0.0, 1.0, 0.5, 1.0])
    with torch.autocast("cpu", dtype):
        x, back_ldj = layer.inverse_and_ldj(z)
        x = x.detach().requires_grad_()
        back, ldj = layer(x)
    assert back.dtype == ldj.dtype == x.dtype == torch.float32
    torch.testing.assert_close(back, z, atol=2e-3, rtol=0)
    assert ldj.isfinite().all() and back_ldj.isfinite().all()
    (ldj.sum() + back.sum()).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_agree_with_float32_up_to_their_own_rounding(dtype):
    values, params = rows_of_hard_values(TAILS, 1.0, dtype, 0)
    z, log_slope = TAILS.forward(values, params)
    true, true_slope = TAILS.forward(values.float(), params.float())
    assert torch.equal(z, true.to(dtype))
    torch.testing.assert_close(log_slope, true_slope, atol=0, rtol=0)


# Arguments, shapes, compilation -----------------------------------------------------------------


def test_a_floor_that_float32_cannot_resolve_is_refused():
    message = r"expected min_bin >= 1.9e-06 on \[-3, 3\], which float32 can resolve, got 1e-07"
    with pytest.raises(ValueError, match=message):
        RationalQuadraticSpline(8, bound=3.0, min_bin=1e-7)
    with pytest.raises(ValueError, match=r"on \[1000, 1001\], which float32"):
        RationalQuadraticSpline(8, bound=(1000.0, 1001.0))
    RationalQuadraticSpline(8, bound=(10.0, 11.0))


def test_any_event_shape_and_shared_parameters(double):
    params = torch.randn(2, 3, 4, 5, TAILS.num_params)
    x = 2 * torch.randn(2, 3, 4, 5)
    z, log_slope = TAILS.forward(x, params)
    flat, flat_slope = TAILS.forward(x.flatten(), params.flatten(0, 3))
    torch.testing.assert_close(z.flatten(), flat, atol=0, rtol=0)
    torch.testing.assert_close(log_slope.flatten(), flat_slope, atol=0, rtol=0)
    layer = Elementwise((3,), TAILS)
    nn.init.normal_(layer.params)
    x = torch.randn(6, 3)
    z, ldj = layer(x)
    for d in range(3):
        one, slope = TAILS.forward(x[:, d], layer.params[d].expand(6, -1))
        torch.testing.assert_close(z[:, d], one)
        ldj = ldj - slope
    torch.testing.assert_close(ldj, torch.zeros(6), atol=1e-12, rtol=0)


@pytest.mark.parametrize("spline", [TAILS, UNIT], ids=NAMES[:2])
def test_compiled_is_eager(spline):
    torch._dynamo.reset()
    values, params = rows_of_hard_values(spline, 1.0, torch.float32, 0)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        theta = params.clone().requires_grad_()
        z, log_slope = wrap(spline.forward)(values, theta)
        (z.sum() + log_slope.sum()).backward()
        x, back_slope = wrap(spline.inverse_and_ldj)(z.detach(), theta)
        results.append([z, log_slope, theta.grad, x, back_slope])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
