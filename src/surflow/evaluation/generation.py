"""Inception score and FID of a flow's samples, from memory, by torch-fidelity's formulas."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surflow.data.module import SPLITS, TensorDataModule
from surflow.data.pixels import BrokenSamples, as_images, full_range
from surflow.draws import device_of, full_float32
from surflow.errors import UserError, check_choice, check_whole, is_whole
from surflow.evaluation.inception import (
    INCEPTION_SHA256,
    InceptionFeatures,
    Unavailable,
    inception_file,
    load_inception_weights,
)
from surflow.evaluation.moments import FeaturePass
from surflow.evaluation.random_features import RandomFeatures
from surflow.evaluation.sampling import IMAGE_UNIT, draw_unit, num_units
from surflow.evaluation.trained import Trained
from surflow.files import sha256_of
from surflow.flow import Flow, flow_sha256
from surflow.metric import Metric
from surflow.progress import Progress, shown_progress, silent

EXTRACTORS = {kind.name: kind for kind in (InceptionFeatures, RandomFeatures)}
SHUFFLE_SEED = 2020  # torch-fidelity's own, of the splits of an Inception score


@dataclass(frozen=True)
class GenerationProtocol:
    """What a score of `n` samples depends on, besides the model and the reference images.

    Attributes:
        extractor: "inception", or "random_features" for checks without trained weights.
        reference: names of the splits that the samples are compared with.
        batch_size: images at a time through the extractor; changes nothing but rounding.
        splits: parts that an Inception score is averaged over.
    """

    n: int = 50_000
    extractor: str = "inception"
    reference: tuple[str, ...] = ("train", "valid")
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 256
    splits: int = 10

    def __post_init__(self) -> None:
        check_choice("measures.samples.extractor", self.extractor, EXTRACTORS)
        if not self.reference:
            raise ValueError("measures.samples.reference: expected some splits, got []")
        for split in self.reference:
            check_choice("measures.samples.reference", split, SPLITS)
        for key, least in (("n", 2), ("batch_size", 1), ("splits", 1)):
            check_whole(f"measures.samples.{key}", getattr(self, key), least)
        if not isinstance(self.temperature, int | float) or not self.temperature > 0:
            got = f"expected a positive number, got {self.temperature}"
            raise ValueError(f"measures.samples.temperature: {got}")


class Stopwatch:
    """Seconds by name: ``with watch("sampling"): ...`` adds to ``watch.seconds["sampling"]``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{name} {s:.1f} s" for name, s in self.seconds.items())


class _Reference:
    """Rows of several tensors as if they were one; nothing is copied but the rows asked for."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        for part in parts:
            if part.dtype != torch.uint8 or part.dim() != 4:
                got = f"{part.dtype} {tuple(part.shape)}"
                raise ValueError(f"reference: expected uint8 images (N, C, H, W), got {got}")
        if len({tuple(part.shape[1:]) for part in parts}) != 1:
            raise ValueError("reference: expected images of one shape")
        self.parts = list(parts)
        self.shape = tuple(parts[0].shape[1:])
        self.length = sum(len(part) for part in parts)
        if self.length < 2:
            raise ValueError(f"reference: expected at least 2 images, got {self.length}")

    def rows(self, start: int, stop: int) -> Tensor:
        found = []
        for part in self.parts:
            if start < len(part) and stop > 0:
                found.append(part[max(start, 0) : min(stop, len(part))])
            start, stop = start - len(part), stop - len(part)
        return torch.cat(found)

    def sha256(self) -> str:
        """Of shape and pixels, whatever parts they are in."""
        digest = hashlib.sha256(repr((self.length, *self.shape)).encode())
        for part in self.parts:
            for rows in part.split(4096):
                digest.update(rows.cpu().contiguous().numpy())
        return digest.hexdigest()


def fingerprint(*contents: Any) -> str:
    """SHA-256 of plain values, 64 hex digits."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


class Samples:
    """The measure of a model's samples: :func:`generation_scores`.

    What is drawn is kept in ``generation.npz`` of the run's folder until it is scored, and the
    statistics of the reference images in the cache.

    Args:
        n: images to draw; 0: no such scores. Other options: see :class:`GenerationProtocol`.
        weights: a file of Inception's weights; None: torch-fidelity's own download.

    Raises ValueError for options out of range.
    """

    runtime: ClassVar[frozenset[str]] = frozenset({"batch_size", "weights"})

    def __init__(
        self,
        n: int = 0,
        extractor: str = "inception",
        reference: str | Sequence[str] = ("train", "valid"),
        temperature: float = 1.0,
        batch_size: int = 256,
        weights: str | None = None,
    ) -> None:
        if not is_whole(n, 0) or n == 1:
            raise ValueError(
                f"measures.samples.n: expected 0 (none) or at least 2 images, got {n!r}"
            )
        reference = (reference,) if isinstance(reference, str) else tuple(reference)
        options = (extractor, reference, temperature)
        protocol = GenerationProtocol(n or 2, *options, batch_size=batch_size)
        self.protocol = protocol if n else None
        self.weights = weights

    @property
    def wanted(self) -> dict[str, dict[str, Any]]:
        """The protocol of each score, by name, as far as the options set it."""
        protocol = self.protocol
        if protocol is None:
            return {}
        kind = EXTRACTORS[protocol.extractor]
        told = {
            "n": protocol.n,
            "temperature": float(protocol.temperature),
            "reference.splits": list(protocol.reference),
        }
        return {name: told for name in (kind.inception_score, kind.distance) if name is not None}

    def check(self, data: TensorDataModule) -> None:
        """Raise UserError for data that are no images, before anything is trained."""
        if self.protocol is not None and len(data.event_shape) != 3:
            why = f"scores of samples are for images, not data={data.name}"
            raise UserError(f"measures.samples.n: {why}")

    def check_files(self) -> None:
        """Raise UserError for a weights file that is missing or damaged."""
        needed = self.protocol is not None and self.protocol.extractor == InceptionFeatures.name
        if needed and self.weights is not None:
            file = inception_file(self.weights)
            if sha256_of(file) != INCEPTION_SHA256:
                load_inception_weights(self.weights)

    def __call__(self, trained: Trained) -> list[Metric]:
        """The scores; the reasons of missing ones go to ``trained.missing``; see :meth:`check`."""
        data, protocol = trained.data, self.protocol
        if protocol is None:
            return []
        self.check(data)
        watch = Stopwatch()
        with shown_progress() as progress:
            scores, missing = generation_scores(
                trained.flow,
                [data.splits[split] for split in protocol.reference],
                replace(protocol, seed=trained.seed),
                inception_weights=self.weights,
                num_levels=data.num_levels,
                progress=progress,
                resume=trained.folder / "generation.npz",
                cache=trained.cache,
                stopwatch=watch,
            )
        if watch.seconds:
            print(f"{protocol.n:,} samples scored: {watch}", file=sys.stderr)
        trained.missing |= missing
        return list(scores.values())


@torch.no_grad()
def generation_scores(
    flow: Flow,
    reference: Tensor | Sequence[Tensor],
    protocol: GenerationProtocol,
    inception_weights: str | None = None,
    num_levels: int = 256,
    progress: Progress = silent,
    resume: Path | None = None,
    cache: Path | None = None,
    stopwatch: Stopwatch | None = None,
    save_interval: float = 60.0,
) -> tuple[dict[str, Metric], dict[str, str]]:
    r"""Inception score and FID of draws from a flow, or a Fréchet distance of random features.

    .. math:: \mathrm{IS} = \exp E_x \mathrm{KL}(p(y \mid x) \,\|\, p(y)), \quad
              \mathrm{FID} = |\mu_1 - \mu_2|^2
              + \mathrm{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})

    The draws are made in units of 256, each from a seed of its own, in evaluation mode and float32
    without TF32, and are kept only as features. Weights are looked for before anything is drawn.

    Args:
        flow: a model of integer images (C, H, W), on the device to compute on.
        reference: uint8 (N, C, H, W), or several such, on any device or mapped from disk.
        inception_weights: a file; None: torch hub's folder, or torch-fidelity's download.
        num_levels: K, levels of the images; fewer than 256 are scaled to 0 ... 255.
        progress: told "reference features" or "samples", images done, images in all.
        resume: a file that keeps what is done of the draws; a second call with the same weights
            and protocol resumes from it. Deleted at the end.
        cache: a folder that keeps the reference's statistics, by pixels and extractor.
        stopwatch: gets the seconds of reference features, sampling, sample features, statistics.
        save_interval: least seconds between writes of these files.

    Returns:
        scores by name, ``sample/inception_score`` and ``sample/fid``, or
        ``sample/fid_random_features``; and why those that are missing are, one line each.

    Raises:
        ValueError: for a reference that is no uint8 images, or of another shape than the samples.
        UserError: for a weights file that is missing, damaged or of another net.

    Cost: n samples; n + N images through the extractor; for Inception the eigenvalues of a
    2048 x 2048 matrix, and 4 kB of memory an image for its logits.

    Source: Salimans et al. 2016, arXiv 1606.03498, Sec. 4; Heusel et al. 2017, arXiv 1706.08500,
    Sec. 2.
    """
    watch = stopwatch or Stopwatch()
    images = _Reference([reference] if isinstance(reference, Tensor) else reference)
    device = device_of(flow)
    kind = EXTRACTORS[protocol.extractor]
    names = [name for name in (kind.inception_score, kind.distance) if name is not None]
    try:
        extract = kind(images.shape[0], inception_weights, device)
    except Unavailable as reason:
        return {}, {name: str(reason) for name in names}

    def features(drawn: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        parts = (full_range(x.to(device), num_levels) for x in drawn.split(protocol.batch_size))
        return _joined(map(extract, parts))

    def of_reference(unit: int) -> tuple[np.ndarray, None]:
        with watch("reference features"):
            return features(images.rows(unit * IMAGE_UNIT, (unit + 1) * IMAGE_UNIT))[0], None

    def of_samples(unit: int) -> tuple[np.ndarray, np.ndarray | None]:
        with watch("sampling"):
            drawn = _drawn(flow, unit, protocol, num_levels, images.shape)
        with watch("sample features"):
            return features(drawn)

    words = _protocol(flow, protocol, images, extract, num_levels)
    key, mark = _marks(flow, protocol, words, extract, num_levels)
    kept = None if cache is None else Path(cache) / f"{kind.name}-{key[:16]}.npz"
    real = FeaturePass(kind.dim, key, kept, save_interval)
    fake = FeaturePass(kind.dim, mark, resume, save_interval)
    with full_float32(), torch.autocast(device.type, enabled=False):
        real.run(
            num_units(images.length, IMAGE_UNIT),
            of_reference,
            lambda done: progress("reference features", done, images.length),
        )
        try:
            fake.run(
                num_units(protocol.n, IMAGE_UNIT),
                of_samples,
                lambda done: progress("samples", done, protocol.n),
            )
        except BrokenSamples as reason:
            return {}, {name: str(reason) for name in names}
    with watch("statistics"):
        scores, missing = _scores(real, fake, protocol, words, extract)
    if resume is not None:
        Path(resume).unlink(missing_ok=True)
    return {score.name: score for score in scores}, missing


def _joined(parts: Iterable[tuple[Tensor, Tensor | None]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Features and logits, where there are any, of all parts."""
    rows, logits = zip(*parts, strict=True)
    labelled = None if logits[0] is None else torch.cat(logits).cpu().numpy()
    return torch.cat(rows).cpu().numpy(), labelled


def _marks(
    flow: Flow, protocol: GenerationProtocol, words: dict[str, Any], extract: Any, num_levels: int
) -> tuple[str, str]:
    """Fingerprints of all that the features of the reference and of the samples follow from."""
    shared = [extract.sha256, num_levels, words["library"]]
    draws = [protocol.n, protocol.seed, protocol.temperature, IMAGE_UNIT]
    where = [*shared, words["device"], torch.__version__]
    return (
        fingerprint("reference", 1, words["reference"]["sha256"], *shared),
        fingerprint("samples", 1, flow_sha256(flow), draws, where),
    )


def _drawn(
    flow: Flow, unit: int, protocol: GenerationProtocol, num_levels: int, shape: tuple[int, ...]
) -> Tensor:
    """A unit of samples as uint8 images."""
    try:
        drawn = draw_unit(flow, unit, protocol.n, protocol.seed, protocol.temperature)
    except ValueError as error:  # a layer met what is not a number, or out of its range
        raise BrokenSamples(f"samples: {error}") from error
    drawn = as_images(drawn, num_levels)
    own = tuple(drawn.shape[1:])
    if own != shape:
        raise ValueError(f"reference: expected images of the samples' shape {own}, got {shape}")
    return drawn


def _protocol(
    flow: Flow, protocol: GenerationProtocol, images: _Reference, extract: Any, num_levels: int
) -> dict[str, Any]:
    """The protocol of the scores, for a record."""
    return {
        "n": protocol.n,
        "reference": {
            "splits": list(protocol.reference),
            "images": images.length,
            "sha256": images.sha256(),
        },
        "extractor": extract.details,
        "temperature": float(protocol.temperature),
        "seed": protocol.seed,
        "unit": IMAGE_UNIT,
        "precision": str(next((p.dtype for p in flow.parameters()), torch.float32))[6:],
        "device": device_of(flow).type,
        "library": f"torch-fidelity {importlib.metadata.version('torch-fidelity')}",
        **({"levels": f"{num_levels}, scaled to 256"} if num_levels != 256 else {}),
    }


def _scores(
    real: FeaturePass,
    fake: FeaturePass,
    protocol: GenerationProtocol,
    words: dict[str, Any],
    extract: Any,
) -> tuple[list[Metric], dict[str, str]]:
    n, length = protocol.n, words["reference"]["images"]
    scores: list[Metric] = []
    missing: dict[str, str] = {}
    if extract.inception_score is not None and n < protocol.splits:
        want = f"expected at least {protocol.splits} samples, one for each split, got {n}"
        missing[extract.inception_score] = f"measures.samples.n: {want}"
    elif extract.inception_score is not None:
        scores.append(_inception_score(fake.all_logits(), protocol, words, extract))
    few, rank = min(n, length), ""
    if few <= extract.dim:
        rank = (
            f"; {few} images are too few for the covariance of {extract.dim} features: too high, "
            "and comparable with nothing"
        )
    scores.append(
        Metric(
            name=extract.distance,
            value=frechet_distance(fake.moments.statistics(), real.moments.statistics()),
            unit="score",
            kind="score",
            estimator=(
                f"Fréchet distance of {extract.what}, {n} samples against {length} "
                f"{' + '.join(protocol.reference)} images{rank}{extract.caution}"
            ),
            count=n,
            protocol=words,
        )
    )
    return scores, missing


def generation_seconds(
    flow: Flow, reference: Tensor | Sequence[Tensor], protocol: GenerationProtocol, **others: Any
) -> dict[str, float]:
    """Where the time of :func:`generation_scores` goes: seconds by stage, and in total.

    The stages are "reference features", "sampling", "sample features", "statistics" (means,
    eigenvalues); "total" holds the rest too: loading weights, moments, files.
    """
    watch = Stopwatch()
    with watch("total"):
        _, missing = generation_scores(flow, reference, protocol, stopwatch=watch, **others)
    if missing:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    return watch.seconds


def frechet_distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The squared Fréchet distance of two normals, given as mu and sigma: torch-fidelity's."""
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return float(fid_statistics_to_metric(one, other, False)[KEY_METRIC_FID])


def _inception_score(
    logits: np.ndarray, protocol: GenerationProtocol, words: dict[str, Any], extract: Any
) -> Metric:
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    splits = protocol.splits
    found = isc_features_to_metric(torch.from_numpy(logits), splits, True, SHUFFLE_SEED)
    deviation = float(found[KEY_METRIC_ISC_STD])
    return Metric(
        name=extract.inception_score,
        value=float(found[KEY_METRIC_ISC_MEAN]),
        unit="score",
        kind="score",
        estimator=(
            f"mean over {splits} splits of {protocol.n} samples, standard deviation over them "
            f"{deviation:.3g}{extract.caution}"
        ),
        standard_error=deviation / math.sqrt(splits - 1) if splits > 1 else None,
        count=protocol.n,
        protocol={**words, "splits": splits, "splits_standard_deviation": deviation},
    )
