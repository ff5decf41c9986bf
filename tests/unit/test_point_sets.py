"""Sets of points: how they are drawn, kept and configured, and what their scores are."""

import gzip
import hashlib
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from surflow.config import build, compose, config_hash
from surflow.data import point_sets
from surflow.data.downloads import Published
from surflow.data.embedded import Digits
from surflow.data.mnist import MNIST
from surflow.data.point_sets import SpatialDigits, SpatialMNIST, draw_points, other_units
from surflow.distributions import StandardNormal
from surflow.errors import UserError
from surflow.evaluation.likelihood import evaluate, per_point
from surflow.flow import Flow
from surflow.models import set_flow
from surflow.training.run import Run
from surflow.transforms import Affine

KEY = (3, 1)


def random_images(n: int, side: int = 6, ink: float = 0.6, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    levels = random.integers(1, 256, (n, side, side))
    levels = np.where(random.random((n, side, side)) < ink, levels, 0)
    levels[:, 0, 0] = 7  # some ink in every picture
    return levels.astype(np.uint8)


def pixels_of(points: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every point's pixel; y is upwards."""
    return side - 1 - np.floor(points[..., 1]).astype(int), np.floor(points[..., 0]).astype(int)


# Drawing


def test_points_lie_in_the_ink():
    images = random_images(50)
    points = draw_points(images, 9, KEY)
    assert points.shape == (50, 9, 2) and points.dtype == np.float32
    rows, columns = pixels_of(points, 6)
    assert (images[np.arange(50)[:, None], rows, columns] > 0).all()


def test_a_picture_is_drawn_the_right_way_up():
    image = np.zeros((1, 5, 5), np.uint8)
    image[0, 0, 4] = 9  # upper right
    ((x, y),) = draw_points(image, 1, KEY)[0]
    assert 4 <= x < 5 and 4 <= y < 5


def test_without_replacement_where_there_is_enough_ink():
    images = np.concatenate([random_images(200, ink=0.9), random_images(200, ink=0.1, seed=1)])
    points = draw_points(images, 9, KEY)
    rows, columns = pixels_of(points, 6)
    for image, row, column in zip(images, rows, columns, strict=True):
        found = len(set(zip(row.tolist(), column.tolist(), strict=True)))
        if (image > 0).sum() >= 9:
            assert found == 9
        else:
            assert found <= (image > 0).sum()
    assert {bool(k) for k in ((images > 0).sum((1, 2)) >= 9)} == {True, False}


def test_successive_pixels_have_the_probabilities_of_their_levels():
    """Of three pixels of levels 1, 2, 5: P(first i, then j) = (l_i / 8) (l_j / (8 - l_i))."""
    n = 40_000
    levels = np.array([1, 2, 5])
    images = np.zeros((n, 1, 3), np.uint8)
    images[:] = levels
    _, columns = pixels_of(draw_points(images, 2, KEY), 1)
    for i, j in itertools.permutations(range(3), 2):
        p = levels[i] / 8 * levels[j] / (8 - levels[i])
        share = ((columns[:, 0] == i) & (columns[:, 1] == j)).mean()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n), (i, j)


def test_with_replacement_pixels_have_the_probabilities_of_their_levels():
    n = 8000
    images = np.zeros((n, 1, 3), np.uint8)
    images[:] = [1, 0, 5]
    _, columns = pixels_of(draw_points(images, 4, KEY), 1)
    assert set(np.unique(columns)) == {0, 2}
    share = (columns == 0).mean(0)
    assert (np.abs(share - 1 / 6) < 4 * math.sqrt(5 / 36 / n)).all()


def test_jitter_is_uniform_and_exact():
    points = draw_points(random_images(4000), 9, KEY).astype(np.float64)
    within = (points - np.floor(points)).ravel()
    assert ((within >= 0) & (within < 1)).all()
    assert np.array_equal(within * 2**19, np.floor(within * 2**19))
    u = np.sort(within)
    distance = np.abs(u - (np.arange(len(u)) + 0.5) / len(u)).max()
    assert distance < 1.95 / math.sqrt(len(u))  # Kolmogorov and Smirnov, one in a thousand
    x, y = (points - np.floor(points)).reshape(-1, 2).T
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / math.sqrt(len(x))


def test_no_two_points_share_a_coordinate(monkeypatch):
    monkeypatch.setattr(point_sets, "_JITTER_BITS", 6)  # so coarse that many would
    images = random_images(300, ink=0.9)
    points = draw_points(images, 9, KEY)
    for axis in (0, 1):
        assert (np.diff(np.sort(points[..., axis], axis=1), axis=1) > 0).all()
    rows, columns = pixels_of(points, 6)
    assert (images[np.arange(300)[:, None], rows, columns] > 0).all()
    monkeypatch.setattr(point_sets, "_has_ties", lambda points: np.zeros(len(points), bool))
    assert (np.diff(np.sort(draw_points(images, 9, KEY), 1), axis=1) == 0).any()


def test_points_follow_from_key_and_row_alone():
    images = random_images(1100)
    points = draw_points(images, 9, KEY)
    assert np.array_equal(draw_points(images, 9, KEY), points)
    assert np.array_equal(draw_points(images[:700], 9, KEY), points[:700])  # within a block
    assert not np.array_equal(draw_points(images, 9, (3, 2)), points)
    assert draw_points(images[:0], 9, KEY).shape == (0, 9, 2)


def test_pictures_that_cannot_be_drawn_from():
    images = random_images(3)
    images[2] = 0
    with pytest.raises(ValueError, match="ink in every picture, got none in row 2"):
        draw_points(images, 4, KEY)
    with pytest.raises(ValueError, match="at most 32 x 32 pixels"):
        draw_points(np.ones((1, 33, 8), np.uint8), 4, KEY)


# SpatialMNIST


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


TRAIN, TEST = 60, 20
ARRAYS = {
    "train-images-idx3-ubyte": random_images(TRAIN, 28, 0.2),
    "t10k-images-idx3-ubyte": random_images(TEST, 28, 0.02, seed=1),
}
PACKED = {name: gzip.compress(idx(array), mtime=0) for name, array in ARRAYS.items()}


class SmallMNIST(MNIST):
    """The class with the checksums of the small files."""

    unpacked = {name: md5(idx(array)) for name, array in ARRAYS.items()}

    def published(self, name):
        return [Published(f"{name}.gz", md5(PACKED[name]), f"https://a.example/{name}.gz")]


class SmallSpatialMNIST(SpatialMNIST):
    valid_rows = 10

    def images(self):
        shape, root = [1, 28, 28], str(self.root)
        return SmallMNIST(name="mnist", event_shape=shape, root=root, download=False, valid_size=10)


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in PACKED.items():
        (folder / f"{name}.gz").write_bytes(content)
    return tmp_path


def spatial(root: Path, **others) -> SmallSpatialMNIST:
    keys = {"name": "spatial_mnist", "event_shape": [50, 2], "width": 28, "batch_size": 8}
    data = SmallSpatialMNIST(root=str(root), **{**keys, **others})
    data.setup()
    return data


def test_splits_are_those_of_the_pictures(root):
    data = spatial(root)
    assert {s: tuple(x.shape) for s, x in data.splits.items()} == {
        "train": (50, 50, 2),
        "valid": (10, 50, 2),
        "test": (20, 50, 2),
    }
    whole = draw_points(ARRAYS["train-images-idx3-ubyte"], 50, (0, 0))
    assert np.array_equal(data.splits["train"], whole[:50])
    assert np.array_equal(data.splits["valid"], whole[50:])
    test = draw_points(ARRAYS["t10k-images-idx3-ubyte"], 50, (0, 1))
    assert np.array_equal(data.splits["test"], test)
    low, high = data.box
    assert (low, high) == ([0.0] * 100, [28.0] * 100)
    cut = spatial(root, train_size=25)
    assert torch.equal(cut.splits["train"], data.splits["train"][::2])


def test_points_are_kept_with_recipe_and_checksums(root, capsys):
    data = spatial(root)
    assert f"drawing points into {data.file}, once" in capsys.readouterr().err
    recipe = json.loads(data.file.with_suffix(".json").read_text())
    assert (recipe["num_points"], recipe["seed"]) == (50, 0)
    assert list(recipe["source_md5"]) == ["t10k-images-idx3-ubyte", "train-images-idx3-ubyte"]
    for split, told in recipe["splits"].items():
        x = data.splits[split].numpy()
        digest = hashlib.sha256(str(x.shape).encode() + x.astype("<f4").tobytes()).hexdigest()
        assert told == {"rows": len(x), "sha256": digest}
    assert data.provenance()["splits"] == recipe["splits"]
    assert sorted(p.suffix for p in data.cache.iterdir()) == [".json", ".lock", ".npz"]

    for path in (root / "MNIST" / "raw").iterdir():
        path.unlink()
    again = spatial(root)  # from the cache alone
    assert capsys.readouterr().err == ""
    assert all(torch.equal(again.splits[s], x) for s, x in data.splits.items())
    with pytest.raises(UserError, match=r"data.root: no file .*train-images"):
        spatial(root, points_seed=1)  # which was not drawn
    with pytest.raises(UserError, match=r"data.root: no file"):
        spatial(root, event_shape=[20, 2])


@pytest.mark.parametrize("how", ["cut", "changed", "other recipe", "no recipe", "not a zip"])
def test_a_cache_that_is_not_its_recipes_is_drawn_again(root, how):
    data = spatial(root)
    recipe = data.file.with_suffix(".json")
    content = data.file.read_bytes()
    if how == "cut":
        data.file.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        arrays = dict(np.load(data.file))
        arrays["test"][3, 4, 1] += 0.5
        np.savez(data.file, **arrays)
    elif how == "other recipe":
        recipe.write_text(recipe.read_text().replace('"format": 1', '"format": 0'))
    elif how == "no recipe":
        recipe.unlink()
    else:
        data.file.write_bytes(b"points")
    again = spatial(root)
    assert all(torch.equal(again.splits[s], x) for s, x in data.splits.items())
    assert data.file.read_bytes() == content
    assert json.loads(recipe.read_text())["format"] == 1


def test_nothing_half_written_stays(root, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            spatial(root)
    assert [p.suffix for p in (root / "spatial_mnist").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_to(root, monkeypatch):
    def refused(self, *arguments, **keys):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match=r"data.cache: cannot write to .*; set data.cache=<folder>"):
        spatial(root)


def test_the_cache_may_lie_elsewhere(root, tmp_path):
    data = spatial(root, cache=str(tmp_path / "elsewhere"))
    assert data.file.parent == tmp_path / "elsewhere" and data.file.is_file()
    assert not (root / "spatial_mnist").exists()


CHECKSUMS = {
    "train": "406b590357f66cf4eb2f9845a2f0578a23f015fec535dad226277980144ebf37",
    "valid": "2553c65cf621ad57705ed79536b08676767a9050e6f1efca3b3bc8d055dc65bc",
    "test": "3b9313934ab054fca8f26ace4f5e160e6868ecec54d30497030dfbed307b23fe",
}


def test_the_points_of_mnist(tmp_path):
    """What every run of the table is trained and scored on."""
    folder = os.environ.get("SURFLOW_TEST_DATA")
    if not folder or not (Path(folder) / "MNIST").is_dir():
        pytest.skip("SURFLOW_TEST_DATA names no folder with MNIST")
    data = SpatialMNIST(root=folder, cache=str(tmp_path), download=False)
    data.setup()
    told = data.provenance()["splits"]
    assert {s: x["rows"] for s, x in told.items()} == {
        "train": 50_000,
        "valid": 10_000,
        "test": 10_000,
    }
    assert {s: x["sha256"] for s, x in told.items()} == CHECKSUMS


# Embedded digits


def test_embedded_digits():
    data = SpatialDigits(name="spatial_digits", event_shape=[16, 2], width=8)
    data.setup()
    assert [len(data.splits[s]) for s in ("train", "valid", "test")] == [1297, 200, 300]
    images = Digits(name="digits", event_shape=[1, 8, 8], num_levels=17).load()["valid"]
    rows, columns = pixels_of(data.splits["valid"].numpy(), 8)
    assert (images[:, 0].numpy()[np.arange(200)[:, None], rows, columns] > 0).all()
    sha256 = data.provenance()["splits"]["test"]["sha256"]
    assert sha256 == "cfb2877598de94bba08a23d0cd9e07032019d447768f3b92b27c9c752a8a52a4"


# Units


def test_a_density_in_other_units():
    """Uniform points: one per 28 x 28 square pixels, or per unit square."""
    flow = Flow(StandardNormal((5, 2)), [Affine((5, 2), scale=1.0)])
    x = torch.randn(3, 5, 2)
    wide = Flow(flow.base, [Affine((5, 2), scale=1 / 28)])
    for a, b in zip(wide.log_prob(28 * x) / 5, flow.log_prob(x) / 5, strict=True):
        assert other_units(a.item(), 28.0) == pytest.approx(b.item(), abs=1e-5)
    assert other_units(-2 * math.log(28), 28.0) == pytest.approx(0.0)


@pytest.mark.parametrize("order", ["sort", "permute"])
def test_scores_a_point(order):
    flow = set_flow(4, order=order, num_flows=1, features=8, num_heads=2, width=4.0).eval()
    x = 4 * torch.rand(30, 4, 2)
    of_sets, _ = evaluate(flow, x, 8, iwbo_samples=5 if order == "permute" else 0)
    found = per_point(of_sets, 4)
    names = {"sort": {"nll": "log_likelihood"}, "permute": {"elbo": "elbo", "iwbo": "iwbo"}}[order]
    assert list(found) == [f"test/point_{name}_nats" for name in names.values()]
    for old, new in names.items():
        whole, point = of_sets[f"test/{old}_nats"], found[f"test/point_{new}_nats"]
        assert point.value == pytest.approx(-whole.value / 4)
        assert point.standard_error == pytest.approx(whole.standard_error / 4)
        assert (point.kind, point.count, point.unit) == (whole.kind, 30, "nats/point")
        assert point.estimator.endswith("mean over 30 test sets, divided by the 4 points of a set")
    if order == "sort":
        with torch.no_grad():
            mean = flow.log_prob(x).mean().item() / 4
        assert found["test/point_log_likelihood_nats"].value == pytest.approx(mean, abs=1e-5)


# Configs


def test_the_place_of_the_cache_makes_no_other_run():
    overrides = ["data=spatial_mnist", "model=set_flow"]
    digest = config_hash(compose(overrides))
    for key in ("data.cache=a", "data.root=b", "data.download=false", "data.eval_batch_size=3"):
        assert config_hash(compose([*overrides, key])) == digest
    for key in ("data.points_seed=1", "data.event_shape=[40,2]", "model.order=permute"):
        assert config_hash(compose([*overrides, key])) != digest


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=set_flow"], "model=set_flow is for sets of points, and data=checkerboard"),
        (
            ["data=spatial_digits"],
            r"model=coupling_flow is for vectors, and data=spatial_digits is set data of shape "
            r"\[16, 2\]; model=set_flow is for sets of points",
        ),
        (["data=spatial_digits", "model=pool_flow"], "model=pool_flow is for images, and data="),
        (
            ["data=spatial_digits", "model=set_flow", "measures.samples.n=5"],
            "measures.samples.n: scores of samples",
        ),
    ],
)
def test_what_does_not_fit_together(overrides, message):
    with pytest.raises(UserError, match=message):
        Run(compose(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.event_shape=[16,3]", r"data.event_shape: expected \[N, 2\] with N >= 2"),
        ("data.event_shape=[1,2]", r"data.event_shape: expected \[N, 2\] with N >= 2"),
        ("data.width=9", "data.width: spatial_digits is 8 pixels wide, got 9"),
        ("data.points_seed=-1", "data.points_seed: expected a whole number >= 0, got -1"),
        ("data.train_size=0", "data.train_size: expected a positive whole number or null, got 0"),
        (
            "data.test_size=301",
            "data.test_size: expected at most the 300 test sets of spatial",
        ),
        ("data.batch_size=1298", "data.batch_size: expected at most the 1297 training sets"),
    ],
)
def test_data_that_cannot_be(override, message):
    with pytest.raises(Exception, match=message):
        build(compose(["data=spatial_digits", override]).data).setup()
