"""Distributions: densities against torch and scipy, samples against densities."""

import math

import pytest
import torch
from scipy import stats
from torch import distributions as td
from torch import nn

from surflow.distributions import (
    Bernoulli,
    Categorical,
    DiagonalNormal,
    DiagonalNormalMixture,
    HalfNormal,
    Logistic,
    Mixture,
    StandardNormal,
    Uniform,
)
from surflow.distributions.base import draw_index
from surflow.nets import MLP

pytestmark = pytest.mark.usefixtures("double")

LOC = [0.5, -1.0, 2.0]
SCALE = [0.3, 1.0, 2.5]
X = torch.linspace(-4, 4, 33, dtype=torch.float64).unsqueeze(1) + torch.tensor(LOC).double()


def test_a_drawn_index_is_that_of_multinomial():
    p = torch.rand(1000, 5).softmax(-1)
    torch.manual_seed(1)
    expected = torch.multinomial(p, 1)
    torch.manual_seed(1)
    assert torch.equal(draw_index(p), expected)


class Table(nn.Module):
    """A net whose output is its weight, whatever the context."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, context):
        return self.values.expand(len(context), -1)


# Densities --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "reference"),
    [
        (DiagonalNormal, lambda m, s: stats.norm(m, s)),
        (HalfNormal, lambda m, s: stats.halfnorm(m, s)),
        (Logistic, lambda m, s: stats.logistic(m, s)),
    ],
)
def test_location_scale_density(cls, reference):
    expected = sum(
        torch.from_numpy(reference(m, s).logpdf(X[:, i].numpy()))
        for i, (m, s) in enumerate(zip(LOC, SCALE, strict=True))
    )
    torch.testing.assert_close(cls((3,), LOC, SCALE).log_prob(X), expected)
    # the same numbers out of a net: locations and log-scales alternate
    flat = [v for m, s in zip(LOC, SCALE, strict=True) for v in (m, math.log(s))]
    conditional = cls((3,), net=Table(*flat))
    assert conditional.conditional
    torch.testing.assert_close(conditional.log_prob(X, torch.zeros(len(X), 1)), expected)


def test_standard_normal_density():
    x = torch.randn(5, 2, 3)
    expected = td.Normal(0.0, 1.0).log_prob(x).sum((1, 2))
    torch.testing.assert_close(StandardNormal((2, 3)).log_prob(x), expected)
    assert list(StandardNormal((2, 3)).parameters()) == []


def test_half_normal_is_nothing_below_its_edge():
    log_prob = HalfNormal((1,), loc=1.0).log_prob(torch.tensor([[0.99], [1.0], [2.0]]))
    assert log_prob[0] == -math.inf
    torch.testing.assert_close(log_prob[1:], torch.from_numpy(stats.halfnorm(1).logpdf([1.0, 2.0])))


def test_uniform_density():
    uniform = Uniform((2,), [-1.0, 0.0], [1.0, 5.0])
    x = torch.tensor([[0.0, 2.0], [-1.0, 5.0], [1.5, 2.0], [0.0, -0.1]])
    expected = torch.tensor([-math.log(10), -math.log(10), -math.inf, -math.inf])
    torch.testing.assert_close(uniform.log_prob(x), expected)


def test_uniform_density_of_other_dtypes_is_float32_or_better():
    uniform = Uniform((2,), 0.0, 10.0).float()
    for dtype in (torch.int64, torch.bfloat16, torch.float32):
        log_prob = uniform.log_prob(torch.ones(2, 2, dtype=dtype))
        assert log_prob.dtype == torch.float32
        torch.testing.assert_close(log_prob, torch.full((2,), -math.log(100), dtype=torch.float32))


def test_categorical_density():
    logits = torch.randn(2, 4)
    x = torch.randint(4, (6, 2))
    expected = td.Categorical(logits=logits).log_prob(x).sum(1)
    torch.testing.assert_close(Categorical((2,), 4, logits).log_prob(x), expected)
    conditional = Categorical((2,), 4, net=Table(*logits.flatten().tolist()))
    torch.testing.assert_close(conditional.log_prob(x, torch.zeros(6, 1)), expected)
    shared = Categorical((2,), 4, logits[0])
    expected = td.Categorical(logits=logits[0]).log_prob(x).sum(1)
    torch.testing.assert_close(shared.log_prob(x), expected)


def test_bernoulli_density():
    p = torch.tensor([0.1, 0.5, 0.8])
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    expected = td.Bernoulli(p).log_prob(x).sum(1)
    torch.testing.assert_close(Bernoulli((3,), p).log_prob(x), expected)
    torch.testing.assert_close(Bernoulli((3,), p).log_prob(x.long()), expected)
    conditional = Bernoulli((3,), net=Table(*torch.logit(p).tolist()))
    torch.testing.assert_close(conditional.log_prob(x, torch.zeros(2, 1)), expected)
    grey = Bernoulli((1,), 0.3).log_prob(torch.tensor([[0.25]]))
    expected = torch.tensor([0.25 * math.log(0.3) + 0.75 * math.log(0.7)])
    torch.testing.assert_close(grey, expected)


def test_mixture_density():
    mixture = Mixture([DiagonalNormal((1,), -2.0, 0.5), Logistic((1,), 1.0, 0.7)], [1.0, 3.0])
    x = torch.linspace(-6, 8, 50).unsqueeze(1)
    density = 0.25 * stats.norm(-2, 0.5).pdf(x) + 0.75 * stats.logistic(1, 0.7).pdf(x)
    torch.testing.assert_close(mixture.log_prob(x).exp(), torch.from_numpy(density).squeeze(1))


def test_diagonal_normal_mixture_density():
    mixture = DiagonalNormalMixture((2,), 3, spread=2.0)
    nn.init.normal_(mixture.logits)
    nn.init.normal_(mixture.log_scale, std=0.3)
    reference = td.MixtureSameFamily(
        td.Categorical(logits=mixture.logits),
        td.Independent(td.Normal(mixture.loc, mixture.log_scale.exp()), 1),
    )
    x = 2 * torch.randn(20, 2)
    torch.testing.assert_close(mixture.log_prob(x), reference.log_prob(x))


def test_conditional_diagonal_normal_mixture_averages_the_weight_logits():
    # per element: 2 weight logits, 2 locations, 2 log-scales
    net = Table(0.0, 1.0, -1.0, 2.0, 0.0, 0.1, 2.0, 1.0, 0.5, -0.5, 0.2, 0.0)
    mixture = DiagonalNormalMixture((2,), 2, net=net)
    reference = td.MixtureSameFamily(
        td.Categorical(logits=torch.tensor([1.0, 1.0])),
        td.Independent(
            td.Normal(
                torch.tensor([[-1.0, 0.5], [2.0, -0.5]]),
                torch.tensor([[0.0, 0.2], [0.1, 0.0]]).exp(),
            ),
            1,
        ),
    )
    x = torch.randn(7, 2)
    torch.testing.assert_close(mixture.log_prob(x, torch.zeros(7, 1)), reference.log_prob(x))


@pytest.mark.parametrize(
    "mixture",
    [
        lambda: Mixture([HalfNormal((2,), -1.0), Uniform((2,), -2.0, 1.0)], [2.0, 1.0]),
        lambda: Mixture([StandardNormal((2,)), DiagonalNormal((2,), 1.0, 0.4)], learn=True),
        lambda: DiagonalNormalMixture((2,), 4),
    ],
)
def test_mixtures_integrate_to_one(mixture):
    axis = (torch.arange(1200) + 0.5) * 0.01 - 6
    log_prob = mixture().log_prob(torch.cartesian_prod(axis, axis))
    assert log_prob.exp().sum().item() * 1e-4 == pytest.approx(1, abs=2e-4)


def test_discrete_masses_sum_to_one():
    mixture = Mixture([Categorical((2,), 3), Categorical((2,), 3, [0.0, 2.0, -1.0])])
    assert mixture.discrete
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    assert mixture.log_prob(x).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_densities_are_float32_where_the_net_is_half():
    x = torch.randn(4, 2, dtype=torch.float32)
    context = torch.randn(4, 1, dtype=torch.bfloat16)
    for distribution in (
        DiagonalNormal((2,), net=MLP(1, 4, [3])),
        Logistic((2,), net=MLP(1, 4, [3])),
        DiagonalNormalMixture((2,), 2, net=MLP(1, 12, [3])),
        Bernoulli((2,), net=MLP(1, 2, [3])),
    ):
        distribution.to(torch.bfloat16)
        value = x.sigmoid() if isinstance(distribution, Bernoulli) else x
        assert distribution.log_prob(value, context).dtype == torch.float32
        assert distribution.log_prob(value.bfloat16(), context).dtype == torch.float32


# Samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [
        (lambda: DiagonalNormal((1,), 1.0, 2.0), stats.norm(1, 2).cdf),
        (lambda: DiagonalNormal((1,), net=Table(1.0, math.log(2.0))), stats.norm(1, 2).cdf),
        (lambda: StandardNormal((1,)), stats.norm.cdf),
        (lambda: HalfNormal((1,), 0.5, 1.5), stats.halfnorm(0.5, 1.5).cdf),
        (lambda: Logistic((1,), -1.0, 0.7), stats.logistic(-1, 0.7).cdf),
        (lambda: Uniform((1,), -1.0, 3.0), stats.uniform(-1, 4).cdf),
        (
            lambda: Mixture([DiagonalNormal((1,), -2.0), DiagonalNormal((1,), 2.0)], [1.0, 3.0]),
            lambda x: 0.25 * stats.norm.cdf(x + 2) + 0.75 * stats.norm.cdf(x - 2),
        ),
        (
            lambda: DiagonalNormalMixture((1,), 2, net=Table(0.0, math.log(3), -2.0, 2.0, 0, 0)),
            lambda x: 0.25 * stats.norm.cdf(x + 2) + 0.75 * stats.norm.cdf(x - 2),
        ),
    ],
)
def test_samples_follow_the_density(distribution, cdf):
    distribution = distribution()
    context = torch.zeros(1, 1) if distribution.conditional else None
    x = distribution.sample(20_000, context)
    assert x.shape == (20_000, 1)
    assert stats.kstest(x[:, 0].detach().numpy(), cdf).pvalue > 0.01


def test_samples_of_an_event_are_independent():
    x = DiagonalNormal((2, 2), [[0.0, 1.0], [2.0, 3.0]], 0.5).sample(50_000)
    torch.testing.assert_close(x.mean(0), torch.tensor([[0.0, 1], [2, 3]]), atol=0.01, rtol=0)
    covariance = torch.cov(x.flatten(1).T)
    torch.testing.assert_close(covariance, 0.25 * torch.eye(4), atol=0.006, rtol=0)


def test_discrete_samples_have_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0]])
    x = Categorical((2,), 3, logits).sample(40_000)
    assert x.dtype == torch.int64 and x.shape == (40_000, 2)
    share = torch.stack([(x == k).double().mean(0) for k in range(3)], 1)
    torch.testing.assert_close(share, logits.softmax(1), atol=0.01, rtol=0)
    p = torch.tensor([0.1, 0.7])
    y = Bernoulli((2,), p).sample(40_000)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(y.mean(0), p, atol=0.01, rtol=0)


def test_samples_of_a_conditional_follow_their_own_row():
    distribution = DiagonalNormal((1,), net=MLP(1, 2, [4], "tanh"))
    context = torch.tensor([[-2.0], [3.0]])
    loc, log_scale = distribution.parameters_of(context)
    x = distribution.sample(context=context.repeat_interleave(20_000, 0)).view(2, 20_000)
    torch.testing.assert_close(x.mean(1), loc[:, 0], atol=0.05, rtol=0)
    torch.testing.assert_close(x.std(1), log_scale.exp()[:, 0], atol=0.03, rtol=0)


def test_one_context_serves_many_draws():
    distribution = DiagonalNormal((2,), net=MLP(3, 4, [4]))
    context = torch.randn(1, 3)
    assert distribution.sample(5, context).shape == (5, 2)
    x, log_prob = distribution.sample_and_log_prob(5, context)
    torch.testing.assert_close(log_prob, distribution.log_prob(x, context.expand(5, 3)))
    assert distribution.sample(context=torch.randn(4, 3)).shape == (4, 2)


@pytest.mark.parametrize(
    ("distribution", "standard_deviation"),
    [
        (lambda: DiagonalNormal((1,), 5.0, 2.0), 2.0),
        (lambda: Logistic((1,), 5.0, 1.0), math.pi / math.sqrt(3)),
        (lambda: DiagonalNormalMixture((1,), 1, spread=0.0), 1.0),
        (lambda: Mixture([StandardNormal((1,))]), 1.0),
    ],
)
def test_temperature_multiplies_the_scale(distribution, standard_deviation):
    x = distribution().sample(50_000, temperature=0.5)
    assert x.std().item() == pytest.approx(0.5 * standard_deviation, rel=0.02)


def test_temperature_divides_logits():
    x = Categorical((1,), 2, [0.0, 1.0]).sample(50_000, temperature=0.5)
    assert x.double().mean().item() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.01)
    y = Bernoulli((1,), 0.8).sample(50_000, temperature=2.0)
    assert y.mean().item() == pytest.approx(1 / (1 + math.exp(-math.log(4) / 2)), abs=0.01)


@pytest.mark.parametrize(
    "distribution",
    [
        StandardNormal((2,)),
        Uniform((2,)),
        Bernoulli((2,)),
        Categorical((2,), 3),
        DiagonalNormalMixture((2,), 2),
        Mixture([StandardNormal((2,)), Uniform((2,))]),
    ],
    ids=lambda d: type(d).__name__,
)
def test_no_draws(distribution):
    assert distribution.sample(0).shape == (0, 2)


# Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DiagonalNormal, Logistic, HalfNormal])
def test_reparametrised_samples_carry_gradients(cls):
    distribution = cls((1,), 1.0, 2.0, learn=True)
    x = distribution.sample(50_000)
    x.mean().backward()
    # x = loc + exp(log_scale) eps: dE[x]/dloc = 1, dE[x]/dlog_scale = E[x] - loc
    assert distribution.loc.grad.item() == pytest.approx(1)
    expected = (x.mean() - distribution.loc).item()
    assert distribution.log_scale.grad.item() == pytest.approx(expected)


def test_the_mean_score_is_zero():
    for distribution in (
        DiagonalNormal((2,), 0.5, 1.5, learn=True),
        Logistic((2,), 0.5, 1.5, learn=True),
        DiagonalNormalMixture((2,), 3),
    ):
        with torch.no_grad():
            x = distribution.sample(100_000)
        distribution.log_prob(x).mean().backward()
        for parameter in distribution.parameters():
            assert parameter.grad.abs().max().item() < 0.02


@pytest.mark.parametrize(
    "make",
    [
        lambda: Categorical((2,), 3, learn=True),
        lambda: Bernoulli((2,), 0.3, learn=True),
        lambda: Mixture([StandardNormal((2,)), DiagonalNormal((2,), 1.0)], learn=True),
    ],
)
def test_learned_logits_get_a_gradient(make):
    distribution = make()
    x = torch.tensor([[0, 1], [1, 1]])
    distribution.log_prob(x).sum().backward()
    assert distribution.logits.grad.abs().sum() > 0


# Mistakes of a user -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: DiagonalNormal((0,)), "positive sizes for an event shape, got (0,)"),
        (lambda: DiagonalNormal(()), "positive sizes for an event shape, got ()"),
        (lambda: DiagonalNormal((2,), scale=[1.0, 0.0]), "DiagonalNormal: expected scale > 0"),
        (lambda: Logistic((2,), scale=float("nan")), "Logistic: expected scale > 0"),
        (lambda: HalfNormal((2,), loc=[1.0, 2.0, 3.0]), "must broadcast to the event (2,)"),
        (lambda: DiagonalNormal((2,), parameter_shape=(3,)), "must broadcast to the event (2,)"),
        (lambda: Uniform((2,), 1.0, 1.0), "Uniform: expected low < high"),
        (lambda: Uniform((2,), [0.0, 0.0, 0.0]), "Uniform: low: expected a shape that broadcasts"),
        (lambda: Uniform((2,)).sample(3, temperature=0.5), "Uniform.sample: expected temperature"),
        (lambda: Bernoulli((2,), 1.0), "Bernoulli: expected 0 < probability < 1"),
        (lambda: Bernoulli((2,), [0.1] * 3), "Bernoulli: probability: expected a shape"),
        (
            lambda: Bernoulli((1,)).log_prob(torch.tensor([[2.0]])),
            "Bernoulli.log_prob: expected values in [0, 1], got 1 values outside it, from 2 to 2",
        ),
        (lambda: Categorical((2,), 0), "expected num_classes >= 1, got 0"),
        (lambda: Categorical((2,), 3, [0.0, 1.0]), "expected logits over 3 classes"),
        (lambda: Categorical((2,), 3, torch.zeros(5, 3)), "broadcasts to (2, 3), got (5, 3)"),
        (
            lambda: Categorical((1,), 3).log_prob(torch.tensor([[3]])),
            "Categorical.log_prob: expected classes 0 to 2, got 1 values outside it",
        ),
        (
            lambda: Categorical((1,), 3).log_prob(torch.tensor([[1.0]])),
            "expected an integer tensor, got torch.float64",
        ),
        (lambda: Mixture([]), "expected components with one event shape"),
        (
            lambda: Mixture([StandardNormal((1,)), StandardNormal((2,))]),
            "expected components with one event shape, got [(1,), (2,)]",
        ),
        (lambda: Mixture([StandardNormal((1,))], [0.0]), "expected 1 positive weights"),
        (lambda: Mixture([StandardNormal((1,))], [0.5, 0.5]), "expected 1 positive weights"),
        (lambda: DiagonalNormalMixture((1,), 0), "expected num_components >= 1"),
        (
            lambda: StandardNormal((2,)).log_prob(torch.zeros(5, 3)),
            "StandardNormal.log_prob: expected shape (batch, 2), got (5, 3)",
        ),
        (lambda: StandardNormal((2,)).sample(), "expected n or a context"),
        (lambda: StandardNormal((2,)).sample(-1), "expected n >= 0, got -1"),
        (lambda: StandardNormal((2,)).sample(1, temperature=0.0), "expected temperature > 0"),
        (
            lambda: DiagonalNormal((1,), net=MLP(1, 2, [2])).log_prob(torch.zeros(2, 1)),
            "DiagonalNormal.log_prob: expected a context, got none",
        ),
        (
            lambda: DiagonalNormal((1,), net=MLP(1, 2, [2])).log_prob(
                torch.zeros(4, 1), torch.zeros(3, 1)
            ),
            "expected a context of 4 rows, got shape (3, 1)",
        ),
        (
            lambda: DiagonalNormal((1,), net=MLP(1, 3, [2])).sample(context=torch.zeros(2, 1)),
            "expected the net to give shape (batch, 2), got (2, 3)",
        ),
        (
            lambda: Mixture([DiagonalNormal((1,), net=MLP(1, 2, [2]))]).sample(3),
            "Mixture.sample: expected a context, got none",
        ),
    ],
)
def test_a_mistake_is_explained(action, message):
    with pytest.raises(ValueError) as error:
        action()
    assert message in str(error.value)
