"""Random numbers and precision while a flow is trained, scored or sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters and buffers; the CPU for one without any."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def seed_draws(device: torch.device, *key: int) -> None:
    """Seed the generators of the CPU and of a device by a hash of whole numbers >= 0.

    The hash mixes all bits of the key into the low 32, the only ones that torch's generator on
    the CPU reads.

    >>> cpu = torch.device("cpu")
    >>> seed_draws(cpu, 3, 0, 7)
    >>> first = torch.rand(3)
    >>> seed_draws(cpu, 3, 0, 7)
    >>> torch.equal(torch.rand(3), first)
    True
    """
    _seed(device, int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def _seed(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes ten times as long
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Draws of the block that do not move those after it: it takes one draw, whatever it makes.

    So initial weights of the layers after a choice are the same whatever is chosen.

    >>> firsts = []
    >>> for count in (1, 100):
    ...     _ = torch.manual_seed(0)
    ...     with apart():
    ...         inside = torch.rand(count)
    ...     firsts.append(torch.rand(3))
    >>> torch.equal(*firsts)
    True
    """
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def restored_draws(device: torch.device) -> Iterator[None]:
    """Restore the random state of the CPU and of a device at the end of the block."""
    if device.type == "mps":
        state = torch.mps.get_rng_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if device.type == "mps":
            torch.mps.set_rng_state(state)


@contextlib.contextmanager
def evaluating(flow: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Evaluation mode without gradients; mode and random state are restored at the end.

    Args:
        flow: the model.
        seed: of ``torch.manual_seed``; None leaves the state as it is.
    """
    training = flow.training
    flow.eval()
    try:
        with torch.no_grad(), restored_draws(device_of(flow)):
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        flow.train(training)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions and matrix products of float32 without TF32, which keeps 10 bits of 23."""
    cuda, cudnn, cpu = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    if hasattr(cuda, "fp32_precision"):
        name, value = "fp32_precision", "ieee"
        switches = [cuda, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn]
    else:  # before torch 2.9
        name, value = "allow_tf32", False
        switches = [cuda, cudnn]
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, value)
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            setattr(switch, name, old)
