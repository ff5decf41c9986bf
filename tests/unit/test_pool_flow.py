"""PoolFlow: the architecture, and the conversion of official weights."""

import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles import with_noise
from reference import reference_configuration
from safetensors.torch import save_file

from surflow.distributions import Exponential, HalfNormal, StandardNormal
from surflow.errors import UserError
from surflow.flow import Flow
from surflow.models.downsampling import (
    autoregressive_slice,
    conditional_slice,
    max_pool,
    slice_off,
)
from surflow.models.official import (
    convert_official,
    load_official,
    official_configuration,
    official_constants,
    official_flow,
    official_names,
    read_tensors,
)
from surflow.models.pool_flow import coupling_steps, flow_noise, pool_flow
from surflow.nets import DenseBlock, DenseLayer, DenseNet, GatedConv2d, ImageEmbedding
from surflow.transforms import MaxPool2d, Sequential, Slice, Squeeze

OWN = Path(__file__).parents[1] / "fixtures" / "reference"
SMALL = dict(num_steps=1, mid_channels=8, depth=2, growth=4, dequant_steps=1, context_channels=3)


def perturbed(flow, scale=0.05):
    """Away from its start, so that every parameter matters."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn_like(p))
    return flow.eval()


def images(n=3, shape=(3, 8, 8), levels=256):
    return torch.randint(levels, (n, *shape))


# Conversion --------------------------------------------------------------------------------------


def as_official(flow):
    """The state dict that the authors' model of the same configuration would have."""
    own = flow.state_dict()
    state = {}
    for name, ours in official_names(flow).items():
        value = own[ours].clone()
        if name.endswith(("shift", "log_scale")) and value.dim() == 1:
            value = value.view(1, -1, 1, 1)
        elif value.dim() == 3:
            value = value.unsqueeze(0)
        state[name] = value
    for name, value in official_constants(flow).items():
        state[name] = torch.tensor(0.0 if value is None else value)
    return state


VARIANTS = {
    "uniform": dict(dequantization="uniform"),
    "actnorm": dict(actnorm=True),
    "ungated": dict(gated=False),
    "three_scales": dict(num_scales=3, shape=(3, 16, 16)),
    "three_scales_slice": dict(num_scales=3, shape=(3, 16, 16), downsampling=slice_off),
    "five_bits": dict(num_levels=32),
    "wide_grey": dict(shape=(1, 4, 8), num_blocks=2),
    "all": dict(actnorm=True, gated=False, num_scales=3, shape=(2, 8, 16), downsampling=slice_off),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_state_dict_goes_there_and_back(variant):
    config = dict(shape=(3, 8, 8), **SMALL) | VARIANTS[variant]
    flow = perturbed(pool_flow(**config))
    state = as_official(flow)
    for name in state:
        if name.endswith("initialized"):
            state[name] = torch.ones(1)
    again = official_flow(state, config["shape"][1:])
    found = official_configuration(state, config["shape"][1:])
    assert {k: found[k] for k in config if k in found} == {
        k: v for k, v in config.items() if k in found
    }
    x = images(2, config["shape"], config.get("num_levels", 256))
    torch.manual_seed(1)
    expected = flow.log_prob(x)
    torch.manual_seed(1)
    assert torch.equal(again.log_prob(x), expected)
    if config.get("actnorm"):
        assert all(m._initialised for m in again.modules() if hasattr(m, "_initialised"))


def test_the_place_of_a_layer_in_the_official_names_with_actnorm():
    flow = pool_flow((3, 8, 8), actnorm=True, dequantization="uniform", **SMALL)
    names = official_names(flow)
    roots = sorted({tuple(n.split(".")[:3]) for n in names if n.startswith("transforms")})
    assert roots == [
        ("transforms", "10", "log_scale"),
        ("transforms", "10", "shift"),
        ("transforms", "3", "log_scale"),
        ("transforms", "3", "shift"),
        ("transforms", "4", "weight"),
        ("transforms", "5", "coupling_net"),
        ("transforms", "7", "log_scale"),
        ("transforms", "7", "shift"),
        ("transforms", "8", "weight"),
        ("transforms", "9", "coupling_net"),
    ]
    ungated = official_names(pool_flow((3, 8, 8), gated=False, **SMALL))
    assert "transforms.0.encoder.context_init.3.4.weight" in ungated
    assert "transforms.4.coupling_net.0.1.dense.2.weight" in ungated


def test_wrong_weights_are_named():
    flow = pool_flow((3, 8, 8), **SMALL)
    state = as_official(flow)
    before = {k: v.clone() for k, v in flow.state_dict().items()}

    def raises(match, change):
        bad = dict(state)
        change(bad)
        with pytest.raises(ValueError, match=match):
            load_official(flow, bad)

    raises(r"1 missing \(transforms.3.weight\)", lambda s: s.pop("transforms.3.weight"))
    raises(r"1 unexpected \(extra\)", lambda s: s.update(extra=torch.zeros(1)))
    raises(
        r"expected transforms.3.weight of shape \(12, 12\), got \(3, 3\)",
        lambda s: s.update({"transforms.3.weight": torch.eye(3)}),
    )
    raises(
        "transforms.3.weight has values that are not finite",
        lambda s: s.update({"transforms.3.weight": torch.full((12, 12), math.nan)}),
    )
    raises(
        r"expected transforms.0.ldj_per_dim = -5.54518, got",
        lambda s: s.update({"transforms.0.ldj_per_dim": torch.tensor(-5 * math.log(2))}),
    )
    raises(
        r"expected transforms.1._shift = -0.5",
        lambda s: s.update({"transforms.1._shift": torch.tensor(0.0)}),
    )
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    with pytest.raises(ValueError, match=r"no layer like .*Slice"):
        official_names(pool_flow((3, 8, 8), downsampling=conditional_slice, **SMALL))
    with pytest.raises(ValueError, match="expected the state dict of a PoolFlow"):
        official_configuration({"layer.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"reference key: expected one of .*, got 'widht'"):
        reference_configuration({"widht": 3})
    with pytest.raises(ValueError, match="reference pooling: expected one of max, none"):
        reference_configuration({"pooling": "mean"})


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("harmed",))


def test_only_tensors_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.arange(3.0)}
    torch.save({"model": state, "epoch": 3, "bpd": [np.float64(3.5)]}, "check.pt")
    assert torch.equal(read_tensors("check.pt")["a"], state["a"])
    torch.save({"module.a": state["a"]}, "parallel.pt")
    assert list(read_tensors("parallel.pt")) == ["a"]
    save_file(state, "a.safetensors")
    assert torch.equal(read_tensors("a.safetensors")["a"], state["a"])

    torch.save({"model": state, "args": Harm()}, "harm.pt")
    with pytest.raises(UserError, match=r"cannot read tensors from harm.pt"):
        read_tensors("harm.pt")
    assert not Path("harmed").exists()
    for name in ("damaged.pt", "damaged.safetensors"):
        Path(name).write_bytes(b"nothing of the kind")
        with pytest.raises(UserError, match="cannot read tensors from damaged"):
            read_tensors(name)
    torch.save({"epoch": 3}, "none.pt")
    with pytest.raises(UserError, match="'epoch' is none"):
        read_tensors("none.pt")
    torch.save([1, 2], "list.pt")
    with pytest.raises(UserError, match="expected a state dict"):
        read_tensors("list.pt")
    with pytest.raises(UserError, match=r"no file .*missing.pt"):
        read_tensors("missing.pt")


# The flow ----------------------------------------------------------------------------------------


def own_downsampling(shape):
    c, h, w = shape
    return Sequential([Squeeze(), Slice(StandardNormal((2 * c, h // 2, w // 2)), keep=2 * c)])


def own_pool(shape):
    decoder = partial(Exponential, scale=0.5)
    return max_pool(shape, decoder=decoder, index_net=partial(torch.nn.Conv2d, kernel_size=1))


EVERY = {
    "max_pool": (max_pool, 2),
    "learned_max_pool": (partial(max_pool, learn=True), 2),
    "own_pool": (own_pool, 2),
    "slice": (slice_off, 2),
    "conditional_slice": (conditional_slice, 2),
    "autoregressive_slice": (autoregressive_slice, 2),
    "one": (MaxPool2d, 2),
    "several": (own_downsampling, 2),
    "max_pool_4": (partial(max_pool, kernel_size=4), 4),
    "learned_max_pool_4": (partial(max_pool, kernel_size=4, learn=True), 4),
    "slice_4": (partial(slice_off, factor=4), 4),
    "conditional_slice_4": (partial(conditional_slice, factor=4, kernel_size=1), 4),
    "autoregressive_slice_4": (partial(autoregressive_slice, factor=4, hidden_channels=4), 4),
}


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_any_downsampling_fits(name, double):
    downsampling, factor = EVERY[name]
    shape = (3, 4 * factor, 4 * factor)
    flow = perturbed(pool_flow(shape, downsampling, **SMALL))
    x = images(shape=shape)
    assert flow.lower_bound and flow.log_prob(x).isfinite().all()
    channels = 24 if name == "several" else 12
    assert flow.base.event_shape == (channels, 2, 2)
    # behind the dequantization: what was generated from z is inferred as z
    inner = Flow(flow.base, list(flow.transforms)[1:])
    assert not inner.lower_bound
    z = flow.base.sample(4)
    y, ldj = inner.transforms.inverse_and_ldj(z)
    back, forward_ldj = inner.transforms(y)
    torch.testing.assert_close(back, z, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(forward_ldj, ldj, atol=1e-8, rtol=1e-9)
    sample = flow.sample(5)
    assert sample.dtype == torch.int64 and tuple(sample.shape) == (5, *shape)
    assert sample.min() >= 0 and sample.max() <= 255


def test_the_nets_start_alike_whatever_lies_between_the_scales():
    starts = []
    for name, (downsampling, factor) in EVERY.items():
        if factor == 2 and name != "several":
            torch.manual_seed(5)
            nets = [m for m in pool_flow((3, 8, 8), downsampling, **SMALL).modules()]
            nets = [m for m in nets if isinstance(m, DenseNet)]
            starts.append([p for net in nets for p in net.parameters()])
    assert len(starts) > 3 and len(starts[0]) > 20
    for other in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], other, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("k", [2, 4])
def test_pooling_by_its_formula(k, double):
    (layer,) = max_pool((2, 8, 8), kernel_size=k)
    x = torch.randn(5, 2, 8, 8)
    z, ldj = layer(x)
    assert torch.equal(z, F.max_pool2d(x, k))
    below = (z.repeat_interleave(k, 2).repeat_interleave(k, 3) - x).flatten(1)
    # a max counts with log half-normal(0) = log 2 / sqrt(2 pi) in the sum of all pixels
    at_top = z[0].numel() * HalfNormal(1).log_prob(torch.zeros(1, 1))
    expected = HalfNormal(below.shape[1]).log_prob(below) - at_top - z[0].numel() * math.log(k * k)
    torch.testing.assert_close(ldj, expected)


@torch.no_grad()
def test_a_flow_of_one_pooling_has_unit_mass(double):
    """By importance sampling over 4 × 4 pixels, with an index and remainders that are learned."""
    (layer,) = max_pool((1, 4, 4), kernel_size=4, learn=True)
    layer.logits.copy_(0.3 * torch.randn_like(layer.logits))
    layer.decoder.log_scale.copy_(0.2 * torch.randn_like(layer.decoder.log_scale))
    flow = Flow(StandardNormal((1, 1, 1)), layer)
    wider = Flow(StandardNormal((1, 1, 1)), max_pool((1, 4, 4), 4, decoder=Exponential))
    x = wider.sample(50_000)
    weight = (flow.log_prob(x) - wider.log_prob(x)).exp()
    error = (weight.std() / len(weight) ** 0.5).item()
    assert error < 0.05 and abs(weight.mean().item() - 1) < 5 * error


@torch.no_grad()
@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
def test_images_come_back_where_nothing_is_dropped(dequantization):
    flow = perturbed(
        pool_flow((3, 8, 8), num_scales=1, actnorm=True, dequantization=dequantization, **SMALL)
    )
    x = images()
    assert torch.equal(flow.decode(flow.encode(x)), x)
    assert torch.equal(flow.decode(flow.encode(x.to(torch.uint8))), x)


@torch.no_grad()
def test_the_ledger_adds_up_and_says_what_is_a_bound():
    flow = perturbed(pool_flow((3, 8, 8), **SMALL))
    x = images()
    torch.manual_seed(3)
    ledger = flow.ledger(x)
    torch.manual_seed(3)
    assert ledger.total == pytest.approx(flow.log_prob(x).mean().item(), rel=1e-6)
    text = str(ledger)
    assert [row.layer for row in ledger if row.bound] == ["0.Dequantization"]
    assert "5.MaxPool2d" in text and "lower bound on log p(x)" in text


def test_it_starts_as_orthogonal_maps_of_centred_pixels():
    flow = pool_flow((3, 8, 8), slice_off, dequantization="uniform", **SMALL)
    y, _ = flow.transforms[0](images())
    inner = Sequential(list(flow.transforms)[1:3])
    z, ldj = Sequential(list(flow.transforms)[1:4])(y)
    torch.testing.assert_close(ldj, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.square().sum(1), inner(y)[0].square().sum(1))
    torch.testing.assert_close(inner(y)[0].sum((1, 2, 3)), (y - 0.5).sum((1, 2, 3)))
    coupling = flow.transforms[4]
    assert torch.equal(coupling(z)[0], z)


@torch.no_grad()
def test_the_dequantizer_is_a_density_and_knows_its_draws(double):
    noise = perturbed(
        flow_noise((2, 4, 4), num_steps=2, context_channels=3, mid_channels=8, depth=1, growth=4),
        0.05,
    )
    context = torch.rand(3, 2, 4, 4) * 2 - 1
    u, log_q = noise.sample_and_log_prob(context=context)
    assert (u > 0).all() and (u < 1).all() and tuple(u.shape) == (3, 2, 4, 4)
    torch.testing.assert_close(noise.log_prob(u, context), log_q, atol=1e-8, rtol=1e-9)
    torch.manual_seed(2)
    other = noise.sample_and_log_prob(context=-context)[1]
    assert (other - log_q).abs().min() > 1e-3  # it reads the context


def test_the_density_of_a_tiny_dequantizer_has_unit_mass(double):
    noise = perturbed(
        flow_noise((1, 2, 2), num_steps=2, context_channels=2, mid_channels=4, depth=1, growth=2),
        0.1,
    )
    context = torch.rand(1, 1, 2, 2).expand(20_000, -1, -1, -1)
    with torch.no_grad():
        weight = noise.log_prob(torch.rand(20_000, 1, 2, 2), context).exp()
    error = (weight.std() / len(weight) ** 0.5).item()
    assert error < 0.02 and abs(weight.mean().item() - 1) < 5 * error


def test_every_parameter_is_trained():
    flow = pool_flow((3, 8, 8), partial(max_pool, learn=True), actnorm=True, **SMALL)
    flow.log_prob(images(8))  # sets the normalisations
    perturbed(flow).train()
    flow.log_prob(images(8)).mean().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@torch.no_grad()
def test_memory_layout_and_autocast():
    flow = perturbed(pool_flow((3, 8, 8), **SMALL))
    x = images()
    torch.manual_seed(1)
    expected = flow.log_prob(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        half = flow.log_prob(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=5e-3, atol=0)
    flow = flow.to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    last = flow.log_prob(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    "downsampling, dequantization", [(max_pool, "variational"), (slice_off, "uniform")]
)
def test_it_compiles_as_one_graph(downsampling, dequantization):
    flow = perturbed(pool_flow((3, 8, 8), downsampling, dequantization=dequantization, **SMALL))
    known = {"u": torch.rand(2, 3, 8, 8), "dequant_noise_sample": torch.randn(2, 12, 4, 4)}
    x = images(2)
    torch._dynamo.reset()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    assert compiled(x).isfinite().all()  # with noise of its own
    decode = torch.compile(flow.decode, fullgraph=True, backend="aot_eager")
    assert tuple(decode(flow.base.sample(2)).shape) == (2, 3, 8, 8)

    with_noise(flow, known)
    torch._dynamo.reset()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    parameters = [p for n, p in flow.named_parameters() if "noise.flow.base" not in n]
    got, expected = compiled(x), flow.log_prob(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-4)
    gradients = [torch.autograd.grad(value.sum(), parameters) for value in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="even height and width, got 7 x 8"):
        pool_flow((3, 7, 8))
    for between in (max_pool, slice_off, MaxPool2d):
        with pytest.raises(ValueError, match=r"for 3 scales, got 12 x 16: .*got .*3 x 4"):
            pool_flow((3, 12, 16), between, num_scales=3, **SMALL)
    with pytest.raises(ValueError, match=r"for 2 scales, got 12 x 16: max_pool: kernel_size: .*4"):
        pool_flow((3, 12, 16), partial(max_pool, kernel_size=4), **SMALL)
    with pytest.raises(ValueError, match=r"slice: factor: expected a number >= 2.*got 1"):
        slice_off((3, 8, 8), 1)
    with pytest.raises(ValueError, match=r"model.dequantization: .* did you mean 'uniform'"):
        pool_flow((3, 8, 8), dequantization="unifrom")
    with pytest.raises(ValueError, match=r"expected \(C, H, W\), got \(3, 8\)"):
        pool_flow((3, 8))
    with pytest.raises(ValueError, match="expected num_scales >= 1, got 0"):
        pool_flow((3, 8, 8), num_scales=0)
    with pytest.raises(ValueError, match="even height and width, got 3 x 4"):
        flow_noise((1, 3, 4))
    with pytest.raises(ValueError, match="at least 2 channels"):
        coupling_steps(1, 1, DenseNet)
    with pytest.raises(ValueError, match="GatedConv2d: expected positive sizes"):
        GatedConv2d(0, 3)
    with pytest.raises(ValueError, match=r"DenseBlock: expected positive sizes, got .*depth=0"):
        DenseBlock(2, 2, 0, 4)
    with pytest.raises(ValueError, match="context_features >= 0, got -1"):
        DenseNet(2, 2, context_features=-1)
    flow = pool_flow((3, 8, 8), num_levels=32, **SMALL)
    with pytest.raises(ValueError, match="levels 0 to 31"):
        flow.log_prob(torch.full((1, 3, 8, 8), 32))


# Nets --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_nets_against_their_formulas():
    x = torch.randn(2, 5, 4, 4)
    gate = GatedConv2d(5, 3)
    a, b, c = F.conv2d(x, gate.conv.weight, gate.conv.bias).split(3, 1)
    torch.testing.assert_close(gate(x), a + b / (1 + (-c).exp()))

    layer = DenseLayer(5, 2)
    hidden = F.conv2d(x, layer.mix.weight, layer.mix.bias).clamp_min(0)
    new = F.conv2d(F.pad(hidden, (1, 1, 1, 1)), layer.grow.weight, layer.grow.bias).clamp_min(0)
    torch.testing.assert_close(layer(x), torch.cat([x, new], 1))

    net = DenseNet(5, 7, 6, depth=2, growth=3, gated=False, num_blocks=2, context_features=1)
    context = torch.randn(2, 1, 4, 4)
    h = net.inlet(torch.cat([x, context], 1))
    for block in net.blocks:
        h = h + block.outlet(block.layers[1](block.layers[0](h)))
    torch.testing.assert_close(net(x, context), net.outlet(h))
    assert not torch.allclose(net(x, context), net(x, -context))

    embed = ImageEmbedding(5, 3, 4, depth=1, growth=2)
    assert tuple(embed(x).shape) == (2, 3, 2, 2)
    moved = x.clone()
    moved[:, :, 3, 3] += 1.0
    changed = (embed(moved) - embed(x)).abs().amax((0, 1)) > 0
    assert bool(changed[1, 1]) and not torch.equal(embed(moved), embed(x))


def test_conversion_leaves_the_flow_alone():
    flow = pool_flow((3, 8, 8), **SMALL)
    state = {k: v + 1 if v.dim() == 4 else v for k, v in as_official(flow).items()}
    before = flow.transforms[4].net.inlet.weight.clone()
    converted = convert_official(state, flow)
    assert torch.equal(flow.transforms[4].net.inlet.weight, before)
    key = "transforms.transforms.4.net.inlet.weight"
    assert torch.equal(converted[key], before + 1)
