"""Mean and covariance of features that come in batches, resumable from a file."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from surflow.files import write_npz


class Moments:
    r"""Mean and covariance of rows of D = ``dim`` numbers, in float64, without keeping the rows.

    .. math:: \mu = \frac1n \sum_i f_i, \quad
              \Sigma = \frac{1}{n-1} \sum_i (f_i - \mu)(f_i - \mu)^T

    Cost: B D² multiplications for B rows; 16 D² bytes.

    Source: Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # sum of outer products about the mean

    def update(self, rows: np.ndarray) -> None:
        """Add rows (B, D)."""
        rows = np.asarray(rows, np.float64)
        count = self.count + len(rows)
        mean = rows.mean(0)
        centred = rows - mean
        shift = mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter += np.outer(shift, shift * (self.count * len(rows) / count))
        self.mean = self.mean + shift * (len(rows) / count)
        self.count = count

    def statistics(self) -> dict[str, np.ndarray]:
        """What torch-fidelity calls them: mu (D,) and sigma (D, D), of two rows at least."""
        if self.count < 2:
            raise ValueError(f"covariance: expected at least 2 rows, got {self.count}")
        return {"mu": self.mean, "sigma": self.scatter / (self.count - 1)}


class FeaturePass:
    """Features of numbered units of images: their moments, and their logits where there are any.

    Args:
        dim: D, features an image.
        fingerprint: of everything the features follow from.
        path: a file that keeps what is done, from which an interrupted pass resumes; one with
            another fingerprint, or damaged, is ignored. None: nothing is kept.
        interval: least seconds between writes of that file.
    """

    def __init__(
        self, dim: int, fingerprint: str, path: Path | None = None, interval: float = 60.0
    ) -> None:
        self.moments = Moments(dim)
        self.logits: list[np.ndarray] = []
        self.done = 0
        self.fingerprint = fingerprint
        self.path = path
        self.interval = interval
        if path is not None:
            self._load(path)

    def run(
        self,
        units: int,
        features: Callable[[int], tuple[np.ndarray, np.ndarray | None]],
        progress: Callable[[int], None] = lambda images: None,
    ) -> None:
        """Add those of so many units that are not done yet.

        Args:
            features: of the unit with this number: features (B, D), logits (B, L) or None.
            progress: told the number of images done.
        """
        progress(self.moments.count)
        written = time.monotonic()
        while self.done < units:
            rows, logits = features(self.done)
            self.moments.update(rows)
            if logits is not None:
                self.logits.append(logits)
            self.done += 1
            if self.path is not None and (
                self.done == units or time.monotonic() >= written + self.interval
            ):
                self._save(self.path)
                written = time.monotonic()
            progress(self.moments.count)

    def all_logits(self) -> np.ndarray:
        """(N, L)."""
        return np.concatenate(self.logits)

    def _save(self, path: Path) -> None:
        m = self.moments
        write_npz(
            path,
            compressed=False,
            fingerprint=self.fingerprint,
            done=self.done,
            count=m.count,
            mean=m.mean,
            scatter=m.scatter,
            logits=self.all_logits() if self.logits else np.zeros((0, 0), np.float32),
        )

    def _load(self, path: Path) -> None:
        names = ("done", "count", "mean", "scatter", "logits")
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["fingerprint"]) != self.fingerprint:
                    return
                done, count, mean, scatter, logits = (file[name] for name in names)
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, zlib.error, BadZipFile):
            return  # none, or damaged: what was kept is computed again
        self.done = int(done)
        self.moments.count, self.moments.mean, self.moments.scatter = int(count), mean, scatter
        self.logits = [logits] if logits.size else []
