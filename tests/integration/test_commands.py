"""Evaluate and sample: what they print, write and repeat."""

import json
import re
from importlib.metadata import entry_points

import numpy as np
import pytest

from surflow.config import config_hash, run_dir

COMMANDS = (
    "train",
    "evaluate",
    "sample",
    "reproduce",
    "report",
    "compare",
    "verify",
    "interpolate",
)


@pytest.mark.parametrize(
    "extra",
    [(), ("surjection=abs", "model.support=real_line")],
    ids=["flow", "abs_flow"],
)
def test_ledger_adds_up_to_the_metric(extra, call, tiny, train):
    _, _, metrics = train(*extra)
    done = call("evaluate", *tiny(*extra))
    assert done.code == 0, done.err
    # layer, kind, exact or bound, mean ± standard error
    layers = re.findall(r"^(\d+\.\w+|base\.\w+) .* ([+-]\d+\.\d+) ± \d", done.out, re.M)
    assert len(layers) == (4 if not extra else 6) + 1
    total = float(re.search(r"^sum .* ([+-]\d+\.\d+)  \(mean of 500 points\)", done.out, re.M)[1])
    nll = metrics["test/nll_nats"]
    assert total == pytest.approx(-nll, abs=1e-4)
    assert sum(float(value) for _, value in layers) == pytest.approx(-nll, abs=1e-3)
    assert "exact log-likelihood, mean over 500 test points" in done.out
    assert f"test/nll_nats = {nll:.4f} ± " in done.out
    assert "floor = " in done.out
    assert "profile free" in done.out


def test_evaluation_is_the_record(train, config):
    from surflow.cli.evaluate import evaluate_run

    cfg, folder, metrics = train()
    assert evaluate_run(config(name="evaluate")) == metrics
    written = json.loads((folder / "evaluation_test.json").read_text())
    record = json.loads((folder / "record.json").read_text())
    assert written["metrics"] == record["metrics"]
    assert written["config_hash"] == config_hash(cfg)
    assert written["ledger"] == record["ledger"]["rows"]
    assert record["ledger"]["total"] == pytest.approx(-metrics["test/nll_nats"], abs=1e-6)


@pytest.mark.parametrize(
    "extra",
    [(), ("surjection=abs", "model.support=real_line"), ("model=vae", "objective.iwbo_samples=3")],
    ids=["flow", "abs_flow", "vae"],
)
def test_batch_size_of_evaluation_changes_nothing(extra, train, config):
    from surflow.cli.evaluate import evaluate_run

    _, _, metrics = train(*extra)
    if "model=vae" in extra:
        own = {"test/elbo_nats", "test/iwbo_nats", "test/active_units"}
        assert set(metrics) == {*own, "test/excess_nats"}
        del metrics["test/active_units"]  # of the trained run; evaluate scores likelihoods
    else:
        assert set(metrics) == {"test/nll_nats", "test/excess_nats"}
    for size in (500, 77, 1):
        again = evaluate_run(config(*extra, f"data.eval_batch_size={size}", name="evaluate"))
        assert again == pytest.approx(metrics, abs=1e-6)


def test_other_splits(call, tiny, train):
    _, folder, metrics = train()
    for split, size in (("train", 640), ("valid", 200)):
        done = call("evaluate", *tiny(f"split={split}"))
        assert done.code == 0
        written = json.loads((folder / f"evaluation_{split}.json").read_text())
        metric = written["metrics"][f"{split}/nll_nats"]
        assert metric["count"] == size
        assert metric["value"] != metrics["test/nll_nats"]


def test_best_checkpoint_can_be_named(train, config):
    from surflow.cli.evaluate import evaluate_run

    extra = ("trainer.max_epochs=6", "optimizer.lr=0.3", "seed=3")
    _, folder, metrics = train(*extra)
    path = f"checkpoint={folder / 'best.ckpt'}"
    best = evaluate_run(config(*extra, path, name="evaluate"))
    assert best["test/nll_nats"] != metrics["test/nll_nats"]  # the best is not the last here


def samples(folder):
    with np.load(folder) as file:
        return file["samples"]


def test_samples(call, tiny, train, tmp_path):
    _, folder, _ = train("surjection=abs", "model.support=real_line")
    extra = ("surjection=abs", "model.support=real_line")

    def draw(name, *overrides):
        out = tmp_path / f"{name}.npz"
        done = call("sample", *tiny(*extra, "n=300", f"out={out}", *overrides))
        assert done.code == 0, done.err
        return samples(out)

    one = draw("one")
    assert one.shape == (300, 2)
    assert one.dtype == np.float32
    assert np.isfinite(one).all()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert np.array_equal(one, draw("again"))
    parts = draw("parts", "data.eval_batch_size=128")
    assert parts.shape == one.shape
    cool = draw("cool", "temperature=0.1")
    assert cool.shape == one.shape
    assert not np.array_equal(cool, one)
    # near the base's mode: |x| of a cool flow varies less
    assert np.abs(cool).std() < 0.5 * np.abs(one).std()
    # in the run's folder where no other place is named
    assert call("sample", *tiny(*extra, "n=5")).code == 0
    assert samples(folder / "samples.npz").shape == (5, 2)


def test_other_seed_is_another_run_not_other_samples(call, tiny, train, config):
    train("seed=0")
    done = call("sample", *tiny("seed=1", "n=5"))
    assert done.code == 2
    assert str(run_dir(config("seed=1")).name) in done.err


def test_pictures_of_a_run(train):
    _, folder, _ = train("run.pictures=true", "surjection=abs", "model.support=real_line")
    with np.load(folder / "picture.npz") as picture:
        density, true = picture["density"], picture["true_density"]
        cell = ((picture["grid_high"] - picture["grid_low"]) / len(density)) ** 2
        assert density.shape == true.shape == (256, 256)
        assert (true.sum() * cell).item() == pytest.approx(1, abs=0.02)
        assert (density.sum() * cell).item() == pytest.approx(1, abs=0.05)
        assert picture["samples"].shape == (50_000, 2)
    for name in ("density.png", "samples.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_console_scripts():
    found = {e.name: e for e in entry_points(group="console_scripts")}
    for name in COMMANDS:
        assert callable(found[f"surflow-{name}"].load())


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, call):
    done = call(name, "--help")
    assert done.code == 0
    assert "Powered by Hydra" in done.out
    assert not done.err
