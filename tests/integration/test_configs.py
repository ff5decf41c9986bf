"""Every config composes and builds; what names a run follows from what it computes."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate

from surflow.cli.common import build_data, build_flow, check_everything, user_error_behind
from surflow.cli.report import load_table_spec
from surflow.config import (
    PROFILES,
    RUNTIME_KEYS,
    compose,
    conf_dir,
    config_hash,
    project_root,
    resolved,
    run_dir,
)

CONF = Path(conf_dir())
SIZES = ["data.train_size=640", "data.valid_size=100", "data.test_size=100"]


def options(group: str) -> list[str]:
    found = (p.relative_to(CONF / group) for p in (CONF / group).rglob("*.yaml"))
    return sorted(p.with_suffix("").as_posix() for p in found if not p.name.startswith("_"))


def spec_of(experiment: str):
    """The table of an experiment, and its rows that run it."""
    spec = load_table_spec(experiment.split("/")[0])
    return spec, [row for row in spec.rows if row.experiment == experiment]


def build(cfg):
    """Data, flow, optimizer and schedule of a config, as training builds them."""
    check_everything(cfg)
    data = build_data(cfg)
    flow = build_flow(cfg, data)
    plain = {k: {**resolved(cfg)[k]} for k in ("optimizer", "schedule")}
    for group in plain.values():
        group.pop("name")
    optimizer = instantiate(plain["optimizer"])(flow.parameters())
    schedule = instantiate({**plain["schedule"], "_partial_": True})(
        optimizer, total_steps=10, steps_per_epoch=5
    )
    return data, flow, optimizer, schedule


# Experiments


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("profile", PROFILES)
def test_experiment_builds_for_every_column(experiment, profile):
    spec, rows = spec_of(experiment)
    assert rows, f"no row of {spec.path} runs {experiment}"
    for row in rows:
        for column in spec.columns:
            cell = [f"experiment={experiment}", *row.overrides, *column.overrides]
            cfg = compose([*cell, f"profile={profile}", *SIZES])
            assert cfg.artefact == spec.artefact
            assert cfg.row == row.name
            assert cfg.profile.name == profile
            data, flow, optimizer, schedule = build(cfg)
            x = data.splits["train"][: cfg.data.batch_size]
            assert flow.log_prob(x).isfinite().all()
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert trained == {id(p) for p in flow.parameters()}
            assert schedule.get_last_lr()[0] > 0


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_says_what_it_is(experiment):
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert head.startswith("# @package _global_\n")
    assert f"experiment={experiment}" in head
    assert "seed" in resolved(compose([f"experiment={experiment}"]))


def test_paper_budget_is_never_smaller():
    for experiment in options("experiment"):
        budgets = []
        for profile in PROFILES:  # paper, short, smoke
            cfg = compose([f"experiment={experiment}", f"profile={profile}"])
            budgets.append(cfg.trainer.max_epochs * cfg.data.train_size)
        assert budgets == sorted(budgets, reverse=True), (experiment, budgets)


def test_every_table_cell_names_an_experiment_that_exists():
    tables = sorted((project_root() / "experiments").glob("*/table.yaml"))
    assert tables
    known = options("experiment")
    for path in tables:
        for row in yaml.safe_load(path.read_text())["rows"]:
            assert row["experiment"] in known, path


# Groups


ALL_MODELS = options("model")
PLAIN_MODELS = [m for m in ALL_MODELS if "/" not in m]


@pytest.mark.parametrize("model", [m for m in ALL_MODELS if "/" in m])
@pytest.mark.parametrize("surjection", ["none", "abs"])
def test_unified_model(model, surjection):
    """A model of conf/model/<folder> stands by itself, or behind a surjection and its support."""
    data = "quantized_gaussians" if model.endswith("dequantization") else "corners"
    overrides = [f"data={data}", f"model={model}", f"surjection={surjection}", *SIZES]
    if surjection == "abs":
        overrides.append("model.support=real_line")
    cfg = compose(overrides)
    if surjection == "abs" and data == "quantized_gaussians":
        with pytest.raises(ValueError, match="takes integers: expected surjection=none"):
            build(cfg)
        return
    built, flow, _, _ = build(cfg)
    x = built.splits["train"][:128]
    if surjection == "abs" and model.endswith("rad"):  # its intervals cut a square, not the plane
        with pytest.raises(ValueError, match=r"IntervalFold.forward: expected coordinate 0 in"):
            flow.log_prob(x)
        return
    log_prob = flow.log_prob(x)
    assert log_prob.shape == (128,)
    assert log_prob.isfinite().all()
    sample = flow.sample(50)
    assert sample.shape == (50, 2)
    assert sample.dtype == built.splits["train"].dtype


@pytest.mark.parametrize("surjection", options("surjection"))
@pytest.mark.parametrize("model", PLAIN_MODELS)
@pytest.mark.parametrize("data", ["checkerboard", "corners"])
def test_model_and_surjection(data, model, surjection):
    overrides = [f"data={data}", f"model={model}", f"surjection={surjection}", *SIZES]
    refused = {}
    for support in ("unmapped", "real_line"):
        try:
            built, flow, _, _ = build(compose([*overrides, f"model.support={support}"]))
        except Exception as error:
            root = user_error_behind(error)
            assert root is not None, repr(error)
            refused[support] = str(root)
            continue
        log_prob = flow.log_prob(built.splits["train"][:128])
        assert log_prob.shape == (128,)
        assert log_prob.dtype == torch.float32
        assert log_prob.isfinite().all()
        sample = flow.sample(50)
        assert sample.shape == (50, *built.event_shape)
        assert sample.isfinite().all()
    if surjection == "none":
        assert not refused
    elif surjection == "abs_generative":  # for data >= 0, and these are not
        assert all("is for data >= 0" in text for text in refused.values())
        assert len(refused) == 2
    else:
        assert list(refused) == ["unmapped"]
        assert "expected real_line" in refused["unmapped"]


IMAGES = [n for n in options("data") if "- _images" in (CONF / f"data/{n}.yaml").read_text()]


@pytest.mark.parametrize("name", sorted({*options("data")} - {*IMAGES}))  # test_image_data.py
def test_data_group(name):
    cfg = compose([f"data={name}", *SIZES])
    data = build_data(cfg)
    assert cfg.data.name == name
    assert tuple(cfg.data.event_shape) == tuple(data.event_shape)
    sizes = {split: len(x) for split, x in data.splits.items()}
    assert sizes == {"train": 640, "valid": 100, "test": 100}
    low, high = (torch.tensor(edge) for edge in data.box)
    for x in data.splits.values():
        assert x.shape[1:] == tuple(data.event_shape)
        assert x.isfinite().all()
        assert ((x >= low) & (x <= high)).all()
    assert math.isfinite(data.floor.value)


@pytest.mark.parametrize("group", ["optimizer", "schedule", "trainer", "logger", "profile"])
def test_group_options_compose(group):
    for option in options(group):
        cfg = compose([f"{group}={option}", *SIZES])
        assert cfg.profile.name in PROFILES
        if group in ("optimizer", "schedule"):
            assert cfg[group].name == option
            build(cfg)


# Names of runs


@pytest.mark.parametrize(
    "override",
    [
        "logger=csv",
        "run.root=elsewhere",
        "run.force=true",
        "run.pictures=false",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.compile=false",
        "trainer.threads=1",
        "trainer.log_every=7",
        "trainer.finite_check_every=3",
        "data.eval_batch_size=17",
    ],
)
def test_hash_leaves_out_how_a_run_is_carried_out(override):
    assert override.split("=")[0] in RUNTIME_KEYS or override.startswith("run.")
    assert config_hash(compose([override])) == config_hash(compose())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "profile=short",
        "data=corners",
        "data.train_size=1000",
        "data.batch_size=64",
        "data.data_seed=1",
        "model=spline_flow",
        "model.num_couplings=5",
        "model.net.hidden_features=[200,101]",
        "surjection=abs",
        "optimizer=adamw",
        "optimizer.lr=0.002",
        "schedule=cosine",
        "schedule.warmup_steps=1",
        "objective.unit=bpd",
        "trainer.max_epochs=11",
        "trainer.precision=bf16-mixed",
        "trainer.ema_decay=0.99",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=1.0",
        "row=other",
    ],
)
def test_hash_holds_what_a_run_computes(override):
    assert config_hash(compose([override])) != config_hash(compose())


def test_evaluate_and_sample_name_the_same_run():
    overrides = ["experiment=synthetic/flow", "data=corners", "seed=3", "profile=smoke"]
    wanted = config_hash(compose(overrides))
    assert config_hash(compose([*overrides, "split=valid"], "evaluate")) == wanted
    assert config_hash(compose([*overrides, "n=3", "temperature=0.5"], "sample")) == wanted


def test_run_dir():
    cfg = compose(
        ["experiment=synthetic/flow", "data=corners", "profile=smoke", "seed=4", "run.root=r"]
    )
    name = f"seed4-{config_hash(cfg)[:8]}"
    assert run_dir(cfg) == Path("r/smoke/synthetic/flow/corners") / name


# Resolvers


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ("{paper:10,short:5,smoke:2}", [10, 5, 2]),
        ("{paper:10,smoke:2}", [10, 10, 2]),
        ("{paper:10}", [10, 10, 10]),
        ("{paper:10,short:5}", [10, 5, 5]),
    ],
)
def test_per_profile(values, wanted):
    key = f"trainer.max_epochs='${{per_profile:{values}}}'"
    got = [compose([key, f"profile={p}"]).trainer.max_epochs for p in PROFILES]
    assert got == wanted


def test_per_profile_without_a_value():
    cfg = compose(["trainer.max_epochs='${per_profile:{smoke:1}}'", "profile=paper"])
    with pytest.raises(Exception, match="no value for profile 'paper' among"):
        _ = cfg.trainer.max_epochs


def test_by():
    key = "model.num_couplings='${by:${data.name},{corners:3},7}'"
    assert compose([key, "data=corners"]).model.num_couplings == 3
    assert compose([key, "data=checkerboard"]).model.num_couplings == 7
