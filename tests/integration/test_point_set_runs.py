"""Runs on sets of points: record, pictures, commands, kill and resume."""

import json
import math
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from surflow.config import compose, run_dir
from surflow.data.point_sets import SpatialDigits
from surflow.training.hardware import what_to_compile
from surflow.training.run import Run

SETS = (
    "data=spatial_digits",
    "model=set_flow",
    "model.num_flows=2",
    "model.features=8",
    "model.num_heads=2",
    "model.num_layers=1",
    "data.train_size=256",
    "data.valid_size=64",
    "data.test_size=100",
    "data.batch_size=64",
    "objective.iwbo_samples=3",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=2",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "run.pictures=false",
    "logger=csv",
)


@pytest.fixture
def tiny(root):
    """Overrides of a tiny run on sets, where the other tests of this folder have a plane."""
    return lambda *overrides: [*SETS, f"run.root={root}", *overrides]


@pytest.fixture
def config(tiny):
    return lambda *overrides, name="train": compose(tiny(*overrides), name)


@pytest.mark.parametrize("order", ["sort", "permute"])
def test_a_record_has_scores_a_point_and_pictures(order, train):
    _, folder, metrics = train(f"model.order={order}", "run.pictures=true")
    record = json.loads((folder / "record.json").read_text())
    pairs = {"test/nll_nats": "test/point_log_likelihood_nats"}
    if order == "permute":
        pairs = {"test/elbo_nats": "test/point_elbo_nats", "test/iwbo_nats": "test/point_iwbo_nats"}
    assert set(metrics) == {*pairs, *pairs.values()}
    for whole, point in pairs.items():
        assert metrics[point] == pytest.approx(-metrics[whole] / 16)
        assert record["metrics"][point]["kind"] == ("likelihood" if order == "sort" else "bound")
        assert record["metrics"][point]["count"] == 100
    data = SpatialDigits(name="spatial_digits", event_shape=[16, 2], width=8, test_size=100)
    data.setup()
    assert record["provenance"]["splits"]["test"] == data.provenance()["splits"]["test"]
    assert record["provenance"]["points"] == {"number": 16, "seed": 0, "unit": "pixels"}
    with np.load(folder / "points.npz") as arrays:
        assert arrays["samples"].shape == (64, 16, 2) and np.isfinite(arrays["samples"]).all()
        assert arrays["width"] == 8
        rows = torch.arange(64) * 100 // 64
        assert np.array_equal(arrays["data"], data.splits["test"][rows])
    assert Image.open(folder / "samples.png").size[0] > 300


def test_likelihood_of_a_trained_sort_flow_has_no_order(train):
    cfg, folder, metrics = train("model.order=sort", "model.dropout=0.1")
    run = Run(cfg)
    flow, _ = run.load_flow(folder / "last.ckpt")
    x = run.data.splits["test"]
    with torch.no_grad():
        value = flow.log_prob(x)
        assert torch.equal(flow.log_prob(x[:, torch.randperm(16)]), value)
    assert metrics["test/nll_nats"] == pytest.approx(-value.mean().item(), rel=1e-5)


def test_two_draws_a_set_are_trained_and_validated_on(train, rows):
    _, folder, _ = train("model.order=plackett_luce", "objective.num_samples=2")
    assert {"train/iwbo2_nats", "val/iwbo2_nats"} <= set(rows(folder)[0])


def test_commands_on_a_run(call, train, tiny, root):
    order = "model.order=permute"
    _, folder, metrics = train(order)
    done = call("evaluate", *tiny(order))
    assert done.code == 0, done.err
    assert f"test/point_iwbo_nats = {metrics['test/point_iwbo_nats']:.4f}" in done.out
    done = call("sample", *tiny(order), "n=70", f"out={root / 's.npz'}")
    assert done.code == 0, done.err
    with np.load(root / "s.npz") as arrays:
        assert arrays["samples"].shape == (70, 16, 2)
    assert Image.open(root / "s.png").size[0] > 100
    done = call("sample", *tiny(order), f"out={root / 's.png'}")
    assert done.code == 2 and "out: expected an .npz file" in done.err
    assert folder == run_dir(compose(tiny(order)))


def test_data_command(call, tmp_path):
    picture = tmp_path / "clouds.png"
    done = call("data", "spatial_digits", "data.test_size=10", "--picture", str(picture))
    assert done.code == 0, done.err
    assert "spatial_digits test: 10 rows of 16 x 2, torch.float32" in done.out
    assert done.out.count("sha256") == 3
    assert Image.open(picture).size[0] > 100
    done = call("data", "digits")
    assert done.code == 0 and "digits train: 1,297 rows of 1 x 8 x 8, torch.uint8" in done.out
    for arguments, message in (
        (["spatial_digit"], "data: unknown option 'spatial_digit'; did you mean 'spatial_digits'?"),
        (
            ["spatial_digits", "data.wdth=3"],
            "data.wdth: unknown option of surflow.data.point_sets.SpatialDigits; did you mean "
            "'width'?",
        ),
        (
            ["data=spatial_digits"],
            "expected the name of a dataset first, got 'data=spatial_digits'",
        ),
        (["digits", "--picture", "x.png"], "picture: expected sets of points, got data=digits"),
        (
            ["spatial_mnist", f"data.root={tmp_path}", "data.download=false"],
            "data.root: no file",
        ),
    ):
        done = call("data", *arguments)
        assert done.code == 2
        lines = done.err.strip().splitlines()
        assert lines[-1].startswith(f"surflow: error: {message}"), done.err


def test_nets_and_not_the_loss_are_compiled():
    cfg = compose([*SETS, "compute.compile=auto"])
    assert what_to_compile(cfg.compute, 2) in ("nets", None)  # None: no compiler here
    assert what_to_compile(compose([*SETS]).compute, 2) is None


@pytest.mark.slow
def test_a_compiled_net_gives_the_same(config):
    from surflow.memory import set_memory
    from surflow.training.hardware import can_compile

    if not can_compile():
        pytest.skip("no C++ compiler")
    run = Run(config("model.order=sort", "model.num_flows=1"))
    flow = run.build_flow()
    x = run.data.splits["train"][:32]
    flow.log_prob(x)  # actnorm sets itself
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    value = flow.log_prob(x)
    gradient = torch.autograd.grad(value.mean(), list(flow.parameters()))
    set_memory(flow, "stored", compile_nets=True)
    again = flow.log_prob(x)
    torch.testing.assert_close(again, value, rtol=1e-5, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(again.mean(), list(flow.parameters())), gradient, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_killed_run_resumes_to_the_unbroken_one(
    start, command, tiny, config, tmp_path, weights, rows
):
    """With random orders, dropout and two draws a set: all of it is drawn again alike."""
    from surflow.cli.train import train

    long = (
        "model.order=plackett_luce",
        "model.dropout=0.1",
        "objective.num_samples=2",
        "trainer.max_epochs=40",
    )
    unbroken = config(*long, f"run.root={tmp_path / 'unbroken'}")
    train(unbroken)
    whole, folder = run_dir(unbroken), run_dir(config(*long))
    process = start("train", *tiny(*long))
    deadline = time.monotonic() + 120
    while not (folder / "last.ckpt").is_file() or not later_epoch(folder / "metrics.csv"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "record.json").exists(), "killed too late to show anything"
    done = command("train", *tiny(*long))
    assert done.code == 0, done.err
    assert "resuming after epoch" in done.err
    metrics = [json.loads((f / "record.json").read_text())["metrics"] for f in (folder, whole)]
    assert metrics[0] == metrics[1]
    assert math.isfinite(metrics[0]["test/point_iwbo_nats"]["value"])
    for name, value in weights(folder).items():
        assert torch.equal(value, weights(whole)[name]), name
    assert rows(folder) == rows(whole)


def later_epoch(file) -> bool:
    """Whether a run has logged a line of an epoch behind the first."""
    if not file.is_file():
        return False
    lines = [line.split(",") for line in file.read_text().splitlines()[1:]]
    return any(len(line) > 1 and line[1].isdigit() and int(line[1]) >= 1 for line in lines)
