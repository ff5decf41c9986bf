"""Flows: densities that integrate to one, ledgers, bounds, conditioning, objectives."""

import math

import pytest
import torch
from torch import Tensor, nn

from surflow.distributions import DiagonalNormal, HalfNormal, StandardNormal, Uniform
from surflow.flow import Flow, FlowDistribution, Ledger
from surflow.nets import MLP, LipschitzMLP
from surflow.objectives import bits_per_dim, elbo, iwbo
from surflow.transforms import (
    AbsGenerative,
    AbsInference,
    ActNorm,
    Affine,
    AffineCoupling,
    Augment,
    BoxToReal,
    Inverse,
    Logit,
    Permute,
    RationalQuadraticSplineCoupling,
    Residual,
    Rotation,
    Sequential,
    Slice,
    Softplus,
    SoftplusInverse,
    Squeeze,
)

pytestmark = pytest.mark.usefixtures("double")


def grid(low: float = -6.0, high: float = 6.0, cells: int = 400) -> tuple[Tensor, float]:
    """Cell midpoints, (cells², 2), and the area of a cell."""
    width = (high - low) / cells
    axis = low + (torch.arange(cells) + 0.5) * width
    return torch.cartesian_prod(axis, axis), width**2


def mass(flow: Flow, low: float = -6.0, high: float = 6.0, **kwargs) -> float:
    x, area = grid(low, high)
    with torch.no_grad():
        return flow.log_prob(x, **kwargs).exp().sum().item() * area


def coupling_flow(context_features: int = 0) -> Flow:
    net = {"hidden_features": [16], "activation": "tanh", "context_features": context_features}
    return Flow(
        StandardNormal(2),
        [
            AffineCoupling(MLP(1, 2, **net), "tanh_exp"),
            Rotation(2, angle=0.5),
            RationalQuadraticSplineCoupling(MLP(1, 14, **net), 5, bound=3.0),
            Permute([1, 0]),
            AffineCoupling(MLP(1, 2, **net), "softplus"),
        ],
    )


def abs_flow(net: nn.Module | None = None, context_features: int = 0) -> Flow:
    inner = MLP(1, 2, [16], "tanh", context_features=context_features)
    return Flow(
        StandardNormal(2),
        [
            Affine(2, [0.4, -0.2], [1.1, 0.9]),
            AbsInference(2, probability=0.3) if net is None else AbsInference(2, net=net),
            SoftplusInverse(),
            AffineCoupling(inner, "tanh_exp"),
        ],
    )


def boxed_abs_flow() -> Flow:
    return Flow(
        StandardNormal(2),
        [
            AbsInference(2, net=MLP(2, 2, [16], "tanh")),
            BoxToReal([0.0, 0.0], [4.0, 4.0]),
            AffineCoupling(MLP(1, 2, [16], "tanh"), "tanh_exp"),
        ],
    )


def bound_flow(net: nn.Module | None = None) -> Flow:
    """x = |z| with z in two dimensions; the posterior of the signs is not the true one."""
    layers = [
        AbsGenerative(2, probability=0.6, learn=True) if net is None else AbsGenerative(2, net=net),
        AffineCoupling(MLP(1, 2, [16], "tanh"), "tanh_exp"),
    ]
    return Flow(DiagonalNormal(2, [0.5, -0.3], [0.8, 1.2]), layers)


def true_log_prob(flow: Flow, x: Tensor) -> Tensor:
    """log p(x) of ``bound_flow`` by enumerating the four signs."""
    rest = Flow(flow.base, list(flow.transforms)[1:])
    signs = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))
    return torch.logsumexp(torch.stack([rest.log_prob(x * s) for s in signs]), 0)


# Densities --------------------------------------------------------------------------------------


def test_a_flow_integrates_to_one():
    assert mass(coupling_flow(), -8, 8) == pytest.approx(1, abs=2e-3)


def test_an_abs_flow_integrates_to_one():
    assert mass(abs_flow(), -8, 8) == pytest.approx(1, abs=5e-3)


def test_a_learned_abs_flow_integrates_to_one():
    assert mass(boxed_abs_flow(), -4, 4) == pytest.approx(1, abs=2e-3)
    assert mass(abs_flow(MLP(2, 2, [16], "tanh")), -8, 8) == pytest.approx(1, abs=5e-3)


def test_a_conditional_flow_integrates_to_one_under_each_context():
    flow = coupling_flow(context_features=1)
    masses, densities = [], []
    for value in (-1.0, 2.0):
        context = torch.full((160_000, 1), value)
        masses.append(mass(flow, -8, 8, context=context))
        densities.append(flow.log_prob(torch.zeros(1, 2), context[:1]).item())
    assert masses == pytest.approx([1, 1], abs=2e-3)
    assert abs(densities[0] - densities[1]) > 1e-3


def test_a_flow_of_one_affine_layer_is_a_normal():
    flow = Flow(StandardNormal(2), Affine(2, [1.0, 2.0], [0.5, 4.0]))
    x = torch.randn(9, 2)
    expected = DiagonalNormal(2, [-2.0, -0.5], [2.0, 0.25]).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected)
    torch.testing.assert_close(Flow(StandardNormal(2)).log_prob(x), StandardNormal(2).log_prob(x))


def test_the_probability_of_a_side_is_what_the_fold_says():
    flow = Flow(HalfNormal(1), AbsInference(1, probability=0.3))
    assert flow.log_prob(torch.tensor([[1.0]])).exp() / flow.log_prob(
        torch.tensor([[-1.0]])
    ).exp() == pytest.approx(3 / 7)
    assert (flow.sample(50_000) > 0).double().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("make", [coupling_flow, abs_flow, boxed_abs_flow])
def test_samples_have_the_density(make):
    flow = make()
    with torch.no_grad():
        sample = flow.sample(50_000)
        x, area = grid(-8, 8)
        x, area = (x * 0.5, area * 0.25) if make is boxed_abs_flow else (x, area)
        p = flow.log_prob(x).exp() * area
    for feature in (lambda v: v.tanh(), lambda v: (v > 0.5).double(), lambda v: (v * 0.7).cos()):
        expected = (feature(x) * p.unsqueeze(1)).sum(0)
        torch.testing.assert_close(feature(sample).mean(0), expected, atol=0.015, rtol=0)


# Ledgers ----------------------------------------------------------------------------------------


def test_a_ledger_adds_up_to_the_mean_log_likelihood():
    flow = abs_flow()
    x = torch.randn(200, 2)
    ledger = flow.ledger(x)
    assert ledger.total == pytest.approx(flow.log_prob(x).mean().item(), abs=1e-6)
    assert ledger.count == 200 and len(ledger) == 5
    assert [row.layer for row in ledger] == [
        "0.Affine",
        "1.AbsInference",
        "2.SoftplusInverse",
        "3.AffineCoupling",
        "base.StandardNormal",
    ]
    kinds = ["bijective", "surjective (inference)", "bijective", "bijective", "base"]
    assert [row.kind for row in ledger] == kinds
    assert not ledger.lower_bound and not any(row.bound for row in ledger)
    assert all(row.finite for row in ledger)
    z, ldj = flow.transforms[0](x)
    assert ledger[0].mean == pytest.approx(ldj.mean().item())
    _, part = flow.transforms[1](z)
    assert ledger[1].standard_error == pytest.approx(part.std().item() / math.sqrt(200))
    assert ledger[-1].layer == "base.StandardNormal"


def test_a_ledger_of_a_bound_says_so():
    flow = bound_flow()
    x = torch.rand(100, 2)
    torch.manual_seed(5)
    ledger = flow.ledger(x)
    torch.manual_seed(5)
    assert ledger.total == pytest.approx(flow.log_prob(x).mean().item(), abs=1e-6)
    assert ledger.lower_bound and [row.bound for row in ledger] == [True, False, False]
    assert ledger[0].kind == "surjective (generative)"
    text = str(ledger)
    assert "lower bound on log p(x)" in text and "(mean of 100 points)" in text
    assert len(text.splitlines()) == 5
    assert "exact" in str(abs_flow().ledger(x)).splitlines()[-1]


def test_a_ledger_of_one_row_has_no_standard_error():
    ledger = coupling_flow().ledger(torch.randn(1, 2))
    assert all(math.isnan(row.standard_error) for row in ledger)
    assert math.isfinite(ledger.total)


def test_a_ledger_unfolds_nested_sequences():
    flow = Flow(StandardNormal(2), [Sequential([Affine(2), Rotation(2)]), Inverse(Affine(2))])
    names = ["0.0.Affine", "0.1.Rotation", "1.Inverse(Affine)", "base.StandardNormal"]
    assert [row.layer for row in flow.ledger(torch.randn(3, 2))] == names
    nested = Flow(StandardNormal(2), Sequential([Affine(2)]))
    assert [row.layer for row in nested.ledger(torch.randn(3, 2))] == ["0.Affine", names[-1]]


# Bounds -----------------------------------------------------------------------------------------


def test_a_flow_knows_whether_its_number_is_a_bound():
    assert bound_flow().lower_bound
    assert Flow(StandardNormal(2), Inverse(AbsInference(2))).lower_bound
    for flow in (coupling_flow(), abs_flow(), Flow(StandardNormal(2))):
        assert not flow.lower_bound
    assert not Flow(StandardNormal(2), Inverse(AbsGenerative(2))).lower_bound


def test_the_bounds_of_a_flow():
    flow = bound_flow()
    x = torch.rand(16, 2) * 2
    with torch.no_grad():
        truth = true_log_prob(flow, x)
        bound = elbo(flow, x, num_samples=4000)
        assert (bound < truth - 0.01).all()
        gaps = []
        for k in (1, 10, 100, 4000):
            estimate = torch.stack([iwbo(flow, x, num_samples=k) for _ in range(max(1, 4000 // k))])
            gaps.append((truth - estimate.mean(0)).mean().item())
        torch.testing.assert_close(iwbo(flow, x, num_samples=4000), truth, atol=0.12, rtol=0)
    # K = 1 is the ELBO; the gap closes as K grows, like 1/K
    assert gaps[0] == pytest.approx((truth - bound).mean().item(), abs=0.03)
    assert gaps[0] > 5 * gaps[1] > 0
    assert max(abs(gaps[2]), abs(gaps[3])) < 0.01


def test_the_density_of_a_bound_flow_integrates_to_one():
    flow = bound_flow()
    x, area = grid(0.0, 9.0, 300)
    with torch.no_grad():
        assert true_log_prob(flow, x).exp().sum().item() * area == pytest.approx(1, abs=5e-3)
        # and exp of one draw of the bound is unbiased for it
        assert flow.log_prob(x).exp().sum().item() * area == pytest.approx(1, abs=0.02)


def test_the_bound_is_tight_with_the_true_posterior():
    # z symmetric: the posterior of the sign is 1/2, and every draw gives log p(x) itself
    flow = Flow(StandardNormal(2), AbsGenerative(2))
    x = torch.rand(10, 2)
    expected = HalfNormal(2).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected)
    torch.testing.assert_close(iwbo(flow, x, num_samples=3), expected)


def test_maximising_the_bound_closes_the_gap():
    flow = bound_flow(MLP(2, 2, [32], "tanh"))
    x = torch.rand(128, 2) * 2

    def gap() -> float:
        with torch.no_grad():
            return (true_log_prob(flow, x) - elbo(flow, x, num_samples=200)).mean().item()

    # the sign is discrete: its posterior is fitted on the enumerated bound
    fold, rest = flow.transforms[0].transform, Flow(flow.base, list(flow.transforms)[1:])
    signs = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))
    optimizer = torch.optim.Adam(fold.parameters(), lr=0.02)
    before = gap()
    for _ in range(150):
        log_q = torch.stack([fold(x * s)[1] for s in signs])
        log_p = torch.stack([rest.log_prob(x * s) for s in signs]).detach()
        loss = -(log_q.exp() * (log_p - log_q)).sum(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gap() < 0.25 * before


def test_objectives_of_an_exact_flow_are_its_likelihood():
    flow = coupling_flow()
    x = torch.randn(5, 2)
    for value in (elbo(flow, x), elbo(flow, x, num_samples=7), iwbo(flow, x, num_samples=7)):
        assert torch.equal(value, flow.log_prob(x))


def test_objectives_with_a_context():
    net = MLP(2, 2, [8], context_features=1)
    flow = bound_flow(net)
    x, context = torch.rand(4, 2), torch.randn(4, 1)
    many = elbo(flow, x, context, num_samples=3000)
    torch.manual_seed(1)
    tiled = torch.stack([flow.log_prob(x, context) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(many, tiled, atol=0.1, rtol=0)
    assert iwbo(flow, x, context, num_samples=5).shape == (4,)


@pytest.mark.parametrize("objective", [elbo, iwbo])
def test_objectives_need_a_draw(objective):
    with pytest.raises(ValueError, match="num_samples >= 1, got 0"):
        objective(bound_flow(), torch.rand(2, 2), num_samples=0)


def test_bits_per_dim():
    # 8 bits a dimension: the uniform mass of 256 values
    nats = torch.tensor([-3 * math.log(256), 0.0])
    torch.testing.assert_close(bits_per_dim(nats, 3), torch.tensor([8.0, 0.0]))
    with pytest.raises(ValueError, match="num_dims >= 1, got 0"):
        bits_per_dim(nats, 0)


# Sampling, encoding, conditioning ---------------------------------------------------------------


def test_encode_and_decode():
    flow = coupling_flow()
    x = torch.randn(20, 2)
    z = flow.encode(x)
    torch.testing.assert_close(flow.decode(z), x, atol=1e-9, rtol=0)
    torch.testing.assert_close(flow.encode(flow.decode(z)), z, atol=1e-9, rtol=0)
    fold = abs_flow()
    z = fold.encode(x)
    torch.testing.assert_close(fold.encode(fold.decode(z)), z, atol=1e-9, rtol=0)
    unfold = bound_flow()
    torch.testing.assert_close(unfold.decode(unfold.encode(x.abs())), x.abs(), atol=1e-9, rtol=0)


def test_sampling():
    flow = coupling_flow()
    assert flow.sample(7).shape == (7, 2)
    torch.manual_seed(3)
    a = flow.sample(4)
    torch.manual_seed(3)
    torch.testing.assert_close(a, flow.decode(StandardNormal(2).sample(4)))
    assert (bound_flow().sample(100) >= 0).all()
    cold = Flow(StandardNormal(1), Affine(1, scale=0.5)).sample(50_000, temperature=0.5)
    assert cold.std().item() == pytest.approx(1.0, rel=0.02)
    with pytest.raises(ValueError, match="expected n or a context"):
        flow.sample()


def test_conditional_flows():
    flow = coupling_flow(context_features=3)
    assert flow.conditional
    x, context = torch.randn(6, 2), torch.randn(6, 3)
    together = flow.log_prob(x, context)
    for i in range(6):
        alone = flow.log_prob(x[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1])
    torch.testing.assert_close(flow.decode(flow.encode(x, context), context), x)
    assert flow.sample(context=context).shape == (6, 2)
    assert flow.sample(5, context[:1]).shape == (5, 2)
    assert flow.ledger(x, context).total == pytest.approx(together.mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match=r"AffineCoupling\.forward: expected a context with 3"):
        flow.log_prob(x)


def test_a_conditional_base():
    flow = Flow(DiagonalNormal(2, net=MLP(1, 4, [8])), Affine(2, scale=2.0))
    assert flow.conditional
    x, context = torch.randn(6, 2), torch.randn(6, 1)
    expected = flow.base.log_prob(2 * x, context) + 2 * math.log(2)
    torch.testing.assert_close(flow.log_prob(x, context), expected)
    assert flow.sample(3, context[:1]).shape == (3, 2)
    assert flow.sample(context=context).shape == (6, 2)


@pytest.mark.parametrize("method", ["log_prob", "encode", "decode", "ledger"])
def test_a_context_that_nothing_reads_is_a_mistake(method):
    flow, x = abs_flow(), torch.rand(3, 2)
    with pytest.raises(ValueError, match="no layer of this flow takes one"):
        getattr(flow, method)(x, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="no layer of this flow takes one"):
        flow.sample(3, torch.zeros(3, 1))


def test_a_flow_takes_transforms_and_a_distribution():
    with pytest.raises(TypeError, match="base must be a Distribution, got Affine"):
        Flow(Affine(2), [Affine(2)])
    with pytest.raises(TypeError, match="layer 0 must be a Transform, got StandardNormal"):
        Flow(StandardNormal(2), [StandardNormal(2)])


def test_a_wrong_input_is_named_at_its_layer():
    flow = coupling_flow()
    with pytest.raises(ValueError, match="expected a floating-point tensor"):
        flow.log_prob(torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"Rotation\.forward: expected shape \(batch, 2\)"):
        Flow(StandardNormal(3), [Permute([0, 2, 1]), Rotation(2)]).log_prob(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"Logit\.forward: expected values in \(0, 1\)"):
        Flow(StandardNormal(1), [Affine(1), Logit()]).log_prob(torch.tensor([[1.5]]))
    with pytest.raises(ValueError, match=r"StandardNormal\.log_prob: expected shape"):
        Flow(StandardNormal(3), [Affine(2)]).log_prob(torch.ones(1, 2))


def test_gradients_reach_the_whole_flow():
    flow = coupling_flow()
    (-flow.log_prob(torch.randn(64, 2)).mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())


def test_a_flow_comes_back_from_its_state_dict():
    make = [coupling_flow, lambda: Flow(Uniform(2), [ActNorm(2), Inverse(Logit())])]
    for build in make:
        flow, x = build(), torch.randn(20, 2)
        flow.log_prob(x)
        other = build()
        other.load_state_dict(flow.state_dict())
        assert torch.equal(other.log_prob(x), flow.log_prob(x))


# What is not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "expected"),
    [(0, "0.AffineCoupling (ldj)"), (2, "2.RationalQuadraticSplineCoupling (ldj)")],
)
def test_first_non_finite_names_the_layer(index, expected):
    flow, x = coupling_flow(), torch.randn(5, 2)
    assert flow.first_non_finite(x) is None
    with torch.no_grad():
        next(flow.transforms[index].parameters()).fill_(math.nan)
    assert flow.first_non_finite(x) == expected
    assert not flow.ledger(x)[index].finite


def test_first_non_finite_elsewhere():
    flow, x = coupling_flow(), torch.randn(5, 2)
    assert flow.first_non_finite(x / 0) == "the data"
    with torch.no_grad():
        flow.transforms[1].values.fill_(math.nan)
    assert flow.first_non_finite(x) == "1.Rotation (output)"
    base = Flow(DiagonalNormal(2, learn=True), Affine(2))
    with torch.no_grad():
        base.base.loc.fill_(math.nan)
    assert base.first_non_finite(x) == "base.DiagonalNormal (ldj)"
    support = Flow(HalfNormal(2), Affine(2))  # a density of zero is not finite either
    assert support.first_non_finite(-x.abs()) == "base.HalfNormal (ldj)"


def test_first_non_finite_sees_a_layer_before_one_that_would_refuse_its_output():
    flow = Flow(StandardNormal(2), [Affine(2, learn=True), Softplus(), SoftplusInverse()])
    with torch.no_grad():
        flow.transforms[0].shift.fill_(math.nan)
    assert flow.first_non_finite(torch.randn(3, 2)) == "0.Affine (output)"


# Estimated log-determinants


def test_an_estimate_is_called_one():
    def residual(trace):
        return Residual(LipschitzMLP(2, 2, [8]), trace=trace, event_shape=(2,))

    exact = Flow(StandardNormal(2), [residual("exact")])
    rough = Flow(StandardNormal(2), [Affine(2), residual("russian_roulette")])
    x = torch.randn(20, 2)
    assert not exact.estimated
    assert rough.estimated
    assert Inverse(residual("power_series")).estimated
    assert "exact" in str(exact.ledger(x)).splitlines()[-1]
    lines = str(rough.ledger(x)).splitlines()
    assert "exact" in lines[1]  # the affine layer
    assert "estimate" in lines[2]
    assert "estimate" in lines[-1]
    merged = Ledger.merge([rough.ledger(x), rough.ledger(x)])
    assert [row.number for row in merged] == ["exact", "estimate", "exact"]


def test_iwbo_refuses_estimates():
    layer = Residual(LipschitzMLP(2, 2, [8]), trace="power_series", event_shape=(2,))
    flow = Flow(StandardNormal(3), [layer, Augment(StandardNormal(1), keep=2)])
    x = torch.randn(4, 2)
    assert iwbo(flow, x, num_samples=1).shape == (4,)
    with pytest.raises(ValueError, match="iwbo: expected exact contributions"):
        iwbo(flow, x, num_samples=2)


def test_a_distribution_takes_its_shape_from_the_first_layer_that_has_one():
    layers = [Logit(), Sequential([SoftplusInverse(), Slice(StandardNormal((2,)), keep=1)])]
    q = FlowDistribution(Flow(StandardNormal((1,)), layers))
    assert q.event_shape == (3,)
    assert q.sample(4).shape == (4, 3)
    assert FlowDistribution(Flow(StandardNormal((5,)), [Softplus()])).event_shape == (5,)
    with pytest.raises(ValueError, match="give event_shape"):
        FlowDistribution(Flow(StandardNormal((4, 2, 2)), [Logit(), Squeeze(2)]))
