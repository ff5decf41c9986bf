"""Bounds in their terms, annealed bounds, and active units."""

import math

import pytest
import torch
from torch import nn

from surflow.distributions import Categorical, DiagonalNormal, StandardNormal
from surflow.evaluation.marginal import Grid, marginal_log_prob
from surflow.flow import Flow
from surflow.models.unification import LinearNormalNet, hvae, ppca_log_prob
from surflow.models.vae_studies import vae_of_vectors
from surflow.nets import MLP
from surflow.objectives import elbo, iwbo
from surflow.transforms import VAE, Affine, Dequantization
from surflow.variational import (
    active_units,
    annealed_elbo,
    has_vae_layer,
    linear_warm_up,
    prior_flow,
    terms,
)

FLOWS = [("diagonal", 0), ("planar", 2), ("iaf", 2)]


def small(posterior="diagonal", num_layers=0, prior="standard", seed=0, **kwargs) -> Flow:
    """A VAE of five binary pixels and two latents, its zero-initialised parts moved."""
    torch.manual_seed(seed)
    settings = {"hidden_features": [12], "flow_hidden_features": [8], "prior_layers": 2} | kwargs
    flow = vae_of_vectors(5, 2, posterior, num_layers, prior=prior, num_components=3, **settings)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return flow


def pixels(n=16, seed=1) -> torch.Tensor:
    return torch.randint(2, (n, 5), generator=torch.Generator().manual_seed(seed)).float()


# Terms


@pytest.mark.parametrize("prior", ["standard", "mixture", "realnvp", "autoregressive", "vamp"])
@pytest.mark.parametrize(("posterior", "num_layers"), FLOWS)
def test_terms_add_up_to_the_bound_of_the_same_draw(posterior, num_layers, prior):
    if prior == "vamp" and num_layers:
        pytest.skip("vamp is a mixture of diagonal posteriors")
    flow, x = small(posterior, num_layers, prior), pixels()
    torch.manual_seed(3)
    t = terms(flow, x)
    torch.manual_seed(3)
    assert torch.allclose(t.bound, flow.log_prob(x), atol=1e-5)
    assert torch.allclose(t.divergence.sum(1), t.log_q - t.log_prior, atol=1e-5)
    groups = 2 if (num_layers, prior) == (0, "standard") else 1
    assert t.divergence.shape == (16, groups)


def test_terms_are_those_of_torch_distributions():
    flow, x = small(), pixels()
    vae = flow.transforms[0]
    torch.manual_seed(3)
    t = terms(flow, x)
    loc, log_scale = vae.encoder.normal_parameters(x)
    torch.manual_seed(3)
    z = loc + log_scale.exp() * torch.randn(16, 2)
    by_hand = torch.distributions.Bernoulli(logits=vae.decoder.net(z)).log_prob(x).sum(1)
    q = torch.distributions.Normal(loc, log_scale.exp()).log_prob(z)
    p = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    assert torch.allclose(t.reconstruction, by_hand, atol=1e-5)
    assert torch.allclose(t.log_q, q.sum(1), atol=1e-5)
    assert torch.allclose(t.log_prior, p.sum(1), atol=1e-5)
    assert torch.allclose(t.divergence, q - p, atol=1e-5)


def test_terms_of_a_hierarchy_and_of_layers_in_front():
    torch.manual_seed(0)
    two = hvae(2, [2, 1])
    flow = Flow(two.base, [Dequantization(4), Affine(2, shift=[-0.5, 0.1]), *two.transforms])
    x = torch.randint(4, (8, 2))
    torch.manual_seed(3)
    t = terms(flow, x)
    torch.manual_seed(3)
    parts = [part for *_, part in flow.trace(x)]
    assert torch.allclose(t.bound, sum(parts), atol=1e-5)
    torch.manual_seed(3)
    v, front = x, torch.zeros(8)
    for layer in list(flow.transforms)[:2]:
        v, part = layer(v)
        front = front + part
    z, log_q = flow.transforms[2].encoder.sample_and_log_prob(context=v)
    assert torch.allclose(
        t.reconstruction, front + flow.transforms[2].decoder.log_prob(v, z), atol=1e-5
    )
    upper = flow.transforms[3]
    z_2, log_q_2 = upper.encoder.sample_and_log_prob(context=z)
    assert torch.allclose(t.log_q, log_q + log_q_2, atol=1e-5)
    expected = upper.decoder.log_prob(z, z_2) + flow.base.log_prob(z_2)
    assert torch.allclose(t.log_prior, expected, atol=1e-5)
    assert t.divergence.shape == (8, 1)


def test_the_prior_is_what_stands_behind_the_vae_layer():
    flow, x = small("planar", 2, "realnvp"), pixels()
    vae = flow.transforms[0]
    torch.manual_seed(3)
    z, log_q = vae.encoder.sample_and_log_prob(context=x)
    torch.manual_seed(3)
    expected = vae.decoder.log_prob(x, z) + prior_flow(flow).log_prob(z) - log_q
    assert torch.allclose(flow.log_prob(x), expected, atol=1e-5)
    assert prior_flow(flow).sample(3).shape == (3, 2)
    assert has_vae_layer(flow)
    assert not has_vae_layer(prior_flow(flow))
    with pytest.raises(ValueError, match="prior_flow: expected a flow with a VAE layer"):
        prior_flow(Flow(StandardNormal(2)))


def test_terms_need_a_vae_layer():
    with pytest.raises(ValueError, match="VAE layer, got none"):
        terms(Flow(StandardNormal(2), Affine(2)), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="num_samples >= 1, got 0"):
        terms(small(), pixels(), num_samples=0)


# Annealing


@pytest.mark.parametrize("annealed", ["divergence", "joint"])
@pytest.mark.parametrize(("posterior", "num_layers"), FLOWS)
def test_without_annealing_it_is_the_elbo(posterior, num_layers, annealed):
    flow, x = small(posterior, num_layers), pixels()
    results = []
    for function in (
        lambda: elbo(flow, x, num_samples=3),
        lambda: annealed_elbo(flow, x, beta=torch.ones(()), num_samples=3, annealed=annealed),
    ):
        torch.manual_seed(5)
        flow.zero_grad()
        value = function()
        value.mean().backward()
        results.append((value.detach(), [p.grad.clone() for p in flow.parameters()]))
    (value, grads), (annealed_value, annealed_grads) = results
    assert torch.allclose(value, annealed_value, atol=2e-6)
    for a, b in zip(grads, annealed_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_what_beta_multiplies():
    flow, x = small("planar", 2), pixels()
    torch.manual_seed(5)
    t = terms(flow, x)
    for annealed, expected in (
        ("divergence", t.reconstruction - 0.3 * (t.log_q - t.log_prior)),
        ("joint", 0.3 * (t.reconstruction + t.log_prior) - t.log_q),
    ):
        torch.manual_seed(5)
        value = annealed_elbo(flow, x, beta=0.3, annealed=annealed)
        assert torch.allclose(value, expected, atol=1e-5)


def test_the_latent_mean_is_the_mean_over_columns_of_the_programs_formula():
    """As it is written there: L columns of log p(z) and log q_0, one of the rest; then their mean.

    Written out with torch.distributions and autograd's Jacobian.
    """
    flow, x = small("planar", 2, amortised=False), pixels()
    vae = flow.transforms[0]
    base = vae.encoder.flow.base
    loc, log_scale = base.parameters_of(vae.encoder.net(x))
    torch.manual_seed(5)
    z_0 = loc + log_scale.exp() * torch.randn(16, 2)
    torch.manual_seed(5)
    value = annealed_elbo(flow, x, annealed="latent_mean")

    def layers(z):
        return vae.encoder.flow.transforms.inverse(z.unsqueeze(0)).squeeze(0)

    z = torch.stack([layers(row) for row in z_0])
    jacobians = torch.stack([torch.autograd.functional.jacobian(layers, row) for row in z_0])
    rest = torch.distributions.Bernoulli(logits=vae.decoder.net(z)).log_prob(x).sum(1)
    rest = rest + torch.linalg.slogdet(jacobians).logabsdet
    normal = torch.distributions.Normal
    columns = normal(0.0, 1.0).log_prob(z) - normal(loc, log_scale.exp()).log_prob(z_0)
    assert torch.allclose(value, (rest.unsqueeze(1) + columns).mean(1), atol=1e-5)
    assert (value - terms(flow, x).bound).abs().min() > 0.01  # another number than the bound


def test_free_bits_by_dimension():
    flow, x = small(), pixels(64)
    torch.manual_seed(5)
    t = terms(flow, x)
    means = t.divergence.mean(0)
    between = means.mean().item()  # one dimension pays, the other does not
    assert means.min() < between < means.max()
    torch.manual_seed(5)
    value = annealed_elbo(flow, x, beta=0.5, free_bits=between)
    expected = t.reconstruction.mean() - 0.5 * means.clamp_min(between).sum()
    assert torch.allclose(value.mean(), expected, atol=1e-5)


def test_free_bits_beyond_the_divergence_leave_the_reconstruction_alone():
    """The encoder's gradient is then that of the reconstruction; of a flow, on the total."""
    flow, x = small("planar", 2), pixels()
    torch.manual_seed(5)
    value = annealed_elbo(flow, x, free_bits=100.0)
    value.mean().backward()
    grads = [p.grad for p in flow.transforms[0].encoder.parameters()]
    flow.zero_grad()
    torch.manual_seed(5)
    t = terms(flow, x)
    t.reconstruction.mean().backward()
    assert torch.allclose(value, t.reconstruction - 100.0, atol=1e-4)
    for p, g in zip(flow.transforms[0].encoder.parameters(), grads, strict=True):
        assert torch.allclose(g, p.grad, atol=1e-6)


def test_warm_up():
    assert [linear_warm_up(t) for t in (0, 7)] == [1.0, 1.0]
    assert linear_warm_up(250, 0.5, 1000) == 0.75
    assert linear_warm_up(600, 0.5, 1000) == 1.0
    with pytest.raises(ValueError, match="start in \\[0, 1\\]"):
        linear_warm_up(0, 2.0, 10)


def test_mistakes_in_an_annealed_bound():
    flow, x = small(), pixels()
    with pytest.raises(ValueError, match="one of divergence, joint, latent_mean, got 'join'"):
        annealed_elbo(flow, x, annealed="join")
    with pytest.raises(ValueError, match="free_bits >= 0, got -1"):
        annealed_elbo(flow, x, free_bits=-1.0)
    discrete = Flow(
        Categorical(1, 3, learn=True),
        VAE(
            Categorical(1, 3, net=MLP(2, 3, [8])),
            DiagonalNormal(2, net=nn.Sequential(AsFloat(), MLP(1, 4, [8]))),
        ),
    )
    with pytest.raises(ValueError, match="learned discrete draws"):
        annealed_elbo(discrete, torch.randn(4, 2))


class AsFloat(nn.Module):
    def forward(self, x):
        return x.float()


# Against the likelihood itself


def linear_gaussian() -> Flow:
    """x = W z + b + noise, with an encoder that is right in its mean and too wide."""
    torch.manual_seed(0)
    flow = vae_of_vectors(3, 2, likelihood="normal", hidden_features=[4]).double()
    decoder = LinearNormalNet(2, 3, isotropic=True).double()
    encoder = nn.Linear(3, 4).double()
    with torch.no_grad():
        decoder.log_scale.fill_(math.log(0.6))
        weight = decoder.loc.weight
        precision = torch.eye(2, dtype=torch.float64) + weight.T @ weight / 0.36
        gain = torch.linalg.solve(precision, weight.T) / 0.36
        encoder.weight.zero_()
        encoder.weight[0::2] = gain
        encoder.bias[0::2] = -gain @ decoder.loc.bias
        scale = 1.4 * torch.linalg.inv(precision).diagonal().sqrt()
        encoder.bias[1::2] = scale.log()
    vae = flow.transforms[0]
    vae.decoder.net = decoder
    vae.encoder.net = nn.Identity()
    vae.encoder.flow.base.net = encoder
    return flow


def test_importance_weights_converge_to_the_closed_form():
    """A linear-Gaussian VAE: the K-sample bound rises to log N(x; b, W Wᵀ + σ² I) like 1/K."""
    flow = linear_gaussian()
    x = torch.randn(4000, 3, dtype=torch.float64)
    with torch.no_grad():
        exact = ppca_log_prob(flow, x)
        gaps = {}
        for k in (1, 4, 16, 2000):
            torch.manual_seed(k)
            gaps[k] = (exact - iwbo(flow, x, num_samples=k)).mean().item()
    assert gaps[1] > gaps[4] > gaps[16] > abs(gaps[2000])
    assert gaps[1] > 0.15
    assert abs(gaps[2000]) < 2e-3
    assert gaps[16] / gaps[4] == pytest.approx(0.25, rel=0.5)


@pytest.mark.parametrize(
    ("posterior", "num_layers", "prior"),
    [
        ("planar", 3, "standard"),
        ("realnvp", 2, "mixture"),
        ("iaf", 2, "realnvp"),
        ("radial", 2, "autoregressive"),
        ("sylvester", 1, "standard"),
    ],
)
def test_importance_weights_agree_with_quadrature(posterior, num_layers, prior):
    """p(x) = ∫ p(x|z) p(z) dz on a grid knows nothing of the posterior."""
    flow = small(posterior, num_layers, prior, spread=0.5).double()
    x = pixels(6).double()
    count = 20_000
    with torch.no_grad():  # a wide posterior, so that the weights stay bounded
        flow.transforms[0].encoder.flow.base.net.bias[1::2] += 0.5
        exact = marginal_log_prob(flow, x, Grid(9.0, 181))
        torch.manual_seed(2)
        weights = (flow.log_prob_samples(x, num_samples=count) - exact.log_prob).exp()
    assert exact.difference.abs().max() < 1e-3
    error = weights.std(0) / count**0.5
    assert ((weights.mean(0) - 1).abs() < 4 * error).all()
    assert error.max() < 0.05


# Active units


def test_active_units_of_known_means():
    """Means of 2 x_0, of a constant, and of 0.05 x_1: variances 4, 0 and 0.0025."""
    torch.manual_seed(0)
    for posterior, num_layers in (("diagonal", 0), ("realnvp", 2)):  # which starts as the identity
        flow = vae_of_vectors(2, 3, posterior, num_layers, likelihood="normal", amortised=False)
        encoder = flow.transforms[0].encoder
        encoder.net = nn.Identity()
        encoder.flow.base.net = nn.Linear(2, 6)
        with torch.no_grad():
            encoder.flow.base.net.weight.zero_()
            encoder.flow.base.net.weight[0, 0] = 2.0
            encoder.flow.base.net.weight[4, 1] = 0.05
            encoder.flow.base.net.bias.copy_(torch.tensor([0.0, -1.5, 1.0, -1.5, 0.0, -1.5]))
        x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(4))
        found = active_units(flow, x, num_samples=4, rows=999)
        moved = torch.stack([2 * x[:, 0], torch.ones(5000), 0.05 * x[:, 1]], 1).double()
        # the noise of a mean of 4 draws has variance e^-3 / 4 = 0.0124, above the threshold
        assert torch.allclose(found.variance, moved.var(0), atol=0.015 if num_layers else 1e-6)
        assert found.variance[1:].abs().max() < 6e-3
        assert (found.count, found.of) == (1, 3)


def test_active_units_embed_each_row_once():
    flow, x, seen = small("planar", 2), pixels(16), []
    flow.transforms[0].encoder.net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    active_units(flow, x, num_samples=8)
    assert seen == [16]


def test_a_mean_of_no_draws_is_not_biased_by_their_noise():
    """A wide posterior that ignores x: of few draws a row, the raw variance is far above 10⁻²."""
    flow = small("planar", 2)
    base = flow.transforms[0].encoder.flow.base.net
    stack = flow.transforms[0].encoder.flow.transforms[0].transform
    with torch.no_grad():
        for net in (base, stack.net):
            net.weight.zero_()
        base.bias[1::2] = 0.0
    x = pixels(4096)
    found = active_units(flow, x, num_samples=2)
    spread = flow.transforms[0].encoder.sample(context=x).var(0) / 2
    assert spread.min() > 0.1
    assert (found.variance.abs() < 5 * spread * (4 / 4096) ** 0.5).all()


def test_active_units_of_several_latents_and_mistakes():
    assert active_units(hvae(2, [2, 1]), torch.randn(10, 2)).of == 2
    with pytest.raises(ValueError, match="at least 2 rows"):
        active_units(small(), pixels(1))
    with pytest.raises(ValueError, match="VAE layer, got none"):
        active_units(Flow(StandardNormal(2), Affine(2)), torch.zeros(3, 2))
