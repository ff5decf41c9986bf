"""Sorted latents mapped onto the whole space."""

import math

import pytest
import torch

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.flow import Flow
from surflow.proofs import double_precision
from surflow.transforms import AffineCoupling, OrderedToReal, RunningMaxToReal, SortInference


@pytest.fixture(autouse=True)
def float64():
    with double_precision():
        torch.manual_seed(0)
        yield


def test_by_hand():
    z, ldj = OrderedToReal()(torch.tensor([[-1.0, 1.0, 1.5]]))
    assert torch.allclose(z, torch.tensor([[-1.0, math.log(2.0), math.log(0.5)]]))
    assert torch.allclose(ldj, torch.tensor([0.0]))  # -log 2 - log 1/2


def test_sets_of_vectors_are_ordered_along_dimension_one():
    x = torch.tensor([[[0.0, 5.0], [2.0, 6.0]]])
    z, ldj = OrderedToReal()(x)
    assert torch.allclose(z, torch.tensor([[[0.0, 5.0], [math.log(2.0), 0.0]]]))
    assert torch.allclose(ldj, torch.tensor([-math.log(2.0)]))


def test_unsorted_values_are_refused():
    with pytest.raises(ValueError, match=r"OrderedToReal.forward: expected values that ascend"):
        OrderedToReal()(torch.tensor([[1.0, 0.0]]))


def test_a_sorting_flow_is_a_symmetric_density():
    net = torch.nn.Linear(1, 2)
    with torch.no_grad():  # steps whose logarithm is about N(0, 0.6²): no heavy tail
        net.weight.copy_(torch.tensor([[0.1], [0.3]]))
        net.bias.copy_(torch.tensor([0.5, 0.0]))
    flow = Flow(StandardNormal(2), [SortInference(2), OrderedToReal(), AffineCoupling(net)])
    wide = DiagonalNormal(2, scale=3.0)
    x, log_r = wide.sample_and_log_prob(400_000)
    weight = (flow.log_prob(x) - log_r).exp()
    error = weight.std().item() / math.sqrt(len(x))
    assert error < 0.01
    assert abs(weight.mean().item() - 1) < 4 * error
    x = torch.randn(50, 2)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x.flip(1)))
    sample = flow.sample(20_000)
    up = (sample[:, 0] < sample[:, 1]).double().mean().item()
    assert abs(up - 0.5) < 4 * 0.5 / math.sqrt(20_000)


# A soft running maximum


def test_running_maximum_by_hand():
    z, ldj = RunningMaxToReal(0.5)(torch.tensor([[-1.0, 1.0, 1.5]]))
    lost = [math.log(1 - math.exp(-4.0)), math.log(1 - math.exp(-1.0))]
    wanted = [-1.0, 1.0 + 0.5 * lost[0], 1.5 + 0.5 * lost[1]]
    assert torch.allclose(z, torch.tensor([wanted]))
    assert torch.allclose(ldj, torch.tensor([-sum(lost)]))


def test_running_maximum_of_latents_is_a_loop_of_logaddexp():
    z = torch.randn(20, 6)
    s = 0.3
    x = [z[:, 0]]
    for i in range(1, 6):
        x.append(s * torch.logaddexp(x[-1] / s, z[:, i] / s))
    layer = RunningMaxToReal(s)
    assert torch.allclose(layer.inverse(z), torch.stack(x, 1), atol=1e-12)
    assert torch.allclose(layer(layer.inverse(z))[0], z, atol=1e-9)
    hard = RunningMaxToReal(1e-3).inverse(z)
    assert torch.allclose(hard, z.cummax(1).values, atol=2e-3)


@pytest.mark.parametrize(
    ("shape", "by"), [((4,), None), ((3, 2), 0), ((3, 2), 1), ((3, 2, 2), (1, 0))]
)
def test_running_maximum_contribution_is_the_jacobians(shape, by):
    layer = RunningMaxToReal(0.4, by=by)
    x = torch.randn(3, *shape)
    feature = (slice(None), slice(None), *((by,) if isinstance(by, int) else by or ()))
    x[feature] = x[feature].sort(1).values
    z, ldj = layer(x)
    others = torch.ones(shape, dtype=torch.bool)
    others[feature[1:]] = False
    assert torch.equal(z[:, others], x[:, others])
    for row, contribution in zip(x, ldj, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: layer(v.view(1, *shape))[0].flatten(), row.flatten()
        )
        assert torch.allclose(torch.linalg.slogdet(jacobian)[1], contribution, atol=1e-9)
    back, again = layer.inverse_and_ldj(z)
    assert torch.allclose(back, x, atol=1e-9) and torch.allclose(again, ldj, atol=1e-9)


def test_exponential_steps_become_logistic():
    """1 - exp(-step/s) is uniform, and z - x its logit, for steps of mean s."""
    s, n = 0.7, 40_000
    steps = torch.distributions.Exponential(1 / s).sample((n, 1))
    x = torch.cat([torch.zeros(n, 1), steps], 1)
    u = torch.sigmoid((RunningMaxToReal(s)(x)[0][:, 1] - x[:, 0]) / s).sort().values
    distance = (u - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov, one in a thousand


def test_running_maximum_in_float32_is_ascending_and_finite():
    z = 8 * torch.randn(500, 50, dtype=torch.float32)
    layer = RunningMaxToReal(0.5)
    x = layer.inverse(z)
    assert (x.diff(dim=1) >= 0).all()
    gaps = torch.full((1, 50), 2.0**-19)
    gaps[0, 0] = 0.0
    close = (16 + gaps.cumsum(1)).float()  # as close as points of pictures come
    latent, ldj = layer(close)
    assert latent.isfinite().all() and ldj.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunningMaxToReal(0.0), "expected a softness > 0, got 0.0"),
        (lambda: RunningMaxToReal(math.inf), "expected a softness > 0, got inf"),
        (lambda: RunningMaxToReal(1.0)(torch.tensor([[1.0, 1.0]])), "values that ascend"),
        (lambda: RunningMaxToReal(1.0, by=2)(torch.randn(1, 3, 2)), "an index of one feature"),
    ],
)
def test_running_maximum_names_mistakes(make, message):
    with pytest.raises(ValueError, match=f"RunningMaxToReal.*{message}"):
        make()
