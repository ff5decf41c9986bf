"""VAEs with flows as posteriors and priors."""

import copy
import re
from itertools import pairwise

import pytest
import torch

from surflow.config import project_root
from surflow.models.posteriors import POSTERIORS
from surflow.models.priors import PRIORS
from surflow.models.vae_studies import (
    LIKELIHOODS,
    GreyInput,
    vae_of_images,
    vae_of_vectors,
)
from surflow.nets.masked_conv import LocalPixelCNN
from surflow.nets.maxout import Maxout
from surflow.objectives import elbo
from surflow.transforms import Planar, Radial
from surflow.variational import prior_flow, terms

DEEP = [name for name in POSTERIORS if name != "diagonal"]


def small(
    posterior="diagonal", num_layers=0, amortised=True, prior="standard", move=0.15, **kwargs
):
    """Six pixels, two latents, every parameter moved from its start."""
    torch.manual_seed(0)
    settings = {"hidden_features": [10], "flow_hidden_features": [8], "prior_layers": 2} | kwargs
    flow = vae_of_vectors(
        6, 2, posterior, num_layers, amortised, prior, num_components=4, **settings
    )
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(move * torch.randn_like(p))
    return flow.double()


def pixels(n=8):
    return torch.randint(2, (n, 6), generator=torch.Generator().manual_seed(1)).double()


def grid(half_width=14.0, points=281):
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), (axis[1] - axis[0]).item() ** 2


@pytest.mark.parametrize("amortised", [True, False])
@pytest.mark.parametrize("posterior", DEEP)
def test_a_posterior_has_unit_mass(posterior, amortised):
    """By its other direction, the one that sampling never takes, on a grid of z."""
    encoder = small(posterior, 3, amortised).transforms[0].encoder
    nodes, cell = grid()
    with torch.no_grad():
        for x in pixels(1):
            mass = encoder.log_prob(nodes, x.expand(len(nodes), -1)).exp().sum() * cell
            assert mass.item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("amortised", [True, False])
@pytest.mark.parametrize("posterior", DEEP)
def test_a_draw_is_scored_by_the_density(posterior, amortised):
    encoder = small(posterior, 3, amortised).transforms[0].encoder
    x = pixels(64)
    z, log_q = encoder.sample_and_log_prob(context=x)
    assert torch.allclose(encoder.log_prob(z, x), log_q, atol=1e-8)


@pytest.mark.parametrize("posterior", DEEP)
def test_training_never_takes_the_slow_direction(posterior, monkeypatch):
    """A bound and its gradient: no root of a planar layer, no loop over the features of an IAF."""
    from surflow.nets import MADE
    from surflow.transforms import Sylvester

    def refuse(*args, **kwargs):
        raise AssertionError("the slow direction")

    for owner, name in (
        (Planar, "_solve"),
        (Radial, "_solve"),
        (Sylvester, "_solve"),
        (MADE, "sequential"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    flow = small(posterior, 2)
    elbo(flow, pixels()).mean().backward()
    flow.sample(3)


@pytest.mark.parametrize("prior", list(PRIORS))
def test_a_prior_has_unit_mass(prior):
    flow = small(prior=prior)
    nodes, cell = grid()
    with torch.no_grad():
        mass = prior_flow(flow).log_prob(nodes).exp().sum() * cell
    assert mass.item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("prior", list(PRIORS))
def test_draws_of_a_prior_follow_its_density(prior):
    """The mean of z and of z zᵀ over draws against the grid's."""
    flow = small(prior=prior)
    nodes, cell = grid()
    with torch.no_grad():
        density = prior_flow(flow).log_prob(nodes).exp() * cell
        torch.manual_seed(3)
        draws = prior_flow(flow).sample(40_000)

    def statistics(points):
        return torch.cat([points, points**2, points[:, :1] * points[:, 1:]], 1)

    expected = (density.unsqueeze(1) * statistics(nodes)).sum(0)
    error = statistics(draws).std(0) / len(draws) ** 0.5
    assert ((statistics(draws).mean(0) - expected).abs() < 4.5 * error + 1e-3).all()


@pytest.mark.parametrize("posterior", ["planar", "radial", "realnvp", "iaf"])
def test_amortised_layers_start_as_the_identity(posterior):
    torch.manual_seed(0)
    flow = vae_of_vectors(6, 3, posterior, 4, hidden_features=[8]).double()
    q = flow.transforms[0].encoder
    x = torch.randint(2, (50, 6)).double()
    z, log_q = q.sample_and_log_prob(context=x)
    loc, log_scale = q.flow.base.parameters_of(q.net(x))
    normal = torch.distributions.Normal(loc, log_scale.exp())
    torch.testing.assert_close(log_q, normal.log_prob(z).sum(1), rtol=1e-9, atol=1e-9)


def test_the_posteriors_layers_are_a_group_of_their_own():
    how = dict(hidden_features=[8], posterior_rate=0.5, posterior_start=7)
    flow = vae_of_vectors(6, 3, "planar", 4, **how)
    nets, layers = flow.parameter_groups(0.1)
    head = flow.transforms[0].encoder.flow.transforms[0].transform.net
    assert [id(p) for p in layers["params"]] == [id(head.weight), id(head.bias)]
    assert (nets["lr"], layers["lr"], layers["start"]) == (0.1, 0.05, 7)
    both = [id(p) for p in nets["params"] + layers["params"]]
    assert sorted(both) == sorted(id(p) for p in flow.parameters())
    for plain in (vae_of_vectors(6, 3, "planar", 4), vae_of_vectors(6, 3, **how)):
        (group,) = plain.parameter_groups(0.1)
        assert [id(p) for p in group["params"]] == [id(p) for p in plain.parameters()]
        assert group["lr"] == 0.1 and "start" not in group


@pytest.mark.parametrize(
    ("heads", "log_scale"),
    [
        ("linear", lambda raw: raw),
        ("tanh_deviation", torch.tanh),
        ("tanh_variance", lambda raw: 0.5 * torch.tanh(raw)),  # log σ = (log σ²) / 2
    ],
)
def test_heads_of_mean_and_scale(heads, log_scale):
    torch.manual_seed(0)
    flow = vae_of_vectors(6, 3, "planar", 2, amortised=False, hidden_features=[8], heads=heads)
    q, x = flow.transforms[0].encoder, pixels().float()
    linear = next(m for m in q.flow.base.modules() if isinstance(m, torch.nn.Linear))
    raw_loc, raw_scale = (4 * linear(q.net(x))).unflatten(1, (3, 2)).unbind(2)
    with torch.no_grad():
        linear.weight.mul_(4)
        linear.bias.mul_(4)
    loc, scale = q.flow.base.parameters_of(q.net(x))
    torch.testing.assert_close(loc, raw_loc if heads == "linear" else torch.tanh(raw_loc))
    torch.testing.assert_close(scale, log_scale(raw_scale))


def test_the_start_of_glorot_and_bengio():
    torch.manual_seed(0)
    how = dict(amortised=False, hidden_features=[300], start="xavier_normal")
    flow = vae_of_vectors(200, 100, "planar", 40, **how)
    for layer in flow.modules():
        if isinstance(layer, torch.nn.Linear):
            wanted = (2 / sum(layer.weight.shape)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(wanted, rel=0.03)
            assert layer.bias.abs().max() == 0
    (planar,) = (m for m in flow.modules() if isinstance(m, Planar))
    rows = planar.params.view(40, 201)
    for part in rows[:, :200].chunk(2, 1):  # u and w, 100 inputs and one output each
        assert part.std().item() == pytest.approx((2 / 101) ** 0.5, rel=0.05)
    assert rows[:, 200].abs().max() == 0


def test_the_decoder_starts_alike_whatever_the_posterior_and_the_prior():
    def weights(*args, **how):
        torch.manual_seed(3)
        flow = vae_of_vectors(6, 2, *args, hidden_features=[8], **how)
        vae = flow.transforms[0]
        return [*vae.encoder.net.parameters(), *vae.decoder.parameters()]

    plain = weights()
    for other in (weights("iaf", 3), weights("planar", 8), weights(prior="realnvp")):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("posterior", list(POSTERIORS))
def test_depth_zero_is_the_diagonal_posterior(posterior):
    x, values = pixels().float(), []
    for name in ("diagonal", posterior):
        torch.manual_seed(7)
        flow = vae_of_vectors(6, 2, name, 0, hidden_features=[10])
        values.append(elbo(flow, x, num_samples=2))
    assert torch.equal(*values)


@pytest.mark.parametrize("amortised", [True, False])
@pytest.mark.parametrize(("posterior", "prior"), [*zip(DEEP, list(PRIORS)[:2] * 3, strict=False)])
def test_gradients_reach_every_parameter(posterior, prior, amortised):
    flow = small(posterior, 2, amortised, prior)
    elbo(flow, pixels(32)).mean().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("prior", list(PRIORS))
def test_gradients_reach_every_parameter_of_a_prior(prior):
    flow = small(prior=prior)
    elbo(flow, pixels(32)).mean().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_rows_are_independent_and_a_batch_of_one_works():
    flow = small("planar", 3)
    encoder = flow.transforms[0].encoder
    x, z = pixels(5), torch.randn(5, 2, dtype=torch.float64)
    together = encoder.log_prob(z, x)
    alone = torch.cat([encoder.log_prob(z[i : i + 1], x[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-10)
    assert flow.log_prob(x[:1]).shape == (1,)


def test_amortised_layers_look_at_the_data_and_free_ones_do_not():
    x = pixels(8)
    for posterior in DEEP:
        for amortised in (True, False):
            encoder = small(posterior, 1, amortised).transforms[0].encoder
            layer = encoder.flow.transforms[0]
            assert layer.conditional is amortised
            if amortised:
                h = encoder.net(x)
                z = torch.full((8, 2), 0.4, dtype=torch.float64)
                assert layer.inverse(z, h).std(0).max() > 0, posterior


def test_the_size_of_the_published_vae():
    """784-500-500-(2 x 20) and 20-500-500-784, with a bias everywhere."""

    def dense(*sizes):
        return sum((a + 1) * b for a, b in pairwise(sizes))

    plain = dense(784, 500, 500, 40) + dense(20, 500, 500, 784)
    for k, amortised, per_layer in ((0, True, 0), (3, True, 501 * 41), (8, False, 41)):
        flow = vae_of_vectors(784, 20, "planar", k, amortised)
        assert sum(p.numel() for p in flow.parameters()) == plain + k * per_layer


@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
def test_every_likelihood_scores_what_it_generates(likelihood):
    levels = 17 if likelihood == "categorical" else 2
    flow = small(likelihood=likelihood, num_levels=levels)
    assert flow.transforms.integer_data == (likelihood == "categorical")
    x = flow.sample(20)
    assert flow.log_prob(x).isfinite().all()
    if levels == 17:
        assert x.max() > 2


def test_grey_values_from_integers():
    net = GreyInput(torch.nn.Linear(2, 1), 17)
    x = torch.tensor([[16, 4]], dtype=torch.uint8)
    assert torch.equal(net(x), net(torch.tensor([[1.0, 0.25]])))


def test_maxout():
    flow = vae_of_vectors(6, 2, hidden_features=[5, 3], activation="maxout")
    embed = flow.transforms[0].encoder.net.net
    assert [m.out_features for m in embed if hasattr(m, "out_features")] == [20, 12]
    x = torch.randn(4, 12)
    assert torch.equal(Maxout(4)(x), x.view(4, 3, 4).max(2).values)
    with pytest.raises(ValueError, match="window >= 1, got 0"):
        Maxout(0)


def test_a_vamp_prior_shares_the_encoder():
    flow = small(prior="vamp")
    names = [name for name, _ in flow.named_parameters()]
    assert len(names) == len(set(names))
    assert not any(n.startswith("base.") and n != "base.pseudo" for n in names)
    twin = copy.deepcopy(flow)
    assert twin.base._of[0] is twin.transforms[0].encoder
    encoder = flow.transforms[0].encoder
    z = torch.randn(7, 2, dtype=torch.float64)
    parts = [encoder.log_prob(z, torch.sigmoid(u).expand(7, -1)).exp() for u in flow.base.pseudo]
    assert torch.allclose(flow.base.log_prob(z).exp(), torch.stack(parts).mean(0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"posterior": "planer"}, "model.posterior: expected one of .*, got 'planer'"),
        ({"posterior": "diagonal", "num_layers": 2}, "expected 0 with posterior=diagonal, got 2"),
        (
            {"posterior": "iaf", "num_layers": -1},
            "model.num_layers: .* >= 0, got -1",
        ),
        ({"prior": "gaussian"}, "model.prior: expected one of"),
        (
            {"prior": "realnvp", "prior_layers": 0},
            "model.prior_layers: .*positive whole number, got 0",
        ),
        ({"prior": "vamp", "posterior": "planar", "num_layers": 1}, "expected a diagonal"),
        (
            {"prior": "vamp", "num_components": 0},
            "model.num_components: .*positive whole number, got 0",
        ),
        ({"likelihood": "binary"}, "model.likelihood: expected one of"),
        ({"num_levels": 3}, "expected 2 levels with bernoulli, got 3"),
        ({"hidden_features": []}, "model.hidden_features: expected at least one"),
        ({"latent_features": 0}, "latent_features"),
        ({"posterior_rate": 0.0}, "model.posterior_rate: expected > 0, got 0.0"),
        ({"posterior_start": -1}, "model.posterior_start: expected a whole number >= 0, got -1"),
        (
            {"latent_features": 1, "posterior": "realnvp", "num_layers": 1},
            "model.latent_features: expected >= 2 for a coupling, got 1",
        ),
    ],
)
def test_mistakes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vae_of_vectors(**{"features": 6, "latent_features": 2} | kwargs)


# Images


def image_vae(**kwargs):
    torch.manual_seed(0)
    settings = {
        "shape": (1, 5, 6),
        "latent_features": 3,
        "channels": (4, 6),
        "num_blocks": 1,
        "embed_features": 12,
        "flow_hidden_features": [8],
        "prior_layers": 2,
    }
    flow = vae_of_images(**settings | kwargs)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return flow.double()


def images(n=4):
    return torch.randint(2, (n, 1, 5, 6), generator=torch.Generator().manual_seed(1)).double()


STUDY_4 = [
    {"posterior": "iaf", "num_layers": 2},
    {"prior": "autoregressive"},
    {"prior": "autoregressive", "decoder": "local"},
]


@pytest.mark.parametrize("kwargs", STUDY_4, ids=["iaf", "af_prior", "vlae"])
def test_the_three_models_of_images(kwargs):
    flow = image_vae(**kwargs)
    x = images()
    torch.manual_seed(2)
    bound = elbo(flow, x)
    bound.mean().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    torch.manual_seed(2)
    t = terms(flow, x)
    assert torch.allclose(t.bound, bound)
    assert flow.log_prob(flow.sample(3)).isfinite().all()


@pytest.mark.parametrize(("kernel", "blocks", "inner"), [(3, 2, 1), (5, 1, 1), (3, 1, 3)])
def test_a_pixel_sees_its_window_and_nothing_else(kernel, blocks, inner):
    """By autograd: the Jacobian of the logits is confined to the window before the pixel."""
    torch.manual_seed(0)
    net = LocalPixelCNN(1, 2, 6, blocks, kernel, inner).double()
    x, c = torch.randn(1, 1, 7, 7).double(), torch.randn(1, 2, 7, 7).double()
    jacobian = torch.func.jacrev(lambda v: net(v, c)[0, 0])(x)[:, :, 0, 0]
    i, j = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    for a in range(7):
        for b in range(7):
            seen = jacobian[a, b].abs() > 0
            before = (i < a) | ((i == a) & (j < b))
            near = ((i - a).abs() <= net.reach) & ((j - b).abs() <= net.reach)
            assert not (seen & ~(before & near)).any()
            if inner == 1:
                assert (seen == (before & near)).all()


def test_a_local_decoder_is_a_distribution():
    """Over all 2⁶ images of 2×3 pixels the masses add up to 1."""
    flow = image_vae(shape=(1, 2, 3), channels=(4,), decoder="local")
    decoder = flow.transforms[0].decoder
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).double().view(-1, 1, 2, 3)
    with torch.no_grad():
        for z in torch.randn(3, 3).double():
            mass = decoder.log_prob(every, z.expand(64, -1)).exp()
            assert mass.sum().item() == pytest.approx(1.0, abs=1e-10)


def test_draws_of_a_local_decoder_follow_its_mass():
    """Windows of a sampler that walks the image give the frequencies of the whole net."""
    flow = image_vae(shape=(1, 2, 3), channels=(4,), decoder="local")
    decoder = flow.transforms[0].decoder
    with torch.no_grad():
        for p in decoder.local.parameters():
            p.mul_(2.0)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).double().view(-1, 1, 2, 3)
    z = torch.randn(1, 3, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        mass = decoder.log_prob(every, z.expand(64, -1)).exp()
        torch.manual_seed(3)
        draws = decoder.sample(5_000, z)
    weights = 2 ** torch.arange(5, -1, -1)
    counts = torch.bincount((draws.flatten(1).long() * weights).sum(1), minlength=64)
    expected = 5_000 * mass
    chi2 = ((counts - expected).square() / expected).sum().item()
    assert chi2 < 63 + 5 * (2 * 63) ** 0.5


@pytest.mark.parametrize("kernel", [3, 5])
def test_windows_of_the_sampler_are_the_whole_net(kernel):
    """At every pixel, the borders too, the window's logit is the whole image's."""
    torch.manual_seed(0)
    net = LocalPixelCNN(1, 2, 6, 2, kernel, 3).double()
    x, c = torch.randn(2, 1, 8, 9).double(), torch.randn(2, 2, 8, 9).double()
    whole, r = net(x, c), net.reach
    for i in range(8):
        for j in range(9):
            window = (..., slice(max(0, i - r), i + 1), slice(max(0, j - r), j + r + 1))
            part = net(x[window], c[window])[:, :, -1, j - max(0, j - r)]
            assert torch.allclose(part, whole[:, :, i, j], atol=1e-12)


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (5, 7), (1, 1)])
def test_the_decoder_gives_the_size_that_the_encoder_took(size):
    flow = image_vae(shape=(2, *size), channels=(3, 4, 5))
    x = flow.sample(2)
    assert x.shape == (2, 2, *size)
    assert flow.log_prob(x).shape == (2,)


def test_images_of_integers():
    flow = image_vae(num_levels=17)
    x = flow.sample(3)
    assert x.dtype == torch.int64
    assert flow.log_prob(x.to(torch.uint8)).isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decoder": "locale"}, "model.decoder: expected one of independent, local, got 'locale'"),
        ({"decoder": "local", "num_levels": 17}, "expected 2 levels with local, got 17"),
        ({"decoder": "local", "shape": (3, 5, 6)}, "expected shape \\(1, H, W\\)"),
        ({"channels": ()}, "at least one stage"),
    ],
)
def test_mistakes_in_images(kwargs, message):
    with pytest.raises(ValueError, match=message):
        image_vae(**kwargs)


def test_mistakes_in_masked_convolutions():
    with pytest.raises(ValueError, match="odd kernel_size, got 4"):
        LocalPixelCNN(1, 2, kernel_size=4)
    with pytest.raises(ValueError, match="positive sizes"):
        LocalPixelCNN(1, 0)


@pytest.mark.parametrize("posterior", DEEP)
def test_a_posterior_is_the_published_map_of_one_draw(posterior):
    """z = f_k ∘ ... ∘ f_1(z_0), the first layer first, and log q = log N(z_0) - Σ log|det J|."""
    encoder = small(posterior, 3).transforms[0].encoder
    x = pixels(1)
    h = encoder.net(x)
    base, layers = encoder.flow.base, list(encoder.flow.transforms)[::-1]
    loc, log_scale = base.parameters_of(h)

    def f(z):
        for layer in layers:
            z = layer.inverse(z.unsqueeze(0), h)[0]
        return z

    torch.manual_seed(4)
    z, log_q = encoder.sample_and_log_prob(context=x)
    torch.manual_seed(4)
    z_0 = (loc + log_scale.exp() * torch.randn(1, 2, dtype=torch.float64))[0]
    jacobian = torch.autograd.functional.jacobian(f, z_0)
    normal = torch.distributions.Normal(loc[0], log_scale[0].exp())
    expected = normal.log_prob(z_0).sum() - torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(z[0], f(z_0))
    assert torch.allclose(log_q[0], expected)


def test_planar_layers_stand_in_the_order_of_their_parameters():
    """u, w, b of the layer next to the draw come first in the net's output."""
    encoder = small("planar", 2).transforms[0].encoder
    x = pixels(3)
    h = encoder.net(x)
    stack = encoder.flow.transforms[0].transform
    parts = stack.net(h).view(3, 2, 5)
    z_0 = torch.randn(3, 2).double()
    z = z_0
    for k in range(2):
        u, w, b = parts[:, k].split([2, 2, 1], dim=1)
        a = (w * u).sum(1, keepdim=True)
        share = 1 - 1e-4
        bend = torch.where(a < 0, share * torch.expm1(a / share), a)
        u = u + (bend - a) * w / w.square().sum(1, keepdim=True)
        z = z + u * torch.tanh((w * z).sum(1, keepdim=True) + b)
    assert torch.allclose(encoder.flow.transforms.inverse(z_0, h), z)


def test_an_iaf_draws_in_parallel_and_an_autoregressive_prior_scores_in_parallel():
    """Jacobians: dz/dz_0 of a posterior's layer and du/dz of a prior's are triangular maps whose
    diagonal follows from what stands before, in the direction that takes one pass."""
    from surflow.transforms import Inverse, MaskedAffineAutoregressive

    flow = small("iaf", 2, prior="autoregressive", prior_layers=1)
    second, turned = flow.transforms[0].encoder.flow.transforms
    assert turned.transform.net.order.tolist() == [0, 1]  # the layer next to the draw
    assert second.transform.net.order.tolist() == [1, 0]
    prior = flow.transforms[1]
    assert isinstance(turned, Inverse) and isinstance(prior, MaskedAffineAutoregressive)
    h = flow.transforms[0].encoder.net(pixels(1))
    z_0 = torch.randn(1, 2).double()
    shift_scale = turned.transform.net(z_0, h).view(2, 2)
    expected = z_0[0] * torch.exp(2 * torch.tanh(shift_scale[:, 0] / 2)) + shift_scale[:, 1]
    assert torch.allclose(turned.inverse(z_0, h)[0], expected)
    shift_scale = prior.net(z_0).view(2, 2)
    expected = z_0[0] * torch.exp(2 * torch.tanh(shift_scale[:, 0] / 2)) + shift_scale[:, 1]
    assert torch.allclose(prior(z_0)[0][0], expected)


def test_digits_of_17_levels_are_scored_as_softmaxes():
    flow = small(likelihood="categorical", num_levels=17)
    decoder = flow.transforms[0].decoder
    x = torch.randint(17, (4, 6))
    z = torch.randn(4, 2).double()
    logits = decoder.net(z).view(4, 6, 17)
    expected = torch.distributions.Categorical(logits=logits).log_prob(x).sum(1)
    assert torch.allclose(decoder.log_prob(x, z), expected)
    assert torch.allclose(decoder.log_prob(x.to(torch.uint8), z), expected)


def test_a_grey_image_costs_the_mean_of_its_binarizations():
    """Σ over all bits b of P(b | grey) log p(b|z) is the cross-entropy at the grey values."""
    decoder = small().transforms[0].decoder
    z, grey = torch.randn(1, 2).double(), torch.rand(1, 6).double()
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).double()
    weight = torch.where(bits == 1, grey, 1 - grey).prod(1)
    mean = (weight * decoder.log_prob(bits, z.expand(64, -1))).sum()
    assert torch.allclose(decoder.log_prob(grey, z)[0], mean)


def test_a_local_decoder_under_autocast():
    flow = image_vae(decoder="local").float()
    decoder = flow.transforms[0].decoder
    x, z = images().float(), torch.randn(4, 3)
    exact = decoder.log_prob(x, z)
    with torch.autocast("cpu", torch.bfloat16):
        score = decoder.log_prob(x, z)
        draw = decoder.sample(context=z)
    assert score.dtype == draw.dtype == torch.float32
    assert torch.allclose(score, exact, rtol=0.02, atol=0.1)
    decoder.net = torch.nn.Flatten()
    with pytest.raises(ValueError, match=r"the net to give shape \(batch, features, 5, 6\), got"):
        decoder.log_prob(x, z)


# Many layers at once


@pytest.mark.parametrize(("kind", "size"), [(Planar, 7), (Radial, 5)])
@pytest.mark.parametrize(("batch", "depth"), [(1, 4), (6, 4), (6, 1)])
def test_a_stack_is_its_layers(kind, size, batch, depth):
    """Both directions, contributions and gradients; free parameters and a net's."""
    stack = kind(3, None if batch == 1 else Held(6, depth * size), depth).double()
    params = stack.params if batch == 1 else stack.net.value
    with torch.no_grad():  # of the planar layers some with the constraint active
        params.mul_(2.0)
    x = torch.randn(6, 3).double().requires_grad_()
    context = None if batch == 1 else torch.zeros(6, 1)
    z, ldj = stack(x, context)
    y, total = x, 0.0
    rows = params.view(batch, depth, size)
    for k in range(depth):
        layer = kind(3, net=Held(6, size)).double()
        layer.net.value = rows[:, k].expand(6, -1)
        y, part = layer(y, torch.zeros(6, 1))
        total = total + part
    assert torch.allclose(z, y, atol=1e-12)
    assert torch.allclose(ldj, total, atol=1e-12)
    ours = torch.autograd.grad(z.sum() + ldj.sum(), [x, params])
    theirs = torch.autograd.grad(y.sum() + total.sum(), [x, params])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    back, again = stack.inverse_and_ldj(z, context)
    assert torch.allclose(back, x, atol=1e-8)
    assert torch.allclose(again, ldj, atol=1e-8)


@pytest.mark.parametrize("kind", [Planar, Radial])
def test_a_stack_has_a_layer(kind):
    with pytest.raises(ValueError, match="num_layers >= 1, got 0"):
        kind(3, num_layers=0)


@pytest.mark.parametrize(("kind", "size"), [(Planar, 7), (Radial, 5)])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_names_of_checkpoints(kind, size, depth):
    """One layer has a vector ``params``; several have the same vectors one after another in it."""
    state = kind(3, num_layers=depth).state_dict()
    assert {k: v.shape for k, v in state.items()} == {"params": (depth * size,)}
    amortised = kind(3, torch.nn.Linear(2, depth * size), depth)
    assert set(amortised.state_dict()) == {"net.weight", "net.bias"}


class Held(torch.nn.Module):
    """A net that gives the same parameters whatever the context."""

    context_features = 1

    def __init__(self, rows, count):
        super().__init__()
        self.register_buffer("value", torch.randn(rows, count).double().requires_grad_())

    def forward(self, context):
        return self.value


@pytest.mark.parametrize("kind", [Planar, Radial])
def test_the_jacobian_of_a_stack(kind):
    example = kind.example()
    transform, x = example.transform.double(), example.sample(5)[0].double()
    context = example.context(5).double()
    _, ldj = transform(x, context)
    for i in range(5):
        row = context[i : i + 1]
        matrix = torch.autograd.functional.jacobian(
            lambda v, row=row: transform(v.unsqueeze(0), row)[0][0], x[i]
        )
        assert torch.linalg.slogdet(matrix)[1].item() == pytest.approx(ldj[i].item(), abs=1e-9)


def test_the_example_of_the_page_runs():
    """The Python of docs/vae.md, and every experiment key that it names."""
    page = (project_root() / "docs" / "vae.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    scope: dict = {}
    exec(compile(code, "docs/vae.md", "exec"), scope)
    flow, x = scope["flow"], scope["x"]
    assert flow.lower_bound
    assert flow.sample(16).shape == (16, 64)
    assert scope["iwbo"](flow, x, num_samples=50).mean() > scope["elbo"](flow, x).mean()
    for name in (*POSTERIORS, *PRIORS):
        assert f"| `{name}` |" in page, name
