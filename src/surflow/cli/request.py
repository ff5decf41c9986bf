"""What is asked of ``reproduce`` and ``report``: checked, and settled where it was left open."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from surflow.config import PROFILES, conf_dir
from surflow.errors import UserError, close_match

LAUNCHERS = ("local", "submitit", "submitit_local", "submitit_slurm")
WEIGHTS = ("official",)


def check_request(cfg: DictConfig) -> None:
    """Refuse a request that cannot be meant, before anything runs."""
    _one_of("launcher", cfg.launcher, LAUNCHERS)
    _one_of("profile", cfg.profile.name, ("auto", *PROFILES))
    if cfg.weights is not None:
        _one_of("weights", cfg.weights, WEIGHTS)
    for key in ("seeds", "rows", "columns", "overrides"):
        value = cfg[key]
        if not (OmegaConf.is_list(value) or (value is None and key in ("rows", "columns"))):
            raise UserError(f"{key}: expected a list, such as {key}=[{value}], got {value}")
    seeds = list(cfg.seeds)
    if not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise UserError(f"seeds: expected whole numbers >= 0, such as [0,1,2], got {seeds}")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"seeds: expected each once, got {seeds}")
    if cfg.workers != "auto" and not _positive(cfg.workers):
        raise UserError(f"workers: expected a positive whole number or auto, got {cfg.workers}")
    if cfg.devices is not None and not _positive(cfg.devices):
        raise UserError(f"devices: expected a positive whole number or null, got {cfg.devices}")
    if not _positive(cfg.nodes):
        raise UserError(f"nodes: expected a positive whole number, got {cfg.nodes}")
    if not (cfg.slurm is None or OmegaConf.is_dict(cfg.slurm)):
        raise UserError(f"slurm: expected a mapping, such as {{timeout_min: 60}}, got {cfg.slurm}")
    if cfg.weights_path is not None and cfg.weights is None:
        raise UserError("weights_path: of no effect without weights=official")


def _one_of(key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"{key}: expected one of {', '.join(known)}, got {value!r}"
            + close_match(str(value), known)
        )


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def settle(cfg: DictConfig) -> str:
    """Put the launcher and the profile that are meant in the place of ``submitit`` and ``auto``.

    Returns:
        which profile it is and why, in one line.

    Raises:
        UserError: for several machines without Slurm; for released weights under profile smoke.
    """
    if cfg.launcher == "submitit":
        cfg.launcher = "submitit_slurm" if shutil.which("sbatch") else "submitit_local"
    if cfg.nodes > 1 and cfg.launcher != "submitit_slurm":
        raise UserError(
            f"nodes={cfg.nodes}: several machines need Slurm (launcher=submitit where sbatch is "
            "installed), and this would run on this machine alone"
        )
    if cfg.nodes > 1 and cfg.devices is None:
        raise UserError(f"nodes={cfg.nodes}: say with devices how many GPUs each machine has")
    if cfg.profile.name != "auto":
        why = "as asked"
    else:
        name, why = fitting_profile(cfg)
        cfg.profile = OmegaConf.load(Path(conf_dir()) / "profile" / f"{name}.yaml")
    if cfg.weights is not None and cfg.profile.name == "smoke":
        raise UserError(
            "weights=official: released weights are of the published models, which profile smoke "
            "does not have; choose profile=paper"
        )
    return f"{cfg.artefact}: profile {cfg.profile.name}, {why}"


def fitting_profile(cfg: DictConfig) -> tuple[str, str]:
    """The profile for this machine and request, and why."""
    import torch

    choices = (
        (cfg.weights is not None, "paper", "since released weights are of the published models"),
        (
            cfg.launcher == "submitit_slurm" and cfg.devices is not None,
            "paper",
            "since its runs go to GPUs through Slurm",
        ),
        (torch.cuda.is_available(), "paper", "since this machine has a CUDA device"),
        (
            True,
            "smoke",
            "since this machine has no CUDA device (PROFILE=paper runs the published protocol)",
        ),
    )
    return next((name, why) for holds, name, why in choices if holds)


def results_name(cfg: DictConfig) -> str:
    """The folder of the results: numbers of released weights have one of their own."""
    return cfg.artefact if cfg.weights is None else f"{cfg.artefact}_{cfg.weights}"


def make_command(cfg: DictConfig) -> str:
    """The make command that writes the table again."""
    words = [f"make reproduce-{cfg.artefact.replace('_', '-')}", f"PROFILE={cfg.profile.name}"]
    words.append(f"SEEDS={','.join(map(str, cfg.seeds))}")
    return " ".join([*words, *([f"WEIGHTS={cfg.weights}"] if cfg.weights else [])])


def shared_overrides(cfg: DictConfig) -> list[str]:
    """What the request adds to every run of it, beside ``overrides``."""
    chosen = {
        "weights.source": cfg.weights,
        "weights.path": cfg.weights_path,
        "metrics.inception_weights": cfg.inception,
    }
    return [f"{key}={_quoted(value)}" for key, value in chosen.items() if value is not None]


def _quoted(value: Any) -> str:
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
