"""Pictures of VAEs: latents against closed forms, means for draws, figures against their tables."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import nn

from surflow.data.digits import DigitData
from surflow.data.images import ImageData
from surflow.data.pixels import BrokenSamples
from surflow.distributions import Bernoulli, Categorical, DiagonalNormal, StandardNormal, Uniform
from surflow.evaluation.sampling import draw_unit
from surflow.evaluation.vae import (
    Decoded,
    aggregated_density,
    decoded_of,
    grid_divergence,
    grid_log_density,
    latent_arrays,
)
from surflow.files import write_json
from surflow.flow import Flow
from surflow.models.vae_studies import vae_of_images, vae_of_vectors
from surflow.record import load_records
from surflow.reporting import build_table, load_spec
from surflow.reporting.figures import grids as grid_figures
from surflow.reporting.figures.curves import learning_curve_figure
from surflow.reporting.figures.grids import image_figure, reconstruction_figure
from surflow.reporting.figures.images import image_sheet, tile
from surflow.reporting.figures.latents import latent_figure, latent_run_figure
from surflow.reporting.figures.layout import columns_of
from surflow.reporting.figures.published import depth_figure, depth_points
from surflow.transforms import VAE, Affine

HASH = "0123456789abcdef"


# Values as images


def data_of(binarization="fixed", num_levels=2, event_shape=(4,), image_shape=(1, 2, 2)):
    kind = type("Tiny", (DigitData,), {"image_shape": image_shape, "source_levels": num_levels})
    return kind(name="tiny", binarization=binarization, event_shape=event_shape)


def test_values_become_pixels():
    flat = torch.tensor([[0.0, 1.0, 0.25, 0.75]])
    pixels, levels = data_of().pixels(flat)
    assert (pixels.tolist(), levels, pixels.dtype) == ([[[[0, 1], [0, 1]]]], 2, torch.uint8)
    pixels, levels = data_of("grey").pixels(flat)
    assert (pixels.tolist(), levels) == ([[[[0, 255], [64, 191]]]], 256)
    pixels, levels = data_of("none", 17).pixels(16 * flat)
    assert (pixels.tolist(), levels) == ([[[[0, 16], [4, 12]]]], 17)
    reals = torch.tensor([[-0.3, 1.4, 0.4, 0.6]])  # of a normal decoder: the nearest level
    assert data_of().pixels(reals)[0].tolist() == [[[[0, 1], [0, 1]]]]


def test_bytes_of_256_levels_stay():
    """A byte compared with 256 would be compared with 0."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    data = ImageData("bytes", (1, 16, 16))
    assert data.image_shape == (1, 16, 16)
    pixels, levels = data.pixels(images)
    assert torch.equal(pixels, images) and levels == 256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([[0.0, math.nan, 0.0, 1.0]]), "expected finite values, got others in 1 of 1"),
        (torch.tensor([[0, 1, 2, 0]]), "expected levels 0 to 1"),
    ],
)
def test_what_is_no_image(values, message):
    with pytest.raises(BrokenSamples, match=message):
        data_of().pixels(values)


# Means


def test_means_of_decoders():
    z = torch.randn(3, 5)
    net = nn.Linear(5, 4)
    assert torch.allclose(Bernoulli(4, net=net).mean(z), 1 / (1 + (-net(z)).exp()))
    net = nn.Linear(5, 12)
    density = Categorical(4, 3, net=net)
    every = torch.arange(3).view(3, 1, 1).expand(3, 3, 4)
    single = Categorical(1, 3, net=nn.Identity())  # a pixel: its mean by enumeration
    logits = torch.stack(density._net_parameters(z, 3), -1).flatten(0, 1)
    p = torch.stack([single.log_prob(every[k, 0, :1].expand(12, 1), logits) for k in range(3)])
    expected = (p.exp() * torch.arange(3.0).unsqueeze(1)).sum(0).view(3, 4)
    assert torch.allclose(density.mean(z), expected, atol=1e-6)
    with pytest.raises(ValueError, match="known mean, got Uniform"):
        Uniform(2).mean(z)


@pytest.mark.parametrize("prior", ["standard", "realnvp", "mixture"])
def test_means_are_of_the_latents_of_the_draws(prior):
    """With a decoder that is all but certain, a draw is its rounded mean."""
    torch.manual_seed(0)
    flow = vae_of_vectors(6, 2, prior=prior, hidden_features=[16], flow_hidden_features=[8]).eval()
    decoder = flow.transforms[0].decoder
    with torch.no_grad():
        decoder.net[-1].weight *= 1e6
    parts = decoded_of(flow)
    assert parts.has_grey
    draws, means = (draw_unit(of, 0, 200, seed=3) for of in (flow, parts))
    assert 0.1 < draws.mean() < 0.9
    assert torch.equal(draws, means.round())
    other = draw_unit(parts, 0, 200, seed=4).round()
    assert not torch.equal(draws, other)


def test_grey_pixels_of_means():
    flow = vae_of_vectors(4, 2, hidden_features=[8])
    parts = Decoded(flow)
    pixels, levels, words = parts.pixels(torch.tensor([[0.0, 1.0, 0.5, 0.2]]), data_of())
    assert (pixels.tolist(), levels, words) == ([[[[0, 255], [128, 51]]]], 256, "decoder means")
    levels_of_three = data_of("none", 3)
    parts = Decoded(
        vae_of_vectors(4, 2, likelihood="categorical", num_levels=3, hidden_features=[8])
    )
    assert parts.pixels(torch.tensor([[0.0, 2.0, 1.0, 0.5]]), levels_of_three)[0].tolist() == [
        [[[0, 255], [128, 64]]]
    ]


def test_a_decoder_without_a_mean_draws():
    sizes = {"channels": (4, 4), "embed_features": 8, "decoder": "local"}
    flow = vae_of_images((1, 4, 4), 2, num_blocks=1, **sizes)
    parts = Decoded(flow.eval())
    assert not parts.has_grey
    with torch.no_grad():
        x = parts.images(torch.zeros(3, 2))
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    data = data_of(event_shape=(1, 4, 4), image_shape=(1, 4, 4))
    pixels, levels, words = parts.pixels(x, data)
    assert (levels, words) == (2, "decoder draws")
    assert torch.equal(pixels, x.to(torch.uint8))


def test_no_pictures_of_other_flows():
    assert decoded_of(Flow(StandardNormal(2), Affine(2))) is None


# Latents


def edges_of(low, high, cells):
    line = torch.linspace(low, high, cells + 1, dtype=torch.float64)
    return torch.stack([line, line])


def test_aggregated_density_has_the_mass_of_its_cells():
    """Cell by cell the mixture's mass, by distribution functions; one normal is very narrow."""
    loc = torch.tensor([[0.0, 0.5], [1.0, -1.0], [-2.03, 2.01]])
    scale = torch.tensor([[1.0, 0.3], [0.5, 2.0], [1e-4, 1e-4]])
    edges = edges_of(-12, 12, 48)
    density = aggregated_density(loc, scale, edges)
    e = edges[0].numpy()
    parts = [
        np.outer(*(np.diff(stats.norm.cdf(e, m, s)) for m, s in zip(mu, sigma, strict=True)))
        for mu, sigma in zip(loc.tolist(), scale.tolist(), strict=True)
    ]
    expected = sum(parts) / 3 / 0.25
    np.testing.assert_allclose(density.numpy(), expected, atol=1e-9)
    assert float(density.sum() * 0.25) == pytest.approx(1.0, abs=1e-7)  # tails beyond 5 sigma
    # the narrow one is all in the cell around it: [i, j] is at (z1_i, z2_j)
    i, j = np.searchsorted(e, -2.03) - 1, np.searchsorted(e, 2.01) - 1
    assert float(density[i, j]) * 0.25 > 1 / 3


def test_aggregated_density_does_not_depend_on_blocks(monkeypatch):
    loc, scale = torch.randn(50, 2), torch.rand(50, 2) + 0.1
    whole = aggregated_density(loc, scale, edges_of(-6, 6, 20))
    monkeypatch.setattr("surflow.evaluation.vae.ROWS", 7)
    torch.testing.assert_close(aggregated_density(loc, scale, edges_of(-6, 6, 20)), whole)


def test_grid_density_and_divergence_have_closed_forms():
    """q = N(m, s^2) per axis against a prior N(0, 2^2): KL = log(2/s) + (s^2 + m^2)/8 - 1/2."""
    prior = Flow(StandardNormal(2), [Affine(2, scale=0.5)])  # z / 2 is standard: N(0, 2^2)
    edges = edges_of(-14, 14, 400)
    log_p = grid_log_density(prior, edges)
    centres = ((edges[0, 1:] + edges[0, :-1]) / 2).numpy()
    line = stats.norm.logpdf(centres, 0, 2)
    np.testing.assert_allclose(log_p.numpy(), line[:, None] + line[None], atol=1e-4)
    area = (28 / 400) ** 2
    assert float(log_p.exp().sum() * area) == pytest.approx(1.0, abs=1e-5)
    m, s = (0.5, -1.0), (0.7, 1.5)
    density = aggregated_density(torch.tensor([m]), torch.tensor([s]), edges)
    exact = sum(math.log(2 / b) + (b * b + a * a) / 8 - 0.5 for a, b in zip(m, s, strict=True))
    assert grid_divergence(density, log_p, area) == pytest.approx(exact, abs=2e-3)
    # a prior that underflows where q has a trace of mass is no infinite divergence
    far = torch.full_like(log_p, -1000.0)
    assert math.isfinite(grid_divergence(density, far, area))


def linear_vae(**others):
    """q(z|x) = N(x_{1,2}, (1/2)^2), p(z) = N(0, 1)."""
    encoder = vae_of_vectors(4, 2, hidden_features=[8], **others).transforms[0].encoder
    embed, head = nn.Linear(4, 8), encoder.flow.base.net
    with torch.no_grad():
        embed.weight.zero_()
        embed.bias.zero_()
        embed.weight[0, 0] = embed.weight[1, 1] = 1.0
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, math.log(0.5), 0.0, math.log(0.5)]))
        head.weight[0, 0] = head.weight[2, 1] = 1.0
    encoder.net = embed
    return Flow(StandardNormal(2), VAE(encoder, Bernoulli(4, net=nn.Linear(2, 4))))


def test_latent_arrays_of_a_diagonal_posterior():
    torch.manual_seed(0)
    x = torch.randn(3000, 4)  # then the aggregated posterior is N(0, 1 + 1/4), nearly
    with torch.no_grad():
        found = latent_arrays(Decoded(linear_vae()), x)
    np.testing.assert_allclose(found["points"], x[:, :2].numpy(), atol=1e-6)
    assert found["aggregated"].shape == found["prior"].shape == (256, 256)
    step = (found["grid_high"] - found["grid_low"]) / 256
    assert step[0] == pytest.approx(step[1])
    assert found["inside"] == pytest.approx(1.0, abs=1e-4)
    assert found["aggregated"].sum() * step.prod() == pytest.approx(1.0, abs=1e-4)
    covariance = np.cov(x[:, :2].numpy().T) + 0.25 * np.eye(2)
    mean = x[:, :2].mean(0).numpy()
    expected = 0.5 * (np.trace(covariance) + mean @ mean - 2 - np.log(np.linalg.det(covariance)))
    assert found["kl"] == pytest.approx(expected, abs=0.01)  # of the normal of those moments


def test_latent_arrays_of_a_flow_posterior_are_of_draws():
    """A planar posterior that is the identity: the histogram of what is a normal."""
    torch.manual_seed(0)
    flow = linear_vae(posterior="planar", num_layers=1)
    x = torch.tensor([[0.5, -1.0, 0.0, 0.0]]).repeat(10, 1)
    with torch.no_grad():
        for name, value in flow.transforms[0].encoder.flow.transforms.named_parameters():
            value.zero_() if "net" in name or "weight" in name or "bias" in name else None
        found = latent_arrays(Decoded(flow), x)
    assert math.isnan(found["kl"])
    step = (found["grid_high"] - found["grid_low"]) / 128
    assert 0.999 < found["inside"] <= 1.0
    centres = found["grid_low"][:, None] + step[:, None] * (np.arange(128) + 0.5)
    mass = found["aggregated"] * step.prod()
    means = [float((mass.sum(1 - k) * centres[k]).sum()) for k in range(2)]
    np.testing.assert_allclose(means, found["points"].mean(0), atol=0.02)
    np.testing.assert_allclose(found["points"], found["points"][:1].repeat(10, 0), atol=0.03)


def test_a_prior_that_is_a_bound_has_no_picture():
    flow = linear_vae()
    inner = VAE(DiagonalNormal(2, net=nn.Linear(2, 4)), DiagonalNormal(2, net=nn.Linear(2, 4)))
    flow = Flow(StandardNormal(2), [flow.transforms[0], inner])
    with pytest.raises(ValueError, match="expected a prior with a density"):
        latent_arrays(Decoded(flow), torch.zeros(4, 4))


# The table's figures

TABLE = """
artefact: deep
title: Depths
unit: nats
direction: lower
rows:
  - {name: vae, label: VAE, experiment: deep/vae, depth: 0}
  - {name: p8, label: "Planar, 8", experiment: deep/p8, family: Planar, depth: 8}
  - {name: p3, label: "Planar, 3", experiment: deep/p3, family: Planar, depth: 3}
  - {name: i3, label: "IAF, 3", experiment: deep/i3, family: IAF, depth: 3}
  - {name: other, label: Other, experiment: deep/other}
columns:
  - {name: elbo, label: ELBO, metric: test/elbo_nats}
  - {name: units, label: Units, metric: test/active_units, unit: units, direction: higher}
sources: {them: "Somebody 2018"}
published:
  - {row: vae, column: elbo, value: 109.0, source: them}
  - {row: p3, column: elbo, value: 111.0, source: them}
quoted:
  - {row: p8, column: elbo, value: 107.0, source: them}
"""
VALUES = {"vae": 108.0, "p3": 106.0, "p8": 105.0, "i3": 104.0, "other": 103.0}


def spec_of(tmp_path, text=TABLE):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    return load_spec(path)


def metric(value, unit="nats", kind="bound", error=0.25):
    return {
        "value": value,
        "unit": unit,
        "kind": kind,
        "estimator": "ELBO, 10 samples a point",
        "standard_error": error,
        "count": 300,
    }


def fill(tmp_path, profile="paper", values=VALUES, text=TABLE):
    spec = spec_of(tmp_path, text)
    root = tmp_path / "runs"
    for row, value in values.items():
        content = {
            "schema": 1,
            "experiment": f"deep/{row}",
            "artefact": "deep",
            "row": row,
            "data": "bits",
            "model": "vae",
            "surjection": "none",
            "profile": profile,
            "seed": 0,
            "config_hash": HASH,
            "config": {"data": {"num_levels": 2}},
            "status": "complete",
            "metrics": {
                "test/elbo_nats": metric(value),
                "test/active_units": metric(7.0, "units", "score", None),
            },
            "commit": "ab" * 20,
            "dirty": False,
        }
        write_json(root / row / "record.json", content)
    keys = [(row.name, column.name, 0) for row in spec.rows for column in spec.columns]
    return build_table(spec, load_records(root), dict.fromkeys(keys, HASH), profile, (0,), None)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    found = []
    savefig = Figure.savefig

    def look(figure, *arguments, **options):
        found.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", look)
    return found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "depth: 3}",
            "depth: three}",
            r"'rows\[2\]\.depth' must be an integer, 0 or more, got str 'three'",
        ),
        (
            "depth: 8}",
            "depth: -1}",
            r"'rows\[1\]\.depth' must be an integer, 0 or more, got int -1",
        ),
        ("depth: 8}", "depth: true}", r"depth' must be an integer, 0 or more, got bool True"),
        (", depth: 8}", "}", r"rows\[1\] 'family' needs 'depth'"),
        ("family: IAF, ", "", r"rows\[3\] depth 3 needs 'family'"),
        (
            "family: IAF",
            "family: ''",
            r"'rows\[3\]\.family' must be a non-empty string, got str ''",
        ),
        ("depth: 0}", "depth: 0, family: Planar}", r"rows\[0\] 'family' is not for depth 0"),
        ("depth: 8}", "depth: 3}", r"rows\[2\] repeats family 'Planar', depth 3 of row 'p8'"),
        ("deep/other}", "deep/other, depth: 0}", r"rows\[4\] repeats depth 0 of row 'vae'"),
    ],
)
def test_places_are_read_strictly(tmp_path, old, new, message):
    assert old in TABLE
    with pytest.raises(ValueError, match=message) as caught:
        spec_of(tmp_path, TABLE.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_places_of_rows(tmp_path):
    rows = spec_of(tmp_path).rows
    places = [(row.family, row.depth) for row in rows]
    assert places == [(None, 0), ("Planar", 8), ("Planar", 3), ("IAF", 3), (None, None)]


def test_depth_points_begin_without_layers(tmp_path):
    table = fill(tmp_path)
    points = depth_points(table, table.spec.columns[0])
    assert {f: [(d, cell.ours) for d, cell in of] for f, of in points.items()} == {
        "Planar": [(0, 108.0), (3, 106.0), (8, 105.0)],
        "IAF": [(0, 108.0), (3, 104.0)],
    }
    alone = TABLE.replace(", family: Planar, depth: 8", "").replace(
        ", family: Planar, depth: 3", ""
    )
    alone = alone.replace(", family: IAF, depth: 3", "")
    table = fill(tmp_path, text=alone)
    points = depth_points(table, table.spec.columns[0])
    assert {f: [(d, cell.ours) for d, cell in of] for f, of in points.items()} == {
        "VAE": [(0, 108.0)]
    }


def test_depth_figure_draws_its_cells(tmp_path, drawn):
    """Lines through ours, bars of the standard error, hollow marks where theirs are."""
    depth_figure(fill(tmp_path), tmp_path / "depth.png")
    (figure,) = drawn
    (axes,) = figure.axes  # the count of units is no bound: it has no panel
    lines = [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == "-"]
    assert [[0, 108], [3, 106], [8, 105]] in lines and [[0, 108], [3, 104]] in lines
    hollow = {
        (line.get_marker(), *line.get_xydata()[0])
        for line in axes.lines
        if line.get_markerfacecolor() == "white"
    }
    assert hollow == {("D", 0, 109), ("D", 3, 111), ("s", 8, 107)}
    bars = {
        tuple(segment.ravel())
        for container in axes.containers
        for segment in container.lines[2][0].get_segments()
    }
    assert (8, 104.75, 8, 105.25) in bars and len(bars) == 4
    assert axes.get_xticks().tolist() == [0, 3, 8]
    assert axes.get_ylabel() == "test/elbo_nats (nats)\nlower is better"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [
        "Planar",
        "IAF",
        "ours (bar: standard error)",
        "published",
        "quoted from others",
    ]
    assert not figure._suptitle


def test_depth_figure_says_what_is_no_reproduction(tmp_path, drawn):
    depth_figure(fill(tmp_path, "smoke"), tmp_path / "depth.png")
    assert drawn[0]._suptitle.get_text() == "not a reproduction (profile smoke)"


def test_depth_figure_of_published_values_alone(tmp_path, drawn):
    depth_figure(fill(tmp_path, values={}), tmp_path / "depth.png")
    (axes,) = drawn[0].axes
    assert axes.get_xticks().tolist() == [0, 3, 8]
    placeless = TABLE.replace(", depth: 0", "")
    for place in (
        ", family: Planar, depth: 8",
        ", family: Planar, depth: 3",
        ", family: IAF, depth: 3",
    ):
        placeless = placeless.replace(place, "")
    with pytest.raises(ValueError, match="no row has a 'depth'"):
        depth_figure(fill(tmp_path, values={}, text=placeless), tmp_path / "depth.png")


def test_columns_of_own_data_are_one_picture(tmp_path):
    table = fill(tmp_path)
    assert {label: [c.name for c in of] for label, of in columns_of(table).items()} == {
        "bits": ["elbo", "units"]
    }


def grids(root, name, array, **others):
    rng = np.random.default_rng(0)
    arrays = {key: rng.integers(0, 256, (100, 1, 4, 4), dtype=np.uint8) for key in ("data", array)}
    np.savez_compressed(root / name, **arrays, num_levels=256, shown="decoder means", **others)
    return arrays


def test_reconstructions_beside_the_data(tmp_path, drawn):
    table = fill(tmp_path)
    arrays = grids(tmp_path / "runs" / "p3", "reconstructions.npz", "reconstructions")
    reconstruction_figure(table, tmp_path / "reconstructions.png")
    shown = {axes.get_title(): axes for axes in drawn[0].axes}
    assert list(shown) == ["Data", "VAE", "Planar, 8", "Planar, 3", "IAF, 3", "Other"]
    for title, name in (("Data", "data"), ("Planar, 3", "reconstructions")):
        pixels = np.asarray(shown[title].images[0].get_array())[..., 0]
        # ten images a row, a pixel between: the first row's second image
        np.testing.assert_array_equal(pixels[1:5, 6:10], arrays[name][1, 0])
        np.testing.assert_array_equal(pixels[46:50, 1:5], arrays[name][90, 0])
    assert shown["Planar, 3"].get_xlabel() == (
        "bits, seed 0\nprofile paper\ntest/elbo_nats ≤ 106.000 nats\n"
        "test/active_units 7.000\ndecoder means"
    )
    assert shown["VAE"].texts[0].get_text() == "not run"


def test_many_models_go_on_below(tmp_path, drawn, monkeypatch):
    """Six panels in rows of at most three: nothing overlaps, each has its name."""
    monkeypatch.setattr(grid_figures, "MOST_ACROSS", 3)
    table = fill(tmp_path)
    grids(tmp_path / "runs" / "vae", "images.npz", "samples")
    image_figure(table, tmp_path / "samples.png")
    boxes = [axes.get_position(original=True) for axes in drawn[0].axes]
    assert len(boxes) == 6 and len({round(box.x0, 6) for box in boxes}) == 3
    rows = sorted({round(box.y0, 6) for box in boxes}, reverse=True)
    assert len(rows) == 2
    assert [round(box.y0, 6) for box in boxes] == [rows[0]] * 3 + [rows[1]] * 3
    renderer = drawn[0].canvas.get_renderer()
    extents = [axes.get_tightbbox(renderer) for axes in drawn[0].axes]  # titles and captions too
    whole = drawn[0].bbox
    for i, box in enumerate(extents):
        assert box.y0 >= whole.y0 and box.y1 <= whole.y1
        assert not any(box.overlaps(other) for other in extents[i + 1 :])


def latent(folder, top, kl=0.5, **others):
    density = np.full((4, 4), 0.01)
    np.savez_compressed(
        folder / "latent.npz",
        grid_low=np.array([-2.0, -1.0]),
        grid_high=np.array([2.0, 3.0]),
        aggregated=density * top,
        prior=density.T,
        points=np.array([[0.0, 1.0], [1.0, 2.0]]),
        kl=kl,
        inside=1.0,
        **others,
    )


def test_latents_share_a_scale(tmp_path, drawn):
    table = fill(tmp_path, "smoke")
    latent(tmp_path / "runs" / "vae", 2.0, kl=1.2345)
    latent(tmp_path / "runs" / "p3", 0.5, kl=math.nan)
    latent_figure(table, tmp_path / "latent.png")
    panels = [axes for axes in drawn[0].axes if axes.images]
    limits = [axes.images[0].get_clim() for axes in panels]
    np.testing.assert_allclose(limits, [(0, 0.02), (0, 0.02), (0, 0.01), (0, 0.01)])
    assert list(panels[0].images[0].get_extent()) == [-2, 2, -1, 3]
    assert [axes.get_xlabel() for axes in panels] == [
        "bits, seed 0, smoke",
        "KL(posterior ‖ prior) 1.234 nats",
        "bits, seed 0, smoke",
        "posterior drawn: no divergence",
    ]
    assert [axes.get_ylabel() for axes in panels] == ["VAE", "", "Planar, 3", ""]
    assert [axes.get_title() for axes in panels][:2] == ["aggregated posterior", "prior"]
    assert drawn[0]._suptitle.get_text() == "not a reproduction (profile smoke)"


def test_latents_of_one_run(tmp_path, drawn):
    fill(tmp_path)
    latent(tmp_path / "runs" / "vae", 1.0, labels=np.array([3, 7]))
    file = tmp_path / "runs" / "vae" / "latent.npz"
    latent_run_figure(file, tmp_path / "latent.png")
    panel = drawn[0].axes[2]
    shown = [(c.get_label(), c.get_offsets().tolist()) for c in panel.collections]
    assert shown == [("3", [[0.0, 1.0]]), ("7", [[1.0, 2.0]])]
    with pytest.raises(ValueError, match=r"expected a run with latent\.npz"):
        file.unlink()
        latent_figure(fill(tmp_path), tmp_path / "latent.png")


def test_learning_curves_of_many_models_differ(tmp_path, drawn):
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,val/elbo_nats\n0,3\n1,2\n2,1\n")
    cells = {f"model {i}": {"bits": file} for i in range(13)}
    path = tmp_path / "curves.png"
    learning_curve_figure(cells, path, column="val/elbo_nats", metric="test/elbo_nats")
    styles = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
    assert len(styles) == 13


def test_sheets_side_by_side(tmp_path):
    from PIL import Image

    grid = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)
    path = image_sheet([grid, grid[::-1]], tmp_path / "sheet.png", columns=2, scale=1)
    pixels = np.asarray(Image.open(path))
    one = tile(grid, 2)[..., 0]
    width = one.shape[1]
    np.testing.assert_array_equal(pixels[:, :width], one)
    np.testing.assert_array_equal(pixels[:, -width:], tile(grid[::-1], 2)[..., 0])
    assert (pixels[:, width:-width] == 255).all() and pixels.shape[1] == 2 * width + width // 8
