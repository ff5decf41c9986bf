"""Runs of progressive flows, and of flows with autoregressive priors, from command to record."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from surflow.config import compose, run_dir
from surflow.evaluation.pictures import side_by_side
from surflow.training.run import Run

SMALL = (
    "model.num_steps=1",
    "model.hidden_channels=8",
    "model.prior_hidden_channels=4",
    "model.prior_layers=1",
    "data=photo_patches",
    "data.train_size=64",
    "data.valid_size=16",
    "data.test_size=24",
    "data.batch_size=16",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "logger=csv",
)


@pytest.mark.parametrize("chain", ["published", "exact"])
def test_a_progressive_flow_from_command_to_record(chain, command, tmp_path):
    overrides = [*SMALL, "model=pronf", f"model.chain={chain}", "model.embed_channels=4"]
    overrides.append(f"run.root={tmp_path}")
    done = command("train", *overrides)
    assert done.code == 0, done.err
    folder = run_dir(compose(overrides))
    record = json.loads((folder / "record.json").read_text())
    sides = (32, 16, 8, 4)
    names = [f"test/level_{side}_bpd" for side in sides]
    assert set(record["metrics"]) == {"test/elbo_bpd", *names}
    values = [record["metrics"][name]["value"] for name in names]
    whole = sum(v * 3 * side**2 for v, side in zip(values, sides, strict=True))
    assert whole == pytest.approx(-record["ledger"]["total"] / np.log(2), rel=1e-9)
    assert [record["metrics"][name]["kind"] for name in names] == ["bound"] * 4
    assert record["metrics"]["test/level_4_bpd"]["protocol"] == {"dims": 48}
    with np.load(folder / "pyramid.npz") as arrays:
        assert arrays["columns"] == 4
        for name in ("data", "super_resolution", "levels"):
            assert arrays[name].shape == (32, 3, 32, 32) and arrays[name].dtype == np.uint8
        # a row: the test image of 4 x 4 pixels, of 8 x 8 ..., the finest as it is
        data = Run(compose(overrides)).data
        data.setup()
        test = data.splits["test"]
        rows = arrays["data"].reshape(8, 4, 3, 32, 32)
        assert np.array_equal(rows[0, 3], test[0].numpy())
        block = rows[0, 0].reshape(3, 4, 8, 4, 8)
        assert np.array_equal(block, np.broadcast_to(block[:, :, :1, :, :1], block.shape))
        mean = test[0].float().reshape(3, 4, 8, 4, 8).mean((2, 4)).numpy()
        assert np.abs(block[:, :, 0, :, 0] - mean).max() <= 3
    for name in ("super_resolution", "levels"):
        assert Image.open(folder / f"{name}.png").size[0] > 8 * 32


def test_what_is_outside_is_shown_as_its_edge():
    image = torch.tensor([-3.0, 0.5, 0.999, 7.0, float("nan"), 0.0, 0.0, 0.0]).view(2, 1, 2, 2)
    shown = side_by_side([image, image], 256, 4)
    assert shown.shape == (4, 1, 4, 4)
    assert shown[0, 0, ::2, ::2].tolist() == [[0, 128], [255, 255]]
    assert shown[2, 0, 0, 0] == 0


@pytest.mark.parametrize(
    "extra",
    [
        ("model=mar_scf", "model.num_scales=2"),
        (
            "model=mar_scf",
            "model.coupling=mixture",
            "model.num_blocks=1",
            "model.num_components=2",
            "model.num_scales=1",
        ),
    ],
    ids=["affine", "mixture"],
)
def test_an_autoregressive_prior_from_command_to_record(extra, command, tmp_path):
    overrides = [*SMALL, *extra, f"run.root={tmp_path}", "objective.iwbo_samples=2"]
    done = command("train", *overrides)
    assert done.code == 0, done.err
    folder = run_dir(compose(overrides))
    record = json.loads((folder / "record.json").read_text())
    assert set(record["metrics"]) == {"test/elbo_bpd", "test/iwbo_bpd"}
    assert record["ledger"]["rows"][-1]["layer"] == "base.ChannelAutoregressive"
    assert (folder / "samples.png").is_file() and (folder / "interpolation.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=pronf", "model.chain=publishd"], "model.chain: expected one of published, exact"),
        (["model=pronf", "model.coarsest=5"], "H a power of two times coarsest"),
        (["model=mar_scf", "model.prior=glow"], "model.prior: expected one of independent"),
        (["model=mar_scf", "data=digits_binary"], "model=mar_scf is for images"),
    ],
)
def test_mistakes_are_one_line(overrides, said, command, tmp_path):
    done = command("train", *SMALL[:4], "data=photo_patches", *overrides, f"run.root={tmp_path}")
    assert done.code == 2
    assert said in done.err and done.err.strip().count("\n") == 0
    assert not list(tmp_path.rglob("record.json"))
