"""The record that a run leaves behind (`record.json`), and atomic writes."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
RECORD_NAME = "record.json"
KINDS = ("likelihood", "bound", "score")


class RecordError(ValueError):
    """A record that cannot be used: which file, what is wrong, what would be right.

    `reason` is the message without the file. `artefact`, `row`, `data`, `seed` and `profile` are
    what could still be read of them (None otherwise), so that a table can name the cell concerned.
    """

    def __init__(self, path: Path, reason: str, content: Any = None) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        found = content if isinstance(content, dict) else {}

        def text(key: str) -> str | None:
            return found[key] if isinstance(found.get(key), str) else None

        self.artefact, self.row, self.data = text("artefact"), text("row"), text("data")
        self.profile = text("profile")
        seed = found.get("seed")
        self.seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else None


@dataclass(frozen=True)
class Metric:
    """One number of a run, in `unit`; `kind` says whether it is a likelihood, a bound on one, or a
    score of samples (FID, Inception score).

    `standard_error` (same unit, Monte Carlo over the `count` test points or samples) may be None.
    `protocol` is what a score depends on beside the model: number of samples, reference images,
    extractor and its checksum, temperature, precision; empty for a likelihood or a bound.
    """

    value: float
    unit: str
    kind: str
    estimator: str
    standard_error: float | None = None
    count: int | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Floor:
    """The best value any model can reach, in the unit of its metric, and how it is known."""

    value: float
    source: str


@dataclass(frozen=True)
class Record:
    """The content of one `record.json`. Times are in seconds, memory in MiB.

    `ledger` holds the likelihood layer by layer; `truth`, where the model's likelihood is known
    otherwise, its comparison with the bounds; both as written by the run. `missing` maps a metric
    that could not be computed to the reason, one line; `provenance` says which data it was (name,
    version, rows, checksum); `weights` describes released weights, and is empty where the run
    trained its own.
    """

    path: Path
    experiment: str
    artefact: str
    row: str
    data: str
    model: str
    surjection: str | None
    profile: str
    seed: int
    config_hash: str
    config: Mapping[str, Any]
    status: str
    metrics: Mapping[str, Metric]
    floor: Mapping[str, Floor]
    commit: str | None
    dirty: bool
    versions: Mapping[str, Any]
    machine: Mapping[str, Any]
    wall_time_s: float | None
    train_time_s: float | None
    peak_memory_mib: float | None
    ledger: Mapping[str, Any] = field(default_factory=dict)
    truth: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.path.parent

    @property
    def short_commit(self) -> str:
        """Twelve digits of the commit, `+dirty` if the tree had changes, `unknown` without one."""
        return (self.commit[:12] if self.commit else "unknown") + ("+dirty" if self.dirty else "")


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]


class _Reader:
    """Typed access to the fields of one JSON object; every failure names file, field and remedy."""

    def __init__(self, path: Path, fields: Any, where: str, content: Any) -> None:
        self.path, self.where, self.content = path, where, content
        if not isinstance(fields, dict):
            raise self.error(f"{where or 'the file'} must be a JSON object, got {_kind_of(fields)}")
        self.fields = fields

    def error(self, reason: str) -> RecordError:
        return RecordError(self.path, reason, self.content)

    def name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def get(self, key: str, optional: bool = False) -> Any:
        if key not in self.fields and not optional:
            raise self.error(f"field {self.name(key)!r} is missing")
        return self.fields.get(key)

    def text(self, key: str, optional: bool = False, pattern: str = "(?s).+") -> str | None:
        value = self.get(key, optional)
        if value is None and optional:
            return None
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            want = "a non-empty string" if pattern == "(?s).+" else f"a string matching {pattern}"
            raise self.error(f"field {self.name(key)!r} must be {want}, got {_kind_of(value)}")
        return value

    def number(self, key: str, optional: bool = False, least: float | None = None) -> float | None:
        value = self.get(key, optional)
        if value is None and optional:
            return None
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or (least is not None and value < least):
            want = "a finite number" + ("" if least is None else f", {least:g} or more")
            raise self.error(f"field {self.name(key)!r} must be {want}, got {_kind_of(value)}")
        return float(value)

    def integer(self, key: str, optional: bool = False) -> int | None:
        value = self.get(key, optional)
        if value is None and optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(
                f"field {self.name(key)!r} must be an integer, 0 or more, got {_kind_of(value)}"
            )
        return value

    def mapping(self, key: str, optional: bool = False) -> dict[str, Any]:
        value = self.get(key, optional)
        if value is None and optional:
            return {}
        if not isinstance(value, dict):
            raise self.error(
                f"field {self.name(key)!r} must be a JSON object, got {_kind_of(value)}"
            )
        return value


def load_record(path: str | Path) -> Record:
    """Read and check one record.

    `path` is a `record.json` or the run folder that holds it. Raises `RecordError` (a `ValueError`)
    for a missing or truncated file, another schema, a missing or mistyped field, or a number that
    is not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECORD_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(
            path, "no such file; a finished run leaves its record.json there"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(path, f"cannot be read as UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise RecordError(
            path, f"not valid JSON (line {error.lineno}: {error.msg}), truncated? run it again"
        ) from None

    top = _Reader(path, content, "", content)
    schema = top.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise top.error(f"schema must be {SCHEMA}, got {_kind_of(schema)}; run it again")

    metrics = {}
    for name, fields in top.mapping("metrics").items():
        one = _Reader(path, fields, f"metrics.{name}", content)
        kind = one.text("kind")
        if kind not in KINDS:
            raise one.error(f"field {one.name('kind')!r} must be one of {KINDS}, got {kind!r}")
        metrics[name] = Metric(
            value=one.number("value"),
            unit=one.text("unit"),
            kind=kind,
            estimator=one.text("estimator"),
            standard_error=one.number("standard_error", optional=True, least=0),
            count=one.integer("count", optional=True),
            protocol=one.mapping("protocol", optional=True),
        )
    floor = {}
    for name, fields in top.mapping("floor", optional=True).items():
        one = _Reader(path, fields, f"floor.{name}", content)
        floor[name] = Floor(value=one.number("value"), source=one.text("source"))

    absent = _Reader(path, top.mapping("missing", optional=True), "missing", content)
    missing = {name: absent.text(name) for name in absent.fields}

    dirty = top.get("dirty", optional=True)
    if dirty not in (None, False, True):
        raise top.error(f"field 'dirty' must be true or false, got {_kind_of(dirty)}")
    return Record(
        path=path,
        experiment=top.text("experiment"),
        artefact=top.text("artefact"),
        row=top.text("row"),
        data=top.text("data"),
        model=top.text("model"),
        surjection=top.text("surjection", optional=True),
        profile=top.text("profile"),
        seed=top.integer("seed"),
        config_hash=top.text("config_hash", pattern="[0-9a-f]{16}"),
        config=top.mapping("config"),
        status=top.text("status"),
        metrics=metrics,
        floor=floor,
        commit=top.text("commit", optional=True, pattern="[0-9a-f]{40}|unknown"),
        dirty=bool(dirty),
        versions=top.mapping("versions", optional=True),
        machine=top.mapping("machine", optional=True),
        wall_time_s=top.number("wall_time_s", optional=True, least=0),
        train_time_s=top.number("train_time_s", optional=True, least=0),
        peak_memory_mib=top.number("peak_memory_mib", optional=True, least=0),
        ledger=top.mapping("ledger", optional=True),
        truth=top.mapping("truth", optional=True),
        parameters=top.integer("parameters", optional=True),
        missing=missing,
        provenance=top.mapping("provenance", optional=True),
        weights=top.mapping("weights", optional=True),
    )


def protocol_value(protocol: Mapping[str, Any], key: str) -> Any:
    """The value at a key such as ``reference.splits``; None where there is none."""
    value: Any = protocol
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def find_records(root: str | Path) -> list[Path]:
    """Every `record.json` under `root`, sorted; an empty list where there is no such folder."""
    return sorted(Path(root).rglob(RECORD_NAME))


def load_records(root: str | Path) -> list[Record | RecordError]:
    """Every record under `root`, in order of path; one that cannot be used comes as its error.

    `surflow.reporting.table.build_table` takes such a list: a broken record refuses its own cell
    and leaves the rest of the table alone.
    """
    loaded: list[Record | RecordError] = []
    for path in find_records(root):
        try:
            loaded.append(load_record(path))
        except RecordError as error:
            loaded.append(error)
    return loaded


def write_bytes_atomic(path: str | Path, content: bytes) -> Path:
    """Write `content` so that a reader sees the old file or the new one, never half of it.

    Creates missing folders. The temporary file lies in the same folder and is removed on failure.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text_atomic(path: str | Path, text: str) -> Path:
    """`write_bytes_atomic` of `text` in UTF-8, line ends untouched."""
    return write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | Path, obj: Any) -> Path:
    """`write_text_atomic` of `obj` as indented JSON.

    Raises `ValueError` for NaN or infinity and `TypeError` for what JSON cannot say, before the
    file is touched.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text_atomic(path, text + "\n")
