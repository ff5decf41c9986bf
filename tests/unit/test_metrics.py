"""Scores of samples against closed forms, torch-fidelity's own statistics, and themselves."""

import hashlib
import io
import json
import math
import pickle
import urllib.error
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from surflow.compat import make_torchvision_importable
from surflow.data.pixels import BrokenSamples, as_images, full_range
from surflow.distributions import StandardNormal
from surflow.errors import UserError
from surflow.evaluation import generation, inception
from surflow.evaluation.generation import (
    GenerationProtocol,
    Samples,
    frechet_distance,
    generation_scores,
    generation_seconds,
)
from surflow.evaluation.inception import (
    INCEPTION_SHA256,
    InceptionFeatures,
    inception_file,
    load_inception_weights,
)
from surflow.evaluation.moments import FeaturePass, Moments
from surflow.evaluation.random_features import RandomFeatures
from surflow.evaluation.sampling import IMAGE_UNIT, draw, draw_unit
from surflow.evaluation.trained import Trained, run_measures
from surflow.flow import Flow
from surflow.models import pool_flow
from surflow.transforms import Affine, AffineCoupling, Dequantization

SHAPE = (3, 8, 8)


def small_flow(seed=0, shape=SHAPE, levels=256):
    torch.manual_seed(seed)
    return pool_flow(
        shape,
        num_levels=levels,
        num_steps=1,
        mid_channels=8,
        depth=1,
        growth=4,
        dequant_steps=1,
        context_channels=4,
    ).eval()


def random_images(n, shape=SHAPE, seed=0, levels=256):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, levels, (n, *shape)).astype(np.uint8))


def smooth_images(n, shape=SHAPE, seed=0):
    """Images that have something in common: a vertical ramp plus a little noise."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(40, 200, shape[1])[None, None, :, None]
    images = ramp + 12 * rng.standard_normal((n, *shape))
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


class Fixed(nn.Module):
    """Stands for a flow whose draws are the rows of a table, in order."""

    def __init__(self, images):
        super().__init__()
        self.table = nn.Parameter(images.float())
        self.next = 0

    def sample(self, n, temperature=1.0):
        rows = self.table[self.next : self.next + n]
        self.next += n
        return rows.long()


def random_protocol(n, **others):
    return GenerationProtocol(n=n, extractor="random_features", **others)


def distance(images, reference, **others):
    scores, missing = generation_scores(
        Fixed(images), reference, random_protocol(len(images)), **others
    )
    assert missing == {} and list(scores) == ["sample/fid_random_features"]
    return scores["sample/fid_random_features"].value


# Draws


def test_draws_are_units_of_their_own():
    flow = small_flow()
    n = IMAGE_UNIT + 40
    torch.manual_seed(5)
    before = torch.get_rng_state()
    parts = list(draw(flow, n, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    assert [len(p) for p in parts] == [IMAGE_UNIT, 40]
    torch.manual_seed(99)
    assert torch.equal(draw_unit(flow, 1, n, seed=3), parts[1])
    assert torch.equal(draw_unit(flow, 0, 10_000, seed=3), parts[0])  # n only says how many
    assert not torch.equal(draw_unit(flow, 1, 2 * n, seed=3)[:40], parts[0][:40])
    assert not torch.equal(draw_unit(flow, 0, n, seed=4), parts[0])
    with pytest.raises(ValueError, match="index: expected 0 to 1, got 2"):
        draw_unit(flow, 2, n, seed=3)


def test_temperature_reaches_the_base():
    flow = Flow(StandardNormal((2,)))
    hot = torch.cat(list(draw(flow, 4000, seed=0)))
    cool = torch.cat(list(draw(flow, 4000, seed=0, temperature=0.25)))
    assert hot.std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(cool, 0.25 * hot)


def test_as_images():
    levels = torch.tensor([0, 5, 16]).view(3, 1, 1, 1)
    assert as_images(levels, 17).dtype == torch.uint8
    with pytest.raises(BrokenSamples, match=r"levels 0 to 15, got others .* in 1 of 3 images"):
        as_images(levels, 16)
    with pytest.raises(ValueError, match="num_levels: expected 1 to 256, got 300"):
        as_images(levels, 300)
    with pytest.raises(BrokenSamples, match="no images"):
        as_images(levels.float(), 17)
    # what a NaN is rounded to
    with pytest.raises(BrokenSamples, match="not finite"):
        as_images(torch.full((1, 1, 1, 1), math.nan).floor().clamp(0, 16).long(), 17)


def test_full_range():
    x = torch.arange(17, dtype=torch.uint8)
    assert full_range(x, 17).tolist() == [round(i * 255 / 16) for i in range(17)]
    assert full_range(x) is x


# Moments


def test_moments_are_torch_fidelitys_statistics():
    make_torchvision_importable()
    from torch_fidelity.metric_fid import fid_features_to_statistics

    rng = np.random.default_rng(0)
    rows = (100 + rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6))).astype(np.float32)
    moments = Moments(6)
    for part in np.split(rows, [1, 7, 200]):
        moments.update(part)
    expected = fid_features_to_statistics(torch.from_numpy(rows.astype(np.float64)))
    found = moments.statistics()
    np.testing.assert_allclose(found["mu"], expected["mu"], rtol=1e-12)
    np.testing.assert_allclose(found["sigma"], expected["sigma"], rtol=1e-10)


def test_moments_of_one_row():
    moments = Moments(2)
    moments.update(np.ones((1, 2)))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        moments.statistics()


def test_a_pass_goes_on_where_it_was_cut_off(tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((5, 4, 3)).astype(np.float32)
    logits = rng.standard_normal((5, 4, 2)).astype(np.float32)
    asked = []

    def features(unit):
        asked.append(unit)
        return rows[unit], logits[unit]

    whole = FeaturePass(3, "a")
    whole.run(5, features)
    path = tmp_path / "new" / "pass.npz"
    asked.clear()

    def killed(done):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeaturePass(3, "a", path, interval=0).run(5, features, killed)
    assert asked == [0, 1, 2]
    resumed = FeaturePass(3, "a", path, interval=0)
    resumed.run(5, features)
    assert asked == [0, 1, 2, 3, 4]
    assert np.array_equal(resumed.moments.scatter, whole.moments.scatter)
    assert np.array_equal(resumed.moments.mean, whole.moments.mean)
    assert np.array_equal(resumed.all_logits(), logits.reshape(20, 2))
    assert [p.name for p in path.parent.iterdir()] == ["pass.npz"]
    # another fingerprint, a damaged file: from the start
    assert FeaturePass(3, "b", path).done == 0
    path.write_bytes(path.read_bytes()[:-300])
    assert FeaturePass(3, "a", path).done == 0


# Formulas


def test_frechet_distance_of_normals():
    """tr((S1 S2)^(1/2)) from the symmetric S1^(1/2) S2 S1^(1/2), by eigh."""
    rng = np.random.default_rng(2)
    one, other = (rng.standard_normal((5, 5)) for _ in range(2))
    one, other = one @ one.T, other @ other.T
    mu = rng.standard_normal((2, 5))

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values)) @ vectors.T

    half = root(one)
    expected = (
        ((mu[0] - mu[1]) ** 2).sum()
        + np.trace(one)
        + np.trace(other)
        - 2 * np.trace(root(half @ other @ half))
    )
    found = frechet_distance({"mu": mu[0], "sigma": one}, {"mu": mu[1], "sigma": other})
    assert found == pytest.approx(expected, rel=1e-8)
    # one dimension: (m1 - m2)² + (s1 - s2)²
    line = [{"mu": np.array([m]), "sigma": np.array([[s**2]])} for m, s in ((1.0, 2.0), (4.0, 0.5))]
    assert frechet_distance(*line) == pytest.approx(9 + 2.25)


class KnownLogits:
    """Stands for Inception: the class is the red level of the first pixel, the score known."""

    name, dim, what = "inception", 2, "two levels"
    distance, inception_score = "sample/fid", "sample/inception_score"
    sha256, caution, details = "0" * 64, "", {"name": "known"}
    classes, sure = 4, 3.0

    def __init__(self, channels, weights, device):
        pass

    def __call__(self, images):
        label = images[:, 0, 0, 0].long()
        logits = self.sure * nn.functional.one_hot(label, self.classes).float()
        return images[:, :2, 0, 0].float(), logits


def test_inception_score_of_known_logits(monkeypatch):
    """All classes equally often: IS = exp(log L - H(p)) in every split."""
    monkeypatch.setitem(generation.EXTRACTORS, "inception", KnownLogits)
    n, levels = 4000, KnownLogits.classes
    images = torch.zeros(n, *SHAPE, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n) % levels
    images[:, 1, 0, 0] = torch.arange(n) % 7
    scores, missing = generation_scores(Fixed(images), images, GenerationProtocol(n=n, splits=1))
    assert missing == {}
    p = np.exp([KnownLogits.sure, 0, 0, 0])
    p /= p.sum()
    expected = levels * math.exp((p * np.log(p)).sum())
    score = scores["sample/inception_score"]
    assert score.value == pytest.approx(expected, rel=1e-6)
    assert score.standard_error is None
    assert scores["sample/fid"].value == pytest.approx(0, abs=1e-6)
    # ten splits of a random order: unequal classes, a slightly smaller score, a deviation
    scores, _ = generation_scores(Fixed(images), images, GenerationProtocol(n=n))
    score = scores["sample/inception_score"]
    order = np.random.RandomState(2020).permutation(n)
    q = np.where(np.arange(levels) == (np.arange(n) % levels)[order][:, None], p[0], p[1])
    parts = [
        math.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.split(q, 10)
    ]
    assert score.value == pytest.approx(np.mean(parts), rel=1e-6)
    deviation = score.protocol["splits_standard_deviation"]
    assert deviation == pytest.approx(np.std(parts), rel=1e-4)
    assert score.standard_error == pytest.approx(np.std(parts, ddof=1) / 10**0.5, rel=1e-4)
    assert score.protocol["splits"] == 10
    # more splits than samples
    scores, missing = generation_scores(Fixed(images[:9]), images, GenerationProtocol(n=9))
    assert list(scores) == ["sample/fid"]
    assert "at least 10 samples" in missing["sample/inception_score"]


# Random features


def test_random_features_are_the_same_everywhere():
    one, other = RandomFeatures(3), RandomFeatures(3)
    assert one.sha256 == other.sha256 != RandomFeatures(1).sha256
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in one.weights))
    assert one.sha256 == digest.hexdigest()
    assert one.sha256[:16] == "35cd4bbfb1e3cedb"
    images = random_images(5)
    features, logits = one(images)
    assert features.shape == (5, 64) and logits is None
    # an image's features do not depend on the others
    torch.testing.assert_close(one(images[2:3])[0], features[2:3])
    x = images[:1].double() / 127.5 - 1
    for weight, stride in zip(one.weights, (1, 2, 2), strict=True):
        columns = nn.functional.unfold(x, 3, padding=1, stride=stride)
        side = int(columns.shape[-1] ** 0.5)
        x = (weight.double().flatten(1) @ columns).clamp(min=0) * 2**0.5
        x = x.view(1, -1, side, side)
    torch.testing.assert_close(features[:1].double(), x.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_distance_grows_with_noise():
    clean = smooth_images(600)
    assert distance(clean, clean) == pytest.approx(0, abs=1e-6)
    same = distance(smooth_images(600, seed=1), clean)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((600, *SHAPE)))
    values = [same]
    for size in (10, 30, 90):
        noisy = (smooth_images(600, seed=1) + size * noise).clamp(0, 255).to(torch.uint8)
        values.append(distance(noisy, clean))
    assert values == sorted(values)
    assert values[1] > 3 * same and values[3] > 10 * values[1]


def test_distance_is_that_of_the_features():
    """In float64 from NumPy's mean and covariance, and the symmetric square root."""
    images, reference = smooth_images(400), random_images(700, seed=4)
    extract = RandomFeatures(3)
    one, other = (extract(x)[0].double().numpy() for x in (images, reference))
    sigma = np.cov(one.T)
    values, vectors = np.linalg.eigh(sigma)
    half = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(half @ np.cov(other.T) @ half).clip(0)
    expected = (
        ((one.mean(0) - other.mean(0)) ** 2).sum()
        + np.trace(sigma)
        + np.trace(np.cov(other.T))
        - 2 * np.sqrt(product).sum()
    )
    assert distance(images, reference) == pytest.approx(expected, rel=1e-4)


# Whole scores


def test_score_of_a_flow(tmp_path):
    flow = small_flow()
    reference = smooth_images(300)
    n = IMAGE_UNIT + 44
    told = []
    cache = tmp_path / "cache"

    def score(protocol=None, parts=reference, **others):
        protocol = protocol or random_protocol(n, reference=("train", "valid"), seed=2)
        scores, missing = generation_scores(flow, parts, protocol, **others)
        assert missing == {}
        return scores["sample/fid_random_features"]

    one = score(progress=lambda *step: told.append(step), cache=cache)
    assert told == [
        *(("reference features", done, 300) for done in (0, 256, 300)),
        *(("samples", done, n) for done in (0, 256, n)),
    ]
    assert one.kind == one.unit == "score" and one.count == n and one.standard_error is None
    assert one.estimator.startswith("Fréchet distance of features of a random net, 300 samples")
    assert "train + valid" in one.estimator and "too few" not in one.estimator
    p = one.protocol
    assert p["n"] == n and p["seed"] == 2 and p["temperature"] == 1.0
    assert p["precision"] == "float32" and p["device"] == "cpu" and p["unit"] == 256
    assert p["reference"]["splits"] == ["train", "valid"] and p["reference"]["images"] == 300
    assert p["extractor"]["sha256"] == RandomFeatures(3).sha256
    assert p["library"].startswith("torch-fidelity ")
    json.dumps(asdict(one), allow_nan=False)
    # parts of a reference are one, batches change nothing, the cache gives what was there
    assert score(parts=[reference[:100], reference[100:]]) == one
    small = score(random_protocol(n, reference=("train", "valid"), seed=2, batch_size=7))
    assert small.value == pytest.approx(one.value, rel=1e-4)
    told.clear()
    assert score(progress=lambda *step: told.append(step), cache=cache) == one
    assert told[0] == ("reference features", 300, 300)
    assert len(list(cache.iterdir())) == 1
    assert score(parts=reference.flip(0), cache=cache).value == pytest.approx(one.value, rel=1e-4)
    assert len(list(cache.iterdir())) == 2
    # what does change it
    for change in ({"seed": 3}, {"temperature": 0.5}):
        other = score(random_protocol(n, **{"seed": 2, **change}))
        assert abs(other.value - one.value) > 1e-4 * one.value
    few = score(random_protocol(40))
    assert "40 images are too few for the covariance of 64 features" in few.estimator


def test_a_killed_score_goes_on(tmp_path, monkeypatch):
    flow, reference = small_flow(), smooth_images(100)
    protocol = random_protocol(2 * IMAGE_UNIT + 10)
    whole, _ = generation_scores(flow, reference, protocol)
    resume = tmp_path / "generation.npz"

    def killed(what, done, total):
        if (what, done) == ("samples", 2 * IMAGE_UNIT):
            raise KeyboardInterrupt

    options = {"resume": resume, "save_interval": 0}
    with pytest.raises(KeyboardInterrupt):
        generation_scores(flow, reference, protocol, progress=killed, **options)
    assert resume.is_file()
    drawn = []

    def counted(flow, index, *others):
        drawn.append(index)
        return draw_unit(flow, index, *others)

    monkeypatch.setattr(generation, "draw_unit", counted)
    again, _ = generation_scores(flow, reference, protocol, **options)
    assert drawn == [2]
    assert again == whole
    assert not resume.exists()
    # of other weights: all of them
    with pytest.raises(KeyboardInterrupt):
        generation_scores(flow, reference, protocol, progress=killed, **options)
    drawn.clear()
    with torch.no_grad():
        next(flow.parameters()).add_(0.01)
    generation_scores(flow, reference, protocol, **options)
    assert drawn == [0, 1, 2]


def test_neither_tf32_nor_autocast():
    seen = []

    class Watched(Fixed):
        def sample(self, n, temperature=1.0):
            seen.append(precision())
            return super().sample(n)

    def precision():
        return (
            torch.backends.cudnn.conv.fp32_precision,
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,
            torch.is_autocast_enabled("cpu"),
        )

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            outside = precision()
            images = random_images(4)
            generation_scores(Watched(images), images, random_protocol(4))
            assert precision() == outside
    finally:
        torch.set_float32_matmul_precision(before)
    assert outside == ("tf32", "tf32", "tf32", True)
    assert seen == [("ieee", "ieee", "ieee", False)]


def test_levels_are_scaled():
    few = random_images(200, levels=17)
    shown = full_range(few, 17)
    scores, _ = generation_scores(
        Fixed(few), random_images(150, seed=9, levels=17), random_protocol(200), num_levels=17
    )
    expected = distance(shown, full_range(random_images(150, seed=9, levels=17), 17))
    score = scores["sample/fid_random_features"]
    assert score.value == pytest.approx(expected, rel=1e-6)
    assert score.protocol["levels"] == "17, scaled to 256"


def test_broken_samples_are_a_missing_score():
    images = random_images(20).long()
    images[3, 0, 0, 0] = -(2**40)
    scores, missing = generation_scores(Fixed(images), random_images(30), random_protocol(20))
    assert scores == {}
    assert "in 1 of 20 images" in missing["sample/fid_random_features"]


def test_samples_that_are_no_numbers_are_a_missing_score():
    flow = Flow(StandardNormal(SHAPE), [Dequantization(256), Affine(SHAPE, learn=True)])
    with torch.no_grad():
        flow.transforms[1].shift.fill_(math.nan)
    scores, missing = generation_scores(flow, random_images(30), random_protocol(20))
    assert scores == {}
    assert "expected numbers" in missing["sample/fid_random_features"]


class Zeros(nn.Module):
    def forward(self, x):
        return x.new_zeros(len(x), 2 * (SHAPE[0] - 1), *SHAPE[1:])


def test_samples_of_another_setting_are_drawn_anew(tmp_path):
    """Not taken from the file of a flow with equal tensors."""
    reference, file = random_images(40, levels=4), tmp_path / "kept.npz"

    def scored(scale, **others):
        flow = Flow(StandardNormal(SHAPE), [Dequantization(4), AffineCoupling(Zeros(), scale)])
        protocol = random_protocol(IMAGE_UNIT + 40)
        scores, _ = generation_scores(flow, reference, protocol, num_levels=4, **others)
        return scores["sample/fid_random_features"].value

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if what == "samples" and done == IMAGE_UNIT:
            raise Stop

    with pytest.raises(Stop):
        # the first unit is kept where the second is asked for
        scored("exp", resume=file, progress=stop, save_interval=0.0)
    assert file.exists()
    wanted = scored("softplus")
    assert scored("softplus", resume=file) == wanted
    assert scored("exp") != wanted


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (torch.zeros(4, *SHAPE), "expected uint8 images"),
        (random_images(1), "at least 2 images, got 1"),
        (random_images(8, (3, 4, 4)), r"the samples' shape \(3, 8, 8\), got \(3, 4, 4\)"),
        ([random_images(8), random_images(8, (3, 4, 4))], "one shape"),
    ],
)
def test_wrong_reference(reference, message):
    with pytest.raises(ValueError, match=message):
        generation_scores(Fixed(random_images(9)), reference, random_protocol(9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 1}, "measures.samples.n: expected a whole number >= 2, got 1"),
        ({"batch_size": 0}, "measures.samples.batch_size: expected a positive whole number, got 0"),
        ({"temperature": 0.0}, "measures.samples.temperature: expected a positive number, got 0.0"),
        ({"extractor": "inceptoin"}, "did you mean 'inception'"),
    ],
)
def test_wrong_protocol(change, message):
    with pytest.raises(ValueError, match=message):
        GenerationProtocol(**change)


def test_seconds():
    seconds = generation_seconds(small_flow(), smooth_images(50), random_protocol(20))
    parts = ("reference features", "sampling", "sample features", "statistics")
    assert all(seconds[part] > 0 for part in parts)
    assert sum(seconds[part] for part in parts) <= seconds["total"]


# Inception


def write_untrained_weights(path, seed=0):
    """Random weights of the right names and shapes."""
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *given, **options):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    net = Untrained("untrained", ["2048"], feature_extractor_weights_path=nothing)
    generator = torch.Generator().manual_seed(seed)
    for weight in net.parameters():
        if weight.dim() > 1:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return write_untrained_weights(tmp_path_factory.mktemp("inception") / "untrained.pth")


def test_weights_of_another_checksum(untrained, capsys):
    state, digest = load_inception_weights(str(untrained))
    err = capsys.readouterr().err
    assert f"warning: measures.samples.weights: {untrained}" in err and err.count("\n") == 1
    assert f"expected sha256 {INCEPTION_SHA256}, got {digest}" in err
    assert digest == hashlib.sha256(untrained.read_bytes()).hexdigest()
    assert state["fc.weight"].shape == (1008, 2048)


def test_published_weights_give_no_warning(untrained, monkeypatch, capsys):
    digest = hashlib.sha256(untrained.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "INCEPTION_SHA256", digest)
    assert load_inception_weights(str(untrained))[1] == digest
    assert capsys.readouterr().err == ""


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", ["evil", "list", "bytes", "other", "folder", "nothing"])
def test_wrong_weights_file(content, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    message = "holds no plain tensors"
    if content == "evil":
        torch.save({"a": Evil()}, path)
    elif content == "list":
        torch.save([torch.zeros(2)], path)
        message = "expected a mapping of tensors"
    elif content == "bytes":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=2)[:-3])
    elif content == "folder":
        path.mkdir()
        message = "a folder"
    elif content == "nothing":
        message = "no such file"
    else:
        torch.save({"a": torch.zeros(2)}, path)
        message = "not of torch-fidelity's Inception"
    with pytest.raises(UserError, match=message) as error:
        InceptionFeatures(3, str(path))
    assert "\n" not in str(error.value) and "measures.samples.weights" in str(error.value)
    assert "this must not run" not in capsys.readouterr().out


def test_without_weights_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*given, **options):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    flow = Fixed(random_images(20))
    scores, missing = generation_scores(flow, random_images(30), GenerationProtocol(n=20))
    assert flow.next == 0 and scores == {}
    assert set(missing) == {"sample/inception_score", "sample/fid"}
    for line in missing.values():
        assert "\n" not in line and "no network here" in line
        assert "weights-inception-2015-12-05-6726825d.pth" in line
        assert "measures.samples.weights=PATH" in line


def test_download(tmp_path, monkeypatch):
    """A whole download is kept; a damaged one is not, and is a missing metric."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = tmp_path / "source.pth"
    source.write_bytes(b"weights")
    monkeypatch.setattr(inception, "INCEPTION_URL", source.as_uri())
    with pytest.raises(inception.Unavailable, match="invalid hash value"):
        inception_file()
    assert not list((tmp_path / "checkpoints").iterdir())
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(inception, "INCEPTION_SHA256", digest)
    path = inception_file()
    assert path.read_bytes() == b"weights"
    source.unlink()
    assert inception_file() == path  # it is there already


def test_inception_takes_rgb_and_grey(untrained):
    colour, grey = (InceptionFeatures(c, str(untrained)) for c in (3, 1))
    assert not any(p.requires_grad for p in colour.net.parameters())
    image = random_images(2, (1, 8, 8))
    with torch.no_grad():
        features, logits = colour(image.repeat(1, 3, 1, 1))
        same, _ = grey(image)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    torch.testing.assert_close(same, features)
    torch.testing.assert_close(logits, features @ colour.net.fc.weight.T, rtol=1e-4, atol=1e-4)
    assert (features[0] - features[1]).abs().max() > 0.01
    assert "repeated" in grey.details["channels"] and "channels" not in colour.details
    with pytest.raises(inception.Unavailable, match="1 or 3 channels, got 2"):
        InceptionFeatures(2, str(untrained))


@pytest.mark.slow
def test_inception_scores(untrained, tmp_path):
    """The scores of a flow are those of torch-fidelity's own functions on the same features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    flow, reference = small_flow(), smooth_images(24)
    protocol = GenerationProtocol(n=20, seed=1, batch_size=8)
    scores, missing = generation_scores(
        flow, reference, protocol, inception_weights=str(untrained), cache=tmp_path
    )
    assert missing == {} and list(scores) == ["sample/inception_score", "sample/fid"]
    extract = InceptionFeatures(3, str(untrained))
    with torch.no_grad():
        fake, logits = extract(as_images(draw_unit(flow, 0, 20, seed=1)))
        real, _ = extract(reference)
    statistics = [fid_features_to_statistics(x.double()) for x in (fake, real)]
    expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert scores["sample/fid"].value == pytest.approx(expected, rel=1e-4)
    assert "too few for the covariance of 2048" in scores["sample/fid"].estimator
    assert "not the published ones" in scores["sample/fid"].estimator
    assert scores["sample/fid"].protocol["extractor"]["published_weights"] is False
    found = isc_features_to_metric(logits, 10, True, 2020)
    score = scores["sample/inception_score"]
    assert score.value == pytest.approx(found["inception_score_mean"], rel=1e-4)


# As a measure


class Data:
    """Stands for a DataModule of images."""

    name, event_shape, num_levels, kind = "given", SHAPE, 256, "image"

    def __init__(self):
        self.splits = {"train": smooth_images(60), "valid": smooth_images(20, seed=1)}


def trained_in(root):
    return Trained(
        flow=small_flow(),
        data=Data(),
        split="test",
        seed=4,
        unit="bpd",
        eval_samples=1,
        iwbo_samples=0,
        folder=root / "run",
        cache=root / ".reference",
    )


def test_the_measure_of_samples(tmp_path, capsys):
    trained = trained_in(tmp_path)
    options = {"n": 30, "extractor": "random_features", "temperature": 0.7}
    scores = run_measures(trained, {"samples": Samples(**options)})
    assert trained.missing == {}
    score = scores["sample/fid_random_features"]
    expected, _ = generation_scores(
        small_flow(),
        torch.cat(list(Data().splits.values())),
        random_protocol(30, seed=4, temperature=0.7),
    )
    assert score == expected["sample/fid_random_features"]
    assert list(trained.folder.glob("*")) == []
    assert len(list((tmp_path / ".reference").iterdir())) == 1
    assert "30 samples scored: reference features" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected one of train, valid, test, got 'tset'"):
        Samples(**options, reference="tset")
    trained.data.event_shape = (2,)
    with pytest.raises(UserError, match="scores of samples are for images, not data=given"):
        Samples(**options)(trained)
    assert Samples()(trained) == []
    assert Samples.runtime == {"batch_size", "weights"}


def test_missing_scores_have_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*given, **options):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    trained = trained_in(tmp_path)
    assert run_measures(trained, {"samples": Samples(n=20)}) == {}
    assert set(trained.missing) == {"sample/inception_score", "sample/fid"}


def test_a_wrong_weights_file_shows_early(tmp_path):
    name = str(tmp_path / "none.pth")
    with pytest.raises(UserError, match="no such file"):
        Samples(n=30, weights=name).check_files()
    Samples(n=30, extractor="random_features", weights=name).check_files()  # they need none
    Samples(n=0, weights=name).check_files()
