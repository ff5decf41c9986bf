"""Images with channels last stay so, layer by layer, and values do not change."""

from functools import partial

import pytest
import torch

from surflow.distributions import StandardNormal
from surflow.flow import Flow
from surflow.memory import set_memory, use_channels_last
from surflow.models import pool_flow
from surflow.models.downsampling import conditional_slice, max_pool, slice_off
from surflow.nets import MLP, DenseNet, ImageEmbedding
from surflow.transforms import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Conv1x1,
    MaxPool2d,
    Squeeze,
    Transform,
    Unsqueeze,
)

LAST = torch.channels_last
SMALL = dict(num_steps=2, mid_channels=8, depth=2, growth=4, dequant_steps=2, context_channels=3)


def lies_last(image):
    """Whether the channels of a pixel stand side by side (a slice of the channels may be left)."""
    return image.stride(1) == 1


def lies_first(image):
    return image.stride(3) == 1


class Watch:
    """The layout of everything 4-D that comes out of any transform or net."""

    def __init__(self, module, right):
        self.right, self.wrong, self.count = right, [], 0
        for name, part in module.named_modules():
            part.register_forward_hook(lambda m, i, out, n=name: self.see(n, m, out))
            if isinstance(part, Transform):
                for method in ("_inverse", "_inverse_and_ldj"):
                    self.wrap(name, part, method)

    def wrap(self, name, part, method):
        inner = getattr(part, method)

        def outer(*arguments):
            out = inner(*arguments)
            self.see(f"{name}.{method}", part, out)
            return out

        object.__setattr__(part, method, outer)

    def see(self, name, part, out):
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, torch.Tensor) and out.dim() == 4 and min(out.shape[1:]) > 1:
            self.count += 1
            if not self.right(out):
                self.wrong.append(f"{name} {type(part).__name__} {out.stride()}")


def perturbed(flow):
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return flow


@pytest.mark.parametrize("downsampling", [max_pool, slice_off, conditional_slice])
@pytest.mark.parametrize("actnorm", [False, True])
def test_every_intermediate_has_channels_last(downsampling, actnorm):
    flow = perturbed(pool_flow((3, 16, 16), downsampling, actnorm=actnorm, **SMALL))
    x = torch.randint(256, (2, 3, 16, 16))
    torch.manual_seed(1)
    z, ldj = flow.transforms(x)
    use_channels_last(flow)
    watch = Watch(flow, lies_last)
    torch.manual_seed(1)
    got_z, got_ldj = flow.transforms(x.to(memory_format=LAST))
    assert watch.count > 60
    # a drawn base sample lies with channels first up to the first 1x1 convolution
    wrong = [w for w in watch.wrong if not (actnorm and "noise.flow" in w and "ActNorm" in w)]
    assert wrong == []
    torch.testing.assert_close(got_z, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_ldj, ldj, rtol=1e-5, atol=0)


@pytest.mark.parametrize("downsampling", [max_pool, partial(max_pool, learn=True)])
def test_generation_keeps_channels_last(downsampling):
    flow = use_channels_last(perturbed(pool_flow((3, 16, 16), downsampling, **SMALL)))
    z = torch.randn(2, *flow.base.event_shape).to(memory_format=LAST)
    watch = Watch(flow, lies_last)
    assert lies_last(flow.decode(z))
    assert watch.count > 20 and watch.wrong == []


def test_the_watch_sees_a_layer_that_turns_the_layout():
    flow = use_channels_last(pool_flow((3, 16, 16), **SMALL))
    for layer in flow.modules():
        if isinstance(layer, Conv1x1):
            layer.channels_last = False
            layer._at_every_pixel = lambda x, matrix: torch.einsum(
                "ij,bjhw->bihw", matrix(), x
            ).contiguous()
    watch = Watch(flow, lies_last)
    flow.transforms(torch.randint(256, (2, 3, 16, 16)).to(memory_format=LAST))
    assert any("Conv1x1" in w for w in watch.wrong)


def test_channels_first_stay_first():
    flow = pool_flow((3, 16, 16), **SMALL)
    watch = Watch(flow, lies_first)
    flow.transforms(torch.randint(256, (2, 3, 16, 16)))
    flow.decode(torch.randn(2, *flow.base.event_shape))
    assert watch.count > 60 and watch.wrong == []


def in_both_layouts(function, *images):
    first = function(*images)
    last = function(*(x.contiguous(memory_format=LAST) for x in images))
    return first, last


@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (3, 8, 8, 4), (2, 12, 4, 12)])
@pytest.mark.parametrize("factor", [1, 2])
def test_squeezes_in_both_layouts(shape, factor):
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    for layer in (Squeeze(factor), Unsqueeze(factor)):
        forward = layer if isinstance(layer, Squeeze) else layer.inverse
        back = layer.inverse if isinstance(layer, Squeeze) else layer

        def squeezed(x, run=forward):
            return run(x)[0] if isinstance(run, Squeeze) else run(x)

        def spread(z, run=back):
            return run(z)[0] if isinstance(run, Unsqueeze) else run(z)

        first, last = in_both_layouts(squeezed, x)
        assert torch.equal(first, last) and torch.equal(first, squares(x, factor))
        assert last.is_contiguous(memory_format=LAST) and first.is_contiguous()
        for z in (first, last):
            assert torch.equal(spread(z), x)
        assert lies_last(spread(last)) and lies_first(spread(first))


def squares(x, factor):
    """Space to channels, as its formula says."""
    b, c, h, w = x.shape
    out = x.new_empty(b, c * factor**2, h // factor, w // factor)
    for i in range(factor):
        for j in range(factor):
            out[:, i * factor + j :: factor**2] = x[:, :, i::factor, j::factor]
    return out


@pytest.mark.parametrize("parametrisation", ["full", "plu", "qr", "orthogonal"])
def test_one_by_one_convolutions_in_both_layouts(parametrisation, double):
    layer = Conv1x1(5, parametrisation)
    x = torch.randn(2, 5, 3, 4)
    expected = torch.einsum("ij,bjhw->bihw", layer.weight_matrix(), x)
    first, last = in_both_layouts(lambda x: layer(x)[0], x)
    back = in_both_layouts(layer.inverse, x)
    for z in (first, last):
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*back, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(back[0])[0], x, rtol=0, atol=1e-12)
    assert lies_first(first) and lies_first(back[0])
    assert lies_last(last) and lies_last(back[1])
    sliced = torch.randn(2, 9, 3, 4).contiguous(memory_format=LAST)[:, :5]
    assert lies_last(layer(sliced)[0])
    torch.testing.assert_close(layer(sliced)[0], layer(sliced.contiguous())[0])
    layer.channels_last = True
    assert lies_last(layer(x)[0]) and lies_last(layer.inverse(x))
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x), x)


@pytest.mark.parametrize("learn", [False, True])
def test_max_pooling_in_both_layouts(learn, double):
    layer = MaxPool2d((3, 4, 6), learn=learn)
    x = torch.randn(2, 3, 4, 6)
    first, last = in_both_layouts(lambda x: layer(x), x)
    assert torch.equal(first[0], last[0]) and torch.equal(first[1], last[1])
    assert torch.equal(first[0], torch.nn.functional.max_pool2d(x, 2))
    assert lies_first(first[0]) and lies_last(last[0])
    draws = []
    for z in (first[0], last[0]):
        torch.manual_seed(3)
        draws.append(layer.inverse_and_ldj(z))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert lies_first(draws[0][0]) and lies_last(draws[1][0])


@pytest.mark.parametrize("split", ["half", "alternate", 2])
@pytest.mark.parametrize("swap", [False, True])
def test_couplings_keep_the_layout(split, swap):
    x = torch.randn(2, 5, 4, 4)
    seen = {"half": 2, "alternate": 3, 2: 2}[split]
    seen = 5 - seen if swap else seen
    for layer in (
        AffineCoupling(DenseNet(seen, 2 * (5 - seen), 8, 1, 4), split=split, swap=swap),
        AdditiveCoupling(DenseNet(seen, 5 - seen, 8, 1, 4), split=split, swap=swap),
    ):
        first, last = in_both_layouts(lambda x, layer=layer: layer(x)[0], x)
        torch.testing.assert_close(first, last)
        assert lies_first(first) and lies_last(last) and lies_last(layer.inverse(last))
        # the parts that condition stand where they stood
        changed = (first != x).any(dim=(0, 2, 3))
        assert int(changed.sum()) == 5 - seen
        torch.testing.assert_close(layer.inverse(first), x, rtol=1e-4, atol=1e-5)


def test_nets_keep_the_layout():
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
    net = DenseNet(4, 6, 8, 2, 4, context_features=3)
    embed = ImageEmbedding(4, 6, 8, 2, 4)
    for run, images in ((net, (x, context)), (embed, (x,))):
        first, last = in_both_layouts(run, *images)
        torch.testing.assert_close(first, last)
        assert lies_first(first) and lies_last(last)


@pytest.mark.parametrize("mode", ["stored", "reversible", "checkpoint"])
def test_gradients_in_both_layouts(mode, double):
    flow = perturbed(pool_flow((3, 8, 8), **SMALL))
    x = torch.randint(256, (2, 3, 8, 8))
    found = []
    for image in (x, x.to(memory_format=LAST)):
        flow.zero_grad()
        torch.manual_seed(2)
        (-flow.log_prob(image).mean()).backward()
        found.append([p.grad.clone() for p in flow.parameters()])
        use_channels_last(flow)
        set_memory(flow, mode)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-9 * one.norm()


def test_names_and_vectors_are_left_alone():
    flow = pool_flow((3, 8, 8), **SMALL)
    state = {k: v.clone() for k, v in flow.state_dict().items()}
    assert use_channels_last(flow) is flow
    assert all(torch.equal(v, flow.state_dict()[k]) for k, v in state.items())
    assert flow.transforms[4].net.blocks[0].layers[0].grow.weight.is_contiguous(memory_format=LAST)
    vectors = Flow(StandardNormal(4), [ActNorm(4), AffineCoupling(MLP(2, 4, [8]))])
    use_channels_last(vectors).log_prob(torch.randn(3, 4))
