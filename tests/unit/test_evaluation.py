"""Several draws of a row at once, and the evaluation built on them."""

import copy
import math

import numpy as np
import pytest
import torch

from surflow.distributions import (
    Categorical,
    DiagonalNormal,
    LogitLogistic,
    StandardNormal,
    Uniform,
)
from surflow.evaluation import blocks, likelihood
from surflow.evaluation.blocks import block_size
from surflow.evaluation.likelihood import evaluate, excess
from surflow.flow import Flow, FlowDistribution, flow_sha256
from surflow.memory import set_memory
from surflow.models.pool_flow import pool_flow
from surflow.nets import MLP
from surflow.objectives import elbo, iwbo
from surflow.proofs import double_precision, example_of
from surflow.transforms import (
    VAE,
    AbsGenerative,
    Affine,
    AffineCoupling,
    Augment,
    Dequantization,
    Inverse,
    Logit,
    Sequential,
    StochasticPermutation,
    Transform,
    catalogue,
)

LAYERS = {cls.__name__: cls for cls in catalogue()}


@pytest.fixture
def double():
    with double_precision():
        torch.manual_seed(0)
        yield


class Expanded(Flow):
    """The definition: every layer on every repeated row."""

    def log_prob_samples(self, x, context=None, num_samples=1):
        x, context = (repeated(v, num_samples) for v in (x, context))
        return self.log_prob(x, context).unflatten(0, (num_samples, -1))


def repeated(value, count):
    return None if value is None else torch.cat([value] * count)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# Several draws of a row


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_draws_as_on_repeated_rows(name, double):
    example = example_of(LAYERS[name])
    layer = example.transform.eval()
    x, _ = example.sample(4)
    context = None if example.context is None else example.context(4)
    z = example.latent(4) if example.latent is not None else example.base.sample(4)
    for run, once, value in (
        (layer.forward_samples, layer.forward, x),
        (layer.inverse_and_ldj_samples, layer.inverse_and_ldj, z),
        (Inverse(layer).forward_samples, Inverse(layer).forward, z),
    ):
        torch.manual_seed(1)
        wanted = once(repeated(value, 3), repeated(context, 3))
        torch.manual_seed(1)
        found = run(value, context, 3)
        after = torch.rand(())
        torch.manual_seed(1)
        run(value, context, 3)
        assert torch.rand(()) == after
        close(found, wanted)
        torch.manual_seed(1)
        wanted = once(value, context)
        torch.manual_seed(1)
        assert torch.equal(run(value, context, 1)[1], wanted[1])


def conditional_flow(kind=Flow):
    """Deterministic and stochastic layers in nested sequences, discrete draws, a context."""
    torch.manual_seed(3)
    noise = Flow(
        DiagonalNormal(1, net=MLP(5, 2, [6], "tanh")),
        [Affine(1, 0.1, 0.8, learn=True)],
    )
    encoder = FlowDistribution(noise, embed=MLP(4, 5, [6], "tanh"))
    permutation = StochasticPermutation(3, encoder_net=MLP(3, 3, [4]), decoder_net=MLP(3, 3, [4]))
    return kind(
        DiagonalNormal(3, 0.6, 0.9, learn=True),
        [
            Affine(2, 0.2, 1.1, learn=True),
            Sequential(
                [
                    AffineCoupling(MLP(1, 2, [6], "tanh", context_features=2)),
                    Augment(encoder, keep=2, context_features=2),
                    Affine(3, 0.1, 0.9, learn=True),
                ]
            ),
            Inverse(Affine(3, 0.0, 1.2, learn=True)),
            permutation,
            Affine(3, 3.0, 1.0),
        ],
    )


def dequantized_flow(kind=Flow):
    torch.manual_seed(4)
    q = Flow(LogitLogistic(2, net=MLP(6, 4, [5], "tanh")))
    noise = FlowDistribution(q, embed=MLP(3, 6, [5], "tanh"))
    layer = Dequantization(5, noise, context_features=1)
    return kind(Uniform(2), [layer])


def discrete_flow(kind=Flow):
    torch.manual_seed(5)
    return kind(
        DiagonalNormal(2, 0.4, 1.1, learn=True),
        [Affine(2, 2.0, 1.0), AbsGenerative(2, net=MLP(2, 2, [4], "tanh"))],
    )


@pytest.mark.parametrize("objective", [elbo, iwbo])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("make", [conditional_flow, dequantized_flow, discrete_flow])
def test_bounds_and_gradients_are_those_of_repeated_rows(make, count, objective, double):
    torch.manual_seed(0)
    x = torch.randint(5, (6, 2)) if make is dequantized_flow else torch.randn(6, 2).abs()
    context = {conditional_flow: torch.randn(6, 2), dequantized_flow: torch.randn(6, 1)}.get(make)
    found = []
    for kind in (Flow, Expanded):
        flow = make(kind)
        torch.manual_seed(7)
        value = objective(flow, x, context, count)
        gradients = torch.autograd.grad(value.sum(), list(flow.parameters()), allow_unused=True)
        found.append((value, *(g for g in gradients if g is not None)))
    assert len(found[0]) > 2
    assert sum(float(g.abs().sum()) > 0 for g in found[0][1:]) > 2
    close(*found)


def test_what_does_not_depend_on_a_draw_runs_once_a_row(double):
    flow = pool_flow(
        (1, 8, 8), num_scales=1, num_steps=1, mid_channels=4, depth=1, growth=2, dequant_steps=1,
        context_channels=3,
    ).eval()  # fmt: skip
    seen = {}

    def note(name):
        def hook(module, given, _):
            seen.setdefault(name, []).append(len(given[0]))

        return hook

    noise = flow.transforms[0].transform.noise
    noise.net.register_forward_hook(note("embedding"))
    flow.transforms[3].register_forward_hook(note("step"))
    x = torch.randint(256, (2, 1, 8, 8))
    torch.manual_seed(0)
    found = flow.log_prob_samples(x, num_samples=7)
    assert seen == {"embedding": [2], "step": [14]}
    torch.manual_seed(0)
    close(found, flow.log_prob(repeated(x, 7)).view(7, 2))
    seen.clear()
    iwbo(flow, x, num_samples=7)
    assert seen == {"embedding": [2], "step": [14]}


def test_layers_before_the_first_draw_run_once_a_row():
    flow = conditional_flow()
    rows = {}
    for name in ("0", "1.0", "1.1", "1.2", "2"):
        layer = flow.transforms
        for index in name.split("."):
            layer = layer[int(index)]
        layer.register_forward_hook(
            lambda module, given, _, name=name: rows.update({name: len(given[0])})
        )
    with torch.no_grad():
        flow.log_prob_samples(torch.randn(3, 2), torch.randn(3, 2), 5)
    assert rows == {"0": 3, "1.0": 3, "1.2": 15, "2": 15}  # 1.1 draws: its inverse ran


class _Moved:
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z + 1, ldj


class Moved(_Moved, Augment):
    pass


class _PrivatelyMoved(Augment):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z + 1, ldj


class MovedDequantization(_Moved, Dequantization):
    pass


@pytest.mark.parametrize("kind", [Moved, _PrivatelyMoved, MovedDequantization])
def test_a_subclass_with_its_own_forward_keeps_its_draws(kind, double):
    layer = MovedDequantization(4) if kind is MovedDequantization else kind(StandardNormal(1), 2)
    x = torch.randint(4, (4, 2)) if kind is MovedDequantization else torch.randn(4, 2)
    torch.manual_seed(0)
    wanted = layer(repeated(x, 3))
    torch.manual_seed(0)
    close(layer.forward_samples(x, None, 3), wanted)


def test_a_bound_of_several_draws_compiles_as_one_graph(double):
    flow = dequantized_flow()
    x, context = torch.randint(5, (6, 2)), torch.randn(6, 1)
    loss = torch.compile(
        lambda x, c: iwbo(flow, x, c, 3).sum(), fullgraph=True, backend="aot_eager"
    )
    found = []
    for run in (loss, lambda x, c: iwbo(flow, x, c, 3).sum()):
        torch.manual_seed(0)
        value = run(x, context)
        found.append((value, *torch.autograd.grad(value, list(flow.parameters()))))
    close(*found)


def test_wrong_numbers_of_samples_and_inputs():
    layer = Augment(StandardNormal(1), keep=2)
    with pytest.raises(ValueError, match="num_samples >= 1"):
        layer.forward_samples(torch.zeros(2, 2), None, 0)
    with pytest.raises(ValueError, match=r"expected shape \(batch, 2\)"):
        layer.forward_samples(torch.zeros(2, 3), None, 4)
    with pytest.raises(ValueError, match="a context of 2 rows"):
        layer.forward_samples(torch.zeros(2, 2), torch.zeros(3, 1), 4)
    with pytest.raises(ValueError, match="no layer of this flow takes one"):
        Flow(StandardNormal(2)).log_prob_samples(torch.zeros(2, 2), torch.zeros(2, 1), 3)


# Evaluation: every draw of a noisy layer is written down, and the estimates computed from that


class Noisy(Transform):
    """Keeps x; its contribution is a draw. The first number of x names its row."""

    bijective = False
    stochastic_forward = True
    stochastic_inverse = False

    def __init__(self):
        super().__init__()
        self.draws = []
        self.sizes = []

    def _forward(self, x, context):
        ldj = 3 * torch.randn(len(x))
        self.draws += zip(x.flatten(1)[:, 0].tolist(), ldj.double().tolist(), strict=True)
        self.sizes.append(len(x))
        return x, ldj

    def _inverse(self, z, context):
        return z

    def of_rows(self, count):
        table = [[] for _ in range(count)]
        for row, value in self.draws:
            table[round(row)].append(value)
        return table


def noisy(dims=3):
    layer = Noisy()
    return Flow(DiagonalNormal(dims, 0.5, 30.0, learn=True), layer), layer


def numbered(count, dims=3):
    data = torch.randn(count, dims)
    data[:, 0] = torch.arange(count)
    return data


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 draws."""
    monkeypatch.setattr(blocks, "LEAST_BLOCK", 16)
    monkeypatch.setattr(blocks, "MOST_BLOCK", 16)


@pytest.mark.parametrize("unit", ["nats", "bpd"])
@pytest.mark.parametrize(("samples", "k"), [(1, 5), (4, 16), (20, 41)])
def test_estimates_are_those_of_all_draws(samples, k, unit, small_blocks):
    flow, layer = noisy()
    data = numbered(27)
    estimates, ledger = evaluate(
        flow, data, 7, seed=1, eval_samples=samples, iwbo_samples=k, unit=unit
    )
    assert max(layer.sizes) <= 16
    assert len({value for _, value in layer.draws}) == len(layer.draws)  # none is drawn twice
    table = layer.of_rows(27)
    first = 1 if samples > 1 else 0  # of the ledger alone
    assert {len(row) for row in table} == {first + samples + k}
    scale = 1 if unit == "nats" else 1 / (3 * math.log(2))
    log_p = flow.base.log_prob(data).double().detach().numpy()
    draws = np.array(table)
    mean = log_p + draws[:, first : first + samples].mean(1)
    weights = np.exp(draws[:, first + samples :])
    bound = log_p + np.log(weights.mean(1))
    for name, rows in ((f"test/elbo_{unit}", mean), (f"test/iwbo_{unit}", bound)):
        found = estimates[name]
        assert found.value == pytest.approx(-scale * rows.mean(), rel=1e-6)
        error = scale * rows.std(ddof=1) / 27**0.5
        assert found.standard_error == pytest.approx(error, rel=1e-5)
        assert (found.kind, found.unit, found.count) == ("bound", unit, 27)
    assert f"K = {k}" in estimates[f"test/iwbo_{unit}"].estimator
    assert [row.layer for row in ledger] == ["0.Noisy", "base.DiagonalNormal"]
    assert ledger[0].mean == pytest.approx(draws[:, 0].mean(), rel=1e-6)
    assert ledger[0].standard_error == pytest.approx(draws[:, 0].std(ddof=1) / 27**0.5, rel=1e-6)
    assert ledger.count == 27
    if samples == 1:
        assert ledger.total == pytest.approx(mean.mean(), rel=1e-6)


def test_thousand_samples_of_an_image_stay_in_blocks():
    assert block_size(3072) * 3072 <= 2**20
    flow, layer = noisy(3072)
    evaluate(flow, numbered(2, 3072), 128, iwbo_samples=1000)
    assert max(layer.sizes) <= block_size(3072) == 341
    assert {len(row) for row in layer.of_rows(2)} == {1001}


def vae():
    torch.manual_seed(2)
    encoder = DiagonalNormal(2, net=MLP(5, 4, [8]))
    return Flow(StandardNormal(2), VAE(encoder, DiagonalNormal(5, net=MLP(2, 10, [8]))))


def test_batch_size_changes_no_bit(small_blocks):
    flow = vae()
    data = torch.randn(50, 5)
    found = [
        evaluate(flow, data, size, seed=3, eval_samples=3, iwbo_samples=20)
        for size in (1, 7, 16, 50, 1000)
    ]
    assert all(one == found[0] for one in found[1:])
    other, _ = evaluate(flow, data, 7, seed=4, eval_samples=3, iwbo_samples=20)
    assert other["test/iwbo_nats"].value != found[0][0]["test/iwbo_nats"].value
    flow, layer = noisy()
    evaluate(flow, numbered(20), 3)
    assert layer.sizes == [16, 4]


def test_the_order_of_the_data_is_a_matter_of_draws(small_blocks):
    flow = vae()
    data = torch.randn(400, 5)
    backwards = data.flip(0)
    draws = [evaluate(flow, data, 64, seed=s)[0]["test/elbo_nats"].value for s in range(8)]
    found = evaluate(flow, backwards, 64)[0]["test/elbo_nats"].value
    assert found not in draws
    assert abs(found - np.mean(draws)) < 6 * np.std(draws, ddof=1)
    data = numbered(400)
    backwards = data.flip(0)
    exact = Flow(StandardNormal(3), Affine(3, 0.5, 2.0))
    one, two = (evaluate(exact, rows, 64)[0]["test/nll_nats"] for rows in (data, backwards))
    assert one.value == pytest.approx(two.value, rel=1e-12)
    assert one.standard_error == pytest.approx(two.standard_error, rel=1e-9)


def test_exact_likelihood_has_its_closed_form():
    flow = Flow(StandardNormal(2), Affine(2, [0.5, -1.0], [2.0, 0.25]))
    data = torch.randn(301, 2)
    # z = (x - shift) / scale or scale x + shift: either way a normal in x
    estimates, ledger = evaluate(flow, data, 64)
    x = data.double().numpy()
    mean = flow.decode(torch.zeros(1, 2)).double().numpy()
    deviation = flow.decode(torch.ones(1, 2)).double().numpy() - mean
    log_p = (
        -0.5 * ((x - mean) / deviation) ** 2
        - np.log(np.abs(deviation))
        - 0.5 * math.log(2 * math.pi)
    ).sum(1)
    found = estimates["test/nll_nats"]
    assert found.value == pytest.approx(-log_p.mean(), rel=1e-6)
    assert found.standard_error == pytest.approx(log_p.std(ddof=1) / 301**0.5, rel=1e-5)
    assert found.kind == "likelihood"
    assert ledger.total == pytest.approx(-found.value, rel=1e-12)


def test_iwbo_of_many_samples_is_the_likelihood():
    # x = z + e: the encoder is off the posterior, the marginal is normal with variance 2
    flow = Flow(
        StandardNormal(1),
        VAE(
            DiagonalNormal(1, net=affine_net(0.4, 0.1, math.log(0.9))),
            DiagonalNormal(1, net=affine_net(1.0, 0.0, 0.0)),
        ),
    )
    data = torch.randn(40, 1) * 2**0.5
    estimates, _ = evaluate(flow, data, 8, iwbo_samples=20_000)
    log_p = -0.25 * data.square() - 0.5 * math.log(4 * math.pi)
    assert estimates["test/iwbo_nats"].value == pytest.approx(-log_p.mean().item(), abs=2e-3)
    assert estimates["test/elbo_nats"].value > estimates["test/iwbo_nats"].value + 0.05


def affine_net(slope, shift, log_scale):
    net = torch.nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[slope], [0.0]]))
        net.bias.copy_(torch.tensor([shift, log_scale]))
    return net


def test_bytes_come_in_and_randomness_is_left_alone():
    flow = Flow(Uniform((1, 4, 4)), [Dequantization(256)])
    data = torch.randint(256, (9, 1, 4, 4), dtype=torch.uint8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    estimates, _ = evaluate(flow, data, 4, unit="bpd", iwbo_samples=3)
    assert torch.equal(torch.get_rng_state(), state)
    for found in estimates.values():
        assert found.value == pytest.approx(8, abs=1e-6)
        assert found.standard_error == pytest.approx(0, abs=1e-6)

    def fail(what, done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(flow, data, 4, progress=fail)
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_changes_nothing():
    flow = vae()
    data = torch.randn(30, 5)
    plain = evaluate(flow, data, 30, iwbo_samples=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(flow, data, 30, iwbo_samples=4) == plain
    assert "float" not in plain[0]["test/elbo_nats"].estimator
    with double_precision():
        flow.double()
        found = evaluate(flow, data, 30, iwbo_samples=4)[0]
    assert "float64" in found["test/elbo_nats"].estimator


def precisions():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if not hasattr(matmul, "fp32_precision"):
        return matmul.allow_tf32, cudnn.allow_tf32
    return matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


class SeesPrecision(Affine):
    def _forward(self, x, context):
        self.seen = precisions()
        return super()._forward(x, context)


def test_tf32_is_used_only_where_it_is_allowed():
    layer = SeesPrecision(2)
    flow = Flow(StandardNormal(2), layer)
    before = precisions(), torch.backends.cudnn.allow_tf32
    estimates, _ = evaluate(flow, torch.randn(3, 2), 3)
    assert set(layer.seen) <= {"ieee", False}
    assert (precisions(), torch.backends.cudnn.allow_tf32) == before
    assert "TF32" not in estimates["test/nll_nats"].estimator
    estimates, _ = evaluate(flow, torch.randn(3, 2), 3, tf32=True)
    assert layer.seen == before[0]
    assert "TF32 allowed" in estimates["test/nll_nats"].estimator


def test_wrong_arguments():
    flow = vae()
    data = torch.randn(3, 5)
    for keys, wanted in (
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"eval_samples": 0}, "eval_samples >= 1"),
        ({"iwbo_samples": -1}, "iwbo_samples >= 0"),
        ({"unit": "bits"}, "expected one of nats, bpd, got 'bits'"),
    ):
        with pytest.raises(ValueError, match=wanted):
            evaluate(flow, data, **{"batch_size": 3, **keys})
    with pytest.raises(ValueError, match="at least one row"):
        evaluate(flow, data[:0], 3)


class Guess(Affine):
    """An affine layer whose log-determinant is an unbiased estimate."""

    estimated = True

    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, ldj + torch.randn(len(x))


def test_random_estimates_do_not_depend_on_the_batch(small_blocks):
    flow = Flow(StandardNormal(2), Guess(2))
    data = torch.randn(40, 2)
    one, two = (evaluate(flow, data, size) for size in (3, 40))
    assert one == two
    assert "unbiased estimate" in one[0]["test/nll_nats"].estimator
    bound = Flow(StandardNormal(3), [Guess(2), Augment(StandardNormal(1), keep=2)])
    with pytest.raises(ValueError, match="exact contributions"):
        evaluate(bound, data, 3, iwbo_samples=2)
    # an estimate before the first draw is drawn for each sample, as on repeated rows
    torch.manual_seed(0)
    found = bound.log_prob_samples(data, num_samples=3)
    torch.manual_seed(0)
    close(found, bound.log_prob(repeated(data, 3)).view(3, 40))


# Interruptions


WANTED = {"seed": 2, "eval_samples": 2, "iwbo_samples": 37}


class Stop(Exception):
    pass


def interrupted(after):
    """A progress that gives up behind so many blocks."""
    calls = []

    def progress(what, done, total):
        calls.append((done, total))
        if len(calls) == after:
            raise Stop

    return progress


@pytest.mark.parametrize("after", [1, 2, 5, 40])
def test_goes_on_where_it_was(after, small_blocks, tmp_path):
    file = tmp_path / "runs" / "part.npz"
    flow, layer = noisy()
    data = numbered(21)
    unbroken = evaluate(flow, data, 8, **WANTED)
    blocks = len(layer.sizes)
    layer.sizes.clear()
    with pytest.raises(Stop):
        evaluate(flow, data, 8, **WANTED, progress=interrupted(after), resume=file)
    assert len(layer.sizes) == after
    told = []
    found = evaluate(
        flow, data, 3, **WANTED, progress=lambda *now: told.append(now[1:]), resume=file
    )
    assert found == unbroken
    assert len(layer.sizes) == blocks  # none twice
    assert len(told) == blocks - after + 1  # first what was done before
    total = 21 * (1 + 2 + 37)
    assert told[-1] == (total, total)
    layer.sizes.clear()
    assert evaluate(flow, data, 8, **WANTED, resume=file) == unbroken  # complete, and kept
    assert not layer.sizes


def test_killed_between_two_writes(small_blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "SAVE_EVERY_S", 0.0)
    file, copy = tmp_path / "part.npz", tmp_path / "copy.npz"
    flow, layer = noisy()
    data = numbered(21)
    unbroken = evaluate(flow, data, 8, **WANTED)
    blocks = len(layer.sizes)

    def keep_the_ninth(what, done, total):
        if len(layer.sizes) == blocks + 9:
            copy.write_bytes(file.read_bytes())

    evaluate(flow, data, 8, **WANTED, progress=keep_the_ninth, resume=file)
    layer.sizes.clear()
    assert evaluate(flow, data, 8, **WANTED, resume=copy) == unbroken
    assert len(layer.sizes) == blocks - 9
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["copy.npz", "part.npz"]


def other_weights(flow, data, keys):
    with torch.no_grad():
        flow.base.loc.add_(0.01)


def other_data(flow, data, keys):
    data[5, 1] += 1


def other_seed(flow, data, keys):
    keys["seed"] += 1


def other_samples(flow, data, keys):
    keys["iwbo_samples"] += 1


@pytest.mark.parametrize("change", [other_weights, other_data, other_seed, other_samples])
def test_what_was_kept_of_another_evaluation_is_dropped(change, small_blocks, tmp_path):
    file = tmp_path / "part.npz"
    flow, layer = noisy()
    data = numbered(21)
    with pytest.raises(Stop):
        evaluate(flow, data, 8, **WANTED, progress=interrupted(12), resume=file)
    keys = dict(WANTED)
    change(flow, data, keys)
    layer.sizes.clear()
    unbroken = evaluate(flow, data, 8, **keys)
    blocks = len(layer.sizes)
    assert evaluate(flow, data, 8, **keys, resume=file) == unbroken
    assert len(layer.sizes) == 2 * blocks


def test_another_setting_is_another_evaluation(tmp_path):
    """Flows of equal tensors, with other levels, maps, or one layer in several places."""
    file = tmp_path / "part.npz"
    data = torch.randint(16, (20, 4), generator=torch.Generator().manual_seed(0))

    def flow(levels=16, scale="exp", times=1):
        torch.manual_seed(0)
        layer = AffineCoupling(MLP(2, 4, [8]), scale=scale)
        return Flow(StandardNormal(4), [Dequantization(levels), *[layer] * times])

    found = []
    for settings in ({}, {"levels": 32}, {"scale": "softplus"}, {"times": 2}, {}):
        value = evaluate(flow(**settings), data, 8, resume=file)
        assert value == evaluate(flow(**settings), data, 8)
        found.append(value[0]["test/elbo_nats"].value)
    assert len(set(found)) == 4 and found[0] == found[-1]


def test_settings_of_a_training_step_are_none_of_the_flows():
    flow = pool_flow((3, 4, 4), num_scales=1, num_steps=1, mid_channels=4, depth=1, growth=2)
    mark = flow_sha256(flow)
    set_memory(flow, "reversible")
    assert flow_sha256(flow) == mark
    set_memory(flow, "stored")
    flow.train().log_prob(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert flow_sha256(flow) == flow_sha256(copy.deepcopy(flow)) == mark
    assert flow_sha256(flow.bfloat16()) != mark


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_file_is_replaced(content, small_blocks, tmp_path):
    file = tmp_path / "part.npz"
    flow, _ = noisy()
    data = numbered(21)
    unbroken = evaluate(flow, data, 8, **WANTED, resume=file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert evaluate(flow, data, 8, **WANTED, resume=file) == unbroken
    assert file.read_bytes() == whole


def test_any_damage_of_an_archives_directory_is_noticed(tmp_path):
    """Zip says it in many ways: another version, compression, encryption, flags."""
    file = tmp_path / "part.npz"
    flow = Flow(StandardNormal(2), [Dequantization(4), Affine(2, 0.1, 2.0)])
    data = torch.randint(4, (5, 2))
    evaluate(flow, data, 8, resume=file)
    whole = file.read_bytes()
    passes = blocks.passes_of(flow, data, 8, 1, 0)
    mark = blocks.fingerprint(flow, data, 0, passes, False)
    start = whole.index(b"PK\x01\x02")
    refused = 0
    for place in range(start, len(whole)):
        for bit in (1, 8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            work = blocks.Work(passes, 5)
            work.load(file, mark)
            assert work.done in (0, 1)
            refused += work.done == 0
    assert refused > 100


def test_batch_size_of_an_exact_flow_is_part_of_what_is_kept(tmp_path):
    file = tmp_path / "part.npz"
    flow = Flow(StandardNormal(3), Affine(3, 0.5, 2.0))
    data = torch.randn(50, 3)
    with pytest.raises(Stop):
        evaluate(flow, data, 10, progress=interrupted(2), resume=file)
    found, ledger = evaluate(flow, data, 7, resume=file)
    wanted, wanted_ledger = evaluate(flow, data, 7)
    assert found == wanted
    assert ledger == wanted_ledger


def test_a_mean_over_one_row_has_no_error():
    flow = Flow(Categorical(2, 3))
    found = evaluate(flow, torch.zeros(1, 2, dtype=torch.long), 8)[0]["test/nll_nats"]
    assert found.value == pytest.approx(2 * math.log(3))
    assert set(found.to_json()) == {"value", "unit", "kind", "estimator", "count"}


def test_logit_noise_of_a_flow_is_scored_as_drawn(double):
    q = FlowDistribution(
        Flow(StandardNormal(2), [Logit(), AffineCoupling(MLP(1, 2, [4], context_features=3))]),
        embed=MLP(2, 3, [4]),
    )
    seen = torch.randn(4, 2)
    torch.manual_seed(1)
    u, log_q = q.sample_and_log_prob(context=seen, num_samples=5)
    assert u.shape == (20, 2)
    close(log_q, q.log_prob(u, repeated(seen, 5)))
    torch.manual_seed(1)
    close(u, q.sample_and_log_prob(context=repeated(seen, 5))[0])


def test_the_excess_is_the_divergence_from_the_data():
    """N(0, I) under N(0, 1.5² I): KL = 2 (log 1.5 + 1 / (2 · 2.25) - 1 / 2), paired row by row."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 2, dtype=torch.float64)
    flow = Flow(StandardNormal(2), [Affine(2, scale=1 / 1.5)]).double()
    scores: dict[str, torch.Tensor] = {}
    found, _ = evaluate(flow, x, 1024, scores=scores)
    nll = found["test/nll_nats"]
    own = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    metric = excess(nll, scores["test/nll_nats"], own)
    divergence = 2 * (math.log(1.5) + 1 / 4.5 - 0.5)
    assert abs(metric.value - divergence) < 4 * metric.standard_error
    assert metric.value == pytest.approx(nll.value + own.mean().item())
    # log p - log q is (1 - 1 / 2.25) |x|² / 2 up to a constant: 5/4 of the scores' own spread
    assert metric.standard_error == pytest.approx(1.25 * nll.standard_error, rel=1e-6)
    assert (metric.name, metric.unit, metric.kind) == ("test/excess_nats", "nats", "score")
