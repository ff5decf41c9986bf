"""Memory modes: the same gradients as with stored activations, from a fraction of the memory."""

import copy
import gc
import os
import subprocess
import sys
import threading
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.live_bytes import LiveBytes
from surflow.distributions import StandardNormal
from surflow.flow import Flow, FlowDistribution
from surflow.memory import set_memory
from surflow.models import pool_flow, realnvp
from surflow.nets import MLP, DenseNet
from surflow.objectives import elbo, iwbo
from surflow.transforms import (
    AbsInference,
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    BatchNorm,
    Conv1x1,
    Coupling,
    Dequantization,
    Inverse,
    LogisticMixtureCoupling,
    Logit,
    MaskedAffineAutoregressive,
    Permute,
    RationalQuadraticSplineCoupling,
    Sequential,
    Sigmoid,
    Squeeze,
    Transform,
)
from surflow.transforms.base import zero_ldj

LEAN = ("reversible", "checkpoint")


def perturbed(module, scale=0.05):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module


# Flows: (flow, x, context) ------------------------------------------------------------------------


def images_with_variational_noise():
    flow = pool_flow(
        (3, 8, 8),
        num_steps=3,
        mid_channels=8,
        depth=2,
        growth=4,
        dequant_steps=2,
        context_channels=3,
    )
    return flow, torch.randint(256, (3, 3, 8, 8)), None


def glow(steps=4, size=8, mid=8):
    layers = [Affine((3, size, size), shift=-0.5), Squeeze()]
    for _ in range(steps):
        net = DenseNet(6, 12, mid, depth=1, growth=4)
        layers += [ActNorm(12), Conv1x1(12, "plu"), AffineCoupling(net, scale="sigmoid")]
    return Flow(StandardNormal((12, size // 2, size // 2)), layers)


def glow_like():
    flow, x = glow(), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        flow.log_prob(x)  # the activation normalisations see their first batch
    return flow, x, None


def splines_on_vectors():
    layers = []
    for i in range(4):
        net = MLP(2 + i % 2, (3 - i % 2) * 14, [16], "tanh")
        layers.append(
            RationalQuadraticSplineCoupling(net, num_bins=5, split="alternate", swap=i % 2 == 0)
        )
        layers.append(Permute.random(5, seed=i))
    return Flow(StandardNormal(5), layers), 1.5 * torch.randn(6, 5), None


def conditional_couplings():
    mask = torch.tensor([True, False, False, True])
    layers = [
        AffineCoupling(MLP(2, 4, [8], "tanh", context_features=3)),
        Affine((4,), scale=[0.5, -1.0, 2.0, 1.0], learn=True, net=MLP(3, 8, [8])),
        Sequential(
            [
                AdditiveCoupling(MLP(2, 2, [8], "tanh", context_features=3), swap=True),
                AffineCoupling(MLP(4, 8, [8], "tanh", context_features=3), "softplus", mask=mask),
            ]
        ),
        Inverse(AffineCoupling(MLP(1, 6, [8], "tanh", context_features=3), split=1)),
    ]
    return Flow(StandardNormal(4), layers), torch.randn(5, 4), torch.randn(5, 3)


def noise_in_the_other_direction():
    """A dequantizer whose layers are written in the direction that scores."""
    layers = [Logit()]
    for _ in range(3):
        layers += [
            AffineCoupling(MLP(2, 4, [8], "tanh", context_features=4)),
            Permute([2, 3, 0, 1]),
        ]
    noise = FlowDistribution(Flow(StandardNormal(4), layers), embed=MLP(4, 4, [8]))
    return Flow(StandardNormal(4), Dequantization(8, noise)), torch.randint(8, (5, 4)), None


FLOWS = [
    images_with_variational_noise,
    glow_like,
    splines_on_vectors,
    conditional_couplings,
    noise_in_the_other_direction,
]


def gradients(flow, mode, x, context=None, loss=None, compile_nets=False):
    """The loss, and the gradients of all parameters and of the context, by name."""
    assert set_memory(flow, mode, compile_nets) > 0
    flow.zero_grad()
    if context is not None:
        context = context.clone().requires_grad_()
    torch.manual_seed(1)
    value = -elbo(flow, x, context).mean() if loss is None else loss(flow, x, context)
    value.backward()
    found = {name: p.grad for name, p in flow.named_parameters()}
    if context is not None:
        found["the context"] = context.grad
    return value.detach(), {k: None if g is None else g.clone() for k, g in found.items()}


def assert_same(got, expected, tolerance):
    """The same loss, and each gradient within ``tolerance`` of its norm."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    assert got[1].keys() == expected[1].keys()
    for name, want in expected[1].items():
        have = got[1][name]
        assert (have is None) == (want is None), name
        if want is not None:
            assert (have - want).norm() <= tolerance * want.norm(), name


@pytest.mark.parametrize("mode", LEAN)
@pytest.mark.parametrize("make", FLOWS)
def test_gradients_in_float64(make, mode, double):
    flow, x, context = make()
    perturbed(flow)
    expected = gradients(flow, "stored", x, context)
    assert_same(gradients(flow, mode, x, context), expected, 1e-9)
    if context is not None:
        assert expected[1]["the context"].norm() > 0


@pytest.mark.parametrize("mode", LEAN)
@pytest.mark.parametrize("make", FLOWS)
def test_gradients_in_float32(make, mode):
    flow, x, context = make()
    perturbed(flow)
    expected = gradients(flow, "stored", x, context)
    assert_same(gradients(flow, mode, x, context), expected, 2e-5)


@pytest.mark.parametrize("mode", LEAN)
@pytest.mark.parametrize("make", [images_with_variational_noise, noise_in_the_other_direction])
def test_gradients_of_several_draws(make, mode, double):
    def of_draws(flow, x, context):
        return -iwbo(flow, x, context, num_samples=3).mean()

    flow, x, context = make()
    perturbed(flow)
    expected = gradients(flow, "stored", x, context, of_draws)
    assert_same(gradients(flow, mode, x, context, of_draws), expected, 1e-9)
    with torch.no_grad():
        torch.manual_seed(1)
        torch.testing.assert_close(of_draws(flow, x, context), expected[0])


def of_a_sample(flow, z, context):
    """A loss of what the flow generates: the other direction, without likelihoods."""
    x = flow.decode(z, context)
    return (x * torch.linspace(-1, 1, x[0].numel()).view(x.shape[1:])).square().sum()


@pytest.mark.parametrize("mode", LEAN)
@pytest.mark.parametrize("make", [glow_like, splines_on_vectors, conditional_couplings])
def test_gradients_through_samples(make, mode, double):
    flow, x, context = make()
    perturbed(flow)
    z = flow.encode(x, context).detach()
    expected = gradients(flow, "stored", z, context, of_a_sample)
    assert_same(gradients(flow, mode, z, context, of_a_sample), expected, 1e-9)


@pytest.mark.parametrize("mode", LEAN)
def test_the_gradient_of_the_data(mode, double):
    flow, x, _ = glow_like()
    perturbed(flow)
    found = []
    for choice in ("stored", mode):
        set_memory(flow, choice)
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(flow.log_prob(leaf).sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_get_none(double):
    flow, x, _ = glow_like()
    perturbed(flow)
    for layer in flow.transforms[5:9]:
        layer.requires_grad_(False)
    expected = gradients(flow, "stored", x)
    frozen = sum(g is None for g in expected[1].values())
    assert frozen == sum(not p.requires_grad for p in flow.parameters()) > 5
    assert_same(gradients(flow, "reversible", x), expected, 1e-9)


def test_a_layer_in_two_places_gets_both_gradients(double):
    twice = AffineCoupling(MLP(2, 4, [8], "tanh"))
    flow = perturbed(Flow(StandardNormal(4), [twice, Permute([3, 2, 1, 0]), twice]))
    x = torch.randn(5, 4)
    assert_same(gradients(flow, "reversible", x), gradients(flow, "stored", x), 1e-12)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    """Backward runs its nets in bfloat16 too, inside the autocast block or behind it."""
    flow, x, _ = images_with_variational_noise()
    perturbed(flow, 0.02)
    half = dict(device_type="cpu", dtype=torch.bfloat16)
    found = {}
    for mode in ("stored", *LEAN):
        set_memory(flow, mode)
        flow.zero_grad()
        torch.manual_seed(1)
        with torch.autocast(**half):
            loss = -flow.log_prob(x).mean()
            assert loss.dtype == torch.float32
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found[mode] = torch.cat([p.grad.flatten() for p in flow.parameters()])
    torch.manual_seed(1)
    flow.zero_grad()
    (-set_memory(flow, "stored") * 0 - flow.log_prob(x).mean()).backward()
    single = torch.cat([p.grad.flatten() for p in flow.parameters()])
    rounding = (found["stored"] - single).norm()
    assert rounding > 1e-4 * single.norm()  # it did run in bfloat16
    assert torch.equal(found["checkpoint"], found["stored"])
    assert (found["reversible"] - found["stored"]).norm() < 2 * rounding


def test_no_graphless_weights_are_left_in_autocasts_cache():
    """What runs later in the same block still gives its gradients to the same weights."""
    net = MLP(2, 4, [8], "tanh")
    flow = Flow(StandardNormal(4), [AffineCoupling(net)])
    set_memory(flow, "reversible")
    with torch.autocast("cpu", torch.bfloat16):
        flow.log_prob(torch.randn(3, 4))
        net(torch.randn(3, 2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in net.parameters())


# Memory -------------------------------------------------------------------------------------------


def kept_and_peak(mode, steps):
    """Bytes kept for the backward pass, and the most alive in a step."""
    flow = glow(steps, size=16, mid=16)
    x = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        flow.log_prob(x)
    set_memory(flow, mode)
    with LiveBytes() as live:
        loss = flow.log_prob(x).mean()
        kept = live.now()
        loss.backward()
    parameters = sum(4 * p.numel() for p in flow.parameters())
    return kept, live.peak - parameters


def saved_bytes(mode, steps):
    """The same as autograd's hooks see it."""
    flow = glow(steps, size=16, mid=16)
    x = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        flow.log_prob(x)
    set_memory(flow, mode)
    own = {t.untyped_storage().data_ptr() for t in (x, *flow.parameters(), *flow.buffers())}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = flow.log_prob(x).mean()
    assert loss.requires_grad
    return sum(s.nbytes() for p, s in saved.items() if p not in own)


def test_memory_is_flat_in_depth():
    stored, reversible, checkpoint = (
        [kept_and_peak(mode, steps) for steps in (4, 8, 16)]
        for mode in ("stored", "reversible", "checkpoint")
    )
    for which in (0, 1):
        few, some, many = (r[which] for r in reversible)
        assert max(few, some, many) < 1.05 * min(few, some, many)
        few, some, many = (s[which] for s in stored)
        assert 1.9 < (many - some) / (some - few) < 2.1 and many > 3 * few
        few, some, many = (c[which] for c in checkpoint)
        assert 1.8 < (many - some) / (some - few) < 2.2
    # at 16 steps: the inputs of the steps only, or a single output
    assert checkpoint[2][0] < stored[2][0] / 7 and checkpoint[2][1] < stored[2][1] / 4
    assert reversible[2][0] < checkpoint[2][0] / 7 and reversible[2][1] < checkpoint[2][1]


def test_saved_tensors_are_flat_in_depth():
    reversible = [saved_bytes("reversible", steps) for steps in (4, 8, 16)]
    stored = [saved_bytes("stored", steps) for steps in (4, 8, 16)]
    assert max(reversible) < 1.05 * min(reversible)
    assert 1.9 < (stored[2] - stored[1]) / (stored[1] - stored[0]) < 2.1
    assert stored[2] > 50 * reversible[2]


def test_live_bytes_counts_storages_once():
    with LiveBytes() as live:
        a = torch.zeros(100, 10)
        b = a.view(10, 100).T
        assert live.now() == 4000
        c = b.contiguous()
        a.add_(1)
        assert live.now() == 8000
        del a
        assert live.now() == 8000  # a view lives
        del b
        assert live.now() == 4000 == c.nbytes
    assert live.peak == 8000


@pytest.mark.parametrize(("mode", "calls"), [("stored", 1), ("reversible", 2), ("checkpoint", 2)])
def test_passes_of_the_nets(mode, calls):
    flow, x, _ = splines_on_vectors()
    set_memory(flow, mode)
    seen = []
    for layer in flow.transforms:
        if isinstance(layer, Coupling):
            layer.net.register_forward_hook(lambda *_: seen.append(1))
    flow.log_prob(x).sum().backward()
    assert len(seen) == 4 * calls
    seen.clear()
    with torch.no_grad():
        flow.log_prob(x)
    assert len(seen) == 4


# What is reversed ---------------------------------------------------------------------------------


def stretches(*layers, mode="reversible"):
    """How many layers are kept as stored."""
    from surflow.memory import _grouped, _steps

    return [len(run) for lean, run in _grouped(_steps(layers, False), mode) if lean]


def coupling(width=4, **kwargs):
    return AffineCoupling(MLP(width // 2, width, [8], **kwargs))


def test_only_cheap_exact_inverses_are_reversed():
    mixture = LogisticMixtureCoupling(MLP(2, 2 * 8, [8]), num_components=2)
    maf = MaskedAffineAutoregressive(4, hidden_features=[16])
    assert stretches(coupling(), Permute([1, 0, 3, 2]), coupling()) == [3]
    for layer in (mixture, maf, Sigmoid(), AbsInference(4), Logit()):
        assert stretches(coupling(), layer, Permute([1, 0, 3, 2]), coupling()) == [1, 2]
    assert stretches(Inverse(Sequential([coupling(), Inverse(coupling())])), coupling()) == [3]
    assert stretches(mixture) == [] == stretches(Permute([1, 0, 3, 2]))
    # recomputing needs no inverse
    assert stretches(Permute([1, 0, 3, 2]), mixture, maf, coupling(), mode="checkpoint") == [
        2,
        1,
        1,
    ]
    assert stretches(AbsInference(4), mode="checkpoint") == []


def test_what_does_not_repeat_itself_is_stored():
    pending, noisy = ActNorm(4), AffineCoupling(nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 4)))
    for mode in LEAN:
        for layer in (pending, BatchNorm(4)):
            both = [coupling(), layer, coupling()]
            assert stretches(*both, mode=mode) == [1, 1]
        assert stretches(noisy, mode=mode) == []
        assert stretches(copy.deepcopy(noisy).eval(), mode=mode) == [1]
    pending.initialise(torch.randn(8, 4))
    assert stretches(coupling(), pending, BatchNorm(4).eval(), coupling()) == [4]


class Flip(Transform):
    """A layer of one's own."""

    bijective = True
    stochastic_forward = False
    stochastic_inverse = False
    reversible = True

    def _forward(self, x, context):
        return -x, zero_ldj(x)

    def _inverse(self, z, context):
        return -z


def test_a_layer_of_ones_own_may_take_part(double):
    class Other(Flip):
        reversible = False

    assert stretches(coupling(), Flip(), coupling()) == [3]
    assert stretches(coupling(), Other(), coupling()) == [1, 1]
    flow = perturbed(Flow(StandardNormal(4), [coupling(), Flip(), coupling()]))
    x = torch.randn(5, 4)
    assert_same(gradients(flow, "reversible", x), gradients(flow, "stored", x), 1e-10)


def test_the_first_batch_sets_activation_normalisation():
    """Stored, it initialises once, and a step later the layers are part of a stretch."""
    flow, other = glow(), glow()
    other.load_state_dict(flow.state_dict())
    x = torch.rand(4, 3, 8, 8)
    set_memory(other, "reversible")
    for _ in range(2):
        assert_same(gradients(other, "reversible", x), gradients(flow, "stored", x), 2e-5)
    for name, value in flow.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


# It leaves all else as it is ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", LEAN)
def test_names_values_and_pages_stay(mode):
    flow, x, _ = images_with_variational_noise()
    perturbed(flow)
    names, page, kind = (
        list(flow.state_dict()),
        str(flow.ledger(x)).split("\n"),
        flow.transforms.kind,
    )
    assert set_memory(flow, mode) == 3
    assert list(flow.state_dict()) == names and flow.transforms.kind == kind
    rows = str(flow.ledger(x)).split("\n")
    assert [r.split()[:2] for r in rows] == [r.split()[:2] for r in page]
    assert flow.transforms.label == "Sequential" and isinstance(flow.transforms, Sequential)
    with pytest.raises(ValueError, match=r"Sequential\.forward: expected shape"):
        flow.log_prob(x[:, :2])
    twin = copy.deepcopy(flow)
    with torch.no_grad():
        twin.transforms[4].net.outlet.bias.add_(1.0)
    torch.manual_seed(2)
    ours = flow.log_prob(x)
    torch.manual_seed(2)
    assert (twin.log_prob(x) - ours).abs().min() > 1e-3  # a copy runs its own layers
    set_memory(flow, "stored")
    assert type(flow.transforms) is Sequential


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="memory: expected one of stored, reversible, checkpoint"):
        set_memory(glow(1), "sparse")


def test_changed_weights_are_noticed_before_backward():
    flow, x, _ = splines_on_vectors()
    set_memory(flow, "reversible")
    loss = flow.log_prob(x).sum()
    with torch.no_grad():
        next(flow.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", LEAN)
def test_parameters_of_a_call_are_refused_not_wrong(mode):
    """They are in the layers in the forward pass alone."""
    flow, x, _ = splines_on_vectors()
    set_memory(flow, mode)
    given = {k: (1.1 * p.detach()).requires_grad_() for k, p in flow.transforms.named_parameters()}
    ldj = torch.func.functional_call(flow.transforms, given, (x,))[1]
    with pytest.raises(RuntimeError, match="memory: expected the layers to have the same param"):
        ldj.sum().backward()


def test_what_is_saved_may_lie_elsewhere(double):
    flow, x, _ = splines_on_vectors()
    perturbed(flow)
    expected = gradients(flow, "stored", x)
    with torch.autograd.graph.save_on_cpu():  # comes back as other tensors
        assert_same(gradients(flow, "reversible", x), expected, 1e-9)


def test_second_derivatives_are_refused_not_wrong():
    flow, x, _ = splines_on_vectors()
    set_memory(flow, "reversible")
    x.requires_grad_()
    gradient = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("mode", LEAN)
@pytest.mark.parametrize("compile_nets", [False, True])
def test_compiled(mode, compile_nets, double, monkeypatch):
    """The graph breaks around a stretch, or holds a checkpoint: the same loss and gradients."""
    flow, x = glow(2), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        flow.log_prob(x)
    perturbed(flow)
    expected = gradients(flow, "stored", x)
    torch._dynamo.reset()
    inductor = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(inductor, backend="aot_eager"))
    loss = torch.compile(lambda x: -flow.log_prob(x).mean(), backend="aot_eager", dynamic=False)
    for _ in range(2):
        got = gradients(flow, mode, x, None, lambda flow, x, context: loss(x), compile_nets)
        assert_same(got, expected, 1e-9)
    nets = [part.net for part in flow.modules() if isinstance(part, Coupling)]
    assert all((net._compiled_call_impl is not None) == compile_nets for net in nets)
    set_memory(flow, mode)
    assert all(net._compiled_call_impl is None for net in nets)
    torch._dynamo.reset()


def test_nets_of_many_shapes_are_all_compiled(monkeypatch):
    """Torch gives up at 8 kinds for all nets of a class; RealNVP with three scales has 5 shapes."""
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(graph)
            return graph(*args)

        return run

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    torch.manual_seed(0)
    flow = realnvp((1, 8, 8), num_scales=3, mid_channels=1, num_blocks=1, norm="actnorm")
    x = torch.randint(256, (2, 1, 8, 8))
    flow.log_prob(x)
    set_memory(flow, "reversible", compile_nets=True)
    nets = sum(isinstance(m, Coupling) for m in flow.modules())
    with torch.no_grad():
        flow.log_prob(x)
    assert len(calls) == nets == 16
    loss = flow.log_prob(x).sum()
    # a GPU's backward pass has a thread of its own, where torch's settings are the default ones
    backward = threading.Thread(target=loss.backward)
    backward.start()
    backward.join()
    assert len(calls) == 3 * nets
    torch._dynamo.reset()


# Distributed --------------------------------------------------------------------------------------


def one_of(rank, size, folder):
    """A step of one process: its share of the rows, the gradients averaged by DDP."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size
    )
    try:
        torch.manual_seed(0)
        flow, x, _ = splines_on_vectors()
        perturbed(flow)
        set_memory(flow, "reversible")

        class Loss(nn.Module):
            def __init__(self):
                super().__init__()
                self.flow = flow

            def forward(self, x):
                return -self.flow.log_prob(x).mean()

        wrapped = nn.parallel.DistributedDataParallel(Loss())
        for _ in range(2):  # the second step fails if the first left a gradient waiting
            flow.zero_grad()
            wrapped(x.chunk(size)[rank]).backward()
        if rank == 0:
            torch.save([p.grad for p in flow.parameters()], Path(folder) / f"{size}.pt")
        # before the group goes: its threads may want the interpreter's lock while the last to hold
        # it, which here would be the reducer, waits for them with that lock
        del wrapped
        gc.collect()
    finally:
        dist.destroy_process_group()


def check_against_one_process(folder, size):
    torch.manual_seed(0)
    flow, x, _ = splines_on_vectors()
    perturbed(flow)
    expected = gradients(flow, "stored", x)[1].values()
    found = torch.load(Path(folder) / f"{size}.pt", weights_only=True)
    for have, want in zip(found, expected, strict=True):
        assert (have - want).norm() <= 1e-4 * want.norm()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_distributed_data_parallel_gets_every_gradient(tmp_path):
    one_of(0, 1, tmp_path)
    check_against_one_process(tmp_path, 1)


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_give_the_gradients_of_one(tmp_path):
    command = [sys.executable, __file__, "2", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    check_against_one_process(tmp_path, 2)


if __name__ == "__main__":
    one_of(int(sys.argv[3]), int(sys.argv[1]), sys.argv[2])
