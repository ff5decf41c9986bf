"""Move runs and records of the earlier config layout (until November 2026) to the present one.

Their numbers stay. A run gets the hash of its config in the present layout, and the folder that
follows from it; the earlier hash stays in its record as ``former_hash``. A run that is no row of a
table goes from ``paper/adhoc`` to ``free/adhoc``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from surflow.cli.command import guarded
from surflow.config import (
    HASHED_GROUPS,
    build,
    compose,
    config_hash,
    options_of,
    resolved,
    target_of,
)
from surflow.errors import UserError
from surflow.files import relative, replacing, write_json
from surflow.record import find_records
from surflow.reporting.question import leaves

MOVED = {
    "trainer.compile": "compute.compile",
    "trainer.threads": "compute.threads",
    "trainer.memory": "compute.memory",
    "trainer.channels_last": "compute.channels_last",
    "trainer.finite_check_every": "compute.finite_check_every",
    "trainer.log_every": "trainer.log_every_n_steps",
    "trainer.scored": "objective.scored",
    "trainer.ema_decay": "callbacks.ema.decay",
    "trainer.ema_every": "callbacks.ema.every",
    "model.scale": "model.map.scale",
    "model.num_bins": "model.map.num_bins",
    "model.bound": "model.map.bound",
    "model.min_bin": "model.map.min_bin",
    "model.min_slope": "model.map.min_slope",
    "surjection.transform.element": "surjection.element",
    "surjection.transform.probability": "surjection.probability",
    "surjection.transform.net.hidden_features": "surjection.net.hidden_features",
    "surjection.transform.net.activation": "surjection.net.activation",
}
"""Keys with another place; all others keep theirs."""

UNMOVED = ("name", "_target_", "_partial_", "in_features", "out_features")
"""Labels, targets, and sizes that follow from the data."""


def present_config(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run in the present layout.

    Args:
        earlier: its config in the earlier one, resolved.
    """
    names = {group: earlier[group]["name"] for group in ("data", "model", "surjection")}
    chosen = [f"{group}={name}" for group, name in names.items()]
    chosen += [f"{group}={earlier[group]['name']}" for group in ("optimizer", "schedule")]
    if earlier["artefact"] != "adhoc":
        chosen = [f"experiment={earlier['artefact'].replace('table5', 'table4')}/{earlier['row']}"]
        chosen += [f"data={names['data']}"]
    if earlier["trainer"].get("ema_decay") is not None:
        chosen.append("callbacks=ema")
    chosen += [f"profile={earlier['profile']['name']}", f"seed={earlier['seed']}"]
    config = resolved(compose(chosen))
    data = build(config["data"])
    # values that now follow from the data, where the config is silent
    derived = {f"data.{name}": value for name, value in vars(data).items()}
    derived["objective.unit"] = data.unit
    for key, value in leaves(dict(earlier)):
        group, _, name = key.partition(".")
        known = derived.get(key)
        known = list(known) if isinstance(known, tuple) else known
        if group in HASHED_GROUPS and (name in config[group] or known != value):
            _put(config, MOVED.get(key, key), value)
    return config


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key where its node has it, or its target takes it."""
    *parents, name = key.split(".")
    if not parents or parents[0] not in HASHED_GROUPS or name in UNMOVED:
        return
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return
    if name in node or ("_target_" in node and name in options_of(target_of(node))[0]):
        node[name] = value


def move_record(path: Path) -> bool:
    """Move one record, and the run that it is of; whether it was of the earlier layout."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if "former_hash" in record or "measures" in record:
        return False
    earlier = record["config_hash"]
    now = config_hash(present_config(record["config"]))
    found = {}
    for key, value in record.items():
        found[key] = value
        if key == "config_hash":
            found |= {"config_hash": now, "former_hash": earlier}
    if path.name == "record.json":
        path = _move_run(path.parent, earlier, now) / path.name
    write_json(path, found)  # last: an interrupted move is taken up again
    return True


def free_run(path: Path) -> bool:
    """File a run that is no row of a table under free, by model and surjection; whether it was
    filed under the published protocol. Copies of its record stay where they are."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if (record["artefact"], record["profile"], path.name) != ("adhoc", "paper", "record.json"):
        return False
    config = record["config"]
    row = config["row"]
    if row == record["model"] and record["surjection"] not in (None, "none"):
        row = f"{row}-{record['surjection']}"
    config["row"], config["profile"]["name"] = row, "free"
    told = {"profile": "free", "row": row, "experiment": f"adhoc/{row}", "config": config}
    folder = path.parent
    target = folder.parents[4] / "free" / "adhoc" / row / folder.parent.name / folder.name
    _refuse_to_replace(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(folder.rename(target) / path.name, record | told)
    return True


def _refuse_to_replace(target: Path) -> None:
    if target.exists():
        raise UserError(f"{relative(target)}: is there already; move or delete it first")


def _move_run(folder: Path, earlier: str, now: str) -> Path:
    target = folder.with_name(folder.name.replace(earlier[:8], now[:8]))
    if target != folder:
        _refuse_to_replace(target)
    for file in folder.glob("*.ckpt"):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint["surflow"]["config_hash"] = now
        with replacing(file) as temporary:
            torch.save(checkpoint, temporary)
    return folder.rename(target)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="move_runs.py", description=__doc__)
    parser.add_argument("root", type=Path, help="a folder of runs or of records, such as runs")
    root = parser.parse_args().root
    if not root.is_dir():
        raise UserError(f"root: expected a folder, got {root}")
    files = find_records(root)
    moved = sum(move_record(file) for file in files)
    free = sum(free_run(file) for file in sorted(root.rglob("record.json")))
    print(f"{relative(root)}: {moved} of {len(files)} records moved, {free} runs filed under free")


main = guarded(_main)

if __name__ == "__main__":
    main()
