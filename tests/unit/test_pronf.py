"""Progressive flows: the chain is a bound, its levels add up, and no level loses mass."""

import math
from functools import partial

import pytest
import torch

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.flow import Flow
from surflow.memory import set_memory
from surflow.models import pronf
from surflow.models.pronf import BlockMeans, Parts, Shifted, exact_level, published_level
from surflow.models.split_priors import prior_called
from surflow.objectives import elbo, iwbo
from surflow.proofs import CHECKS
from surflow.training.module import FlowModule
from surflow.transforms import VAE, Dequantization, Example, Haar, Sequential, Slice

SMALL = {
    "num_steps": 1,
    "hidden_channels": 4,
    "embed_channels": 2,
    "prior_hidden_channels": 3,
    "prior_layers": 1,
}
CHAINS = ("published", "exact")


def perturbed(module, scale=0.15, seed=7):
    """Away from its start, in evaluation mode, from a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module.eval()


def small(chain, shape=(1, 8, 8), coarsest=2, levels=16):
    flow = pronf(shape, levels, chain, coarsest, **SMALL)
    flow.train()
    with torch.no_grad():
        flow.log_prob(torch.randint(levels, (64, *shape)))
    return perturbed(flow)


def parts(cls=Parts):
    settings = {"hidden_channels": 3, "num_layers": 1, "kernel_sizes": (3,), "dilations": (1,)}
    return cls(1, 4, prior_called("autoregressive", **settings), 2, False)


class DetailsAlone(Parts):
    """No steps before the split: the coarse part is the mean less a half, which a posterior about
    the mean covers."""

    def steps(self, channels, context_features=0):
        return super().steps(channels, context_features) if context_features else []


# Haar --------------------------------------------------------------------------------------------


def test_haar_is_its_matrix(double):
    """Rows of the 4 x 4 matrix: the mean, and the three orthonormal differences."""
    matrix = torch.tensor(
        [[0.25, 0.25, 0.25, 0.25], [0.5, -0.5, 0.5, -0.5], [0.5, 0.5, -0.5, -0.5],
         [0.5, -0.5, -0.5, 0.5]]
    )  # fmt: skip
    x = torch.randn(3, 2, 4, 6)
    z, ldj = Haar()(x)
    blocks = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # B C h w 4
    expected = torch.einsum("ij,bchwj->bichw", matrix, blocks).flatten(1, 2)
    torch.testing.assert_close(z, expected)
    log_det = torch.linalg.slogdet(matrix)[1] * blocks[0, ..., 0].numel()
    torch.testing.assert_close(ldj, log_det.expand(3))
    torch.testing.assert_close(Haar().inverse(z), x)
    torch.testing.assert_close(z[:, :2], torch.nn.functional.avg_pool2d(x, 2))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Haar()(torch.zeros(1, 1, 3, 4)), "Haar.forward: expected an even height"),
        (lambda: Haar().inverse(torch.zeros(1, 3, 2, 2)), "Haar.inverse: expected channels"),
    ],
)
def test_haar_says_what_it_takes(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# One level ---------------------------------------------------------------------------------------


def level_example(chain):
    """A level of 2 x 2 pixels, and the coarse image of one: 4 dimensions."""
    torch.manual_seed(0)
    make, of = {
        "published": (published_level, parts(DetailsAlone)),
        "exact": (exact_level, parts()),
    }[chain]
    # a wide posterior, so that importance weights stay bounded; pronf has a narrow one
    layer = perturbed(Sequential(make((1, 2, 2), of, -1.5)), 0.1)
    wide = DiagonalNormal((1, 2, 2), scale=2.2 if chain == "exact" else 1.8)
    return Example(layer, wide.sample_and_log_prob, StandardNormal((1, 1, 1)))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_level_keeps_the_contract(chain, check, double):
    proof = CHECKS[check](level_example(chain))
    assert proof.ok, proof.message


def test_a_level_of_two_scales_has_unit_jacobian_mass(double):
    """4 x 4 details: the noise behind them is a bijection of them, by autograd."""
    details = perturbed(parts().details((3, 4, 4), 1), 0.1)
    context, x = torch.randn(1, 1, 4, 4), torch.randn(1, 3, 4, 4)
    embedded = details.net(context)

    def whitened(v):
        found = []
        for layer in details.flow.transforms:
            if isinstance(layer, Slice):
                kept, rest = layer.cut(v)
                beside = torch.cat([kept, torch.nn.functional.avg_pool2d(embedded, 2)], 1)
                loc, log_scale = layer.decoder.parameters_of(rest, beside)
                found.append(((rest - loc) * torch.exp(-log_scale)).flatten(1))
                v = kept
            else:
                v = layer(v, embedded)[0]
        loc, log_scale = details.flow.base.parameters_of(v, embedded)
        return torch.cat([*found, ((v - loc) * torch.exp(-log_scale)).flatten(1)], 1)

    matrix = torch.autograd.functional.jacobian(whitened, x).reshape(48, 48)
    normal = -0.5 * whitened(x).square().sum() - 24 * math.log(2 * math.pi)
    expected = normal + torch.linalg.slogdet(matrix)[1]
    assert details.log_prob(x, context).item() == pytest.approx(expected.item(), abs=1e-7)


@pytest.mark.parametrize("log_scale", [-1.5, -3.0])
def test_the_published_level_bounds_the_likelihood(log_scale, double):
    """log p(x) = log of the integral over the one coarse pixel, by quadrature."""
    torch.manual_seed(1)
    (level,) = published_level((1, 2, 2), parts(DetailsAlone), log_scale)
    perturbed(level, 0.1)
    flow = Flow(StandardNormal((1, 1, 1)), level)
    x = torch.randn(4, 1, 2, 2)
    line = torch.linspace(-12, 12, 4001)
    z = line.view(-1, 1, 1, 1)
    truth = []
    for row in x:
        joint = level.decoder.log_prob(row.expand(len(z), -1, -1, -1), z) + flow.base.log_prob(z)
        truth.append(torch.logsumexp(joint, 0) + (line[1] - line[0]).log())
    truth = torch.stack(truth)
    bound = elbo(flow, x, num_samples=4000)
    assert bool((bound < truth).all())
    if log_scale > -2:
        tight = iwbo(flow, x, num_samples=20_000)
        torch.testing.assert_close(tight, truth, rtol=0, atol=0.05)


def test_what_the_coarse_parts_are(double):
    """The latent about the block means, the flow's coarse part about the latent less a half."""
    x = torch.rand(2, 3, 4, 4)
    loc, log_scale = DiagonalNormal((3, 2, 2), net=BlockMeans(-6.0)).parameters_of(x)
    torch.testing.assert_close(loc, torch.nn.functional.avg_pool2d(x, 2))
    assert bool((log_scale == -6.0).all())
    loc, log_scale = DiagonalNormal((3, 4, 4), net=Shifted(-2.0)).parameters_of(x)
    torch.testing.assert_close(loc, x - 0.5)
    assert bool((log_scale == -2.0).all())


# The chain ---------------------------------------------------------------------------------------


def test_the_posterior_has_the_entropy_of_a_cell():
    vae = next(t for t in pronf((3, 8, 8), **SMALL).transforms if isinstance(t, VAE))
    scale = vae.encoder.net.log_scale.double().exp()
    entropy = torch.distributions.Normal(0.0, scale).entropy()
    assert entropy.item() == pytest.approx(-math.log(256), abs=1e-6)


@pytest.mark.parametrize("chain", CHAINS)
def test_levels_add_up_to_the_whole(chain, double):
    flow = small(chain)
    x = torch.randint(16, (32, 1, 8, 8))
    ledger = flow.ledger(x)
    bits = flow.level_bits(ledger)
    assert list(bits) == [8, 4, 2]
    total = sum(value * side**2 for side, (value, _) in bits.items()) / 64
    assert total == pytest.approx(-ledger.total / (64 * math.log(2)), abs=1e-9)
    assert all(error > 0 for _, error in bits.values())
    names = [name for level in flow.levels for name in level.layers]
    assert names == [row.layer for row in ledger.rows]


def test_published_units_of_a_level(double):
    """A uniform model of every level costs log2 K bits a dimension, whatever the level."""

    class Uniform(DiagonalNormal):
        def log_prob(self, x, context=None):
            return x.new_zeros(len(x))

    flow = small("published")
    for vae in (t for t in flow.transforms if isinstance(t, VAE)):
        vae.decoder = Uniform(vae.decoder.event_shape, net=torch.nn.Identity())
    flow.base = Uniform(flow.base.event_shape)
    torch.manual_seed(0)
    bits = flow.level_bits(flow.ledger(torch.randint(16, (4000, 1, 8, 8))))
    for value, error in bits.values():
        assert value == pytest.approx(4.0, abs=5 * error + 1e-9)


@pytest.mark.parametrize("chain", CHAINS)
def test_generating_then_encoding(chain, double):
    """The pair (x, z) of a generation has the contribution that inference gives it."""
    flow = small(chain)
    layers = Sequential(list(flow.transforms)[1:])
    z, log_p = flow.base.sample_and_log_prob(5)
    torch.testing.assert_close(flow.base.log_prob(z), log_p, rtol=1e-9, atol=1e-7)
    x, ldj = layers.inverse_and_ldj(z)
    back, again = layers(x)
    if chain == "exact":
        torch.testing.assert_close(back, z, rtol=0, atol=1e-7)
        torch.testing.assert_close(again, ldj, rtol=1e-7, atol=1e-7)
    else:  # the latents are drawn anew: the contribution of the pair that was generated is
        total, coarse = torch.zeros(5), z
        for layer in reversed(list(layers)):
            fine, part = layer.inverse_and_ldj(coarse)
            encoder = layer.encoder.log_prob(coarse, fine)
            torch.testing.assert_close(part, layer.decoder.log_prob(fine, coarse) - encoder)
            total, coarse = total + part, fine
        assert bool(total.isfinite().all())


def test_the_exact_chain_is_exact_behind_the_dequantization(double):
    flow = small("exact")
    assert isinstance(flow.transforms[0], Dequantization)
    assert not Sequential(list(flow.transforms)[1:]).lower_bound
    assert small("published").transforms[1].lower_bound


@pytest.mark.parametrize("chain", CHAINS)
def test_images_of_every_level(chain, double):
    flow = small(chain)
    x = torch.randint(16, (3, 1, 8, 8))
    seen = flow.coarsened(x)
    assert [i.shape[-1] for i in seen] == [8, 4, 2]
    means = torch.nn.functional.avg_pool2d(seen[0], 2)
    spread = 0.0 if chain == "exact" else 6 / 16 / math.sqrt(2 * math.pi * math.e)
    assert (seen[1] - means).abs().max() <= spread + 1e-6
    drawn = flow.images(seen[-1])
    assert [i.shape[-1] for i in drawn] == [2, 4, 8]
    assert torch.equal(drawn[0], seen[-1])
    if chain == "exact":  # the finer images keep the coarse one
        torch.testing.assert_close(
            torch.nn.functional.avg_pool2d(drawn[2], 4), drawn[0], rtol=0, atol=1e-6
        )
    assert [i.shape[-1] for i in flow.images(seen[1], 1)] == [4, 8]


def test_levels_have_their_own_learning_rates():
    flow = pronf((1, 8, 8), 16, coarsest=2, level_rates=(1.0, 0.1), **SMALL)
    module = FlowModule(flow, partial(torch.optim.Adam, lr=2e-3), lambda *a, **k: None)
    optimizer = module.make_optimizer(module._parameters_with_rates())
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == sum(1 for _ in flow.parameters())
    for layer, rate in (
        (flow.transforms[1], 2e-3),
        (flow.transforms[2], 2e-4),
        (flow.base, 2e-4),
    ):
        assert [rates[id(p)] for p in layer.parameters()] == pytest.approx(
            [rate] * len(list(layer.parameters()))
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chain": "publishd"}, "model.chain: .*did you mean 'published'"),
        ({"shape": (3, 12, 12)}, "H a power of two times coarsest"),
        ({"shape": (3, 8, 4)}, "H a power of two times coarsest"),
        ({"coarsest": 0}, "H a power of two times coarsest"),
        ({"level_rates": ()}, "model.level_rates: expected positive numbers"),
        ({"level_rates": (1.0, 0.0)}, "model.level_rates: expected positive numbers"),
        ({"prior": "glow"}, "model.prior: expected one of"),
        ({"hidden_channels": 0}, "hidden_channels >= 1, got 0"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        pronf(**{"shape": (3, 8, 8), **settings})


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("chain", CHAINS)
def test_gradients_do_not_depend_on_what_is_kept(chain, mode, double):
    flow = small(chain).train()
    x = torch.randint(16, (4, 1, 8, 8))

    def gradients():
        flow.zero_grad()
        torch.manual_seed(2)
        flow.log_prob(x).sum().backward()
        return [p.grad.clone() for p in flow.parameters()]

    stored = gradients()
    set_memory(flow, mode)
    for found, expected in zip(gradients(), stored, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
