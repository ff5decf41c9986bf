"""Flows of sets: sizes, exact invariance, orders by enumeration, unit mass."""

import itertools
import math

import pytest
import torch

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.flow import Flow
from surflow.memory import set_memory
from surflow.models import ORDERS, set_flow
from surflow.nets import SetTransformer
from surflow.objectives import elbo, iwbo
from surflow.proofs import double_precision
from surflow.transforms import (
    ActNorm,
    AffineCoupling,
    Permute,
    Reverse,
    RunningMaxToReal,
    SortInference,
    StochasticPermutation,
)

SMALL = dict(num_flows=2, features=8, num_heads=2, num_layers=1, softness=0.4)
EXACT = ("sort", "none")


@pytest.fixture(autouse=True)
def float64():
    with double_precision():
        torch.manual_seed(0)
        yield


def shaken(flow: Flow, by: float = 0.2) -> Flow:
    """With weights other than those it begins with, and no scale far from one."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(by * torch.randn_like(p))
        for layer in flow.modules():
            if isinstance(layer, AffineCoupling):  # softplus(0.54) = 1
                out = next(m for m in layer.net.modules() if isinstance(m, SetTransformer)).out
                out.bias[::2] += 0.54
    return flow.eval()


def small(order: str, num_points: int = 3, **sizes) -> Flow:
    return shaken(set_flow(num_points, order=order, width=4.0, **{**SMALL, **sizes}))


def sets(n: int, num_points: int = 3) -> torch.Tensor:
    return 4 * torch.rand(n, num_points, 2)


# Architecture


@pytest.mark.parametrize(
    ("order", "count"),
    [
        ("sort", 6_480_192),
        ("permute", 6_428_992),
        ("plackett_luce", 6_580_545),
        ("none", 6_422_784),
    ],
)
def test_published_sizes(order, count):
    """By hand: 49,984 a block; embedding, norm and output beside two of them; 25 x 64 places."""
    flow = set_flow(order=order)
    assert sum(p.numel() for p in flow.parameters()) == count
    block = 64 * 192 + 192 + 64 * 64 + 64 + 64 * 256 + 256 + 256 * 64 + 64 + 4 * 64
    dimension_wise = (64 + 64) + 2 * block + 2 * 64 + (2 * 64 + 2)
    length_wise = (2 * 64 + 64) + 2 * block + 2 * 64 + (4 * 64 + 4)
    by_hand = {
        "sort": 32 * (dimension_wise + length_wise + 25 * 64 + 4),
        "permute": 32 * (dimension_wise + length_wise + 4),
        "plackett_luce": 32 * (dimension_wise + length_wise + 25 * 64 + 4)
        + ((2 * 64 + 64) + 2 * block + 2 * 64 + 65),
        "none": 32 * (2 * dimension_wise + 4),
    }
    assert count == by_hand[order]


def test_layers_in_the_published_order():
    flow = set_flow(order="permute", num_flows=2)
    kinds = [type(layer).__name__ for layer in flow.transforms]
    step = ["AffineCoupling", "Reverse", "AffineCoupling", "StochasticPermutation", "ActNorm"]
    assert kinds == ["Affine", "StochasticPermutation", *step, *step]
    couplings = [layer for layer in flow.transforms if isinstance(layer, AffineCoupling)]
    assert [c.dim for c in couplings] == [2, 1, 2, 1]
    assert all(c.map.scale == "softplus" for c in couplings)
    kinds = [type(layer).__name__ for layer in set_flow(order="sort", num_flows=1).transforms]
    rest = ["Affine", *step[:3], "Permute", "ActNorm"]
    assert kinds == ["SortInference", "RunningMaxToReal", *rest]
    published = set_flow(order="sort", softness=None, num_flows=1)
    assert [type(layer).__name__ for layer in published.transforms] == ["SortInference", *rest]


def test_the_published_sort_flow_gives_one_term_of_its_density():
    """Its samples are draws of the couplings in a random order, so that their density is the mean
    over orders of the couplings'; what it gives is the sorted order's share of it."""
    flow, x = small("sort", softness=None), sets(40)
    couplings = Flow(flow.base, list(flow.transforms)[1:])
    orders = [list(order) for order in itertools.permutations(range(3))]
    with torch.no_grad():
        terms = torch.stack([couplings.log_prob(x[:, order]) for order in orders])
        lost = torch.logsumexp(terms, 0) - math.log(6) - flow.log_prob(x)
        by_sort = torch.stack([row[row[:, 0].argsort()] for row in x])
        share = couplings.log_prob(by_sort) - math.log(6)
    assert torch.allclose(flow.log_prob(x), share, rtol=0, atol=1e-10)
    assert lost.min() > 0 and lost.mean() > 0.05


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_points", [2, 3, 4])
def test_kinds_shapes_and_gradients(order, num_points):
    flow = small(order, num_points)
    assert flow.lower_bound == (order not in EXACT)
    x = sets(5, num_points)
    value = iwbo(flow, x, num_samples=3)
    assert value.shape == (5,) and value.isfinite().all()
    value.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    assert flow.sample(4).shape == (4, num_points, 2)


def test_a_coupling_of_points_sees_the_first_half_alone():
    flow = small("permute", 5)
    layer = flow.transforms[4]
    x = torch.randn(2, 5, 2)
    z, ldj = layer(x)
    assert torch.equal(z[:, :3], x[:, :3]) and (z[:, 3:] != x[:, 3:]).all()
    params = layer.net.net(x[:, :3])[:, :2].unflatten(2, (2, 2))  # points, coordinates, s and t
    scale, shift = torch.nn.functional.softplus(params[..., 0]), params[..., 1]
    assert torch.allclose(z[:, 3:], x[:, 3:] * scale + shift)
    assert torch.allclose(ldj, scale.log().sum((1, 2)))


# Couplings and actnorm along another dimension


@pytest.mark.parametrize("split", ["half", "alternate", 1])
@pytest.mark.parametrize("swap", [False, True])
def test_coupling_along_the_second_dimension_is_one_along_the_first_of_the_transpose(split, swap):
    seen = {"half": 2, "alternate": 2, 1: 1}[split]
    seen = 4 - seen if swap else seen
    net = SetTransformer(seen, 2 * (4 - seen), 8, 2, 1)
    torch.nn.init.normal_(net.out.weight)

    class Transposed(torch.nn.Module):
        def forward(self, x):
            return net(x.transpose(1, 2)).transpose(1, 2)

    mine = AffineCoupling(net, "softplus", split=split, swap=swap, dim=2)
    other = AffineCoupling(Transposed(), "softplus", split=split, swap=swap)
    x = torch.randn(3, 5, 4)
    z, ldj = mine(x)
    wanted, ldj_wanted = other(x.transpose(1, 2))
    assert torch.allclose(z, wanted.transpose(1, 2)) and torch.allclose(ldj, ldj_wanted)
    assert torch.allclose(mine.inverse(z), x, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: mine(v.view(1, 5, 4))[0].flatten(), x[0].flatten()
    )
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], ldj[0])


def test_actnorm_along_the_second_dimension():
    x = 3 + 2 * torch.randn(200, 5, 2)
    layer, other = ActNorm(2, dim=2).train(), ActNorm(2).train()
    z, ldj = layer(x)
    wanted, ldj_wanted = other(x.transpose(1, 2))
    assert torch.allclose(z, wanted.transpose(1, 2)) and torch.allclose(ldj, ldj_wanted)
    assert torch.allclose(layer.inverse(z), x)
    assert torch.allclose(ldj, -5 * layer.log_scale.sum().expand(200))


@pytest.mark.parametrize("order", EXACT)
@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_gradients_are_the_same_in_every_memory_mode(order, mode):
    flow, x = small(order, 4), sets(6, 4)
    found = []
    for memory in ("stored", mode):
        set_memory(flow, memory)
        flow.zero_grad()
        flow.log_prob(x).mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
    assert torch.allclose(*found, rtol=1e-7, atol=1e-9)


# Invariance


@pytest.mark.parametrize("order", EXACT)
def test_log_prob_does_not_change_with_the_order(order):
    flow, x = small(order, 7), sets(20, 7)
    value = flow.log_prob(x)
    for _ in range(5):
        again = flow.log_prob(x[:, torch.randperm(7)])
        if order == "sort":
            assert torch.equal(again, value)  # the sorted set is the same
        assert torch.allclose(again, value, rtol=0, atol=1e-11)
    moved = x.clone()
    moved[:, 0, 0] += 0.1
    assert (flow.log_prob(moved) - value).abs().min() > 1e-6


def test_sorted_samples_come_in_any_order():
    flow = small("sort")
    with torch.no_grad():
        first = flow.sample(20_000)[:, :, 0].argmin(1)
    share = first.bincount(minlength=3) / 20_000
    assert (share - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / 20_000)


def with_orders(flow: Flow, orders) -> Flow:
    """The flow with these orders in place of its random ones, one layer after another."""
    given = iter(orders)
    layers = [
        Permute(next(given)) if isinstance(layer, StochasticPermutation) else layer
        for layer in flow.transforms
    ]
    return Flow(flow.base, layers)


def by_enumeration(flow: Flow, x: torch.Tensor) -> torch.Tensor:
    """log p(x; orders) of every choice of orders, (choices, B), the first layer's slowest."""
    layers = sum(isinstance(layer, StochasticPermutation) for layer in flow.transforms)
    permutations = list(itertools.permutations(range(x.shape[1])))
    choices = itertools.product(permutations, repeat=layers)
    with torch.no_grad():
        return torch.stack([with_orders(flow, orders).log_prob(x) for orders in choices])


def test_permute_flow_is_the_average_over_all_orders():
    """With three points and a flow: 6 x 6 choices; each adds log p - log q = 0."""
    flow, x = small("permute", num_flows=1), sets(4)
    log_p = by_enumeration(flow, x)
    assert log_p.shape == (36, 4) and (log_p.std(0) > 1e-2).all()
    likelihood = log_p.logsumexp(0) - math.log(36)
    other = by_enumeration(flow, x[:, [2, 0, 1]])
    assert torch.allclose(other.logsumexp(0) - math.log(36), likelihood, atol=1e-12)
    assert torch.allclose(other.mean(0), log_p.mean(0), atol=1e-12)  # so does the bound's mean

    draws = 6000
    with torch.no_grad():
        values = flow.log_prob_samples(x, num_samples=draws)
        bound = elbo(flow, x, num_samples=draws)
        tight = iwbo(flow, x, num_samples=draws)
    error = values.std(0) / math.sqrt(draws)
    assert ((bound - log_p.mean(0)).abs() < 4.5 * error).all()
    weights = (values - likelihood).exp()
    error = weights.std(0) / math.sqrt(draws)
    assert ((tight - likelihood).abs() < 4.5 * error).all()
    assert (likelihood - log_p.mean(0) > 1e-3).all()  # the bound is one


def plackett_luce(logits: torch.Tensor, order) -> torch.Tensor:
    """log q(order), (B,), by its definition: one softmax after another."""
    left, total = list(range(logits.shape[1])), 0.0
    for element in order:
        total = total + logits[:, left].log_softmax(1)[:, left.index(element)]
        left.remove(element)
    return total


def test_a_learned_order_against_enumeration():
    """p(x) is the average of the flow behind over all orders; the bound follows from q."""
    flow, x = small("plackett_luce"), sets(4)
    encoder = flow.transforms[1].encoder_net
    with torch.no_grad():
        encoder[0].out.weight.mul_(20)
        log_p = by_enumeration(flow, x)
        logits = encoder(flow.transforms[0](x)[0])
    orders = list(itertools.permutations(range(3)))
    log_q = torch.stack([plackett_luce(logits, order) for order in orders])
    assert torch.allclose(log_q.logsumexp(0), torch.zeros(4))
    assert (log_q.exp().max(0).values > 0.25).all()  # far from uniform
    exact_bound = (log_q.exp() * (log_p - math.log(6) - log_q)).sum(0)
    likelihood = log_p.logsumexp(0) - math.log(6)

    draws = 6000
    with torch.no_grad():
        values = flow.log_prob_samples(x, num_samples=draws)
    error = values.std(0) / math.sqrt(draws)
    assert ((values.mean(0) - exact_bound).abs() < 4.5 * error + 1e-9).all()
    weights = (values - likelihood).exp()
    assert ((weights.mean(0) - 1).abs() < 4.5 * weights.std(0) / math.sqrt(draws)).all()

    turned = x[:, [1, 2, 0]]
    with torch.no_grad():
        log_p_turned = by_enumeration(flow, turned)
        logits = encoder(flow.transforms[0](turned)[0])
    log_q = torch.stack([plackett_luce(logits, order) for order in orders])
    other = (log_q.exp() * (log_p_turned - math.log(6) - log_q)).sum(0)
    assert torch.allclose(other, exact_bound, atol=1e-11)
    assert torch.allclose(log_p_turned.logsumexp(0) - math.log(6), likelihood, atol=1e-11)


def test_a_learned_order_begins_uniform():
    flow = set_flow(4, order="plackett_luce", **SMALL)
    _, contribution = flow.transforms[1](torch.rand(9, 4, 2))
    assert torch.allclose(contribution, torch.zeros(9), atol=1e-12)


# Mass


def mass(flow: Flow, n: int = 60_000) -> tuple[float, float]:
    """The integral of the density and its standard error, by importance sampling.

    Of three points in a random order: the first coordinates' least value and logarithms of steps,
    and the second coordinates, are jointly normal, wider than those of the flow.
    """
    with torch.no_grad():
        seen = flow.sample(4000)
        seen = seen.gather(1, seen[..., :1].argsort(1).expand_as(seen))
        steps = seen[:, :, 0].diff(dim=1)
        told = torch.cat([seen[:, :1, 0], steps.log(), seen[:, :, 1]], 1)[steps.min(1).values > 0]
        wide = torch.distributions.MultivariateNormal(told.mean(0), 1.8 * told.T.cov())
        t = wide.sample((n,))
        steps = t[:, 1:3].exp()
        x = torch.stack([torch.cat([t[:, :1], steps], 1).cumsum(1), t[:, 3:]], 2)
        x = x.gather(1, torch.rand(n, 3, 1).argsort(1).expand_as(x))
        log_r = wide.log_prob(t) - steps.log().sum(1) - math.log(6)
        weight = (flow.log_prob(x) - log_r).exp()
    return weight.mean().item(), weight.std().item() / math.sqrt(n)


@pytest.mark.parametrize("order", EXACT)
def test_sets_of_three_points_have_unit_mass(order):
    flow = small(order)
    total, error = mass(flow)
    assert error < 0.03
    assert abs(total - 1) < 4 * error


def test_without_room_for_unsorted_latents_mass_is_lost():
    """As in the published code: the test above can fail."""
    flow = small("sort")
    layers = [layer for layer in flow.transforms if not isinstance(layer, RunningMaxToReal)]
    shape = (3, 2)
    couplings = [AffineCoupling, Reverse, Permute, ActNorm]
    assert isinstance(layers[0], SortInference) and any(type(t) in couplings for t in layers)
    x, log_r = DiagonalNormal(shape, 2.0, 4.0).sample_and_log_prob(60_000)
    with torch.no_grad():
        weight = (Flow(StandardNormal(shape), layers).log_prob(x) - log_r).exp()
    error = weight.std().item() / math.sqrt(len(x))
    assert weight.mean().item() < 0.6 and error < 0.05


# Precision, mistakes


@pytest.mark.parametrize("order", ORDERS)
def test_contributions_are_float32_under_half_precision(order):
    flow = small(order, 4).float()
    x = sets(3, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        z, ldj = flow.transforms(x)
    assert (z.dtype, ldj.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "sorted"}, "model.order: expected one of sort, .*did you mean 'sort'"),
        ({"num_points": 1}, "expected num_points >= 2, got 1"),
        ({"num_flows": 0}, "num_flows >= 1, got 0"),
        ({"width": 0}, "model.width: expected a positive number, got 0"),
        ({"softness": 0}, "model.softness: expected a positive number, got 0"),
        ({"features": 9}, "features that num_heads divides, got 9 and 2"),
        ({"dropout": 1}, r"a dropout in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        set_flow(**{"num_points": 4, **SMALL, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AffineCoupling(torch.nn.Identity(), dim=0), "AffineCoupling: expected dim >= 1"),
        (lambda: ActNorm(2, dim=0), "ActNorm: expected dim >= 1, got 0"),
        (
            lambda: AffineCoupling(torch.nn.Identity(), dim=2)(torch.randn(2, 4)),
            r"expected a dimension 2, got shape \(2, 4\)",
        ),
        (lambda: ActNorm(2, dim=2)(torch.randn(2, 4)), "expected 2 channels along dimension 2"),
    ],
)
def test_dimensions_that_are_not_there(call, message):
    with pytest.raises(ValueError, match=message):
        call()
