"""Tiny runs: composed configs, commands in this process and in processes of their own."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from forked import forked, module

TINY = (
    "data.train_size=640",
    "data.valid_size=200",
    "data.test_size=500",
    "data.batch_size=128",
    "model.net.hidden_features=[16]",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=2",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "run.pictures=false",
    "logger=csv",
)


class Outcome(NamedTuple):
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    """One thread, no debugging switches, no network for wandb."""
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("SURFLOW_", "WANDB_"))}
    return {**quiet, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@pytest.fixture
def root(tmp_path) -> Path:
    """The run root of a test."""
    return tmp_path / "runs"


@pytest.fixture
def tiny(root) -> Callable[..., list[str]]:
    """Overrides of a tiny run in this test's run root, and the test's own behind them."""
    return lambda *overrides: [*TINY, f"run.root={root}", *overrides]


@pytest.fixture
def config(tiny):
    """The composed config of a tiny run."""
    from surflow.config import compose

    return lambda *overrides, name="train": compose(tiny(*overrides), name)


@pytest.fixture
def train(config):
    """Train a tiny run in this process; returns its config, folder and metrics."""
    from surflow.cli.train import train as train_run
    from surflow.config import run_dir

    def run(*overrides: str):
        cfg = config(*overrides)
        metrics = train_run(cfg)
        return cfg, run_dir(cfg), metrics

    return run


@pytest.fixture
def call(monkeypatch, capfd):
    """A command in this process, through its guarded main."""
    import importlib

    monkeypatch.delenv("SURFLOW_DEBUG", raising=False)

    def run(command: str, *arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"surflow-{command}", *arguments])
        capfd.readouterr()
        code = 0
        try:
            importlib.import_module(f"surflow.cli.{command}").main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def start(tmp_path):
    """A command in a process of its own, running; ended with the test if it has not.

    Ctrl-c interrupts it, also where the tests were started in the background by a shell, whose
    children ignore SIGINT.
    """
    begun = []

    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def run(command: str, *arguments: str) -> subprocess.Popen:
        line = [sys.executable, "-m", f"surflow.cli.{command}", *arguments]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        own = {"cwd": tmp_path, "env": environment(), "preexec_fn": interruptible}
        begun.append(subprocess.Popen(line, **own, **pipe))
        return begun[-1]

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def command(tmp_path):
    """A command in a fork of this process, to its end."""

    def run(name: str, *arguments: str) -> Outcome:
        done = forked(module(f"surflow.cli.{name}", *arguments), tmp_path, environment())
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def rows():
    """The rows of a run's metrics.csv."""

    def read(folder: Path) -> list[dict[str, str]]:
        with open(folder / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture
def weights():
    """The flow's weights in a run's last checkpoint."""
    from surflow.training.checkpoint import flow_state, load_checkpoint

    return lambda folder, name="last.ckpt": flow_state(load_checkpoint(folder / name))
