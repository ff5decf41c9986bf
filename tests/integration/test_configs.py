"""Every config composes and builds; what names a run follows from what it computes."""

import inspect
import math
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from surflow.cli.common import build_data, build_flow, check_everything, user_error_behind

from surflow.cli.report import load_table_spec
from surflow.config import (
    ADDED_LATER,
    PROFILES,
    RUNTIME_KEYS,
    compose,
    conf_dir,
    config_hash,
    project_root,
    resolved,
    run_dir,
)
from surflow.errors import UserError
from surflow.models import ORDERS, pool_flow, set_flow
from surflow.models.downsampling import max_pool, slice_off
from surflow.transforms import MaxPool2d

CONF = Path(conf_dir())
SIZES = ["data.train_size=640", "data.valid_size=100", "data.test_size=100"]


def options(group: str) -> list[str]:
    found = (p.relative_to(CONF / group) for p in (CONF / group).rglob("*.yaml"))
    return sorted(p.with_suffix("").as_posix() for p in found if not p.name.startswith("_"))


def spec_of(experiment: str):
    """The table of an experiment, and its rows that run it."""
    spec = load_table_spec(experiment.split("/")[0])
    return spec, [row for row in spec.rows if row.experiment == experiment]


def content(group: str, option: str) -> dict:
    return yaml.safe_load((CONF / group / f"{option}.yaml").read_text())


def of_images(cfg) -> bool:
    return len(cfg.data.event_shape) == 3


def from_files(cfg) -> bool:
    """Whether the data are no part of a fresh checkout."""
    embedded = (
        "photo_patches", "digits_grey", "digits_binary", "digits_levels", "spatial_digits"
    )  # fmt: skip
    return "root" in cfg.data and cfg.data.name not in embedded


def build(cfg):
    """Data, flow, optimizer and schedule of a config, as training builds them."""
    check_everything(cfg)
    data = build_data(cfg)
    flow = build_flow(cfg, data)
    plain = {k: {**resolved(cfg)[k]} for k in ("optimizer", "schedule")}
    for group in plain.values():
        group.pop("name")
    optimizer = instantiate(plain["optimizer"])(flow.parameters())
    epochs = cfg.trainer.max_epochs
    schedule = instantiate({**plain["schedule"], "_partial_": True})(
        optimizer, total_steps=1000 * epochs, steps_per_epoch=1000
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
            if profile not in column.profiles:
                continue
            cell = [f"experiment={experiment}", *row.overrides, *column.overrides]
            cfg = compose([*cell, f"profile={profile}"])
            assert cfg.artefact == spec.artefact
            assert cfg.row == row.name
            assert cfg.profile.name == profile
            if of_images(cfg):
                assert resolved(cfg)["model"]["builder"]["shape"] == list(cfg.data.event_shape)
            if from_files(cfg):  # and models too large for a test
                check_everything(cfg)
                continue
            if "root" in cfg.data:
                cfg = compose([*cell, f"profile={profile}", "data.train_size=256"])
            else:
                cfg = compose([*cell, f"profile={profile}", *SIZES])
            data, flow, optimizer, schedule = build(cfg)
            x = data.splits["train"][: cfg.data.batch_size]
            assert flow.log_prob(x).isfinite().all()
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert trained == {id(p) for p in flow.parameters()}
            optimizer.step()
            schedule.step()
            assert schedule.get_last_lr()[0] > 0


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_says_what_it_is(experiment):
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert head.startswith("# @package _global_\n")
    assert f"experiment={experiment}" in head
    assert "seed" in resolved(compose([f"experiment={experiment}"]))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_paper_budget_is_never_smaller(experiment):
    spec, _ = spec_of(experiment)
    budgets = []
    for profile in PROFILES:  # paper, short, smoke
        columns = [c for c in spec.columns if profile in c.profiles]
        if not columns:
            continue
        cfg = compose([f"experiment={experiment}", *columns[0].overrides, f"profile={profile}"])
        size = cfg.data.train_size
        budgets.append(cfg.trainer.max_epochs * (math.inf if size is None else size))
    assert budgets == sorted(budgets, reverse=True), (experiment, budgets)


@pytest.mark.parametrize("row", ["max_pool", "slice"])
def test_table4_is_the_published_protocol(row):
    """The architecture is the default of pool_flow, and the budget that of the paper's code."""
    epochs = {"cifar10": (550, 500), "imagenet32": (27, 25), "imagenet64": (22, 20)}
    for data, (whole, main) in epochs.items():
        cfg = compose([f"experiment=table4/{row}", f"data={data}"])
        builder = instantiate(cfg.model.builder)
        mine = dict(builder.keywords)
        published = {n: p.default for n, p in inspect.signature(pool_flow).parameters.items()}
        published |= {"shape": list(cfg.data.event_shape)}
        if data == "imagenet64":
            published |= {"num_scales": 3, "num_steps": 8}
        published.pop("downsampling")
        assert mine == published
        between = instantiate(cfg.surjection.downsampling)
        assert between.func is {"max_pool": max_pool, "slice": slice_off}[row]
        assert not between.keywords
        assert (cfg.trainer.max_epochs, cfg.schedule.main_epochs) == (whole, main)
        assert cfg.schedule.gamma == (0.995 if data == "cifar10" else 0.95)
        assert cfg.schedule.cooldown_lr == (2e-5 if data == "cifar10" else 5e-5)
        assert (cfg.schedule.warmup_steps, cfg.data.batch_size) == (5000, 32)
        assert (cfg.optimizer.name, cfg.optimizer.lr) == ("adamax", 1e-3)
        assert cfg.objective.iwbo_samples == (1000 if data == "cifar10" else 0)
        assert cfg.metrics.n == (50_000 if data == "cifar10" else 0)
        augmented = (cfg.data.flip, cfg.data.pad, cfg.data.translate)
        assert augmented == ((True, 2, 0.04) if data == "cifar10" else (False, 0, 0.0))


def test_recipes():
    for recipe, lost in (("as_written", False), ("as_executed", True)):
        cfg = compose(["experiment=table4/max_pool", f"recipe={recipe}"])
        assert cfg.schedule.warmup_overwrites_decay is lost
    published = compose(["experiment=table4/max_pool"])
    assert published.schedule.warmup_overwrites_decay  # the published models were trained so


def test_every_table_cell_names_an_experiment_that_exists():
    tables = sorted((project_root() / "experiments").glob("*/table.yaml"))
    assert tables
    known = options("experiment")
    for path in tables:
        rows = yaml.safe_load(path.read_text())["rows"]
        assert any("experiment" in row for row in rows)
        for row in rows:  # one without an experiment is only quoted
            assert row.get("experiment", known[0]) in known, path


# Groups


ALL_MODELS = options("model")
PLAIN_MODELS = [m for m in ALL_MODELS if "/" not in m]
IMAGE_MODELS = [m for m in PLAIN_MODELS if "shape" in content("model", m).get("builder", {})]
DIGIT_MODELS = ["vae_posterior", "vae_prior"]
SET_MODELS = [m for m in PLAIN_MODELS if "num_points" in content("model", m).get("builder", {})]
VECTOR_MODELS = sorted({*PLAIN_MODELS} - {*IMAGE_MODELS, *DIGIT_MODELS, *SET_MODELS})
DOWNSAMPLING = [s for s in options("surjection") if "downsampling" in content("surjection", s)]
VECTOR_SURJECTIONS = sorted({*options("surjection")} - {*DOWNSAMPLING})


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


TINY = {
    "pool_flow": "num_steps=1 mid_channels=4 depth=1 growth=4 dequant_steps=1 context_channels=2",
    "glow": "num_scales=2 num_steps=1 hidden_channels=8",
    "realnvp": "mid_channels=4 num_blocks=1",
}


def tiny(model: str) -> list[str]:
    return [f"model.{size}" for size in TINY.get(model, "").split()]


@pytest.mark.parametrize("surjection", options("surjection"))
def test_image_model_and_surjection(surjection):
    """pool_flow around any downsampling; anything else is refused in one line."""
    overrides = ["data=photo_patches", "data.train_size=32", "data.batch_size=4"]
    overrides += ["model=pool_flow", f"surjection={surjection}", *tiny("pool_flow")]
    cfg = compose(overrides)
    if surjection not in DOWNSAMPLING:
        with pytest.raises(UserError, match=f"surjection={surjection}: .*max_pool, slice"):
            build(cfg)
        return
    data, flow, _, _ = build(cfg)
    x = data.splits["train"][:3]
    log_prob = flow.log_prob(x)
    assert log_prob.isfinite().all()
    assert (log_prob.detach() > -3 * 3072 * math.log(256)).all()
    sample = flow.sample(2)
    assert sample.shape == (2, 3, 32, 32)
    assert sample.min() >= 0
    assert sample.max() <= 255


@pytest.mark.parametrize("model", ["glow", "realnvp"])
def test_image_model_without_a_surjection(model):
    overrides = ["data=photo_patches", "data.train_size=32", f"model={model}", *tiny(model)]
    data, flow, _, _ = build(compose(overrides))
    assert flow.log_prob(data.splits["train"][:3]).isfinite().all()
    for surjection in ("abs", "max_pool"):
        with pytest.raises(
            UserError, match=f"^surjection={surjection}: .*use.* surjection=none|dow"
        ):
            build(compose([*overrides, f"surjection={surjection}"]))


def test_a_downsampling_of_ones_own():
    """In a YAML file of one's own, surjection.downsampling may be any function of a shape."""
    overrides = ["data=photo_patches", "data.train_size=32", "model=pool_flow", "surjection=slice"]
    cfg = compose([*overrides, *tiny("pool_flow")])
    own = {"_target_": "doubles.own_downsampling", "_partial_": True}
    OmegaConf.update(cfg, "surjection.downsampling", own)
    _, flow, _, _ = build(cfg)
    assert any(isinstance(layer, MaxPool2d) for layer in flow.transforms)


@pytest.mark.parametrize("model", DIGIT_MODELS)
@pytest.mark.parametrize("data", ["digits_binary", "digits_grey", "digits_levels"])
def test_model_of_digits(data, model):
    likelihood = "categorical" if data == "digits_levels" else "bernoulli"
    overrides = [f"data={data}", f"model={model}", f"model.likelihood={likelihood}"]
    built, flow, _, _ = build(compose([*overrides, "data.train_size=256"]))
    x = built.splits["train"][:5]
    assert flow.log_prob(x).isfinite().all()
    assert flow.sample(3).shape == (3, 64)
    with pytest.raises(UserError, match=r"surjection=abs: .*surjection=none"):
        build(compose([*overrides, "surjection=abs"]))
    with pytest.raises(UserError, match=f"model={model} is for data of levels, and data=corners"):
        build(compose(["data=corners", f"model={model}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=photo_patches"], "model=coupling_flow is for vectors, and data=photo_patches"),
        (["model=pool_flow", "data=corners"], "model=pool_flow is for images, and data=corners"),
        (["surjection=max_pool"], "surjection=max_pool downsamples images, which model=coupl"),
        (["objective.annealed=joined"], "objective.annealed: .*did you mean 'joint'"),
        (["objective.beta_start=2"], "objective.beta_start: expected a number from 0 to 1, got 2"),
        (["objective.beta_start=0.5"], "objective.beta_start: 0.5 is of no effect without"),
        (["objective.beta_steps=-1"], "objective.beta_steps: expected 0 .none. or a whole"),
        (["objective.free_bits=-1"], "objective.free_bits: expected nats of at least 0, got -1"),
        (
            ["objective.free_bits=1", "objective.num_samples=2"],
            "objective.num_samples: expected 1 with annealing or free bits",
        ),
        (
            ["measures.samples.n=1"],
            "measures.samples.n: expected 0 .none. or at least 2 images, got 1",
        ),
        (
            ["measures.samples.n=5"],
            "measures.samples.n: scores of samples are for images, not data=checkerboard",
        ),
        (
            ["measures.samples.extractor=inceptoin"],
            "measures.samples.extractor: .*did you mean 'inception'",
        ),
        (
            ["measures.samples.reference=[tset]"],
            "measures.samples.reference: expected one of train, valid, test",
        ),
        (
            ["measures.samples.temperature=0"],
            "measures.samples.temperature: expected a positive number, got 0",
        ),
        (["weights.source=offcial"], "weights.source: .* did you mean 'official'"),
        (["weights.path=x"], "weights.path: of no effect without weights.source=official"),
        (["compute.memory=reversed"], "compute.memory: expected one of stored, reversible"),
        (["objective.scored=first"], "objective.scored: expected one of last, best"),
        (["trainer.checkpoint_minutes=0"], "trainer.checkpoint_minutes: expected a positive"),
        (["compute.channels_last=yes_please"], "compute.channels_last: expected auto, true or"),
    ],
)
def test_what_does_not_fit_together_is_named(overrides, message):
    with pytest.raises(UserError, match=message):
        build(compose([*overrides]))


@pytest.mark.parametrize("model", SET_MODELS)
@pytest.mark.parametrize("order", ORDERS)
def test_model_of_sets(model, order):
    sizes = ["model.num_flows=1", "model.features=8", "model.num_heads=2", "data.train_size=256"]
    overrides = ["data=spatial_digits", f"model={model}", f"model.order={order}", *sizes]
    data, flow, _, _ = build(compose(overrides))
    assert flow.log_prob(data.splits["train"][:5]).isfinite().all()
    assert flow.sample(3).shape == (3, 16, 2)
    with pytest.raises(UserError, match=r"surjection=abs: .*surjection=none"):
        build(compose([*overrides, "surjection=abs"]))
    with pytest.raises(UserError, match=f"model={model} is for sets of points, and data=corners"):
        build(compose(["data=corners", f"model={model}"]))


def test_pointcloud_is_the_published_protocol():
    """The architecture is the default of set_flow, and the budget that of the paper's code."""
    for row, dropout in (("sort", 0.2), ("permute", 0.1)):
        cfg = compose([f"experiment=pointcloud/{row}"])
        mine = dict(instantiate(cfg.model.builder).keywords)
        published = {n: p.default for n, p in inspect.signature(set_flow).parameters.items()}
        assert mine == {**published, "order": row, "dropout": dropout}
        assert (cfg.data.name, cfg.data.batch_size) == ("spatial_mnist", 128)
        assert (cfg.optimizer.name, cfg.optimizer.lr) == ("adam", 1e-3)
        assert (cfg.trainer.max_epochs, cfg.schedule.main_epochs) == (500, 500)
        assert (cfg.schedule.warmup_steps, cfg.schedule.gamma) == (2000, 0.995)
        assert cfg.schedule.warmup_overwrites_decay
        assert cfg.objective.iwbo_samples == 10
        written = compose([f"experiment=pointcloud/{row}", "recipe=as_written"])
        assert not written.schedule.warmup_overwrites_decay


@pytest.mark.parametrize("surjection", VECTOR_SURJECTIONS)
@pytest.mark.parametrize("model", VECTOR_MODELS)
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


IMAGES = [n for n in options("data") if "_synthetic" not in content("data", n)["defaults"]]


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
        assert cfg.profile.name in (*PROFILES, "auto")  # auto: `reproduce` chooses
        if group in ("optimizer", "schedule"):
            assert cfg[group].name == option
            if option == "staged":
                cfg = compose([f"{group}={option}", "trainer.max_epochs=550", *SIZES])
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
        "compute.compile=false",
        "compute.threads=1",
        "trainer.log_every_n_steps=7",
        "compute.finite_check_every=3",
        "compute.memory=reversible",
        "compute.channels_last=true",
        "trainer.checkpoint_minutes=5",
        "measures.samples.temperature=0.5",
        "measures.samples.weights=x.pth",
        "objective.scored=last",
        "data.eval_batch_size=17",
    ],
)
def test_hash_leaves_out_how_a_run_is_carried_out(override):
    key = override.split("=")[0]
    assert key in RUNTIME_KEYS or key.split(".")[0] in ("run", "metrics") or key in ADDED_LATER
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
        "objective.scored=best",
        "weights.source=official",
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
