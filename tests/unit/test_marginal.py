"""Likelihoods by enumeration and quadrature: against closed forms, and as densities of mass one."""

import itertools
import math

import pytest
import torch

from surflow.distributions import Categorical, DiagonalNormal, StandardNormal
from surflow.evaluation.marginal import Grid, marginal_log_prob
from surflow.flow import Flow
from surflow.models import unification as models
from surflow.nets import MLP
from surflow.objectives import iwbo
from surflow.proofs import double_precision
from surflow.transforms import (
    VAE,
    AbsGenerative,
    Affine,
    AffineCoupling,
    Augment,
    Dequantization,
    DiscretelyIndexed,
    IntervalFold,
    Inverse,
    Logit,
    Sequential,
    StochasticPermutation,
)


@pytest.fixture(autouse=True)
def float64():
    with double_precision():
        torch.manual_seed(0)
        yield


def shaken(flow: Flow, scale: float = 0.15) -> Flow:
    """Parameters moved off their start, which for these models is often a trivial one."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn_like(p))
    return flow.eval()


def plane(half_width: float, points: int) -> tuple[torch.Tensor, float]:
    axis = torch.linspace(-half_width, half_width, points)
    return torch.cartesian_prod(axis, axis), (2 * half_width / (points - 1)) ** 2


def test_ppca_is_the_closed_form():
    flow = shaken(models.ppca())
    x = 2 * torch.randn(200, 2)
    found = marginal_log_prob(flow, x, Grid(9.0, 801))
    assert (found.log_prob - models.ppca_log_prob(flow, x)).abs().max() < 1e-10
    assert found.difference.abs().max() < 1e-10


def test_ppca_closed_form_is_the_multivariate_normal():
    flow = shaken(models.ppca())
    net = flow.transforms[0].decoder.net
    w, b, s = net.loc.weight, net.loc.bias, torch.exp(net.log_scale)
    z, noise = torch.randn(400_000, 1), torch.randn(400_000, 2)
    x = z @ w.T + b + s * noise
    covariance = w @ w.T + s**2 * torch.eye(2)
    assert (torch.cov(x.T) - covariance).abs().max() < 0.02
    gap = (-models.ppca_log_prob(flow, x)).mean() - 0.5 * torch.logdet(
        2 * math.pi * math.e * covariance
    )
    assert gap.abs() < 0.01


def test_two_linear_layers_are_a_normal():
    """x = A y + noise, y = B z + noise: a product of Gaussians in closed form."""
    a, b = torch.tensor([[1.2, -0.3], [0.4, 0.9]]), torch.tensor([[0.8], [-0.5]])
    inner = VAE(
        DiagonalNormal(1, net=models.LinearNormalNet(2, 1, False)),
        DiagonalNormal(2, net=models.LinearNormalNet(1, 2, True)),
    )
    outer = VAE(
        DiagonalNormal(2, net=models.LinearNormalNet(2, 2, False)),
        DiagonalNormal(2, net=models.LinearNormalNet(2, 2, True)),
    )
    with torch.no_grad():
        for layer, weight, scale in ((outer, a, 0.5), (inner, b, 0.7)):
            layer.decoder.net.loc.weight.copy_(weight)
            layer.decoder.net.loc.bias.zero_()
            layer.decoder.net.log_scale.fill_(math.log(scale))
    flow = Flow(StandardNormal(1), [outer, inner])
    middle = b @ b.T + 0.49 * torch.eye(2)
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(2), a @ middle @ a.T + 0.25 * torch.eye(2)
    )
    x = torch.randn(50, 2)
    found = marginal_log_prob(flow, x, [Grid(8.0, 161), Grid(8.0, 161)])
    assert (found.log_prob - normal.log_prob(x)).abs().max() < 1e-9


def test_augmentation_is_the_marginal_of_the_joint():
    """x and u from one linear map of a normal: the marginal of x is a normal."""
    net = torch.nn.Linear(1, 4, bias=False)
    with torch.no_grad():  # z_x = x + slope u, scale 1
        net.weight.copy_(torch.tensor([[0.0], [0.7], [0.0], [-0.4]]))
    coupling = AffineCoupling(net, split=2, swap=True)
    flow = Flow(StandardNormal(3), [Augment(DiagonalNormal(1, scale=1.4), keep=2), coupling])
    slope = torch.tensor([0.7, -0.4])
    covariance = torch.eye(2) + torch.outer(slope, slope)  # x = z_x - slope u
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), covariance)
    x = torch.randn(40, 2)
    found = marginal_log_prob(flow, x, Grid(9.0, 201))
    assert (found.log_prob - normal.log_prob(x)).abs().max() < 1e-10


def test_signs_are_enumerated():
    flow = Flow(DiagonalNormal(2, loc=[0.3, -0.6]), [AbsGenerative(2, probability=0.7)])
    x = torch.rand(30, 2) + 0.01
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)))
    expected = torch.logsumexp(torch.stack([flow.base.log_prob(x * s) for s in signs]), 0)
    assert (marginal_log_prob(flow, x).log_prob - expected).abs().max() < 1e-12


def test_mixture_by_hand():
    """One layer of affine maps with fixed weights is a Gaussian mixture."""
    shifts, weights = [[-1.0, 0.5], [2.0, 0.0], [0.3, 0.3]], torch.tensor([0.2, 0.5, 0.3])
    layer = DiscretelyIndexed(
        [Affine(2, s, 0.5 + i) for i, s in enumerate(shifts)],
        gate=Categorical(1, 3, weights.log()),
        encoder=Categorical(1, 3, net=MLP(2, 3, [4])),
    )
    flow = Flow(StandardNormal(2), layer)
    x = torch.randn(50, 2)
    parts = []
    for i, shift in enumerate(shifts):
        scale = 0.5 + i
        normal = DiagonalNormal(2, loc=[-s / scale for s in shift], scale=1 / scale)
        parts.append(normal.log_prob(x) + weights[i].log())
    expected = torch.logsumexp(torch.stack(parts), 0)
    assert (marginal_log_prob(flow, x).log_prob - expected).abs().max() < 1e-12


def test_cells_add_up_to_one():
    flow = shaken(models.dequantization(12, num_couplings=2, num_bins=4), 0.05)
    levels = torch.arange(12)
    found = marginal_log_prob(flow, torch.cartesian_prod(levels, levels), cell_nodes=30)
    assert found.log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-3)


def test_cell_against_the_uniform_flow():
    """The identity flow: every cell has the mass of its part of a logistic."""
    flow = Flow(StandardNormal(1), [Dequantization(4), Logit()])
    found = marginal_log_prob(flow, torch.arange(4).view(4, 1), cell_nodes=64)
    edges = torch.logit(torch.linspace(0, 1, 5))
    cdf = torch.special.ndtr(edges)
    assert (found.log_prob.exp() - cdf.diff()).abs().max() < 1e-5


MODELS = {
    "vae": (lambda: models.vae(latent_features=1), Grid(7.0, 301)),
    "hvae": (lambda: models.hvae(latent_features=[1, 1]), Grid(7.0, 301)),
    "ddpm": (lambda: models.ddpm(num_steps=2, beta=(0.2, 0.5)), Grid(9.0, 91)),
    "anf": (lambda: models.anf(num_steps=1), Grid(8.0, 101)),
    "vflow": (lambda: models.vflow(num_augmented=1, num_couplings=2), Grid(8.0, 101)),
    "cif": (lambda: models.cif(num_layers=1, num_couplings=1), Grid(8.0, 81)),
    "dif": (lambda: models.dif(num_components=3), ()),
    "deep_gmm": (lambda: models.deep_gmm(num_components=[2, 3]), ()),
    "multi_scale": (lambda: models.multi_scale(num_couplings=2), ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_likelihood_has_mass_one(name):
    make, grids = MODELS[name]
    flow = make()
    if name in ("vflow",):
        flow.log_prob(torch.randn(64, 2))  # sets its activation normalisation
    flow = shaken(flow, 0.08)
    # an untrained diffusion model spreads wider than the others
    points, cell = plane(18.0, 91) if name == "ddpm" else plane(8.0, 81)
    found = marginal_log_prob(flow, points, grids)
    assert (found.log_prob.exp().sum() * cell).item() == pytest.approx(1.0, abs=2e-3)


def test_the_folded_likelihood_has_mass_one():
    flow = shaken(models.rad())
    points, _ = plane(4.0, 201)
    centres = points * (1 - 1 / 201)  # cell centres of the square
    mass = marginal_log_prob(flow, centres).log_prob.exp().sum() * (8.0 / 201) ** 2
    assert mass.item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_bounds_lie_below_and_tighten(name):
    make, grids = MODELS[name]
    flow = make()
    if name in ("vflow",):
        flow.log_prob(torch.randn(64, 2))
    flow = shaken(flow, 0.08)
    with torch.no_grad():
        x = flow.sample(400)
    truth = marginal_log_prob(flow, x, grids).log_prob
    if not flow.lower_bound:
        assert (flow.log_prob(x) - truth).abs().max() < 1e-10
        return
    gaps = []
    with torch.no_grad():
        for k in (1, 10, 100):
            gap = truth - iwbo(flow, x, num_samples=k)
            gaps.append((gap.mean().item(), (gap.std() / 20).item()))
    for mean, error in gaps:
        assert mean > -3 * error
    for (mean, error), (less, other) in itertools.pairwise(gaps):
        assert less - mean < 3 * math.hypot(error, other)
    assert abs(gaps[-1][0]) < max(0.7 * abs(gaps[0][0]), 4 * gaps[-1][1])


def test_a_wrong_jacobian_shows():
    """An exact flow is compared with autograd, not with itself."""

    class Wrong(Affine):
        def _forward(self, x, context):
            z, ldj = super()._forward(x, context)
            return z, ldj + 0.1

    flow = Flow(StandardNormal(2), [Wrong(2, scale=2.0)])
    x = torch.randn(10, 2)
    gap = flow.log_prob(x) - marginal_log_prob(flow, x).log_prob
    assert torch.allclose(gap, torch.full((10,), 0.1))


def test_nested_and_turned_layers_are_unfolded():
    fold = IntervalFold(2, 0, 3, -2.0, 2.0)
    affine = Affine(2, scale=1.5)
    plain = Flow(StandardNormal(2), [fold, affine, Affine(2, 0.2)])
    turned = Flow(
        StandardNormal(2),
        [
            Inverse(Inverse(fold)),
            Inverse(Sequential([Inverse(Affine(2, 0.2)), Inverse(affine)])),
        ],
    )
    x = 4 * torch.rand(20, 2) - 2
    expected = marginal_log_prob(plain, x).log_prob
    assert torch.allclose(marginal_log_prob(turned, x).log_prob, expected)


def test_an_augmentation_along_another_dimension():
    flow = Flow(StandardNormal((2, 2)), [Augment(DiagonalNormal((2, 1), scale=1.5), 1, dim=2)])
    x = torch.randn(5, 2, 1)
    found = marginal_log_prob(flow, x, Grid(8.0, 61)).log_prob
    assert torch.allclose(found, StandardNormal((2, 1)).log_prob(x), atol=1e-8)


def test_errors():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="does not know how to sum out StochasticPermutation"):
        marginal_log_prob(Flow(StandardNormal(2), [StochasticPermutation()]), x)
    with pytest.raises(ValueError, match="no grid left for VAE"):
        marginal_log_prob(models.hvae(), x, [Grid(3.0, 11)])
    with pytest.raises(ValueError, match="at most 3 dimensions"):
        marginal_log_prob(models.vae(latent_features=4), x, Grid(3.0, 11))
    with pytest.raises(ValueError, match="points >= 2"):
        marginal_log_prob(models.vae(), x, Grid(3.0, 1))
