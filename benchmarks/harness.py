"""What the benchmarks share: timing in turns, medians, tables, files, and the pipeline they time.

Implementations are timed in turns, block by block, the order reversed each time: a machine whose
speed drifts slows all alike. A ratio is a ratio of blocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from surflow.cli.train import train
from surflow.config import build as config_object
from surflow.config import options_of, target_of
from surflow.data.module import TensorDataModule
from surflow.errors import UserError
from surflow.files import relative, write_bytes, write_json, write_text
from surflow.flow import Flow
from surflow.training.hardware import can_compile
from surflow.training.module import FlowModule
from surflow.training.origin import origin as origin_of
from surflow.training.origin import origin_line
from surflow.training.run import Run

K = TypeVar("K")


# The pipeline -------------------------------------------------------------------------------------


class Training(NamedTuple):
    """A training run that has not started.

    Attributes:
        data: the DataModule.
        flow: the model.
        optimizer: parameters -> optimizer.
        loss: (flow, whether to compile) -> the loss of a batch.
        train: trains the config's own copy of the flow, in the training loop.
    """

    data: TensorDataModule
    flow: Flow
    optimizer: Callable[..., torch.optim.Optimizer]
    loss: Callable[[Flow, bool], Callable[[Tensor], Tensor]]
    train: Callable[[], Any]


def build(config: DictConfig) -> Training:
    """The training run of a config; sets the number of threads that the config names."""
    run = Run(config)
    optimizer = config_object(config.optimizer)
    return Training(
        run.data,
        run.build_flow(),
        optimizer,
        lambda flow, compile: FlowModule(flow, optimizer, None, compile=compile)._loss,
        lambda: train(config),
    )


def compiles(wanted: str | bool) -> bool:
    """Whether ours is compiled: as the option ``compile`` says, "auto": where it can be."""
    if wanted not in ("auto", True, False):
        raise UserError(f"compile: expected auto, true or false, got {wanted!r}")
    return can_compile() if wanted == "auto" else bool(wanted)


# Timing -------------------------------------------------------------------------------------------


class Step:
    """A training step, called directly: forward, backward and optimizer.

    Args:
        loss: a batch -> its loss.
        optimizer: holds the parameters.
        pool: (N, *event), cut into batches that take turns.
        batch: B <= N; rows that fill no batch are left out.
        read_back: whether each step reads the loss, into ``last``.
    """

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        pool: Tensor,
        batch: int,
        read_back: bool = False,
    ) -> None:
        self.loss, self.optimizer, self.read_back = loss, optimizer, read_back
        self.batches = pool[: len(pool) // batch * batch].split(batch)
        self.position = 0
        self.last = float("nan")

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.batches[self.position])
        self.position = (self.position + 1) % len(self.batches)
        loss.backward()
        self.optimizer.step()
        if self.read_back:
            self.last = loss.item()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], times: int = 1, device: str = "cpu") -> float:
    """Seconds a call, over so many of them."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / times


def turn(names: Iterable[K], block: int) -> list[K]:
    """The order of a block: as given, then reversed, and so on."""
    return list(names)[:: 1 if block % 2 == 0 else -1]


def in_turns(clocks: Mapping[K, Callable[[], float]], blocks: int) -> dict[K, list[float]]:
    """What each clock says in each block."""
    times: dict[K, list[float]] = {name: [] for name in clocks}
    for block in range(blocks):
        for name in turn(clocks, block):
            times[name].append(clocks[name]())
    return times


def spread(values: Iterable[float], digits: int = 2) -> dict[str, float]:
    """Minimum, median and maximum, rounded."""
    values = list(values)
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def milliseconds(times: Mapping[str, Sequence[float]], digits: int = 2) -> dict[str, Any]:
    """The spread of each, from seconds."""
    return {name: spread((1e3 * s for s in v), digits) for name, v in times.items()}


def ratios(one: Sequence[float], other: Sequence[float], digits: int = 2) -> dict[str, float]:
    """The spread of one over the other, block by block."""
    return spread((a / b for a, b in zip(one, other, strict=True)), digits)


# What is written ----------------------------------------------------------------------------------


def options(node: DictConfig) -> dict[str, Any]:
    """The options of a `_target_` node, with the defaults of those that it leaves out."""
    plain = OmegaConf.to_container(node, resolve=True)
    return options_of(target_of(plain))[0] | plain


def picked(cfg: DictConfig, *keys: str) -> dict[str, Any]:
    """These options, as plain values."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    return {key: plain[key] for key in keys}


def shown(values: Mapping[str, float], digits: int = 2) -> str:
    """A spread as a cell: the median, in brackets its range."""
    low, median, high = (f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{median} ({low} to {high})"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table; the first ``text`` columns hold words, the others numbers."""
    rule = ["---"] * text + ["---:"] * (len(columns) - text)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def page_of(
    title: str, blocks: Iterable[str], result: dict[str, Any], command: str = "make bench"
) -> str:
    """A result as Markdown: a title, its blocks, the machine."""
    return "\n\n".join([f"# {title}", *blocks, origin_line(result, command)]) + "\n"


def origin() -> dict[str, Any]:
    """Commit, versions and machine; a change of the benchmarks too makes the commit dirty."""
    return origin_of("benchmarks")


def write(folder: Path, name: str, result: dict[str, Any], text: str, png: bytes | None) -> None:
    """Write a result as JSON, Markdown and maybe a PNG; print the Markdown."""
    files = [write_json(folder / f"{name}.json", result)]
    files.append(write_text(folder / f"{name}.md", text))
    if png is not None:
        files.append(write_bytes(folder / f"{name}.png", png))
    print(text)
    print(f"{relative(folder)}/: {', '.join(file.name for file in files)}")
