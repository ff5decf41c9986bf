"""Synthetic 2-D datasets: sampler, log density and entropy must describe one distribution."""

import math
import subprocess
import sys
from functools import cache
from itertools import pairwise

import pytest
import torch
from scipy import integrate
from torch import Tensor

from surflow.data.density import SyntheticDataset2d, grid_entropy
from surflow.data.synthetic import DATASETS, make_dataset

NAMES = sorted(DATASETS)
PAPER = ("checkerboard", "corners", "eight_gaussians", "four_circles")
LOG_2PIE = math.log(2 * math.pi) + 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def draws(name: str) -> Tensor:
    return make_dataset(name).sample(20_000, generator(1)).double()


def grid(half_width: float, cells: int) -> tuple[Tensor, float]:
    """Cell midpoints (cells², 2) and the cell area."""
    h = 2 * half_width / cells
    axis = (torch.arange(cells, dtype=torch.float64) + 0.5) * h - half_width
    return torch.cartesian_prod(axis, axis), h**2


def gaussian_2d(x: Tensor, centre: tuple[float, float], std: float) -> float:
    square = (x[0] - centre[0]) ** 2 + (x[1] - centre[1]) ** 2
    return math.exp(-float(square) / (2 * std**2)) / (2 * math.pi * std**2)


def test_registry():
    assert set(PAPER) < set(DATASETS)
    for name, cls in DATASETS.items():
        dataset = make_dataset(name)
        assert type(dataset) is cls and isinstance(dataset, SyntheticDataset2d)
        assert dataset.name == name
        assert dataset.window > 0
        assert dataset.bound is None or dataset.window == dataset.bound
        assert dataset.symmetry in {"symmetric", "antisymmetric", None}
        assert dataset.entropy_method in {"closed form", "quadrature"}


@pytest.mark.parametrize("name", PAPER)
def test_paper_datasets_declare_their_support_and_symmetry(name):
    dataset = make_dataset(name)
    assert dataset.window == 4
    assert dataset.bound == (4 if name in {"checkerboard", "corners"} else None)
    assert dataset.symmetry == ("antisymmetric" if name == "checkerboard" else "symmetric")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkerboard", math.log(32)),
        ("corners", 2 / 3 * math.log(24) + math.log(12) / 3),
        ("gaussian", LOG_2PIE),
        ("banana", LOG_2PIE + math.log(2)),
        ("sinusoid", LOG_2PIE + math.log(1.5 * 0.3)),
        ("linear_gaussian", LOG_2PIE + 0.5 * math.log(0.16 * (0.16 + 1.5**2 + 0.8**2))),
    ],
)
def test_closed_form_entropy(name, value):
    dataset = make_dataset(name)
    assert dataset.entropy_method == "closed form"
    assert dataset.entropy == pytest.approx(value, abs=1e-6)
    assert grid_entropy(dataset.log_prob, dataset.extent, dataset.step) == pytest.approx(
        value, abs=1e-4
    )


def test_paper_entropies():
    values = {
        "checkerboard": 3.4657,
        "corners": 2.9470,
        "eight_gaussians": 2.832,
        "four_circles": 2.871,
    }
    for name, value in values.items():
        assert make_dataset(name).entropy == pytest.approx(value, abs=1e-3)
    assert make_dataset("four_circles").entropy_method == "quadrature"


@pytest.mark.parametrize("name", ["eight_gaussians", "four_circles", "rings", "gaussian_grid"])
def test_quadrature_is_converged(name):
    dataset = make_dataset(name)
    finer = grid_entropy(dataset.log_prob, 1.2 * dataset.extent, dataset.step / 2)
    assert dataset.entropy == pytest.approx(finer, abs=1e-5)


def test_pinwheel_entropy_agrees_with_the_warped_density():
    dataset = make_dataset("pinwheel")
    warped = grid_entropy(dataset.log_prob, dataset.extent, dataset.step)
    assert dataset.entropy == pytest.approx(warped, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_entropy_is_the_mean_negative_log_density_of_samples(name):
    dataset = make_dataset(name)
    nll = -dataset.log_prob(draws(name))
    error = nll.std().item() / math.sqrt(len(nll))
    assert abs(nll.mean().item() - dataset.entropy) < 4 * error + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one(name):
    dataset = make_dataset(name)
    x, area = grid(dataset.extent, math.ceil(2 * dataset.extent / dataset.step))
    assert dataset.log_prob(x).exp().sum().item() * area == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_histogram_of_samples_matches_the_density(name):
    dataset, cells, fine = make_dataset(name), 16, 12
    x, area = grid(dataset.window, cells * fine)
    mass = dataset.log_prob(x).exp().reshape(cells, fine, cells, fine).sum((1, 3)) * area
    n = len(draws(name))
    edges = torch.linspace(-dataset.window, dataset.window, cells + 1, dtype=torch.float64)
    count = torch.histogramdd(draws(name), [edges, edges]).hist
    count, expected = count.flatten(), n * mass.flatten()

    big = expected >= 10
    assert big.sum() >= 16
    rest, expected_rest = n - count[big].sum(), n - expected[big].sum()  # outside included
    assert abs(rest - expected_rest) < 5.5 * math.sqrt(expected_rest.clamp(min=1))
    terms = (count[big] - expected[big]).square() / expected[big]
    assert terms.sum() < len(terms) + 5 * math.sqrt(2 * len(terms))
    assert terms.max() < 5.5**2


@pytest.mark.parametrize("name", NAMES)
def test_declared_symmetry_holds_for_the_density(name):
    dataset = make_dataset(name)
    x = torch.cat([draws(name)[:500], 8 * torch.rand(500, 2, generator=generator()).double() - 4])
    p = dataset.log_prob(x).exp()
    left, up = (dataset.log_prob(x * torch.tensor(s)).exp() for s in ([-1, 1], [1, -1]))
    both = dataset.log_prob(-x).exp()
    if dataset.symmetry == "symmetric":
        for flipped in (left, up, both):
            torch.testing.assert_close(flipped, p, rtol=1e-9, atol=1e-12)
    elif dataset.symmetry == "antisymmetric":
        top = p.max()
        for flipped in (left, up):
            torch.testing.assert_close(flipped, top - p, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(both, p, rtol=1e-12, atol=1e-15)
    else:
        assert max((left - p).abs().max(), (up - p).abs().max()) > 1e-2


def test_density_values_of_the_bounded_datasets():
    points = torch.tensor([[-3.0, -3.0], [-3.0, 1.0], [-1.0, -1.0], [3.0, 3.0], [3.0, -1.0]])
    points = points.double()
    off = torch.tensor([[1.0, -1.0], [-3.0, -1.0], [3.0, 1.0], [5.0, 1.0], [1.0, -5.0]])
    checkerboard, corners = make_dataset("checkerboard"), make_dataset("corners")
    torch.testing.assert_close(
        checkerboard.log_prob(points).exp(), torch.full((5,), 1 / 32.0).double()
    )
    assert (checkerboard.log_prob(off) == -math.inf).all()

    points = torch.tensor(
        [[1.5, -1.5], [1.5, 3.0], [-3.0, -1.5], [3.0, 3.0], [0.5, 1.5], [1.5, 5.0]]
    )
    expected = torch.tensor([2 / 24, 1 / 24, 1 / 24, 0, 0, 0]).double()
    torch.testing.assert_close(corners.log_prob(points.double()).exp(), expected)


@pytest.mark.parametrize("name", ["checkerboard", "corners"])
def test_bounded_samples_avoid_every_edge(name):
    dataset = make_dataset(name)
    x = dataset.sample(1_000_000, generator(3))
    assert x.dtype == torch.float32
    assert (x.abs() < dataset.bound).all() and (x != 0).all()
    assert (x != x.round()).all()  # all edges are integers
    assert (dataset.log_prob(x) > -math.inf).all()
    assert torch.logit(x.abs() / dataset.bound).isfinite().all()


@pytest.mark.parametrize("name", ["checkerboard", "corners"])
def test_extreme_draws_stay_inside(name, monkeypatch):
    randint = torch.randint

    def first_or_last(high, size, **kwargs):
        return (high - 1) * randint(2, size, **kwargs)

    monkeypatch.setattr(torch, "randint", first_or_last)
    dataset = make_dataset(name)
    x = dataset.sample(600, generator(3))
    assert len(x.unique(dim=0)) >= 4
    assert (x.abs() < dataset.bound).all() and (x != x.round()).all()
    assert (dataset.log_prob(x) > -math.inf).all()
    assert torch.logit(x.abs() / dataset.bound).isfinite().all()


@pytest.mark.parametrize("name", ["four_circles", "rings"])
def test_bessel_density_is_the_integral_over_the_circles(name):
    dataset = make_dataset(name)
    x = torch.tensor([[0.0, 0.0], [0.72, -0.1], [1.4, 2.6], [3.1, -0.9], [-1.05, 1.0]]).double()
    for point, log_p in zip(x, dataset.log_prob(x), strict=True):
        expected = 0.0
        for (a, b), radius in zip(dataset.centres, dataset.radii, strict=True):
            nearest = math.atan2(point[1] - b, point[0] - a)

            def integrand(t, p=point, a=a, b=b, r=radius, t0=nearest):
                centre = (a + r * math.cos(t + t0), b + r * math.sin(t + t0))
                return gaussian_2d(p, centre, dataset.noise) / (2 * math.pi)

            value, _ = integrate.quad(
                integrand, -math.pi, math.pi, points=[0.0], epsabs=0, epsrel=1e-9, limit=400
            )
            expected += value / len(dataset.radii)
        assert log_p.item() == pytest.approx(math.log(expected), abs=1e-7)


def test_log_density_is_finite_far_from_the_circles():
    for name in ("four_circles", "rings"):
        x = torch.tensor([[100.0, 0.0], [-70.0, 70.0], [0.0, 0.0]]).double().requires_grad_()
        log_p = make_dataset(name).log_prob(x)
        log_p.sum().backward()
        assert log_p.isfinite().all() and x.grad.isfinite().all()


# The curves once more, written independently of the module: (curve, range, density of t, σ).
CURVES = {
    "two_moons": (
        [
            lambda t: (2 * math.cos(t) - 1, 2 * math.sin(t) - 0.2),
            lambda t: (1 - 2 * math.cos(t), 0.8 - 2 * math.sin(t)),
        ],
        (0, math.pi),
        lambda t: 1 / math.pi,
        0.2,
    ),
    "spirals": (
        [
            lambda t: (-t * math.cos(t) / 3, t * math.sin(t) / 3),
            lambda t: (t * math.cos(t) / 3, -t * math.sin(t) / 3),
        ],
        (0, 3 * math.pi),
        lambda t: 2 * t / (3 * math.pi) ** 2,
        0.1,
    ),
    "swiss_roll": (
        [lambda t: (t * math.cos(t) / 5, t * math.sin(t) / 5)],
        (1.5 * math.pi, 4.5 * math.pi),
        lambda t: 1 / (3 * math.pi),
        0.2,
    ),
}


@pytest.mark.parametrize("name", sorted(CURVES))
def test_curve_density_is_the_integral_along_the_curves(name):
    curves, (low, high), weight, std = CURVES[name]
    x = torch.cat([draws(name)[:4], torch.tensor([[0.3, 0.4], [2.6, -1.3]]).double()])
    for point, log_p in zip(x, make_dataset(name).log_prob(x), strict=True):
        p = 0.0
        for curve in curves:

            def integrand(t, curve=curve, point=point):
                return weight(t) * gaussian_2d(point, curve(t), std) / len(curves)

            edges = torch.linspace(low, high, 25, dtype=torch.float64).tolist()
            for a, b in pairwise(edges):
                p += integrate.quad(integrand, a, b, epsabs=1e-14, epsrel=1e-8)[0]
        assert math.exp(log_p) == pytest.approx(p, rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_from_the_generator_alone(name):
    dataset = make_dataset(name)
    before = torch.random.get_rng_state()
    a, b, c = (dataset.sample(64, generator(s)) for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert a.shape == (64, 2) and a.dtype == torch.float32
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert dataset.sample(1, generator()).shape == (1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_keeps_the_dtype(name):
    dataset, x = make_dataset(name), draws(name)[:8]
    double, single = dataset.log_prob(x), dataset.log_prob(x.float())
    assert double.shape == (8,) and double.dtype == torch.float64
    assert single.dtype == torch.float32
    assert dataset.log_prob(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(single, double.float())
    torch.testing.assert_close(dataset.log_prob(x[:1]), double[:1])


def test_splits_are_reproducible_and_distinct():
    dataset = make_dataset("checkerboard")
    first, again = dataset.splits(50, 50, 60, seed=3), dataset.splits(50, 70, 60, seed=3)
    assert {k: tuple(v.shape) for k, v in first.items()} == {
        "train": (50, 2),
        "valid": (50, 2),
        "test": (60, 2),
    }
    assert torch.equal(first["train"], again["train"])
    assert torch.equal(first["test"], again["test"])  # whatever the size of valid
    assert not torch.equal(first["train"], first["valid"])
    assert not torch.equal(first["train"], first["test"][:50])
    assert not torch.equal(first["train"], dataset.splits(50, 50, 60, seed=4)["train"])
    other = make_dataset("corners").splits(50, 50, 60, seed=3)
    assert not torch.equal(first["train"], other["train"])


def test_splits_do_not_depend_on_the_process():
    code = (
        "from surflow.data.synthetic import make_dataset\n"
        "print(make_dataset('spirals').splits(3, 1, 1, seed=7)['train'].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = make_dataset("spirals").splits(3, 1, 1, seed=7)["train"]
    assert out.stdout.strip() == str(here.tolist())


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_bad_sizes(size):
    dataset = make_dataset("gaussian")
    message = f"expected a positive whole number, got {size!r}"
    with pytest.raises(ValueError) as error:
        dataset.splits(10, size, 10, seed=0)
    assert str(error.value) == f"valid: {message}"
    with pytest.raises(ValueError) as error:
        dataset.sample(size, generator())
    assert str(error.value) == f"n: {message}"


def test_other_bad_arguments():
    dataset = make_dataset("gaussian")
    with pytest.raises(ValueError, match=r"seed: expected an integer, got '0'"):
        dataset.splits(1, 1, 1, seed="0")
    with pytest.raises(ValueError, match=r"generator: expected a torch\.Generator, got None"):
        dataset.sample(3, None)
    with pytest.raises(ValueError, match=r"got torch.float32 \(3, 4\)"):
        dataset.log_prob(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"got torch.float32 \(2,\)"):
        dataset.log_prob(torch.zeros(2))
    with pytest.raises(ValueError, match=r"got torch.int64 \(3, 2\)"):
        dataset.log_prob(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="half_width > 0"):
        grid_entropy(dataset.log_prob, 0.0, 0.1)


def test_unknown_name():
    with pytest.raises(ValueError) as error:
        make_dataset("checkerbord")
    message = str(error.value)
    assert message.startswith("data.name: expected one of checkerboard, ")
    assert message.endswith(", got 'checkerbord'; did you mean 'checkerboard'?")
    assert all(name in message for name in DATASETS) and "\n" not in message
    with pytest.raises(ValueError) as error:
        make_dataset("zzz")
    assert "did you mean" not in str(error.value)
