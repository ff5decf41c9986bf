"""What a machine can give a run: devices, precision, threads, compilation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from surflow.errors import UserError, check_choice, check_whole, is_whole
from surflow.memory import MODES
from surflow.portable import portable

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


def device_of_accelerator(accelerator: str) -> torch.device:
    """The first device of an accelerator."""
    kinds = {"gpu": "cuda", "cuda": "cuda", "mps": "mps", "cpu": "cpu"}
    kind = kinds.get(accelerator)
    if kind is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse one of Lightning's options that is out of range on any machine.

    Raises:
        UserError, ValueError: one line: the key, what is wrong, what would be right.
    """
    for key in ("max_epochs", "accumulate_grad_batches", "num_nodes", "log_every_n_steps"):
        check_whole(f"trainer.{key}", trainer.get(key), null=key != "max_epochs")
    clip = trainer.get("gradient_clip_val")
    if clip is not None and not (isinstance(clip, int | float) and clip > 0):
        raise UserError(
            f"trainer.gradient_clip_val: expected a positive number or null, got {clip}"
        )
    check_choice("trainer.accelerator", trainer.get("accelerator", "auto"), ACCELERATORS, UserError)
    check_choice("trainer.precision", trainer.get("precision", "32-true"), PRECISIONS, UserError)
    devices = trainer.get("devices", 1)
    if not (devices in ("auto", -1) or is_whole(devices)):
        raise UserError(
            f"trainer.devices: expected a positive whole number, -1 or auto, got {devices}"
        )


def check_machine(trainer: Mapping[str, Any], batch_size: int) -> None:
    """Refuse a device, a precision or a number of processes that this machine cannot give.

    Args:
        trainer: Lightning's options, checked.
        batch_size: training rows a step, over all processes.

    Raises:
        UserError: one line: the key, what is wrong, what would be right.
    """
    accelerator = trainer.get("accelerator", "auto")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={accelerator}: no CUDA device on this machine; "
            "use trainer.accelerator=cpu or auto"
        )
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "trainer.accelerator=mps: not available on this machine; use trainer.accelerator=cpu"
        )
    on_cpu = device_of_accelerator(accelerator).type == "cpu"
    if trainer.get("precision") == "16-mixed" and on_cpu:
        raise UserError(
            "trainer.precision=16-mixed: needs a GPU; on a CPU use bf16-mixed or 32-true"
        )
    devices = trainer.get("devices", 1)
    if on_cpu and devices == -1:
        raise UserError(
            "trainer.devices=-1: all devices, but there is no accelerator; on a CPU give the "
            "number of processes, such as trainer.devices=2"
        )
    there = torch.cuda.device_count()
    if is_whole(devices) and not on_cpu and there and devices > there:
        raise UserError(f"trainer.devices={devices}: this machine has {there} GPU(s)")
    here = there if not on_cpu and devices == -1 else devices
    processes = trainer.get("num_nodes", 1) * (here if isinstance(here, int) else 1)
    if processes > 1 and batch_size % processes:
        raise UserError(
            f"data.batch_size: expected a multiple of the {processes} processes, got {batch_size}"
        )


def check_compute(compute: Mapping[str, Any]) -> None:
    """Refuse an option of the group ``compute`` that is out of range.

    Raises:
        UserError, ValueError: one line: the key, what is wrong, what would be right.
    """
    check_whole("compute.threads", compute["threads"], null=True)
    check_whole("compute.finite_check_every", compute["finite_check_every"])
    if compute["compile"] not in ("auto", "nets", True, False):
        raise UserError(
            f"compute.compile: expected auto, nets, true or false, got {compute['compile']!r}"
        )
    check_choice("compute.memory", compute["memory"], MODES, UserError)
    if compute["channels_last"] not in ("auto", True, False):
        raise UserError(
            f"compute.channels_last: expected auto, true or false, got {compute['channels_last']}"
        )


def what_to_compile(compute: Mapping[str, Any], dims: int) -> str | None:
    """The whole "loss", only the couplings' "nets", or None; nothing where it is to be portable.

    Of images and sets, and where stretches are inverted on the way back, it is the nets: they are
    what is heavy there, those of equal shape are compiled once, and the whole loss takes minutes.

    Args:
        compute: the group's options.
        dims: dimensions of a row of the data.
    """
    wanted = compute["compile"]
    if wanted is False or portable():
        return None
    if not can_compile():
        if wanted == "auto":
            return None
        raise UserError(
            f"compute.compile={str(wanted).lower()}: no C++ compiler found; "
            "use compute.compile=auto"
        )
    nets = dims > 1 or compute["memory"] == "reversible"
    return "nets" if wanted == "nets" or (wanted == "auto" and nets) else "loss"


def can_compile() -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler, for code that runs on a CPU."""
    compiler = os.environ.get("CXX", "g++")
    return any(shutil.which(name) for name in (compiler, "g++", "clang++", "cl"))
