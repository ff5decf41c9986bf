"""Tables 4 and 5: columns with metrics of their own, scores, rows quoted only, pictures."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from surflow.files import write_json
from surflow.record import load_record, load_records
from surflow.reporting import build_table, load_spec
from surflow.reporting.figures.curves import curve_label, learning_curve_figure
from surflow.reporting.figures.grids import image_caption, image_figure
from surflow.reporting.figures.layout import run_files
from surflow.reporting.figures.published import (
    published_figure,
    published_legend,
    published_panel,
    spread,
)
from surflow.reporting.grid import cell_text, render_csv, render_markdown
from surflow.reporting.verdicts import verdict_of

ROOT = Path(__file__).resolve().parents[2]
HASH = "0123456789abcdef"
OTHER = "f" * 16
CHECKSUM = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def spec_of(artefact, profile="paper"):
    return load_spec(ROOT / "experiments" / artefact / "table.yaml").of_profile(profile)


def bound(value, estimator="IWBO, K = 1000, mean over 10000 test points"):
    return {
        "value": value,
        "unit": "bpd",
        "kind": "bound",
        "estimator": estimator,
        "standard_error": 0.004,
        "count": 10000,
    }


def score(value, n=50000, **protocol):
    return {
        "value": value,
        "unit": "score",
        "kind": "score",
        "estimator": f"{n} samples against 50000 train + valid images",
        "standard_error": None,
        "count": n,
        "protocol": {
            "n": n,
            "reference": {"splits": ["train", "valid"], "images": 50000},
            "extractor": {"name": "inception-v3-compat", "sha256": CHECKSUM},
            "temperature": 1.0,
            "precision": "float32",
            "seed": 0,
            **protocol,
        },
    }


SCORES = {"sample/inception_score": score(5.1), "sample/fid": score(49.0)}


def put(root, row="slice", data="cifar10", metrics=None, seed=0, profile="paper", **changes):
    """A run folder with a record."""
    content = {
        "schema": 1,
        "experiment": f"table4/{row}",
        "artefact": "table4",
        "row": row,
        "data": data,
        "model": "pool_flow",
        "surjection": row,
        "profile": profile,
        "seed": seed,
        "config_hash": HASH,
        "config": {},
        "status": "complete",
        "metrics": {"test/iwbo_bpd": bound(3.085), **SCORES} if metrics is None else metrics,
        "provenance": {
            "name": data,
            "version": "python",
            "splits": {"test": {"rows": 10000, "sha256": CHECKSUM}},
        },
        "commit": "ab" * 20,
        "dirty": False,
        **changes,
    }
    folder = root / profile / row / data / f"{seed}-{content['config_hash']}"
    return write_json(folder / "record.json", content).parent


def fill(root, artefact="table4", profile="paper", seeds=(0,), protocols=None):
    spec = spec_of(artefact, profile)
    keys = [
        (r.name, c.name, s) for r in spec.rows if r.experiment for c in spec.columns for s in seeds
    ]
    expected = dict.fromkeys(keys, HASH)
    wanted = None if protocols is None else dict.fromkeys(keys, protocols)
    return build_table(spec, load_records(root), expected, profile, seeds, wanted)


# The specification


def test_committed_tables_hold_the_published_values():
    four, five = spec_of("table4"), spec_of("table5")
    values = {(q.row, q.column): q.value for q in four.published}
    columns = ("cifar10", "imagenet32", "imagenet64")
    rows = {
        "realnvp": (3.49, 4.28, None),
        "glow": (3.35, 4.09, 3.81),
        "flow_pp": (3.08, 3.86, 3.69),
        "slice": (3.08, 4.00, 3.70),
        "max_pool": (3.09, 4.01, 3.74),
    }
    assert values == {
        (row, column): value
        for row, found in rows.items()
        for column, value in zip(columns, found, strict=True)
        if value is not None
    }
    assert {(q.row, q.value) for q in four.quoted} == {("slice", 3.16), ("max_pool", 3.19)}
    values = {(q.row, q.column): q.value for q in five.published}
    rows = {
        "dcgan": (6.4, 37.1),
        "wgan_gp": (6.5, 36.4),
        "pixelcnn": (4.60, 65.93),
        "pixeliqn": (5.29, 49.46),
        "slice": (5.08, 49.56),
        "max_pool": (5.18, 49.03),
    }
    assert values == {
        (row, column): value
        for row, found in rows.items()
        for column, value in zip(("inception_score", "fid"), found, strict=True)
    }
    assert five.runs == "table4" and four.runs == "table4"
    assert [c.direction for c in five.columns] == ["higher", "lower"]


def test_columns_are_those_of_the_profile():
    assert [c.name for c in spec_of("table4", "short").columns] == [
        "cifar10",
        "imagenet32",
        "imagenet64",
    ]
    smoke = spec_of("table4", "smoke")
    assert [c.name for c in smoke.columns] == ["photo_patches"]
    assert smoke.published == () and "flow_pp" not in [row.name for row in smoke.rows]
    assert [c.metric for c in spec_of("table5", "smoke").columns] == ["sample/fid_random_features"]
    assert [c.metric for c in spec_of("table4").columns] == [
        "test/iwbo_bpd",
        "test/elbo_bpd",
        "test/elbo_bpd",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "direction: higher",
            "direction: up",
            r"'columns\[0\]\.direction' must be one of lower, higher, got str 'up'",
        ),
        (
            "    metric: sample/fid\n",
            "",
            r"columns\[1\] needs 'metric', of its own or of the table",
        ),
        (
            "profiles: [smoke]",
            "profiles: [smok]",
            r"'columns\[2\]\.profiles' must be a list of some of",
        ),
        (
            "digits: 2",
            "digits: two",
            r"'columns\[0\]\.digits' must be an integer, from 0 to 9, got str 'two'",
        ),
        ("label: DCGAN", "label: DCGAN, official: true", "needs 'experiment'"),
        ("official: true", "official: 1", "official' must be true or false, got int 1"),
        (
            "profile: auto",
            "profile: full",
            "'profile' must be one of paper, short, smoke, auto, got str 'full'",
        ),
        ("worse: slice", "worse: dcgan", "unknown row 'dcgan'; known, with runs: slice, max_pool"),
    ],
)
def test_what_a_column_may_say_is_read_strictly(tmp_path, old, new, message):
    text = (ROOT / "experiments/table5/table.yaml").read_text()
    assert old in text
    path = tmp_path / "table.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        load_spec(path)
    assert "\n" not in str(caught.value)


def test_a_profile_without_columns(tmp_path):
    text = (ROOT / "experiments/table5/table.yaml").read_text()
    path = tmp_path / "table.yaml"
    path.write_text(text.replace("profiles: [smoke]", "profiles: [short]"))
    with pytest.raises(ValueError, match="no column has 'smoke' among its profiles"):
        load_spec(path).of_profile("smoke")


# Cells


def test_two_columns_of_one_run(tmp_path):
    put(tmp_path, "slice")
    put(tmp_path, "max_pool", metrics={"sample/inception_score": score(5.05), **SCORES})
    table = fill(tmp_path, "table5")
    first = table.cells["slice", "inception_score"]
    assert (first.ours, table.cells["slice", "fid"].ours) == (5.1, 49.0)
    assert first.records == table.cells["slice", "fid"].records
    lines = {(c["row"], c["column"]): c for c in csv.DictReader(io.StringIO(render_csv(table)))}
    assert lines["slice", "inception_score"]["metric"] == "sample/inception_score"
    assert lines["slice", "fid"]["metric"] == "sample/fid"
    assert lines["slice", "fid"]["delta"] == "-0.56"
    assert lines["dcgan", "fid"]["published"] == "37.10"


@pytest.mark.parametrize(
    ("column", "value", "verdict"),
    [
        ("inception_score", 9.0, "too few seeds (1): better by 3.92"),  # higher is better
        ("inception_score", 4.97, "too few seeds (1): worse by 0.11"),
        ("fid", 20.0, "too few seeds (1): better by 29.56"),
        ("fid", 50.6, "too few seeds (1): worse by 1.04"),
    ],
)
def test_each_column_has_its_direction(tmp_path, column, value, verdict):
    put(tmp_path, metrics={f"sample/{column}": score(value)})
    cell = fill(tmp_path, "table5").cells["slice", column]
    assert verdict_of(cell, "paper", 1) == verdict
    assert cell.verdict == "not comparable: samples, and images they are compared with"


def test_orderings_honour_the_direction(tmp_path):
    for seed in (0, 1, 2):
        put(tmp_path, "slice", seed=seed)
        step = 0.01 * seed
        better = {"sample/inception_score": score(5.2 + step), "sample/fid": score(49.5 + step)}
        put(tmp_path, "max_pool", metrics=better, seed=seed)
    text = render_markdown(fill(tmp_path, "table5", seeds=(0, 1, 2)), command="c")
    assert "Inception score, CIFAR-10 holds (+0.11, +0.09 to +0.13, 3 seeds)" in text
    assert "FID, CIFAR-10 fails (+0.51, +0.49 to +0.53, 3 seeds)" in text


def test_a_column_of_the_iwbo_takes_no_elbo(tmp_path):
    put(tmp_path, metrics={"test/elbo_bpd": bound(3.2, "ELBO, 1 sample(s) a point")})
    cell = fill(tmp_path).cells["slice", "cifar10"]
    assert (cell.ours, cell.verdict) == (None, "refused: record has no test/iwbo_bpd")


def test_estimators_that_differ_within_a_column_are_warned_of(tmp_path):
    put(tmp_path, "slice")
    assert fill(tmp_path).warnings == ()
    put(tmp_path, "glow", metrics={"test/iwbo_bpd": bound(3.3, "IWBO, K = 10")})
    (warning,) = fill(tmp_path).warnings
    assert warning == (
        "CIFAR-10 (IWBO): estimators differ: bound: IWBO, K = 10 | "
        "bound: IWBO, K = 1000, mean over 10000 test points."
    )


def test_a_missing_metric_gives_its_reason(tmp_path):
    reason = "no Inception weights: measures.samples.weights=<file>, or a network"
    put(tmp_path, metrics={"test/iwbo_bpd": bound(3.1)}, missing={"sample/fid": reason})
    table = fill(tmp_path, "table5")
    cell = table.cells["slice", "fid"]
    assert (cell.verdict, cell.ours, cell.refusals) == (f"missing: {reason}", None, ())
    assert cell_text(cell, 1) == "missing (49.56)"
    text = render_markdown(table, command="c")
    assert f"| missing: {reason} |" in text
    assert f"Missing metrics:\n\n- slice / fid, seed 0: {reason}" in text
    refused = table.cells["slice", "inception_score"]
    assert refused.verdict == "refused: record has no sample/inception_score"
    assert fill(tmp_path).cells["slice", "cifar10"].ours == 3.1  # the likelihood is there


def test_missing_for_one_seed_only(tmp_path):
    put(tmp_path, metrics={"sample/fid": score(50.0)})
    put(tmp_path, seed=1, metrics={}, missing={"sample/fid": "samples are not finite"})
    cell = fill(tmp_path, "table5", seeds=(0, 1)).cells["slice", "fid"]
    assert verdict_of(cell, "paper", 2) == "1 of 2 seeds: too few seeds (1): worse by 0.44"
    assert cell.missing == ("seed 1: samples are not finite",)


def test_a_score_of_another_protocol_is_refused(tmp_path):
    put(tmp_path, metrics={"sample/fid": score(30.0, n=1000), "test/iwbo_bpd": bound(3.1)})
    wanted = {"n": 50000, "temperature": 1.0}
    cell = fill(tmp_path, "table5", protocols=wanted).cells["slice", "fid"]
    assert (cell.ours, cell.verdict) == (None, "refused: sample/fid with n 1000, now 50000")
    assert fill(tmp_path, protocols=wanted).cells["slice", "cifar10"].ours == 3.1
    put(tmp_path, metrics={"sample/fid": score(49.0)})
    assert fill(tmp_path, "table5", protocols=wanted).cells["slice", "fid"].ours == 49.0


def test_a_row_that_is_quoted_only(tmp_path):
    put(tmp_path, "flow_pp")  # not asked for: no experiment of the table
    table = fill(tmp_path)
    cell = table.cells["flow_pp", "cifar10"]
    assert (cell.verdict, cell.ours, cell.published) == ("quoted only", None, 3.08)
    text = render_markdown(table, command="c")
    assert "| Flow++ | (3.08) | (3.86) | (3.69) |" in text
    assert "| RealNVP | not run (3.49) | not run (4.28) | not run |" in text
    assert "3.19 (reproduction)" in text
    assert "Published values: RealNVP (realnvp), Glow (glow), Flow++ (flow_pp)," in text


def test_a_broken_record_refuses_the_columns_of_its_data(tmp_path):
    folder = put(tmp_path)
    broken = json.loads((folder / "record.json").read_text())
    broken["metrics"]["sample/fid"]["value"] = None
    (folder / "record.json").write_text(json.dumps(broken))
    table = fill(tmp_path, "table5")
    for column in ("fid", "inception_score"):
        assert table.cells["slice", column].verdict.startswith("refused: field 'metrics.sample/fid")
    assert table.problems == ()


# The page


def test_the_page_says_what_its_numbers_depend_on(tmp_path):
    put(tmp_path, "slice", seed=0)
    fid = {"sample/inception_score": score(5.2, seed=1), "sample/fid": score(48.0, seed=1)}
    put(tmp_path, "slice", seed=1, metrics=fid)
    table = fill(tmp_path, "table5", seeds=(0, 1))
    text = render_markdown(table, command="c")
    assert "- Inception score, CIFAR-10: `sample/inception_score`, higher is better" in text
    assert "- FID, CIFAR-10: `sample/fid`, lower is better; ours: 50000 samples against" in text
    protocol = "n 50000, reference splits train, valid, images 50000, extractor name"
    assert text.count(f"- FID, CIFAR-10: {protocol} inception-v3-compat, sha256 6726825d0af5,") == 1
    assert "- cifar10: version python, splits test rows 10000, sha256 6726825d0af5" in text
    assert CHECKSUM not in text
    assert "| Baseline (slice) | 5.15 ± 0.07 (5.08) | 48.50 ± 0.71 (49.56) |" in text
    assert table.warnings == ()


def test_other_protocols_and_other_data_are_warned_of(tmp_path):
    put(tmp_path, "slice")
    other = {"sample/fid": score(48.0, precision="bfloat16"), "test/iwbo_bpd": bound(3.1)}
    put(tmp_path, "max_pool", metrics=other, provenance={"name": "cifar10", "version": "binary"})
    assert fill(tmp_path, "table5").warnings == (
        "FID, CIFAR-10: protocols of the runs differ in precision.",
        "FID, CIFAR-10: data of the runs differ in version, splits.",
    )


def test_released_weights_are_called_so(tmp_path):
    released = {"source": "official", "path": "/home/me/weights/cifar10_slice.pt"}
    put(tmp_path, weights={**released, "sha256": CHECKSUM})
    table = fill(tmp_path)
    assert table.cells["slice", "cifar10"].verdict == "released weights: reproduced"
    text = render_markdown(table, command="c")
    assert "**Released weights**: ours are the models that the authors trained" in text
    assert "source official, path cifar10_slice.pt, sha256 6726825d0af5" in text
    assert "/home/me" not in text
    put(tmp_path / "short", profile="short", weights=released)
    assert fill(tmp_path / "short", profile="short").cells["slice", "cifar10"].verdict == (
        "released weights: not a reproduction (profile short)"
    )


def test_smoke_is_no_reproduction(tmp_path):
    metrics = {"sample/fid_random_features": score(0.1234, n=256)}
    put(tmp_path, data="photo_patches", profile="smoke", metrics=metrics)
    table = fill(tmp_path, "table5", "smoke")
    cell = table.cells["slice", "fid_random_features"]
    assert (cell.ours, cell.verdict) == (0.1234, "not a reproduction (profile smoke)")
    text = render_markdown(table, command="c")
    assert "**not a reproduction.**" in text
    assert "DCGAN |" not in text


# Pictures


def images(folder, seed=0, size=8, count=64):
    rng = np.random.default_rng(seed)
    shape = (count, 3, size, size)
    arrays = {name: rng.integers(0, 256, shape, dtype=np.uint8) for name in ("samples", "data")}
    np.savez_compressed(folder / "images.npz", **arrays)
    (folder / "metrics.csv").write_text(
        "step,epoch,train/elbo_bpd,val/elbo_bpd\n1,0,6.1,\n2,0,,5.9\n3,1,5.6,\n4,1,,5.5\n"
    )
    return arrays


def test_images_of_few_levels_are_drawn_in_the_full_range(tmp_path, monkeypatch):
    """Of 17 levels, 16 is white; grey images are shown as colours."""
    levels = np.arange(17, dtype=np.uint8)[None, None, None].repeat(2, 0)
    folder = put(tmp_path, config={"data": {"num_levels": 17}})
    np.savez_compressed(folder / "images.npz", samples=levels, data=levels)
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda self, pixels, **_: shown.append(pixels))
    image_figure(fill(tmp_path), tmp_path / "samples.png")
    assert len(shown) == 2  # the data, and the one model that has run
    for pixels in shown:
        assert pixels.shape == (3, 37, 3)  # two of 1 x 17, a white line around each
        for channel in range(3):
            expected = [round(255 * k / 16) for k in range(17)]
            assert pixels[1, 1:18, channel].tolist() == expected


def test_legend_of_learning_curves_is_inside_the_figure(tmp_path, monkeypatch):
    for row in ("slice", "max_pool", "glow", "realnvp"):
        images(put(tmp_path, row))
    curves = run_files(fill(tmp_path), "metrics.csv")
    one_panel = {row: {"cifar10": files["cifar10"]} for row, files in curves.items()}
    found = []
    savefig = Figure.savefig

    def look(figure, *arguments, **options):
        savefig(figure, *arguments, **options)
        found.append((figure.legends[0].get_window_extent(), figure.bbox))

    monkeypatch.setattr(Figure, "savefig", look)
    learning_curve_figure(one_panel, tmp_path / "c.png", column="val/elbo_bpd")
    (legend, figure) = found[0]
    assert legend.x0 >= figure.x0 and legend.x1 <= figure.x1
    assert legend.y0 >= figure.y0 and legend.height < figure.height / 4


def test_files_of_columns_of_one_data_are_one(tmp_path):
    folder = put(tmp_path, "slice")
    images(folder)
    table = fill(tmp_path, "table5")
    files = run_files(table, "images.npz")
    assert files == {
        "Baseline (slice)": {"cifar10": folder / "images.npz"},
        "MaxPoolFlow": {"cifar10": None},
    }
    assert list(run_files(fill(tmp_path), "images.npz")) == [
        "RealNVP",
        "Glow",
        "Baseline (slice)",
        "MaxPoolFlow",
    ]


@pytest.mark.parametrize("artefact", ["table4", "table5"])
def test_pictures_of_a_table(tmp_path, artefact):
    images(put(tmp_path, "slice"))
    images(put(tmp_path, "max_pool"), seed=1)
    table = fill(tmp_path, artefact)
    for name, draw in (
        ("samples", image_figure),
        ("published", published_figure),
    ):
        one = draw(table, tmp_path / f"{name}.png").read_bytes()
        assert one == draw(table, tmp_path / "again.png").read_bytes()
        assert one.startswith(b"\x89PNG")
    curves = run_files(table, "metrics.csv")
    path = learning_curve_figure(curves, tmp_path / "c.png", column="val/elbo_bpd")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_published_figure_has_ours_beside_theirs(tmp_path):
    """Marks at the values of the cells, hollow where they are not ours; bars as long as std."""
    put(tmp_path, "slice", seed=0, metrics={"test/iwbo_bpd": bound(3.10)})
    put(tmp_path, "slice", seed=1, metrics={"test/iwbo_bpd": bound(3.14)})
    table = fill(tmp_path, seeds=(0, 1))
    axes = Figure().subplots()
    published_panel(axes, table, table.spec.columns[0], spread)
    marks = {}
    for line in axes.lines:
        x, y = line.get_data()
        hollow = line.get_markerfacecolor() == "white"
        marks.setdefault((line.get_marker(), hollow), []).append((float(x[0]), int(y[0])))
    assert sorted(marks["D", True]) == [(3.08, 2), (3.08, 3), (3.09, 4), (3.35, 1), (3.49, 0)]
    assert sorted(marks["s", True]) == [(3.16, 3), (3.19, 4)]
    assert marks["o", False] == [(pytest.approx(3.12), 3)]
    (bars,) = [c for c in axes.containers if c.has_xerr]
    (segment,) = bars.lines[2][0].get_segments()
    half = 0.02 * 2**0.5
    assert segment[:, 0] == pytest.approx([3.12 - half, 3.12 + half])
    assert axes.get_xlabel() == "test/iwbo_bpd (bpd), lower is better"
    legend = [line.get_label() for line in published_legend(table)]
    assert legend == [
        "ours (bar: standard deviation over seeds)",
        "published",
        "quoted from others",
    ]


def test_captions_name_data_profile_and_what_is_no_reproduction(tmp_path):
    put(tmp_path, "slice")
    table = fill(tmp_path, "table5")
    assert image_caption(table, "slice", table.spec.columns) == (
        "cifar10, seed 0\nprofile paper\nsample/inception_score 5.10\nsample/fid 49.00"
    )
    put(
        tmp_path,
        "slice",
        data="photo_patches",
        profile="smoke",
        metrics={"test/elbo_bpd": bound(6.2)},
    )
    table = fill(tmp_path, profile="smoke")
    assert image_caption(table, "slice", table.spec.columns) == (
        "photo_patches, seed 0\nprofile smoke: not a reproduction\ntest/elbo_bpd ≤ 6.200 bpd"
    )


@pytest.mark.parametrize(
    ("column", "label"),
    [
        ("val/elbo_bpd", "validation negative ELBO (bits/dim)"),
        ("val/nll_nats", "validation NLL (nats)"),
    ],
)
def test_curve_labels(column, label):
    assert curve_label(column) == label


def test_torn_images_are_named(tmp_path):
    folder = put(tmp_path)
    (folder / "images.npz").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match=r"images\.npz: not readable as npz"):
        image_figure(fill(tmp_path), tmp_path / "out.png")
    np.savez(folder / "images.npz", samples=np.zeros((1, 3, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"images\.npz: lacks data"):
        image_figure(fill(tmp_path), tmp_path / "out.png")


# Records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": {"sample/fid": 3}}, "field 'missing.sample/fid' must be a non-empty string"),
        ({"missing": ["sample/fid"]}, "field 'missing' must be a mapping"),
        ({"provenance": "cifar10"}, "field 'provenance' must be a mapping"),
        ({"weights": "official"}, "field 'weights' must be a mapping"),
        (
            {"metrics": {"sample/fid": {**score(1.0), "protocol": 50000}}},
            "field 'metrics.sample/fid.protocol' must be a mapping",
        ),
    ],
)
def test_record_faults(tmp_path, change, message):
    path = put(tmp_path) / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError) as caught:
        load_record(path)
    assert message in str(caught.value)


def test_record_keeps_what_a_score_depends_on(tmp_path):
    record = load_record(put(tmp_path, missing={"x": "why"}, weights={"source": "official"}))
    metric = record.metrics["sample/fid"]
    assert (metric.kind, metric.protocol["n"]) == ("score", 50000)
    assert record.metrics["test/iwbo_bpd"].protocol == {}
    assert (record.missing, record.weights["source"]) == ({"x": "why"}, "official")
    assert record.provenance["splits"]["test"]["rows"] == 10000
