"""Image data: augmentation against a loop over images, formats, splits, batches, errors."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from surflow.data.augment import Augmentation, Draws
from surflow.data.downloads import Published, check_file, fetch
from surflow.data.embedded import Digits, PhotoPatches
from surflow.data.folders import ImageArrays, ImageFolder
from surflow.data.images import ImageBatches, ImageData
from surflow.data.published import CIFAR10, SVHN, DownsampledImageNet
from surflow.data.sources import image_files, read_array, read_cifar_batch
from surflow.errors import UserError

COLOUR = {"name": "test", "event_shape": (3, 32, 32), "batch_size": 4}


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Given(ImageData):
    """Splits that a test gives."""

    def __init__(self, given, **others):
        super().__init__(**others)
        self.given = given

    def load(self):
        return dict(self.given)


def given(n=100, shape=(1, 4, 4), test=20, **others):
    train = torch.from_numpy(random_images(n, *shape))
    tests = torch.from_numpy(random_images(test, *shape, seed=1))
    keys = {"name": "given", "event_shape": shape, "batch_size": 8, "valid_size": 10, **others}
    return Given({"train": train, "test": tests}, **keys)


# Augmentation


def one_by_one(image: np.ndarray, flip: bool, down: int, right: int, pad: int) -> np.ndarray:
    """Flip, pad with the edge, move with black moving in, cut out the centre: one image."""
    if flip:
        image = image[:, :, ::-1]
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    moved = np.zeros_like(padded)
    _, height, width = padded.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[:, y, x] = padded[:, y - down, x - right]
    return moved[:, pad : height - pad, pad : width - pad]


@pytest.mark.parametrize(
    ("shape", "pad", "translate"), [((3, 32, 32), 2, 0.04), ((2, 7, 10), 3, 0.2), ((1, 5, 4), 0, 0)]
)
def test_augmentation_is_the_loop_over_images(shape, pad, translate):
    augmentation = Augmentation(flip=True, pad=pad, translate=translate)
    augmentation.check(*shape[1:])
    images = random_images(24, *shape)
    draws = augmentation.draws(24, *shape[1:], seed=3, epoch=1)
    got = Augmentation.apply(torch.from_numpy(images), draws)
    assert got.dtype == torch.uint8
    rows = zip(images, draws.flip.tolist(), draws.down.tolist(), draws.right.tolist(), strict=True)
    expected = np.stack([one_by_one(i, f, d, r, pad) for i, f, d, r in rows])
    assert np.array_equal(got.numpy(), expected)
    assert 0 < draws.flip.sum() < 24
    if translate:
        assert len(set(draws.down.tolist())) > 1
        assert len(set(draws.right.tolist())) > 1


def test_augmentation_is_torchvisions_published_recipe():
    """Flip, pad 2 with the edge, affine translation by whole pixels, centre crop to 32."""
    import torchvision.transforms.v2.functional as F

    images = torch.from_numpy(random_images(18, 3, 32, 32))
    moves = torch.cartesian_prod(torch.tensor([0, 1]), *[torch.tensor([-1, 0, 1])] * 2)
    draws = Draws(moves[:, 0].bool(), moves[:, 1], moves[:, 2])
    for i, image in enumerate(images):
        flip, down, right = moves[i].tolist()
        image = F.horizontal_flip(image) if flip else image
        image = F.pad(image, [2, 2, 2, 2], padding_mode="edge")
        image = F.affine(image, angle=0, translate=[right, down], scale=1, shear=[0, 0])
        expected = F.center_crop(image, [32, 32])
        got = Augmentation.apply(images[i : i + 1], draws.of(torch.tensor([i])))
        assert torch.equal(got[0], expected)


def test_draws_have_the_published_frequencies():
    """Rounding a uniform on ±1.44 (4 % of 36) leaves 0 with 0.5 / 1.44, ±1 the rest alike."""
    n = 60_000
    draws = Augmentation(True, 2, 0.04).draws(n, 32, 32, seed=0, epoch=0)
    share = {-1: 0.94 / 2.88, 0: 1 / 2.88, 1: 0.94 / 2.88}
    for move in (draws.down, draws.right):
        assert set(move.tolist()) == {-1, 0, 1}
        for value, p in share.items():
            got = (move == value).double().mean().item()
            assert abs(got - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert abs(draws.flip.double().mean().item() - 0.5) < 4 * 0.5 / n**0.5
    joint = torch.stack([draws.flip.double(), draws.down.double(), draws.right.double()])
    assert (torch.corrcoef(joint) - torch.eye(3)).abs().max() < 0.02


def test_draws_follow_from_seed_and_epoch_alone():
    augmentation = Augmentation(True, 2, 0.04)
    draws = {(s, e): augmentation.draws(200, 32, 32, s, e) for s in (0, 1) for e in (0, 1)}
    again = augmentation.draws(200, 32, 32, 1, 1)
    assert torch.equal(draws[1, 1].down, again.down)
    for key in ((0, 0), (0, 1), (1, 0)):
        assert not torch.equal(draws[key].down, again.down)


def test_no_augmentation_leaves_images_as_they_are():
    images = torch.from_numpy(random_images(9, 3, 8, 8))
    plain = Augmentation()
    assert not plain
    assert torch.equal(Augmentation.apply(images, plain.draws(9, 8, 8, 0, 0)), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1}, "data.flip: expected true or false, got 1"),
        ({"pad": -1}, "data.pad: expected a whole number >= 0, got -1"),
        ({"pad": True}, "data.pad: expected a whole number"),
        ({"translate": 1.5}, r"data.translate: expected a share in \[0, 1\), got 1.5"),
        ({"pad": 1, "translate": 0.2}, "up to 7 pixels; expected data.pad >= 7, got 1"),
    ],
)
def test_augmentation_errors(options, message):
    with pytest.raises(ValueError, match=message):
        given(shape=(3, 32, 32), **options)


# Batches


def all_batches(batches):
    return [batch.clone() for batch in batches]


def batches_of(images, **others):
    keys = {"batch_size": 8, "seed": 5, "drop_last": True, **others}
    return ImageBatches(images, augmentation=Augmentation(True, 2, 0.04), **keys)


def test_an_epoch_gives_every_image_once():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    for seed in (None, 4):
        got = torch.cat(all_batches(ImageBatches(images, 8, seed))).flatten()
        assert sorted(got.tolist()) == list(range(50))
        assert (got.tolist() == list(range(50))) == (seed is None)


def test_same_seed_and_epoch_same_batches():
    images = torch.from_numpy(random_images(40, 3, 32, 32))
    first = all_batches(batches_of(images, epoch=lambda: 2))
    again = all_batches(batches_of(images, epoch=lambda: 2))
    later = all_batches(batches_of(images, epoch=lambda: 3))
    assert len(first) == 5
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, later, strict=True))


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_resumed_epoch_goes_on_with_the_next_batch(done):
    images = torch.from_numpy(random_images(40, 3, 32, 32))
    unbroken = all_batches(batches_of(images, epoch=lambda: 1))
    broken = batches_of(images, epoch=lambda: 1)
    iterator = iter(broken)
    for _ in range(done):
        next(iterator)
    epoch = [1]
    resumed = batches_of(images, epoch=lambda: epoch[0])
    resumed.load_state_dict(broken.state_dict())
    rest = all_batches(resumed)
    expected = unbroken[done:] or unbroken  # after the last one an epoch is over
    assert len(rest) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))
    epoch[0] = 2  # the epoch after is whole
    whole = all_batches(batches_of(images, epoch=lambda: 2))
    assert all(torch.equal(a, b) for a, b in zip(all_batches(resumed), whole, strict=True))


def test_a_pass_that_was_cut_short_does_not_shorten_the_next():
    images = torch.from_numpy(random_images(40, 1, 4, 4))
    batches = ImageBatches(images, 8)
    next(iter(batches))
    assert len(all_batches(batches)) == 5


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_the_processes_are_the_single_process_batches(world):
    images = torch.from_numpy(random_images(40, 3, 32, 32))
    single = all_batches(batches_of(images))
    shares = [all_batches(batches_of(images, rank=r, world_size=world)) for r in range(world)]
    for i, batch in enumerate(single):
        assert torch.equal(torch.cat([share[i] for share in shares]), batch)


def test_an_image_is_augmented_alike_in_any_batch():
    images = torch.from_numpy(random_images(40, 3, 32, 32))
    small = torch.cat(all_batches(batches_of(images, batch_size=4)))
    large = torch.cat(all_batches(batches_of(images, batch_size=20)))
    assert torch.equal(small, large)


def test_batches_of_a_memory_map_are_those_of_memory(tmp_path):
    images = random_images(40, 3, 32, 32)
    np.save(tmp_path / "x.npy", images)
    mapped = torch.from_numpy(read_array(tmp_path / "x.npy"))
    pairs = zip(batches_of(mapped), batches_of(torch.from_numpy(images)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# Splits


def test_the_last_training_rows_are_validation():
    data = given()
    whole = data.given["train"]
    data.setup()
    assert torch.equal(data.splits["train"], whole[:90])
    assert torch.equal(data.splits["valid"], whole[90:])
    assert torch.equal(data.splits["test"], data.given["test"])
    assert data.splits["train"].data_ptr() == whole.data_ptr()  # a view: large data stay mapped


def test_a_cut_split_is_spread_evenly():
    data = given(n=110, train_size=8)
    whole = data.given["train"]
    data.setup()
    assert torch.equal(data.splits["train"], whole[[0, 12, 25, 37, 50, 62, 75, 87]])


def test_what_an_objective_needs():
    data = given(shape=(3, 4, 6))
    assert data.num_dims == 72
    assert data.unit == "bpd"
    assert data.box == ([0.0] * 72, [255.0] * 72)
    assert data.floor is None


def test_fingerprint_tells_pixels_order_and_shape():
    data, same, other = given(), given(), given()
    other.given["train"] = other.given["train"].flip(0)
    for d in (data, same, other):
        d.setup()
    assert data.fingerprint("train") == same.fingerprint("train")
    assert data.fingerprint("train") != other.fingerprint("train")
    pixels = data.splits["test"]
    expected = hashlib.sha256(b"(20, 1, 4, 4)" + pixels.numpy().tobytes()).hexdigest()
    assert data.fingerprint("test") == expected
    assert data.provenance()["splits"]["test"] == {"rows": 20, "sha256": expected}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_size": None}, "data.valid_size: given has no valid split of its own"),
        ({"valid_size": 100}, "data.valid_size: expected fewer than the 100 training images"),
        ({"train_size": 91}, "data.train_size: expected at most the 90 train images of given"),
        ({"test_size": 21}, "data.test_size: expected at most the 20 test images"),
        ({"test_size": 0}, "data.test_size: expected a positive whole number or null, got 0"),
        ({"train_size": 1.5}, "data.train_size: expected a positive whole number"),
        ({"batch_size": 91}, "data.batch_size: expected at most the 90 training images"),
        ({"num_levels": 1}, "data.num_levels: expected 2 to 256, got 1"),
        ({"num_levels": 16}, r"data.num_levels: train images of given: expected levels 0 to 15"),
        ({"on_device": "yes"}, "data.on_device: expected auto, true or false, got 'yes'"),
        ({"event_shape": (4, 4)}, r"data.event_shape: expected \[C, H, W\], got \[4, 4\]"),
        (
            {"event_shape": (3, 4, 4)},
            r"train images of given: expected uint8 \(N, 3, 4, 4\), got uint8 \(100, 1, 4, 4\)",
        ),
    ],
)
def test_errors_of_sizes_and_shapes(options, message):
    with pytest.raises(ValueError, match=message):
        given(**options).setup()


def test_images_must_be_bytes():
    data = given()
    data.given["train"] = data.given["train"].float()
    with pytest.raises(ValueError, match=r"expected uint8 \(N, 1, 4, 4\), got float32"):
        data.setup()


def test_fits_says_where_images_stay():
    assert given(on_device=False).fits(torch.device("cpu"))
    assert not given(on_device=False).fits(torch.device("cuda"))
    assert given(on_device=True).fits(torch.device("cuda"))


# CIFAR-10


def python2_batch(images: np.ndarray) -> bytes:
    """A batch as the release has it: a protocol 2 pickle written by Python 2."""
    raw = images.reshape(len(images), -1).tobytes()
    shape = b"M" + struct.pack("<H", len(images)) + b"M" + struct.pack("<H", images[0].size)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += shape + b"\x86" + dtype + b"K\x00tb\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x03au."


class SmallCIFAR10(CIFAR10):
    """The release with 7 images a batch."""

    rows = 7
    facts = None

    def published(self):
        return self.facts


@pytest.fixture
def cifar(tmp_path):
    """Its batches and its archive in ``release``, and the class that knows their checksums."""
    release = tmp_path / "release"
    release.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    images = {n: random_images(7, 3, 32, 32, seed=i) for i, n in enumerate(names)}
    contents = {n: python2_batch(x) for n, x in images.items()}
    with tarfile.open(release / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, content in {**contents, "readme.html": b"hello"}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = release / "cifar-10-python.tar.gz"
    batches = [Published(n, md5(c)) for n, c in contents.items()]

    class Here(SmallCIFAR10):
        facts = (
            Published(archive.name, md5(archive.read_bytes()), archive.as_uri()),
            batches[:5],
            batches[5:],
        )

    def unpack(folder):
        folder.mkdir(parents=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)

    train = np.concatenate([images[n] for n in names[:5]])
    return Here, unpack, train, images["test_batch"], archive


def check_cifar(data, train, test):
    data.setup()
    assert np.array_equal(data.splits["train"].numpy(), train[:-5])
    assert np.array_equal(data.splits["valid"].numpy(), train[-5:])
    assert np.array_equal(data.splits["test"].numpy(), test)


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py", "."])
def test_cifar_from_unpacked_files(cifar, tmp_path, place):
    here, unpack, train, test, _ = cifar
    unpack(tmp_path / "root" / place) if place != "." else unpack(tmp_path / "root")
    check_cifar(here(root=tmp_path / "root", valid_size=5, download=False, **COLOUR), train, test)


def test_cifar_from_the_archive_and_by_download(cifar, tmp_path, capfd):
    here, _, train, test, archive = cifar
    check_cifar(here(root=archive.parent, valid_size=5, download=False, **COLOUR), train, test)
    root = tmp_path / "empty"
    check_cifar(here(root=root, valid_size=5, **COLOUR), train, test)
    assert "downloading" in capfd.readouterr().err
    assert (root / "cifar10" / archive.name).read_bytes() == archive.read_bytes()
    check_cifar(here(root=root, valid_size=5, download=False, **COLOUR), train, test)
    assert capfd.readouterr().err == ""


def test_damaged_cifar_batch(cifar, tmp_path):
    here, unpack, *_ = cifar
    unpack(tmp_path / "root")
    path = tmp_path / "root" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[-3000] ^= 1
    path.write_bytes(content)
    wanted = here.facts[1][2].md5
    data = here(root=tmp_path / "root", valid_size=5, **COLOUR)
    message = f"data.root: {path} is damaged: expected md5 {wanted}, got {md5(content)}; delete it"
    with pytest.raises(UserError) as error:
        data.setup()
    assert str(error.value).startswith(message)
    path.unlink()
    with pytest.raises(UserError, match=f"no file {path}; put data_batch_3 .md5 {wanted}. there"):
        data.setup()


def test_damaged_cifar_archive(cifar, tmp_path):
    here, *_, archive = cifar
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / archive.name).write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is damaged: expected md5 "):
        here(root=tmp_path / "root", valid_size=5, **COLOUR).setup()


def test_no_cifar_says_what_is_expected_where(cifar, tmp_path):
    here, *_ = cifar
    with pytest.raises(UserError) as error:
        here(root=tmp_path / "none", valid_size=5, download=False, **COLOUR).setup()
    text = str(error.value)
    assert str(tmp_path / "none") in text
    assert "cifar-10-batches-py/" in text
    assert here.facts[0].md5 in text
    assert "\n" not in text


def test_the_real_release_is_the_one_torchvision_knows():
    archive, train, test = CIFAR10(**COLOUR).published()
    assert archive.md5 == "c58f30108f718f92721af3b95e74349a"
    assert archive.url.startswith("https://")
    assert [b.filename for b in train] == [f"data_batch_{i}" for i in range(1, 6)]
    assert [b.filename for b in test] == ["test_batch"]
    assert SVHN(**COLOUR).published()["test"].md5 == "eb5a983be6a315427106f1b164d9cef3"


class Payload:
    """Would create a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_runs_nothing(tmp_path):
    trap = tmp_path / "trap"
    for protocol in (0, 2, 5):
        evil = pickle.dumps({"data": Payload(trap)}, protocol=protocol)
        with pytest.raises(UserError, match=r"x is no batch of CIFAR-10 \(it names .*mkdir\)"):
            read_cifar_batch(evil, "x")
    np.savez(tmp_path / "evil.npz", images=np.array([Payload(trap)], dtype=object))
    with pytest.raises(UserError, match="holds no plain array"):
        read_array(tmp_path / "evil.npz")
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_batch_written_by_python_3(protocol):
    images = random_images(5, 3, 32, 32)
    content = pickle.dumps({b"data": images.reshape(5, -1)}, protocol=protocol)
    assert np.array_equal(read_cifar_batch(content, "x"), images)


def test_no_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    file = Published("a.bin", "0" * 32, "https://example.org/a.bin")
    with pytest.raises(UserError) as error:
        fetch(file, tmp_path)
    assert str(error.value) == (
        "data.download: cannot download https://example.org/a.bin (no route); put a.bin "
        f"(md5 {'0' * 32}) into {tmp_path}, or set data.root"
    )


def test_a_download_that_comes_damaged_leaves_nothing(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"not what was published")
    target = tmp_path / "target"
    file = Published("a.bin", "0" * 32, source.as_uri())
    with pytest.raises(UserError, match=f"came damaged: expected md5 {'0' * 32}, got "):
        fetch(file, target)
    assert [p.name for p in target.iterdir()] == [".a.bin.lock"]
    with pytest.raises(UserError, match="no file"):
        check_file(target / "a.bin", file)


# SVHN


def test_svhn_from_its_matlab_files(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    images = {"train": random_images(12, 3, 32, 32), "test": random_images(6, 3, 32, 32, seed=1)}
    (tmp_path / "svhn").mkdir()
    facts = {}
    for split, x in images.items():
        path = tmp_path / "svhn" / f"{split}_32x32.mat"
        savemat(path, {"X": x.transpose(2, 3, 1, 0), "y": np.zeros((len(x), 1), np.uint8)})
        facts[split] = Published(path.name, md5(path.read_bytes()), "http://example.org/x")

    class Small(SVHN):
        def published(self):
            return facts

    data = Small(root=tmp_path, valid_size=2, **COLOUR)
    data.setup()
    assert np.array_equal(data.splits["train"].numpy(), images["train"][:10])
    assert np.array_equal(data.splits["valid"].numpy(), images["train"][10:])
    assert np.array_equal(data.splits["test"].numpy(), images["test"])
    (tmp_path / "svhn" / "test_32x32.mat").unlink()
    with pytest.raises(UserError, match=r"no file .*svhn/test_32x32.mat; put test_32x32.mat \(md5"):
        Small(root=tmp_path, valid_size=2, download=False, **COLOUR).setup()


# ImageNet


class SmallImageNet(DownsampledImageNet):
    counts = {"png": (9, 4), "npz": (10, 5)}


def small_imagenet(root, release="png", side=32, **others):
    keys = {"name": "imagenet", "event_shape": (3, side, side), "batch_size": 2, "valid_size": 3}
    return SmallImageNet(release=release, root=root, **{**keys, **others})


def write_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:04d}.png")


def write_npz_release(root, side, train, test):
    """Two batches, in folders as the zips unpack, the larger number first in the alphabet."""
    for number, rows in (("2", train[:6]), ("10", train[6:])):
        folder = root / f"Imagenet{side}_train_part{number}_npz"
        folder.mkdir(parents=True)
        flat = rows.reshape(len(rows), -1)
        np.savez(folder / f"train_data_batch_{number}.npz", data=flat, labels=np.zeros(len(rows)))
    (root / "val").mkdir()
    np.savez(root / "val" / "val_data.npz", data=test.reshape(len(test), -1))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("place", ["imagenet{}", "."])
def test_imagenet_npz(tmp_path, side, place):
    train, test = random_images(10, 3, side, side), random_images(5, 3, side, side, seed=1)
    write_npz_release(tmp_path / place.format(side), side, train, test)
    data = small_imagenet(tmp_path, "npz", side)
    data.setup()
    assert data.version == "2017, Chrabaszcz et al. (npz)"
    assert np.array_equal(data.splits["train"].numpy(), train[:7])
    assert np.array_equal(data.splits["valid"].numpy(), train[7:])
    assert np.array_equal(data.splits["test"].numpy(), test)


@pytest.mark.parametrize("side", [32, 64])
def test_imagenet_png(tmp_path, side, capfd):
    train, test = random_images(9, 3, side, side), random_images(4, 3, side, side, seed=1)
    folder = tmp_path / f"imagenet{side}"
    write_pngs(folder / f"train_{side}x{side}", train)
    write_pngs(folder / f"valid_{side}x{side}", test)
    data = small_imagenet(tmp_path, "png", side)
    data.setup()
    assert data.version == "2016, van den Oord et al. (PNG)"
    assert "reading 9 images into" in capfd.readouterr().err
    names = [f"{i:04d}.png" for i in range(9)]
    order = sorted(range(9), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    assert np.array_equal(data.splits["train"].numpy(), train[order[:6]])
    assert np.array_equal(data.splits["valid"].numpy(), train[order[6:]])
    again = small_imagenet(tmp_path, "png", side)
    again.setup()
    assert capfd.readouterr().err == ""  # read once
    assert again.fingerprint("train") == data.fingerprint("train")
    for path in (folder / ".surflow").glob("*.npy"):
        content = path.read_bytes()
        path.unlink()  # the tensors above still map it
        path.write_bytes(content[:-10])
    mended = small_imagenet(tmp_path, "png", side)
    mended.setup()
    assert "reading 9 images into" in capfd.readouterr().err
    assert mended.fingerprint("test") == data.fingerprint("test")


def test_imagenet_versions_are_told_apart(tmp_path):
    train, test = random_images(10, 3, 32, 32), random_images(5, 3, 32, 32, seed=1)
    with pytest.raises(UserError) as error:
        small_imagenet(tmp_path / "none").setup()
    assert str(error.value) == (
        f"data.root: no folder {tmp_path / 'none'}; expected imagenet32/ in it with train_32x32/ "
        "and valid_32x32/ with PNG files"
    )
    write_npz_release(tmp_path, 32, train, test)
    with pytest.raises(UserError, match=r"there is the 2017, .*npz.* version: data.release=npz"):
        small_imagenet(tmp_path).setup()
    # the images of one version under the other's names
    write_pngs(tmp_path / "train_32x32", train)
    write_pngs(tmp_path / "valid_32x32", test)
    with pytest.raises(UserError, match=r"9 and 4 images, got 10 and 5 \(that many has the 2017"):
        small_imagenet(tmp_path).setup()
    data = small_imagenet(tmp_path, complete=False)
    data.setup()
    assert data.version.endswith("incomplete: 10 and 5 images")


def test_imagenet_pickles_are_refused(tmp_path):
    (tmp_path / "train_data_batch_1").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match="there are pickles, which are not read"):
        small_imagenet(tmp_path, "npz").setup()


def test_imagenet_counts_of_the_real_releases():
    assert DownsampledImageNet.counts == {"png": (1281149, 49999), "npz": (1281167, 50000)}
    with pytest.raises(ValueError, match=r"data.release: expected one of png, npz, got 'pickle'"):
        small_imagenet(None, "pickle")
    with pytest.raises(ValueError, match=r"has \[3, 32, 32\] or \[3, 64, 64\], got \[3, 16, 16\]"):
        small_imagenet(None, side=16)


def test_imagenet_wrong_contents(tmp_path):
    train, test = random_images(10, 3, 16, 16), random_images(5, 3, 32, 32)
    write_npz_release(tmp_path, 32, train, test)
    with pytest.raises(
        UserError, match=r"batch_2.npz: expected data of shape \(N, 3072\), got \(6"
    ):
        small_imagenet(tmp_path, "npz").setup()
    path = next(tmp_path.glob("*/train_data_batch_2.npz"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"train_data_batch_2.npz is damaged"):
        small_imagenet(tmp_path, "npz").setup()


# Arrays and folders


@pytest.mark.parametrize("suffix", ["npz", "npy", "safetensors"])
def test_image_arrays(tmp_path, suffix):
    from safetensors.numpy import save_file

    images = {s: random_images(8, 1, 4, 4, seed=i) for i, s in enumerate(("train", "test"))}
    folder = tmp_path / "set"
    folder.mkdir()
    for split, x in images.items():
        path = folder / f"{split}.{suffix}"
        if suffix == "npz":
            np.savez_compressed(path, images=x)
        elif suffix == "npy":
            np.save(path, x)
        else:
            save_file({"images": x}, path)
    keys = {"name": "set", "event_shape": (1, 4, 4), "batch_size": 2}
    data = ImageArrays("set", root=tmp_path, valid_size=3, **keys)
    data.setup()
    assert np.array_equal(data.splits["train"].numpy(), images["train"][:5])
    assert np.array_equal(data.splits["valid"].numpy(), images["train"][5:])
    assert np.array_equal(data.splits["test"].numpy(), images["test"])
    np.savez(folder / "valid.npz", images=images["test"][:2])
    own = ImageArrays("set", root=tmp_path, valid_size=None, **keys)
    own.setup()
    assert np.array_equal(own.splits["train"].numpy(), images["train"])
    assert np.array_equal(own.splits["valid"].numpy(), images["test"][:2])


def test_image_arrays_errors(tmp_path):
    keys = {"name": "set", "event_shape": (1, 4, 4), "batch_size": 2, "valid_size": 1}
    with pytest.raises(UserError, match=r"expected train.npz, .npy or .safetensors in .*no such"):
        ImageArrays("set", root=tmp_path, **keys).setup()
    np.savez(tmp_path / "train.npz", pixels=random_images(4, 1, 4, 4))
    data = ImageArrays(str(tmp_path), root="elsewhere", **keys)
    with pytest.raises(UserError, match=r"train.npz: expected an array 'images', got pixels"):
        data.setup()
    (tmp_path / "train.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(UserError, match=r"train.npz is damaged"):
        data.setup()


def test_the_root_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SURFLOW_DATA", str(tmp_path))
    assert given().root == tmp_path
    assert str(given(root="here").root) == "here"
    monkeypatch.delenv("SURFLOW_DATA")
    assert str(given().root) == "data"


def folder_data(root, **others):
    keys = {"name": "pictures", "event_shape": (3, 6, 6), "batch_size": 2, "valid_size": 2}
    return ImageFolder("pictures", root=root, **{**keys, **others})


def test_image_folder_with_splits_is_lossless(tmp_path):
    images = {s: random_images(5, 3, 6, 6, seed=i) for i, s in enumerate(("train", "test"))}
    for split, x in images.items():
        write_pngs(tmp_path / "pictures" / split / "class", x)
    data = folder_data(tmp_path)
    data.setup()
    assert {s: len(x) for s, x in data.splits.items()} == {"train": 3, "valid": 2, "test": 5}

    def rows(*splits):
        return sorted(x.numpy().tobytes() for s in splits for x in data.splits[s])

    assert rows("train", "valid") == sorted(x.tobytes() for x in images["train"])
    assert rows("test") == sorted(x.tobytes() for x in images["test"])


def test_image_folder_without_splits(tmp_path):
    images = random_images(12, 3, 6, 6)
    for i in range(4):  # four classes
        write_pngs(tmp_path / "pictures" / f"class{i}", images[3 * i : 3 * i + 3])
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"data.test_size: pictures has no test split of its own"):
        folder_data(tmp_path).setup()
    data = folder_data(tmp_path, test_size=3)
    data.setup()
    assert {s: len(x) for s, x in data.splits.items()} == {"train": 7, "valid": 2, "test": 3}
    rows = [x.numpy().tobytes() for s in ("train", "valid", "test") for x in data.splits[s]]
    assert sorted(rows) == sorted(x.tobytes() for x in images)  # each once
    names = [p.relative_to(tmp_path).as_posix() for p in image_files(tmp_path / "pictures")]
    assert len({name.split("/")[1] for name in names[:7]}) > 1  # classes mixed


def test_image_folder_sizes_and_greys(tmp_path):
    folder = tmp_path / "pictures"
    write_pngs(folder, random_images(6, 3, 6, 6))
    Image.fromarray(np.full((12, 20, 3), 77, np.uint8)).save(folder / "large.png")
    with pytest.raises(UserError, match=r"large.png: expected 6x6 pixels, got 12x20; data.resize"):
        folder_data(tmp_path, test_size=1).setup()
    data = folder_data(tmp_path, test_size=1, resize=True)
    data.setup()
    found = [x for s in data.splits.values() for x in s if (x == 77).all()]
    assert len(found) == 1
    grey = folder_data(tmp_path, test_size=1, resize=True, event_shape=(1, 6, 6))
    grey.setup()
    assert grey.splits["train"].shape == (4, 1, 6, 6)
    (folder / "bad.png").write_bytes(b"\x89PNG no")
    with pytest.raises(UserError, match=r"bad.png is damaged or no image"):
        folder_data(tmp_path, test_size=1, resize=True).setup()
    (folder / "bad.png").unlink()
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(folder / "deep.png")
    with pytest.raises(UserError, match=r"deep.png: expected 8 bits a channel, got I;16"):
        folder_data(tmp_path, test_size=1, resize=True).setup()


def test_many_files_are_read_in_order(tmp_path):
    images = random_images(150, 3, 6, 6)
    write_pngs(tmp_path / "pictures", images)
    data = folder_data(tmp_path, test_size=10)
    data.setup()
    files = image_files(tmp_path / "pictures")
    order = [int(p.stem) for p in files]
    assert np.array_equal(data.splits["train"].numpy(), images[order[:138]])


def test_a_changed_file_is_read_again(tmp_path):
    images = random_images(6, 3, 6, 6)
    write_pngs(tmp_path / "pictures", images)
    before = folder_data(tmp_path, test_size=1)
    before.setup()
    write_pngs(tmp_path / "pictures", 255 - images)
    os.utime(tmp_path / "pictures" / "0000.png", ns=(1, 1))
    after = folder_data(tmp_path, test_size=1)
    after.setup()
    assert torch.equal(after.splits["train"], 255 - before.splits["train"])


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=f"no folder {tmp_path}/pictures; expected one of image"):
        folder_data(tmp_path).setup()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=f"no image files in {tmp_path}/pictures"):
        folder_data(tmp_path).setup()


# Embedded data


def test_photo_patches():
    pytest.importorskip("sklearn")
    data = PhotoPatches(name="photo_patches", event_shape=(3, 32, 32))
    data.setup()
    sizes = {s: len(x) for s, x in data.splits.items()}
    assert sizes == {"train": 2 * 50 * 45, "valid": 2 * 13 * 4, "test": 2 * 13 * 4}
    photos = data.photographs()
    assert photos.shape == (2, 3, 427, 640)
    train, test = data.splits["train"], data.splits["test"]
    # row (photo 1, patch row 2, patch column 3), and the like in test
    assert torch.equal(train[50 * 45 + 2 * 45 + 3], photos[1, :, 16:48, 24:56])
    assert torch.equal(test[13 * 4 + 2 * 4 + 3], photos[1, :, 64:96, 608:640])
    assert torch.equal(data.splits["valid"][5], photos[0, :, 32:64, 416:448])


def test_photo_patches_come_from_disjoint_regions(monkeypatch):
    """On photographs whose every pixel is its own column, no column is in two splits."""
    columns = torch.arange(640).expand(2, 3, 427, 640)
    monkeypatch.setattr(PhotoPatches, "photographs", staticmethod(lambda: columns))
    splits = PhotoPatches(name="photo_patches", event_shape=(3, 32, 32)).load()
    seen = {s: set(x.unique().tolist()) for s, x in splits.items()}
    assert seen["train"] == set(range(384))
    assert seen["valid"] == set(range(384, 512))
    assert seen["test"] == set(range(512, 640))


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    data = Digits(name="digits", event_shape=(1, 8, 8), num_levels=17)
    data.setup()
    assert {s: len(x) for s, x in data.splits.items()} == {"train": 1297, "valid": 200, "test": 300}
    rows = torch.cat([data.splits[s] for s in ("train", "valid", "test")])
    assert np.array_equal(rows.numpy()[:, 0], sklearn.load_digits().images)
    assert rows.max() == 16
    assert len({x.numpy().tobytes() for x in rows}) == 1797  # no image in two splits
