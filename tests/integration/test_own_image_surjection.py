"""docs/images.md: a surjection between the scales of an image flow, of a user's own: one function
and one YAML."""

import json
from pathlib import Path

import pytest
from pages import Page, run

TINY = (
    "--config-dir conf data=digits surjection=wide_slice data.train_size=64 data.valid_size=32 "
    "data.test_size=32 data.batch_size=32 trainer.max_epochs=1 trainer.accelerator=cpu "
    "compute.compile=false objective.eval_samples=1 objective.iwbo_samples=2 run.pictures=false "
    "measures.samples=null logger=csv"
)
POOL_FLOW = (
    "model=pool_flow model.num_steps=1 model.mid_channels=8 model.depth=1 model.growth=4 "
    "model.dequant_steps=1 model.context_channels=4"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder with the page's two files."""
    return Page("images.md").write(tmp_path_factory.mktemp("own"))


def test_it_trains_and_evaluates(folder):
    done = run("bash", f"python -m surflow.cli.train {TINY} {POOL_FLOW}", folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("runs/**/record.json")
    record = json.loads(path.read_text())
    assert record["surjection"] == "wide_slice"
    layers = [row["layer"] for row in record["ledger"]["rows"]]
    assert any(name.endswith(".Slice") for name in layers)
    done = run("bash", f"python -m surflow.cli.evaluate {TINY} {POOL_FLOW}", folder)
    assert done.returncode == 0, done.stderr
    assert "Slice" in done.stdout
    # an option of the function is a key, and makes another run
    other = f"{TINY} {POOL_FLOW} surjection.scale=1.5"
    done = run("bash", f"python -m surflow.cli.evaluate {other}", folder)
    assert done.returncode == 2
    assert "no such checkpoint" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (f"{POOL_FLOW} surjection.scael=2", "surjection.scael: unknown option of"),
        ("model=glow", "surjection=wide_slice downsamples images, which model=glow does not do"),
        (f"{POOL_FLOW} surjection.factor=3", "expected"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder, changed, message):
    done = run("bash", f"python -m surflow.cli.train {TINY} {changed}", folder)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
