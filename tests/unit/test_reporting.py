"""Records, tables and figures: verdicts at their edges, refusals, exact headers, atomic writes."""

import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import yaml

from surflow.files import write_json, write_text
from surflow.record import RecordError, find_records, load_record, load_records
from surflow.reporting.figures.curves import learning_curve_figure, read_curve
from surflow.reporting.figures.densities import density_figure, sample_figure
from surflow.reporting.figures.layout import run_files
from surflow.reporting.filling import build_table
from surflow.reporting.grid import ordering_lines, render_csv, render_markdown
from surflow.reporting.spec import load_spec
from surflow.reporting.statistics import of_mean, of_one_more, paired_difference

ROOT = Path(__file__).resolve().parents[2]
SYNTHETIC = ROOT / "experiments" / "synthetic" / "table.yaml"
HASH = "0123456789abcdef"
METRIC = "test/nll_nats"
PUBLISHED = {
    ("flow", "checkerboard"): 3.65,
    ("flow", "corners"): 3.19,
    ("flow", "eight_gaussians"): 3.01,
    ("flow", "four_circles"): 3.44,
    ("abs_flow", "checkerboard"): 3.49,
    ("abs_flow", "corners"): 3.03,
    ("abs_flow", "eight_gaussians"): 2.86,
    ("abs_flow", "four_circles"): 2.99,
}
RERUN = {
    ("flow", "checkerboard"): 3.712,
    ("flow", "corners"): 3.244,
    ("flow", "eight_gaussians"): 2.999,
    ("flow", "four_circles"): 3.446,
    ("abs_flow", "checkerboard"): 3.501,
    ("abs_flow", "corners"): 3.004,
    ("abs_flow", "eight_gaussians"): 2.859,
    ("abs_flow", "four_circles"): 2.994,
}


def content(value=3.2, row="flow", data="corners", seed=0, **changes):
    found = {
        "schema": 1,
        "experiment": f"synthetic/{row}",
        "artefact": "synthetic",
        "row": row,
        "data": data,
        "model": "coupling_flow",
        "surjection": "symmetry",
        "profile": "paper",
        "seed": seed,
        "config_hash": HASH,
        "config": {"seed": seed},
        "status": "complete",
        "metrics": {
            METRIC: {
                "value": value,
                "unit": "nats",
                "kind": "likelihood",
                "estimator": "exact log-likelihood, mean over 1000 test points",
                "standard_error": 0.003,
                "count": 1000,
            }
        },
        "floor": {METRIC: {"value": 2.947, "source": "entropy, closed form"}},
        "commit": "ab" * 20,
        "dirty": False,
        "versions": {"python": "3.11.7", "torch": "2.6.0"},
        "machine": {"cpu": "x86", "cores": 2},
        "wall_time_s": 61.0,
        "train_time_s": 50.0,
        "peak_memory_mib": 700.0,
    }
    metric = found["metrics"][METRIC]
    metric.update(
        {key: changes.pop(key) for key in ("kind", "unit", "estimator") if key in changes}
    )
    return {**found, **changes}


def put(root, *args, **kwargs):
    found = content(*args, **kwargs)
    name = f"{found['profile']}/{found['row']}/{found['data']}/{found['seed']}"
    return write_json(root / name / "record.json", found)


def fill(root, profile="paper", seeds=(0,), config_hash=HASH, spec=None):
    spec = spec or load_spec(SYNTHETIC)
    expected = {
        (r.name, c.name, s): config_hash for r in spec.rows for c in spec.columns for s in seeds
    }
    return build_table(spec, load_records(root), expected, profile, seeds)


def corners(root, row="flow", **kwargs):
    return fill(root, **kwargs).cells[row, "corners"]


# ------------------------------------------------------------------------------------ records


def test_record_round_trip(tmp_path):
    record = load_record(put(tmp_path, 3.25).parent)
    assert record.metrics[METRIC].value == 3.25
    assert record.metrics[METRIC].count == 1000
    assert record.floor[METRIC].value == 2.947
    assert record.short_commit == "abababababab"
    assert load_record(put(tmp_path, dirty=True)).short_commit == "abababababab+dirty"
    assert find_records(tmp_path) == [record.path]
    assert find_records(tmp_path / "none") == []


def test_committed_records_are_written_as_they_were_read(tmp_path):
    paths = sorted((ROOT / "results").glob("*/*/records/*.json"))
    assert paths
    for path in paths:
        written = write_json(tmp_path / "record.json", load_record(path).to_json())
        assert written.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), path


def test_optional_fields_of_a_record(tmp_path):
    found = load_record(put(tmp_path))
    assert (found.former_hash, found.measures) == (None, {})
    assert not {"former_hash", "measures", "missing", "weights"} & set(found.to_json())
    more = {"former_hash": "f" * 16, "measures": {"likelihood": {"samples": 10}}}
    found = load_record(put(tmp_path, **more))
    assert {key: found.to_json()[key] for key in more} == more
    with pytest.raises(RecordError, match="'former_hash' must be a string matching"):
        load_record(put(tmp_path, former_hash="old"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema must be 1, got int 2"),
        ({"seed": "0"}, "field 'seed' must be an integer, 0 or more, got str '0'"),
        ({"config_hash": "xyz"}, "field 'config_hash' must be a string matching"),
        ({"metrics": []}, "field 'metrics' must be a mapping, got list []"),
        ({"status": None}, "field 'status' must be a non-empty string, got nothing"),
        ({"wall_time_s": -1.0}, "field 'wall_time_s' must be a finite number, 0 or more"),
        ({"kind": "guess"}, "must be one of likelihood, bound, estimate, score, got str 'guess'"),
    ],
)
def test_record_faults_are_one_clear_line(tmp_path, change, message):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content(**change)))
    with pytest.raises(ValueError) as caught:
        load_record(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "3.2", None])
def test_record_metric_must_be_finite(tmp_path, value):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content(value)))
    with pytest.raises(ValueError, match=r"metrics\.test/nll_nats\.value' must be a finite number"):
        load_record(path)


def test_record_missing_truncated_or_lacking_a_field(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(ValueError, match="no such file"):
        load_record(path)
    path.write_text(json.dumps(content())[:100])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_record(path)
    found = content()
    del found["row"]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="field 'row' is missing"):
        load_record(path)


@pytest.mark.parametrize(
    ("broken", "error"), [({"x": float("nan")}, ValueError), ({"x": {1, 2}}, TypeError)]
)
def test_atomic_json_leaves_the_old_file_when_serialisation_fails(tmp_path, broken, error):
    path = write_json(tmp_path / "deep" / "record.json", {"a": 1})
    with pytest.raises(error):
        write_json(path, broken)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_atomic_text_leaves_the_old_file_when_the_disk_fails(tmp_path, monkeypatch):
    path = write_text(tmp_path / "table.md", "old")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["table.md"]


# --------------------------------------------------------------------------------- table.yaml


def test_committed_table_holds_the_published_values():
    spec = load_spec(SYNTHETIC)
    assert {(q.row, q.column): q.value for q in spec.published} == PUBLISHED
    quoted = {
        source: {(q.row, q.column): q for q in spec.quoted if q.source == source}
        for source in ("rerun", "official", "reproduction")
    }
    assert {key: q.value for key, q in quoted["rerun"].items()} == RERUN
    official = json.loads((ROOT / "tests/fixtures/toy_official.json").read_text())["cells"]
    assert {"/".join(key) for key in quoted["official"]} == set(official)
    for (row, column), quote in quoted["official"].items():
        values = official[f"{row}/{column}"]
        assert quote.seeds == len(values) == 16
        assert quote.value == round(statistics.fmean(values), 3)
        assert quote.std == round(statistics.stdev(values), 3)
    published = {"/".join(key): value for key, value in PUBLISHED.items()}
    means = {cell: statistics.fmean(values) - published[cell] for cell, values in official.items()}
    assert sum(gap > 0.03 for gap in means.values()) == 3  # as docs/synthetic.md says
    as_low = {c: sum(v < published[c] + 0.005 for v in values) for c, values in official.items()}
    assert (as_low["flow/checkerboard"], as_low["flow/corners"]) == (0, 0)
    assert as_low["abs_flow/four_circles"] == 2
    circles = quoted["official"]["abs_flow", "four_circles"]
    assert circles.text == "3.028 ± 0.045 (official, 16 seeds)"
    assert quoted["reproduction"]["abs_flow", "four_circles"].text == "3.03 (reproduction)"
    assert {q.source for q in spec.published} == {"paper"}
    assert "2007.02731" in spec.sources["paper"]
    assert [row.experiment for row in spec.rows] == [
        "synthetic/flow",
        "synthetic/abs_flow",
        "synthetic/flow_clipped",
        "synthetic/abs_spline_flow",
    ]
    assert [row.target_excess for row in spec.rows] == [None, None, None, 0.01]
    assert [c.overrides for c in spec.columns] == [(f"data={c.name}",) for c in spec.columns]
    assert (spec.metric, spec.unit, spec.direction) == (METRIC, "nats", "lower")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("unit: nats", "units: nats\nunit: nats", "unknown key 'units'"),
        ("label: Flow,", "label: Flow, colour: red,", r"rows\[0\] unknown key 'colour'"),
        (
            "direction: lower",
            "direction: down",
            "field 'direction' must be one of lower, higher, got str 'down'",
        ),
        (
            "\nsettings:",
            "\nsettings:\n  - {setting: optimizer.lr}",
            r"settings\[0\] needs either 'published' or 'than'",
        ),
        (
            "\nsettings:",
            "\nsettings:\n  - {setting: optimizer.lr, published: 1, ours: 2, than: {flow: 1}}",
            r"settings\[0\] needs either 'published' or 'than'",
        ),
        (
            "\nsettings:",
            "\nsettings:\n  - {setting: optimizer.lr, ours: 2, than: {flow: 1}}",
            r"settings\[0\] 'than' needs 'ours', the value that differs, and its 'rows'",
        ),
        (
            "\nsettings:",
            "\nsettings:\n  - {setting: optimizer.lr, ours: 2, than: {glow: 1}}",
            r"settings\[0\] unknown row 'glow' in 'than'; known: flow, abs_flow, flow_clipped,",
        ),
        (
            "\nsettings:",
            "\nsettings:\n  - {setting: optimizer.lr, published: 1, matters: true}",
            r"settings\[0\] 'matters' needs 'ours', the value that differs",
        ),
        (
            "\nsettings:",
            "\nsettings:\n  - {setting: epochs, published: 1, ours: 2, rows: [nobody]}",
            r"settings\[0\]\.rows' must be a list of some of flow, .*, got str 'nobody'",
        ),
        (
            "value: 3.19, source: paper",
            "value: 3.19",
            r"'published\[1\]\.source' is missing; it must be a non-empty string",
        ),
        ("value: 3.19, source: paper", "value: 3.19, source: me", "unknown source 'me'"),
        (
            "value: 3.19,",
            "value: high,",
            r"'published\[1\]\.value' must be a finite number, got str 'high'",
        ),
        (
            "- {row: flow, column: corners, value: 3.19",
            "- {row: flow, column: checkerboard, value: 3.19",
            r"published\[1\] repeats cell flow / checkerboard",
        ),
        (
            "row: flow, column: corners, value: 3.19",
            "row: x, column: corners, value: 1",
            "row 'x'",
        ),
        ("{name: abs_flow,", "{name: flow,", "row name 'flow' appears twice"),
        ("better: abs_flow", "better: nobody", r"orderings\[0\] unknown row 'nobody'"),
        ("unit: nats", "unit: nats\nunit: bits", "key 'unit' appears twice"),
        ("rows:", "rows: [", "not readable as YAML"),
    ],
)
def test_table_yaml_is_read_strictly(tmp_path, old, new, message):
    text = SYNTHETIC.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "table.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_spec(path)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------- verdicts


SEEDS = tuple(range(5))
NEAR = (-0.001, 0.0, 0.001, 0.0005, -0.0005)  # s = 7.906e-4, t = 2.776: one more run +- 0.0024


def put_around(root, value, **changes):
    for seed, gap in zip(SEEDS, NEAR, strict=True):
        put(root, value + gap, seed=seed, **changes)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (3.19, "reproduced"),
        (3.19 + 0.0024 + 0.0049, "reproduced"),  # the published digits are rounded by 0.005
        (3.19 - 0.0024 - 0.0049, "reproduced"),
        (3.19 + 0.0024 + 0.0055, "differs: worse by 0.008 (one more run: 3.195 to 3.200)"),
        (3.25, "differs: worse by 0.060 (one more run: 3.248 to 3.252)"),
        (3.0, "differs: better by 0.190 (one more run: 2.998 to 3.002)"),
    ],
)
def test_a_verdict_is_a_prediction_interval(tmp_path, value, verdict):
    put_around(tmp_path, value)
    cell = corners(tmp_path, seeds=SEEDS)
    assert cell.verdict == verdict
    assert cell.delta == pytest.approx(value - 3.19)


def test_the_interval_is_that_of_scipy():
    values = [3.1, 3.2, 3.4, 3.3, 3.25]
    interval = of_one_more(values)
    wide = statistics.stdev(values) * math.sqrt(1.2)
    expected = scipy.stats.t.interval(0.95, 4, loc=3.25, scale=wide)
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert interval.low == pytest.approx(3.25 - 0.340043, abs=1e-6)
    scale = statistics.stdev(values) / math.sqrt(5)
    expected = scipy.stats.t.interval(0.95, 4, loc=3.25, scale=scale)
    assert (of_mean(values).low, of_mean(values).high) == pytest.approx(expected)
    assert (of_mean([1.0]).low, of_mean([1.0]).high) == (-math.inf, math.inf)
    one, other = dict(enumerate(values)), {1: 3.1, 3: 3.1, 4: 3.1, 9: 0.0}
    test = scipy.stats.ttest_rel([3.2, 3.3, 3.25], [3.1, 3.1, 3.1]).confidence_interval()
    paired = paired_difference(one, other)
    assert (paired.low, paired.high) == pytest.approx(tuple(test))
    assert (paired.mean, paired.count) == (pytest.approx(0.15), 3)
    assert paired_difference(one, {7: 1.0}) is None


def test_few_seeds_decide_nothing(tmp_path):
    put_around(tmp_path, 3.18)
    assert corners(tmp_path, seeds=SEEDS[:4]).verdict == "too few seeds (4): better by 0.010"


def test_verdict_where_higher_is_better(tmp_path):
    text = SYNTHETIC.read_text(encoding="utf-8").replace("direction: lower", "direction: higher")
    path = tmp_path / "table.yaml"
    path.write_text(text, encoding="utf-8")
    spec = load_spec(path)
    for value, verdict in (
        (3.19, "reproduced"),
        (3.15, "differs: worse by 0.040 (one more run: 3.148 to 3.152)"),
        (4.0, "differs: better by 0.810 (one more run: 3.998 to 4.002)"),
    ):
        put_around(tmp_path, value)
        assert corners(tmp_path, spec=spec, seeds=SEEDS).verdict == verdict


def with_settings(tmp_path, *lines):
    """The table of the 2-D data with other settings than its own."""
    content = yaml.safe_load(SYNTHETIC.read_text(encoding="utf-8"))
    content["settings"] = [yaml.safe_load(line) for line in lines]
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_spec(path)


def test_settings_that_are_not_the_published_ones(tmp_path):
    spec = with_settings(
        tmp_path,
        "{setting: optimizer.lr, published: 0.001}",
        "{setting: trainer.max_epochs, published: 10, ours: 5, rows: [flow], columns: [corners],"
        " matters: true}",
        "{setting: clamp, published: 1.0e-6, ours: none, rows: [abs_flow]}",
    )
    put_around(tmp_path, 3.19)
    put_around(tmp_path, 3.03, row="abs_flow")
    put_around(tmp_path, 3.44, data="four_circles")
    table = fill(tmp_path, seeds=SEEDS, spec=spec)
    verdicts = {key: cell.verdict for key, cell in table.cells.items() if cell.records}
    assert verdicts == {
        ("flow", "corners"): "not comparable: trainer.max_epochs",
        ("flow", "four_circles"): "reproduced",
        ("abs_flow", "corners"): "reproduced",
    }
    text = render_markdown(table, command="make")
    assert (
        "Settings that are not the published ones:\n\n"
        "- Flow (Corners): trainer.max_epochs: published 10, ours 5 (decides)\n"
        "- AbsFlow: clamp: published 1e-06, ours none\n"
    ) in text
    assert "as published" not in text
    same = with_settings(tmp_path, "{setting: optimizer.lr, published: 0.001}")
    text = render_markdown(fill(tmp_path, seeds=SEEDS, spec=same), command="make")
    assert "budgets and data as published" in text and "not the published ones" not in text


def put_excess(root, excess, seed=0, row="abs_spline_flow", **changes):
    """A run whose NLL has the noise of its draw; the excess has not."""
    found = content(2.947 + excess + 0.1 * (-1) ** seed, row=row, seed=seed, **changes)
    metric = {**found["metrics"][METRIC], "value": excess, "standard_error": 0.0002}
    metrics = {**found["metrics"], "test/excess_nats": {**metric, "kind": "score"}}
    return put(root, row=row, seed=seed, **{**changes, "metrics": metrics})


@pytest.mark.parametrize(
    ("excess", "interval", "word"),
    [
        (0.0031, "0.0007 to 0.0055", "within"),
        (0.0075, "0.0051 to 0.0099", "within"),
        (0.0077, "0.0053 to 0.0101", "not decided"),
        (0.0123, "0.0099 to 0.0147", "not decided"),
        (0.0125, "0.0101 to 0.0149", "above"),
    ],
)
def test_verdict_against_a_target(tmp_path, excess, interval, word):
    for seed, shift in zip(SEEDS, NEAR, strict=True):
        put_excess(tmp_path, excess + shift, seed)
    table = fill(tmp_path, seeds=SEEDS)
    cell = table.cells["abs_spline_flow", "corners"]
    said = f"excess over the entropy of the test draw {excess:.4f} (one more run: {interval})"
    assert cell.verdict == f"{said}, target 0.01: {word}"
    assert cell.published is None and cell.delta is None
    assert f"| AbsSplineFlow (ours) | {excess:.4f} ± 0.0008 |" in render_markdown(
        table, command="c"
    )


def test_excess_of_few_or_older_runs(tmp_path):
    """Rows and data without the metric are left out of its table, and a verdict says so."""
    put(tmp_path, 3.2)
    put_excess(tmp_path, 0.0031)
    text = render_markdown(table := fill(tmp_path), command="c")
    assert "|  | Corners |\n| --- | ---: |\n| AbsSplineFlow (ours) | 0.0031 ± 0.0002 |\n\n" in text
    assert table.cells["abs_spline_flow", "corners"].verdict == (
        "too few seeds (1): excess over the entropy of the test draw 0.0031, target 0.01"
    )
    (line,) = (c for c in csv.DictReader(render_csv(table).split("\n")) if c["excess"])
    assert (line["row"], line["excess"], line["excess_std"]) == ("abs_spline_flow", "0.0031", "")
    put(tmp_path, 2.95, row="abs_spline_flow", seed=1)
    table = fill(tmp_path, seeds=(0, 1))
    assert table.cells["abs_spline_flow", "corners"].verdict == "no test/excess_nats in 1 record(s)"
    assert "| AbsSplineFlow (ours) | 0.0031 ± 0.0002 [1 of 2 seeds] |" in render_markdown(
        table, command="c"
    )
    spec = load_spec(SYNTHETIC)
    rows = tuple(replace(row, target_excess=None) for row in spec.rows)
    cell = corners(tmp_path, "abs_spline_flow", spec=replace(spec, rows=rows))
    assert cell.verdict == "published value not available"
    put(tmp_path, 2.95, row="abs_spline_flow")
    assert "Excess" not in render_markdown(fill(tmp_path), command="c")


def test_settings_that_are_not_those_of_another_row(tmp_path):
    spec = with_settings(
        tmp_path,
        "{setting: trainer.max_epochs, ours: 20, than: {flow: 10}, rows: [abs_spline_flow],"
        " columns: [checkerboard, corners]}",
        "{setting: trainer.max_epochs, ours: 15, than: {flow: 10}, rows: [abs_spline_flow],"
        " columns: [eight_gaussians]}",
        "{setting: decay, ours: 0.9, than: {flow: null, abs_flow: 0}, rows: [flow_clipped]}",
    )
    put_around(tmp_path, 3.19)
    table = fill(tmp_path, seeds=SEEDS, spec=spec)
    assert table.cells["flow", "corners"].verdict == "reproduced"
    assert render_markdown(table, command="make").count(
        "Settings of rows that are not those of another:\n\n"
        "| row | setting | value | other row |\n"
        "| --- | --- | --- | --- |\n"
        "| AbsSplineFlow (ours) | trainer.max_epochs | 20 (Checkerboard, Corners), 15 (Gaussians) "
        "| Flow 10 |\n"
        "| Flow, clipped (ours) | decay | 0.9 | AbsFlow 0, Flow none |\n\n"
    )


@pytest.mark.parametrize("row", ["flow", "abs_spline_flow"])
def test_another_profile_is_never_a_reproduction(tmp_path, row):
    put(tmp_path, 3.0, row=row, profile="smoke")
    table = fill(tmp_path, profile="smoke", seeds=(0, 1))
    assert table.cells[row, "corners"].verdict == "not a reproduction (profile smoke)"
    text = render_markdown(table, command="make")
    assert text.split("\n")[2].startswith("**Profile `smoke`**: **not a reproduction.**")
    assert "reproduced |" not in text


def test_mean_and_standard_deviation_over_seeds(tmp_path):
    for seed, value in enumerate((3.1, 3.2, 3.4)):
        put(tmp_path, value, seed=seed)
    cell = corners(tmp_path, seeds=(0, 1, 2))
    assert cell.ours == pytest.approx(3.2333333, abs=1e-6)
    assert cell.std == pytest.approx(0.1527525, abs=1e-6)  # sample: divided by n - 1
    assert cell.seeds == (0, 1, 2)
    assert cell.spread == cell.std
    assert cell.verdict == "too few seeds (3): worse by 0.043"
    one = corners(tmp_path, seeds=(0,))
    assert (one.std, one.spread) == (None, 0.003)  # of test points
    text = render_markdown(fill(tmp_path), command="make")
    assert "| 3.100 ± 0.003 (3.19) |" in text and "which is no spread of trainings" in text
    found = corners(tmp_path, seeds=(0, 7)).verdict
    assert found == "1 of 2 seeds: too few seeds (1): better by 0.090"


def test_rows_never_run_are_one_line_with_their_cost(tmp_path):
    put(tmp_path, 3.2)
    spec = load_spec(SYNTHETIC)
    more = (
        replace(spec.rows[2], name=name, label=label)
        for name, label in (("a", "A"), ("b", "B"), ("c", "C"))
    )
    table = fill(tmp_path, spec=replace(spec, rows=(*spec.rows[:2], *more)))
    table = replace(table, costs={"a": "An hour.", "b": "An hour.", "c": "A day."})
    text = render_markdown(table, command="make")
    line = "Not run: A / B (An hour); C (A day). `ROWS=a,b,c` after the command below runs them."
    assert line in text.split("\n")
    assert "| A |" not in text and "| c | corners |" not in text
    assert "| AbsFlow | not run (3.49) |" in text  # published values are shown
    put(tmp_path, 2.95, row="abs_spline_flow", status="failed")
    refused = render_markdown(fill(tmp_path), command="make")
    assert "Not run: Flow, clipped (ours). `ROWS=flow_clipped` after" in refused
    assert "abs_spline_flow / corners, seed 0: run failed" in refused


# ----------------------------------------------------------------------------------- refusals


def test_cell_without_a_record_is_not_run(tmp_path):
    cell = corners(tmp_path)
    assert (cell.verdict, cell.ours, cell.published) == ("not run", None, 3.19)
    assert "| not run (3.19) |" in render_markdown(fill(tmp_path), command="make")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"config_hash": "f" * 16}, f"refused: stale config ffffffffffffffff, now {HASH}"),
        ({"status": "interrupted"}, "refused: run interrupted, not complete"),
        ({"profile": "smoke"}, "refused: profile smoke, not paper"),
        ({"experiment": "other/flow"}, "refused: experiment other/flow, not synthetic/flow"),
        ({"unit": "bits"}, "refused: test/nll_nats in bits, not nats"),
        ({"metrics": {}}, "refused: record has no test/nll_nats"),
    ],
)
def test_refused_record(tmp_path, change, verdict):
    put(tmp_path, 3.0, **change)
    cell = corners(tmp_path)
    assert (cell.verdict, cell.ours, cell.records) == (verdict, None, ())
    assert cell.refusals == (f"seed 0: {verdict.removeprefix('refused: ')}",)


def test_refusals_beside_good_records(tmp_path):
    put(tmp_path, 3.2, seed=0)
    put(tmp_path, 3.0, seed=0, profile="smoke")  # another profile beside the right run: no matter
    put(tmp_path, 9.0, seed=1, status="failed")
    put(tmp_path, 1.0, seed=2)  # not asked for
    cell = corners(tmp_path, seeds=(0, 1))
    assert cell.ours == 3.2
    assert cell.verdict == "1 of 2 seeds: too few seeds (1): worse by 0.010"
    assert cell.refusals == ("seed 1: run failed, not complete",)


def test_broken_records_spare_the_rest_of_the_table(tmp_path):
    put(tmp_path, 3.2)
    broken = tmp_path / "torn" / "record.json"
    broken.parent.mkdir()
    broken.write_text('{"schema": 1, "artefa')
    diverged = tmp_path / "nan" / "record.json"
    diverged.parent.mkdir()
    diverged.write_text(json.dumps(content(float("nan"), row="abs_flow")))
    assert [isinstance(item, RecordError) for item in load_records(tmp_path)] == [True, False, True]
    table = fill(tmp_path)
    assert table.cells["flow", "corners"].verdict == "too few seeds (1): worse by 0.010"
    refused = table.cells["abs_flow", "corners"]
    assert refused.ours is None
    assert refused.verdict == (
        "refused: field 'metrics.test/nll_nats.value' must be a finite number, got float nan"
    )
    assert len(table.problems) == 1
    assert table.problems[0].startswith(f"{broken}: not valid JSON")
    assert str(broken) in render_markdown(table, command="make")


def test_two_runs_of_one_configuration_are_refused(tmp_path):
    put(tmp_path / "a", 3.2)
    put(tmp_path / "b", 3.1)
    assert corners(tmp_path).verdict.startswith("refused: 2 runs of one configuration")


def test_kinds_never_mix_in_one_cell(tmp_path):
    put(tmp_path, 3.2, seed=0)
    put(tmp_path, 3.2, seed=1, kind="bound", estimator="ELBO, mean over 1000 test points")
    with pytest.raises(ValueError, match=r"cell flow / corners: .* mixes kinds"):
        fill(tmp_path, seeds=(0, 1))
    table = fill(tmp_path, seeds=(1,))
    assert table.cells["flow", "corners"].estimator == "bound: ELBO, mean over 1000 test points"
    assert "| 3.200 ± 0.003 bound (3.19) |" in render_markdown(table, command="make")


def test_a_density_below_the_entropy_and_mixed_commits_are_warned_of(tmp_path):
    put(tmp_path, 2.9, row="abs_flow")
    put(tmp_path, 2.945, commit="cd" * 20)  # within 3 standard errors of the floor
    table = fill(tmp_path)
    assert len(table.warnings) == 2
    assert table.warnings[0] == "Mixed commits: cdcdcdcdcdcd, abababababab."
    assert table.warnings[1].startswith("AbsFlow / Corners: 2.9000 passes its floor 2.9470")


def test_orderings(tmp_path):
    for seed in (0, 1, 2):
        put(tmp_path, 3.2 + 0.1 * seed, seed=seed)
        put(tmp_path, 3.0 + 0.1 * seed + 0.01 * (seed == 0), row="abs_flow", seed=seed)
        put(tmp_path, 3.0, data="four_circles", seed=seed)
        put(tmp_path, 3.1 + 0.01 * (seed == 0), row="abs_flow", data="four_circles", seed=seed)
        put(tmp_path, 3.0, data="eight_gaussians", seed=seed)
        put(tmp_path, 2.9 + 0.1 * seed, row="abs_flow", data="eight_gaussians", seed=seed)
    gaps = scipy.stats.ttest_1samp([-0.19, -0.2, -0.2], 0).confidence_interval()
    assert (gaps.low, gaps.high) == pytest.approx((-0.211, -0.1823), abs=1e-4)
    assert ordering_lines(fill(tmp_path, seeds=(0, 1, 2))) == [
        "AbsFlow better than Flow: Checkerboard not checked; "
        "Corners holds (-0.197, -0.211 to -0.182, 3 seeds); "
        "Gaussians not decided (+0.000, -0.248 to +0.248, 3 seeds); "
        "Circles fails (+0.103, +0.089 to +0.118, 3 seeds)."
    ]
    (line,) = ordering_lines(fill(tmp_path, seeds=(1,)))
    assert "Corners not decided (-0.200, one seed)" in line


# ------------------------------------------------------------------------------------ writers


def test_csv(tmp_path):
    put(tmp_path, 3.2, seed=0)
    put(tmp_path, 3.21, seed=1, dirty=True)
    lines = render_csv(fill(tmp_path, seeds=(0, 1))).split("\n")
    assert lines[0] == (
        "row,column,metric,unit,estimator,published,ours,std,delta,floor,excess,excess_std,verdict,"
        "seeds,profile,commit"
    )
    cells = {(line["row"], line["column"]): line for line in csv.DictReader(lines)}
    assert len(cells) == 16
    assert cells["flow", "corners"] == {
        "row": "flow",
        "column": "corners",
        "metric": METRIC,
        "unit": "nats",
        "estimator": "exact log-likelihood, mean over 1000 test points",
        "published": "3.19",
        "ours": "3.205",
        "std": "0.007",
        "delta": "+0.015",
        "floor": "2.9470",
        "excess": "",
        "excess_std": "",
        "verdict": "too few seeds (2): worse by 0.015",
        "seeds": "0 1",
        "profile": "paper",
        "commit": "abababababab abababababab+dirty",
    }
    assert cells["flow", "checkerboard"]["ours"] == ""
    assert cells["flow", "checkerboard"]["verdict"] == "not run"


def test_markdown(tmp_path):
    put(tmp_path, 3.2, seed=0)
    put(tmp_path, 3.21, seed=1)
    table = fill(tmp_path, seeds=(0, 1))
    text = render_markdown(
        table, command="make reproduce-synthetic", figures={"Densities": Path("density.png")}
    )
    assert text.startswith(f"# {table.spec.title}\n\n**Profile `paper`**")
    for part in (
        "| Flow | not run (3.65) | 3.205 ± 0.007 (3.19) | not run (3.01) |",
        "| entropy (floor) |  | 2.9470 |  |  |",
        "3.244 (rerun)",
        "![Densities](density.png)",
        "| Flow |  | 61 s |  |  |",
        "python 3.11.7, torch 2.6.0",
        "cpu x86, cores 2",
        "- paper: Nielsen et al. 2020",
        "anti-symmetric",
        "```sh\nmake reproduce-synthetic\n```",
    ):
        assert part in text
    assert render_markdown(table, command="c") == render_markdown(table, command="c")
    assert render_csv(table) == render_csv(fill(tmp_path, seeds=(0, 1)))


def test_committed_table_follows_from_the_committed_records():
    """The page and the CSV in results/ are what today's code writes of the records beside them."""
    folder = ROOT / "results" / "paper" / "synthetic"
    found = [load_record(path) for path in sorted((folder / "records").glob("*.json"))]
    expected = {(r.row, r.data, r.seed): r.config_hash for r in found}
    seeds = sorted({r.seed for r in found})
    table = build_table(load_spec(SYNTHETIC), found, expected, "paper", seeds)
    assert render_csv(table) == (folder / "table.csv").read_text()
    page = (folder / "table.md").read_text()
    links = dict(re.findall(r"!\[(.*)\]\((.*)\)", page))
    command = page.rpartition("```sh\n")[2].removesuffix("\n```\n")
    assert render_markdown(table, command=command, figures=links) == page


# ------------------------------------------------------------------------------------ figures


def picture(folder, points=300):
    rng = np.random.default_rng(0)
    density = rng.uniform(size=(16, 16))
    samples = rng.uniform(-4, 4, size=(points, 2)).astype(np.float32)
    np.savez(
        folder / "picture.npz",
        grid_low=-4.0,
        grid_high=4.0,
        density=density,
        true_density=density,
        samples=samples,
        data_samples=samples,
    )
    (folder / "metrics.csv").write_text(
        "step,epoch,train/nll_nats,val/nll_nats\n1,0,4.0,\n2,0,,3.9\n3,1,3.6,\n4,1,,3.5\n"
    )


@pytest.mark.parametrize("points", [300, 25_000])
def test_figures_are_deterministic_and_draw_missing_cells(tmp_path, points):
    picture(put(tmp_path, 3.2).parent, points)
    table = fill(tmp_path)
    pictures = run_files(table, "picture.npz")
    assert list(pictures) == ["Flow", "AbsFlow", "Flow, clipped (ours)", "AbsSplineFlow (ours)"]
    assert pictures["Flow"]["Corners"].name == "picture.npz"
    assert pictures["Flow"]["Circles"] is None
    cells = {row: {c: pictures[row][c] for c in ("Corners", "Circles")} for row in pictures}
    curves = run_files(table, "metrics.csv")
    for draw, files in (
        (density_figure, cells),
        (sample_figure, cells),
        (learning_curve_figure, curves),
    ):
        one = draw(files, tmp_path / "one.png").read_bytes()
        two = draw(files, tmp_path / "two.png").read_bytes()
        assert one == two
        assert one.startswith(b"\x89PNG") and len(one) < 1_500_000
        assert b"Software" not in one and b"tIME" not in one


def test_curve_is_read_where_both_columns_are_given(tmp_path):
    picture(tmp_path)
    epochs, values = read_curve(tmp_path / "metrics.csv", "val/nll_nats")
    assert (epochs.tolist(), values.tolist()) == ([0.0, 1.0], [3.9, 3.5])
    with pytest.raises(ValueError, match="lacks column val/other"):
        read_curve(tmp_path / "metrics.csv", "val/other")
    steps, values = read_curve(tmp_path / "metrics.csv", "train/nll_nats", "step")
    assert (steps.tolist(), values.tolist()) == ([1.0, 3.0], [4.0, 3.6])


def test_torn_picture_is_named(tmp_path):
    file = tmp_path / "picture.npz"
    file.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match=r"picture\.npz: not readable as npz"):
        density_figure({"Flow": {"Corners": file}}, tmp_path / "out.png")
    np.savez(file, grid_low=-4.0, grid_high=4.0, density=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"picture\.npz: lacks true_density"):
        density_figure({"Flow": {"Corners": file}}, tmp_path / "out.png")
    with pytest.raises(ValueError, match="cells is empty"):
        sample_figure({}, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_reporting_imports_nothing_heavy():
    code = (
        "import sys, surflow.reporting, surflow.reporting.figures.registry\n"
        "heavy = {'torch', 'torchvision', 'lightning', 'pytorch_lightning', 'hydra', 'omegaconf',"
        " 'wandb', 'matplotlib.pyplot'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
