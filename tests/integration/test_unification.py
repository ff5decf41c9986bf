"""The table of unified models: its runs, its page, and what is committed of it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from surflow.cli.cells import plan_cells, runs_of, write_report
from surflow.cli.request import results_folder, table_spec
from surflow.cli.train import train
from surflow.config import compose, run_dir

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results/paper/unification"
SMALL = (
    "data.train_size=1024",
    "data.valid_size=128",
    "data.test_size=60",
    "trainer.max_epochs=2",
    "measures.truth.num_samples=[1,10]",
    "objective.eval_samples=10",
    "logger=csv",
)


def run(row: str, root: Path, *more: str) -> tuple[dict, Path]:
    cfg = compose(
        [f"experiment=unification/{row}", "profile=smoke", *SMALL, f"run.root={root}", *more]
    )
    train(cfg)
    folder = run_dir(cfg)
    return json.loads((folder / "record.json").read_text()), folder


def test_a_run_holds_its_bounds_and_its_likelihood(tmp_path):
    record, folder = run("dequantization_variational", tmp_path)
    truth = record["truth"]
    assert truth["method"].startswith("Gauss-Legendre")
    assert not truth["exact"]
    assert [g["num_samples"] for g in truth["gaps"]] == [1, 10]
    metrics = record["metrics"]
    assert metrics["test/true_nll_nats"]["kind"] == "likelihood"
    assert metrics["test/true_nll_nats"]["value"] == -truth["log_prob"]
    for gap in truth["gaps"]:
        bound = metrics[f"test/iwbo{gap['num_samples']}_nats"]
        assert bound["kind"] == "bound"
        assert bound["value"] == -gap["bound"]
        assert gap["mean"] == pytest.approx(truth["log_prob"] - gap["bound"], abs=1e-9)
        assert gap["mean"] > -4 * gap["standard_error"]
    with np.load(folder / "picture.npz") as picture:
        assert picture["true_density"].shape == (32, 32)
        assert picture["true_density"].sum() == pytest.approx(1.0, abs=1e-5)
        assert picture["samples"].min() >= -0.5
        assert picture["samples"].max() <= 31.5


def test_an_exact_run_agrees_with_its_likelihood(tmp_path):
    record, _ = run("multi_scale", tmp_path, "run.pictures=false")
    assert record["truth"]["exact"]
    assert record["truth"]["worst"] < 1e-10
    assert record["truth"]["gaps"] == []
    nll = record["metrics"]["test/nll_nats"]["value"]
    assert nll == pytest.approx(record["metrics"]["test/true_nll_nats"]["value"], abs=1e-4)


def test_the_page_is_written(tmp_path, capfd):
    overrides = "overrides=[" + ",".join(f'"{o}"' for o in (*SMALL, "run.pictures=false")) + "]"
    cfg = compose(
        [
            "artefact=unification",
            "profile=smoke",
            "rows=[ppca,rad]",
            overrides,
            f"run_root={tmp_path / 'runs'}",
            f"results_root={tmp_path / 'results'}",
        ],
        "reproduce",
    )
    spec = table_spec("unification").of_profile("smoke")
    cells = plan_cells(cfg, spec)
    for key in runs_of(cells):
        train(cells[key].config)
    write_report(cfg, spec, cells)
    folder = results_folder(cfg)
    with open(folder / "table.csv", newline="") as file:
        lines = {line["row"]: line for line in csv.DictReader(file)}
    assert sorted(lines) == ["ppca", "rad"]
    assert lines["ppca"]["method"] == "closed form"
    assert lines["rad"]["number"] == "exact"
    page = (folder / "table.md").read_text()
    assert "| VAE | not run |" in page
    assert "not a reproduction" not in page  # nothing is published for these
    assert (folder / "gap.png").is_file()
    assert "gap, K = 10" in capfd.readouterr().out


def test_evaluate_prints_the_likelihood(tmp_path, call):
    arguments = ["experiment=unification/dif", "profile=smoke", *SMALL, f"run.root={tmp_path}"]
    assert call("train", *arguments, "run.pictures=false").code == 0
    outcome = call("evaluate", *arguments, "run.pictures=false")
    assert outcome.code == 0
    assert "test/true_nll_nats = " in outcome.out
    assert "(likelihood: log p(x) by enumeration of 8 components" in outcome.out
    assert "DiscretelyIndexed  stochastic" in outcome.out


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results of the unification here")
def test_committed_results_agree_with_the_theory():
    with open(RESULTS / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row.name for row in table_spec("unification").rows]
    for line in lines:
        if line["number"] == "exact":
            assert float(line["max_difference"]) <= 1e-4
            continue
        gaps = [(float(line[f"gap{k}"]), float(line[f"gap{k}_se"])) for k in (1, 10, 100, 1000)]
        for gap, error in gaps:
            assert gap >= -4 * error - float(line["numerical_error"]) - 1e-6, line["row"]
        assert gaps[-1][0] <= gaps[0][0] + 4 * (gaps[0][1] + gaps[-1][1]), line["row"]
        assert line["verdict"] == "below the likelihood within its error, tightening with K"
