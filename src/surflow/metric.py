"""The one type of a number, from the function that computes it to the last table cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

KINDS = ("likelihood", "bound", "estimate", "score")


@dataclass(frozen=True)
class Metric:
    """One number about a trained model.

    Attributes:
        name: ``split/estimator_unit``, such as ``test/elbo_nats``.
        value: in ``unit``. Likelihoods and bounds are negated (lower is better) except those of
            sets a point.
        unit: nats, bpd, nats/point, score, units.
        kind: likelihood, bound (on one), estimate (of one), or score (none of these).
        estimator: how the number was obtained, in words.
        standard_error: in ``unit``, over the ``count`` points or samples; None where there is none.
        count: number of points or samples.
        protocol: further settings that a score depends on: number of samples, reference images,
            extractor and its checksum, temperature, precision.
    """

    name: str
    value: float
    unit: str
    kind: str
    estimator: str
    standard_error: float | None = None
    count: int | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: expected kind {', '.join(KINDS)}, got {self.kind!r}")
        if self.standard_error is not None and math.isnan(self.standard_error):
            object.__setattr__(self, "standard_error", None)

    def to_json(self) -> dict[str, Any]:
        """The fields without the name, which is the key of a record; absent ones are left out."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {key: value for key, value in found.items() if value is not None and value != {}}

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.name} = {self.value:.4f}{error} {self.unit}  ({self.kind}: {self.estimator})"


@dataclass(frozen=True)
class Floor:
    """The lowest value that a likelihood of any model can reach: the entropy of the data.

    Attributes:
        value: nats.
        source: how it was obtained.
    """

    value: float
    source: str
