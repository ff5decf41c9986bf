"""An offline wandb run holds what metrics.csv and the record hold; a resumed run continues it."""

import json
import signal
import struct
import time
from collections import defaultdict

import pytest

from surflow.config import config_hash, run_dir
from surflow.training.run import Run

pytest.importorskip("wandb")


def records_of(path):
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes.

    A block has 32 KiB; a record's part has a checksum (4), a length (2) and a kind (1: whole, 2:
    first, 3: middle, 4: last). The files of wandb name no reader that is public.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:  # a block's padding
            place += left
            continue
        if place + 7 + length > len(data):  # cut off by a kill
            return
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


class Logged:
    """What one .wandb file says: the run, its history, its summary."""

    def __init__(self, path):
        self.history, self.summary, self.run = [], {}, None
        for record in records_of(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
            elif kind == "history":
                self.history.append(self.items(record.history.item))
            elif kind == "summary":
                self.summary.update(self.items(record.summary.update))
        self.config = {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in self.run.config.update
        }

    @staticmethod
    def items(items):
        return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}

    def metrics(self):
        """Step, metric, value: as in metrics.csv."""
        table = defaultdict(dict)
        for row in self.history:
            for key in ("train/nll_nats", "val/nll_nats", "lr"):
                if key in row:
                    table[row["trainer/global_step"]][key] = row[key]
        return dict(table)


def from_csv(rows):
    table = defaultdict(dict)
    for row in rows:
        for key in ("train/nll_nats", "val/nll_nats", "lr"):
            if row[key]:
                table[int(row["step"])][key] = pytest.approx(float(row[key]), rel=1e-6)
    return dict(table)


def files_of(folder):
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_offline_run(command, tiny, config, rows):
    arguments = ("logger=wandb", "run.pictures=true", "data=corners", "seed=2", "profile=smoke")
    done = command("train", *tiny(*arguments))
    assert done.code == 0, done.err
    assert "wandb" not in done.err + done.out  # nothing of its own among the lines of a run
    cfg = config(*arguments)
    folder = run_dir(cfg)
    (path,) = files_of(folder)
    logged = Logged(path)
    run = logged.run
    assert run.run_id == f"smoke-adhoc-coupling_flow-{config_hash(cfg)}"
    assert run.display_name == "coupling_flow-corners-seed2"
    assert run.run_group == "adhoc"
    assert run.job_type == "coupling_flow"
    assert set(run.tags) == {"smoke", "corners", "none"}
    assert run.project == "surflow"
    assert logged.config["seed"] == 2
    assert logged.config["optimizer"]["lr"] == 1e-3
    assert logged.config["trainer"]["max_epochs"] == 2
    assert "logger" not in logged.config["trainer"]  # the run's own are no options

    assert logged.metrics() == from_csv(rows(folder))
    assert logged.metrics()  # and not two empty ones
    epochs = {row["trainer/global_step"]: row["epoch"] for row in logged.history if "lr" in row}
    assert epochs == {2: 0, 4: 0, 5: 0, 7: 1, 9: 1, 10: 1}

    record = json.loads((folder / "record.json").read_text())
    value = record["metrics"]["test/nll_nats"]["value"]
    assert logged.summary["test/nll_nats"] == pytest.approx(value, rel=1e-9)
    floor = record["floor"]["test/nll_nats"]["value"]
    assert logged.summary["floor/test/nll_nats"] == pytest.approx(floor, rel=1e-9)
    last = {key: value for row in logged.history for key, value in row.items()}
    for name in ("figures/density", "figures/samples"):
        assert last[f"{name}/_type"] == "image-file"
        image = path.parent / "files" / last[f"{name}/path"]
        assert image.read_bytes().startswith(b"\x89PNG")
    table = json.loads((path.parent / "files" / last["test/ledger/path"]).read_text())
    assert [row[0] for row in table["data"]] == [row["layer"] for row in record["ledger"]["rows"]]
    assert sum(row[3] for row in table["data"]) == pytest.approx(-value, abs=1e-6)


def test_two_folders_are_two_runs(config):
    """Rows that compute the same share the hash, and neither folder nor id."""
    runs = [Run(config("logger=wandb", f"row={row}")) for row in ("one", "two/three")]
    assert runs[0].hash == runs[1].hash and runs[0].folder != runs[1].folder
    ids = [run.loggers[0].version for run in runs]
    assert ids == [f"free-adhoc-{row}-{runs[0].hash}" for row in ("one", "two-three")]


def test_a_name_longer_than_a_tag_may_be_is_cut_there(config):
    run = Run(config("logger=wandb", f"data.name={85 * 'x'}", "data.dataset=checkerboard"))
    assert run.loggers[0]._wandb_init["tags"] == ["free", 64 * "x", "none"]


def test_images_can_be_left_out(command, tiny, config):
    arguments = ("logger=wandb", "logger.wandb.images=false", "run.pictures=true")
    done = command("train", *tiny(*arguments))
    assert done.code == 0, done.err
    (path,) = files_of(run_dir(config(*arguments)))
    keys = {key for row in Logged(path).history for key in row}
    assert "test/ledger/path" in keys
    assert not any(key.startswith("figures/") for key in keys)


def test_resumed_run_continues_the_same_one(start, command, tiny, config, rows):
    arguments = ("logger=wandb", "trainer.max_epochs=30", "data.batch_size=16")
    folder = run_dir(config(*arguments))
    process = start("train", *tiny(*arguments))
    deadline = time.monotonic() + 240
    while not (folder / "last.ckpt").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # wandb writes late: killed at once it would keep nothing
    process.communicate(timeout=60)
    assert not (folder / "record.json").exists()
    done = command("train", *tiny(*arguments))
    assert done.code == 0, done.err
    assert "resuming after epoch" in done.err
    first, second = (Logged(path) for path in files_of(folder))
    assert first.run.run_id == second.run.run_id
    assert first.run.display_name == second.run.display_name
    wanted = from_csv(rows(folder))
    together = {**first.metrics(), **second.metrics()}
    assert together == wanted
    assert min(second.metrics()) > 40  # after the first epoch: it did go on
    assert "test/nll_nats" in second.summary


def test_scores_added_later_reach_the_summary(command, tmp_path):
    arguments = (
        *("data=digits", "model=pool_flow", "surjection=slice", "logger=wandb"),
        *("model.num_scales=1", "model.num_steps=1", "model.mid_channels=4", "model.depth=1"),
        *("model.growth=4", "model.dequant_steps=1", "model.context_channels=2"),
        *("data.train_size=64", "data.valid_size=16", "data.test_size=24"),
        *("trainer.max_epochs=1", "trainer.accelerator=cpu", "compute.compile=false"),
        *("run.pictures=false", f"run.root={tmp_path}/runs"),
    )
    first = command("train", *arguments)
    assert first.code == 0, first.err
    assert "pool_flow-slice digits seed 0  epoch 1/1" in first.err
    done = command(
        "train", *arguments, "measures.samples.n=16", "measures.samples.extractor=random_features"
    )
    assert done.code == 0, done.err
    (record,) = tmp_path.rglob("record.json")
    metrics = json.loads(record.read_text())["metrics"]
    runs = [Logged(path) for path in files_of(record.parent)]
    assert len({run.run.run_id for run in runs}) == 1 and len(runs) == 2
    assert {run.run.job_type for run in runs} == {"pool_flow-slice"}
    (found,) = [r.summary for r in runs if "sample/fid_random_features" in r.summary]
    for name in ("test/elbo_bpd", "sample/fid_random_features"):
        assert found[name] == pytest.approx(metrics[name]["value"], rel=1e-9)


def test_evaluation_is_added_to_the_run(command, tiny, config):
    arguments = tiny("logger=wandb")
    cfg = config("logger=wandb")
    folder = run_dir(cfg)
    assert command("train", *arguments).code == 0
    done = command("evaluate", *arguments, "split=valid")
    assert done.code == 0, done.err
    runs = [Logged(path) for path in files_of(folder)]
    assert len(runs) == 2
    assert {r.run.run_id for r in runs} == {f"free-adhoc-coupling_flow-{config_hash(cfg)}"}
    written = json.loads((folder / "evaluation_valid.json").read_text())
    value = written["metrics"]["valid/nll_nats"]["value"]
    done = command("evaluate", *arguments, f"checkpoint={folder / 'best.ckpt'}")
    assert done.code == 0, done.err
    last = Logged(files_of(folder)[-1])
    assert "evaluate/test/nll_nats" in last.summary  # not in the place of the run's own score
    assert "test/nll_nats" not in last.summary
    assert any(r.summary.get("valid/nll_nats") == pytest.approx(value) for r in runs)
