"""Handwritten digits: formats, binarization, batches, splits, configs, errors."""

import gzip
import hashlib
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from surflow.config import build, compose, config_hash
from surflow.data import mnist
from surflow.data.digits import BINARIZATIONS, draw_bits, thresholds
from surflow.data.downloads import Published
from surflow.data.embedded import Digits, GreyDigits
from surflow.data.mnist import MNIST, BinarizedMNIST, read_idx
from surflow.distributions import Bernoulli
from surflow.errors import UserError

TRAIN, TEST = 60, 20


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


# A small MNIST in the published format


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


def grey_images(n: int, seed: int) -> np.ndarray:
    """Random levels, a third of them 0 and a third 255."""
    random = np.random.default_rng(seed)
    levels = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    kind = random.integers(0, 3, (n, 28, 28))
    return np.where(kind == 0, 0, np.where(kind == 1, 255, levels)).astype(np.uint8)


ARRAYS = {
    "train-images-idx3-ubyte": grey_images(TRAIN, 0),
    "t10k-images-idx3-ubyte": grey_images(TEST, 1),
    "train-labels-idx1-ubyte": np.arange(TRAIN, dtype=np.uint8) % 10,
    "t10k-labels-idx1-ubyte": np.arange(TEST, dtype=np.uint8)[::-1] % 10,
}
FILES = {name: idx(array) for name, array in ARRAYS.items()}
PACKED = {name: gzip.compress(content, mtime=0) for name, content in FILES.items()}


class SmallMNIST(MNIST):
    """The class with the checksums of the small files."""

    unpacked = {name: md5(content) for name, content in FILES.items()}

    def published(self, name):
        mirrors = ("https://a.example/", "https://b.example/")
        return [Published(f"{name}.gz", md5(PACKED[name]), f"{m}{name}.gz") for m in mirrors]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in PACKED.items():
        (folder / f"{name}.gz").write_bytes(content)
    return folder.parents[1]


def small(root: Path, **others) -> SmallMNIST:
    keys = {"name": "mnist", "event_shape": [784], "batch_size": 8, "valid_size": 10, **others}
    data = SmallMNIST(root=str(root), **{"download": False, **keys})
    data.setup()
    return data


def test_idx_files_packed_or_not(root, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    for data in (small(root), small(tmp_path)):
        read = data.read()
        assert read["train"].shape == (TRAIN, 1, 28, 28)
        assert np.array_equal(read["train"][:, 0], ARRAYS["train-images-idx3-ubyte"])
        assert np.array_equal(read["test"][:, 0], ARRAYS["t10k-images-idx3-ubyte"])
        assert np.array_equal(data.labels("test"), ARRAYS["t10k-labels-idx1-ubyte"])
        assert np.array_equal(data.labels("valid"), ARRAYS["train-labels-idx1-ubyte"][-10:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected to begin with 0, 0, 8, got \[\]"),
        (idx(np.zeros(3, np.uint8))[:-1], r"expected \[3\] values, got 2"),
        (b"\0\0\x08\x02\0\0", r"idx: expected 2 dimensions, got 6 bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", r"got \[0, 0, 13\]"),
    ],
)
def test_what_is_no_idx_file(content, message):
    with pytest.raises(ValueError, match=message):
        read_idx(content)


# Thresholds and bits


def test_thresholds_are_bytes_with_those_beyond_the_limit_replaced():
    """Against a loop over the raw stream, byte by byte."""
    for most in (1, 3, 16, 100, 200, 255, 256):
        limit = 256 - 256 % most
        streams = [np.random.PCG64([5, 9, stage]).random_raw(600) for stage in range(40)]
        streams = [b"".join(int(w).to_bytes(8, "little") for w in s) for s in streams]
        got = list(streams[0][:500])
        stage = 1
        while bad := [i for i, u in enumerate(got) if u >= limit]:
            for k, i in enumerate(bad):
                got[i] = streams[stage][k]
            stage += 1
        expected = [u % most for u in got]
        assert thresholds(500, most, [5, 9]).tolist() == expected
        assert thresholds(123, most, [5, 9]).tolist() == expected[:123]


@pytest.mark.parametrize("most", [16, 200, 255])
def test_thresholds_are_uniform(most):
    n = 200_000
    counts = np.bincount(thresholds(n, most, [1]), minlength=most)
    assert len(counts) == most
    chi2 = ((counts - n / most) ** 2 / (n / most)).sum()
    assert abs(chi2 - (most - 1)) < 5 * (2 * (most - 1)) ** 0.5


def test_bits_have_the_probability_of_their_level():
    n = 4000
    levels = torch.arange(256, dtype=torch.uint8).expand(n, 256)
    mean = draw_bits(levels, 255, [3]).double().mean(0)
    p = torch.arange(256, dtype=torch.float64) / 255
    assert mean[0] == 0
    assert mean[255] == 1
    z = (mean - p)[1:-1] / (p * (1 - p) / n)[1:-1].sqrt()
    assert z.abs().max() < 4.5
    assert abs((z**2).mean().item() - 1) < 5 * (2 / 254) ** 0.5


def test_bits_of_a_pixel_say_nothing_about_another():
    bits = draw_bits(torch.full((20_000, 6), 100, dtype=torch.uint8), 255, [4]).double()
    assert (torch.corrcoef(bits.T) - torch.eye(6)).abs().max() < 4.5 / 20_000**0.5


def test_another_key_gives_other_bits():
    levels = torch.full((100, 8), 128, dtype=torch.uint8)
    drawn = [draw_bits(levels, 255, key) for key in ([1, 2], [2, 1], [1, 3])]
    for a, b in itertools.combinations(drawn, 2):
        assert (a != b).float().mean() > 0.4


# What a model is given


def levels_of(data, split: str) -> torch.Tensor:
    whole = data.read()
    parts = {"train": whole["train"][:-10], "valid": whole["train"][-10:], "test": whole["test"]}
    return parts[split].flatten(1)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("kind", sorted(BINARIZATIONS))
def test_values_of_every_split(root, split, kind):
    data = small(
        root, binarization=kind, num_levels=256 if kind == "none" else 2, event_shape=[1, 28, 28]
    )
    levels, got = levels_of(data, split).double(), data.splits[split].flatten(1).double()
    assert data.splits[split].shape[1:] == (1, 28, 28)
    assert data.splits[split].dtype == torch.float32
    if kind == "none":
        assert torch.equal(got, levels)
    elif kind == "grey":
        assert (got - levels / 255).abs().max() < 1e-7
    elif kind == "threshold":
        assert torch.equal(got, (levels >= 127.5).double())
    else:
        assert set(got.unique().tolist()) == {0.0, 1.0}
        assert (got[levels == 0] == 0).all()
        assert (got[levels == 255] == 1).all()
        p = levels / 255
        z = (got - p).sum() / (p * (1 - p)).sum().sqrt()
        assert abs(z) < 4.5


def test_dtype_is_what_was_asked_for(root):
    for dtype in (torch.float32, torch.uint8):
        data = small(root, dtype=str(dtype).removeprefix("torch."))
        for split in ("train", "valid"):
            assert data.splits[split].dtype == dtype
            assert next(iter(data.batches(split, 4))).dtype == dtype


def test_bits_drawn_once_depend_on_their_own_seed_alone(root):
    data = small(root, seed=1)
    other_run = small(root, seed=2, batch_size=4, event_shape=[1, 28, 28])
    other_draw = small(root, seed=1, binarization_seed=1)
    for split in ("train", "valid", "test"):
        assert torch.equal(data.splits[split], other_run.splits[split].flatten(1))
        assert not torch.equal(data.splits[split], other_draw.splits[split])
        assert data.fingerprint(split) != other_draw.fingerprint(split)


def test_an_image_keeps_its_bits_whatever_is_held_out_or_cut(root):
    data = small(root)
    other = small(root, valid_size=20, test_size=5)
    whole = torch.cat([data.splits["train"], data.splits["valid"]])
    assert torch.equal(torch.cat([other.splits["train"], other.splits["valid"]]), whole)
    assert torch.equal(other.splits["test"], data.splits["test"][::4])  # evenly spaced
    assert torch.equal(other.labels("test"), data.labels("test")[::4])


def test_train_and_validation_are_drawn_apart(root):
    """Equal images of two splits have bits of their own."""
    data = small(root)
    levels = torch.full((TEST, 1, 28, 28), 128, dtype=torch.uint8)
    drawn = [data._values(split, levels) for split in ("train", "test")]
    assert (drawn[0] != drawn[1]).float().mean() > 0.4


def test_validation_images_may_be_trained_on_too(root):
    data = small(root, valid_within_train=True)
    assert {s: len(x) for s, x in data.splits.items()} == {"train": 60, "valid": 10, "test": 20}
    assert torch.equal(data.splits["train"][-10:], data.splits["valid"])
    assert len(list(data.batches("train", 6))) == 10
    assert data.provenance()["binarization"]["valid_within_train"] is True


def test_a_cross_entropy_of_grey_values_is_the_mean_over_their_bits():
    """And its IWBO is at most the mean of theirs: log-sum-exp is convex. By enumeration."""
    grey, z = torch.tensor([0.0, 0.3, 0.8]), torch.randn(5, 3)
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    weight = torch.where(bits == 1, grey, 1 - grey).prod(1)

    def log_prob(x):  # under each of five decodings
        net = torch.nn.Identity()
        return Bernoulli(3, net=net).log_prob(x.expand(5, 3), z)

    mean = sum(w * log_prob(b) for w, b in zip(weight, bits, strict=True))
    assert torch.allclose(mean, log_prob(grey), atol=1e-6)
    iwbo = sum(w * log_prob(b).logsumexp(0) for w, b in zip(weight, bits, strict=True))
    assert log_prob(grey).logsumexp(0) < iwbo


# Batches


def epoch_of(data, epoch: int, batch_size: int = 10, seed: int | None = None, **keys):
    made = data.batches("train", batch_size, seed=seed, epoch=lambda: epoch, **keys)
    return [batch.clone() for batch in made]


def test_dynamic_bits_differ_between_epochs_and_runs_and_repeat(root):
    data = small(root)
    first, later = (torch.cat(epoch_of(data, e)) for e in (0, 1))
    other_run = torch.cat(epoch_of(small(root, seed=1), 0))
    grey = (levels_of(data, "train") > 0) & (levels_of(data, "train") < 255)
    for a, b in itertools.combinations([first, later, other_run, data.splits["train"]], 2):
        assert torch.equal(a[~grey], b[~grey])
        assert 0.2 < (a != b)[grey].float().mean() < 0.5
    assert torch.equal(torch.cat(epoch_of(small(root), 0)), first)
    epoch = [0]
    made = data.batches("train", 10, epoch=lambda: epoch[0])
    assert torch.equal(torch.cat(list(made)), first)
    epoch[0] = 1
    assert torch.equal(torch.cat(list(made)), later)


def test_dynamic_bits_average_to_the_grey_values(root):
    data = small(root, train_size=6, batch_size=6)
    epochs = 600
    mean = sum(torch.cat(epoch_of(data, e, 6)).double() for e in range(epochs)) / epochs
    p = data.levels.flatten(1).double() / 255
    assert (mean[p == 0] == 0).all()
    assert (mean[p == 1] == 1).all()
    grey = (p > 0) & (p < 1)
    z = ((mean - p) / (p * (1 - p) / epochs).sqrt())[grey]
    assert abs(z.mean().item()) < 4.5 / len(z) ** 0.5
    assert abs((z**2).mean().item() - 1) < 4.5 * (2 / len(z)) ** 0.5


def test_an_image_has_the_same_bits_in_any_batch_and_process(root):
    data = small(root)
    small_ones, large = (torch.cat(epoch_of(data, 3, n, seed=7)) for n in (5, 25))
    assert torch.equal(small_ones, large)
    shares = [epoch_of(data, 3, 10, seed=7, rank=r, world_size=2) for r in (0, 1)]
    joined = torch.cat([torch.cat(pair) for pair in zip(*shares, strict=True)])
    assert torch.equal(joined, large)
    # in the order of the epoch, each image with the bits that it has unshuffled
    order = data.batches("train", 50, seed=7, epoch=lambda: 3).rows._order(3)
    assert torch.equal(large, torch.cat(epoch_of(data, 3))[order])


@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_epoch_goes_on_with_the_same_bits(root, done):
    data = small(root)
    unbroken = epoch_of(data, 2, 10, seed=7)
    broken = data.batches("train", 10, seed=7, epoch=lambda: 2)
    for _ in zip(range(done), broken, strict=False):
        pass
    resumed = small(root).batches("train", 10, seed=7, epoch=lambda: 2)
    resumed.load_state_dict({"epoch": 2, "batches": done})
    rest = list(resumed)
    assert len(rest) == 5 - done
    assert all(torch.equal(a, b) for a, b in zip(rest, unbroken[done:], strict=True))


def test_other_batches_are_the_splits(root):
    for kind in ("dynamic", "grey"):
        data = small(root, binarization=kind)
        for split in ("valid", "test"):
            got = torch.cat(list(data.batches(split, 7)))
            assert torch.equal(got, data.splits[split])
    assert torch.equal(torch.cat(epoch_of(data, 1)), data.splits["train"])
    shares = [list(data.batches("valid", 4, rank=r, world_size=2, whole=True)) for r in (0, 1)]
    assert [[len(b) for b in share] for share in shares] == [[4, 2], [4, 0]]


def test_augmentation_moves_images_of_flat_data_too(root):
    flat = small(root, flip=True)
    shaped = small(root, flip=True, event_shape=[1, 28, 28])
    got, expected = (torch.cat(epoch_of(d, 0)) for d in (flat, shaped))
    assert torch.equal(got, expected.flatten(1))
    plain = torch.cat(epoch_of(small(root, event_shape=[1, 28, 28]), 0))
    mirrored = (expected == plain.flip(3)).flatten(1).all(1)
    same = (expected == plain).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 0 < mirrored.sum() < len(plain)


def test_what_a_table_must_know(root):
    data = small(root)
    assert data.num_dims == 784
    assert data.image_shape == (1, 28, 28)
    assert data.box == ([0.0] * 784, [1.0] * 784)
    assert data.unit == "nats"
    said = data.provenance()
    assert said["binarization"]["kind"] == "dynamic"
    assert said["binarization"]["seed"] == 0
    assert {s: v["rows"] for s, v in said["splits"].items()} == {
        "train": 50,
        "valid": 10,
        "test": 20,
    }
    grey = small(root, binarization="grey").provenance()["binarization"]
    assert "no likelihood" in grey["meaning"]
    assert "seed" not in grey


# Files of MNIST that are missing or damaged


def test_a_missing_file_says_which_and_where(tmp_path):
    with pytest.raises(UserError) as error:
        small(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    assert str(error.value).startswith(f"data.root: no file {path}; put train-images-idx3-ubyte.gz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_a_damaged_file_is_refused(root, tmp_path, suffix):
    name = "train-images-idx3-ubyte"
    content = PACKED[name] if suffix else FILES[name]
    (tmp_path / f"{name}{suffix}").write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name}{suffix} is damaged: expected md5 {md5(content)}"):
        small(tmp_path)


def test_download_goes_on_to_the_next_mirror(tmp_path, monkeypatch):
    asked = []

    def fetch(file, folder):
        asked.append(file.url)
        if file.url.startswith("https://a."):
            raise UserError("data.download: refused")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file.filename
        path.write_bytes(PACKED[file.filename.removesuffix(".gz")])
        return path

    monkeypatch.setattr(mnist, "fetch", fetch)
    data = small(tmp_path, download=True)
    assert len(data.splits["train"]) == 50
    assert [url[8] for url in asked] == ["a", "b", "a", "b"]
    assert len(list((tmp_path / "MNIST" / "raw").iterdir())) == 2  # no labels where none are asked


# The published binary MNIST


BITS = {
    split: np.random.default_rng(i).integers(0, 2, (n, 784), dtype=np.uint8)
    for i, (split, n) in enumerate({"train": 30, "valid": 12, "test": 12}.items())
}
TEXT = {
    split: b"".join(b" ".join(b"%d" % v for v in row) + b"\n" for row in bits.tolist())
    for split, bits in BITS.items()
}


class SmallBinarized(BinarizedMNIST):
    rows = {split: len(bits) for split, bits in BITS.items()}
    bits_sha256 = {
        split: hashlib.sha256(np.packbits(bits, axis=1).tobytes()).hexdigest()
        for split, bits in BITS.items()
    }
    text_md5 = {split: md5(text) for split, text in TEXT.items()}


def binarized(root: Path, **others) -> SmallBinarized:
    keys = {"name": "binarized_mnist", "event_shape": [784], "batch_size": 8, "download": False}
    data = SmallBinarized(root=str(root), **{**keys, **others})
    data.setup()
    return data


def write_npz(root: Path, splits=("train", "valid", "test")) -> Path:
    folder = root / "binarized_mnist"
    folder.mkdir(exist_ok=True)
    for split in splits:
        np.savez(folder / f"{split}.npz", bits=np.packbits(BITS[split], axis=1))
    return folder


def test_packed_and_text_files_hold_the_same_bits(tmp_path, capsys):
    packed, text, mixed = (tmp_path / name for name in ("packed", "text", "mixed"))
    for folder in (packed, text, mixed):
        folder.mkdir()
    write_npz(packed)
    for split, content in TEXT.items():
        (text / f"binarized_mnist_{split}.amat").write_bytes(content)
    write_npz(mixed, ["train", "test"])
    (mixed / "binarized_mnist" / "binarized_mnist_valid.amat").write_bytes(TEXT["valid"])
    for folder in (packed, text, text, mixed):
        capsys.readouterr()
        data = binarized(folder)
        for split, bits in BITS.items():
            assert data.splits[split].dtype == torch.float32
            assert np.array_equal(data.splits[split].numpy(), bits)
    kept = list((text / ".surflow").glob("*.npy"))
    assert sorted(p.stat().st_size - 128 for p in kept) == [12 * 98, 12 * 98, 30 * 98]
    assert {p.suffix for p in (text / ".surflow").iterdir()} == {".npy", ".lock"}
    capsys.readouterr()
    binarized(text)
    assert capsys.readouterr().err == ""  # the second time from the cache
    assert torch.cat(list(data.batches("train", 30))).equal(data.splits["train"])
    assert data.provenance()["binarization"] == {
        "kind": "published",
        "meaning": "binary images, one published draw",
    }
    assert data.labels("test") is None


def test_a_cut_of_the_sorted_test_split_is_spaced_over_it(tmp_path):
    write_npz(tmp_path)
    data = binarized(tmp_path, test_size=4)
    assert np.array_equal(data.splits["test"].numpy(), BITS["test"][[0, 3, 6, 9]])


def test_missing_or_damaged_bits_say_which_and_where(tmp_path):
    with pytest.raises(UserError) as error:
        binarized(tmp_path)
    folder = tmp_path / "binarized_mnist"
    assert str(error.value) == (
        f"data.root: no file {folder / 'train'}.npz; put it there, or binarized_mnist_train.amat "
        f"(md5 {SmallBinarized.text_md5['train']}) from {BinarizedMNIST.address}/"
        "binarized_mnist_train.amat"
    )
    write_npz(tmp_path)
    wrong = np.packbits(BITS["valid"], axis=1)
    wrong[3, 7] ^= 16
    np.savez(folder / "valid.npz", bits=wrong)
    with pytest.raises(UserError, match=r"valid\.npz does not hold the published valid bits"):
        binarized(tmp_path)
    np.savez(folder / "valid.npz", images=wrong)
    with pytest.raises(UserError, match=r"expected an array 'bits', got images"):
        binarized(tmp_path)
    (folder / "valid.npz").write_bytes(b"PK\3\4no")
    with pytest.raises(UserError, match=r"valid\.npz is damaged"):
        binarized(tmp_path)
    (folder / "valid.npz").unlink()
    (folder / "binarized_mnist_valid.amat").write_bytes(TEXT["valid"].replace(b"1", b"0", 1))
    with pytest.raises(UserError, match=r"binarized_mnist_valid\.amat is damaged: expected md5"):
        binarized(tmp_path)
    assert not list((folder / ".surflow").glob("*.npy"))


# Digits


def test_digits_are_those_of_the_plain_data():
    pytest.importorskip("sklearn")
    keys = {"name": "digits_binary", "event_shape": [64]}
    plain = Digits(name="digits", event_shape=[1, 8, 8], num_levels=17)
    plain.setup()
    data = GreyDigits(**keys, binarization="none", num_levels=17, dtype="uint8")
    data.setup()
    grey = GreyDigits(**keys, binarization="grey")
    grey.setup()
    half = GreyDigits(**keys, binarization="threshold")
    half.setup()
    bits = GreyDigits(**keys)
    bits.setup()
    for split, images in plain.splits.items():
        levels = images.flatten(1)
        assert torch.equal(data.splits[split], levels)
        assert torch.equal(grey.splits[split], levels / 16)
        assert torch.equal(half.splits[split], (levels >= 8).float())
        p = levels.double() / 16
        z = (bits.splits[split] - p).sum() / (p * (1 - p)).sum().sqrt()
        assert abs(z) < 4.5
    assert bits.labels("train")[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert [len(bits.labels(s)) for s in ("train", "valid", "test")] == [1297, 200, 300]
    with pytest.raises(ValueError, match="has a validation split of its own"):
        GreyDigits(**keys, valid_within_train=True).setup()


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"binarization": "dynamik"}, "one of none, dynamic, .*did you mean 'dynamic'"),
        ({"event_shape": [28, 28]}, r"mnist has \[1, 28, 28\] or \[784\], got \[28, 28\]"),
        ({"num_levels": 256}, "expected 2 with data.binarization=dynamic, got 256"),
        ({"binarization": "none", "num_levels": 2}, "expected 256 with .*=none, got 2"),
        ({"dtype": "int64"}, "data.dtype: expected float32 or uint8 with .*, got 'int64'"),
        ({"dtype": "uint8", "binarization": "grey"}, "expected float32 with .*=grey, got 'uint8'"),
        ({"binarization_seed": -1}, "data.binarization_seed: expected a whole number >= 0, got -1"),
        ({"valid_size": None}, "expected how many of the last training images to hold out"),
        ({"valid_size": 60}, "expected fewer than the 60 training images of mnist, got 60"),
    ],
)
def test_mistakes_are_named(root, options, message):
    with pytest.raises(ValueError, match=message) as error:
        small(root, **options)
    assert "\n" not in str(error.value)


# Configs


@pytest.mark.parametrize(
    "name", ["mnist", "mnist_grey", "binarized_mnist", "digits_binary", "digits_grey"]
)
def test_config_says_what_the_module_does(name, tmp_path):
    cfg = compose([f"data={name}", f"data.root={tmp_path}", "seed=3"])
    data = build(cfg.data, seed=cfg.seed)
    assert (data.name, data.unit, data.num_levels, data.seed) == (name, "nats", 2, 3)
    assert data.event_shape == (math.prod(data.image_shape),)
    assert data.root == tmp_path
    assert ("no likelihood" in data.rule.meaning) == name.endswith("grey")
    assert config_hash(cfg) == config_hash(compose([f"data={name}", "data.root=b", "seed=3"]))
    shape = list(data.image_shape)
    images = compose([f"data={name}", f"data.event_shape={shape}".replace(" ", "")])
    assert build(images.data).event_shape == data.image_shape


def test_config_of_levels():
    for name, levels in (("mnist", 256), ("digits_binary", 17)):
        cfg = compose([f"data={name}", "data.binarization=none", "data.dtype=uint8"])
        assert build(cfg.data).num_levels == levels


# The published files


@pytest.fixture
def published() -> str:
    folder = os.environ.get("SURFLOW_TEST_DATA")
    if not folder or not (Path(folder) / "MNIST").is_dir():
        pytest.skip("SURFLOW_TEST_DATA names no folder with MNIST")
    return folder


def test_checksums_are_those_that_torchvision_lists():
    from torchvision.datasets import MNIST as Facts

    data = MNIST(name="mnist", event_shape=[784])
    for file, expected in Facts.resources:
        for mirror in data.published(file.removesuffix(".gz")):
            assert mirror.filename == file
            assert mirror.md5 == expected
            assert mirror.url.endswith(f"/{file}")
    assert sorted(f"{n}.gz" for n in MNIST.unpacked) == sorted(f for f, _ in Facts.resources)


def test_published_mnist(published):
    keys = {"name": "mnist", "event_shape": [784], "valid_size": 10_000, "root": published}
    data = MNIST(**keys, download=False, dtype="uint8")
    data.setup()
    read = data.read()
    assert {s: (len(x), int(x.sum())) for s, x in read.items()} == {
        "train": (60_000, 1_567_298_545),
        "test": (10_000, 264_923_200),
    }
    assert read["train"][0].sum() == 27_525
    assert data.labels("train")[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.labels("test").bincount().tolist() == [
        *(980, 1135, 1032, 1010, 982),
        *(892, 958, 1028, 974, 1009),
    ]
    assert {s: len(x) for s, x in data.splits.items()} == {
        "train": 50_000,
        "valid": 10_000,
        "test": 10_000,
    }
    p = read["test"].double() / 255
    z = (data.splits["test"].double().sum() - p.sum()) / (p * (1 - p)).sum().sqrt()
    assert abs(z) < 4.5
    # the one draw that every run is scored on
    assert data.fingerprint("test").startswith("6bca92611e6622c4")


def test_published_bits(published):
    keys = {"name": "binarized_mnist", "event_shape": [784], "root": published, "dtype": "uint8"}
    data = BinarizedMNIST(**keys, download=False)
    data.setup()
    assert {s: len(x) for s, x in data.splits.items()} == data.rows
    assert {s: int(x.sum()) for s, x in data.splits.items()} == {
        "train": 5_118_041,
        "valid": 1_028_036,
        "test": 1_038_896,
    }
    # the images of MNIST's test split that can have given a row's bits: in the order of classes
    grey = MNIST(name="mnist", event_shape=[784], valid_size=1, root=published, download=False)
    levels, labels = grey.read()["test"].flatten(1), grey.read_labels()["test"]
    rows = data.splits["test"][::50].float()
    clash = rows @ (levels == 0).float().T + (1 - rows) @ (levels == 255).float().T
    possible = clash == 0
    assert possible.any(1).all()
    only = possible.sum(1) == 1
    assert only.sum() > 100
    classes = labels[possible[only].int().argmax(1)]
    assert (classes.diff() >= 0).all()
    assert classes.unique().tolist() == list(range(10))
