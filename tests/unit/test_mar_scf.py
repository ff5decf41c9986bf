"""The autoregressive prior over channels, and the flows that have it."""

import math

import pytest
import torch
import torch.nn.functional as F

from surflow.distributions import ChannelAutoregressive, DiagonalNormal, StandardNormal, Uniform
from surflow.models import all_latents, from_latents, glow, mar_scf, pool_flow
from surflow.models.downsampling import autoregressive_slice
from surflow.nets import ConvAttentionBlock, ConvAttentionNet, ConvLSTM
from surflow.nets.gated_attention import positions
from surflow.proofs import CHECKS
from surflow.transforms import Example, Sequential, Slice


def perturbed(module, scale=0.3):
    """Away from its start, in evaluation mode, from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module.eval()


def prior(shape=(4, 3, 2), context_channels=0, **settings):
    settings = {"hidden_channels": 5, "num_layers": 2, "embed_channels": 2} | settings
    return perturbed(ChannelAutoregressive(shape, context_channels, **settings))


# The net ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 2)])
def test_conv_lstm_is_its_equations(kernel, dilation, double):
    net = perturbed(ConvLSTM(2, 3, num_layers=2, kernel_size=kernel, dilation=dilation))
    x = torch.randn(4, 2, 2, 6, 5)
    pad = dilation * (kernel // 2)

    def convolve(conv, value):
        return F.conv2d(value, conv.weight, conv.bias, padding=pad, dilation=dilation)

    sequence = list(x)
    for inlet, back in zip(net.inputs, net.recurrent, strict=True):
        h = c = torch.zeros(2, 3, 6, 5)
        outputs = []
        for now in sequence:
            i, f, g, o = (convolve(inlet, now) + convolve(back, h)).split(3, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        sequence = outputs
    torch.testing.assert_close(net(x), torch.stack(sequence), rtol=0, atol=1e-12)


def test_conv_lstm_starts_by_remembering():
    net = ConvLSTM(2, 3)
    assert net.inputs[0].bias.tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (2, 3, 0), (2, 3, 1, 4), (2, 3, 1, 3, 0)])
def test_conv_lstm_says_what_sizes_it_takes(sizes):
    with pytest.raises(ValueError, match="ConvLSTM: expected positive sizes and an odd kernel"):
        ConvLSTM(*sizes)


# The prior -------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_channels", [0, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 2)])
def test_walking_and_scoring_at_once_agree(context_channels, kernel, dilation):
    """In float32, to 1e-5 of the log-probability."""
    p = prior((6, 8, 8), context_channels, kernel_size=kernel, dilation=dilation)
    context = torch.randn(5, context_channels, 8, 8) if context_channels else None
    x, log_p = p.sample_and_log_prob(5, context)
    torch.testing.assert_close(p.log_prob(x, context), log_p, rtol=1e-5, atol=1e-5)


def test_density_is_that_of_its_normals(double):
    p = prior(context_channels=3)
    x, context = torch.randn(5, 4, 3, 2), torch.randn(5, 3, 3, 2)
    embedded = p.net(context)
    total = torch.zeros(5)
    state, before = None, torch.zeros(5, 1, 3, 2)
    for t in range(4):
        seen = F.conv2d(
            torch.cat([before, embedded], 1),
            torch.cat([p.inlet.weight, p.beside.weight], 1),
            p.inlet.bias,
            padding=1,
        )
        h, state = p.lstm.step(seen, state)
        loc, log_scale = p.outlet(h).unbind(1)
        normal = torch.distributions.Normal(loc, log_scale.exp())
        total = total + normal.log_prob(x[:, t]).sum((1, 2))
        before = x[:, t : t + 1]
    torch.testing.assert_close(p.log_prob(x, context), total, rtol=0, atol=1e-10)


def test_a_channel_sees_those_before_it_alone(double):
    p = prior((4, 3, 3))
    x = torch.randn(1, 4, 3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda v: torch.stack(p.parameters_of(v)), x)
    reach = jacobian.abs().amax((0, 1, 3, 4, 5, 7, 8))  # channel of the parameter, channel of x
    assert bool((reach.triu() == 0).all())
    assert bool((reach.tril(-1)[1:].amax(1) > 1e-4).all())
    assert reach[3, 0] > 1e-8  # through the memory


def test_a_context_reaches_every_channel(double):
    p = prior((3, 2, 2), context_channels=2)
    x, context = torch.randn(1, 3, 2, 2), torch.randn(1, 2, 2, 2)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: torch.stack(p.parameters_of(x, v)), context
    )
    assert bool((jacobian.abs().amax((0, 1, 3, 4, 5, 6, 7, 8)) > 1e-6).all())


def test_mass_is_one_by_quadrature(double):
    p = prior((2, 1, 1), hidden_channels=3, num_layers=1)
    line = torch.linspace(-25, 25, 501)
    grid = torch.cartesian_prod(line, line).view(-1, 2, 1, 1)
    mass = sum(p.log_prob(part).exp().sum() for part in grid.split(60_000))
    assert mass.item() * (line[1] - line[0]).item() ** 2 == pytest.approx(1, abs=1e-6)


def test_draws_have_the_moments_of_the_density(double):
    p = prior((2, 1, 1), hidden_channels=3, num_layers=1)
    line = torch.linspace(-25, 25, 501)
    grid = torch.cartesian_prod(line, line).view(-1, 2, 1, 1)
    weight = torch.cat([p.log_prob(part).exp() for part in grid.split(60_000)])
    weight, points = weight / weight.sum(), grid.flatten(1)
    torch.manual_seed(0)
    draws = p.sample(40_000).flatten(1)
    features = (points[:, 0], points[:, 1], torch.tanh(points.prod(1)), points[:, 1] ** 2)
    drawn = (draws[:, 0], draws[:, 1], torch.tanh(draws.prod(1)), draws[:, 1] ** 2)
    for expected, found in zip(features, drawn, strict=True):
        error = (found.std() / len(found) ** 0.5).item()
        assert found.mean().item() == pytest.approx((weight * expected).sum().item(), abs=5 * error)


def test_it_begins_as_a_standard_normal(double):
    x = torch.randn(3, 4, 3, 2)
    start = ChannelAutoregressive((4, 3, 2), context_channels=2, hidden_channels=4)
    found = start.log_prob(x, torch.randn(3, 2, 3, 2))
    torch.testing.assert_close(found, StandardNormal((4, 3, 2)).log_prob(x))


def test_several_draws_a_row_have_their_own_context(double):
    p = prior((2, 2, 2), context_channels=1)
    context = torch.randn(3, 1, 2, 2)
    x, log_p = p.sample_and_log_prob(context=context, num_samples=4)
    assert x.shape == (12, 2, 2, 2)
    repeated = context.repeat(4, 1, 1, 1)
    torch.testing.assert_close(p.log_prob(x, repeated), log_p)
    other = p.log_prob(x, repeated.roll(1, 0))
    assert bool(((other - log_p).abs() > 1e-6).all())


def test_temperature_scales_the_noise(double):
    p = prior((2, 2, 2))
    torch.manual_seed(3)
    cold = p.sample(1, temperature=1e-9)
    loc, _ = p.parameters_of(cold)
    torch.testing.assert_close(cold, loc, rtol=0, atol=1e-6)


def test_a_larger_context_is_averaged(double):
    p = prior((2, 2, 2), context_channels=1)
    x, context = torch.randn(3, 2, 2, 2), torch.randn(3, 1, 4, 4)
    small = context.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    torch.testing.assert_close(p.log_prob(x, context), p.log_prob(x, small))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ChannelAutoregressive((4,)), r"expected an event \(C, H, W\), got \(4,\)"),
        (lambda: ChannelAutoregressive((4, 2, 2), -1), "expected context_channels >= 0"),
        (lambda: ChannelAutoregressive((4, 2, 2), 1, embed_kernel_size=4), "odd embed_kernel_size"),
        (
            lambda: prior((2, 2, 2), 1).log_prob(torch.zeros(3, 2, 2, 2), torch.zeros(3, 2, 2, 2)),
            r"expected a context of shape \(batch, 1, 2, 2\).*got \(3, 2, 2, 2\)",
        ),
        (
            lambda: prior((2, 2, 2), 1).log_prob(torch.zeros(3, 2, 2, 2), torch.zeros(3, 1, 3, 2)),
            r"or a multiple of that height and width, got \(3, 1, 3, 2\)",
        ),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# As the decoder of a slice ------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS)
def test_slice_with_the_prior_keeps_the_contract(check, double):
    torch.manual_seed(0)
    decoder = prior((2, 1, 2), context_channels=1, hidden_channels=3, num_layers=1)
    with torch.no_grad():
        decoder.outlet.weight.mul_(0.3)
    wide = DiagonalNormal((3, 1, 2), scale=1.8)
    example = Example(Slice(decoder, keep=1), wide.sample_and_log_prob, StandardNormal((1, 1, 2)))
    proof = CHECKS[check](example)
    assert proof.ok, proof.message


def test_it_compiles_as_one_graph(double):
    from surflow.proofs import compiles

    wide = DiagonalNormal((3, 2, 2), scale=1.5)
    example = Example(
        Slice(prior((2, 2, 2), 1), keep=1), wide.sample_and_log_prob, StandardNormal((1, 2, 2))
    )
    proof = compiles(example)
    assert proof.ok, proof.message


# The flows ---------------------------------------------------------------------------------------

SMALL = {"num_steps": 1, "hidden_channels": 4, "prior_hidden_channels": 3, "prior_layers": 1}
FLOWS = {
    "affine": lambda s: mar_scf(s, 8, num_scales=2, **SMALL),
    "mixture": lambda s: mar_scf(
        s, 8, num_scales=2, coupling="mixture", num_blocks=1, num_components=2, **SMALL
    ),
    "glow": lambda s: glow(
        s, 8, num_scales=2, num_steps=1, hidden_channels=4, prior="autoregressive"
    ),
    "pool": lambda s: pool_flow(
        s,
        autoregressive_slice,
        8,
        num_steps=1,
        mid_channels=4,
        depth=1,
        growth=2,
        dequantization="uniform",
    ),
}


def trained_like(flow, shape):
    """With its data-dependent layers set, and away from its start."""
    flow.train()
    with torch.no_grad():
        flow.log_prob(torch.randint(8, (64, *shape)))
    return perturbed(flow, 0.1)


@pytest.mark.parametrize("name", FLOWS)
def test_sampling_then_encoding_returns_the_latents(name, double):
    flow = trained_like(FLOWS[name]((1, 4, 4)), (1, 4, 4))
    layers = Sequential(list(flow.transforms)[1:])  # behind the dequantization
    z, log_p = flow.base.sample_and_log_prob(6)
    x, ldj = layers.inverse_and_ldj(z)
    back, again = layers(x)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-8)
    torch.testing.assert_close(again, ldj, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(flow.base.log_prob(back), log_p, rtol=1e-9, atol=1e-7)


def whitened(flow, x):
    """All standard normal noise behind a continuous x, (1, D): a bijection of x."""
    found = []
    for layer in list(flow.transforms)[1:]:
        if isinstance(layer, Slice):
            kept, rest = layer.cut(x)
            loc, log_scale = layer.decoder.parameters_of(rest, kept)
            found.append(((rest - loc) * torch.exp(-log_scale)).flatten(1))
            x = kept
        else:
            x = layer(x)[0]
    if isinstance(flow.base, ChannelAutoregressive):
        loc, log_scale = flow.base.parameters_of(x)
    else:
        loc, log_scale = flow.base.parameters_of(None)
    return torch.cat([*found, ((x - loc) * torch.exp(-log_scale)).flatten(1)], dim=1)


@pytest.mark.parametrize("name", FLOWS)
def test_density_is_the_change_of_variables(name, double):
    """log N(noise) + log |det d noise / dx| by autograd, the priors' normals included."""
    flow = trained_like(FLOWS[name]((1, 4, 4)), (1, 4, 4))
    y = 0.05 + 0.9 * torch.rand(1, 1, 4, 4)
    layers = Sequential(list(flow.transforms)[1:])
    z, ldj = layers(y)
    matrix = torch.autograd.functional.jacobian(lambda v: whitened(flow, v), y).reshape(16, 16)
    noise = whitened(flow, y)
    normal = -0.5 * noise.square().sum() - 8 * math.log(2 * math.pi)
    expected = normal + torch.linalg.slogdet(matrix)[1]
    assert (flow.base.log_prob(z) + ldj).item() == pytest.approx(expected.item(), abs=1e-7)


def test_images_of_any_size():
    """The authors' prior is tied to 32 x 32."""
    for shape in ((3, 16, 16), (1, 24, 8)):
        flow = mar_scf(shape, **SMALL)
        assert flow.sample(2).shape == (2, *shape)
        assert bool(flow.log_prob(torch.randint(256, (2, *shape))).isfinite().all())


def test_published_sizes():
    def count(flow):
        return sum(p.numel() for p in flow.parameters())

    glows, ours = count(glow()), count(mar_scf())
    assert round(ours / 1e6, 1) == 45.6
    # a prior of the authors' sizes: 5 -> 32 -> three layers of 32 -> 2, of two splits and the base
    layers = [3 * 2 * 32 * 128 * k * k + 3 * 128 for k in (5, 5, 3)]
    inlets = [c * 32 * k * k + 32 for c, k in ((5, 5), (5, 5), (1, 3))]
    outlets = [32 * 2 * 9 + 2] * 3
    embeds = [c * 32 * 25 + 32 + 32 * 4 * 25 + 4 for c in (6, 12)]
    glow_priors = [9 * c * 2 * c + 2 * c + 2 * c for c in (6, 12)] + [2 * 48]
    assert ours - glows == sum(layers + inlets + outlets + embeds) - sum(glow_priors)


def test_kernels_and_dilations_are_of_their_scales():
    flow = mar_scf((3, 16, 16), num_scales=3, **SMALL)
    found = [t.decoder for t in flow.transforms if isinstance(t, Slice)] + [flow.base]
    assert [p.lstm.inputs[0].kernel_size[0] for p in found] == [5, 5, 3]
    assert [p.lstm.inputs[0].dilation[0] for p in found] == [2, 1, 1]
    assert [p.context_channels for p in found] == [6, 12, 0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mar_scf((3, 8, 8), coupling="afine"), "model.coupling: .*did you mean 'affine'"),
        (lambda: mar_scf((3, 8, 8), prior="glow"), "model.prior: expected one of independent"),
        (lambda: mar_scf((3, 8, 8), prior_kernel_sizes=()), "prior_kernel_sizes"),
        (lambda: mar_scf((3, 12, 12)), "height and width divisible by 8, for 3 scales"),
        (lambda: mar_scf((3, 8)), r"model.shape: expected \(C, H, W\)"),
        (lambda: mar_scf((3, 8, 8), hidden_channels=0), "hidden_channels >= 1"),
        (lambda: glow((3, 8, 8), prior="conditionl"), "did you mean 'conditional'"),
    ],
)
def test_wrong_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# The net of mixture couplings --------------------------------------------------------------------


def test_attention_is_a_softmax_over_places(double):
    block = ConvAttentionBlock(8, num_heads=2).eval()
    h = torch.randn(2, 6, 8)
    q, k, v = (h + positions(2, 3, 8, h)).matmul(block.project.weight.T).chunk(3, dim=2)
    seen = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        score = torch.einsum("bic,bjc->bij", q[..., part], k[..., part]) / 2  # sqrt 4
        seen.append(score.softmax(2) @ v[..., part])
    gate = block.attention_gate(torch.cat(seen, 2))
    expected = gate[..., :8] * torch.sigmoid(gate[..., 8:])
    torch.testing.assert_close(block._attend(h, 2, 3), expected)


def test_positions_are_sinusoids(double):
    table = positions(2, 2, 5, torch.zeros(()))
    assert table.shape == (4, 5)
    assert table[3].tolist() == pytest.approx(
        [math.sin(3), math.sin(3e-4), math.cos(3), math.cos(3e-4), 0]
    )


def test_dropout_is_of_training_alone():
    net = perturbed(ConvAttentionNet(2, 3, 8, num_blocks=1, dropout=0.5))
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"mid_channels": 6}, "heads that divide"), ({"dropout": 1.0}, "dropout in")],
)
def test_net_says_what_it_takes(settings, said):
    with pytest.raises(ValueError, match=said):
        ConvAttentionNet(2, 3, **settings)


def test_uniform_base_of_dequantized_images_is_scored_as_before(double):
    """A flow without steps and with independent normals: the density in closed form."""
    flow = mar_scf((1, 2, 2), 8, num_scales=1, num_steps=0, prior="independent")
    y = Uniform((1, 2, 2)).sample(5)
    z, ldj = Sequential(list(flow.transforms)[1:])(y)
    expected = StandardNormal((4,)).log_prob(y.flatten(1) - 0.5)
    torch.testing.assert_close(flow.base.log_prob(z) + ldj, expected)


@pytest.mark.parametrize("context_channels", [0, 2])
def test_noise_and_images_undo_each_other(context_channels, double):
    p = prior((5, 3, 3), context_channels)
    x = torch.randn(4, 5, 3, 3)
    context = torch.randn(4, context_channels, 3, 3) if context_channels else None
    noise = p.standardised(x, context)
    torch.testing.assert_close(p.from_standardised(noise, context), x, rtol=0, atol=1e-10)
    log_scale = p.parameters_of(x, context)[1].flatten(1).sum(1)
    expected = StandardNormal((5, 3, 3)).log_prob(noise) - log_scale
    torch.testing.assert_close(p.log_prob(x, context), expected)


def test_latents_of_the_prior_are_its_noise(double):
    """An interpolation walks through standard normal noise, and comes back to the images."""
    flow = trained_like(FLOWS["affine"]((1, 8, 8)), (1, 8, 8))
    x = torch.randint(8, (3, 1, 8, 8))
    latents = all_latents(flow, x)
    assert [latent.normal for latent in latents] == [True, True]
    assert torch.equal(from_latents(flow, latents), x)
