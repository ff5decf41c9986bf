"""Sorted latents mapped onto the whole space."""

import math

import pytest
import torch

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.flow import Flow
from surflow.proofs import double_precision
from surflow.transforms import AffineCoupling, OrderedToReal, SortInference


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
