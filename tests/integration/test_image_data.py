"""Image data from configs, through training, resuming and scoring."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from surflow.compat import make_torchvision_importable
from surflow.config import build, compose, conf_dir, config_hash, target_of
from surflow.data.digits import DigitData
from surflow.data.images import ImageData
from surflow.data.published import CIFAR10
from surflow.distributions import StandardNormal, Uniform
from surflow.evaluation.likelihood import evaluate
from surflow.flow import Flow
from surflow.training.module import FlowModule
from surflow.training.run import Run
from surflow.training.schedules import constant
from surflow.transforms import ActNorm, Dequantization

make_torchvision_importable()

import pytorch_lightning as pl  # noqa: E402

DATA = Path(conf_dir()) / "data"
TARGETS = {p.stem: target_of(OmegaConf.load(p)) for p in DATA.glob("*.yaml")}
IMAGES = sorted(  # not flat
    name
    for name, kind in TARGETS.items()
    if issubclass(kind, ImageData) and not issubclass(kind, DigitData)
)
FOLDERS = ("image_arrays", "image_folder")
MODEL = ("model=pool_flow", "surjection=slice")


@pytest.fixture
def test_data() -> Path:
    """A folder of real image sets, such as cifar10_subset/train.npz, named by the environment."""
    folder = os.environ.get("SURFLOW_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SURFLOW_TEST_DATA names no folder of image sets")
    return Path(folder)


def write_set(root: Path, train: int = 40, shape=(3, 8, 8)) -> list[str]:
    """Random images as arrays, and the overrides that take them."""
    random = np.random.default_rng(0)
    for split, n in (("train", train), ("test", 12)):
        images = random.integers(0, 256, (n, *shape), dtype=np.uint8)
        (root / "set").mkdir(exist_ok=True)
        np.savez(root / "set" / f"{split}.npz", images=images)
    overrides = ["data=image_arrays", f"data.root={root}", "data.folder=set"]
    return [*overrides, f"data.event_shape={list(shape)}".replace(" ", "")]


def build_data(cfg):
    data = build(cfg.data, seed=cfg.seed)
    data.setup()
    return data


# Configs


def test_the_data_sets_of_the_published_tables_are_there():
    assert {"cifar10", "imagenet32", "imagenet64", "svhn", "photo_patches", "digits"} <= {*IMAGES}


@pytest.mark.parametrize("name", IMAGES)
def test_config_says_what_the_module_does(name, tmp_path):
    folder = ["data.folder=set"] if name in FOLDERS else []
    cfg = compose([*MODEL, f"data={name}", f"data.root={tmp_path}", *folder])
    run = Run(cfg)
    data = run.data
    assert data.name == (name if name not in FOLDERS else "set")
    assert run.unit == "bpd"
    assert Run(compose([*MODEL, f"data={name}", *folder, "objective.unit=nats"])).unit == "nats"
    assert config_hash(cfg) == config_hash(
        compose([*MODEL, f"data={name}", "data.root=b", *folder])
    )
    assert config_hash(cfg) != config_hash(compose([*MODEL, f"data={name}", "data.pad=7", *folder]))
    shapes = {"digits": (1, 8, 8), "imagenet64": (3, 64, 64)}
    assert data.event_shape == data.image_shape == shapes.get(name, (3, 32, 32))
    assert data.num_dims == math.prod(data.event_shape)
    assert data.num_levels == (17 if name == "digits" else 256)
    assert data.root == tmp_path
    published = (True, 2, 0.04) if name in ("cifar10", "cifar10_subset") else (False, 0, 0.0)
    a = data.augmentation
    assert (a.flip, a.pad, a.translate) == published


@pytest.mark.parametrize("name", ["photo_patches", "digits"])
def test_embedded_data_build_and_take_sizes(name):
    pytest.importorskip("sklearn")
    sizes = {"train": 640, "valid": 100, "test": 100}
    data = build_data(
        compose([*MODEL, f"data={name}", *(f"data.{k}_size={n}" for k, n in sizes.items())])
    )
    assert {split: len(x) for split, x in data.splits.items()} == sizes
    low, high = (torch.tensor(edge) for edge in data.box)
    for x in data.splits.values():
        assert ((x.flatten(1) >= low) & (x.flatten(1) <= high)).all()


def test_the_environment_names_the_root(monkeypatch, tmp_path):
    overrides = [o for o in write_set(tmp_path) if "root" not in o]
    monkeypatch.setenv("SURFLOW_DATA", str(tmp_path))
    data = build_data(compose([*overrides, "data.valid_size=5"]))
    assert {s: len(x) for s, x in data.splits.items()} == {"train": 35, "valid": 5, "test": 12}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=cifar10", "data.download=false"], "no CIFAR-10 in ROOT: expected cifar-10-batches"),
        (["data=svhn", "data.download=false"], "no file ROOT/svhn/train_32x32.mat; put"),
        (["data=imagenet32"], "no folder ROOT; expected imagenet32/ in it with train_32x32/"),
        (["data=imagenet64", "data.release=npz"], "in it with train_data_batch_1.npz to _10.npz"),
        (
            ["data=imagenet64", "data.release=zip"],
            "data.release: expected one of png, npz, got 'zip'",
        ),
        (["data=image_folder", "data.folder=mine"], "no folder ROOT/mine; expected one of image"),
        (["data=image_arrays", "data.folder=mine"], "expected train.npz, .npy or .safetensors in"),
        (["data=image_arrays"], "data.folder"),
        (["data=digits", "data.event_shape=[1,16,16]"], "expected uint8 (N, 1, 16, 16), got uint8"),
        (["data=photo_patches", "data.stride=0"], "data.stride: expected a positive whole number"),
        (["data=cifar10", "data.pad=1", "data.translate=0.2"], "data.pad >= 7, got 1"),
    ],
)
def test_a_mistake_is_one_line(call, tmp_path, overrides, message):
    root = tmp_path / "nothing"
    out = call(
        "train", *MODEL, *overrides, f"data.root={root}", f"run.root={tmp_path}", "logger=csv"
    )
    assert out.code == 2
    lines = out.err.strip().splitlines()
    assert len(lines) == 1, out.err
    assert lines[0].startswith("surflow: error: ")
    assert message.replace("ROOT", str(root)) in lines[0]


# Training


class Recorder(FlowModule):
    """Keeps every training batch with its epoch."""

    def __init__(self, *args, **keys):
        super().__init__(*args, **keys)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.clone()))
        return super().training_step(batch, batch_idx)


class SaveAt(pl.Callback):
    """A checkpoint after so many steps, at the end of the batch or of the epoch."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and self.step % trainer.num_training_batches:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(tmp_path, overrides, epochs=3, save_at=None, ckpt=None):
    """Train a small flow, 4 steps an epoch; returns the module, which kept its batches."""
    torch.manual_seed(0)
    data = build_data(compose([*overrides, "data.batch_size=8", "data.valid_size=6", "seed=3"]))
    flow = Flow(StandardNormal(data.event_shape), [Dequantization(data.num_levels), ActNorm(3)])
    module = Recorder(
        flow,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2),
        schedule=constant,
        unit=data.unit,
        num_dims=data.num_dims,
        seed=3,
    )
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=epochs,
        callbacks=[SaveAt(save_at, tmp_path / "stopped.ckpt")],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return module


AUGMENTED = ("data.flip=true", "data.pad=2", "data.translate=0.1")


@pytest.mark.parametrize("step", [4, 6])
def test_a_resumed_run_sees_what_the_unbroken_one_saw(tmp_path, step):
    """From a checkpoint between epochs, and from one within; order and augmentation go on."""
    overrides = [*write_set(tmp_path), *AUGMENTED]
    unbroken = fit(tmp_path, overrides, save_at=step)
    assert [e for e, _ in unbroken.seen] == [0] * 4 + [1] * 4 + [2] * 4
    resumed = fit(tmp_path, overrides, ckpt=tmp_path / "stopped.ckpt")
    expected = unbroken.seen[step:]
    assert [e for e, _ in resumed.seen] == [e for e, _ in expected]
    for (_, a), (_, b) in zip(resumed.seen, expected, strict=True):
        assert torch.equal(a, b)
    if step == 4:  # the noise of an epoch begins with the epoch
        state = resumed.flow.state_dict()
        assert all(torch.equal(state[k], v) for k, v in unbroken.flow.state_dict().items())


def test_training_is_scored_in_bits_a_dimension(tmp_path):
    module = fit(tmp_path, write_set(tmp_path), epochs=2)
    assert module.val_key == "val/elbo_bpd"
    data = build_data(compose([*write_set(tmp_path), "data.valid_size=6"]))
    torch.manual_seed(0)
    nats = -module.flow.eval().log_prob(data.splits["valid"]).mean().item()
    assert module.last_val == pytest.approx(nats / (192 * math.log(2)), abs=0.02)


def test_validation_images_are_never_augmented_or_shuffled(tmp_path):
    data = build_data(compose([*write_set(tmp_path), *AUGMENTED, "data.valid_size=6"]))

    class Keep(pl.LightningModule):
        seen = []

        def training_step(self, batch, i):
            return None

        def validation_step(self, batch, i):
            self.seen.append(batch.clone())

        def configure_optimizers(self):
            return None

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_train_batches=1,
    )  # fmt: skip
    trainer.fit(Keep(), datamodule=data)
    assert torch.equal(torch.cat(Keep.seen), data.splits["valid"])


# Scores


def test_dequantization_takes_bytes_and_gives_them_back():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8))
    images.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)  # every level
    flow = Flow(StandardNormal((3, 8, 8)), [Dequantization(256)])
    scores = []
    for x in (images, images.long()):
        torch.manual_seed(0)
        scores.append(flow.log_prob(x))
    assert torch.equal(*scores)
    assert torch.equal(flow.decode(flow.encode(images)), images.long())


def test_a_uniform_model_needs_log2_k_bits_a_dimension():
    pytest.importorskip("sklearn")
    data = build_data(compose([*MODEL, "data=digits"]))
    flow = Flow(Uniform(data.event_shape), [Dequantization(data.num_levels)])
    estimates, _ = evaluate(flow, data.splits["test"], 128, unit=data.unit)
    assert estimates["test/elbo_bpd"].value == pytest.approx(math.log2(17), abs=1e-5)


# Real images, where there are some


def test_exact_cifar_subset(test_data):
    folder = test_data / "cifar10_subset"
    if not folder.is_dir():
        pytest.skip("no cifar10_subset")
    overrides = ["data=image_arrays", f"data.root={test_data}", "data.folder=cifar10_subset"]
    data = build_data(compose(overrides))
    assert {s: len(x) for s, x in data.splits.items()} == {
        "train": 4585,
        "valid": 500,
        "test": 1017,
    }
    published = np.load(folder / "train.npz")["images"]
    kept = torch.cat([data.splits["train"], data.splits["valid"]])
    assert np.array_equal(kept.numpy(), published)
    rows = [x.numpy().tobytes() for s in data.splits.values() for x in s]
    assert len({*rows}) == 4585 + 500 + 1017  # no image in two splits
    flow = Flow(StandardNormal((3, 32, 32)), [Dequantization(256)])
    batch = data.splits["test"][:100]
    assert torch.equal(flow.decode(flow.encode(batch)), batch.long())


def test_whole_cifar(test_data):
    places = (test_data, test_data / "cifar10")
    names = (CIFAR10.folder, "cifar-10-python.tar.gz")
    if not any((p / n).exists() for p in places for n in names):
        pytest.skip("no CIFAR-10 release")
    data = build_data(
        compose([*MODEL, "data=cifar10", f"data.root={test_data}", "data.download=false"])
    )
    sizes = {s: len(x) for s, x in data.splits.items()}
    assert sizes == {"train": 45_000, "valid": 5_000, "test": 10_000}
    # the mean of the 50,000 images, as is published for their normalisation
    whole = torch.cat([data.splits["train"], data.splits["valid"]])
    mean = whole.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)
