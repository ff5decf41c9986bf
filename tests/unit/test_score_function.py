"""The gradient of a bound through discrete draws, against enumeration."""

import itertools
import math

import pytest
import torch

from surflow.distributions import (
    Categorical,
    DiagonalNormal,
    DiagonalNormalMixture,
    Mixture,
    StandardNormal,
)
from surflow.flow import Flow
from surflow.nets import MLP
from surflow.objectives import elbo, iwbo
from surflow.proofs import double_precision
from surflow.score_function import close_tape, open_tape, record_score
from surflow.transforms import AbsGenerative, Augment

ROWS = 100_000


@pytest.fixture(autouse=True)
def float64():
    with double_precision():
        torch.manual_seed(0)
        yield


def folded() -> tuple[Flow, MLP]:
    net = MLP(1, 1, [4], "tanh")
    flow = Flow(
        DiagonalNormal((1,), loc=0.7, scale=0.8, learn=True), [AbsGenerative((1,), net=net)]
    )
    return flow, net


def enumerated(flow: Flow, net: MLP, x: torch.Tensor, count: int) -> torch.Tensor:
    """E over all sign patterns of log 1/K sum w, or of the mean log w for count = -S."""
    logit = net(x)[0, 0]
    q = torch.stack([torch.sigmoid(logit), torch.sigmoid(-logit)])
    log_weight = flow.base.log_prob(torch.cat([x, -x])) - q.log()
    total = torch.zeros(())
    for pattern in itertools.product((0, 1), repeat=count):
        index = torch.tensor(pattern)
        value = torch.logsumexp(log_weight[index], 0) - math.log(count)
        total = total + q[index].prod() * value
    return total


@pytest.mark.parametrize(("objective", "count"), [(iwbo, 1), (iwbo, 3), (elbo, 1), (elbo, 4)])
def test_gradient_of_a_discrete_posterior(objective, count):
    flow, net = folded()
    x = torch.full((1, 1), 0.6)
    parameters = list(flow.parameters())
    truth = torch.autograd.grad(
        enumerated(flow, net, x, count if objective is iwbo else 1), parameters
    )
    rows = x.expand(ROWS, 1)
    found = torch.autograd.grad(objective(flow, rows, num_samples=count).mean(), parameters)
    for a, b in zip(found, truth, strict=True):
        assert (a - b).abs().max() < 0.02 * max(t.abs().max() for t in truth)
    # without the score function the posterior's gradient would vanish in the mean
    assert max(t.abs().max() for t in truth[:-2]) > 0.01


def test_values_are_unchanged():
    flow, _ = folded()
    x = torch.rand(50, 1)
    torch.manual_seed(1)
    with torch.no_grad():
        plain = iwbo(flow, x, num_samples=5)
    torch.manual_seed(1)
    assert torch.equal(iwbo(flow, x, num_samples=5).detach(), plain)


def test_a_batch_of_one_has_a_gradient():
    flow, net = folded()
    torch.autograd.grad(iwbo(flow, torch.ones(1, 1), num_samples=1).sum(), list(net.parameters()))


def test_discrete_encoder_is_recorded():
    encoder = Categorical((1,), 3, net=MLP(2, 3, [4]))
    tape = open_tape()
    _, log_q = encoder.sample_and_log_prob(context=torch.randn(7, 2))
    close_tape()
    assert len(tape) == 1
    assert tape[0] is log_q


@pytest.mark.parametrize("kind", [Mixture, DiagonalNormalMixture])
def test_gradient_through_the_choice_of_a_mixture(kind):
    if kind is Mixture:
        parts = [DiagonalNormal((1,), loc, 0.6, learn=True) for loc in (-1.0, 1.5)]
        encoder = Mixture(parts, [0.3, 0.7], learn=True)
    else:
        encoder = DiagonalNormalMixture((1,), 2)
        with torch.no_grad():
            encoder.logits.copy_(torch.tensor([0.3, 0.7]).log())
            encoder.loc.copy_(torch.tensor([[-1.0], [1.5]]))
            encoder.log_scale.fill_(math.log(0.6))
    base = DiagonalNormal((2,), [0.0, 0.8], [1.0, 0.9])
    parameters = list(encoder.parameters())
    u = torch.linspace(-12, 12, 20_001).unsqueeze(1)
    log_q = encoder.log_prob(u)
    log_p = base.log_prob(torch.cat([torch.zeros_like(u), u], 1))
    bound = (log_q.exp() * (log_p - log_q)).sum() * 24 / 20_000
    truth = torch.autograd.grad(bound, parameters)
    flow = Flow(base, [Augment(encoder, keep=1)])
    found = torch.autograd.grad(elbo(flow, torch.zeros(ROWS, 1)).mean(), parameters)
    for a, b in zip(found, truth, strict=True):
        assert (a - b).abs().max() < 0.02 * max(t.abs().max() for t in truth)


def test_no_tape_no_record():
    record_score(torch.zeros(3, requires_grad=True))
    tape = open_tape()
    record_score(torch.zeros(3))  # nothing to learn
    StandardNormal(2).sample_and_log_prob(4)  # nothing discrete
    close_tape()
    assert tape == []
