"""Checkpoints: written whole or not at all, read without unpickling code, refused if not ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from surflow.errors import UserError
from surflow.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary file, flush it to disk, rename; load tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        try:
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: the checkpoint could not be written ({error}); the one before it is "
                "kept: free some space, then give the same command again to resume"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_file(path)  # also what processes of one run hand to each other


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU.

    Raises:
        UserError: where it is missing, truncated, or no checkpoint of a flow.
    """
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path}: expected a checkpoint with a state_dict, found something else")
    return checkpoint


def read_file(path: str | Path) -> Any:
    """Tensors and plain values of a file that torch has written, on the CPU.

    Raises:
        UserError: where it is missing or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train the run first, or name its .ckpt file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: damaged or truncated checkpoint ({first[:120]}); delete it and train "
            "the run again, from its start"
        ) from error


def check_same_run(
    checkpoint: Mapping[str, Any], config_hash: str, data: Mapping[str, str], name: str
) -> None:
    """Refuse a checkpoint of another config or of other data.

    Args:
        checkpoint: as read.
        config_hash: of this run; empty: not compared.
        data: SHA-256 of each split of this run; empty: not compared.
        name: of the file, for messages.

    Raises:
        UserError: one line.
    """
    own = checkpoint.get("surflow", {})
    theirs = own.get("config_hash")
    if config_hash and theirs != config_hash:
        raise UserError(
            f"{name}: written by another config (its hash is {theirs}, this config's is "
            f"{config_hash}); use the overrides it was trained with, or another folder"
        )
    changed = [s for s, digest in (own.get("data") or {}).items() if data.get(s, digest) != digest]
    if changed:
        raise UserError(
            f"{name}: trained on other data ({', '.join(changed)}: another SHA-256); bring back "
            "the data, or start anew with run.force=true or another run.root"
        )


def resume_point(checkpoint: dict[str, Any]) -> str:
    """Where training goes on: "after epoch 3", or "in epoch 4, after step 1200"."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    if epochs["processed"] < epochs["started"]:
        return f"in epoch {epochs['started']}, after step {int(checkpoint['global_step'])}"
    return f"after epoch {epochs['processed']}"


def flow_state(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The flow's own parameters and buffers (averaged ones where the run kept an average)."""
    prefix = "flow."
    state = checkpoint["state_dict"]
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
