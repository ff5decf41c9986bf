"""A run of the earlier config layout is found again after ``experiments/move_runs.py``."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from surflow.config import compose
from surflow.record import load_record
from surflow.training.run import Run

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("move_runs", ROOT / "experiments/move_runs.py")
move_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(move_runs)

RECORD = ROOT / "tests" / "fixtures" / "former_run.json"


@pytest.fixture
def move(monkeypatch, capfd):
    """The script in this process."""

    def run(root: Path) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["move_runs.py", str(root)])
        capfd.readouterr()
        code = 0
        try:
            move_runs.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def present(tmp_path):
    """The run in the present layout; nothing of it is on the disk."""
    chosen = ["experiment=synthetic/flow", "data=corners", "profile=paper", "seed=0"]
    return Run(compose([*chosen, "logger=csv", f"run.root={tmp_path / 'runs'}"]))


@pytest.fixture
def earlier(present):
    """Its folder as the earlier layout left it: the record, and a checkpoint."""
    record = json.loads(RECORD.read_text())
    former = record.pop("former_hash")
    record["config_hash"] = former
    folder = present.folder.with_name(f"seed0-{former[:8]}")
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))
    state = {f"flow.{k}": v for k, v in present.build_flow().state_dict().items()}
    torch.save({"surflow": {"config_hash": former}, "state_dict": state}, folder / "last.ckpt")
    return folder


def test_a_moved_run_is_found(call, move, present, earlier, tmp_path):
    before = json.loads((earlier / "record.json").read_text())
    assert present.complete_record() is None
    done = move(tmp_path / "runs")
    assert done.code == 0, done.err
    assert "1 of 1 records moved" in done.out
    assert not earlier.exists()

    after = json.loads((present.folder / "record.json").read_text())
    assert after.pop("former_hash") == before["config_hash"]
    assert after.pop("config_hash") == present.hash != before.pop("config_hash")
    assert after == before  # its numbers and its config as it was

    overrides = ["experiment=synthetic/flow", "data=corners", "logger=csv"]
    done = call("train", *overrides, f"run.root={tmp_path / 'runs'}")
    assert done.code == 0, done.err
    assert "already complete" in done.out
    assert f"test/nll_nats {before['metrics']['test/nll_nats']['value']:.4f}" in done.out

    flow, path = present.load_flow()
    assert path == present.folder / "last.ckpt"
    torch.manual_seed(0)
    initial = present.build_flow().state_dict()
    assert all(torch.equal(v.cpu(), initial[k]) for k, v in flow.state_dict().items())

    assert "0 of 1 records moved" in move(tmp_path / "runs").out


def test_a_record_that_is_a_copy_keeps_its_place(earlier, tmp_path, present):
    copy = tmp_path / "records" / "flow-corners-seed0.json"
    copy.parent.mkdir()
    copy.write_text((earlier / "record.json").read_text())
    assert move_runs.move_record(copy)
    record = load_record(copy)
    assert record.config_hash == present.hash
    assert earlier.name == f"seed0-{record.former_hash[:8]}"
    assert not move_runs.move_record(copy)


def test_a_run_is_not_moved_over_another(move, present, earlier, tmp_path):
    present.folder.mkdir()
    before = {p.name: p.read_bytes() for p in earlier.iterdir()}
    done = move(tmp_path / "runs")
    assert done.code == 2
    assert "is there already; move or delete it first" in done.err
    assert {p.name: p.read_bytes() for p in earlier.iterdir()} == before


def test_a_free_run_is_filed_under_free(move, call, tmp_path):
    """One that was filed under the published protocol, without its surjection in the name."""
    overrides = ["surjection=abs", "logger=csv", f"run.root={tmp_path / 'runs'}"]
    run = Run(compose(overrides))
    record = json.loads(RECORD.read_text())
    record |= {"artefact": "adhoc", "row": "coupling_flow", "model": "coupling_flow"}
    record |= {"surjection": "abs", "config_hash": run.hash}
    record["config"]["row"] = "coupling_flow"
    earlier = tmp_path / "runs/paper/adhoc/coupling_flow/checkerboard" / run.folder.name
    earlier.mkdir(parents=True)
    (earlier / "record.json").write_text(json.dumps(record))
    assert "1 runs filed under free" in move(tmp_path / "runs").out
    assert run.folder.parts[-5:-1] == ("free", "adhoc", "coupling_flow-abs", "checkerboard")
    assert not earlier.exists()
    found = run.complete_record()
    assert (found.profile, found.row) == ("free", "coupling_flow-abs")
    assert found.metrics["test/nll_nats"].value == record["metrics"]["test/nll_nats"]["value"]
    assert "0 runs filed under free" in move(tmp_path / "runs").out


def test_a_root_that_is_no_folder(move, tmp_path):
    done = move(tmp_path / "nothing")
    assert done.code == 2
    assert done.err == f"surflow: error: root: expected a folder, got {tmp_path / 'nothing'}\n"
