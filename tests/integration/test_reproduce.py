"""Tables: what is missing is trained, what is there is reused, what does not fit is refused."""

import csv
import json
import os
import sys

import pytest

from surflow.cli.report import load_table_spec, plan_cells, write_report
from surflow.cli.reproduce import Job, reproduce, run_local, visible_gpus
from surflow.cli.train import train
from surflow.config import compose, run_dir

SMALL = (
    "data.train_size=640",
    "data.valid_size=200",
    "data.test_size=500",
    "trainer.max_epochs=2",
    "model.net.hidden_features=[16]",
    "trainer.compile=false",
    "run.pictures=false",
    "logger=csv",
)


def quoted(overrides):
    return "overrides=[" + ",".join(f'"{item}"' for item in overrides) + "]"


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The command line of a tiny table: one row, one column."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    places = [f"run_root={tmp_path / 'runs'}", f"results_root={tmp_path / 'results'}"]

    def line(*extra, overrides=SMALL):
        cell = ["artefact=synthetic", "profile=smoke", "rows=[flow]", "columns=[corners]"]
        return [*cell, *places, quoted(overrides), *extra]

    return line


@pytest.fixture
def request_of(arguments):
    return lambda *extra, **kwargs: compose(arguments(*extra, **kwargs), "reproduce")


@pytest.fixture
def table(tmp_path):
    """The cells of table.csv."""

    def read():
        with open(tmp_path / "results/smoke/synthetic/table.csv", newline="") as file:
            return {(r["row"], r["column"]): r for r in csv.DictReader(file)}

    return read


def test_jobs_are_spread_over_the_gpus(tmp_path, monkeypatch):
    """Two at a time, each sees one GPU, and never the other's."""
    code = "import os, time; time.sleep(0.5); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(str(i), [sys.executable, "-c", code], tmp_path / f"{i}.log") for i in range(4)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    run_local(jobs, 2, visible_gpus())
    assert [job.code for job in jobs] == [0] * 4
    seen = [job.last_line() for job in jobs]
    assert sorted(seen[:2]) == ["3", "5"]
    assert set(seen) == {"3", "5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def cells_of(cfg):
    spec = load_table_spec(cfg.artefact)
    return spec, plan_cells(cfg, spec)


def test_trains_what_is_missing_and_reuses_it(request_of, table, tmp_path, capfd):
    cfg = request_of()
    assert reproduce(cfg) == 0
    out = capfd.readouterr().out
    assert "1 runs, 0 complete, 1 to do" in out
    assert "nothing written below is a reproduction" in out
    _, cells = cells_of(cfg)
    (folder,) = (cells.folder(key) for key in cells.chosen)
    assert folder == run_dir(cells.configs["flow", "corners", 0])
    record = json.loads((folder / "record.json").read_text())
    found = table()
    assert len(found) == 12
    cell = found.pop(("flow", "corners"))
    assert float(cell["ours"]) == pytest.approx(
        record["metrics"]["test/nll_nats"]["value"], abs=1e-3
    )
    assert float(cell["published"]) == 3.19
    assert cell["verdict"] == "not a reproduction (profile smoke)"
    assert cell["seeds"] == "0"
    assert {c["verdict"] for c in found.values()} == {"not run"}
    assert {c["ours"] for c in found.values()} == {""}
    results = tmp_path / "results/smoke/synthetic"
    text = (results / "table.md").read_text()
    assert "not a reproduction" in text
    assert text.count("not run") >= 11
    assert [p.name for p in (results / "records").iterdir()] == ["flow-corners-seed0.json"]
    assert (results / "learning_curves.png").is_file()

    before = (folder / "record.json").stat().st_mtime_ns
    assert reproduce(cfg) == 0
    assert "1 runs, 1 complete, 0 to do" in capfd.readouterr().out
    assert (folder / "record.json").stat().st_mtime_ns == before
    assert table()["flow", "corners"] == cell


def test_edited_record_is_refused(request_of, table, tmp_path):
    cfg = request_of()
    spec, cells = cells_of(cfg)
    train(cells.configs["flow", "corners", 0])
    path = cells.folder(("flow", "corners", 0)) / "record.json"
    write_report(cfg, spec, cells)
    assert table()["flow", "corners"]["ours"]
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config_hash": "0123456789abcdef"}))
    write_report(cfg, spec, cells)
    cell = table()["flow", "corners"]
    assert cell["ours"] == ""
    assert "stale config" in cell["verdict"] or "not run" in cell["verdict"]
    text = (tmp_path / "results/smoke/synthetic/table.md").read_text()
    assert "stale config 0123456789abcdef" in text
    assert cells.missing() == [("flow", "corners", 0)]  # so that reproduce trains it


def test_run_with_other_overrides_is_refused(request_of, table, tmp_path):
    cfg = request_of()
    spec, cells = cells_of(cfg)
    _, others = cells_of(request_of(overrides=(*SMALL, "optimizer.lr=0.01")))
    train(others.configs["flow", "corners", 0])
    write_report(cfg, spec, cells)
    assert table()["flow", "corners"]["ours"] == ""
    text = (tmp_path / "results/smoke/synthetic/table.md").read_text()
    assert f"stale config {others.hashes['flow', 'corners', 0]}" in text
    # beside the right one it is left alone
    metrics = train(cells.configs["flow", "corners", 0])
    write_report(cfg, spec, cells)
    cell = table()["flow", "corners"]
    assert float(cell["ours"]) == pytest.approx(metrics["test/nll_nats"], abs=1e-3)


def test_seeds_are_averaged(request_of, table):
    cfg = request_of("seeds=[0,1]")
    spec, cells = cells_of(cfg)
    values = [train(cells.configs[key])["test/nll_nats"] for key in cells.chosen]
    assert len(values) == 2
    write_report(cfg, spec, cells)
    cell = table()["flow", "corners"]
    assert float(cell["ours"]) == pytest.approx(sum(values) / 2, abs=1e-3)
    assert float(cell["std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-3)
    assert cell["seeds"] == "0 1"


def test_report_runs_nothing(call, arguments, table, tmp_path):
    done = call("report", *arguments())
    assert done.code == 0, done.err
    assert {c["verdict"] for c in table().values()} == {"not run"}
    assert not (tmp_path / "runs").exists()


def test_failing_cell(call, arguments, table, tmp_path):
    done = call("reproduce", *arguments(overrides=(*SMALL, "optimizer.lr=1e6")))
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        "surflow: error: 1 run(s) failed; their cells say so in the table"
    )
    assert "flow corners seed 0: failed: surflow: error: the loss is not finite" in done.err
    assert "train.log" in done.err
    cell = table()["flow", "corners"]
    assert cell["ours"] == ""
    assert "not run" in cell["verdict"] or "failed" in cell["verdict"]
    (log,) = tmp_path.rglob("train.log")
    assert "the loss is not finite" in log.read_text()


def test_submitit_launcher(request_of, table, tmp_path):
    assert reproduce(request_of("launcher=submitit_local")) == 0
    assert table()["flow", "corners"]["ours"]
    assert list((tmp_path / "runs/.submitit").iterdir())


def test_submitit_failing_cell(request_of, table):
    cfg = request_of("launcher=submitit_local", overrides=(*SMALL, "optimizer.lr=1e6"))
    assert reproduce(cfg) == 1
    assert table()["flow", "corners"]["ours"] == ""


# Sweeps


def assert_four_runs(root):
    records = [json.loads(p.read_text()) for p in root.rglob("record.json")]
    wanted = {(d, s) for d in ("corners", "checkerboard") for s in (0, 1)}
    assert {(r["data"], r["seed"]) for r in records} == wanted
    assert len({r["config_hash"] for r in records}) == 4
    assert len({r["metrics"]["test/nll_nats"]["value"] for r in records}) == 4


SWEEP = ("data=corners,checkerboard", "seed=0,1")


def test_sweep(call, tiny, root, config):
    done = call("train", "-m", *tiny(*SWEEP))
    assert done.code == 0, done.err
    assert_four_runs(root)
    assert (run_dir(config("data=corners", "seed=1")) / "record.json").is_file()


@pytest.mark.parametrize(
    "launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.slow)]
)
def test_sweep_launcher(launcher, command, tiny, root):
    extra = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    done = command("train", "-m", *tiny(*SWEEP), f"hydra/launcher={launcher}", *extra)
    assert done.code == 0, done.err
    assert_four_runs(root)
    assert not os.path.exists("multirun")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_sweep_launcher_with_a_failing_run(launcher, command, tiny, root):
    done = command("train", "-m", *tiny("optimizer.lr=0.001,-1"), f"hydra/launcher={launcher}")
    assert done.code != 0
    assert "optimizer.lr: expected a positive number, got -1" in done.err + done.out
    assert len(list(root.rglob("record.json"))) <= 1


def test_paper_profile_refuses_overrides_that_change_results(call, tmp_path):
    done = call(
        "reproduce",
        "artefact=synthetic",
        "rows=[flow]",
        "columns=[corners]",
        f"run_root={tmp_path / 'runs'}",
        f"results_root={tmp_path / 'results'}",
        'overrides=["trainer.max_epochs=1"]',
    )
    assert done.code == 2
    assert "change what the published protocol computes" in done.err
    assert not (tmp_path / "runs").exists()
