"""The request of ``reproduce`` and ``report``: checked, and completed where it was left open."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from surflow.config import PROFILES, conf_dir, project_root
from surflow.errors import UserError, check_choice, is_whole
from surflow.reporting import TableSpec, load_spec

LAUNCHERS = ("local", "submitit", "submitit_local", "submitit_slurm")
WEIGHTS = ("official",)


def check_request(cfg: DictConfig) -> None:
    """Refuse a request that cannot be meant, before anything runs.

    Raises:
        UserError: one line: the key, what is wrong, what would be right.
    """
    check_choice("launcher", cfg.launcher, LAUNCHERS, UserError)
    check_choice("profile", cfg.profile.name, ("default", "auto", *PROFILES), UserError)
    if cfg.weights is not None:
        check_choice("weights", cfg.weights, WEIGHTS, UserError)
    for key in ("seeds", "rows", "columns", "overrides"):
        value = cfg[key]
        if not (OmegaConf.is_list(value) or (value is None and key in ("rows", "columns"))):
            raise UserError(f"{key}: expected a list, such as {key}=[{value}], got {value}")
    seeds = list(cfg.seeds)
    if not seeds or not all(is_whole(s, 0) for s in seeds):
        raise UserError(f"seeds: expected whole numbers >= 0, such as [0,1,2], got {seeds}")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"seeds: expected each once, got {seeds}")
    if cfg.workers != "auto" and not is_whole(cfg.workers):
        raise UserError(f"workers: expected a positive whole number or auto, got {cfg.workers}")
    if cfg.devices is not None and not is_whole(cfg.devices):
        raise UserError(f"devices: expected a positive whole number or null, got {cfg.devices}")
    if not is_whole(cfg.nodes):
        raise UserError(f"nodes: expected a positive whole number, got {cfg.nodes}")
    if not (cfg.slurm is None or OmegaConf.is_dict(cfg.slurm)):
        raise UserError(f"slurm: expected a mapping, such as {{timeout_min: 60}}, got {cfg.slurm}")
    if cfg.weights_path is not None and cfg.weights is None:
        raise UserError("weights_path: of no effect without weights=official")


def table_spec(artefact: str) -> TableSpec:
    """experiments/<artefact>/table.yaml, all profiles of it.

    Raises:
        UserError: for an unknown artefact.
    """
    folder = project_root() / "experiments"
    known = sorted(p.parent.name for p in folder.glob("*/table.yaml"))
    check_choice("artefact", artefact, known, UserError)
    return load_spec(folder / artefact / "table.yaml")


def complete_request(cfg: DictConfig) -> TableSpec:
    """Replace ``submitit``, ``default`` and ``auto`` by the launcher and the profile that they
    stand for, and say which profile it is and why.

    Returns:
        the table under that profile.

    Raises:
        UserError: for several machines without Slurm; for released weights under profile smoke.
    """
    check_request(cfg)
    spec = table_spec(cfg.artefact)
    if cfg.launcher == "submitit":
        cfg.launcher = "submitit_slurm" if shutil.which("sbatch") else "submitit_local"
    if cfg.nodes > 1 and cfg.launcher != "submitit_slurm":
        raise UserError(
            f"nodes={cfg.nodes}: several machines need Slurm (launcher=submitit where sbatch is "
            "installed), and this would run on this machine alone"
        )
    if cfg.nodes > 1 and cfg.devices is None:
        raise UserError(f"nodes={cfg.nodes}: say with devices how many GPUs each machine has")
    name, why = cfg.profile.name, "as asked"
    if name == "default":
        name, why = spec.profile, "the default of this table"
    if name == "auto":
        name, why = fitting_profile(cfg)
    cfg.profile = OmegaConf.load(Path(conf_dir()) / "profile" / f"{name}.yaml")
    if cfg.weights is not None and name == "smoke":
        raise UserError(
            "weights=official: released weights are of the published models, which profile smoke "
            "does not have; choose profile=paper"
        )
    print(f"{cfg.artefact}: profile {name}, {why}", flush=True)
    return spec.of_profile(name)


def fitting_profile(cfg: DictConfig) -> tuple[str, str]:
    """The profile for this machine and request, and why."""
    import torch

    if cfg.weights is not None:
        return "paper", "since released weights are of the published models"
    if cfg.launcher == "submitit_slurm" and cfg.devices is not None:
        return "paper", "since its runs go to GPUs through Slurm"
    if torch.cuda.is_available():
        return "paper", "since this machine has a CUDA device"
    return (
        "smoke",
        "since this machine has no CUDA device (PROFILE=paper runs the published protocol)",
    )


def results_folder(cfg: DictConfig) -> Path:
    """The folder of the results: numbers of released weights have one of their own."""
    name = cfg.artefact if cfg.weights is None else f"{cfg.artefact}_{cfg.weights}"
    return Path(cfg.results_root) / cfg.profile.name / name


def make_command(cfg: DictConfig) -> str:
    """The make command that writes the table again."""
    words = [f"make reproduce-{cfg.artefact.replace('_', '-')}", f"PROFILE={cfg.profile.name}"]
    words.append(f"SEEDS={','.join(map(str, cfg.seeds))}")
    return " ".join([*words, *([f"WEIGHTS={cfg.weights}"] if cfg.weights else [])])


def shared_overrides(cfg: DictConfig) -> list[str]:
    """What the request adds to every run of it, besides ``overrides``."""
    chosen = {
        "weights.source": cfg.weights,
        "weights.path": cfg.weights_path,
        "measures.samples.weights": cfg.inception,
    }
    return [f"{key}={_quoted(value)}" for key, value in chosen.items() if value is not None]


def _quoted(value: Any) -> str:
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
