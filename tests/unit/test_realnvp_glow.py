"""RealNVP and Glow: their likelihood by hand, and the ways between images."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from surflow.distributions import (
    Categorical,
    DiagonalNormal,
    Exponential,
    StandardNormal,
    Uniform,
)
from surflow.flow import Flow
from surflow.latents import Latent
from surflow.models import all_latents, from_latents, glow, latent_interpolation, pool_flow, realnvp
from surflow.models.downsampling import conditional_slice, max_pool, slice_off
from surflow.models.interpolation import path_weights
from surflow.models.realnvp import diagonal_first
from surflow.nets import (
    MLP,
    GlowNet,
    ResNet,
    StandardisedConv2d,
    TanhScale,
    WeightNormConv2d,
    ZeroConv2d,
)
from surflow.objectives import elbo
from surflow.training.module import FlowModule
from surflow.transforms import (
    VAE,
    AbsInference,
    ActNorm,
    Affine,
    AffineCoupling,
    BatchNorm,
    Coupling,
    Dequantization,
    MaxInference,
    MaxPool2d,
    Permute,
    Rounding,
    Sequential,
    Slice,
    Squeeze,
)

LEVELS = 8


def build_realnvp(shape=(1, 4, 4), norm="batch_norm", scales=2):
    return realnvp(shape, LEVELS, num_scales=scales, mid_channels=3, num_blocks=1, norm=norm)


def build_glow(shape=(1, 4, 4), scales=2, standardise=True, parametrisation="plu"):
    return glow(
        shape,
        LEVELS,
        num_scales=scales,
        num_steps=2,
        hidden_channels=4,
        parametrisation=parametrisation,
        standardise=standardise,
    )


BUILD = {
    "realnvp": build_realnvp,
    "realnvp-actnorm": lambda *a, **k: build_realnvp(*a, norm="actnorm", **k),
    "glow": build_glow,
    "glow-plain": lambda *a, **k: build_glow(*a, standardise=False, parametrisation="full", **k),
}
each = pytest.mark.parametrize("name", BUILD)


def images(n=3, shape=(1, 4, 4), levels=LEVELS):
    return torch.randint(levels, (n, *shape))


def perturbed(flow, scale=0.2):
    """Away from its start, with running statistics of its own, in evaluation mode."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn_like(p))
        for module in flow.modules():
            if isinstance(module, BatchNorm | torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 1.5)
    return flow.eval()


def normal(x, loc=0.0, log_scale=0.0):
    """Summed log-density of normals, by the formula."""
    loc, log_scale = torch.as_tensor(loc), torch.as_tensor(log_scale)
    parts = -0.5 * ((x - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)
    return parts.sum()


# The likelihood ----------------------------------------------------------------------------------


def pieces(flow, y):
    """The latents of one y in [0, 1), cut-off parts as they are: [(value, layer it came from)]."""
    found, x = [], y.unsqueeze(0)
    for layer in list(flow.transforms)[1:]:
        if isinstance(layer, Slice):
            kept, rest = x[:, : layer.keep], x[:, layer.keep :]
            found.append((rest, layer, kept))
            x = kept
        else:
            x = layer(x)[0]
    return [*found, (x, flow.base, None)]


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 4)])
@each
def test_log_prob_is_the_change_of_variables(name, shape, double):
    flow = perturbed(BUILD[name](shape))
    y = torch.rand(shape) * 0.9 + 0.05  # dequantized
    size = math.prod(shape)

    def all_values(v):
        return torch.cat([part.flatten() for part, *_ in pieces(flow, v.view(shape))])

    jacobian = torch.autograd.functional.jacobian(all_values, y.flatten())
    assert jacobian.shape == (size, size)
    by_hand = torch.linalg.slogdet(jacobian)[1]
    for value, layer, kept in pieces(flow, y):
        if isinstance(layer, Slice):
            net = layer.decoder.net
            if net is None:
                by_hand = by_hand + normal(value)
            else:  # the split prior: a convolution of what is kept, times exp(3 l)
                out = F.conv2d(kept, net.weight, net.bias, padding=1)
                out = out * torch.exp(3 * net.log_gain).view(1, -1, 1, 1)
                by_hand = by_hand + normal(value, out[:, 0::2], out[:, 1::2])
        elif isinstance(layer, StandardNormal):
            by_hand = by_hand + normal(value)
        else:
            by_hand = by_hand + normal(value, layer.loc, layer.log_scale.expand_as(value[0]))
    rest = Flow(flow.base, list(flow.transforms)[1:])
    torch.testing.assert_close(rest.log_prob(y.unsqueeze(0))[0], by_hand, atol=1e-8, rtol=1e-9)
    # every latent depends on several pixels, and every pixel reaches the latents
    assert (jacobian.abs() > 1e-9).any(0).all()
    assert ((jacobian.abs() > 1e-9).sum(1) > 1).all()


@each
def test_dequantization_is_a_shift_by_log_levels(name, double):
    """A draw of the bound is the density at the cell's point it drew, less D log K."""
    flow = perturbed(BUILD[name]())
    x = images(4)
    torch.manual_seed(5)
    bound = flow.log_prob(x)
    torch.manual_seed(5)
    y = flow.transforms[0](x)[0]
    assert torch.equal((y * LEVELS).floor().long(), x)
    density = Flow(flow.base, list(flow.transforms)[1:]).log_prob(y)
    torch.testing.assert_close(bound, density - 16 * math.log(LEVELS))
    assert flow.lower_bound


@pytest.mark.parametrize("name", ["realnvp", "realnvp-actnorm"])
def test_every_pixel_takes_its_turn(name):
    """Each group of couplings, by checkerboard or by channels, transforms every place."""
    flow = perturbed(BUILD[name]((2, 8, 8), scales=3))
    x = torch.rand(1, 2, 8, 8) * 0.8 + 0.1
    changed, groups = None, 0
    for layer in [*list(flow.transforms)[1:], None]:
        if layer is None or isinstance(layer, Squeeze | Permute):
            assert (changed == 1).all()
            changed, groups = None, groups + 1
        if layer is None:
            break
        z = layer(x)[0]
        if isinstance(layer, Coupling):
            now = (z != x).float()
            assert now.mean() == 0.5
            changed = now if changed is None else torch.maximum(changed, now)
        x = z
    assert groups == 2 + 2 + 1


def test_couplings_of_a_scale_of_realnvp():
    """3 checkerboards that alternate, 3 halves that alternate; 4 checkerboards at the end."""
    flow = realnvp((3, 8, 8), num_scales=2, mid_channels=4, num_blocks=1)
    kinds = []
    for layer in flow.transforms:
        if isinstance(layer, AffineCoupling):
            if layer.mask is None:
                kinds.append(("channels", layer.swap))
            else:
                assert torch.equal(layer.net.net.mask, layer.mask.float())
                kinds.append(("board", bool(layer.mask[0, 0, 0])))
    boards = [("board", True), ("board", False), ("board", True)]
    channels = [("channels", False), ("channels", True), ("channels", False)]
    assert kinds == [*boards, *channels, *boards, ("board", False)]
    widths = [
        layer.net.net.inlet.out_channels
        for layer in flow.transforms
        if isinstance(layer, AffineCoupling)
    ]
    assert widths == [4] * 3 + [8] * 3 + [8] * 4


def test_what_is_factored_out_lies_evenly_over_the_image():
    """Squeezed, one half of the channels is one colour of a checkerboard, in every colour plane."""
    where = torch.arange(2 * 4 * 4).view(1, 2, 4, 4).float()
    squeezed = diagonal_first(2)(Squeeze()(where)[0])[0]
    kept = squeezed[:, :4].flatten().long().sort().values
    row, column = kept // 4 % 4, kept % 4
    assert ((row + column) % 2 == 0).all()
    assert (kept < 16).sum() == 8  # half of the first colour plane, half of the second


@each
def test_bijective_part_undoes_itself(name, double):
    flow = perturbed(BUILD[name]((3, 8, 8), scales=3))
    for stretch in stretches(flow):
        x = torch.rand(2, *stretch.in_shape) * 0.9 + 0.05
        z, ldj = stretch(x)
        torch.testing.assert_close(stretch.inverse(z), x, atol=1e-8, rtol=1e-7)
        torch.testing.assert_close(stretch.inverse_and_ldj(z)[1], ldj, atol=1e-7, rtol=1e-7)


def stretches(flow):
    """The bijections between two surjections, as sequences that know the shape they take."""
    shape = next(t.event_shape for t in flow.transforms if t.event_shape is not None)
    run = []
    for layer in [*list(flow.transforms)[1:], None]:
        if layer is None or isinstance(layer, Slice):
            sequence = Sequential(run)
            sequence.in_shape = shape
            yield sequence
            if layer is not None:
                shape, run = layer.latent_shape, []
        else:
            run.append(layer)


# The start ---------------------------------------------------------------------------------------


def test_realnvp_starts_as_a_logit_normal(double):
    flow = realnvp((1, 4, 4), LEVELS, mid_channels=3, num_blocks=1, norm="actnorm").eval()
    y = torch.rand(2, 1, 4, 4)
    p = 0.05 + 0.9 * y
    z = p.log() - (1 - p).log()
    log_density = torch.stack([normal(row) for row in z])
    log_density = log_density + (math.log(0.9) - p.log() - (1 - p).log()).flatten(1).sum(1)
    got = Flow(flow.base, list(flow.transforms)[1:]).log_prob(y)
    torch.testing.assert_close(got, log_density)


def test_glow_starts_as_a_rotated_normal(double):
    flow = build_glow((2, 4, 4)).eval()
    y = torch.rand(3, 2, 4, 4)
    # couplings scale half of the channels by sigmoid(2) + 0.001; the rest keeps the volume
    dims = [8 * 4, 16]  # of the latent at each scale: (8, 2, 2), (16, 1, 1)
    volume = 2 * sum(d / 2 for d in dims) * math.log(torch.sigmoid(torch.tensor(2.0)) + 1e-3)
    values = [part for part, *_ in (p for row in y for p in pieces(flow, row))]
    by_hand = torch.stack(
        [normal(a) + normal(b) for a, b in zip(values[::2], values[1::2], strict=True)]
    )
    got = Flow(flow.base, list(flow.transforms)[1:]).log_prob(y)
    torch.testing.assert_close(got, by_hand + volume)


@each
def test_initialisation_by_the_first_batch(name):
    """Through the module, as training does it: what should be standardised is, and it stays."""
    flow = BUILD[name]((3, 8, 8))
    module = FlowModule(flow, torch.optim.Adam, None)
    x = images(64, (3, 8, 8))
    module.initialise(x)
    normalised = [m for m in flow.modules() if isinstance(m, ActNorm | StandardisedConv2d)]
    assert all(m.initialised for m in normalised)
    assert (
        len(normalised)
        == {
            "realnvp": 0,
            "realnvp-actnorm": 10,
            "glow": 4 + 8,
            "glow-plain": 4,
        }[name]
    )
    if not name.startswith("glow"):
        return
    flow.eval()
    torch.manual_seed(0)
    seen = {}
    hooks = [m.register_forward_hook(lambda m, _, out: seen.update({m: out})) for m in normalised]
    flow.log_prob(x)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(normalised)
    for out in seen.values():
        out = out[0] if isinstance(out, tuple) else out
        std, mean = torch.std_mean(out, (0, 2, 3))
        # other dequantization noise than the initialising one
        assert mean.abs().max() < 0.2
        assert (std - 1).abs().max() < 0.3
    state = {k: v.clone() for k, v in flow.state_dict().items()}
    again = BUILD[name]((3, 8, 8))
    again.load_state_dict(state)
    again.train().log_prob(x)
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


@each
def test_training_reaches_every_parameter(name):
    flow = BUILD[name]((3, 8, 8))
    flow.train()
    x = images(16, (3, 8, 8))
    with torch.no_grad():
        flow.log_prob(x)
    optimizer = torch.optim.Adamax(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = -elbo(flow, x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for key, p in flow.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        assert p.grad.abs().sum() > 0, key
    assert losses[-1] < losses[0] - 1


@each
def test_bfloat16_nets_with_float32_likelihoods(name):
    flow = perturbed(BUILD[name]((3, 8, 8)), 0.05)
    x = images(4, (3, 8, 8))
    torch.manual_seed(1)
    exact = flow.log_prob(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        z, ldj = flow.transforms(x)
        low = flow.base.log_prob(z) + ldj
    assert z.dtype == ldj.dtype == low.dtype == torch.float32
    assert not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, atol=0.02 * 192, rtol=0)


def whole_realnvp():
    return build_realnvp()


def begin_of_realnvp():
    """As far as two couplings with their normalisation."""
    return Flow(StandardNormal((1, 4, 4)), list(build_realnvp().transforms)[:7])


def short_glow():
    return glow((1, 4, 4), LEVELS, num_scales=2, num_steps=1, hidden_channels=4)


@pytest.mark.parametrize(
    "build",
    [begin_of_realnvp, short_glow, pytest.param(whole_realnvp, marks=pytest.mark.slow)],
)
def test_compiles_whole_in_training(build):
    """Forward and gradients in one graph, equal to the eager ones."""
    flow = perturbed(build(), 0.05).train()
    for m in flow.modules():
        if isinstance(m, ActNorm | StandardisedConv2d):
            m.initialised.fill_(True)
            m._initialised = True
    x = images(5)
    state = {k: v.clone() for k, v in flow.state_dict().items()}

    def run(function):
        flow.load_state_dict(state)
        flow.zero_grad()
        torch.manual_seed(3)
        loss = function(x)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in flow.parameters()]

    def loss(x):
        return -elbo(flow, x).mean()

    eager, gradients = run(loss)
    compiled, others = run(torch.compile(loss, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(others, gradients, rtol=1e-3, atol=1e-3)


@each
def test_samples_and_their_temperature(name):
    flow = perturbed(BUILD[name]((3, 8, 8)), 0.05)
    x = flow.sample(6)
    assert x.shape == (6, 3, 8, 8) and x.dtype == torch.int64
    assert x.min() >= 0 and x.max() < LEVELS
    cool, warm = (flow.sample(64, temperature=t).double() for t in (0.01, 3.0))
    assert warm.std(0).mean() > cool.std(0).mean()


def test_sizes_of_the_published_configurations():
    """As the docstrings state them; counted layer by layer, for Glow."""

    def count(flow):
        return sum(p.numel() for p in flow.parameters())

    def glow_by_formula(c, scales, steps, width):
        total = 0
        for scale in range(scales):
            c *= 4
            net = 9 * c // 2 * width + width**2 + 9 * width * c + 2 * 2 * width + 2 * c
            linear = 2 * c**2 + c  # L, U and s; the triangles' other halves have no effect
            total += steps * (net + linear + 2 * c)
            if scale < scales - 1:
                c //= 2
                total += 9 * c * 2 * c + 2 * 2 * c
        return total + 2 * c

    small = glow((3, 8, 8), num_scales=3, num_steps=2, hidden_channels=16)
    assert count(small) == glow_by_formula(3, 3, 2, 16)
    assert round(glow_by_formula(3, 3, 32, 512) / 1e6, 1) == 44.2
    assert round(glow_by_formula(3, 3, 48, 512) / 1e6, 1) == 66.2
    assert round(glow_by_formula(3, 4, 48, 512) / 1e6, 1) == 111.7
    assert round(count(realnvp()) / 1e6, 1) == 19.6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: realnvp((3, 8)), "expected (C, H, W), got (3, 8)"),
        (lambda: realnvp((3, 6, 6), num_scales=3), "divisible by 4, for 3 scales, got 6 x 6"),
        (lambda: realnvp((3, 8, 8), alpha=0.5), "model.alpha: expected a number in (0, 0.5)"),
        (lambda: realnvp((3, 8, 8), norm="batchnorm"), "did you mean 'batch_norm'?"),
        (lambda: realnvp((3, 8, 8), num_blocks=0), "num_blocks >= 1"),
        (lambda: glow((3, 8)), "expected (C, H, W), got (3, 8)"),
        (lambda: glow((3, 12, 12)), "divisible by 8, for 3 scales, got 12 x 12"),
        (lambda: glow((3, 8, 8), num_levels=1), "num_levels >= 2"),
        (lambda: glow((3, 8, 8), 256, 1, 1, 4, "lu"), "parametrisation to be one of full, plu"),
        (lambda: ResNet(3, 6, num_blocks=0), "ResNet: expected positive sizes"),
        (lambda: GlowNet(0, 6), "GlowNet: expected positive sizes"),
    ],
)
def test_wrong_sizes(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)


# Nets --------------------------------------------------------------------------------------------


def test_weight_norm_sets_the_length_of_a_filter():
    conv = WeightNormConv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    before = conv(x)
    torch.testing.assert_close(before, F.conv2d(x, conv.weight, padding=1))
    with torch.no_grad():
        conv.weight.mul_(7.0)  # its length has no effect
    torch.testing.assert_close(conv(x), before)
    with torch.no_grad():
        conv.gain.fill_(2.0)
    torch.testing.assert_close(conv.filters().flatten(1).norm(dim=1), torch.full((4,), 2.0))


def test_standardised_convolution_is_shift_and_scale_behind_it():
    conv = StandardisedConv2d(2, 3, 3).eval()
    with torch.no_grad():
        conv.shift.copy_(torch.tensor([1.0, -2.0, 0.5]))
        conv.log_scale.copy_(torch.tensor([0.3, -0.4, 0.0]))
    x = torch.randn(4, 2, 5, 5)
    plain = F.conv2d(x, conv.weight, padding=1)
    expected = (plain - conv.shift.view(-1, 1, 1)) / conv.log_scale.exp().view(-1, 1, 1)
    torch.testing.assert_close(conv(x), expected)
    with pytest.raises(ValueError, match="at least 2 values a channel"):
        StandardisedConv2d(2, 3, 3)(torch.randn(1, 2, 1, 1))


def test_zero_convolution_times_its_gain():
    conv = ZeroConv2d(2, 3)
    x = torch.randn(4, 2, 5, 5)
    assert (conv(x) == 0).all()
    with torch.no_grad():
        for p in conv.parameters():
            p.normal_()
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1) * (3 * conv.log_gain).exp().view(
        -1, 1, 1
    )
    torch.testing.assert_close(conv(x), expected)


def test_bounded_log_scales():
    net = TanhScale(MLP(3, 8, [4]), 4)
    with torch.no_grad():
        net.factor.copy_(torch.tensor([0.5, 1.0, 2.0, 0.0]))
    x = 50 * torch.randn(6, 3)
    raw, out = net.net(x), net(x)
    torch.testing.assert_close(out[:, 1::2], raw[:, 1::2])
    torch.testing.assert_close(out[:, 0::2], net.factor * torch.tanh(raw[:, 0::2]))
    assert (out[:, 0::2].abs() <= net.factor).all()


def test_residual_net_sees_the_mask_and_both_signs():
    mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    net = ResNet(1, 2, 4, 1, batch_norm=False, mask=mask).eval()
    x = torch.randn(1, 1, 2, 2)
    assert not torch.allclose(net(x), net(-x))
    other = ResNet(1, 2, 4, 1, batch_norm=False, mask=1 - mask).eval()
    other.load_state_dict(net.state_dict())
    assert not torch.allclose(net(x), other(x))


# Latents and the way between images --------------------------------------------------------------


def small_pool_flow(between, dequantization="uniform"):
    return pool_flow(
        (3, 8, 8),
        between,
        LEVELS,
        num_scales=2,
        num_steps=1,
        mid_channels=4,
        depth=1,
        growth=2,
        dequantization=dequantization,
        dequant_steps=1,
        context_channels=2,
    )


def vae_of_images():
    encoder = DiagonalNormal(4, net=torch.nn.Sequential(torch.nn.Flatten(), MLP(12, 8, [6])))
    unflat = torch.nn.Unflatten(1, (6, 2, 2))
    decoder = DiagonalNormal((3, 2, 2), net=torch.nn.Sequential(MLP(4, 24, [6]), unflat))
    return Flow(StandardNormal(4), [Dequantization(LEVELS), VAE(encoder, decoder)])


FLOWS = {
    "realnvp": lambda: build_realnvp((3, 8, 8), scales=3),
    "glow": lambda: build_glow((3, 8, 8), scales=3),
    "slice": lambda: small_pool_flow(slice_off),
    "conditional_slice": lambda: small_pool_flow(conditional_slice, "variational"),
    "max_pool": lambda: small_pool_flow(max_pool),
    "learned_max_pool": lambda: small_pool_flow(partial(max_pool, learn=True), "variational"),
    "vae": vae_of_images,
}
flows = pytest.mark.parametrize("name", FLOWS)


def two_ends(name, n=4):
    flow = perturbed(FLOWS[name](), 0.1)
    shape = (3, 2, 2) if name == "vae" else (3, 8, 8)
    return flow, images(n, shape), images(n, shape)


@pytest.mark.parametrize("path", ["spherical", "linear"])
@flows
def test_ends_are_the_images(name, path):
    flow, a, b = two_ends(name)
    way = latent_interpolation(flow, a, b, steps=5, path=path)
    assert way.shape == (4, 5, *a.shape[1:]) and way.dtype == torch.int64
    assert torch.equal(way[:, 0], a)
    assert torch.equal(way[:, -1], b)
    assert not torch.equal(way[:, 1], way[:, 0]) and not torch.equal(way[:, 2], way[:, -1])
    assert way.min() >= 0 and way.max() < LEVELS


@flows
def test_latents_say_everything(name):
    flow, x, _ = two_ends(name)
    latents = all_latents(flow, x, seed=3)
    assert torch.equal(from_latents(flow, latents), x)
    if name in ("realnvp", "glow", "slice", "conditional_slice"):
        assert sum(one.value[0].numel() for one in latents) == 192  # no more than there are
        assert all(one.normal for one in latents)
    again = all_latents(flow, x, seed=3)
    assert all(torch.equal(p.value, q.value) for p, q in zip(latents, again, strict=True))
    other = all_latents(flow, x, seed=4)
    assert not torch.equal(latents[-1].value, other[-1].value)
    # it generates from nothing but the latents
    torch.manual_seed(0)
    one = from_latents(flow, latents)
    torch.manual_seed(1)
    assert torch.equal(from_latents(flow, latents), one)


@flows
def test_each_latent_has_an_effect(name):
    """None is there for nothing: also those cut off early change the image."""
    flow, x, _ = two_ends(name)
    latents = all_latents(flow, x)
    for i, one in enumerate(latents):
        moved = list(latents)
        moved[i] = Latent(one.value.flip(0), one.normal, one.layer)
        assert not torch.equal(from_latents(flow, moved), x), one.layer


def test_latents_of_normal_densities_are_their_noise(double):
    """Those of samples are independent standard normals, also where the prior is conditional."""
    flow = perturbed(build_glow((2, 4, 4)), 0.1)
    z = flow.base.sample(4000)
    y = Sequential(list(flow.transforms)[1:]).inverse(z)
    rest = Flow(flow.base, list(flow.transforms)[1:])
    latents = all_latents(rest, y)
    assert [one.layer.split(".")[-1] for one in latents] == ["Slice", "base"]
    value = torch.cat([one.value.flatten(1) for one in latents], 1)
    assert value.shape == (4000, 32)
    assert value.mean(0).abs().max() < 4.5 / 4000**0.5
    torch.testing.assert_close(value.T.cov(), torch.eye(32), atol=0.11, rtol=0)
    # and by the formula
    expected = (z - flow.base.loc) / flow.base.log_scale.exp()
    torch.testing.assert_close(latents[-1].value, expected, atol=1e-7, rtol=1e-6)


def test_race_elects_the_place_of_the_max(double):
    """Given its winner, noise that is Gumbel again when the winners are drawn as the layer does."""
    logits = torch.tensor([0.5, -0.3, 0.1, -0.6])
    layer = MaxInference((4,), Exponential((3,), 1.0), learn=True)
    with torch.no_grad():
        layer.logits.copy_(logits)
    flow = Flow(StandardNormal(1), layer)
    x = flow.sample(40_000)
    noise, remainders, _ = (one.value for one in all_latents(flow, x, seed=7))
    log_p = logits.log_softmax(0)
    assert torch.equal((noise + log_p).argmax(1), x.argmax(1))
    assert remainders.min() >= 0
    # standard Gumbel: mean 0.5772, variance pi^2 / 6, and independent
    error = math.pi / 6**0.5 / 200
    assert (noise.mean(0) - 0.57721566).abs().max() < 4.5 * error
    torch.testing.assert_close(noise.T.cov(), torch.eye(4) * math.pi**2 / 6, atol=0.08, rtol=0)


def test_great_circle(double):
    """One angle for all normal latents together, and a length from one end's to the other's."""
    a = [Latent(torch.randn(3, 2, 2), True, "a"), Latent(torch.randn(3, 5), True, "base")]
    b = [Latent(2 * torch.randn(3, 2, 2), True, "a"), Latent(torch.randn(3, 5), True, "base")]
    t = torch.linspace(0, 1, 7)
    w0, w1 = path_weights(a, b, t)
    assert torch.equal(w0[:, 0], torch.ones(3)) and torch.equal(w1[:, 0], torch.zeros(3))
    assert torch.equal(w0[:, -1], torch.zeros(3))
    torch.testing.assert_close(w1[:, -1], torch.ones(3), atol=1e-15, rtol=0)
    ends = [torch.cat([p.value.flatten(1) for p in s], 1) for s in (a, b)]
    points = w0.unsqueeze(2) * ends[0].unsqueeze(1) + w1.unsqueeze(2) * ends[1].unsqueeze(1)
    lengths = torch.stack([end.norm(dim=1) for end in ends], 1)
    expected = lengths[:, :1] * (1 - t) + lengths[:, 1:] * t
    torch.testing.assert_close(points.norm(dim=2), expected)
    unit = points / points.norm(dim=2, keepdim=True)
    steps = (unit[:, 1:] * unit[:, :-1]).sum(2).acos()
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps))  # at constant speed
    whole = (unit[:, 0] * unit[:, -1]).sum(1).acos()
    torch.testing.assert_close(steps.sum(1), whole)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ends_in_one_direction_take_the_line(sign, double):
    a = [Latent(torch.tensor([[1.0, 2.0]]), True, "base")]
    b = [Latent(sign * torch.tensor([[2.0, 4.0]]), True, "base")]
    w0, w1 = path_weights(a, b, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(w0, torch.tensor([[1.0, 0.75, 0.0]]))
    torch.testing.assert_close(w1, torch.tensor([[0.0, 0.25, 1.0]]))


def test_linear_way_is_linear_in_the_latents(double):
    flow = perturbed(build_glow((2, 4, 4)), 0.2)
    rest = Flow(flow.base, list(flow.transforms)[1:])
    a, b = torch.rand(2, 2, 4, 4), torch.rand(2, 2, 4, 4)
    way = latent_interpolation(rest, a, b, steps=4, path="linear")
    for i, t in enumerate((0, 1 / 3, 2 / 3, 1)):
        found = all_latents(rest, way[:, i])
        ends = all_latents(rest, a), all_latents(rest, b)
        for one, first, second in zip(found, *ends, strict=True):
            expected = (1 - t) * first.value + t * second.value
            torch.testing.assert_close(one.value, expected, atol=1e-6, rtol=1e-6)


def test_flow_is_left_as_it_was():
    flow = build_glow((3, 8, 8)).train()
    with torch.no_grad():
        flow.log_prob(images(8, (3, 8, 8)))
    state = {k: v.clone() for k, v in flow.state_dict().items()}
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    black = torch.zeros(1, 3, 8, 8, dtype=torch.int64)
    latent_interpolation(flow, black, black + LEVELS - 1)
    assert torch.equal(torch.rand(3), expected)
    assert flow.training
    assert all(torch.equal(v, state[k]) for k, v in flow.state_dict().items())


@pytest.mark.parametrize(
    ("flow", "x", "message"),
    [
        (Flow(StandardNormal(2), [Affine(2), AbsInference(2)]), torch.ones(1, 2), "1.AbsInference"),
        (Flow(Categorical((2,), 4), Rounding(4)), torch.rand(1, 2), "0.Rounding draws"),
        (
            Flow(StandardNormal(2), AffineCoupling(MLP(1, 2, [4], context_features=2))),
            torch.ones(1, 2),
            "expected a flow without a context",
        ),
    ],
)
def test_layers_of_which_nothing_can_be_kept(flow, x, message):
    with pytest.raises(ValueError) as error:
        latent_interpolation(flow, x, x)
    assert message in str(error.value)


def test_wrong_arguments_of_a_way():
    flow = Flow(Uniform(2))
    x = torch.rand(2, 2)
    with pytest.raises(ValueError, match="two batches of one shape"):
        latent_interpolation(flow, x, x[:1])
    with pytest.raises(ValueError, match="steps >= 2, got 1"):
        latent_interpolation(flow, x, x, steps=1)
    with pytest.raises(ValueError, match="did you mean 'spherical'"):
        latent_interpolation(flow, x, x, path="sphericl")
    # no normal latents: a line either way
    way = latent_interpolation(flow, x, x.flip(0), steps=3)
    torch.testing.assert_close(way[:, 1], x.mean(0, keepdim=True).expand(2, -1))


def test_ends_hold_where_float32_does_not_suffice():
    """A shift by 10,000 costs a quarter of a level in float32; one by 10^13 the same in float64."""
    x = images(8, (3, 4, 4), 256)
    flow = Flow(StandardNormal((3, 4, 4)), [Dequantization(256), Affine((3, 4, 4), shift=1e4)])
    assert not torch.equal(from_latents(flow, all_latents(flow, x)), x)
    way = latent_interpolation(flow, x, x.flip(0), steps=3)
    assert torch.equal(way[:, 0], x) and torch.equal(way[:, -1], x.flip(0))
    assert flow.base.loc.dtype == torch.float32
    flow = Flow(StandardNormal((3, 4, 4)), [Dequantization(256), Affine((3, 4, 4), shift=1e13)])
    with pytest.raises(ValueError, match="gives integer data back from its latents"):
        latent_interpolation(flow, x, x.flip(0), steps=3)


def test_max_pool_alone_keeps_what_it_forgets():
    flow = Flow(StandardNormal((1, 2, 2)), MaxPool2d((1, 4, 4)))
    x = torch.randn(5, 1, 4, 4)
    way = latent_interpolation(flow, x, x.flip(0), steps=6)
    torch.testing.assert_close(way[:, 0], x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(way[:, -1], x.flip(0), atol=1e-6, rtol=1e-6)
