"""Sorting, max, max pooling, rectifying, permuting, and their densities: values and bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from surflow.checks import check_values
from surflow.distributions import (
    DiagonalNormal,
    Distribution,
    Exponential,
    HalfNormal,
    OrderStatistics,
    PlackettLuce,
    StandardNormal,
    TruncatedNormal,
    ZeroInflated,
)
from surflow.distributions.order import inverse_order
from surflow.flow import Flow
from surflow.nets import MLP
from surflow.objectives import elbo, iwbo
from surflow.transforms import (
    MaxGenerative,
    MaxInference,
    MaxPool2d,
    MaxPool2dGenerative,
    ReLUGenerative,
    ReLUInference,
    SortGenerative,
    SortInference,
    StochasticPermutation,
)
from surflow.transforms.surjections.max import insert_one, remove_one

INF = math.inf


def permutations(n: int) -> torch.Tensor:
    return torch.tensor(list(itertools.permutations(range(n))))


def numbers(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


# Truncated normal --------------------------------------------------------------------------------

INTERVALS = {  # loc, scale, low, high
    "none": (0.3, 1.2, -INF, INF),
    "half": (0.0, 1.0, 0.0, INF),
    "below a far mean": (1000.0, 1.0, -INF, 0.0),
    "above a far mean": (-40.0, 2.0, 3.0, INF),
    "around the mean": (0.0, 1.0, -1.0, 2.0),
    "in the upper tail": (0.0, 1.0, 100.0, 100.5),
    "in the lower tail": (0.0, 1.0, -8.0, -7.75),
    "nearly flat": (5.0, 1e4, 0.0, 1.0),
    "narrow": (0.0, 1.0, 1.0, 1.0 + 2.0**-13),
    "narrow in the tail": (0.0, 1.0, -10.0, -10.0 + 2.0**-12),
    "sharp": (0.0, 1e-3, 0.0, INF),
    "hardly cut": (0.0, 1.0, -30.0, 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("interval", INTERVALS)
def test_truncated_normal(interval, dtype):
    torch.set_default_dtype(dtype)
    loc, scale, low, high = INTERVALS[interval]
    p = TruncatedNormal((1,), loc, scale, low, high, learn=True)
    x = p.sample(3000)
    assert x.dtype == dtype and x.isfinite().all()
    assert (x >= low).all() and (x <= high).all()
    reference = stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc, scale)
    expected = reference.logpdf(numbers(x)[:, 0])
    tight = {torch.float64: 1e-9, torch.float32: 3e-6}[dtype]
    np.testing.assert_allclose(numbers(p.log_prob(x)), expected, rtol=tight, atol=tight)
    assert stats.kstest(numbers(x)[:, 0], reference.cdf).pvalue > 1e-3
    for value in (p.log_prob(x).mean(), x.mean()):  # of the score, and through the draw
        for gradient in torch.autograd.grad(value, [p.loc, p.log_scale], retain_graph=True):
            assert gradient.isfinite().all()
    outside = torch.tensor([[low - 1.0], [high + 1.0]])
    assert (p.log_prob(outside)[outside[:, 0].isfinite()] == -INF).all()


@pytest.mark.parametrize("interval", INTERVALS)
def test_truncated_normal_gradients_in_float32(interval):
    """The score's derivatives with respect to x, loc and log scale are those of float64."""
    loc, scale, low, high = INTERVALS[interval]
    found = {}
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        p = TruncatedNormal((1,), loc, scale, low, high, learn=True)
        start = low if math.isfinite(low) else high if math.isfinite(high) else loc
        step = (high - low) if math.isfinite(high - low) else scale / 8
        sign = 1 if math.isfinite(low) or not math.isfinite(high) else -1
        x = torch.tensor([[start + sign * step / 4], [start + sign * step / 2]], requires_grad=True)
        found[dtype] = torch.autograd.grad(p.log_prob(x).sum(), [x, p.loc, p.log_scale])
    for a, b in zip(found[torch.float32], found[torch.float64], strict=True):
        bound = 2e-3 * b.abs() + 5e-4 / scale
        assert ((a.double() - b).abs() <= bound).all(), (interval, a, b)


def test_truncated_normal_draws_carry_the_derivative_of_the_quantile(double):
    """dx/dloc at a fixed uniform, against a difference quotient."""
    for loc, scale, low, high in INTERVALS.values():
        moved = []
        step = 1e-5 * scale
        for shift in (-step, 0.0, step):
            torch.manual_seed(3)
            p = TruncatedNormal((1,), loc + shift, scale, low, high, learn=True)
            x = p.sample(16)
            moved.append(x.detach())
            if shift == 0.0:
                (gradient,) = torch.autograd.grad(x.sum(), [p.loc])
        quotient = ((moved[2] - moved[0]) / (2 * step)).sum()
        torch.testing.assert_close(gradient[0], quotient, rtol=2e-4, atol=1e-7)


def test_truncated_normal_below_its_context(double):
    p = TruncatedNormal((2, 3), 0.3, 1.5, high="context")
    edge = torch.tensor([[[0.5, -2.0, 40.0]], [[1.0, 0.0, -1.0]]])
    x = p.sample(context=edge)
    assert x.shape == (2, 2, 3) and (x <= edge).all()
    b = (numbers(edge) - 0.3) / 1.5
    expected = stats.truncnorm.logpdf(numbers(x), -INF, b, 0.3, 1.5).sum((1, 2))
    np.testing.assert_allclose(numbers(p.log_prob(x, edge)), expected, rtol=1e-10)
    assert (p.log_prob(edge + 0.1 + 0 * x, edge) == -INF).all()
    net = MLP(1, 4, [8], "tanh")
    q = TruncatedNormal((2,), high="context", net=net)
    context = torch.tensor([[0.7], [-3.0]])
    loc, log_scale = net(context).unflatten(1, (2, 2)).unbind(2)
    x = q.sample(context=context)
    b = (context - loc) / log_scale.exp()
    expected = stats.truncnorm.logpdf(
        numbers(x), -INF, numbers(b), numbers(loc), numbers(log_scale.exp())
    )
    np.testing.assert_allclose(numbers(q.log_prob(x, context)), expected.sum(1), rtol=1e-10)


def test_truncated_normal_with_fixed_loc_is_a_half_normal():
    net = MLP(1, 2, [4], "tanh")
    p = TruncatedNormal((2,), low=0.0, learn_loc=False, net=net)
    context = torch.randn(5, 1)
    x = torch.rand(5, 2) * 3
    scale = net(context).exp()
    expected = stats.halfnorm.logpdf(numbers(x), 0, numbers(scale)).sum(1)
    np.testing.assert_allclose(numbers(p.log_prob(x, context)), expected, rtol=1e-5)
    learned = TruncatedNormal((2,), low=0.0, learn=True, learn_loc=False)
    assert [name for name, _ in learned.named_parameters()] == ["log_scale"]
    cold = TruncatedNormal((1,), 0.0, 2.0, low=0.0).sample(20000, temperature=0.5)
    assert cold.mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)


def test_truncated_normal_fills_parameters_in_half_precision():
    p = TruncatedNormal((2,), 1.0, 0.5, low=0.0).to(torch.bfloat16)
    assert p.log_prob(torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": 0.0}, "expected scale > 0"),
        ({"low": 1.0, "high": 1.0}, "expected low < high"),
        ({"high": "the moon"}, "expected numbers or 'context' as high"),
        ({"high": "context", "low": 0.0}, "expected no low together"),
        ({"loc": [1.0, 2.0, 3.0]}, "broadcasts to"),
        ({"parameter_shape": (3,)}, "expected parameters that broadcast"),
    ],
)
def test_truncated_normal_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TruncatedNormal((2,), **kwargs)


def test_truncated_normal_bad_context():
    p = TruncatedNormal((2,), high="context")
    with pytest.raises(ValueError, match="expected a context"):
        p.log_prob(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="as upper edge"):
        p.log_prob(torch.zeros(3, 2), torch.zeros(3, 5))


# Exponential, zero-inflated, order statistics ----------------------------------------------------


def test_exponential():
    p = Exponential((2,), [0.5, 3.0], learn=True)
    assert [name for name, _ in p.named_parameters()] == ["log_scale"]
    x = p.sample(4000)
    expected = stats.expon.logpdf(numbers(x), 0, [0.5, 3.0]).sum(1)
    np.testing.assert_allclose(numbers(p.log_prob(x)), expected, rtol=1e-5, atol=1e-6)
    for d, scale in enumerate((0.5, 3.0)):
        assert stats.kstest(numbers(x)[:, d], stats.expon(0, scale).cdf).pvalue > 1e-3
    assert p.log_prob(torch.tensor([[0.1, -0.1]])).item() == -INF
    net = MLP(1, 2, [4], "tanh")
    context = torch.randn(6, 1)
    y = torch.rand(6, 2)
    expected = stats.expon.logpdf(numbers(y), 0, numbers(net(context).exp())).sum(1)
    np.testing.assert_allclose(
        numbers(Exponential((2,), net=net).log_prob(y, context)), expected, rtol=1e-5
    )
    with pytest.raises(ValueError, match="expected scale > 0"):
        Exponential((2,), -1.0)


def test_zero_inflated(double):
    p = ZeroInflated((1,), 0.3, 2.0)
    grid = torch.linspace(1e-6, 30, 200001).unsqueeze(1)
    mass = torch.trapezoid(p.log_prob(grid).exp(), grid[:, 0]) + p.log_prob(torch.zeros(1, 1)).exp()
    assert mass.item() == pytest.approx(1, abs=1e-6)
    assert p.log_prob(torch.zeros(1, 1)).exp().item() == pytest.approx(0.3)
    assert p.log_prob(torch.tensor([[-0.1]])).item() == -INF
    x = p.sample(20000)
    assert (x == 0).double().mean().item() == pytest.approx(0.3, abs=0.015)
    assert stats.kstest(numbers(x[x > 0]), stats.halfnorm(0, 2.0).cdf).pvalue > 1e-3
    net = MLP(1, 2, [4], "tanh")
    c = torch.tensor([[0.4]])
    q = ZeroInflated((1,), net=net)
    assert q.log_prob(torch.zeros(1, 1), c).item() == pytest.approx(
        F.logsigmoid(net(c)[0, 0]).item()
    )
    for kwargs in ({"probability": 1.0}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="ZeroInflated: expected"):
            ZeroInflated((1,), **kwargs)


def test_order_statistics(double):
    """The largest of three has density 3 phi Phi^2, and the log-density is that of a sort."""
    p = OrderStatistics(StandardNormal((3,)))
    z, log_p = p.sample_and_log_prob(20000)
    assert (z[:, 1:] >= z[:, :-1]).all()
    expected = math.log(6) + stats.norm.logpdf(numbers(z)).sum(1)
    np.testing.assert_allclose(numbers(log_p), expected)
    assert stats.kstest(numbers(z[:, 2]), lambda v: stats.norm.cdf(v) ** 3).pvalue > 1e-3
    points = OrderStatistics(StandardNormal((4, 2)), by=1)
    z = points.sample(50)
    assert (z[:, 1:, 1] >= z[:, :-1, 1]).all() and not (z[:, 1:, 0] >= z[:, :-1, 0]).all()
    assert points.log_prob(z).isfinite().all() and (points.log_prob(z.flip(1)) == -INF).all()
    with pytest.raises(ValueError, match="expected an index of one feature"):
        OrderStatistics(StandardNormal((4, 2)), by=2)


# Plackett-Luce -----------------------------------------------------------------------------------


def brute_force_plackett_luce(logits, order) -> float:
    weights = [math.exp(v) for v in logits]
    p, left = 1.0, sum(weights)
    for k in order:
        p *= weights[k] / left
        left -= weights[k]
    return p


def test_plackett_luce_is_a_distribution_and_draws_what_it_scores(double):
    logits = [0.5, -1.0, 1.5, 0.0]
    p = PlackettLuce(4, logits)
    everything = permutations(4)
    probability = p.log_prob(everything).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    expected = [brute_force_plackett_luce(logits, row) for row in everything.tolist()]
    np.testing.assert_allclose(numbers(probability), expected, rtol=1e-10)
    n = 40000
    draws = p.sample(n)
    assert draws.dtype == torch.int64
    code = draws @ torch.tensor([1000, 100, 10, 1])
    counts = torch.stack([(code == int("".join(map(str, r)))).sum() for r in everything.tolist()])
    assert counts.sum().item() == n
    assert stats.chisquare(counts.numpy(), n * np.array(expected)).pvalue > 1e-3
    uniform = PlackettLuce(5).log_prob(torch.tensor([[3, 1, 4, 0, 2]]))
    assert uniform.item() == pytest.approx(-math.log(120))


def test_plackett_luce_from_a_context(double):
    net = MLP(2, 3, [8], "tanh")
    p = PlackettLuce(3, net=net)
    context = torch.randn(1, 2)
    everything = permutations(3)
    found = p.log_prob(everything, context.expand(6, 2)).exp()
    logits = net(context)[0].tolist()
    expected = [brute_force_plackett_luce(logits, row) for row in everything.tolist()]
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-10)
    assert p.sample(7, context).shape == (7, 3)
    hot = PlackettLuce(2, [0.0, 2.0]).sample(20000, temperature=2.0)
    assert (hot[:, 0] == 1).double().mean().item() == pytest.approx(
        1 / (1 + math.exp(-1)), abs=0.01
    )


def test_plackett_luce_with_extreme_logits():
    p = PlackettLuce(3, [1e4, 0.0, -1e4], learn=True)
    assert (p.sample(100) == torch.tensor([0, 1, 2])).all()
    log_p = p.log_prob(permutations(3))
    assert log_p.isfinite().all()
    assert log_p[0].item() == pytest.approx(0, abs=1e-6)
    assert log_p[-1].item() == pytest.approx(-1e4 - 2e4, rel=1e-5)
    (gradient,) = torch.autograd.grad(log_p.sum(), [p.logits])
    assert gradient.isfinite().all()


def test_plackett_luce_bad_input():
    p = PlackettLuce(3)
    for x in ([[0, 1, 1]], [[0, 1, 3]], [[-1, 0, 1]]):
        with pytest.raises(ValueError, match="permutations of 0 to 2"):
            p.log_prob(torch.tensor(x))
    with pytest.raises(ValueError, match="expected an integer tensor"):
        p.log_prob(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="num_elements >= 1"):
        PlackettLuce(0)
    with pytest.raises(ValueError, match="broadcasts"):
        PlackettLuce(3, [1.0, 2.0])


# Sort --------------------------------------------------------------------------------------------


def test_sort_of_an_exchangeable_model_is_that_model(double):
    """Uniform orders over order statistics give back independent normals, exactly."""
    for shape, by in (((5,), None), ((4, 2), 1)):
        flow = Flow(OrderStatistics(StandardNormal(shape), by), [SortInference(shape, by)])
        x = torch.randn(64, *shape)
        expected = stats.norm.logpdf(numbers(x)).reshape(64, -1).sum(1)
        np.testing.assert_allclose(numbers(flow.log_prob(x)), expected)
        assert not flow.lower_bound


def test_sort_moves_whole_elements(double):
    x = torch.tensor([[[3.0, 1.0], [1.0, 2.0], [2.0, 0.0]]])
    z, ldj = SortInference((3, 2))(x)
    assert z.tolist() == [[[1.0, 2.0], [2.0, 0.0], [3.0, 1.0]]]
    assert ldj.item() == pytest.approx(-math.log(6))
    z, _ = SortInference((3, 2), by=1)(x)
    assert z.tolist() == [[[2.0, 0.0], [3.0, 1.0], [1.0, 2.0]]]


def test_sort_scores_the_ranks_by_enumeration(double):
    """Over all orders of one z: what forward scores sums to one, and is what inverse draws."""
    net = MLP(3, 3, [8], "tanh")
    nn.init.constant_(net.layers[-1].bias, 0.0)
    with torch.no_grad():
        net.layers[-1].bias.add_(torch.tensor([-2.0, 1.0, 2.0]))
    layer = SortInference((3,), net=net)
    z = torch.tensor([[-1.0, 0.5, 2.0]])
    orders = permutations(3)  # ranks: x_i = z[order_i]
    x = z[0][orders]
    again, ldj = layer(x)
    assert (again == z).all()
    logits = net(z)[0].tolist()
    expected = [brute_force_plackett_luce(logits, row) for row in orders.tolist()]
    np.testing.assert_allclose(numbers(ldj.exp()), expected, rtol=1e-10)
    assert ldj.exp().sum().item() == pytest.approx(1)
    n = 20000
    drawn, scores = layer.inverse_and_ldj(z.expand(n, 3))
    counts = torch.stack([(drawn == row).all(1).sum() for row in x])
    assert stats.chisquare(counts.numpy(), n * np.array(expected)).pvalue > 1e-3
    torch.testing.assert_close(scores, layer(drawn)[1])


def test_sort_generative_is_tight_for_an_exchangeable_base(double):
    flow = Flow(StandardNormal((4,)), [SortGenerative((4,))])
    x = torch.randn(32, 4).sort(1).values
    expected = math.log(24) + stats.norm.logpdf(numbers(x)).sum(1)
    np.testing.assert_allclose(numbers(flow.log_prob(x)), expected)
    assert flow.lower_bound


def test_sort_ties():
    layer = SortInference((3, 2), learn=True)
    x = torch.tensor([[[1.0, 5.0], [1.0, 6.0], [0.0, 7.0]]], requires_grad=True)
    z, ldj = layer(x)
    assert z[0, :, 1].tolist() == [7.0, 5.0, 6.0]
    assert ldj.isfinite().all()
    gradients = torch.autograd.grad(z.square().sum() + ldj.sum(), [x, layer.logits])
    assert all(g.isfinite().all() for g in gradients)
    back, score = layer.inverse_and_ldj(z)
    assert score.isfinite().all() and (back.sort(1).values == z.sort(1).values).all()


@pytest.mark.parametrize("kind", ["inverse", "generative"])
def test_unsorted_where_sorted_is_needed(kind):
    unsorted = torch.tensor([[0.0, 2.0, 1.0]])
    layer = SortInference((3,)) if kind == "inverse" else SortGenerative((3,))
    method = layer.inverse if kind == "inverse" else layer.forward
    name = "SortInference.inverse" if kind == "inverse" else "SortGenerative.forward"
    with pytest.raises(ValueError, match=f"{name}: expected elements in ascending order"):
        method(unsorted)
    with check_values(False):
        method(unsorted)
    with pytest.raises(ValueError, match=r"expected shape \(batch, 3\)"):
        method(torch.zeros(2, 4))


def test_sort_bad_input():
    for by in (2, (0, 0), -1):
        with pytest.raises(ValueError, match="expected an index of one feature"):
            SortInference((3, 2), by)
    layer = SortInference((3,), net=nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"SortInference.forward: expected the net to give shape"):
        layer(torch.zeros(1, 3))


# Max ---------------------------------------------------------------------------------------------


def log_density_of_max(z: torch.Tensor, k: int) -> np.ndarray:
    z = numbers(z)
    return math.log(k) + stats.norm.logpdf(z) + (k - 1) * stats.norm.logcdf(z)


class MaxOfNormals(Distribution):
    """The largest of K standard normals."""

    def __init__(self, k: int) -> None:
        super().__init__((1,))
        self.k = k

    def _log_prob(self, x, context):
        return torch.from_numpy(log_density_of_max(x, self.k)).sum(1)

    def _sample(self, n, context, temperature):
        return torch.randn(n, self.k).max(1, keepdim=True).values


@pytest.mark.parametrize("k", [2, 3, 7])
def test_max_of_normals(k, double):
    """A uniform index and normals cut at the max give back independent normals, both ways."""
    below = TruncatedNormal((k - 1,), high="context")
    x = 2 * torch.randn(50, k)
    flow = Flow(MaxOfNormals(k), [MaxInference((k,), below, differences=False)])
    expected = stats.norm.logpdf(numbers(x)).sum(1)
    np.testing.assert_allclose(numbers(flow.log_prob(x)), expected, rtol=1e-9)
    drawn = flow.sample(3000)
    for d in range(k):
        assert stats.kstest(numbers(drawn[:, d]), stats.norm.cdf).pvalue > 1e-3
    # turned round the posterior is exact: the bound is the density of the max, for every draw
    flow = Flow(StandardNormal((k,)), [MaxGenerative((k,), below, differences=False)])
    tops = torch.linspace(-6, 6, 25).unsqueeze(1)
    np.testing.assert_allclose(
        numbers(flow.log_prob(tops)), log_density_of_max(tops, k)[:, 0], rtol=1e-9
    )


def test_max_index_by_enumeration(double):
    net = MLP(1, 3, [8], "tanh")
    layer = MaxInference((3,), Exponential((2,), [0.5, 2.0]), net=net)
    z = torch.tensor([[0.7]])
    r = torch.tensor([0.3, 1.1])
    table = net(z).log_softmax(1)[0]
    score_of_rest = stats.expon.logpdf(r.numpy(), 0, [0.5, 2.0]).sum()
    total = 0.0
    for k in range(3):
        rest = (0.7 - r).tolist()
        x = torch.tensor([[*rest[:k], 0.7, *rest[k:]]])
        top, ldj = layer(x)
        assert top.item() == 0.7
        assert ldj.item() == pytest.approx(table[k].item() + score_of_rest)
        total += math.exp(ldj.item() - score_of_rest)
    assert total == pytest.approx(1)
    n = 20000
    places = layer.inverse(z.expand(n, 1)).argmax(1)
    counts = torch.bincount(places, minlength=3).numpy()
    assert stats.chisquare(counts, n * numbers(table.exp())).pvalue > 1e-3


def test_remove_and_insert_one():
    for shape, dim in (((5, 4), 1), ((2, 3, 4, 2), 1), ((2, 3, 4, 2), 2)):
        x = torch.randn(shape)
        k = shape[dim]
        index = torch.randint(k, [1 if d == dim else s for d, s in enumerate(shape)])
        rest = remove_one(x, index, dim)
        moved, where = x.movedim(dim, -1).reshape(-1, k), index.movedim(dim, -1).reshape(-1)
        expected = [
            [v for j, v in enumerate(row) if j != i]
            for row, i in zip(moved.tolist(), where.tolist(), strict=True)
        ]
        assert rest.movedim(dim, -1).reshape(-1, k - 1).tolist() == expected
        assert torch.equal(insert_one(x.gather(dim, index), rest, index, dim), x)


def test_max_ties_and_the_edge():
    for decoder, differences in (
        (None, True),
        (Exponential((2,), learn=True), True),
        (TruncatedNormal((2,), learn=True, high="context"), False),
    ):
        layer = MaxInference((3,), decoder, differences, learn=True)
        x = torch.tensor([[1.0, 1.0, 1.0], [-200.0, 2.0, 2.0]], requires_grad=True)
        z, ldj = layer(x)
        assert z.tolist() == [[1.0], [2.0]]
        assert ldj.isfinite().all()
        for g in torch.autograd.grad(ldj.sum(), [x, *layer.parameters()]):
            assert g.isfinite().all()


def test_max_bad_input():
    with pytest.raises(ValueError, match="MaxInference: expected K >= 2 elements, got 1"):
        MaxInference((1, 3))
    with pytest.raises(ValueError, match=r"expected a decoder of shape \(2, 4\), got \(3, 4\)"):
        MaxInference((3, 4), HalfNormal((3, 4)))
    with pytest.raises(ValueError, match="expected a decoder of the values below"):
        MaxInference((3,), differences=False)
    with pytest.raises(ValueError, match="expected a Distribution as decoder"):
        MaxInference((3,), decoder=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"MaxInference.inverse: expected the net to give shape"):
        MaxInference((3,), net=nn.Linear(1, 2)).inverse(torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"MaxGenerative.forward: expected shape \(batch, 1\)"):
        MaxGenerative((3,))(torch.zeros(2, 3))
    above = MaxInference((3,), StandardNormal((2,)))  # draws of both signs for a distance
    with pytest.raises(ValueError, match=r"MaxInference.inverse: expected a decoder whose draws"):
        above.inverse(torch.zeros(50, 1))


def test_max_of_an_empty_batch():
    z, ldj = MaxInference((3,))(torch.zeros(0, 3))
    assert z.shape == (0, 1)
    assert ldj.shape == (0,)


# Max pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "k"), [((2, 4, 6), 2), ((3, 6, 3), 3), ((1, 8, 4), 4)])
def test_max_pool_against_loops(shape, k, double):
    """The pooled values of torch, and the remainders in raster order, pixel by pixel."""
    seen = {}

    class Spy(HalfNormal):
        def _log_prob(self, x, context):
            seen["event"], seen["context"] = x, context
            return super()._log_prob(x, context)

    c, h, w = shape
    small = (h // k, w // k)
    rest = k * k - 1
    layer = MaxPool2d(shape, k, Spy((c * rest, *small)))
    x = torch.randn(3, *shape)
    z, ldj = layer(x)
    torch.testing.assert_close(z, F.max_pool2d(x, k), rtol=0, atol=0)
    event = torch.empty(3, c * rest, *small)
    for b, ch, i, j in itertools.product(range(3), range(c), range(small[0]), range(small[1])):
        pixels = [x[b, ch, k * i + u, k * j + v].item() for u in range(k) for v in range(k)]
        top = max(pixels)
        others = [top - p for p in pixels if p != top]
        event[b, ch * rest : (ch + 1) * rest, i, j] = torch.tensor(others)
    torch.testing.assert_close(seen["event"], event)
    pooled = c * small[0] * small[1]
    expected = stats.halfnorm.logpdf(numbers(event)).reshape(3, -1).sum(1)
    np.testing.assert_allclose(numbers(ldj), expected - pooled * math.log(k * k))


def test_max_pool_puts_back_what_it_was_given(double):
    """With the remainders and the places of an image, the inverse is that image."""
    x = torch.randn(4, 2, 4, 4)
    layer = MaxPool2d((2, 4, 4))
    blocks = layer._cut(x)
    top, index = blocks.max(2, keepdim=True)
    rest = remove_one(blocks, index, 2)
    z = layer(x)[0]
    torch.testing.assert_close(layer._unsqueeze(z), top)
    again = layer._join(insert_one(top, layer._unpack(layer._pack(rest)), index, 2))
    assert torch.equal(again, x)


def test_max_pool_index_net(double):
    """Place i of channel c has its logit at channel c k^2 + i."""

    class Table(nn.Module):
        def forward(self, z):
            return torch.arange(8.0).view(1, 8, 1, 1).expand(z.shape[0], 8, *z.shape[2:]).sqrt()

    layer = MaxPool2d((2, 2, 4), net=Table())
    x = torch.randn(5, 2, 2, 4)
    _, ldj = layer(x)
    plain = MaxPool2d((2, 2, 4))(x)[1]
    table = torch.arange(8.0).sqrt().view(2, 4).log_softmax(1)
    expected = plain + 4 * math.log(4)
    for b in range(5):
        for c, j in itertools.product(range(2), range(2)):
            block = x[b, c, :, 2 * j : 2 * j + 2].flatten()
            expected[b] += table[c, block.argmax()]
    torch.testing.assert_close(ldj, expected)
    n = 5000
    drawn = layer.inverse(torch.zeros(n, 2, 1, 2))
    blocks = layer._cut(drawn).argmax(2)
    for c in range(2):
        counts = torch.bincount(blocks[:, c].flatten(), minlength=4).numpy()
        assert stats.chisquare(counts, 2 * n * numbers(table[c].exp())).pvalue > 1e-3


def test_max_pool_iwbo_meets_the_truth(double):
    """Four pixels of standard normals, turned round: the bound rises to log of 4 phi Phi^3."""
    layer = MaxPool2dGenerative((1, 2, 2), decoder=HalfNormal((3, 1, 1), scale=1.8))
    flow = Flow(StandardNormal((1, 2, 2)), [layer])
    x = torch.tensor([0.5, 1.5]).view(2, 1, 1, 1)
    truth = log_density_of_max(x, 4).reshape(2)
    estimate = numbers(iwbo(flow, x, num_samples=20000))
    np.testing.assert_allclose(estimate, truth, atol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxPool2d((1, 3, 4)), "expected a height and a width that 2 divides, got 3 x 4"),
        (lambda: MaxPool2d((1, 4, 4), 3), "that 3 divides, got 4 x 4"),
        (lambda: MaxPool2d((4, 4)), r"expected event_shape \(C, H, W\)"),
        (lambda: MaxPool2d((1, 4, 4), 1), "expected kernel_size >= 2, got 1"),
        (
            lambda: MaxPool2d((2, 4, 4), decoder=HalfNormal((2, 2, 2))),
            r"expected a decoder of shape \(6, 2, 2\), got \(2, 2, 2\)",
        ),
        (lambda: MaxPool2dGenerative((1, 4, 5)), "got 4 x 5"),
        (
            lambda: MaxPool2d((1, 4, 4))(torch.zeros(2, 1, 4, 6)),
            "MaxPool2d.forward: expected shape",
        ),
        (
            lambda: MaxPool2d((1, 4, 4), net=nn.Conv2d(1, 3, 1))(torch.zeros(2, 1, 4, 4)),
            r"expected the net to give shape \(2, 4, 2, 2\)",
        ),
    ],
)
def test_max_pool_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_max_pool_in_half_precision_scores_in_float32():
    layer = MaxPool2d((2, 4, 4), learn=True).to(torch.bfloat16)
    z, ldj = layer(torch.randn(3, 2, 4, 4, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16 and ldj.dtype == torch.float32 and ldj.isfinite().all()


# ReLU --------------------------------------------------------------------------------------------


def test_relu_is_the_density_it_says(double):
    """Mass pi as a half-normal below zero, 1 - pi as one above; the whole integrates to one."""
    flow = Flow(ZeroInflated((1,), 0.3, 1.5), [ReLUInference((1,), scale=0.6)])
    x = torch.linspace(-8, 12, 400001).unsqueeze(1)
    log_p = flow.log_prob(x)
    below = math.log(0.3) + stats.halfnorm.logpdf(-numbers(x), 0, 0.6)
    above = math.log(0.7) + stats.halfnorm.logpdf(numbers(x), 0, 1.5)
    np.testing.assert_allclose(numbers(log_p), np.where(numbers(x) > 0, above, below)[:, 0])
    assert torch.trapezoid(log_p.exp(), x[:, 0]).item() == pytest.approx(1, abs=1e-4)
    drawn = flow.sample(20000)
    assert (drawn < 0).double().mean().item() == pytest.approx(0.3, abs=0.015)
    assert stats.kstest(-numbers(drawn[drawn < 0]), stats.halfnorm(0, 0.6).cdf).pvalue > 1e-3


def test_relu_generative_is_exact_with_the_exact_posterior(double):
    """Normals with mean zero: a zero has mass 1/2, and above it the density is the normal's."""
    scale = [0.7, 1.3]
    flow = Flow(DiagonalNormal((2,), scale=scale), [ReLUGenerative((2,), scale=scale)])
    x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.4, 0.0], [0.4, 2.0]])
    density = stats.norm.logpdf(numbers(x), 0, scale)
    expected = np.where(numbers(x) == 0, math.log(0.5), density).sum(1)
    np.testing.assert_allclose(numbers(flow.log_prob(x)), expected)
    assert flow.lower_bound


def test_relu_generative_bound_of_a_zero(double):
    """Of a shifted normal: the bound lies below log Phi(-loc / scale), and closes with K."""
    flow = Flow(DiagonalNormal((1,), 0.8, 1.1), [ReLUGenerative((1,), scale=0.7)])
    zero = torch.zeros(1, 1)
    truth = stats.norm.logcdf(-0.8 / 1.1)
    elbo = flow.log_prob(zero.expand(20000, 1)).mean().item()
    assert elbo < truth
    assert iwbo(flow, zero, num_samples=100000).item() == pytest.approx(truth, abs=0.02)


def test_relu_net_sees_the_latent(double):
    net = MLP(2, 2, [8], "tanh")
    x = torch.tensor([[1.0, -0.5], [-0.3, -0.4]])
    z, ldj = ReLUInference((2,), net=net)(x)
    assert z.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    scale = numbers(net(z).exp())
    density = stats.halfnorm.logpdf(-numbers(x), 0, scale)
    np.testing.assert_allclose(numbers(ldj), np.where(numbers(x) > 0, 0, density).sum(1))


def test_relu_edges():
    layer = ReLUInference((3,), learn=True)
    x = torch.tensor([[0.0, -0.0, 1e-30], [-1e4, 1e30, -1e-30]], requires_grad=True)
    z, ldj = layer(x)
    assert (z == torch.tensor([[0.0, 0.0, 1e-30], [0.0, 1e30, 0.0]])).all()
    assert ldj.isfinite().all()
    assert ldj[0].item() == pytest.approx(2 * stats.halfnorm.logpdf(0), rel=1e-6)
    for g in torch.autograd.grad(ldj.sum() + z[0].sum(), [x, layer.log_scale]):
        assert g.isfinite().all()
    back = layer.inverse(z)
    assert ((back > 0) == (z > 0)).all() and (layer(back)[0] == z).all()


def test_relu_generative_learns_its_posterior():
    """Draws are reparametrised: the scale finds that of the model's negative part."""
    torch.manual_seed(1)
    flow = Flow(DiagonalNormal((1,), scale=0.5), [ReLUGenerative((1,), scale=2.0, learn=True)])
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    zero = torch.zeros(256, 1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow.log_prob(zero).mean()
        loss.backward()
        optimizer.step()
    assert flow.transforms[0].transform.log_scale.exp().item() == pytest.approx(0.5, abs=0.03)
    assert loss.item() == pytest.approx(math.log(2), abs=0.02)


def test_relu_bad_input():
    with pytest.raises(ValueError, match=r"ReLUInference\.inverse: expected values >= 0"):
        ReLUInference((2,)).inverse(torch.tensor([[0.0, -1.0]]))
    with pytest.raises(ValueError, match=r"ReLUGenerative\.forward: expected values >= 0"):
        ReLUGenerative((2,))(torch.tensor([[0.0, -1.0]]))
    with pytest.raises(ValueError, match="expected scale > 0"):
        ReLUInference((2,), scale=[1.0, 0.0])
    with pytest.raises(ValueError, match="expected the net to give shape"):
        ReLUInference((2,), net=nn.Linear(2, 1))(torch.zeros(1, 2))


# Stochastic permutation --------------------------------------------------------------------------


class Given(StochasticPermutation):
    """Draws the orders that it is told."""

    def _draw(self, logits, value):
        return self.orders


@pytest.mark.parametrize("rest", [(), (2,)])
def test_permutation_by_enumeration(rest, double):
    """The mean of p(z) e^V over q is the sum over orders of p(order) p(z), and q sums to one."""
    size = 3 * math.prod(rest)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 3))
    decoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 3))
    layer = Given(3, encoder_net=encoder, decoder_net=decoder)
    layer.orders = permutations(3)
    base = DiagonalNormal((3, *rest), torch.tensor([0.5, -0.2, 0.1]).view(3, *[1] * len(rest)), 1.3)
    x = torch.randn(1, 3, *rest).expand(6, 3, *rest)
    z, ldj = layer(x)
    for i, order in enumerate(layer.orders.tolist()):
        assert torch.equal(z[i], x[i][order])
    q = [brute_force_plackett_luce(encoder(x[:1])[0].tolist(), o) for o in layer.orders.tolist()]
    assert sum(q) == pytest.approx(1)
    found = (torch.tensor(q) * (base.log_prob(z) + ldj).exp()).sum().item()
    back = inverse_order(layer.orders).tolist()
    p = [brute_force_plackett_luce(decoder(z[i : i + 1])[0].tolist(), back[i]) for i in range(6)]
    expected = (torch.tensor(p) * base.log_prob(z).exp()).sum().item()
    assert found == pytest.approx(expected, rel=1e-10)
    # inverse, told the inverse orders, leads back to x with the same contribution
    layer.orders = inverse_order(permutations(3))
    again, pair = layer.inverse_and_ldj(z)
    assert torch.equal(again, x)
    torch.testing.assert_close(pair, ldj)


def test_uniform_permutation_is_uniform_and_makes_a_model_exchangeable(double):
    layer = StochasticPermutation()
    x = torch.tensor([[1.0, 2.0, 3.0]]).expand(12000, 3)
    for z, ldj in (layer(x), layer.inverse_and_ldj(x)):
        assert (ldj == 0).all()
        counts = torch.stack(
            [(z == row).all(1).sum() for row in torch.tensor([1.0, 2.0, 3.0])[permutations(3)]]
        )
        assert counts.sum().item() == 12000
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    flow = Flow(DiagonalNormal((2,), [1.0, -1.0], 0.7), [layer])
    point = torch.tensor([[0.3, 0.9], [0.9, 0.3]])
    symmetric = (
        stats.norm.pdf([0.3, 0.9], [1, -1], 0.7).prod()
        + stats.norm.pdf([0.9, 0.3], [1, -1], 0.7).prod()
    ) / 2
    np.testing.assert_allclose(
        numbers(iwbo(flow, point, num_samples=20000)), math.log(symmetric), atol=0.03
    )


def test_permutation_moves_whole_elements():
    x = torch.randn(50, 6, 2, 3)
    z, _ = StochasticPermutation()(x)
    key = x[:, :, 0, 0].argsort(1)
    other = z[:, :, 0, 0].argsort(1)
    for b in range(50):
        assert torch.equal(x[b][key[b]], z[b][other[b]])


def test_permutation_bad_input():
    with pytest.raises(ValueError, match="expected num_elements for learned orders"):
        StochasticPermutation(learn=True)
    with pytest.raises(ValueError, match="num_elements >= 1"):
        StochasticPermutation(0)
    layer = StochasticPermutation(3, learn=True)
    for method, name in ((layer.forward, "forward"), (layer.inverse, "inverse")):
        with pytest.raises(ValueError, match=f"StochasticPermutation.{name}: expected 3 elements"):
            method(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="expected the net to give shape"):
        StochasticPermutation(3, encoder_net=nn.Linear(3, 2))(torch.zeros(1, 3))


# Gradients of learned discrete posteriors --------------------------------------------------------


def exact_gradients(q_log, value, parameters):
    """Of the bound sum_k q_k (value_k - log q_k) over an enumeration of the draws."""
    bound = (q_log.exp() * (value - q_log)).sum()
    return torch.autograd.grad(bound, parameters)


def sampled_gradients(flow, x, n, parameters):
    bound = elbo(flow, x.expand(n, *x.shape[1:]), num_samples=2).mean()
    return torch.autograd.grad(bound, parameters)


def test_learned_orders_get_the_gradient_of_the_bound(double):
    base = DiagonalNormal((3,), [1.0, -0.5, 0.0], 0.8)
    x = torch.tensor([[-1.0, 0.3, 0.9]])
    layer = SortGenerative((3,), learn=True)
    (logits,) = layer.parameters()
    with torch.no_grad():
        logits.copy_(torch.tensor([0.4, -0.3, 0.1]))
    orders = permutations(3)
    z = x[0][orders]
    q = PlackettLuce(3)
    q.logits = logits
    expected = exact_gradients(q.log_prob(orders), base.log_prob(z), [logits])[0]
    found = sampled_gradients(Flow(base, [layer]), x, 40000, [logits])[0]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert expected.abs().max() > 0.2


def test_learned_permutations_get_the_gradient_of_the_bound(double):
    base = DiagonalNormal((3,), [1.0, -0.5, 0.0], 0.8)
    x = torch.tensor([[0.3, -1.0, 0.9]])
    layer = StochasticPermutation(3, learn=True)
    with torch.no_grad():
        layer.encoder_logits.copy_(torch.tensor([0.4, -0.3, 0.1]))
        layer.decoder_logits.copy_(torch.tensor([0.2, 0.5, -0.4]))
    orders = permutations(3)
    q, p = PlackettLuce(3), PlackettLuce(3)
    q.logits, p.logits = layer.encoder_logits, layer.decoder_logits
    value = base.log_prob(x[0][orders]) + p.log_prob(inverse_order(orders))
    parameters = [layer.encoder_logits, layer.decoder_logits]
    expected = exact_gradients(q.log_prob(orders), value, parameters)
    found = sampled_gradients(Flow(base, [layer]), x, 40000, parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_learned_index_gets_the_gradient_of_the_bound(double):
    """With normals cut at the max below it, the rest integrates out: only the index is left."""
    loc, x = torch.tensor([0.8, -0.4, 0.0]), torch.tensor([[0.5]])
    posterior = TruncatedNormal((2,), high="context")
    layer = MaxGenerative((3,), posterior, differences=False, learn=True)
    logits = layer.transform.logits
    flow = Flow(DiagonalNormal((3,), loc), [layer])
    value = []
    for k in range(3):
        rest, log_q = posterior.sample_and_log_prob(40000, x)
        z = torch.cat([rest[:, :k], x.expand(len(rest), 1), rest[:, k:]], 1)
        value.append((flow.base.log_prob(z) - log_q).mean())
    expected = exact_gradients(logits.log_softmax(0), torch.stack(value), [logits])[0]
    found = sampled_gradients(flow, x, 15000, [logits])[0]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03)
    assert expected.abs().max() > 0.1
