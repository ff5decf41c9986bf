"""Samples of an image run: one array, a folder of PNG files, a picture; none depends on a batch."""

import json

import numpy as np
import pytest
from PIL import Image

from surflow.config import compose, run_dir

OVERRIDES = (
    "data=photo_patches",
    "data.train_size=64",
    "data.valid_size=16",
    "data.test_size=16",
    "data.batch_size=16",
    "model=pool_flow",
    "surjection=max_pool",
    "model.num_steps=1",
    "model.mid_channels=8",
    "model.depth=1",
    "model.growth=4",
    "model.dequant_steps=1",
    "model.context_channels=4",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "run.pictures=false",
    "logger=csv",
)
N = 300  # more than one unit of draws


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The overrides of a trained run, and its folder."""
    from surflow.cli.train import train

    root = tmp_path_factory.mktemp("runs")
    overrides = [*OVERRIDES, f"run.root={root}"]
    cfg = compose(overrides)
    train(cfg)
    return overrides, run_dir(cfg)


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_one_array(run, call, tmp_path):
    overrides, _ = run
    out = tmp_path / "a" / "images.npz"
    done = call("sample", *overrides, f"n={N}", f"out={out}", "temperature=0.8")
    assert done.code == 0, done.err
    assert f"{N} samples" in done.out
    found = arrays(out)
    assert found["samples"].shape == (N, 3, 32, 32) and found["samples"].dtype == np.uint8
    assert found["seed"] == 0 and found["temperature"] == 0.8
    assert found["samples"].std() > 1
    other = tmp_path / "b.npz"
    batch = "data.eval_batch_size=7"
    assert not call("sample", *overrides, f"n={N}", f"out={other}", "temperature=0.8", batch).code
    assert np.array_equal(arrays(other)["samples"], found["samples"])
    assert not call("sample", *overrides, "n=64", f"out={other}").code
    assert not np.array_equal(arrays(other)["samples"], found["samples"][:64])  # temperature
    # the picture holds the first 64, 8 a row
    picture = np.asarray(Image.open(tmp_path / "a" / "images.png"))
    side = (picture.shape[0] - 2) // 8
    assert picture.shape == (8 * side + 2, 8 * side + 2, 3)
    cell = picture[side + 2 : 2 * side : 2, 2 * side + 2 : 3 * side : 2]
    assert np.array_equal(cell, found["samples"][10].transpose(1, 2, 0))


def test_in_the_run_folder_where_no_other_is_named(run, call):
    overrides, folder = run
    assert call("sample", *overrides, "n=3").code == 0
    assert arrays(folder / "samples.npz")["samples"].shape == (3, 3, 32, 32)
    assert (folder / "samples.png").is_file()


def test_a_folder_of_files(run, call, tmp_path, monkeypatch):
    overrides, _ = run
    array, folder = tmp_path / "images.npz", tmp_path / "t0.8"
    assert call("sample", *overrides, f"n={N}", f"out={array}").code == 0
    done = call("sample", *overrides, f"n={N}", f"out={folder}")
    assert done.code == 0, done.err
    samples = arrays(array)["samples"]
    files = sorted(folder.glob("*.png"))
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(N)]
    found = np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2)
    assert np.array_equal(found, samples)
    grid, same = (Image.open(p) for p in (tmp_path / "t0.8.png", tmp_path / "images.png"))
    assert np.array_equal(np.asarray(grid), np.asarray(same))
    assert json.loads((folder / "samples.json").read_text())["n"] == N
    # what is there is kept, what is missing is drawn again: the same
    for name in ("000260.png", "000299.png"):
        (folder / name).unlink()
    kept = (folder / "000000.png").stat().st_mtime_ns
    drawn = []
    from surflow.evaluation import sampling as module

    plain = module.draw_unit

    def counted(flow, index, *others):
        drawn.append(index)
        return plain(flow, index, *others)

    monkeypatch.setattr(module, "draw_unit", counted)
    assert call("sample", *overrides, f"n={N}", f"out={folder}").code == 0
    assert drawn == [1]
    assert (folder / "000000.png").stat().st_mtime_ns == kept
    again = np.asarray(Image.open(folder / "000299.png")).transpose(2, 0, 1)
    assert np.array_equal(again, samples[299])
    # other settings do not mix with it
    done = call("sample", *overrides, f"n={N}", f"out={folder}", "temperature=0.5")
    assert done.code == 2 and "samples of other settings (temperature 1.0)" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_wrong_places(run, call, tmp_path):
    overrides, _ = run
    done = call("sample", *overrides, "n=3", f"out={tmp_path}/grid.png")
    assert done.code == 2 and "expected an .npz file or a folder" in done.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"")
    done = call("sample", *overrides, "n=3", f"out={tmp_path}/mine")
    assert done.code == 2 and "not a folder of samples" in done.err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["photo.png"]


def test_scores_of_samples_in_the_record(run, call):
    """A complete run gets the scores that it lacks, without training again."""
    overrides, folder = run
    record = json.loads((folder / "record.json").read_text())
    wanted = [
        "measures.samples.n=40",
        "measures.samples.extractor=random_features",
        "measures.samples.temperature=0.9",
    ]
    done = call("train", *overrides, *wanted)
    assert done.code == 0, done.err
    scored = json.loads((folder / "record.json").read_text())
    score = scored["metrics"].pop("sample/fid_random_features")
    assert scored["metrics"] == record["metrics"]
    assert score["kind"] == "score" and score["count"] == 40 and score["value"] > 0
    protocol = score["protocol"]
    assert protocol["temperature"] == 0.9 and protocol["reference"]["splits"] == ["train", "valid"]
    assert protocol["reference"]["images"] == 80
    assert not (folder / "generation.npz").exists()
