"""Tables of sets of points: columns about some rows alone, scores a point, pictures."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from surflow.files import write_json
from surflow.record import load_records
from surflow.reporting import build_table, load_spec
from surflow.reporting.figures.curves import set_curve_figure, set_curve_label
from surflow.reporting.figures.published import published_figure
from surflow.reporting.figures.sets import cloud_panel, clouds_figure, set_figure
from surflow.reporting.grid import cell_text, render_csv, render_markdown
from surflow.reporting.verdicts import verdict_of

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "experiments" / "pointcloud" / "table.yaml"
HASH = "0123456789abcdef"
EXACT, ELBO, IWBO = (f"test/point_{name}_nats" for name in ("log_likelihood", "elbo", "iwbo"))


def metric(value, kind="likelihood"):
    how = {"likelihood": "exact log-likelihood", "bound": "IWBO, K = 10"}[kind]
    return {
        "value": value,
        "unit": "nats/point",
        "kind": kind,
        "estimator": f"{how}, mean over 100 test sets, divided by the 50 points of a set",
        "standard_error": 0.01,
        "count": 100,
    }


def put(root, row, metrics, profile="paper", curve=("val/nll_nats", (300.0, 290.0, 280.0))):
    """A run folder with a record, samples and a learning curve."""
    content = {
        "schema": 1,
        "experiment": f"pointcloud/{row}",
        "artefact": "pointcloud",
        "row": row,
        "data": "spatial_mnist",
        "model": "set_flow",
        "surjection": "none",
        "profile": profile,
        "seed": 0,
        "config_hash": HASH,
        "config": {"data": {"event_shape": [50, 2]}},
        "status": "complete",
        "metrics": metrics,
        "commit": "ab" * 20,
        "dirty": False,
    }
    folder = root / profile / "pointcloud" / row / "spatial_mnist" / "seed0"
    write_json(folder / "record.json", content)
    random = np.random.default_rng(0)
    np.savez(
        folder / "points.npz",
        samples=random.uniform(-1, 29, (30, 50, 2)).astype(np.float32),
        data=random.uniform(0, 28, (30, 50, 2)).astype(np.float32),
        width=28.0,
    )
    name, values = curve
    lines = ["step,epoch,train/nll_nats," + name + ",lr"]
    lines += [f"{100 * i},{i},,{v},0.001" for i, v in enumerate(values)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def fill(root, profile="paper"):
    spec = load_spec(SPEC).of_profile(profile)
    keys = [
        (r.name, c.name, 0)
        for r in spec.rows
        if r.experiment
        for c in spec.columns
        if c.shows(r.name)
    ]
    return build_table(spec, load_records(root), dict.fromkeys(keys, HASH), profile, (0,))


@pytest.fixture
def table(tmp_path):
    put(tmp_path, "sort_published", {EXACT: metric(-5.55)})
    bounds = {ELBO: metric(-5.34, "bound"), IWBO: metric(-5.31, "bound")}
    put(tmp_path, "permute", bounds, curve=("val/elbo_nats", (280.0, 270.0)))
    return fill(tmp_path)


def test_the_published_values():
    spec = load_spec(SPEC)
    values = {(q.row, q.column): q.value for q in spec.published}
    assert values == {
        ("bruno", "mnist_exact"): -5.68,
        ("neural_statistician", "mnist_elbo"): -5.37,
        ("flowscan", "mnist_exact"): -5.26,
        ("sort_published", "mnist_exact"): -5.53,
        ("permute", "mnist_iwbo"): -5.30,
    }
    columns = {c.name: c for c in spec.columns}
    for row, column in values:
        assert columns[column].shows(row)
        assert columns[column].direction == "higher"


def test_exact_values_and_bounds_have_columns_of_their_own(table):
    cells = table.cells
    assert cell_text(cells["sort_published", "mnist_exact"], 1) == "-5.550 ± 0.010 (-5.53)"
    assert cell_text(cells["permute", "mnist_elbo"], 1) == "-5.340 ± 0.010 bound"
    assert cell_text(cells["permute", "mnist_iwbo"], 1) == "-5.310 ± 0.010 bound (-5.30)"
    assert cell_text(cells["bruno", "mnist_exact"], 1) == "(-5.68)"
    assert cells["sort_published", "mnist_exact"].verdict == "too few seeds (1): worse by 0.020"
    for cell in (cells["sort", "mnist_iwbo"], cells["permute", "mnist_exact"]):
        assert (cell.verdict, cell_text(cell, 1)) == ("no such number", "–")
        assert cell.refusals == () and cell.missing == ()
    assert cell_text(cells["equivariant", "mnist_exact"], 1) == "not run"


def test_higher_is_better(tmp_path):
    put(tmp_path, "sort_published", {EXACT: metric(-5.70)})
    put(tmp_path, "permute", {ELBO: metric(-5.1, "bound"), IWBO: metric(-5.05, "bound")})
    cells = fill(tmp_path).cells
    sort = verdict_of(cells["sort_published", "mnist_exact"], "paper", 1)
    assert sort == "too few seeds (1): worse by 0.170"
    assert cells["permute", "mnist_iwbo"].verdict == "too few seeds (1): better by 0.250"


def test_the_page(table):
    page = render_markdown(table, command="make reproduce-pointcloud")
    assert "| SortFlow | -5.550 ± 0.010 (-5.53) | – | – |" in page
    assert "| PermuteFlow | – | -5.340 ± 0.010 bound | -5.310 ± 0.010 bound (-5.30) |" in page
    assert "Refused" not in page
    assert "2 log 28 = 6.664" in page
    assert "no such number" in render_csv(table)


def test_a_column_about_rows_that_are_not_there(tmp_path):
    content = yaml.safe_load(SPEC.read_text())
    content["columns"][0]["rows"] = ["sort", "sorted"]
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(
        ValueError, match=r"'columns\[0\]\.rows' must be a list of some of .*got str 'sorted'"
    ):
        load_spec(path)


# Pictures


def test_points_of_a_panel():
    axes = Figure().subplots()
    clouds = np.array([[[1.0, 2.0], [3.0, 9.0]], [[0.0, 4.0], [-0.1, 1.0]]])
    assert cloud_panel(axes, clouds, 4.0, "black") == 2  # outside their frames
    (dots,) = axes.collections
    assert np.allclose(dots.get_offsets(), [[1.0, 2.0], [1.08 * 4, 4.0]])  # the second to the right


def test_pictures(table, tmp_path):
    path = set_figure(table, tmp_path / "samples.png")
    width, height = Image.open(path).size
    assert width > 2 * height  # data and two models side by side, none for rows without a run
    once = path.read_bytes()
    assert set_figure(table, path).read_bytes() == once
    shown = {"a": np.zeros((5, 3, 2)), "b": np.ones((5, 3, 2))}
    size = Image.open(clouds_figure(shown, 2.0, tmp_path / "c.png", "title")).size
    assert size[0] > 1.5 * size[1]
    published_figure(table, tmp_path / "published.png")


def test_pictures_without_runs(tmp_path):
    with pytest.raises(ValueError, match=r"set_figure: expected a run with points.npz, got none"):
        set_figure(fill(tmp_path), tmp_path / "samples.png")
    assert set_curve_figure(fill(tmp_path), tmp_path / "curves.png") is None


def test_learning_curves_are_a_point_and_upwards(table, tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot

    def remembered(self, x, y, *others, **keys):
        lines = plot(self, x, y, *others, **keys)
        drawn[tuple(np.atleast_1d(y))] = self
        return lines

    monkeypatch.setattr(Axes, "plot", remembered)
    assert set_curve_figure(table, tmp_path / "curves.png").is_file()
    sort, permute = (-6.0, -5.8, -5.6), (-5.6, -5.4)
    assert {tuple(np.round(y, 9)) for y in drawn} == {sort, permute}
    axes = next(iter(drawn.values()))
    low, high = axes.get_ylim()
    assert low < -6.0 and high > -5.4
    assert axes.get_ylabel() == "validation, log p / N (nats), N = 50"


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("val/nll_nats", "log-likelihood"),
        ("val/elbo_nats", "ELBO"),
        ("val/iwbo2_nats", "IWBO, K = 2"),
        ("val/iwbo10_nats", "IWBO, K = 10"),
    ],
)
def test_what_a_line_shows(column, words):
    assert set_curve_label(column) == words
