"""What a result was computed by: commit, versions, machine, memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from surflow.config import project_root
from surflow.portable import portable

PACKAGES = (
    "surflow",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "wandb",
    "torchmetrics",
    "torch-fidelity",
    "numpy",
)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=project_root(),
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def commit(*also: str) -> tuple[str, bool]:
    """The commit of the code, and whether the code that computes differs from it.

    Only files that a run reads count, and those in the folders ``also``: a result or a page that
    was written since does not make a run's code another.
    """
    head = _git("rev-parse", "HEAD")
    if head is None:
        return "unknown", True
    return head, bool(_git("status", "--porcelain", "--", "src", "conf", "pyproject.toml", *also))


def origin(*also: str) -> dict[str, Any]:
    """Commit (see :func:`commit`), versions and machine: what a result is a result of."""
    head, dirty = commit(*also)
    return {"commit": head, "dirty": dirty, "versions": versions(), "machine": machine()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerators; no name, no address."""
    info: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "kernels": "portable" if portable() else torch.backends.cpu.get_cpu_capability(),
    }
    try:
        import psutil

        info["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    except ImportError:
        pass
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return info


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def peak_memory_mib() -> float:
    """The most memory this process has held: resident, and on the accelerator if there is one."""
    try:
        import resource  # not on Windows
    except ImportError:
        import psutil

        peak = psutil.Process().memory_info().peak_wset / 2**20
    else:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if torch.cuda.is_available():
        peak += torch.cuda.max_memory_allocated() / 2**20
    return round(peak, 1)


def origin_line(result: dict[str, Any], command: str) -> str:
    """Machine, torch, commit and command of a result that holds :func:`origin`."""
    return (
        f"Machine: {result['machine']['cpu']}, {result['machine']['cores']} cores; "
        f"torch {result['versions']['torch']}; commit {result['commit'][:12]}"
        + ("+dirty" if result["dirty"] else "")
        + f". Written by `{command}`."
    )
