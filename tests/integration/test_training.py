"""Training: seeds, resuming, averaging, precision, processes, compilation, a loss that breaks."""

import json
import math
import signal
import time

import numpy as np
import pytest
import torch

from surflow.config import config_hash, run_dir
from surflow.data.batches import TensorBatches
from surflow.errors import UserError
from surflow.training.callbacks import Elapsed
from surflow.training.run import Run

LONG = ("trainer.max_epochs=8", "data.batch_size=16", "trainer.log_every_n_steps=7")


def assert_same_weights(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


# Seeds, reuse


def test_same_seed_same_run(config, tmp_path, weights, rows):
    from surflow.cli.train import train

    folders = []
    for name in ("a", "b"):
        cfg = config(f"run.root={tmp_path / name}")
        train(cfg)
        folders.append(run_dir(cfg))
    one, other = (json.loads((f / "record.json").read_text()) for f in folders)
    assert one["metrics"] == other["metrics"]
    assert one["ledger"] == other["ledger"]
    assert_same_weights(weights(folders[0]), weights(folders[1]))
    assert rows(folders[0]) == rows(folders[1])


def test_other_seed_other_run(train):
    _, one, a = train("seed=0")
    _, other, b = train("seed=1")
    assert one != other
    assert a["test/nll_nats"] != b["test/nll_nats"]


def test_record_and_rows(train, rows):
    cfg, folder, metrics = train()
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "complete"
    assert record["config_hash"] == config_hash(cfg)
    assert record["metrics"]["test/nll_nats"]["value"] == metrics["test/nll_nats"]
    assert record["metrics"]["test/nll_nats"]["count"] == 500
    assert record["metrics"]["test/nll_nats"]["kind"] == "likelihood"
    flow = Run(cfg).build_flow()
    assert record["parameters"] == sum(p.numel() for p in flow.parameters())
    table = rows(folder)
    assert [(int(r["step"]), int(r["epoch"])) for r in table if r["val/nll_nats"]] == [
        (5, 0),
        (10, 1),
    ]
    # every second step, and what is left at the end of an epoch of five
    assert [int(r["step"]) for r in table if r["train/nll_nats"]] == [2, 4, 5, 7, 9, 10]
    assert {float(r["lr"]) for r in table if r["lr"]} == {1e-3}
    assert not list(folder.glob(".*.tmp"))


def test_scores_a_point_and_what_they_exceed(train):
    """The checkerboard's density is 1/32 on its squares: the entropy of every draw is log 32."""
    _, folder, metrics = train()
    with np.load(folder / "scores.npz") as file:
        scores = {name: file[name] for name in file.files}
    assert list(scores) == ["test/nll_nats"]
    assert scores["test/nll_nats"].dtype == np.float32 and len(scores["test/nll_nats"]) == 500
    assert scores["test/nll_nats"].mean() == pytest.approx(metrics["test/nll_nats"], abs=1e-5)
    excess = metrics["test/nll_nats"] - math.log(32)
    assert metrics["test/excess_nats"] == pytest.approx(excess, abs=1e-6)


def test_the_logged_gradient_norm_is_the_largest_since_the_last_line(config, rows):
    """Against autograd, step by step, with the same optimizer; the clipping comes after it."""
    from surflow.cli.train import train

    watched = ("callbacks=gradient_norm", "trainer.gradient_clip_val=0.5", "trainer.max_epochs=1")
    cfg = config(*watched, "data.train_size=512")
    train(cfg)
    run = Run(cfg)
    flow = run.build_flow()
    how = {"seed": 0, "epoch": lambda: 0, "drop_last": True, "rank": 0, "world_size": 1}
    data = run.data.batches("train", 128, **how)
    adam = torch.optim.Adam(flow.parameters(), lr=1e-3)
    norms = []
    for x in data:
        adam.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        norms.append(sum(p.grad.square().sum() for p in flow.parameters()).sqrt().item())
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.5)
        adam.step()
    logged = [row["train/gradient_norm_max"] for row in rows(run_dir(cfg))]
    found = [float(value) for value in logged if value]
    assert found == pytest.approx([norms[0], max(norms[1:3])], rel=1e-4)
    assert min(found) > 0.5 and norms[1] > norms[2]


def test_a_free_run_says_what_it_is_and_claims_no_protocol(train, root):
    _, folder, _ = train("surjection=abs", "model=spline_flow", "data=corners")
    row = folder.relative_to(root).parts[:4]
    assert row == ("free", "adhoc", "spline_flow-abs", "corners")
    record = json.loads((folder / "record.json").read_text())
    assert (record["profile"], record["row"]) == ("free", "spline_flow-abs")


def test_last_checkpoint_is_the_last_epoch_also_where_it_is_not_the_best(train):
    from surflow.training.checkpoint import load_checkpoint

    # a rate at which the validation loss jumps about
    _, folder, _ = train("trainer.max_epochs=6", "optimizer.lr=0.3", "seed=3")
    last, best = load_checkpoint(folder / "last.ckpt"), load_checkpoint(folder / "best.ckpt")
    assert last["epoch"] == 5
    assert last["global_step"] == 30
    assert best["epoch"] < 5  # else this test shows nothing


def test_complete_run_is_reused_and_force_repeats(call, tiny, config):
    folder = run_dir(config())
    assert call("train", *tiny()).code == 0
    record, checkpoint = folder / "record.json", folder / "last.ckpt"
    before = record.stat().st_mtime_ns, checkpoint.stat().st_mtime_ns
    again = call("train", *tiny())
    assert again.code == 0
    assert "already complete" in again.out
    assert (record.stat().st_mtime_ns, checkpoint.stat().st_mtime_ns) == before
    metrics = json.loads(record.read_text())["metrics"]
    forced = call("train", *tiny("run.force=true"))
    assert forced.code == 0
    assert "already complete" not in forced.out
    assert "resuming" not in forced.err
    assert record.stat().st_mtime_ns > before[0]
    assert checkpoint.stat().st_mtime_ns > before[1]
    assert json.loads(record.read_text())["metrics"] == metrics


# Resuming


def kill_in_mid_run(process, folder):
    """SIGKILL once a checkpoint is there and the metrics have reached a later epoch."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (folder / "last.ckpt").is_file() and (folder / "metrics.csv").is_file():
            lines = (folder / "metrics.csv").read_text().splitlines()[1:]
            if any(line.count(",") == 4 and int(line.split(",")[1] or 0) >= 1 for line in lines):
                process.send_signal(signal.SIGKILL)
                process.communicate()
                assert not (folder / "record.json").exists(), "killed too late to show anything"
                return
        time.sleep(0.01)
    raise AssertionError("no checkpoint after two minutes")


@pytest.mark.parametrize(
    "extra",
    [
        (),
        (
            "callbacks=ema",
            "callbacks.ema.decay=0.99",
            "schedule=cosine",
            "schedule.warmup_steps=10",
            "trainer.accumulate_grad_batches=2",
            "optimizer=adamw",
        ),
    ],
    ids=["plain", "ema-cosine-accumulation"],
)
def test_killed_run_resumes_to_the_unbroken_one(
    extra, start, command, tiny, config, tmp_path, weights, rows
):
    from surflow.cli.train import train

    unbroken = config(*LONG, *extra, f"run.root={tmp_path / 'unbroken'}")
    train(unbroken)
    broken = tiny(*LONG, *extra)
    folder, whole = run_dir(config(*LONG, *extra)), run_dir(unbroken)
    kill_in_mid_run(start("train", *broken), folder)
    done = command("train", *broken)
    assert done.code == 0, done.err
    assert "resuming after epoch" in done.err
    metrics = [json.loads((f / "record.json").read_text())["metrics"] for f in (folder, whole)]
    assert metrics[0] == metrics[1]
    assert_same_weights(weights(folder), weights(whole))
    assert_same_weights(weights(folder, "best.ckpt"), weights(whole, "best.ckpt"))
    assert rows(folder) == rows(whole)


@pytest.mark.parametrize(
    "extra", [(), ("callbacks=ema", "callbacks.ema.decay=0.9")], ids=["plain", "ema"]
)
def test_run_that_stopped_before_its_record(extra, train):
    """Nothing is left to train; what is scored is the same."""
    _, folder, metrics = train(*extra)
    (folder / "record.json").unlink()
    _, _, again = train(*extra)
    assert again == metrics


def test_times_of_a_resumed_run_add_up(train, call, tiny):
    """The seconds in the checkpoint, and those of the process that goes on."""
    _, folder, _ = train()
    record = json.loads((folder / "record.json").read_text())
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    taken = checkpoint["callbacks"]["Elapsed"]
    assert 0 < taken["train_s"] <= record["train_time_s"] + 0.01
    assert taken["train_s"] <= taken["wall_s"] <= record["wall_time_s"] + 0.01
    taken |= {"train_s": 5000.0, "wall_s": 6000.0}
    torch.save(checkpoint, folder / "last.ckpt")
    (folder / "record.json").unlink()
    assert call("train", *tiny()).code == 0
    again = json.loads((folder / "record.json").read_text())
    assert again["metrics"] == record["metrics"]
    assert 5000 <= again["train_time_s"] < 5100
    assert 6000 <= again["wall_time_s"] < 6100


def test_a_stopwatch_goes_on_where_it_was():
    now = [4.0]
    watch = Elapsed(clock=lambda: now[0])
    now[0] = 10.0
    watch.setup(None, None, "fit")
    now[0] = 13.0
    kept = watch.state_dict()
    assert kept == {"train_s": 3.0, "wall_s": 9.0}
    now[0] = 98.0
    later = Elapsed(clock=lambda: now[0])
    now[0] = 100.0
    later.setup(None, None, "fit")
    later.load_state_dict(kept)
    now[0] = 101.0
    assert (later.train, later.wall, later.wall_before) == (4.0, 12.0, 9.0)
    later.teardown(None, None, "fit")
    now[0] = 105.0  # scores and pictures
    assert (later.train, later.wall) == (4.0, 16.0)


def test_interrupted_run_says_how_to_go_on(start, tiny, config):
    arguments = tiny(*LONG, "trainer.max_epochs=200")
    folder = run_dir(config(*LONG, "trainer.max_epochs=200"))
    process = start("train", *arguments)
    deadline = time.monotonic() + 240
    while not (folder / "last.ckpt").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last == "surflow: error: interrupted; give the same command again to resume"
    assert "Traceback" not in err


# What a step is


def test_accumulation_is_a_larger_batch(train, rows, weights):
    _, one, a = train("data.batch_size=128", "trainer.log_every_n_steps=1")
    _, two, b = train(
        "data.batch_size=64", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=2"
    )
    assert one != two
    first, second = rows(one), rows(two)
    assert len(first) == len(second) == 12
    for x, y in zip(first, second, strict=True):
        assert (x["step"], x["epoch"], x["lr"]) == (y["step"], y["epoch"], y["lr"])
        for key in ("train/nll_nats", "val/nll_nats"):
            assert bool(x[key]) == bool(y[key])
            if x[key]:
                assert float(x[key]) == pytest.approx(float(y[key]), abs=2e-5)
    assert_same_weights(weights(one), weights(two), tolerance=2e-5)
    assert a["test/nll_nats"] == pytest.approx(b["test/nll_nats"], abs=2e-5)


def test_schedule_moves_the_rate(train, rows):
    _, folder, _ = train(
        "schedule=cosine", "schedule.warmup_steps=4", "trainer.log_every_n_steps=1"
    )
    got = [float(r["lr"]) for r in rows(folder) if r["lr"]]
    wanted = [
        1e-3 * min(1, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / 10))
        for step in range(10)
    ]
    assert got == pytest.approx(wanted, rel=1e-6)


def test_average_is_what_is_scored(train, config, weights):
    decay = 0.8
    _, plain, raw_metrics = train("trainer.log_every_n_steps=1")
    steps = []
    from surflow.training.module import FlowModule

    original = FlowModule.on_train_batch_end if "on_train_batch_end" in vars(FlowModule) else None

    def remember(self, *_):
        steps.append({k: v.detach().clone() for k, v in self.flow.state_dict().items()})

    FlowModule.on_train_batch_end = remember
    try:
        cfg, folder, metrics = train("callbacks=ema", f"callbacks.ema.decay={decay}")
    finally:
        if original is None:
            del FlowModule.on_train_batch_end
        else:
            FlowModule.on_train_batch_end = original
    assert len(steps) == 10
    assert_same_weights(steps[-1], weights(plain))  # the average does not touch the training
    average = dict(steps[0])
    for state in steps[1:]:
        for name, value in state.items():
            average[name] = decay * average[name] + (1 - decay) * value
    assert_same_weights(weights(folder), average, tolerance=1e-6)
    run = Run(cfg)
    flow = run.build_flow()
    flow.load_state_dict(average)
    with torch.no_grad():
        nll = -flow.log_prob(run.data.splits["test"]).double().mean().item()
    assert metrics["test/nll_nats"] == pytest.approx(nll, abs=1e-5)
    assert abs(metrics["test/nll_nats"] - raw_metrics["test/nll_nats"]) > 1e-4


def test_bfloat16_keeps_contributions_in_float32(train):
    from torch.nn.modules.module import register_module_forward_hook

    seen: dict[str, set] = {}

    def note(module, _, output):
        outputs = output if isinstance(output, tuple) else (output,)
        seen.setdefault(type(module).__name__, set()).add(tuple(o.dtype for o in outputs))

    handle = register_module_forward_hook(note)
    try:
        _, _, metrics = train(
            "trainer.precision=bf16-mixed",
            "surjection=learned_abs",
            "model.support=real_line",
            "optimizer.lr=0.01",
            "trainer.max_epochs=3",
        )
    finally:
        handle.remove()
    assert (torch.bfloat16,) in seen["Linear"]  # the nets run in half the bits
    for name in ("AbsInference", "BoxToReal", "Coupling"):
        assert seen[name] == {(torch.float32, torch.float32)}, name
    assert math.isfinite(metrics["test/nll_nats"])


def test_float64(train, config, weights):
    from surflow.cli.evaluate import evaluate_run

    double = ("trainer.precision=64-true", "run.pictures=true")
    _, folder, metrics = train(*double)
    floating = {v.dtype for v in weights(folder).values() if v.is_floating_point()}
    assert floating == {torch.float64}
    assert evaluate_run(config(*double, name="evaluate")) == metrics
    _, _, single = train()
    assert metrics["test/nll_nats"] == pytest.approx(single["test/nll_nats"], abs=1e-3)


# Several processes


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("size", "batch", "drop"), [(640, 120, True), (640, 120, False), (241, 120, False)]
)
def test_processes_share_every_batch(count, size, batch, drop):
    data = torch.arange(size)
    epochs = dict(seed=3, epoch=lambda: 5) if drop else {}
    whole = list(TensorBatches(data, batch, drop_last=drop, **epochs))
    shares = [
        list(TensorBatches(data, batch, drop_last=drop, rank=r, world_size=count, **epochs))
        for r in range(count)
    ]
    lengths = {len(share) for share in shares}
    assert len(lengths) == 1, "a process with fewer batches leaves the others waiting"
    if drop:
        for i, rows in enumerate(whole):
            assert torch.equal(torch.cat([share[i] for share in shares]), rows)
            assert {len(share[i]) for share in shares} == {batch // count}
    everything = torch.cat([rows for share in shares for rows in share])
    assert torch.equal(everything.sort().values, torch.cat(whole).sort().values)


def test_processes_need_rows_and_a_batch_that_divides():
    with pytest.raises(ValueError, match="a multiple of the 3 processes, got 128"):
        TensorBatches(torch.arange(500), 128, world_size=3)
    with pytest.raises(ValueError, match="a row for each of the 4 processes, got 2"):
        TensorBatches(torch.arange(2), 4, world_size=4)


def test_two_processes_train_what_one_does(command, tiny, config, train, tmp_path, weights, rows):
    extra = ("model.actnorm=true", "trainer.max_epochs=3")
    ddp = (*extra, "trainer.strategy=ddp", "trainer.devices=2", f"run.root={tmp_path / 'ddp'}")
    _, single, metrics = train(*extra)
    done = command("train", *tiny(*ddp))
    assert done.code == 0, done.err
    folder = run_dir(config(*ddp))
    assert folder.name == single.name
    assert_same_weights(weights(folder), weights(single), tolerance=1e-5)
    record = json.loads((folder / "record.json").read_text())
    value = record["metrics"]["test/nll_nats"]["value"]
    assert value == pytest.approx(metrics["test/nll_nats"], abs=1e-5)
    first, second = rows(folder), rows(single)
    assert len(first) == len(second)
    for x, y in zip(first, second, strict=True):
        assert (x["step"], x["epoch"]) == (y["step"], y["epoch"])
        for key in ("train/nll_nats", "val/nll_nats"):
            assert bool(x[key]) == bool(y[key])
            if x[key]:
                assert float(x[key]) == pytest.approx(float(y[key]), abs=1e-5)
    assert done.out.count("test/nll_nats") == 1  # one of the two reports


# Compilation


@pytest.mark.slow
def test_compiled_agrees_with_eager(config, tmp_path, weights):
    from surflow.cli.train import train
    from surflow.training.hardware import can_compile

    if not can_compile():
        pytest.skip("no C++ compiler")
    got = {}
    for value in ("true", "false"):
        cfg = config(
            f"compute.compile={value}",
            f"run.root={tmp_path / value}",
            "surjection=abs",
            "model.support=real_line",
        )
        got[value] = train(cfg)["test/nll_nats"], weights(run_dir(cfg))
    assert got["true"][0] == pytest.approx(got["false"][0], abs=1e-4)
    assert_same_weights(got["true"][1], got["false"][1], tolerance=1e-4)


# A loss that breaks


def test_loss_that_is_not_finite_stops_the_run(call, tiny, root):
    done = call("train", *tiny("optimizer.lr=1e6"))
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("surflow: error: the loss is not finite at epoch 1, step ")
    assert "first layer that is not finite: " in last
    assert "Coupling" in last
    assert "smaller optimizer.lr" in last
    assert not list(root.rglob("record.json"))
    assert not list(root.rglob(".*.tmp"))


def test_loss_that_breaks_later_keeps_the_last_good_checkpoint(
    train, config, monkeypatch, tmp_path, weights
):
    from surflow.cli.train import train as train_run
    from surflow.training.checkpoint import load_checkpoint
    from surflow.training.module import FlowModule

    before = FlowModule.on_train_epoch_start

    def poison(self):
        before(self)
        if self.current_epoch == 2:
            with torch.no_grad():
                next(self.flow.transforms[2].parameters()).fill_(math.nan)

    cfg = config("trainer.max_epochs=4")
    folder = run_dir(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(FlowModule, "on_train_epoch_start", poison)
        with pytest.raises(UserError) as caught:
            train_run(cfg)
    text = str(caught.value)
    assert "at epoch 3, step 1;" in text
    assert "first layer that is not finite: 2.Coupling" in text
    assert "the checkpoint of epoch 2 is kept" in text
    assert not (folder / "record.json").exists()
    kept = load_checkpoint(folder / "last.ckpt")
    assert kept["epoch"] == 1
    assert all(v.isfinite().all() for v in weights(folder).values())
    # without the fault the same command goes on from there, to what an unbroken run gives
    resumed = train_run(cfg)
    whole = train_run(config("trainer.max_epochs=4", f"run.root={tmp_path / 'whole'}"))
    assert resumed == whole
