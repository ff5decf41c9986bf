"""Loggers: a CSV file that survives a resume, and wandb set up so that a dashboard groups runs.

And a stopwatch that survives a resume.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from surflow.files import write_text
from surflow.flow import Ledger


class CSVMetrics(Logger):
    """Append metrics to ``metrics.csv``, a row a step, with a fixed header.

    Lightning's own logger starts a new file for every version; this one goes on in the same file
    and, when a run is resumed, first drops the rows past the step it resumes from.

    Args:
        path: the file.
        columns: metric columns, behind ``step`` and ``epoch``.
    """

    def __init__(self, path: str | Path, columns: list[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = ["step", "epoch", *columns]
        self._pending: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        return None

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config is in the record."""

    @rank_zero_only
    def start(self, step: int) -> None:
        """Keep the rows up to ``step``; write the header of a new file."""
        rows: list[dict[str, str]] = []
        if step and self.path.is_file():
            with open(self.path, newline="") as file:
                rows = [r for r in csv.DictReader(file) if r["step"] and int(r["step"]) <= step]
        lines = [",".join(self.columns)]
        lines += [",".join(row.get(c) or "" for c in self.columns) for row in rows]
        write_text(self.path, "\n".join(lines) + "\n")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {k: v for k, v in metrics.items() if k in self.columns}
        if not set(row) - {"epoch", "step"}:
            return
        row = {**row, "step": step}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        with open(self.path, "a") as file:
            file.write(",".join(_text(row.get(c)) for c in self.columns) + "\n")


def _text(value: Any) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.8g}"


class Elapsed(Callback):
    """How long a run has taken, with the processes before this one up to the checkpoint resumed.

    Args:
        start: when this process began, by the clock.
        clock: seconds, as of ``time.monotonic``.

    Attributes:
        wall_before: seconds of the processes before this one.
    """

    def __init__(self, start: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.start = start
        self.clock = clock
        self.fit_start = clock()
        self.train_before = self.wall_before = 0.0

    @property
    def train(self) -> float:
        """Seconds of training."""
        return self.train_before + self.clock() - self.fit_start

    @property
    def wall(self) -> float:
        """Seconds in all."""
        return self.wall_before + self.clock() - self.start

    def state_dict(self) -> dict[str, float]:
        return {"train_s": self.train, "wall_s": self.wall}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.train_before, self.wall_before = state_dict["train_s"], state_dict["wall_s"]


def run_name(config: Mapping[str, Any]) -> str:
    """The row of a run, with its surjection where no experiment has named the row."""
    row, surjection = config["row"], config["surjection"]["name"]
    if row == config["model"]["name"] and surjection != "none":
        return f"{row}-{surjection}"
    return row


def wandb_logger(config: Mapping[str, Any], folder: Path, config_hash: str) -> Any:
    """A wandb logger whose run name, group, job type and tags a dashboard can group by.

    The id follows from the config, so that a resumed run continues its wandb run.

    Args:
        config: the resolved config of the run.
        folder: its folder; offline data go to wandb/ in it.
        config_hash: its hash.
    """
    from pytorch_lightning.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DISABLE_GIT", "true")
    folder.mkdir(parents=True, exist_ok=True)
    row, surjection = run_name(config), config["surjection"]["name"]
    logger = WandbLogger(
        project=config["logger"]["project"],
        entity=config["logger"]["entity"],
        offline=config["logger"]["offline"],
        save_dir=str(folder),
        id=f"{config['profile']['name']}-{config_hash}",
        resume="allow",
        name=f"{row}-{config['data']['name']}-seed{config['seed']}",
        group=config["artefact"],
        job_type=row,
        tags=[config["profile"]["name"], config["data"]["name"], surjection],
        config=dict(config),
    )
    # Lightning always hands it on, and wandb warns of it
    vars(logger).get("_wandb_init", {}).pop("anonymous", None)
    return logger


def ledger_table(ledger: Ledger) -> Any:
    """A likelihood ledger as a wandb table."""
    import wandb

    columns = ["layer", "kind", "bound", "mean_nats", "standard_error_nats"]
    rows = [[r.layer, r.kind, r.bound, r.mean, r.standard_error] for r in ledger]
    return wandb.Table(columns=columns, data=rows)
