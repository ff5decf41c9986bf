"""Rounding, slicing, argmax against quadrature, enumeration and closed forms; edges; messages."""

import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from surflow.distributions import (
    Bernoulli,
    Categorical,
    DiagonalNormal,
    Gumbel,
    Logistic,
    LogitLogistic,
    StandardNormal,
    Uniform,
)
from surflow.distributions.base import Distribution
from surflow.flow import Flow, FlowDistribution
from surflow.nets import MLP
from surflow.objectives import elbo, iwbo
from surflow.transforms import (
    Affine,
    AffineCoupling,
    ArgmaxGenerative,
    ArgmaxInference,
    Augment,
    BinaryArgmaxGenerative,
    BinaryArgmaxInference,
    Dequantization,
    GumbelArgmaxGenerative,
    GumbelArgmaxInference,
    Logit,
    Rounding,
    Slice,
    check_values,
)


class Given(Distribution):
    """Noise that is what the test says, with a log-density of zero; keeps its context."""

    def __init__(self, event_shape, value, conditional=False):
        super().__init__(event_shape)
        self.value = torch.as_tensor(value)
        self.reads = conditional
        self.seen = None

    @property
    def conditional(self):
        return self.reads

    def _log_prob(self, x, context):
        self.seen = context
        return torch.zeros(x.shape[0], dtype=x.dtype)

    def _sample(self, n, context, temperature):
        self.seen = context
        return self.value.expand(n, *self.event_shape)


def standard_error(values):
    return values.std(0) / len(values) ** 0.5


# Rounding ---------------------------------------------------------------------------------------

LEVELS = [1, 2, 3, 7, 10, 100, 255, 256, 257, 1000, 4096, 49_999, 65_535, 65_536]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("num_levels", LEVELS)
def test_every_level_comes_back_whatever_the_noise(num_levels, scale, dtype):
    x = torch.arange(num_levels).unsqueeze(1)
    eps = torch.finfo(dtype).eps
    edges = [0.0, torch.finfo(dtype).tiny, eps, 0.5, 1 - eps, 1 - eps / 2, 1.0]
    for noise in [None, *(Given(1, torch.tensor(u, dtype=dtype)) for u in edges)]:
        layer = Dequantization(num_levels, noise, scale).to(dtype)
        z, _ = layer(x)
        assert z.dtype == dtype
        assert torch.equal(layer.inverse(z), x)
        assert torch.equal(Rounding(num_levels, scale=scale)(z)[0], x)  # strict about the interval
        top = 1 if scale else num_levels
        assert bool((z >= 0).all()) and bool((z < top).all())


def test_the_noise_is_uniform_in_its_cell():
    x = torch.full((20_000, 1), 5)
    z = Dequantization(10)(x)[0]
    u = (z * 10 - 5).double()
    assert abs(u.mean().item() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5
    assert abs(u.square().mean().item() - 1 / 3) < 5 * (4 / 45 / 20_000) ** 0.5
    assert u.min() < 0.001 and u.max() > 0.999


@pytest.mark.parametrize("shape", [(3,), (2, 4, 5)])
def test_uniform_dequantization_contributes_the_volume(shape):
    x = torch.randint(256, (6, *shape))
    _, ldj = Dequantization(256)(x)
    torch.testing.assert_close(ldj, torch.full((6,), -math.prod(shape) * 8 * math.log(2)))
    assert Dequantization(256, scale=False)(x)[1].tolist() == [0.0] * 6
    u = torch.rand(6, *shape)
    torch.testing.assert_close(Rounding(256)(u)[1], -ldj)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_is_taken(dtype):
    x = torch.tensor([[0, 3, 127], [1, 2, 100]], dtype=dtype)
    layer = Dequantization(256)
    z = layer(x)[0]
    assert z.dtype == torch.float32 and layer.inverse(z).dtype == torch.int64
    assert torch.equal(layer.inverse(z), x.long())
    z = layer.double()(x)[0]
    assert z.dtype == torch.float64
    z = layer.bfloat16()(x)[0]  # half precision has no room for 256 levels with noise
    assert z.dtype == torch.float32 and torch.equal(layer.inverse(z), x.long())


def test_the_learned_noise_is_scored_as_drawn(double):
    torch.manual_seed(3)
    noise = LogitLogistic((2,), net=MLP(2, 4, [8], "tanh"))
    x = torch.randint(5, (50, 2))
    z, ldj = Dequantization(5, noise)(x)
    expected = -2 * math.log(5) - noise.log_prob(5 * z - x, 2 * x / 4 - 1.0)
    torch.testing.assert_close(ldj, expected)
    # a draw that rounds to 1 keeps its own density, which inverting it would lose
    sure = FlowDistribution(Flow(StandardNormal(1), [Logit(), Affine(1, shift=-60.0)]))
    z, ldj = Dequantization(4, sure)(torch.tensor([[3]]))
    assert bool(ldj.isfinite().all()) and bool((z < 1).all())


def test_what_the_noise_sees():
    noise = Given((1, 2, 2), torch.tensor(0.5), conditional=True)
    layer = Dequantization(5, noise, context_features=2)
    x = torch.tensor([[[[0, 1], [2, 4]]]])
    layer(x, torch.tensor([[7.0, 8.0]]))
    expected = torch.tensor([[[-1.0, -0.5], [0.0, 1.0]], [[7.0, 7], [7, 7]], [[8.0, 8], [8, 8]]])
    assert torch.equal(noise.seen, expected.unsqueeze(0))
    layer(x, torch.arange(8.0).reshape(1, 2, 2, 2))
    assert torch.equal(noise.seen[:, 1:], torch.arange(8.0).reshape(1, 2, 2, 2))
    noise = Given((2,), torch.tensor(0.5), conditional=True)
    Rounding(3, noise)(torch.tensor([[0.1, 0.9]]))
    assert noise.seen.tolist() == [[-1.0, 1.0]]


def cell_masses(base, num_levels):
    """P(x) of the one-dimensional LogitLogistic, exactly: differences of its distribution."""
    edges = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
    cdf = torch.sigmoid((edges.logit() - base.loc) * torch.exp(-base.log_scale))
    return cdf.diff()


class ExactNoise(Distribution):
    """The posterior of the noise given the cell, of a one-dimensional LogitLogistic base."""

    def __init__(self, base, num_levels):
        super().__init__((1,))
        self.base, self.num_levels = base, num_levels

    conditional = True

    def _edges(self, context):
        level = ((context + 1) / 2 * (self.num_levels - 1)).round()
        low, high = (level + s for s in (0, 1))
        scale = torch.exp(-self.base.log_scale)
        cdf = [
            torch.sigmoid(((t / self.num_levels).logit() - self.base.loc) * scale)
            for t in (low, high)
        ]
        return level, *cdf

    def _sample(self, n, context, temperature):
        level, low, high = self._edges(context)
        cdf = low + (high - low) * torch.rand(n, 1)
        y = self.base.loc + cdf.logit() * self.base.log_scale.exp()
        return y.sigmoid() * self.num_levels - level

    def _log_prob(self, x, context):
        level, low, high = self._edges(context)
        z = (level + x) / self.num_levels
        return self.base.log_prob(z) - ((high - low).log() + math.log(self.num_levels)).squeeze(1)


def test_the_bounds_of_dequantization_against_the_truth(double):
    """Uniform < variational < importance-weighted < log P(x), and exact with the posterior."""
    levels = 4
    base = LogitLogistic((1,), loc=1.0, scale=0.35)
    truth = cell_masses(base, levels)
    assert abs(truth.sum().item() - 1) < 1e-12
    x = torch.arange(levels).unsqueeze(1)
    uniform = Flow(base, Dequantization(levels))

    # the ELBO of uniform noise by quadrature: the mean of log p over the cell
    grid = (torch.arange(20_000) + 0.5) / 20_000 / levels
    cells = (torch.arange(levels).unsqueeze(1) / levels + grid).reshape(-1, 1)
    quadrature = base.log_prob(cells).reshape(levels, -1).mean(1) - math.log(levels)
    draws = uniform.log_prob(x.repeat(2000, 1)).reshape(2000, levels)
    assert bool(((draws.mean(0) - quadrature).abs() < 5 * standard_error(draws)).all())
    assert bool((quadrature < truth.log()).all())
    # the weights' mean is P(x) itself
    weights = draws.exp()
    assert bool(((weights.mean(0) - truth).abs() < 5 * standard_error(weights)).all())

    def gap(flow, num_samples, repeats=1000):
        many = x.repeat(repeats, 1)
        bound = iwbo(flow, many, num_samples=num_samples).reshape(repeats, levels)
        return (truth.log() - bound).mean(1)

    gaps = [gap(uniform, k).detach() for k in (1, 4, 16, 64)]
    for loose, tight in itertools.pairwise(gaps):
        error = (standard_error(loose) ** 2 + standard_error(tight) ** 2) ** 0.5
        assert (loose.mean() - tight.mean()) > 3 * error
    assert gaps[-1].mean() > -3 * standard_error(gaps[-1])
    assert gaps[-1].mean() < 0.05 * gaps[0].mean()

    # variational noise, learned a little
    noise = LogitLogistic((1,), net=MLP(1, 2, [16], "tanh", zero_init=True))
    variational = Flow(base, Dequantization(levels, noise))
    optimizer = torch.optim.Adam(noise.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (-variational.log_prob(x.repeat(32, 1)).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        learned, weighted = gap(variational, 1), gap(variational, 16)
    assert 3 * standard_error(learned) < learned.mean() < 0.5 * gaps[0].mean()
    assert weighted.mean() < learned.mean()

    exact = Flow(base, Dequantization(levels, ExactNoise(base, levels)))
    for _ in range(5):
        torch.testing.assert_close(exact.log_prob(x), truth.log(), atol=1e-9, rtol=0)


def test_a_dequantized_model_of_two_dimensions_has_unit_mass(double):
    base = StandardNormal((2,))
    layers = [
        Dequantization(3),
        Logit(),
        Affine(2, shift=0.3),
        AffineCoupling(MLP(1, 2, [8], "tanh")),
    ]
    flow = Flow(base, layers)
    x = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        weights = flow.log_prob(x.repeat(4000, 1)).exp().reshape(4000, 9)
    total = weights.sum(1)
    assert abs(total.mean() - 1) < 4 * standard_error(total)
    assert standard_error(total) < 0.01
    # and what it generates follows the masses it reports
    drawn = flow.sample(40_000)
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / 40_000
    error = (counts / 40_000 + standard_error(weights) ** 2).sqrt()
    assert bool(((counts - weights.mean(0)).abs() < 4.5 * error).all())


def test_rounding_of_a_categorical_is_a_histogram(double):
    base = Categorical((2,), 4, [[0.1, -0.3, 0.7, 0.2], [0.5, 0.0, -0.5, 0.3]])
    flow = Flow(base, Rounding(4))
    assert not flow.lower_bound
    p = base.logits.softmax(-1)
    x = torch.tensor([[0.1, 0.99], [0.6, 0.25]])
    expected = (16 * torch.stack([p[0, 0] * p[1, 3], p[0, 2] * p[1, 1]])).log()
    torch.testing.assert_close(flow.log_prob(x), expected)
    # with noise in its cells, the density of a fine grid adds up to one
    noise = LogitLogistic((2,), net=MLP(2, 4, [8], "tanh"))
    with torch.no_grad():  # scales below 1: a density that vanishes at the edges of its cell
        noise.net.layers[-1].bias[1::2] = -0.9
    noisy = Flow(base, Rounding(4, noise))
    side = (torch.arange(600) + 0.5) / 600
    with torch.no_grad():
        density = noisy.log_prob(torch.cartesian_prod(side, side)).exp()
    assert abs(density.mean().item() - 1) < 2e-3
    inside = (noisy.sample(5000)[:, 0] * 4).floor() == 2
    assert abs(inside.double().mean() - p[0, 2]) < 0.03


def test_rounding_scores_the_lattice_too():
    """x on the edge of a cell has noise 0, where a logit-normal has no logarithm."""
    noise = FlowDistribution(Flow(StandardNormal(2), [Logit()]))
    z, ldj = Rounding(4, noise)(torch.tensor([[0.0, 0.25], [0.5, 1 - 2**-24]]))
    assert z.tolist() == [[0, 1], [2, 3]] and bool(ldj.isfinite().all())


def test_dequantization_of_images_with_a_flow():
    class Conv(nn.Module):
        def __init__(self, channels, out, context_features=0):
            super().__init__()
            self.context_features = context_features
            self.conv = nn.Conv2d(channels + context_features, out, 3, padding=1)

        def forward(self, x, context=None):
            return self.conv(x if context is None else torch.cat([x, context], 1))

    shape = (3, 4, 4)
    coupling = AffineCoupling(Conv(1, 4, context_features=6))
    noise = FlowDistribution(
        Flow(StandardNormal(shape), [Logit(), coupling]), shape, embed=Conv(3, 6)
    )
    flow = Flow(Uniform(shape), Dequantization(256, noise))
    x = torch.randint(256, (5, *shape), dtype=torch.uint8)
    assert torch.equal(flow.decode(flow.encode(x)), x.long())
    assert bool(flow.log_prob(x).isfinite().all())
    assert flow.sample(2).shape == (2, *shape)
    flow.log_prob(x).mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in flow.parameters())


def test_dequantization_behind_the_whole_line_takes_the_nearest_level():
    layer = Dequantization(4)
    z = torch.tensor([[-3.0, 0.3, 1.0, 77.0, math.inf]])
    assert layer.inverse(z).tolist() == [[0, 1, 3, 3, 3]]
    with pytest.raises(ValueError, match=r"Dequantization.inverse: expected numbers"):
        layer.inverse(torch.tensor([[math.nan]]))
    strict = Dequantization(4, clamp=False)
    with pytest.raises(ValueError, match=r"Dequantization.inverse: expected values in \[0, 1\)"):
        strict.inverse(z)


# Slicing ----------------------------------------------------------------------------------------


class Regression(nn.Module):
    """x -> (A x, log s), channels alternating: the conditional of a joint normal."""

    def __init__(self, slope, log_scale):
        super().__init__()
        self.slope, self.log_scale = slope, log_scale

    def forward(self, x):
        loc = x @ self.slope.T
        return torch.stack([loc, self.log_scale.expand_as(loc)], 2).flatten(1)


def joint_normal():
    """x1 ~ N(0, I), x2 = A x1 + s eps: the decoder, and the joint as torch has it."""
    slope, log_scale = torch.tensor([[0.5, -1.0]]), torch.tensor([-0.3])
    decoder = DiagonalNormal((1,), net=Regression(slope, log_scale))
    covariance = torch.eye(3)
    covariance[2:, :2], covariance[:2, 2:] = slope, slope.T
    covariance[2, 2] = (slope @ slope.T).item() + (2 * log_scale).exp().item()
    return decoder, MultivariateNormal(torch.zeros(3), covariance)


def test_slice_gives_the_joint_density(double):
    decoder, joint = joint_normal()
    flow = Flow(StandardNormal((2,)), Slice(decoder, keep=2))
    x = torch.randn(20, 3)
    torch.testing.assert_close(flow.log_prob(x), joint.log_prob(x))
    assert not flow.lower_bound
    sample = flow.sample(50_000)
    torch.testing.assert_close(sample.T.cov(), joint.covariance_matrix, atol=0.04, rtol=0)


def test_slicing_off_a_standard_normal_changes_nothing(double):
    x = torch.randn(4, 6, 2, 2)
    flow = Flow(
        StandardNormal((2, 2, 2)),
        [Slice(StandardNormal((3, 2, 2)), keep=3), Slice(StandardNormal((1, 2, 2)), keep=2)],
    )
    torch.testing.assert_close(flow.log_prob(x), StandardNormal((6, 2, 2)).log_prob(x))
    assert torch.equal(flow.encode(x), x[:, :2])
    rows = Slice(StandardNormal((6, 1, 2)), keep=1, dim=2)
    z, ldj = rows(x)
    assert torch.equal(z, x[:, :, :1])
    torch.testing.assert_close(ldj, StandardNormal((6, 1, 2)).log_prob(x[:, :, 1:]))
    assert torch.equal(rows.inverse(z)[:, :, :1], z)


class Joint(Distribution):
    def __init__(self, normal):
        super().__init__((normal.event_shape[0],))
        self.normal = normal

    def _log_prob(self, x, context):
        return self.normal.log_prob(x)

    def _sample(self, n, context, temperature):
        return self.normal.sample((n,))


def test_augment_bounds_the_marginal_and_meets_it(double):
    decoder, joint = joint_normal()
    x = torch.randn(30, 2)
    truth = StandardNormal((2,)).log_prob(x)
    exact = Flow(Joint(joint), Augment(decoder, keep=2))
    torch.testing.assert_close(exact.log_prob(x), truth)  # for any draw of u
    loose = Flow(Joint(joint), Augment(StandardNormal((1,)), keep=2))
    assert loose.lower_bound
    draws = torch.stack([loose.log_prob(x) for _ in range(2000)])
    # the bound falls short by KL(N(0, 1) || p(u|x)), closed form
    slope, variance = torch.tensor([0.5, -1.0]), math.exp(-0.6)
    kl = 0.5 * ((1 + (x @ slope).square()) / variance - 1 + math.log(variance))
    error = standard_error(draws)
    assert bool(((draws.mean(0) - (truth - kl)).abs() < 5 * error).all())
    tight = torch.stack([iwbo(loose, x, num_samples=200) for _ in range(20)]).mean(0)
    assert bool((tight > draws.mean(0)).all()) and (truth - tight).mean().abs() < 0.3


def test_what_the_decoder_sees():
    decoder = Given((1, 2, 2), torch.tensor(0.5), conditional=True)
    layer = Slice(decoder, keep=1, context_features=1)
    z = torch.arange(4.0).reshape(1, 1, 2, 2)
    layer.inverse(z, torch.tensor([[9.0]]))
    assert torch.equal(decoder.seen, torch.cat([z, torch.full_like(z, 9.0)], 1))
    layer(torch.cat([z, z + 1], 1), torch.tensor([[9.0]]))
    assert torch.equal(decoder.seen, torch.cat([z, torch.full_like(z, 9.0)], 1))


def test_generation_scores_nothing():
    """Sampling from a generative surjection does not ask the encoder's density."""

    class Unscored(Given):
        def _log_prob(self, x, context):
            raise AssertionError("scored")

    for layer, z in (
        (Augment(Unscored((1,), 0.0), keep=2), torch.randn(3, 3)),
        (Dequantization(4, Unscored((2,), 0.5)), torch.rand(3, 2)),
        (ArgmaxGenerative(2, 3, Unscored((6,), 0.5)), torch.randn(3, 6)),
        (BinaryArgmaxGenerative(2, 4, Unscored((4,), 0.5)), torch.randn(3, 4)),
    ):
        assert layer.inverse(z).shape == (3, 2)


# Argmax -----------------------------------------------------------------------------------------

LOC = torch.tensor([0.5, -0.4, 0.1], dtype=torch.float64)


def normal_argmax(loc):
    """P(the k-th of independent unit normals is the greatest), by quadrature."""
    t = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    density = normal.log_prob(t.unsqueeze(1) - loc).exp()
    below = normal.cdf(t.unsqueeze(1) - loc)
    rest = below.prod(1, keepdim=True) / below.clamp_min(1e-300)
    return torch.trapezoid(density * rest, t, dim=0)


def binary_masses(loc):
    """P of every sign pattern of independent unit normals, the lowest digit first."""
    up = torch.special.ndtr(loc)
    digits = (torch.arange(2 ** len(loc)).unsqueeze(1) >> torch.arange(len(loc))) & 1
    return torch.where(digits.bool(), up, 1 - up).prod(1)


def argmax_cases():
    normal = {"loc": LOC, "scale": 1.0}
    yield ArgmaxGenerative(1, 3), DiagonalNormal((3,), **normal), normal_argmax(LOC)
    yield (
        ArgmaxGenerative(1, 3, Logistic((3,), net=MLP(3, 6, [8], "tanh"))),
        DiagonalNormal((3,), **normal),
        normal_argmax(LOC),
    )
    yield (
        GumbelArgmaxGenerative(1, 3, logits=[0.0, -0.2, 0.1]),
        Gumbel((3,), loc=LOC),
        LOC.softmax(0),
    )
    yield BinaryArgmaxGenerative(1, 8), DiagonalNormal((3,), **normal), binary_masses(LOC)


@pytest.mark.parametrize("case", range(4))
def test_argmax_bounds_the_enumerated_truth(case, double):
    layer, base, truth = list(argmax_cases())[case]
    assert abs(truth.sum().item() - 1) < 1e-8
    flow, k = Flow(base, layer), len(truth)
    x = torch.arange(k).unsqueeze(1)
    with torch.no_grad():
        draws = flow.log_prob(x.repeat(60_000, 1)).reshape(-1, k)
        weights = draws.exp()
        assert bool(((weights.mean(0) - truth).abs() < 5 * standard_error(weights)).all())
        assert bool((standard_error(weights) < 0.01).all())
        total = weights.sum(1)
        assert abs(total.mean() - 1) < 4 * standard_error(total)
        assert bool((draws.mean(0) + 3 * standard_error(draws) < truth.log()).all())
        previous = draws.mean()
        for samples in (10, 100):
            bound = iwbo(flow, x.repeat(400, 1), num_samples=samples).reshape(-1, k)
            assert previous < bound.mean()
            assert bound.mean() - 3 * standard_error(bound).mean() < truth.log().mean()
            previous = bound.mean()
        assert truth.log().mean() - previous < 0.1
        counts = torch.bincount(flow.sample(40_000).flatten(), minlength=k) / 40_000
    assert bool(((counts - truth).abs() < 4.5 * (truth / 40_000).sqrt()).all())


def test_gumbels_at_the_right_place_have_no_gap(double):
    phi = torch.randn(2, 5)
    flow = Flow(Gumbel((10,), loc=phi.flatten()), GumbelArgmaxGenerative(2, 5, logits=phi))
    x = torch.randint(5, (200, 2))
    expected = Categorical((2,), 5, phi).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected, atol=1e-9, rtol=0)
    # and the other direction: scores of a categorical are independent Gumbels
    backward = Flow(Categorical((2,), 5, phi), GumbelArgmaxInference(2, 5, logits=phi))
    scores = 3 * torch.randn(200, 10).clamp(-1, 3)
    expected = Gumbel((10,), loc=phi.flatten()).log_prob(scores)
    torch.testing.assert_close(backward.log_prob(scores), expected)
    mean = backward.sample(60_000).mean(0)
    torch.testing.assert_close(mean, phi.flatten() + 0.5772156649, atol=0.03, rtol=0)


@pytest.mark.parametrize("make", [ArgmaxInference, BinaryArgmaxInference])
def test_the_log_determinant_of_the_thresholds(make, double):
    noise = Given((4,) if make is ArgmaxInference else (2,), 0.0)
    layer = make(1, 4, noise)
    for category in range(4):
        z = torch.tensor([[category]])
        v = torch.randn(noise.event_shape)

        def scores(value, z=z):
            noise.value = value
            return layer.inverse(z)[0]

        noise.value = v
        x, ldj = layer.inverse_and_ldj(z)
        jacobian = torch.autograd.functional.jacobian(scores, v)
        torch.testing.assert_close(ldj, -torch.linalg.slogdet(jacobian)[1].reshape(1))
        again, forward = layer(x)
        assert again.item() == category
        torch.testing.assert_close(forward, ldj)


def test_the_layout_of_scores():
    x = torch.randn(3, 6, 2)  # two channels of length two, three categories
    z = ArgmaxInference((2, 2), 3)(x)[0]
    for b, c, i in itertools.product(range(3), range(2), range(2)):
        assert z[b, c, i] == x[b, 3 * c : 3 * c + 3, i].argmax()
    bits = BinaryArgmaxInference((2, 2), 8)(x)[0]
    for b, c, i in itertools.product(range(3), range(2), range(2)):
        expected = sum(2**m * int(x[b, 3 * c + m, i] > 0) for m in range(3))
        assert bits[b, c, i] == expected
    phi = torch.randn(2, 2, 3)
    stored = GumbelArgmaxInference((2, 2), 3, logits=phi).logits
    assert torch.equal(stored, phi.movedim(-1, 1))


def test_what_the_argmax_noise_sees():
    noise = Given((6, 1), torch.tensor(0.5), conditional=True)
    layer = ArgmaxGenerative((2, 1), 3, noise, context_features=1)
    layer(torch.tensor([[[2], [0]]]), torch.tensor([[5.0]]))
    assert noise.seen.flatten().tolist() == [0, 0, 1, 1, 0, 0, 5]
    noise = Given((3,), torch.tensor(0.5), conditional=True)
    BinaryArgmaxGenerative(1, 6, noise)(torch.tensor([[5]]))
    assert noise.seen.flatten().tolist() == [1, -1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", [ArgmaxGenerative, BinaryArgmaxGenerative])
def test_extreme_noise_keeps_the_category(cls, dtype):
    """Scores far above the threshold, or equal to it, round to it and must not pass it."""
    x = torch.arange(4).unsqueeze(1)
    width = 4 if cls is ArgmaxGenerative else 2
    values = [0.0, 1e-30, -1e-30, 1.0, -1.0, 50.0, -50.0, 1e4, -1e4, 1e30, -1e30]
    patterns = torch.tensor(list(itertools.product(values, repeat=2)), dtype=dtype)
    for low, high in patterns:
        v = torch.full((width,), low)
        v[1::2] = high
        v.requires_grad_()
        layer = cls(1, 4, Given((width,), 0.0)).to(dtype)
        layer.transform.noise.value = v
        z, ldj = layer(x)
        assert torch.equal(layer.inverse(z), x)
        assert bool(z.isfinite().all()) and bool(ldj.isfinite().all())
        (gradient,) = torch.autograd.grad(z.clamp(-1e3, 1e3).sum() + ldj.sum(), v)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbels_of_extreme_logits_keep_the_category(dtype):
    for spread in (0.0, 10.0, 80.0, 1e3):
        logits = spread * torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=dtype)
        layer = GumbelArgmaxGenerative(1, 4, logits=logits, learn=True).to(dtype)
        x = torch.arange(4).repeat(500).unsqueeze(1)
        z, ldj = layer(x)
        assert torch.equal(layer.inverse(z), x)
        assert bool(z.isfinite().all()) and bool(ldj.isfinite().all())
        (gradient,) = torch.autograd.grad(z.sum() + ldj.sum(), layer.transform.logits)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    "layer",
    [
        ArgmaxInference(1, 3),
        ArgmaxInference(1, 3, DiagonalNormal((3,), learn=True)),
        GumbelArgmaxInference(1, 3, learn=True),
        BinaryArgmaxInference(1, 8),
    ],
    ids=["default", "normal", "gumbel", "binary"],
)
def test_ties_go_to_the_first_and_stay_finite(layer):
    x = torch.tensor([[0.3, 0.3, 0.3], [-1.0, 2.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    z, ldj = layer(x)
    if not isinstance(layer, BinaryArgmaxInference):
        assert z.flatten().tolist() == [0, 1, 0]
    assert bool(ldj.isfinite().all())
    (gradient,) = torch.autograd.grad(ldj.sum(), x)
    assert bool(gradient.isfinite().all())


def test_categories_that_need_no_power_of_two():
    layer = BinaryArgmaxGenerative(1, 5)
    assert layer.inverse(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0]])).tolist() == [[4], [1]]
    with pytest.raises(ValueError, match=r"BinaryArgmaxInference.forward: expected signs that"):
        BinaryArgmaxInference(1, 5)(torch.ones(1, 3))
    x = torch.arange(5).unsqueeze(1)
    assert torch.equal(layer.inverse(layer(x)[0]), x)


# New distributions ------------------------------------------------------------------------------


def test_logit_logistic_and_gumbel_against_quadrature(double):
    grid = (torch.arange(200_000) + 0.5) / 200_000
    noise = LogitLogistic((1,), loc=0.7, scale=0.6)
    density = noise.log_prob(grid.unsqueeze(1)).exp()
    assert abs(density.mean().item() - 1) < 1e-6
    x, log_p = noise.sample_and_log_prob(30_000)
    torch.testing.assert_close(log_p, noise.log_prob(x))
    assert abs(x.mean().item() - (density * grid).mean().item()) < 0.01
    assert noise.log_prob(torch.tensor([[0.0], [1.0], [-1.0]])).tolist() == [-math.inf] * 3
    torch.testing.assert_close(LogitLogistic((3,)).log_prob(torch.rand(4, 3)), torch.zeros(4))
    with pytest.raises(ValueError, match=r"LogitLogistic.sample_and_log_prob: expected n"):
        noise.sample_and_log_prob()

    gumbel = Gumbel((2,), loc=[0.3, -1.0], scale=[0.5, 2.0])
    reference = torch.distributions.Gumbel(gumbel.loc, torch.tensor([0.5, 2.0]))
    x = reference.sample((50,))
    torch.testing.assert_close(gumbel.log_prob(x), reference.log_prob(x).sum(1))
    sample = gumbel.sample(60_000)
    torch.testing.assert_close(sample.mean(0), reference.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(sample.var(0), reference.variance, atol=0.2, rtol=0)


# Bad input --------------------------------------------------------------------------------------

INTEGERS = torch.tensor([[0, 3], [1, 2]])

MESSAGES = {
    "level too high": (
        lambda: Dequantization(3)(INTEGERS),
        "Dequantization.forward: expected levels 0 to 2, got 1 values outside it, from 3 to 3",
    ),
    "level too low": (
        lambda: Dequantization(4)(INTEGERS - 1),
        "Dequantization.forward: expected levels 0 to 3, got 1 values outside it, from -1 to -1",
    ),
    "levels as floats": (
        lambda: Dequantization(4)(INTEGERS.float()),
        "Dequantization.forward: expected an integer tensor, got torch.float32",
    ),
    "latent of integers": (
        lambda: Dequantization(4).inverse(INTEGERS),
        "Dequantization.inverse: expected a floating-point tensor, got torch.int64",
    ),
    "wrong shape": (
        lambda: Dequantization(4, Uniform((3,)))(INTEGERS),
        "Dequantization.forward: expected shape (batch, 3), got (2, 2)",
    ),
    "noise outside": (
        lambda: Dequantization(4, Given((2,), 1.5))(INTEGERS),
        "Dequantization.forward: expected noise in [0, 1]"
        ", got 4 values outside it, from 1.5 to 1.5",
    ),
    "no levels": (
        lambda: Dequantization(0),
        "Dequantization: expected num_levels in 1 to 65536, got 0",
    ),
    "too many levels": (
        lambda: Rounding(65_537),
        "Rounding: expected num_levels in 1 to 65536, got 65537",
    ),
    "levels as a float": (
        lambda: Rounding(4.0),
        "Rounding: expected num_levels in 1 to 65536, got 4.0",
    ),
    "a mass as noise": (
        lambda: Dequantization(4, Bernoulli((2,))),
        "Dequantization: expected a density (a Distribution that is not discrete) as noise"
        ", got Bernoulli",
    ),
    "a net as noise": (
        lambda: Rounding(4, MLP(2, 2)),
        "Rounding: expected a density (a Distribution that is not discrete) as noise, got MLP",
    ),
    "context for uniform noise": (
        lambda: Dequantization(4, context_features=2),
        "Dequantization: expected a conditional noise to read 2 features of the context"
        ", got uniform noise",
    ),
    "context for a fixed noise": (
        lambda: Rounding(4, Uniform((2,)), context_features=1),
        "Rounding: expected context_features >= 0, and a conditional noise where it is positive"
        ", got 1 and Uniform",
    ),
    "x past the end": (
        lambda: Rounding(4)(torch.tensor([[0.5, 1.0]])),
        "Rounding.forward: expected values in [0, 1), got 1 values outside it, from 1 to 1",
    ),
    "negative x": (
        lambda: Rounding(4, scale=False)(torch.tensor([[-0.5, 1.0]])),
        "Rounding.forward: expected values in [0, 4), got 1 values outside it, from -0.5 to -0.5",
    ),
    "rounding's level too high": (
        lambda: Rounding(3).inverse(INTEGERS),
        "Rounding.inverse: expected levels 0 to 2, got 1 values outside it, from 3 to 3",
    ),
    "keep nothing": (
        lambda: Slice(StandardNormal((2,)), keep=0),
        "Slice: expected keep >= 1, got 0",
    ),
    "no such dimension": (
        lambda: Slice(StandardNormal((2,)), keep=1, dim=2),
        "Slice: expected dim in 1 to 1 for a decoder of events (2,), got 2",
    ),
    "slice of another shape": (
        lambda: Slice(StandardNormal((2, 4, 4)), 2)(torch.zeros(1, 3, 4, 4)),
        "Slice.forward: expected shape (batch, 4, 4, 4), got (1, 3, 4, 4)",
    ),
    "unslice of another shape": (
        lambda: Slice(StandardNormal((2,)), 2).inverse(torch.zeros(1, 4)),
        "Slice.inverse: expected shape (batch, 2), got (1, 4)",
    ),
    "augment of another shape": (
        lambda: Augment(StandardNormal((2,)), 3)(torch.zeros(1, 2)),
        "Augment.forward: expected shape (batch, 3), got (1, 2)",
    ),
    "a mass as encoder": (
        lambda: Augment(Categorical((2,), 3), 3),
        "Augment: expected a density (a Distribution that is not discrete) as encoder"
        ", got Categorical",
    ),
    "context missing": (
        lambda: Slice(DiagonalNormal((1,), net=MLP(3, 2)), 1, context_features=2)(
            torch.zeros(1, 2)
        ),
        "Slice.forward: expected a context with 2 features, got none",
    ),
    "context of another size": (
        lambda: Slice(DiagonalNormal((1,), net=MLP(3, 2)), 1, context_features=2)(
            torch.zeros(1, 2), torch.zeros(1, 3)
        ),
        "Slice.forward: expected a context with 2 features, (batch, 2) or (1, 2), got shape (1, 3)",
    ),
    "one category": (
        lambda: ArgmaxInference(2, 1),
        "ArgmaxInference: expected num_classes >= 2, got 1",
    ),
    "category too high": (
        lambda: ArgmaxGenerative(2, 3)(INTEGERS),
        "ArgmaxGenerative.forward: expected classes 0 to 2, got 1 values outside it, from 3 to 3",
    ),
    "category negative": (
        lambda: GumbelArgmaxGenerative(2, 4)(INTEGERS - 1),
        "GumbelArgmaxGenerative.forward: expected classes 0 to 3"
        ", got 1 values outside it, from -1 to -1",
    ),
    "binary category too high": (
        lambda: BinaryArgmaxInference(2, 3).inverse(INTEGERS),
        "BinaryArgmaxInference.inverse: expected classes 0 to 2"
        ", got 1 values outside it, from 3 to 3",
    ),
    "categories as floats": (
        lambda: ArgmaxGenerative(2, 4)(INTEGERS.float()),
        "ArgmaxGenerative.forward: expected an integer tensor, got torch.float32",
    ),
    "scores of another shape": (
        lambda: ArgmaxGenerative(2, 3).inverse(torch.zeros(1, 5)),
        "ArgmaxGenerative.inverse: expected shape (batch, 6), got (1, 5)",
    ),
    "noise of another shape": (
        lambda: ArgmaxInference(2, 3, Logistic((5,))),
        "ArgmaxInference: expected a noise of event shape (6,), one value a score, got (5,)",
    ),
    "scores not numbers": (
        lambda: ArgmaxGenerative(1, 2).inverse(torch.tensor([[math.nan, 0.0]])),
        "ArgmaxGenerative.inverse: expected numbers, got 1 values outside it",
    ),
    "logits of another shape": (
        lambda: GumbelArgmaxInference(2, 3, logits=[0.0, 1.0]),
        "GumbelArgmaxInference: logits: expected a shape that broadcasts to (2, 3), got (2,)",
    ),
    "net of another shape": (
        lambda: GumbelArgmaxInference(2, 3, net=MLP(6, 5))(torch.zeros(1, 6)),
        "GumbelArgmaxInference.forward: expected the net to give shape (1, 6), got (1, 5)",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_bad_input_is_named(name):
    call, message = MESSAGES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_value_checks_can_be_switched_off():
    with check_values(False):
        assert Dequantization(3)(INTEGERS)[0].shape == (2, 2)
        assert Rounding(3)(torch.tensor([[2.0]]))[0].tolist() == [[2]]


def test_elbo_averages(double):
    flow = Flow(LogitLogistic((1,), loc=0.5), Dequantization(4))
    x = torch.tensor([[1]])
    assert elbo(flow, x, num_samples=4000).item() == pytest.approx(
        iwbo(flow, x, num_samples=4000).item(), abs=0.1
    )


def test_augment_generates_without_scoring():
    class NeverScored(StandardNormal):
        def _log_prob(self, x, context):
            raise AssertionError("scored while sampling")

    layer = Augment(NeverScored(1), keep=2)
    z = torch.randn(5, 3)
    assert torch.equal(layer.inverse(z), z[:, :2])


def test_messages_for_every_integer_dtype():
    for dtype in (torch.uint8, torch.uint16, torch.int8, torch.int32):
        x = torch.tensor([[1, 5]], dtype=dtype)
        with pytest.raises(ValueError, match="expected levels 0 to 3, got 1 values outside it"):
            Dequantization(4)(x)
