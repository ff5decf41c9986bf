"""Tables: what is missing is trained, what is there is reused, what does not fit is refused."""

import csv
import json
import os
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from surflow.cli.cells import plan_cells, runs_of, write_report
from surflow.cli.reproduce import allot, reproduce
from surflow.cli.request import complete_request, make_command, results_folder, table_spec
from surflow.cli.train import train
from surflow.config import compose, run_dir
from surflow.errors import UserError
from surflow.files import write_json
from surflow.training.launch import (
    Allotment,
    Job,
    Places,
    fitting,
    places_here,
    run_local,
    run_logged,
    run_submitit,
    share,
    slurm_parameters,
    visible_gpus,
)

SMALL = (
    "data.train_size=640",
    "data.valid_size=200",
    "data.test_size=500",
    "trainer.max_epochs=2",
    "model.net.hidden_features=[16]",
    "compute.compile=false",
    "run.pictures=false",
    "logger=csv",
)


def quoted(overrides):
    return "overrides=[" + ",".join(f'"{item}"' for item in overrides) + "]"


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The command line of a tiny table: one row, one column."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    places = [f"run_root={tmp_path / 'runs'}", f"results_root={tmp_path / 'results'}"]

    def line(*extra, overrides=SMALL):
        cell = ["artefact=synthetic", "profile=smoke", "rows=[flow]", "columns=[corners]"]
        return [*cell, *places, quoted(overrides), *extra]

    return line


@pytest.fixture
def request_of(arguments):
    return lambda *extra, **kwargs: compose(arguments(*extra, **kwargs), "reproduce")


@pytest.fixture
def table(tmp_path):
    """The cells of table.csv."""

    def read():
        with open(tmp_path / "results/smoke/synthetic/table.csv", newline="") as file:
            return {(r["row"], r["column"]): r for r in csv.DictReader(file)}

    return read


def test_jobs_are_spread_over_the_gpus(tmp_path, monkeypatch):
    """Two at a time, each sees one GPU, and never the other's."""
    code = "import os, time; time.sleep(0.5); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(str(i), [sys.executable, "-c", code], tmp_path / f"{i}.log") for i in range(4)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    run_local(jobs, 2, visible_gpus())
    assert [job.code for job in jobs] == [0] * 4
    seen = [job.last_line() for job in jobs]
    assert sorted(seen[:2]) == ["3", "5"]
    assert set(seen) == {"3", "5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def cells_of(cfg):
    spec = complete_request(cfg)
    return spec, plan_cells(cfg, spec)


def chosen(cells):
    return [key for key, cell in cells.items() if cell.chosen]


def test_trains_what_is_missing_and_reuses_it(request_of, table, tmp_path, capfd):
    cfg = request_of()
    assert reproduce(cfg) == 0
    out = capfd.readouterr().out
    assert "1 runs, 0 complete, 1 to do" in out
    assert "nothing written below is a reproduction" in out
    _, cells = cells_of(cfg)
    (folder,) = (cells[key].run.folder for key in chosen(cells))
    assert folder == run_dir(cells["flow", "corners", 0].config)
    record = json.loads((folder / "record.json").read_text())
    found = table()
    assert len(found) == 16
    cell = found.pop(("flow", "corners"))
    assert float(cell["ours"]) == pytest.approx(
        record["metrics"]["test/nll_nats"]["value"], abs=1e-3
    )
    assert float(cell["published"]) == 3.19
    assert cell["verdict"] == "not a reproduction (profile smoke)"
    assert cell["seeds"] == "0"
    assert {c["verdict"] for c in found.values()} == {"not run"}
    assert {c["ours"] for c in found.values()} == {""}
    results = tmp_path / "results/smoke/synthetic"
    text = (results / "table.md").read_text()
    assert "not a reproduction" in text
    assert text.count("not run") >= 11
    assert [p.name for p in (results / "records").iterdir()] == ["flow-corners-seed0.json"]
    assert (results / "learning_curves.png").is_file()

    before = (folder / "record.json").stat().st_mtime_ns
    assert reproduce(cfg) == 0
    assert "1 runs, 1 complete, 0 to do" in capfd.readouterr().out
    assert (folder / "record.json").stat().st_mtime_ns == before
    assert table()["flow", "corners"] == cell


def test_edited_record_is_refused(request_of, table, tmp_path):
    cfg = request_of()
    spec, cells = cells_of(cfg)
    train(cells["flow", "corners", 0].config)
    path = cells["flow", "corners", 0].run.folder / "record.json"
    write_report(cfg, spec, cells)
    assert table()["flow", "corners"]["ours"]
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config_hash": "0123456789abcdef"}))
    write_report(cfg, spec, cells)
    cell = table()["flow", "corners"]
    assert cell["ours"] == ""
    assert "stale config" in cell["verdict"] or "not run" in cell["verdict"]
    text = (tmp_path / "results/smoke/synthetic/table.md").read_text()
    assert "stale config 0123456789abcdef" in text
    assert runs_of(cells, to_run=True) == [("flow", "corners", 0)]  # so that reproduce trains it


def test_run_with_other_overrides_is_refused(request_of, table, tmp_path):
    cfg = request_of()
    spec, cells = cells_of(cfg)
    _, others = cells_of(request_of(overrides=(*SMALL, "optimizer.lr=0.01")))
    train(others["flow", "corners", 0].config)
    write_report(cfg, spec, cells)
    assert table()["flow", "corners"]["ours"] == ""
    text = (tmp_path / "results/smoke/synthetic/table.md").read_text()
    assert f"stale config {others['flow', 'corners', 0].run.hash}" in text
    # next to the right one it is ignored
    metrics = train(cells["flow", "corners", 0].config)
    write_report(cfg, spec, cells)
    cell = table()["flow", "corners"]
    assert float(cell["ours"]) == pytest.approx(metrics["test/nll_nats"], abs=1e-3)


def test_seeds_are_averaged(request_of, table):
    cfg = request_of("seeds=[0,1]")
    spec, cells = cells_of(cfg)
    values = [train(cells[key].config)["test/nll_nats"] for key in chosen(cells)]
    assert len(values) == 2
    write_report(cfg, spec, cells)
    cell = table()["flow", "corners"]
    assert float(cell["ours"]) == pytest.approx(sum(values) / 2, abs=1e-3)
    assert float(cell["std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-3)
    assert cell["seeds"] == "0 1"


def test_records_in_results_name_no_place_on_the_machine(request_of, tmp_path):
    cfg = request_of()
    spec, cells = cells_of(cfg)
    for key in chosen(cells):
        train(cells[key].config)
    write_report(cfg, spec, cells)
    (copy,) = (tmp_path / "results").rglob("records/*.json")
    assert str(tmp_path) not in copy.read_text()
    (original,) = (tmp_path / "runs").rglob("record.json")
    found, wanted = (json.loads(path.read_text()) for path in (copy, original))
    assert wanted["config"]["run"]["root"] == str(tmp_path / "runs")
    wanted["config"]["run"]["root"] = "runs"
    assert found == wanted


def test_report_runs_nothing(call, arguments, table, tmp_path):
    done = call("report", *arguments())
    assert done.code == 0, done.err
    assert {c["verdict"] for c in table().values()} == {"not run"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_runs_of_another_machine_are_reported(call, arguments, table, tmp_path):
    line = arguments("inception=/not/here.pth", overrides=(*SMALL, "trainer.accelerator=gpu"))
    done = call("report", *line)
    assert done.code == 0, done.err
    assert {c["verdict"] for c in table().values()} == {"not run"}
    done = call("reproduce", *line)
    assert done.code == 2
    assert "trainer.accelerator=gpu: no CUDA device on this machine" in done.err
    assert not (tmp_path / "runs").exists()


def test_failing_cell(call, arguments, table, tmp_path):
    done = call("reproduce", *arguments(overrides=(*SMALL, "optimizer.lr=1e6")))
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        "surflow: error: 1 run(s) failed, for the reasons above; the table is of the others"
    )
    assert "flow corners seed 0: failed: surflow: error: the loss is not finite" in done.err
    assert "train.log" in done.err
    cell = table()["flow", "corners"]
    assert cell["ours"] == ""
    assert "not run" in cell["verdict"] or "failed" in cell["verdict"]
    (log,) = tmp_path.rglob("train.log")
    assert "the loss is not finite" in log.read_text()


def test_submitit_launcher(request_of, table, tmp_path):
    assert reproduce(request_of("launcher=submitit_local")) == 0
    assert table()["flow", "corners"]["ours"]
    assert list((tmp_path / "runs/.submitit").iterdir())


def test_submitit_failing_cell(request_of, table):
    cfg = request_of("launcher=submitit_local", overrides=(*SMALL, "optimizer.lr=1e6"))
    assert reproduce(cfg) == 1
    assert table()["flow", "corners"]["ours"] == ""


# Sharing devices


@pytest.mark.parametrize(
    ("num_runs", "devices", "nodes", "each"),
    [
        (0, 8, 2, None),
        (1, 1, 1, (1, 1)),
        (1, 8, 1, (8, 1)),
        (1, 8, 2, (8, 2)),  # whole machines
        (2, 8, 2, (8, 1)),
        (2, 8, 4, (8, 2)),
        (3, 8, 4, (8, 1)),  # floor(32 / 3) = 10 is more than a machine: one whole one
        (3, 8, 1, (2, 1)),
        (4, 8, 1, (2, 1)),
        (5, 8, 1, (1, 1)),
        (3, 8, 2, (4, 1)),  # floor(16 / 3) = 5 would leave no place for the third
        (5, 8, 2, (2, 1)),
        (16, 8, 2, (1, 1)),
        (40, 8, 2, (1, 1)),  # they take turns
    ],
)
def test_share(num_runs, devices, nodes, each):
    found = share(num_runs, devices, nodes)
    assert found == ([] if each is None else [Allotment(*each)] * num_runs)


def test_shares_fit_side_by_side():
    for devices in range(1, 9):
        for nodes in range(1, 5):
            for num_runs in range(1, devices * nodes + 1):
                part = share(num_runs, devices, nodes)[0]
                assert part.devices <= devices and part.nodes <= nodes
                at_once = (nodes // part.nodes) * (devices // part.devices)
                assert at_once >= num_runs, (num_runs, devices, nodes, part)
                assert part.nodes == 1 or part.devices == devices
                assert part.processes <= devices * nodes // num_runs


@pytest.mark.parametrize("wrong", [(-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_share_refuses(wrong):
    with pytest.raises(ValueError, match="expected num_runs >= 0, devices >= 1 and nodes >= 1"):
        share(*wrong)


@pytest.mark.parametrize(
    ("given", "batch_size", "kept"),
    [
        ((8, 2), 32, (8, 2)),
        ((6, 1), 32, (4, 1)),
        ((3, 1), 32, (2, 1)),
        ((8, 3), 32, (8, 2)),
        ((5, 1), 7, (1, 1)),
    ],
)
def test_a_batch_divides_over_the_processes(given, batch_size, kept):
    assert fitting(Allotment(*given), batch_size) == Allotment(*kept)


def test_overrides_of_an_allotment():
    assert Allotment().overrides(cpu=True) == []
    several = ["trainer.devices=4", "trainer.num_nodes=2", "trainer.strategy=ddp"]
    assert Allotment(4, 2).overrides() == several
    assert Allotment(4, 2).overrides(cpu=True) == [*several, "trainer.accelerator=cpu"]


def test_places_on_this_machine():
    gpus = ["0", "1", "2", "3"]
    assert places_here(4, "auto", Allotment(2), gpus) == Places(2, ("0,1", "2,3"))
    assert places_here(3, "auto", Allotment(1), gpus) == Places(3, ("0", "1", "2"))
    assert places_here(4, "auto", Allotment(4), []) == Places(1)
    assert places_here(4, "auto", Allotment(1), []) == Places(4)
    assert places_here(None, 3, Allotment(), gpus) == Places(3, tuple(gpus))
    with pytest.raises(UserError, match=r"devices=8: this machine has 4 GPU\(s\)"):
        places_here(8, "auto", Allotment(8), gpus)


def test_a_job_over_several_gpus_sees_all_of_them(tmp_path):
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(str(i), [sys.executable, "-c", code], tmp_path / f"{i}.log") for i in range(2)]
    run_local(jobs, 2, ("0,1", "2,3"))
    assert sorted(job.last_line() for job in jobs) == ["0,1", "2,3"]


@pytest.mark.slow
def test_a_run_over_two_processes(request_of, table, capfd):
    """devices=2 and one run, on CPUs: data parallel within it, by two gloo processes."""
    assert reproduce(request_of("devices=2")) == 0
    cfg = request_of()
    _, cells = cells_of(cfg)
    record = cells["flow", "corners", 0].run.own_record()
    assert float(table()["flow", "corners"]["ours"]) == pytest.approx(
        record.metrics["test/nll_nats"].value, abs=1e-3
    )
    assert record.config["trainer"]["devices"] == 2
    assert record.config["trainer"]["strategy"] == "ddp"


def test_released_weights_need_no_second_device(request_of):
    assert allot(request_of("devices=8"), 2) == Allotment(4)
    assert allot(request_of(), 2) == Allotment()
    assert allot(request_of("devices=8", "weights=official"), 2) == Allotment()


# Slurm, as far as it goes without a cluster


def test_what_slurm_is_asked_for(tmp_path, request_of, monkeypatch):
    """Each job's parameters, and that every task runs the plain training command."""
    asked, submitted = [], []

    class Executor:
        def __init__(self, folder, cluster):
            assert cluster == "slurm"

        def update_parameters(self, **parameters):
            asked.append(parameters)

        def submit(self, function, *arguments):
            assert function is run_logged
            submitted.append(arguments)
            return SimpleNamespace(done=lambda: True, results=lambda: [0] * 16)

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    cfg = request_of("launcher=submitit_slurm", "devices=8", "nodes=2", "slurm={timeout_min: 600}")
    command = [sys.executable, "-m", "surflow.cli.train", "trainer.devices=8"]
    job = Job("one", command, tmp_path / "train.log", Allotment(8, 2))
    run_submitit([job], "slurm", tmp_path, cfg.slurm, cfg.devices is not None, Places(1))
    assert job.code == 0
    assert asked == [{"timeout_min": 600, "nodes": 2, "gpus_per_node": 8, "tasks_per_node": 8}]
    assert submitted == [(command, str(tmp_path / "train.log"), {})]


def test_slurm_starts_the_processes_that_lightning_expects(tmp_path, monkeypatch):
    """The sbatch file of submitit asks for what Lightning's SLURMEnvironment then checks."""
    from submitit.slurm.slurm import SlurmExecutor

    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    monkeypatch.setattr(SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    executor = SlurmExecutor(tmp_path)
    parameters = executor._convert_parameters(slurm_parameters(Allotment(8, 2)))
    executor._internal_update_parameters(**parameters)
    text = executor._make_submission_file_text("train", "0")
    for line in ("--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8"):
        assert f"#SBATCH {line}\n" in text
    assert "srun" in text
    for key, value in {"NTASKS": 16, "NTASKS_PER_NODE": 8, "NNODES": 2, "PROCID": 9}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    monkeypatch.setenv("SLURM_JOB_NAME", "submitit")
    assert SLURMEnvironment.detect()
    environment = SLURMEnvironment()
    environment.validate_settings(num_devices=8, num_nodes=2)
    assert environment.creates_processes_externally and environment.global_rank() == 9
    with pytest.raises(ValueError, match="devices=4"):
        environment.validate_settings(num_devices=4, num_nodes=2)


def test_tasks_of_a_job_have_logs_of_their_own(tmp_path, monkeypatch):
    code = "import os, sys; print(os.environ['SLURM_PROCID'], os.environ['X']); sys.exit(3)"
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        done = run_logged([sys.executable, "-c", code], str(tmp_path / "train.log"), {"X": "y"})
        assert done == 3
    assert (tmp_path / "train.log").read_text() == "0 y\n"
    assert (tmp_path / "train.log.1").read_text() == "1 y\n"


# What was left open, or cannot be meant


def asked(*overrides, artefact="table5"):
    return compose([f"artefact={artefact}", *overrides], "reproduce")


@pytest.mark.parametrize(
    ("overrides", "cuda", "sbatch", "profile", "why"),
    [
        (["profile=auto"], True, False, "paper", "since this machine has a CUDA device"),
        (
            ["profile=auto"],
            False,
            False,
            "smoke",
            "since this machine has no CUDA device (PROFILE=paper runs the published protocol)",
        ),
        (["profile=short"], False, False, "short", "as asked"),
        ([], True, False, "paper", "since this machine has a CUDA device"),
        (
            ["profile=auto", "weights=official"],
            False,
            False,
            "paper",
            "since released weights are of the published models",
        ),
        (
            ["profile=auto", "launcher=submitit", "devices=8", "nodes=2"],
            False,
            True,
            "paper",
            "since its runs go to GPUs through Slurm",
        ),
        (
            ["profile=auto", "launcher=submitit", "devices=2"],
            False,
            False,
            "smoke",
            "since this machine has no CUDA device (PROFILE=paper runs the published protocol)",
        ),
    ],
)
def test_profile_auto(monkeypatch, capsys, overrides, cuda, sbatch, profile, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/sbatch" if sbatch else None)
    cfg = asked(*overrides)
    complete_request(cfg)
    assert capsys.readouterr().out == f"table5: profile {profile}, {why}\n"
    assert cfg.profile.name == profile
    assert cfg.profile.reproduction is (profile == "paper")
    if "launcher=submitit" in overrides:
        assert cfg.launcher == ("submitit_slurm" if sbatch else "submitit_local")


def test_the_profile_of_a_table_is_its_own(capsys):
    wanted = {"synthetic": "paper", "cifar10_subset": "short"}
    for artefact, profile in wanted.items():
        assert table_spec(artefact).profile == profile
        cfg = asked(artefact=artefact)
        assert complete_request(cfg).artefact == artefact
        assert cfg.profile.name == profile
    told = [f"{a}: profile {p}, the default of this table" for a, p in wanted.items()]
    assert capsys.readouterr().out.splitlines() == told


def test_the_first_line_says_which_profile(request_of, capfd, monkeypatch):
    cfg = request_of("rows=[flow]")
    monkeypatch.setattr("surflow.cli.reproduce.run_missing", lambda *_: [])
    assert reproduce(cfg) == 0
    assert capfd.readouterr().out.splitlines()[0] == "synthetic: profile smoke, as asked"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["devices=0"], "devices: expected a positive whole number or null, got 0"),
        (["slurm=gpu"], "slurm: expected a mapping, such as {timeout_min: 60}, got gpu"),
        (["nodes=0"], "nodes: expected a positive whole number, got 0"),
        (["nodes=2", "devices=8"], "nodes=2: several machines need Slurm"),
        (["weights=oficial"], "weights: expected one of official, got 'oficial'"),
        (["weights_path=x"], "weights_path: of no effect without weights=official"),
        (["weights=official", "profile=smoke"], "which profile smoke does not have"),
        (["launcher=submititt"], "did you mean 'submitit'"),
    ],
)
def test_requests_that_cannot_be_meant(overrides, message, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError) as caught:
        complete_request(asked(*overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_machines_need_a_number_of_devices(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/sbatch")
    with pytest.raises(UserError, match="say with devices how many GPUs each machine has"):
        complete_request(asked("launcher=submitit", "nodes=2"))


# Tables that read the runs of another


@pytest.fixture
def image_cells(tmp_path):
    """The cells of table 5 as asked for; nothing is run."""

    def plan(*overrides):
        places = [f"run_root={tmp_path / 'runs'}", f"results_root={tmp_path / 'results'}"]
        cfg = asked("profile=paper", *places, *overrides)
        spec = complete_request(cfg)
        return cfg, spec, plan_cells(cfg, spec)

    return plan


def put_record(cells, key, metrics, **changes):
    """A record of exactly this cell's run."""
    config = cells[key].config
    samples = cells[key].run.options["measures"]["samples"]
    reference = {"splits": list(samples["reference"])}
    protocol = {"n": samples["n"], "temperature": 1.0, "reference": reference}
    values = {
        name: {
            "value": value,
            "unit": "score",
            "kind": "score",
            "estimator": "samples against images",
            "protocol": {**protocol, **changes.get("protocol", {})},
        }
        for name, value in metrics.items()
    }
    content = {
        "schema": 1,
        "experiment": f"table4/{key[0]}",
        "artefact": "table4",
        "row": key[0],
        "data": config.data.name,
        "model": "pool_flow",
        "profile": config.profile.name,
        "seed": key[2],
        "config_hash": cells[key].run.hash,
        "config": {},
        "status": "complete",
        "metrics": values,
        **{k: v for k, v in changes.items() if k != "protocol"},
    }
    return write_json(cells[key].run.folder / "record.json", content)


NOT_COMPARABLE = "not comparable: samples, and images they are compared with"
KEY = ("slice", "fid", 0)
BOTH = {"sample/inception_score": 5.1, "sample/fid": 49.2}


def test_two_columns_of_one_run_are_run_once(image_cells):
    _, _, cells = image_cells()
    assert len(chosen(cells)) == 4
    assert [key[0] for key in runs_of(cells)] == ["slice", "max_pool"]
    assert runs_of(cells, to_run=True) == runs_of(cells)
    assert cells[KEY].run.folder == cells["slice", "inception_score", 0].run.folder
    assert cells[KEY].run.folder.parts[-5:-1] == ("paper", "table4", "slice", "cifar10")
    put_record(cells, KEY, BOTH)
    assert [key[0] for key in runs_of(cells, to_run=True)] == ["max_pool"]


def test_what_a_score_lacks_is_run_again(image_cells):
    _, _, cells = image_cells("rows=[slice]")
    put_record(cells, KEY, BOTH)
    assert runs_of(cells, to_run=True) == []
    put_record(cells, KEY, BOTH, protocol={"n": 100})  # another protocol
    assert len(runs_of(cells, to_run=True)) == 1
    put_record(cells, KEY, {}, missing={"sample/fid": "no weights"})
    assert len(runs_of(cells, to_run=True)) == 1
    # table 4 shows none of these scores: its cells have what they need
    shown = table_spec("table4").of_profile("paper").columns[0].metric
    assert not replace(cells[KEY], metric=shown).to_run()


def test_table_of_scores(image_cells, capfd):
    cfg, spec, cells = image_cells()
    put_record(cells, KEY, BOTH)
    reason = "no Inception weights"
    put_record(cells, ("max_pool", "fid", 0), {}, missing=dict.fromkeys(BOTH, reason))
    write_report(cfg, spec, cells)
    folder = results_folder(cfg)
    with open(folder / "table.csv", newline="") as file:
        found = {(c["row"], c["column"]): c for c in csv.DictReader(file)}
    assert found["slice", "fid"]["verdict"] == NOT_COMPARABLE
    assert found["slice", "inception_score"]["ours"] == "5.10"
    assert found["max_pool", "fid"]["verdict"] == f"missing: {reason}"
    assert found["dcgan", "fid"]["verdict"] == "quoted only"
    assert [p.name for p in (folder / "records").iterdir()] == ["slice-cifar10-seed0.json"]
    assert (folder / "published.png").is_file()
    assert not (folder / "samples.png").exists()
    assert make_command(cfg) in (folder / "table.md").read_text()


def test_released_and_trained_weights_never_mix(image_cells):
    cfg, _, cells = image_cells()
    _, _, released = image_cells("weights=official", "weights_path=/a folder/b")
    assert {key[0] for key in chosen(released)} == {"slice", "max_pool"}
    config = released[KEY].config
    assert (config.weights.source, config.weights.path) == ("official", "/a folder/b")
    assert released[KEY].run.hash != cells[KEY].run.hash
    put_record(cells, KEY, {"sample/fid": 60.0})
    weights = {"source": "official", "sha256": "0" * 64}
    put_record(released, KEY, {"sample/fid": 49.0}, weights=weights)
    for plan, name, ours, verdict in (
        (image_cells(), "table5", "60.00", NOT_COMPARABLE),
        (
            image_cells("weights=official"),
            "table5_official",
            "49.00",
            f"released weights: {NOT_COMPARABLE}",
        ),
    ):
        write_report(*plan)
        folder = results_folder(plan[0])
        assert (folder.name, folder.parent.name) == (name, "paper")
        with open(folder / "table.csv", newline="") as file:
            found = {(c["row"], c["column"]): c for c in csv.DictReader(file)}
        assert (found["slice", "fid"]["ours"], found["slice", "fid"]["verdict"]) == (ours, verdict)
        assert found["max_pool", "fid"]["verdict"] == "not run"
    assert results_folder(cfg).name == "table5"
    assert make_command(image_cells("weights=official")[0]) == (
        "make reproduce-table5 PROFILE=paper SEEDS=0 WEIGHTS=official"
    )


def test_columns_of_another_profile_cannot_be_chosen(image_cells):
    with pytest.raises(UserError, match="columns: expected some of fid_random_features, got 'fid'"):
        image_cells("profile=smoke", "columns=[fid]")


def test_inception_weights_are_passed_on(image_cells):
    _, _, cells = image_cells("inception='/w/it is.pth'")
    config, others = cells[KEY].config, image_cells()[2]
    assert config.measures.samples.weights == "/w/it is.pth"
    assert {k: c.run.hash for k, c in cells.items()} == {k: c.run.hash for k, c in others.items()}
    assert cells[KEY].run.wanted == others[KEY].run.wanted


def test_paper_profile_refuses_other_scores(image_cells):
    with pytest.raises(UserError, match="change what the published protocol computes"):
        image_cells(quoted(["measures.samples.n=100"]))


# Sweeps


def assert_four_runs(root):
    records = [json.loads(p.read_text()) for p in root.rglob("record.json")]
    wanted = {(d, s) for d in ("corners", "checkerboard") for s in (0, 1)}
    assert {(r["data"], r["seed"]) for r in records} == wanted
    assert len({r["config_hash"] for r in records}) == 4
    assert len({r["metrics"]["test/nll_nats"]["value"] for r in records}) == 4


SWEEP = ("data=corners,checkerboard", "seed=0,1")


def test_sweep(call, tiny, root, config):
    done = call("train", "-m", *tiny(*SWEEP))
    assert done.code == 0, done.err
    assert_four_runs(root)
    assert (run_dir(config("data=corners", "seed=1")) / "record.json").is_file()


@pytest.mark.parametrize(
    "launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.slow)]
)
def test_sweep_launcher(launcher, command, tiny, root):
    extra = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    done = command("train", "-m", *tiny(*SWEEP), f"hydra/launcher={launcher}", *extra)
    assert done.code == 0, done.err
    assert_four_runs(root)
    assert not os.path.exists("multirun")


@pytest.mark.parametrize(
    "launcher",
    ["basic", *(pytest.param(n, marks=pytest.mark.slow) for n in ("joblib", "submitit_local"))],
)
def test_a_sweep_goes_on_where_a_job_fails(launcher, command, tiny, root):
    own = tiny("optimizer.lr=1e30,0.001,-1", "seed=0", f"hydra/launcher={launcher}")
    done = command("train", "-m", *own)
    assert done.code == 1
    assert len(list(root.rglob("record.json"))) == 1
    lines = done.err.splitlines()
    start = lines.index("surflow: error: 2 of 3 jobs failed:")
    assert lines[start + 1].startswith("  optimizer.lr=1e+30: the loss is not finite at epoch 1")
    assert lines[start + 3] == "  optimizer.lr=-1: optimizer.lr: expected a positive number, got -1"
    assert len(lines) == start + 5
    again = shlex.split(lines[start + 4])
    assert again[:3] == ["python", "-m", "surflow.cli.train"]
    assert {"optimizer.lr=-1", "seed=0", "data.train_size=640"} <= set(again)


def test_a_failed_job_that_is_repeated_alone_exits_as_any_other(call, tiny):
    done = call("train", *tiny("optimizer.lr=-1"))
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last == "surflow: error: optimizer.lr: expected a positive number, got -1"


def test_paper_profile_refuses_overrides_that_change_results(call, tmp_path):
    done = call(
        "reproduce",
        "artefact=synthetic",
        "rows=[flow]",
        "columns=[corners]",
        f"run_root={tmp_path / 'runs'}",
        f"results_root={tmp_path / 'results'}",
        'overrides=["trainer.max_epochs=1"]',
    )
    assert done.code == 2
    assert "change what the published protocol computes" in done.err
    assert not (tmp_path / "runs").exists()
