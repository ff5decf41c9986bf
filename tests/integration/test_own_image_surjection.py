"""A surjection between the scales of an image flow, of a user's own: one function and one YAML."""

import json
from pathlib import Path

import pytest
from pages import run

FUNCTION = '''\
from torch import nn

from surflow.distributions import DiagonalNormal
from surflow.models.downsampling import downsampling
from surflow.transforms import Slice, Squeeze


@downsampling
def wide_slice(shape, factor=2, scale=1.0):
    """A squeeze, of whose channels all but the first C go to a normal of one scale."""
    c, h, w = shape
    rest = ((factor**2 - 1) * c, h // factor, w // factor)
    return [Squeeze(factor), Slice(DiagonalNormal(rest, scale=scale), keep=c)]
'''
YAML = """\
name: wide_slice
_target_: own_layers.wide_slice
_partial_: true
scale: 2.0
"""
TINY = (
    "--config-dir conf data=digits surjection=wide_slice data.train_size=64 data.valid_size=32 "
    "data.test_size=32 data.batch_size=32 model.num_steps=1 model.mid_channels=8 model.depth=1 "
    "model.growth=4 model.dequant_steps=1 model.context_channels=4 trainer.max_epochs=1 "
    "trainer.accelerator=cpu compute.compile=false objective.eval_samples=1 "
    "objective.iwbo_samples=2 run.pictures=false measures.samples=null logger=csv"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder with the two files."""
    place = tmp_path_factory.mktemp("own")
    (place / "own_layers.py").write_text(FUNCTION)
    (place / "conf/surjection").mkdir(parents=True)
    (place / "conf/surjection/wide_slice.yaml").write_text(YAML)
    return place


def test_it_trains_and_evaluates(folder):
    done = run("bash", f"python -m surflow.cli.train {TINY} model=pool_flow", folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("runs/**/record.json")
    record = json.loads(path.read_text())
    assert record["surjection"] == "wide_slice"
    layers = [row["layer"] for row in record["ledger"]["rows"]]
    assert any(name.endswith(".Slice") for name in layers)
    done = run("bash", f"python -m surflow.cli.evaluate {TINY} model=pool_flow", folder)
    assert done.returncode == 0, done.stderr
    assert "Slice" in done.stdout
    # an option of the function is a key, and makes another run
    done = run("bash", f"python -m surflow.cli.evaluate {TINY} model=pool_flow "
               "surjection.scale=1.5", folder)  # fmt: skip
    assert done.returncode == 2 and "no such file" in done.stderr.lower()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("model=pool_flow surjection.scael=2", "surjection.scael: unknown option of"),
        ("model=glow", "surjection=wide_slice downsamples images, which model=glow does not do"),
        ("model=pool_flow surjection.factor=3", "expected"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder, changed, message):
    done = run("bash", f"python -m surflow.cli.train {TINY} {changed}", folder)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
