"""The command interpolate, and RealNVP and Glow through the pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

from surflow.cli.train import train
from surflow.config import compose, config_hash, run_dir
from surflow.evaluation.pictures import interpolation_figure
from surflow.training.run import Run

GLOW = ("model=glow", "model.num_scales=2", "model.num_steps=1", "model.hidden_channels=8")
REALNVP = ("model=realnvp", "model.mid_channels=4", "model.num_blocks=1")
TINY = (
    "data=photo_patches",
    "data.train_size=64",
    "data.valid_size=8",
    "data.test_size=8",
    "data.batch_size=16",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "run.pictures=false",
    "logger=csv",
)


@pytest.fixture(scope="module", params=[GLOW, REALNVP], ids=["glow", "realnvp"])
def trained(request, tmp_path_factory):
    """The overrides of a run, trained."""
    overrides = [*request.param, *TINY, f"run.root={tmp_path_factory.mktemp('runs')}"]
    metrics = train(compose(overrides))
    return overrides, metrics


def cells(path, columns, scale=2, gap=2, side=32):
    """The images of a grid, (rows, columns, H, W, C)."""
    sheet = np.asarray(Image.open(path))
    step = side * scale + gap
    rows = (sheet.shape[0] - gap) // step
    assert (sheet.shape[1] - gap) == columns * step
    return np.stack(
        [
            [
                sheet[r * step + gap :, c * step + gap :][
                    : side * scale : scale, : side * scale : scale
                ]
                for c in range(columns)
            ]
            for r in range(rows)
        ]
    )


def test_row_trains_and_is_scored(trained):
    _, metrics = trained
    # 8 bits and little more or less after 4 steps
    assert 4 < metrics["test/elbo_bpd"] < 10


def test_picture_begins_and_ends_with_test_images(trained, call, tmp_path):
    overrides, _ = trained
    out = tmp_path / "way.png"
    done = call("interpolate", *overrides, "pairs=3", "steps=4", f"out={out}")
    assert done.code == 0, done.err
    assert "images on the spherical way" in done.out
    grid = cells(out, columns=4)
    assert grid.shape == (3, 4, 32, 32, 3)
    run = Run(compose(overrides))
    flow, data = run.load_flow()[0], run.data
    test = {image.tobytes() for image in data.splits["test"].permute(0, 2, 3, 1).byte().numpy()}
    for row in grid:
        assert row[0].tobytes() in test and row[-1].tobytes() in test
        assert row[0].tobytes() != row[-1].tobytes()
        assert row[1].tobytes() not in test and row[2].tobytes() not in test
    # the command and the function draw the same; another path and other images are others
    same = interpolation_figure(flow, data, tmp_path, pairs=3, steps=4, name="again.png")
    assert same.read_bytes() == out.read_bytes()
    line = interpolation_figure(flow, data, tmp_path, 3, 4, "linear", name="line.png")
    straight = cells(line, columns=4)
    assert np.array_equal(straight[:, [0, -1]], grid[:, [0, -1]])
    assert not np.array_equal(straight, grid)
    other = interpolation_figure(flow, data, tmp_path, 3, 4, seed=1, name="other.png")
    assert not np.array_equal(cells(other, columns=4), grid)
    # no more rows than there are pairs of test images
    assert len(cells(interpolation_figure(flow, data, tmp_path / "new", 50, 2), 2)) == 4


def test_picture_goes_into_the_run_folder(trained, call):
    overrides, _ = trained
    done = call("interpolate", *overrides, "pairs=1", "steps=2", "path=linear")
    assert done.code == 0, done.err
    file = run_dir(compose(overrides)) / "interpolation.png"
    assert cells(file, columns=2).shape[0] == 1


def test_own_keys_are_not_of_the_run():
    overrides = [*GLOW, *TINY]
    digest = config_hash(compose(overrides))
    for extra in ([], ["pairs=2", "steps=3", "path=linear"]):
        assert config_hash(compose([*overrides, *extra], "interpolate")) == digest


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["pairs=0"], "pairs: expected a whole number >= 1, got 0"),
        (["steps=1"], "steps: expected a whole number >= 2, got 1"),
        (["path=linaer"], "path: expected one of spherical, linear, got 'linaer'; did you mean"),
        (["out=way.jpg"], "out: expected a .png file, got way.jpg"),
        ([], "last.ckpt"),
    ],
)
def test_mistakes_take_one_line(extra, message, call, tmp_path):
    done = call("interpolate", *GLOW, *TINY, f"run.root={tmp_path}", *extra)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_vectors_have_no_picture(call, tmp_path):
    done = call("interpolate", "data=corners", f"run.root={tmp_path}")
    assert done.code == 2
    assert "interpolate: pictures are of images, not of data=corners" in done.err


def test_weights_survive_saving(trained):
    """Both models' state holds all that evaluation needs: two loads, one number."""
    overrides, _ = trained
    run = Run(compose(overrides))
    values = []
    for _ in range(2):
        flow, _ = run.load_flow()
        torch.manual_seed(0)
        with torch.no_grad():
            values.append(flow.log_prob(run.data.splits["test"][:4]))
    assert torch.equal(*values)
