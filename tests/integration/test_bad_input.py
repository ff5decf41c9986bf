"""A mistake gives one line that says what is wrong and what would be right; nothing is trained."""

import errno
import fcntl
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from surflow.config import run_dir
from surflow.errors import UserError

PREFIX = "surflow: error: "


def the_line(done, code=2):
    """The one line of a refusal."""
    assert done.code == code, done
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith(PREFIX)
    assert "Traceback" not in done.out
    return lines[0].removeprefix(PREFIX)


def test_points_are_not_written_into_a_picture(call, tiny, tmp_path):
    """The picture beside the samples would take their place."""
    done = call("sample", *tiny(f"out={tmp_path}/points.png", "n=10"))
    assert the_line(done) == f"out: expected an .npz file, got {tmp_path}/points.png"
    assert not (tmp_path / "points.png").exists()


def nothing_left(root):
    """No checkpoint, no record, no half-written file."""
    files = [p.name for p in root.rglob("*") if p.is_file()]
    return not [n for n in files if n not in (".lock", "train.log")]


# What is asked for

REQUESTS = {
    "unknown dataset": (["data=checkerbord"], ["data:", "'checkerbord'", "'checkerboard'"]),
    "unknown model": (["model=nope"], ["model:", "'nope'", "coupling_flow", "spline_flow"]),
    "unknown surjection": (["surjection=abss"], ["surjection:", "did you mean 'abs'?"]),
    "unknown experiment": (
        ["experiment=synthetic/flo"],
        ["experiment:", "did you mean 'synthetic/flow'?"],
    ),
    "unknown profile": (["profile=smok"], ["profile:", "did you mean 'smoke'?", "paper, short"]),
    "misspelt key": (["data.batchsize=3"], ["data.batchsize:", "did you mean 'batch_size'?"]),
    "misspelt top key": (["sed=3"], ["sed:", "did you mean 'seed'?"]),
    "misspelt trainer key": (["trainer.epochs=3"], ["trainer.epochs:", "max_epochs"]),
    "key of another model": (["model.num_bins=3"], ["model.num_bins:", "num_couplings"]),
    "key that nothing takes": (
        ["+optimizer.foo=3"],
        ["optimizer.foo: unknown option of torch.optim.Adam", "lr, betas"],
    ),
    "override not understood": (["data=["], ["'data=['", "quote"]),
    "no interpolation": (["seed=${nope}"], ["nope", "seed"]),
    "batch_size 0": (["data.batch_size=0"], ["data.batch_size:", "positive", "got 0"]),
    "batch_size too large": (["data.batch_size=999"], ["data.batch_size:", "640", "got 999"]),
    "eval_batch_size -1": (["data.eval_batch_size=-1"], ["data.eval_batch_size:", "got -1"]),
    "train_size -5": (["data.train_size=-5"], ["data.train_size:", "positive", "got -5"]),
    "test_size 0": (["data.test_size=0"], ["data.test_size:", "positive", "got 0"]),
    "train_size a word": (["data.train_size=many"], ["data.train_size:", "got 'many'"]),
    "max_epochs 0": (["trainer.max_epochs=0"], ["trainer.max_epochs:", "positive", "got 0"]),
    "max_epochs 1.5": (["trainer.max_epochs=1.5"], ["trainer.max_epochs:", "whole", "1.5"]),
    "accumulation 0": (
        ["trainer.accumulate_grad_batches=0"],
        ["trainer.accumulate_grad_batches:", "got 0"],
    ),
    "epochs null": (["trainer.max_epochs=null"], ["trainer.max_epochs:", "positive", "got None"]),
    "no draws": (["objective.eval_samples=0"], ["objective.eval_samples:", "positive", "got 0"]),
    "half a draw": (["objective.num_samples=1.5"], ["objective.num_samples:", "whole", "1.5"]),
    "iwbo -1": (["objective.iwbo_samples=-1"], ["objective.iwbo_samples:", "0 (no IWBO)", "-1"]),
    "iwbo 2.5": (["objective.iwbo_samples=2.5"], ["objective.iwbo_samples:", "got 2.5"]),
    "folder of images without a name": (["data=image_folder"], ["data.folder: expected a value"]),
    "processes that share no batch": (
        ["trainer=ddp", "trainer.devices=3"],
        ["data.batch_size: expected a multiple of the 3 processes, got 128"],
    ),
    "lr -1": (["optimizer.lr=-1"], ["optimizer.lr:", "positive", "got -1"]),
    "lr 0": (["optimizer.lr=0"], ["optimizer.lr:", "positive", "got 0"]),
    "lr a word": (["optimizer.lr=fast"], ["optimizer.lr:", "number", "got fast"]),
    "ema 1": (
        ["callbacks=ema", "callbacks.ema.decay=1.0"],
        ["callbacks.ema.decay:", "(0, 1)", "got 1.0"],
    ),
    "ema without the callback": (
        ["callbacks.ema.decay=0.9"],
        ["callbacks.ema: expected a node with _target_", "callbacks=<name>"],
    ),
    "checkpoints in the past": (
        ["callbacks=timed_checkpoint", "callbacks.timed_checkpoint.minutes=-1"],
        ["callbacks.timed_checkpoint.minutes:", "got -1"],
    ),
    "option of the run's own": (["trainer.logger=true"], ["trainer.logger: unknown option"]),
    "fact about the data": (["model.low=3"], ["model.low: unknown option", "num_couplings"]),
    "option of no surjection": (["surjection.element=0"], ["surjection: expected a node with"]),
    "option of no profiler": (["profiler.filename=x"], ["profiler: expected a node with"]),
    "misspelt option of a net": (
        ["model.net.hiden_features=[3]"],
        ["model.net.hiden_features:", "did you mean 'hidden_features'?"],
    ),
    "target that is not there": (
        ["model._target_=nope.Flow"],
        ["model: cannot import 'nope.Flow'"],
    ),
    "target that declares nothing": (
        ["model._target_=surflow.models.flow_noise"],
        ["model._target_: surflow.models.flow_noise does not say what it takes"],
    ),
    "couplings a word": (["model.num_couplings=many"], ["model: an option does not fit ("]),
    "betas a number": (["optimizer.betas=3"], ["optimizer: an option does not fit ("]),
    "warm-up a word": (["schedule.warmup_steps=many"], ["schedule: an option does not fit ("]),
    "profile that only reproduce has": (["profile=auto"], ["profile: expected one of paper"]),
    "clip 0": (["trainer.gradient_clip_val=0"], ["trainer.gradient_clip_val:", "got 0"]),
    "seed -1": (["seed=-1"], ["seed:", "got -1"]),
    "seed a word": (["seed=lucky"], ["seed:", "whole number", "got lucky"]),
    "seed true": (["seed=true"], ["seed:", "whole number", "got True"]),
    "num_couplings -1": (["model.num_couplings=-1"], ["model.num_couplings:", "got -1"]),
    "unknown support": (["model.support=real"], ["model.support:", "real_line", "'real'"]),
    "fold without support": (["surjection=abs"], ["model.support:", "real_line", "unmapped"]),
    "surjection for other data": (["surjection=abs_generative"], ["data >= 0", "choose abs"]),
    "unknown unit": (["objective.unit=bits"], ["objective.unit:", "nats, bpd", "'bits'"]),
    "gamma 2": (["schedule=exponential", "schedule.gamma=2"], ["schedule.gamma:", "got 2"]),
    "unknown accelerator": (["trainer.accelerator=tpu"], ["trainer.accelerator:", "cpu", "'tpu'"]),
    "devices 0": (["trainer.devices=0"], ["trainer.devices:", "positive", "got 0"]),
    "devices -1 on cpu": (["trainer.devices=-1"], ["trainer.devices=-1", "trainer.devices=2"]),
    "devices a word": (["trainer.devices=all"], ["trainer.devices:", "auto", "got all"]),
    "unknown precision": (["trainer.precision=8"], ["trainer.precision:", "32-true", "got 8"]),
    "precision not on cpu": (
        ["trainer.precision=16-mixed"],
        ["trainer.precision=16-mixed", "bf16-mixed"],
    ),
    "unknown strategy": (["trainer.strategy=nope"], ["strategy", "'nope'", "ddp"]),
    "threads 0": (["compute.threads=0"], ["compute.threads:", "positive", "got 0"]),
    "compile perhaps": (["compute.compile=perhaps"], ["compute.compile:", "'perhaps'"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_request_that_cannot_be_meant(name, call, tiny, root):
    overrides, wanted = REQUESTS[name]
    line = the_line(call("train", *tiny(*overrides)))
    for part in wanted:
        assert part in line, line
    # some show only once the trainer is there: then the header of metrics.csv is
    left = [p for p in root.rglob("*") if p.is_file() and p.suffix not in (".lock", ".csv")]
    assert [p.name for p in left] in ([], [".lock"])
    for path in root.rglob("metrics.csv"):
        assert len(path.read_text().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_accelerator_that_is_not_there(accelerator, call, tiny, root):
    line = the_line(call("train", *tiny(f"trainer.accelerator={accelerator}")))
    assert f"trainer.accelerator={accelerator}: no CUDA device" in line
    assert "use trainer.accelerator=cpu" in line
    assert nothing_left(root)


def test_in_a_process_of_its_own(command, tiny, root):
    line = the_line(command("train", *tiny("data.batchsize=3")))
    assert "did you mean 'batch_size'?" in line
    assert nothing_left(root)


@pytest.mark.parametrize("variable", ["SURFLOW_DEBUG"])
def test_debugging_shows_the_traceback(variable, call, tiny, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match="got 0"):
        call("train", *tiny("data.batch_size=0"))


# Checkpoints


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_no_checkpoint(name, call, tiny, root):
    line = the_line(call(name, *tiny()))
    assert "last.ckpt: no such checkpoint" in line
    assert "train the run first" in line
    assert nothing_left(root)
    line = the_line(call(name, *tiny("checkpoint=nowhere.ckpt")))
    assert "nowhere.ckpt: no such checkpoint" in line


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_checkpoint(share, call, tiny, train):
    _, folder, _ = train()
    path = folder / "last.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    (folder / "record.json").unlink()
    for name in ("train", "evaluate", "sample"):
        line = the_line(call(name, *tiny()))
        assert "last.ckpt: damaged or truncated checkpoint" in line
        assert "delete it and train the run again" in line
    assert path.read_bytes() == whole[: int(len(whole) * share)]
    assert not (folder / "record.json").exists()
    path.unlink()  # as the line says
    assert call("train", *tiny()).code == 0
    assert (folder / "record.json").exists()


def test_file_that_is_no_checkpoint(call, tiny, tmp_path):
    text, other = tmp_path / "text.ckpt", tmp_path / "other.ckpt"
    text.write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, other)
    line = the_line(call("evaluate", *tiny(f"checkpoint={text}")))
    assert "text.ckpt: damaged" in line
    line = the_line(call("evaluate", *tiny(f"checkpoint={other}")))
    assert "expected a checkpoint with a state_dict" in line


def test_checkpoint_of_another_config(call, tiny, train, config):
    _, folder, _ = train("seed=1")
    path = f"checkpoint={folder / 'last.ckpt'}"
    assert call("evaluate", *tiny("seed=1", path)).code == 0
    for name in ("evaluate", "sample"):
        line = the_line(call(name, *tiny("seed=0", path)))
        assert "written by another config" in line
        assert "use the overrides it was trained with" in line
    # the same in a run's own folder
    own = run_dir(config("seed=0"))
    own.mkdir(parents=True)
    shutil.copy(folder / "last.ckpt", own)
    line = the_line(call("train", *tiny("seed=0")))
    assert "last.ckpt: written by another config" in line
    assert not (own / "record.json").exists()


def test_damaged_record_is_trained_again(call, tiny, train):
    _, folder, metrics = train()
    (folder / "record.json").write_text('{"schema": 1, "exp')
    done = call("train", *tiny())
    assert done.code == 0
    assert "already complete" not in done.out
    record = json.loads((folder / "record.json").read_text())
    assert record["metrics"]["test/nll_nats"]["value"] == metrics["test/nll_nats"]


@pytest.mark.parametrize(
    ("name", "override", "wanted"),
    [
        (
            "evaluate",
            "split=tset",
            ["split:", "train, valid, test", "'tset'", "did you mean 'test'?"],
        ),
        ("sample", "n=0", ["n:", "positive", "got 0"]),
        ("sample", "temperature=0", ["temperature:", "positive", "got 0"]),
        ("sample", "number=3", ["number:", "unknown key"]),
        ("evaluate", "only=[likelyhood]", ["only:", "did you mean 'likelihood'?"]),
    ],
)
def test_evaluate_and_sample_requests(name, override, wanted, call, tiny, root):
    line = the_line(call(name, *tiny(override)))
    for part in wanted:
        assert part in line, line
    assert nothing_left(root)


# Disk


class FullDisk:
    """A module with one function that finds the disk full."""

    def __init__(self, module, name, after=0):
        self._module, self._name, self._left = module, name, after

    def __getattr__(self, name):
        if name == self._name and self._left == 0:
            return self._raise
        if name == self._name:
            self._left -= 1
        return getattr(self._module, name)

    @staticmethod
    def _raise(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "function"), [("os", "fsync"), ("os", "replace"), ("torch", "save")]
)
def test_full_disk_keeps_the_checkpoint_before(module, function, tmp_path, monkeypatch):
    from surflow import files
    from surflow.training import checkpoint

    path = tmp_path / "last.ckpt"
    io = checkpoint.AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"flow.w": torch.ones(3)}}, path)
    before = path.read_bytes()
    where = files if module == "os" else checkpoint
    monkeypatch.setattr(where, module, FullDisk(getattr(where, module), function))
    with pytest.raises(UserError) as caught:
        io.save_checkpoint({"state_dict": {"flow.w": torch.zeros(9)}}, path)
    assert "could not be written" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "the one before it is kept" in str(caught.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_full_disk_in_mid_run(call, tiny, config, monkeypatch):
    from surflow.training import checkpoint

    folder = run_dir(config())
    with monkeypatch.context() as patch:
        # best and last of the first epoch are written, the second epoch's are not
        patch.setattr(checkpoint, "torch", FullDisk(torch, "save", after=2))
        done = call("train", *tiny())
    lines = [text for text in done.err.splitlines() if text.startswith(PREFIX)]
    assert done.code == 2
    assert len(lines) == 1 and done.err.splitlines()[-1] == lines[0]
    assert "No space left on device" in lines[0]
    assert "give the same command again to resume" in lines[0]
    assert "Traceback" not in done.err
    assert not [p for p in folder.iterdir() if p.suffix == ".tmp"]
    assert not (folder / "record.json").exists()
    assert checkpoint.load_checkpoint(folder / "last.ckpt")["epoch"] == 0
    resumed = call("train", *tiny())
    assert resumed.code == 0
    assert "resuming after epoch 1" in resumed.err


def test_full_disk_at_the_record(call, tiny, config, monkeypatch):
    from surflow.training import run

    folder = run_dir(config())
    full = SimpleNamespace(write=FullDisk._raise)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", full.write)
        done = call("train", *tiny())
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith(PREFIX)
    assert "No space left on device" in last
    assert "free some space" in last
    assert not (folder / "record.json").exists()
    assert call("train", *tiny()).code == 0
    assert (folder / "record.json").exists()


def test_run_root_that_cannot_be_written(call, tiny, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    line = the_line(call("train", *tiny(f"run.root={file}")))
    assert "run.root: cannot write to" in line
    assert "choose a folder that can be written to" in line
    assert file.read_text() == "kept"


def test_two_processes_on_one_run(call, tiny, config):
    folder = run_dir(config())
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        line = the_line(call("train", *tiny()))
    assert "another process is training this run" in line
    assert "change seed or run.root" in line
    assert [p.name for p in folder.iterdir()] == [".lock"]
    assert call("train", *tiny()).code == 0


# Tables

TABLES = {
    "unknown artefact": (["artefact=syntetic"], ["artefact:", "synthetic", "'syntetic'"]),
    "unknown row": (["rows=[flo]"], ["rows:", "flow, abs_flow", "'flo'", "did you mean 'flow'?"]),
    "unknown column": (["columns=[corner]"], ["columns:", "corners", "'corner'"]),
    "negative seed": (["seeds=[-1]"], ["seeds:", ">= 0", "-1"]),
    "seed twice": (["seeds=[1,1]"], ["seeds:", "each once"]),
    "no seed": (["seeds=[]"], ["seeds:", "[0,1,2]"]),
    "seed not in a list": (["seeds=3"], ["seeds:", "expected a list", "seeds=[3]"]),
    "row not in a list": (["rows=flow"], ["rows:", "expected a list", "rows=[flow]"]),
    "unknown launcher": (["launcher=slurm"], ["launcher:", "submitit_slurm", "'slurm'"]),
    "no workers": (["workers=0"], ["workers:", "auto", "got 0"]),
    "unknown profile": (["profile=smok"], ["profile:", "did you mean 'smoke'?"]),
    "misspelt key": (["seed=1"], ["seed:", "did you mean 'seeds'?"]),
    "misspelt override": (['overrides=["data.foo=1"]'], ["data.foo:", "batch_size"]),
    "bad override": (['overrides=["optimizer.lr=-1"]'], ["optimizer.lr:", "got -1"]),
}


@pytest.mark.parametrize("command_name", ["reproduce", "report"])
@pytest.mark.parametrize("name", TABLES)
def test_table_request_that_cannot_be_meant(name, command_name, call, tmp_path):
    overrides, wanted = TABLES[name]
    places = [f"run_root={tmp_path / 'runs'}", f"results_root={tmp_path / 'results'}"]
    line = the_line(call(command_name, *places, *overrides))
    for part in wanted:
        assert part in line, line
    assert not list(tmp_path.iterdir())
