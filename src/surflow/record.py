"""The schema of `record.json`, the file that a run ends with. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from surflow.metric import KINDS, Floor, Metric
from surflow.reading import Fields, shown

SCHEMA = 1
RECORD_NAME = "record.json"
SCORES_NAME = "scores.npz"


class RecordError(ValueError):
    """A record that cannot be used: which file, what is wrong, what would be right.

    `reason` is the message without the file. `artefact`, `row`, `data`, `seed` and `profile` are
    read from it where that is possible, None otherwise: a table can then name the cell concerned.
    """

    def __init__(self, path: Path, reason: str, content: Any = None) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason
        found = content if isinstance(content, dict) else {}
        texts = [found.get(key) for key in ("artefact", "row", "data", "profile")]
        texts = [text if isinstance(text, str) else None for text in texts]
        self.artefact, self.row, self.data, self.profile = texts
        seed = found.get("seed")
        self.seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else None


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of one `record.json`. Times are in seconds, memory in MiB.

    Attributes:
        config_hash: hash of what the run computes, 16 hex digits.
        former_hash: hash of the same run under an earlier layout of the config.
        config, measures: the resolved config, and the resolved options of the measures.
        missing: why a metric could not be computed, one line, by its name.
        floor: the lowest value of a metric, by its name.
        provenance: which data: name, version, rows, checksums.
        weights: the released weights; empty where the run trained its own.
        ledger: the likelihood layer by layer.
        truth: the comparison with a likelihood that is known by other means.
        commit: of the code, 40 hex digits, or "unknown".
        dirty: whether the code differs from the commit.
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
    former_hash: str | None = None
    config: Mapping[str, Any]
    measures: Mapping[str, Any] = field(default_factory=dict)
    status: str
    metrics: Mapping[str, Metric]
    missing: Mapping[str, str] = field(default_factory=dict)
    floor: Mapping[str, Floor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    truth: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    commit: str | None
    dirty: bool
    versions: Mapping[str, Any]
    machine: Mapping[str, Any]
    train_time_s: float | None = None
    wall_time_s: float | None = None
    peak_memory_mib: float | None = None

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.path.parent

    @property
    def short_commit(self) -> str:
        """Twelve digits of the commit, `+dirty` if the tree had changes, `unknown` without one."""
        return (self.commit[:12] if self.commit else "unknown") + ("+dirty" if self.dirty else "")

    def to_json(self) -> dict[str, Any]:
        """The layout on disk. Fields that have a default are left out where None or empty."""
        found: dict[str, Any] = {"schema": SCHEMA}
        for entry in fields(self):
            value = getattr(self, entry.name)
            optional = entry.default is None or entry.default_factory is dict
            if entry.name != "path" and not (optional and value in (None, {})):
                found[entry.name] = value
        found["metrics"] = {name: metric.to_json() for name, metric in self.metrics.items()}
        found["floor"] = {name: asdict(floor) for name, floor in self.floor.items()}
        return found


def load_record(path: str | Path) -> Record:
    """Read and check one record: a `record.json` or the run folder that holds it.

    Raises:
        RecordError: for a missing or truncated file, another schema, a missing or mistyped field,
            or a number that is not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECORD_NAME
    content = _parsed(path)
    top = Fields(content, lambda reason: RecordError(path, reason, content))
    if "schema" not in top:
        raise top.error("field 'schema' is missing")
    if content["schema"] != SCHEMA or isinstance(content["schema"], bool):
        raise top.error(f"schema must be {SCHEMA}, got {shown(content['schema'])}; run it again")
    texts = ("experiment", "artefact", "row", "data", "model", "profile", "status")
    optional = ("measures", "provenance", "weights", "ledger", "truth", "versions", "machine")
    times = ("train_time_s", "wall_time_s", "peak_memory_mib")
    missing = top.mapping("missing", {})
    reasons = Fields(missing, lambda reason: RecordError(path, reason, content), "missing")
    return Record(
        path=path,
        **{key: top.text(key) for key in texts},
        surjection=top.text("surjection", None),
        seed=top.whole("seed"),
        config_hash=top.text("config_hash", pattern="[0-9a-f]{16}"),
        former_hash=top.text("former_hash", None, pattern="[0-9a-f]{16}"),
        config=top.mapping("config"),
        metrics={name: _metric(name, one) for name, one in top.each("metrics")},
        missing={name: reasons.text(name) for name in missing},
        floor={n: Floor(f.number("value"), f.text("source")) for n, f in top.each("floor", {})},
        **{key: top.mapping(key, {}) for key in optional},
        parameters=top.whole("parameters", None),
        commit=top.text("commit", None, pattern="[0-9a-f]{40}|unknown"),
        dirty=top.flag("dirty", False),
        **{key: top.number(key, None, least=0) for key in times},
    )


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = "no such file; a finished run writes its record.json there"
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read as UTF-8 text ({error})"
    except json.JSONDecodeError as error:
        why = f"not valid JSON (line {error.lineno}: {error.msg}), truncated? run it again"
    raise RecordError(path, why)


def _metric(name: str, content: Fields) -> Metric:
    return Metric(
        name=name,
        value=content.number("value"),
        unit=content.text("unit"),
        kind=content.word("kind", KINDS),
        estimator=content.text("estimator"),
        standard_error=content.number("standard_error", None, least=0),
        count=content.whole("count", None),
        protocol=content.mapping("protocol", {}),
    )


def protocol_value(protocol: Mapping[str, Any], key: str) -> Any:
    """The value at a key such as ``reference.splits``; None where there is none."""
    value: Any = protocol
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def find_records(root: str | Path) -> list[Path]:
    """Every `record.json` under `root`, and what a table keeps in its folder `records`, sorted."""
    return sorted({*Path(root).rglob(RECORD_NAME), *Path(root).rglob("records/*.json")})


def load_records(root: str | Path) -> list[Record | RecordError]:
    """Every record under `root`, in order of path; one that cannot be used comes as its error."""
    loaded: list[Record | RecordError] = []
    for path in find_records(root):
        try:
            loaded.append(load_record(path))
        except RecordError as error:
            loaded.append(error)
    return loaded


def lacking(record: Record, wanted: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a record lacks a metric, or has it under another protocol.

    `wanted` is the protocol of each metric, by name; its keys are such as ``reference.splits``.
    """
    if wanted.keys() - record.metrics.keys():
        return True
    return any(
        protocol_value(record.metrics[name].protocol, key) != value
        for name, protocol in wanted.items()
        for key, value in protocol.items()
    )
