"""Runs on images from the command to the record: sweeps, scores of samples, released weights."""

import json
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from surflow.config import compose, run_dir
from surflow.errors import UserError
from surflow.models import official_flow, read_tensors
from surflow.models.official import find_checkpoint
from surflow.objectives import bits_per_dim, elbo
from surflow.record import load_record
from surflow.training.run import Run

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
SMALL = (
    "model=pool_flow",
    "model.num_steps=1",
    "model.mid_channels=4",
    "model.depth=1",
    "model.growth=4",
    "model.dequant_steps=1",
    "model.context_channels=2",
    "data=photo_patches",
    "data.train_size=64",
    "data.valid_size=16",
    "data.test_size=24",
    "data.batch_size=16",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "logger=csv",
)


def small(root, *overrides):
    return [*SMALL, f"run.root={root}", *overrides]


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def test_a_sweep_over_surjections_and_seeds(command, tmp_path):
    """model=pool_flow surjection=... seed=... -m: a run each, with what a dashboard groups by."""
    overrides = small(tmp_path / "runs", "objective.iwbo_samples=3")
    done = command("train", "-m", *overrides, "surjection=max_pool,conditional_slice", "seed=0,1")
    assert done.code == 0, done.err
    folders = sorted(p.parent for p in (tmp_path / "runs").rglob("record.json"))
    assert len(folders) == 4
    found = set()
    for folder in folders:
        record = record_of(folder)
        found.add((record["surjection"], record["seed"]))
        assert record["artefact"] == "adhoc"
        assert set(record["metrics"]) == {"test/elbo_bpd", "test/iwbo_bpd"}
        bound, tighter = (record["metrics"][f"test/{n}_bpd"] for n in ("elbo", "iwbo"))
        assert bound["kind"] == tighter["kind"] == "bound"
        assert bound["count"] == 24
        assert 5 < tighter["value"] < bound["value"] < 14  # bits a dimension, hardly trained
        nats = -record["ledger"]["total"]
        scale = 3072 * np.log(2)
        # the ledger has draws of its own
        assert nats / scale == pytest.approx(bound["value"], abs=6 * bound["standard_error"])
        splits = record["provenance"]["splits"]
        assert {name: s["rows"] for name, s in splits.items()} == dict(train=64, valid=16, test=24)
        assert all(len(s["sha256"]) == 64 for s in splits.values())
        assert record["ledger"]["rows"][0]["layer"] == "0.Dequantization"
        pictures = np.load(folder / "images.npz")
        assert pictures["samples"].shape == (64, 3, 32, 32)
        assert pictures["data"].shape == (24, 3, 32, 32)
        assert pictures["samples"].dtype == pictures["data"].dtype == np.uint8
        assert Image.open(folder / "samples.png").size[0] >= 8 * 32
    assert found == {(s, n) for s in ("max_pool", "conditional_slice") for n in (0, 1)}


def test_scores_of_samples_are_added_to_a_complete_run(call, tmp_path):
    overrides = small(tmp_path / "runs", "surjection=slice")
    assert call("train", *overrides).code == 0
    folder = run_dir(compose(overrides))
    before, trained = record_of(folder), (folder / "last.ckpt").stat().st_mtime_ns
    wanted = [*overrides, "measures.samples.n=32", "measures.samples.extractor=random_features"]
    assert run_dir(compose(wanted)) == folder  # the same run
    assert Run(compose(wanted)).missing_measures(load_record(folder)).keys() == {"samples"}
    done = call("train", *wanted)
    assert done.code == 0, done.err
    after = record_of(folder)
    score = after["metrics"].pop("sample/fid_random_features")
    scored = {"n": 32, "extractor": "random_features"}
    samples = before["measures"]["samples"] | scored
    assert after.pop("measures") == before.pop("measures") | {"samples": samples}
    assert after == before
    assert (folder / "last.ckpt").stat().st_mtime_ns == trained
    assert score["kind"] == "score"
    assert score["protocol"]["n"] == score["count"] == 32
    assert score["protocol"]["reference"]["images"] == 80  # train and valid
    assert score["value"] > 0
    assert not Run(compose(wanted)).missing_measures(load_record(folder))
    assert "already complete" in call("train", *wanted).out
    other = compose([*wanted, "measures.samples.temperature=0.5"])
    assert Run(other).missing_measures(load_record(folder))  # of another protocol


def test_without_inception_weights_the_rest_is_scored(call, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    overrides = small(tmp_path / "runs", "surjection=slice", "measures.samples.n=8")
    done = call("train", *overrides)
    assert done.code == 0, done.err
    folder = run_dir(compose(overrides))
    record = record_of(folder)
    assert set(record["metrics"]) == {"test/elbo_bpd"}
    assert set(record["missing"]) == {"sample/fid", "sample/inception_score"}
    for reason in record["missing"].values():
        assert "measures.samples.weights" in reason
        assert "\n" not in reason
    assert "sample/fid: missing: " in done.out
    # named, and not there: a mistake, before anything is computed
    named = call("train", *overrides, f"measures.samples.weights={tmp_path}/no.pth", "seed=1")
    assert named.code == 2
    assert named.err.startswith("surflow: error: measures.samples.weights: expected a file")
    assert named.err.count("\n") == 1


# Released weights


OFFICIAL = (
    "model.num_steps=2",
    "model.dequant_steps=2",
    "model.context_channels=8",
    "model.mid_channels=16",
    "model.depth=2",
    "model.growth=8",
    "surjection=max_pool",
    "weights.source=official",
)


def test_released_weights_are_scored_without_training(call, tmp_path):
    file = REFERENCE / "poolflow_small_max.weights.safetensors"
    overrides = small(tmp_path / "runs", *OFFICIAL, f"weights.path={file}")
    done = call("train", *overrides)
    assert done.code == 0, done.err
    folder = run_dir(compose(overrides))
    record = record_of(folder)
    assert record["train_time_s"] == 0
    assert record["weights"]["source"] == "official"
    assert len(record["weights"]["sha256"]) == 64
    assert record["weights"]["parameters"] == record["parameters"]
    assert not (folder / "last.ckpt").exists()
    flow = official_flow(read_tensors(file))
    data = Run(compose(overrides)).data
    data.setup()
    x = data.splits["test"]
    torch.manual_seed(1)
    with torch.no_grad():
        bits = bits_per_dim(elbo(flow, x, num_samples=4), 3072)
    score = record["metrics"]["test/elbo_bpd"]
    assert score["value"] == pytest.approx(bits.mean().item(), abs=0.02)
    again = call("train", *overrides)
    assert "already complete" in again.out
    other = tmp_path / "other.safetensors"
    other.write_bytes(file.read_bytes() + b" ")
    refused = call("train", *overrides[:-1], f"weights.path={other}")
    assert refused.code == 2
    assert refused.err.startswith(f"surflow: error: weights.path: {other} is not the file that ")
    assert refused.err.count("\n") == 1
    assert record_of(folder) == record
    trained = run_dir(compose(small(tmp_path / "runs", *OFFICIAL[:-1])))
    assert trained != folder  # never in the place of a run that trains


def test_released_weights_of_another_size_are_refused(call, tmp_path):
    file = REFERENCE / "poolflow_small_max.weights.safetensors"
    overrides = small(tmp_path / "runs", *OFFICIAL, "model.depth=3", f"weights.path={file}")
    done = call("train", *overrides)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "weights.path: " in done.err
    assert "the names are not those of this configuration" in done.err
    done = call("train", *small(tmp_path / "runs", *OFFICIAL, "surjection=conditional_slice"))
    assert "expected surjection=max_pool or slice, got 'conditional_slice'" in done.err
    assert not list((tmp_path / "runs").rglob("record.json"))


def test_a_checkpoint_is_found_by_its_names(tmp_path):
    for name in ("c10_max/check/checkpoint.pt", "c10_non/check/checkpoint.pt", "i32_max.pth"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "c10_max/args.pickle").touch()
    found = find_checkpoint(tmp_path, "cifar10", "max_pool")
    assert found == tmp_path / "c10_max/check/checkpoint.pt"
    assert find_checkpoint(tmp_path, "cifar10", "slice").parts[-3] == "c10_non"
    assert find_checkpoint(tmp_path, "imagenet32", "max_pool").name == "i32_max.pth"
    with pytest.raises(UserError, match=r"such as imagenet64_slice.pt, got none"):
        find_checkpoint(tmp_path, "imagenet64", "slice")
    (tmp_path / "cifar10_max_pool.safetensors").touch()
    with pytest.raises(UserError, match=r"expected one checkpoint .* got c10_max"):
        find_checkpoint(tmp_path, "cifar10", "max_pool")
    assert find_checkpoint(tmp_path / "i32_max.pth", "cifar10", "max_pool").name == "i32_max.pth"
    with pytest.raises(UserError, match=r"no file or folder .*/absent; released at https"):
        find_checkpoint(tmp_path / "absent", "cifar10", "slice")
    with pytest.raises(UserError, match=r"weights.path: expected the file of the released"):
        find_checkpoint(None, "cifar10", "slice")
