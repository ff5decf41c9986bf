"""Choices among bijections and folded intervals: against sums by hand; and what they refuse."""

import math

import pytest
import torch

from surflow.distributions import Categorical, DiagonalNormal, StandardNormal, Uniform
from surflow.flow import Flow
from surflow.nets import MLP
from surflow.objectives import elbo, iwbo
from surflow.proofs import double_precision
from surflow.transforms import (
    AbsInference,
    Affine,
    AffineCoupling,
    DiscretelyIndexed,
    IntervalFold,
)


@pytest.fixture(autouse=True)
def float64():
    with double_precision():
        torch.manual_seed(0)
        yield


def two_normals(encoder: Categorical) -> Flow:
    """0.25 N(-1, 1) + 0.75 N(2, 0.5²), as a choice of affine maps over a normal."""
    gate = Categorical(1, 2, [math.log(0.25), math.log(0.75)])
    return Flow(
        StandardNormal(1),
        DiscretelyIndexed([Affine(1, 1.0), Affine(1, -4.0, 2.0)], gate, encoder),
    )


def mixture(x: torch.Tensor) -> torch.Tensor:
    parts = [
        math.log(w) + DiagonalNormal(1, m, s).log_prob(x)
        for w, m, s in ((0.25, -1.0, 1.0), (0.75, 2.0, 0.5))
    ]
    return torch.stack(parts)


def test_a_choice_of_affine_maps_is_a_mixture():
    flow = two_normals(Categorical(1, 2))
    x = torch.linspace(-3, 4, 41).view(-1, 1)
    parts = mixture(x)
    # for each component the weight that the layer gives, times q, is that component's density
    mean_weight = iwbo(flow, x, num_samples=20_000)
    assert (mean_weight.exp() - parts.logsumexp(0).exp()).abs().max() < 0.01
    # the ELBO under a uniform q is the mean of the two, plus log 2
    expected = parts.mean(0) + math.log(2)
    found = elbo(flow, x, num_samples=20_000)
    assert ((found - expected).abs() / (1 + expected.abs())).max() < 0.05


def test_the_exact_posterior_makes_the_bound_tight():
    class Posterior(torch.nn.Module):
        def forward(self, x):
            return mixture(x).T

    flow = two_normals(Categorical(1, 2, net=Posterior()))
    x = torch.linspace(-3, 4, 41).view(-1, 1)
    # every draw, not the mean alone, is the likelihood
    assert (flow.log_prob(x) - mixture(x).logsumexp(0)).abs().max() < 1e-12


def test_generation_has_the_gates_frequencies():
    flow = two_normals(Categorical(1, 2))
    x = flow.sample(100_000)
    assert x.mean().item() == pytest.approx(0.25 * -1 + 0.75 * 2, abs=0.02)
    second = 0.25 * (1 + 1) + 0.75 * (0.25 + 4)
    assert x.square().mean().item() == pytest.approx(second, abs=0.05)


@pytest.mark.parametrize("zigzag", [True, False])
def test_folded_intervals_by_hand(zigzag):
    fold = IntervalFold(1, 0, 4, -2.0, 2.0, learn=True, zigzag=zigzag)
    with torch.no_grad():
        fold.logits.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    x = torch.tensor([[-1.75], [-0.75], [0.25], [1.25], [-2.0], [2.0]])
    z, ldj = fold(x)
    second = 0.75 if zigzag else 0.25
    last = 0.0 if zigzag else 1.0
    expected = [0.25, second, 0.25, second, 0.0, last]
    assert torch.allclose(z.squeeze(1), torch.tensor(expected))
    assert torch.allclose(ldj.exp(), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.1, 0.4]))


def test_two_turned_intervals_are_an_absolute_value():
    fold, absolute = IntervalFold(2, 1, 2, -3.0, 3.0), AbsInference(2, element=1)
    x = 6 * torch.rand(100, 2) - 3
    z, ldj = fold(x)
    other, theirs = absolute(x)
    assert torch.allclose(1 - z[:, 1], other[:, 1] / 3)  # |x| falls, then rises
    assert torch.equal(z[:, 0], other[:, 0])
    assert torch.allclose(ldj, theirs - math.log(3))


def test_folded_likelihood_is_a_density_whose_samples_follow_it():
    fold = IntervalFold(1, 0, 3, 0.0, 3.0, learn_edges=True, net=MLP(1, 3, [8], "tanh"))
    with torch.no_grad():
        fold.widths.copy_(torch.tensor([0.4, -0.3, 0.1]))
    flow = Flow(Uniform(1), fold)
    x = (torch.arange(30_000) + 0.5).view(-1, 1) / 10_000
    density = flow.log_prob(x).exp()
    assert density.mean().item() * 3 == pytest.approx(1.0, abs=1e-4)
    counts = torch.histc(flow.sample(200_000), 30, 0.0, 3.0) / 200_000
    expected = density.view(30, -1).mean(1) * 0.1
    assert (counts - expected).abs().max() < 5 * (expected.max() / 200_000).sqrt()


def test_unfolded_values_stay_inside_in_float32():
    fold = IntervalFold(1, 0, 5, -1.3, 2.7, learn_edges=True)
    for seed in range(5):
        torch.manual_seed(seed)
        torch.nn.init.normal_(fold.widths)
        z = torch.cat([torch.zeros(200, 1), torch.ones(200, 1)]).float()
        single = fold.float()
        single(single.inverse(z))  # refuses what lies outside


def test_an_empty_batch():
    fold = IntervalFold(1, 0, 3, 0.0, 1.0)
    assert fold.inverse(torch.zeros(0, 1)).shape == (0, 1)
    assert Categorical((2,), 3).sample(0).shape == (0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscretelyIndexed([Affine(1)], None, None), "two transforms or more, got 1"),
        (
            lambda: DiscretelyIndexed(
                [Affine(2), AbsInference(2)], Categorical(1, 2), Categorical(1, 2)
            ),
            "expected bijections that read no context, got AbsInference",
        ),
        (
            lambda: DiscretelyIndexed(
                [Affine(2), AffineCoupling(MLP(1, 2, [4], context_features=1))],
                Categorical(1, 2),
                Categorical(1, 2),
            ),
            "read no context, got AffineCoupling",
        ),
        (
            lambda: DiscretelyIndexed([Affine(1)] * 3, Categorical(1, 2), Categorical(1, 3)),
            r"as gate a Categorical of event shape \(1,\) over 3 classes",
        ),
        (
            lambda: DiscretelyIndexed([Affine(1)] * 2, Categorical(1, 2), StandardNormal(1)),
            "as encoder a Categorical",
        ),
        (lambda: IntervalFold(2, 2, 2, 0.0, 1.0), "element in 0 to 1, got 2"),
        (lambda: IntervalFold(2, 0, 1, 0.0, 1.0), "num_intervals >= 2, got 1"),
        (lambda: IntervalFold(2, 0, 2, 1.0, 1.0), "low < high, got 1.0 and 1.0"),
        (lambda: IntervalFold((2, 2), 0, 2, 0.0, 1.0), "an event of one dimension"),
        (
            lambda: IntervalFold(2, 0, 2, 0.0, 1.0)(torch.tensor([[1.5, 0.0]])),
            r"IntervalFold.forward: expected coordinate 0 in \[0, 1\], got 1 values",
        ),
        (
            lambda: IntervalFold(2, 0, 2, 0.0, 4.0).inverse(torch.tensor([[-0.5, 0.0]])),
            r"IntervalFold.inverse: expected coordinate 0 in \[0, 1\], got 1 values",
        ),
        (
            lambda: IntervalFold(2, 0, 2, 0.0, 4.0, net=MLP(2, 3, [4]))(torch.ones(1, 2)),
            r"expected the net to give shape \(1, 2\), got \(1, 3\)",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
