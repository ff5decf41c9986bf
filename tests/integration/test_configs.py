"""Every config composes and builds; what names a run follows from what it computes."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from surflow.cli.request import table_spec
from surflow.config import (
    FREE,
    HASHED_GROUPS,
    PROFILES,
    build,
    compose,
    conf_dir,
    config_hash,
    nodes,
    options_of,
    project_root,
    resolved,
    run_dir,
    target_of,
)
from surflow.errors import UserError
from surflow.models import ORDERS, pool_flow, set_flow
from surflow.models.downsampling import max_pool, slice_off
from surflow.training.fit import flow_module, make_trainer
from surflow.training.loggers import CSVMetrics
from surflow.training.run import Run
from surflow.transforms import MaxPool2d

CONF = Path(conf_dir())
SIZES = ["data.train_size=640", "data.valid_size=100", "data.test_size=100"]


def options(group: str) -> list[str]:
    found = (p.relative_to(CONF / group) for p in (CONF / group).rglob("*.yaml"))
    return sorted(p.with_suffix("").as_posix() for p in found if not p.name.startswith("_"))


def spec_of(experiment: str):
    """The table of an experiment, and its rows that run it."""
    spec = table_spec(experiment.split("/")[0])
    return spec, [row for row in spec.rows if row.experiment == experiment]


def content(group: str, option: str) -> dict:
    return yaml.safe_load((CONF / group / f"{option}.yaml").read_text())


def needs_files(run) -> bool:
    """Whether the data are no part of a fresh checkout."""
    return (
        run.data.from_files
        and not type(run.data).__module__.endswith("embedded")
        and (run.data.name != "spatial_digits")
    )


def built(cfg):
    """Run, flow, optimizer and schedule of a config, as training builds them."""
    run = Run(cfg)
    flow = run.build_flow()
    optimizer = build(cfg.optimizer)(flow.parameters())
    epochs = cfg.trainer.max_epochs
    schedule = build(cfg.schedule)(optimizer, total_steps=1000 * epochs, steps_per_epoch=1000)
    return run, flow, optimizer, schedule


def defaults(function) -> dict:
    return {n: p.default for n, p in inspect.signature(function).parameters.items()}


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
            run = Run(cfg)
            if needs_files(run):  # and models too large for a test
                continue
            sizes = ["data.train_size=256"] if run.data.from_files else SIZES
            cfg = compose([*cell, f"profile={profile}", *sizes])
            run, flow, optimizer, schedule = built(cfg)
            x = run.data.splits["train"][: run.data.batch_size]
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
        size = Run(cfg).data.sizes["train"]
        budgets.append(cfg.trainer.max_epochs * (math.inf if size is None else size))
    assert budgets == sorted(budgets, reverse=True), (experiment, budgets)


@pytest.mark.parametrize("row", ["max_pool", "slice"])
def test_table4_is_the_published_protocol(row):
    """The architecture is the default of pool_flow, and the budget that of the paper's code."""
    epochs = {"cifar10": (550, 500), "imagenet32": (27, 25), "imagenet64": (22, 20)}
    for data, (whole, main) in epochs.items():
        cfg = compose([f"experiment=table4/{row}", f"data={data}"])
        run = Run(cfg)
        published = defaults(pool_flow)
        mine = {**published, **build(cfg.model, _partial_=True).keywords}
        published |= {"num_levels": 256, "shape": run.data.event_shape}
        mine |= run.builder_takes.of(run.data)
        if data == "imagenet64":
            published |= {"num_scales": 3, "num_steps": 8}
        assert mine == published
        between = build(cfg.surjection)
        assert between.func is {"max_pool": max_pool, "slice": slice_off}[row]
        assert not between.keywords
        assert (cfg.trainer.max_epochs, cfg.schedule.main_epochs) == (whole, main)
        assert cfg.schedule.gamma == (0.995 if data == "cifar10" else 0.95)
        assert cfg.schedule.cooldown_lr == (2e-5 if data == "cifar10" else 5e-5)
        assert (cfg.schedule.warmup_steps, run.data.batch_size) == (5000, 32)
        assert (cfg.optimizer._target_, cfg.optimizer.lr) == ("torch.optim.Adamax", 1e-3)
        assert cfg.objective.iwbo_samples == (1000 if data == "cifar10" else 0)
        assert cfg.measures.samples.n == (50_000 if data == "cifar10" else 0)
        augment = run.data.augmentation
        augmented = (augment.flip, augment.pad, augment.translate)
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


def takes(model: str):
    found = content("model", model)
    while "_target_" not in found:  # in the file that it begins with
        found = content("model", found["defaults"][0])
    return target_of(found).takes


def of_facts(*facts: str) -> list[str]:
    return [m for m in PLAIN_MODELS if {*facts} <= {*takes(m).facts}]


ALL_MODELS = options("model")
PLAIN_MODELS = [m for m in ALL_MODELS if "/" not in m]
IMAGE_MODELS = of_facts("shape")
DIGIT_MODELS = of_facts("features", "num_levels")
SET_MODELS = of_facts("num_points")
VECTOR_MODELS = sorted({*PLAIN_MODELS} - {*IMAGE_MODELS, *DIGIT_MODELS, *SET_MODELS})
DOWNSAMPLING = [
    s
    for s in options("surjection")
    if s != "none" and getattr(target_of(content("surjection", s)), "between", False)
]
VECTOR_SURJECTIONS = sorted({*options("surjection")} - {*DOWNSAMPLING})


@pytest.mark.parametrize("model", [m for m in ALL_MODELS if "/" in m])
@pytest.mark.parametrize("surjection", ["none", "abs"])
def test_unified_model(model, surjection):
    """A model of conf/model/<folder> stands by itself, or behind a surjection and its support."""
    data = "quantized_gaussians" if model.endswith("dequantization") else "corners"
    overrides = [f"data={data}", f"model={model}", f"surjection={surjection}", *SIZES]
    if surjection == "abs" and data == "quantized_gaussians":
        with pytest.raises(UserError, match=f"surjection=abs: model={model} takes none; use"):
            built(compose(overrides))
        inner = "model.model={_target_:surflow.models.unification.dequantization,_partial_:true}"
        after = ["model=unification/vae", inner, "model.model.num_levels=32"]
        with pytest.raises(ValueError, match="takes integers: expected surjection=none"):
            built(compose([*overrides, *after, "model.support=real_line"]))
        return
    if surjection == "abs":
        overrides.append("model.support=real_line")
    run, flow, _, _ = built(compose(overrides))
    x = run.data.splits["train"][:128]
    if surjection == "abs" and model.endswith("rad"):  # its intervals cut a square, not the plane
        with pytest.raises(ValueError, match=r"IntervalFold.forward: expected coordinate 0 in"):
            flow.log_prob(x)
        return
    log_prob = flow.log_prob(x)
    assert log_prob.shape == (128,)
    assert log_prob.isfinite().all()
    sample = flow.sample(50)
    assert sample.shape == (50, 2)
    assert sample.dtype == run.data.splits["train"].dtype


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
        with pytest.raises(UserError, match=f"surjection={surjection}: .*max_pool or slice"):
            built(cfg)
        return
    run, flow, _, _ = built(cfg)
    x = run.data.splits["train"][:3]
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
    run, flow, _, _ = built(compose(overrides))
    assert flow.log_prob(run.data.splits["train"][:3]).isfinite().all()
    for surjection in ("abs", "max_pool"):
        with pytest.raises(
            UserError, match=f"^surjection={surjection}: .*use.* surjection=none|dow"
        ):
            built(compose([*overrides, f"surjection={surjection}"]))


def test_a_downsampling_of_ones_own():
    """In a YAML file of one's own, a surjection may be any function or class of a shape."""
    overrides = ["data=photo_patches", "data.train_size=32", "model=pool_flow", "surjection=slice"]
    for target in ("doubles.own_downsampling", "surflow.transforms.MaxPool2d"):
        cfg = compose([*overrides, *tiny("pool_flow")])
        own = {"name": "own", "_target_": target, "_partial_": True}
        OmegaConf.update(cfg, "surjection", own)
        _, flow, _, _ = built(cfg)
        assert any(isinstance(layer, MaxPool2d) for layer in flow.transforms)


@pytest.mark.parametrize("model", DIGIT_MODELS)
@pytest.mark.parametrize("data", ["digits_binary", "digits_grey", "digits_levels"])
def test_model_of_digits(data, model):
    likelihood = "categorical" if data == "digits_levels" else "bernoulli"
    overrides = [f"data={data}", f"model={model}", f"model.likelihood={likelihood}"]
    run, flow, _, _ = built(compose([*overrides, "data.train_size=256"]))
    x = run.data.splits["train"][:5]
    assert flow.log_prob(x).isfinite().all()
    assert flow.sample(3).shape == (3, 64)
    with pytest.raises(UserError, match=r"surjection=abs: .*surjection=none"):
        built(compose([*overrides, "surjection=abs"]))
    with pytest.raises(UserError, match=f"model={model} is for data of levels, and data=corners"):
        built(compose(["data=corners", f"model={model}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data=photo_patches"],
            "model=coupling_flow is for vectors, and data=photo_patches is image data of",
        ),
        (
            ["model=pool_flow", "data=corners"],
            "model=pool_flow is for images, and data=corners is points data",
        ),
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
        (["+experiment.seed=1"], "experiment: of no effect; begin its file with # @package"),
        (["compute.memory=reversed"], "compute.memory: expected one of stored, reversible"),
        (["objective.scored=first"], "objective.scored: expected one of last, best"),
        (
            ["callbacks=timed_checkpoint", "callbacks.timed_checkpoint.minutes=-1"],
            "callbacks.timed_checkpoint.minutes: expected minutes >= 0, got -1",
        ),
        (["compute.channels_last=yes_please"], "compute.channels_last: expected auto, true or"),
    ],
)
def test_what_does_not_fit_together_is_named(overrides, message):
    with pytest.raises(UserError, match=message):
        built(compose([*overrides]))


@pytest.mark.parametrize("model", SET_MODELS)
@pytest.mark.parametrize("order", ORDERS)
def test_model_of_sets(model, order):
    sizes = ["model.num_flows=1", "model.features=8", "model.num_heads=2", "data.train_size=256"]
    overrides = ["data=spatial_digits", f"model={model}", f"model.order={order}", *sizes]
    run, flow, _, _ = built(compose(overrides))
    assert flow.log_prob(run.data.splits["train"][:5]).isfinite().all()
    assert flow.sample(3).shape == (3, 16, 2)
    with pytest.raises(UserError, match=r"surjection=abs: .*surjection=none"):
        built(compose([*overrides, "surjection=abs"]))
    with pytest.raises(UserError, match=f"model={model} is for sets of points, and data=corners"):
        built(compose(["data=corners", f"model={model}"]))


def test_pointcloud_is_the_published_protocol():
    """The architecture is the default of set_flow, and the budget that of the paper's code."""
    for row, dropout in (("sort", 0.2), ("permute", 0.1)):
        cfg = compose([f"experiment=pointcloud/{row}"])
        run, published = Run(cfg), defaults(set_flow)
        mine = {**published, **build(cfg.model, _partial_=True).keywords}
        assert mine == {**published, "order": row, "dropout": dropout}
        assert (cfg.data.name, run.data.batch_size) == ("spatial_mnist", 128)
        assert (cfg.optimizer._target_, cfg.optimizer.lr) == ("torch.optim.Adam", 1e-3)
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
            run, flow, _, _ = built(compose([*overrides, f"model.support={support}"]))
        except (UserError, ValueError) as error:
            refused[support] = str(error)
            continue
        log_prob = flow.log_prob(run.data.splits["train"][:128])
        assert log_prob.shape == (128,)
        assert log_prob.dtype == torch.float32
        assert log_prob.isfinite().all()
        sample = flow.sample(50)
        assert sample.shape == (50, *run.data.event_shape)
        assert sample.isfinite().all()
    if surjection == "none":
        assert not refused
    elif surjection == "abs_generative":  # for data >= 0, and these are not
        assert all("is for data >= 0" in text for text in refused.values())
        assert len(refused) == 2
    else:
        assert list(refused) == ["unmapped"]
        assert "expected real_line" in refused["unmapped"]


SYNTHETIC = [n for n in options("data") if not target_of(content("data", n)).from_files]


@pytest.mark.parametrize("name", SYNTHETIC)  # test_image_data.py
def test_data_group(name):
    cfg = compose([f"data={name}", *SIZES])
    data = Run(cfg).data
    data.setup()
    assert cfg.data.name == data.name == name
    sizes = {split: len(x) for split, x in data.splits.items()}
    assert sizes == {"train": 640, "valid": 100, "test": 100}
    low, high = (torch.tensor(edge) for edge in data.box)
    for x in data.splits.values():
        assert x.shape[1:] == tuple(data.event_shape)
        assert x.isfinite().all()
        assert ((x >= low) & (x <= high)).all()
    assert math.isfinite(data.floor.value)


GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "experiment")


@pytest.mark.parametrize("group", GROUPS)
def test_group_options_compose(group):
    for option in options(group):
        cfg = compose([f"{group}={option}"])
        assert cfg.profile.name in (
            *PROFILES,
            FREE,
            "auto",
            "default",
        )  # two that reproduce resolves
        for where, node in nodes(OmegaConf.to_container(cfg)):
            assert callable(target_of(node, where))


@pytest.mark.parametrize("group", ["optimizer", "schedule", "trainer", "callbacks", "logger"])
def test_group_options_build(group, tmp_path):
    for option in options(group):
        overrides = [f"{group}={option}", *SIZES, f"run.root={tmp_path}"]
        if option == "staged":
            overrides.append("trainer.max_epochs=550")
        if option in ("gpu", "ddp") and not torch.cuda.is_available():
            with pytest.raises(UserError, match=r"no CUDA device|no accelerator"):
                Run(compose(overrides))
            continue
        run, _, optimizer, schedule = built(compose(overrides))
        assert optimizer.defaults["lr"] > 0
        optimizer.step()  # the first step of a warm-up may have rate 0
        schedule.step()
        assert schedule.get_last_lr()[0] > 0
        if group == "callbacks":
            assert len(run.callbacks) == (option != "none")


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.stem))
def test_no_node_repeats_a_default(path):
    if "experiment" in path.parts:  # they say what was published
        return
    for where, node in nodes(yaml.safe_load(path.read_text())):
        known, _ = options_of(target_of(node))
        for key, value in node.items():
            default = known.get(key)
            default = list(default) if isinstance(default, tuple) else default
            repeated = type(value) is type(default) and value == default
            assert key == "name" or not repeated, (where, key)


def trainer_of(cfg):
    """Lightning's trainer of a config, without training."""
    run = Run(cfg)
    module = flow_module(run)
    csv = CSVMetrics(run.folder / "metrics.csv", [module.val_key])
    return make_trainer(run, module, run.times, csv)


def test_two_loggers_and_a_callback_of_lightnings(tmp_path, monkeypatch):
    from pytorch_lightning.callbacks import EarlyStopping
    from pytorch_lightning.loggers import CSVLogger, WandbLogger
    from pytorch_lightning.profilers import SimpleProfiler

    stop = "callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping"
    own = "logger.own._target_=pytorch_lightning.loggers.CSVLogger"
    trainer = trainer_of(
        compose(
            [
                *SIZES,
                f"run.root={tmp_path}",
                "trainer.accelerator=cpu",
                "compute.compile=false",
                f"+{stop}",
                "callbacks.stop.monitor=val/nll_nats",
                f"+{own}",
                f"logger.own.save_dir={tmp_path}",
                "profiler=simple",
            ]
        )
    )
    (early,) = (c for c in trainer.callbacks if isinstance(c, EarlyStopping))
    assert early.monitor == "val/nll_nats"
    assert isinstance(trainer.profiler, SimpleProfiler)
    kinds = [type(logger) for logger in trainer.loggers]
    assert kinds == [CSVMetrics, WandbLogger, CSVLogger]
    both = compose(["logger=[wandb,tensorboard]"]).logger
    assert list(both) == ["wandb", "tensorboard"]
    with pytest.raises(UserError, match=r"callbacks.stop.patiense: .*did you mean 'patience'"):
        Run(compose([f"+{stop}", "callbacks.stop.patiense=3"]))


@pytest.mark.parametrize(
    ("data", "size"), [("photo_patches", 32), ("digits", 8)], ids=["photo_patches", "digits"]
)
@pytest.mark.parametrize("option", ["kernel_size=4", "learn=true"])
def test_options_of_a_downsampling(data, size, option):
    overrides = [f"data={data}", "data.train_size=32", "data.batch_size=4", "model=pool_flow"]
    overrides += ["surjection=max_pool", f"surjection.{option}", *tiny("pool_flow")]
    run, flow, _, _ = built(compose(overrides))
    (pool,) = (layer for layer in flow.transforms if isinstance(layer, MaxPool2d))
    kernel = 4 if option == "kernel_size=4" else 2
    assert flow.base.event_shape[1:] == (size // 2 // kernel,) * 2
    assert bool(list(pool.parameters())) == (option == "learn=true")
    assert flow.log_prob(run.data.splits["train"][:3]).isfinite().all()


def test_changed_files_are_refused(call, tmp_path):
    """A run of other data is neither reused nor resumed."""

    def write(seed):
        random = np.random.default_rng(seed)
        for split, count in (("train", 48), ("test", 16)):
            images = random.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
            np.savez(tmp_path / "set" / f"{split}.npz", images=images)

    (tmp_path / "set").mkdir()
    overrides = [
        "data=image_arrays",
        "data.folder=set",
        f"data.root={tmp_path}",
        "data.event_shape=[3,8,8]",
        "data.valid_size=16",
        "data.batch_size=16",
        "model=pool_flow",
        "surjection=slice",
        *tiny("pool_flow"),
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        "compute.compile=false",
        "run.pictures=false",
        "logger=csv",
        f"run.root={tmp_path / 'runs'}",
    ]
    write(0)
    assert call("train", *overrides).code == 0
    assert "already complete" in call("train", *overrides).out
    write(1)
    (record,) = (tmp_path / "runs").rglob("record.json")
    before = record.read_bytes(), (record.parent / "last.ckpt").read_bytes()
    for state, line in (
        ("reused", "the data have changed since (train, valid, test: another SHA-256)"),
        ("resumed", "trained on other data (train, valid, test: another SHA-256)"),
    ):
        if state == "resumed":
            record.unlink()
        done = call("train", *overrides)
        assert done.code == 2
        assert len(done.err.splitlines()) == 1 and line in done.err, done.err
        assert "run.force=true" in done.err
        assert (record.parent / "last.ckpt").read_bytes() == before[1]
    assert call("evaluate", *overrides).code == 2
    write(0)
    assert call("train", *overrides).code == 0
    assert call("train", *overrides, "run.force=true").code == 0


# Hashes over options


def a_target(lr: float, width: int = 3):
    """A made-up target."""


def a_later_target(lr: float, width: int = 3, depth: int = 2, steps: tuple = (1, 2)):
    """The same, with two more options."""


@pytest.mark.parametrize("group", HASHED_GROUPS)
def test_a_new_option_with_a_default_changes_no_hash(group, monkeypatch):
    import surflow.models

    plain = resolved(compose())
    plain[group] = {"name": "x", "_target_": "surflow.models.made_up", "lr": 0.1}
    monkeypatch.setattr(surflow.models, "made_up", a_target, raising=False)
    before = config_hash(plain)
    assert config_hash({**plain, group: {**plain[group], "width": 3}}) == before
    assert config_hash({**plain, group: {**plain[group], "width": 4}}) != before
    monkeypatch.setattr(surflow.models, "made_up", a_later_target)
    assert config_hash(plain) == before
    at_default = {**plain[group], "depth": 2, "steps": [1, 2]}
    assert config_hash({**plain, group: at_default}) == before
    assert config_hash({**plain, group: {**at_default, "depth": 3}}) != before
    monkeypatch.setattr(a_later_target, "runtime", frozenset({"depth"}), raising=False)
    assert config_hash({**plain, group: {**at_default, "depth": 3}}) == before


@pytest.mark.parametrize("group", ["data", "optimizer", "schedule", "objective"])
def test_every_option_counts_unless_it_is_runtime(group):
    plain = resolved(compose())
    target = target_of(plain[group])
    known, _ = options_of(target)
    runtime = getattr(target, "runtime", ())
    for key, default in known.items():
        if key in ("name", "seed", "params", "optimizer", "total_steps", "steps_per_epoch"):
            continue
        changed = {**plain, group: {**plain[group], key: "other"}}
        assert (config_hash(changed) == config_hash(plain)) == (key in runtime), key
        if default is not inspect.Parameter.empty and key not in plain[group]:
            value = list(default) if isinstance(default, tuple) else default
            same = {**plain, group: {**plain[group], key: value}}
            assert config_hash(same) == config_hash(plain), key


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
        "callbacks=timed_checkpoint",
        "profiler=simple",
        "profile=short",
        "row=other",
        "artefact=other",
        "measures.samples.temperature=0.5",
        "measures.samples.weights=x.pth",
        "objective.scored=last",
        "data.eval_batch_size=17",
    ],
)
def test_hash_leaves_out_how_a_run_is_carried_out(override):
    assert config_hash(compose([override])) == config_hash(compose())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
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
        "callbacks=ema",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=1.0",
        "objective.scored=best",
        "weights.source=official",
        "model.map.scale=softplus",
        "data.edge=5",
        "trainer.max_steps=7",
        "trainer.limit_train_batches=0.5",
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
    with pytest.raises(Exception, match="no value for profile 'free' among"):
        _ = cfg.trainer.max_epochs


def test_by():
    key = "model.num_couplings='${by:${data.name},{corners:3},7}'"
    assert compose([key, "data=corners"]).model.num_couplings == 3
    assert compose([key, "data=checkerboard"]).model.num_couplings == 7
