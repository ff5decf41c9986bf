"""Evaluation of an image model through the command: bits a dimension, interruption, progress."""

import contextlib
import json
import math
import re

import pytest

import surflow.progress
from surflow.cli.evaluate import evaluate_run
from surflow.config import run_dir
from surflow.evaluation import likelihood
from surflow.training.run import Run

DIGITS = (
    "data=digits",
    "data.train_size=64",
    "data.valid_size=16",
    "data.test_size=24",
    "data.batch_size=32",
    "model=pool_flow",
    "surjection=max_pool",
    "model.num_scales=1",
    "model.num_steps=1",
    "model.mid_channels=8",
    "model.depth=1",
    "model.growth=4",
    "model.dequant_steps=1",
    "model.context_channels=4",
    "objective.iwbo_samples=5",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "run.pictures=false",
    "logger=csv",
)
METRICS = {"test/elbo_bpd", "test/iwbo_bpd"}


@pytest.fixture
def digits(root):
    pytest.importorskip("sklearn")
    return [*DIGITS, f"run.root={root}"]


@pytest.fixture
def compose(digits):
    from surflow.config import compose

    return lambda *overrides, name="evaluate": compose([*digits, *overrides], name)


@pytest.fixture
def trained(compose):
    """A trained run: its test metrics and folder."""
    from surflow.cli.train import train

    cfg = compose(name="train")
    return train(cfg), run_dir(cfg)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 20 draws: four images at a time for the IWBO."""
    from surflow.evaluation import blocks

    monkeypatch.setattr(blocks, "LEAST_BLOCK", 20)
    monkeypatch.setattr(blocks, "MOST_BLOCK", 20)


@pytest.fixture
def score(compose, monkeypatch):
    """Score a run's flow on test with a progress of the test's own."""

    def score(run, flow, progress):
        @contextlib.contextmanager
        def shown(unit):
            yield progress

        with monkeypatch.context() as patched:
            patched.setattr(likelihood, "shown_progress", shown)
            likelihood.likelihood(run.trained(flow))

    return score


def test_evaluation_is_the_record_and_says_what_is_a_bound(trained, digits, call):
    metrics, folder = trained
    assert METRICS <= set(metrics)
    assert not list(folder.glob("*.partial*"))
    done = call("evaluate", *digits)
    assert done.code == 0, done.err
    written = json.loads((folder / "evaluation_test.json").read_text())
    record = json.loads((folder / "record.json").read_text())
    for name in METRICS:
        assert written["metrics"][name] == record["metrics"][name]
        assert written["metrics"][name]["kind"] == "bound"
        assert written["metrics"][name]["count"] == 24
        line = re.search(rf"^{name} = (\S+) ± (\S+) bpd  \(bound: (\S+)", done.out, re.M)
        assert float(line[1]) == pytest.approx(metrics[name], abs=1e-4)
        error = record["metrics"][name]["standard_error"]
        assert float(line[2]) == pytest.approx(error, abs=1e-4)
        assert name.split("/")[1].startswith(line[3].rstrip(",").lower())
    nats = sum(row["mean"] for row in record["ledger"]["rows"])
    elbo = -nats / (64 * math.log(2))
    assert metrics["test/elbo_bpd"] == pytest.approx(elbo, rel=1e-9)
    assert metrics["test/iwbo_bpd"] < metrics["test/elbo_bpd"]
    assert "24 test points, profile free" in done.out
    assert not list(folder.glob("*.partial*"))


def test_other_numbers_of_draws_are_of_the_same_run(trained, digits, call, compose):
    metrics, folder = trained
    record = (folder / "record.json").read_bytes()
    assert run_dir(compose("iwbo_samples=40", "eval_samples=3")) == folder
    done = call("evaluate", *digits, "iwbo_samples=40", "eval_samples=3")
    assert done.code == 0, done.err
    found = json.loads((folder / "evaluation_test.json").read_text())["metrics"]
    assert "IWBO, K = 40" in found["test/iwbo_bpd"]["estimator"]
    assert "ELBO, 3 sample(s)" in found["test/elbo_bpd"]["estimator"]
    # the bound is tighter for more draws; the mean of three ELBOs is that of one, up to noise
    assert found["test/iwbo_bpd"]["value"] < metrics["test/iwbo_bpd"]
    error = found["test/elbo_bpd"]["standard_error"]
    assert found["test/elbo_bpd"]["value"] == pytest.approx(metrics["test/elbo_bpd"], abs=3 * error)
    assert found["test/elbo_bpd"]["value"] != metrics["test/elbo_bpd"]
    assert (folder / "record.json").read_bytes() == record
    for wrong in ("iwbo_samples=0", "eval_samples=1.5", "iwbo_samples=many", "iwbo_samples=true"):
        done = call("evaluate", *digits, wrong)
        key, value = wrong.split("=")
        assert done.code == 2
        got = {"true": "True"}.get(value, value)
        assert done.err == f"surflow: error: {key}: expected a positive whole number, got {got}\n"


def test_one_test_image_has_no_standard_error(compose, digits, call):
    done = call("train", *digits, "data.test_size=1")
    assert done.code == 0, done.err
    folder = run_dir(compose("data.test_size=1"))
    record = json.loads((folder / "record.json").read_text())
    assert "standard_error" not in record["metrics"]["test/elbo_bpd"]
    assert {row["standard_error"] for row in record["ledger"]["rows"]} == {None}
    done = call("evaluate", *digits, "data.test_size=1")
    assert done.code == 0, done.err
    assert re.search(r"^test/elbo_bpd = \d\.\d{4} bpd  \(bound", done.out, re.M)


def test_the_threads_are_those_of_the_config(trained, compose, monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    evaluate_run(compose())
    assert asked == [1]


def test_batch_size_changes_no_bit(trained, compose):
    metrics, _ = trained
    for size in (1, 7, 24):
        found = evaluate_run(compose(f"data.eval_batch_size={size}"))
        assert {name: found[name] for name in METRICS} == {n: metrics[n] for n in METRICS}


def test_an_interrupted_evaluation_goes_on(trained, compose, score, small_blocks, monkeypatch):
    cfg = compose()
    folder = run_dir(cfg)
    unbroken = evaluate_run(cfg)
    wanted = json.loads((folder / "evaluation_test.json").read_text())
    run = Run(cfg)
    flow, _ = run.load_flow()
    told = []

    def stop(what, done, total):
        told.append((done, total))
        if len(told) == 5:  # two blocks of the ELBO, three of the IWBO
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(run, flow, stop)
    assert told == [(20, 144), (24, 144), (44, 144), (64, 144), (84, 144)]
    kept = likelihood.unfinished(folder, "test")
    assert kept.is_file()

    runs = []
    original = type(flow).log_prob_samples
    monkeypatch.setattr(
        type(flow),
        "log_prob_samples",
        lambda self, x, context=None, num_samples=1: (
            runs.append(len(x)) or original(self, x, context, num_samples)
        ),
    )
    assert evaluate_run(cfg) == unbroken
    assert runs == [4, 4, 4]  # of six
    assert json.loads((folder / "evaluation_test.json").read_text()) == wanted
    assert not kept.exists()


def test_a_log_has_a_line_now_and_then(trained, compose, small_blocks, monkeypatch, capfd):
    monkeypatch.setattr(surflow.progress, "LINE_EVERY_S", 0.0)
    cfg = compose()
    capfd.readouterr()
    evaluate_run(cfg)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("evaluating")]
    assert lines[0].startswith("evaluating test: 24 of 144 draws (17 %), about ")
    assert lines[-1] == "evaluating test: 144 of 144 draws (100 %), about 0 min left"
    monkeypatch.setattr(surflow.progress, "LINE_EVERY_S", 60.0)
    evaluate_run(cfg)
    assert "evaluating" not in capfd.readouterr().err


def test_other_weights_do_not_go_on(trained, compose, score, small_blocks):
    import torch

    cfg = compose()
    folder = run_dir(cfg)
    run = Run(cfg)
    flow, _ = run.load_flow()

    def stop(what, done, total):
        if done > 50:
            raise KeyboardInterrupt

    with torch.no_grad():
        next(flow.parameters()).mul_(1.01)
    with pytest.raises(KeyboardInterrupt):
        score(run, flow, stop)
    kept = likelihood.unfinished(folder, "test")
    assert kept.is_file()
    found = evaluate_run(cfg)
    kept.unlink(missing_ok=True)
    assert evaluate_run(cfg) == found
