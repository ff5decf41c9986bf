"""Loggers: a CSV file that survives a resume, W&B grouped as a dashboard needs it, TensorBoard."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.loggers.tensorboard import TensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from surflow.files import write_text
from surflow.flow import Ledger

if TYPE_CHECKING:
    from surflow.training.run import Run


class CSVMetrics(Logger):
    """Append metrics to ``metrics.csv``, a row a step, with a fixed header.

    Lightning's own logger starts a new file for every version; this one goes on in the same file
    and, when a run is resumed, first drops the rows past the step it resumes from.

    Args:
        path: the file.
        columns: metric columns, after ``step`` and ``epoch``.
    """

    def __init__(self, path: str | Path, columns: list[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = ["step", "epoch", *columns]

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


TAG = 64
"""The most characters of a tag that W&B takes."""


def wandb_logger(
    run: Run,
    project: str = "surflow",
    entity: str | None = None,
    offline: bool = True,
    images: bool = True,
) -> Any:
    """A W&B logger whose run name, group, job type and tags a dashboard can group by.

    Its config has every option, also those at their defaults. Each run folder has an id of its own,
    so that a resumed run continues its W&B run.

    Args:
        run: to be logged; offline data go to wandb/ in its folder.
        project, entity: of W&B.
        offline: keep the data here; no account, no network.
        images: log the run's pictures too.
    """
    from pytorch_lightning.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DISABLE_GIT", "true")
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.options
    row, profile = config["row"], config["profile"]["name"]
    tags = (profile, config["data"]["name"], config["surjection"]["name"])
    logger = WandbLogger(
        project=project,
        entity=entity,
        offline=offline,
        save_dir=str(run.folder),
        id=re.sub(r"[^\w.-]", "-", f"{profile}-{config['artefact']}-{row}-{run.hash}"),
        resume="allow",
        name=f"{row}-{config['data']['name']}-seed{config['seed']}",
        group=config["artefact"],
        job_type=row,
        tags=[tag[:TAG] for tag in tags],
        config=config,
    )
    # Lightning always hands it on, and wandb warns of it
    vars(logger).get("_wandb_init", {}).pop("anonymous", None)
    logger.shows_images = images
    return logger


class TensorBoard(TensorBoardLogger):
    """TensorBoard event files in tensorboard/ of the run's folder: training, then final numbers.

    A file is named by the second in which it is opened, so the second one has a suffix.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(str(run.folder), name="tensorboard", version="")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        self._experiment = None
        self._kwargs["filename_suffix"] = ".final"


def log_result(
    loggers: Iterable[Any],
    values: Mapping[str, float],
    tables: Mapping[str, Ledger],
    pictures: Mapping[str, Path],
) -> None:
    """Add final numbers to every logger that keeps them; ledgers and pictures to W&B.

    Args:
        loggers: of the run.
        values: by name.
        tables: ledgers by name.
        pictures: files by name.
    """
    for logger in loggers:
        run = getattr(logger.experiment, "summary", None)  # only W&B has one
        if run is None:
            logger.log_metrics(dict(values))
            logger.finalize("success")
            continue
        import wandb

        run.update(dict(values))
        found = {name: ledger_table(ledger) for name, ledger in tables.items()}
        if getattr(logger, "shows_images", True):
            found |= {name: wandb.Image(str(path)) for name, path in pictures.items()}
        if found:
            logger.experiment.log(found)
        wandb.finish()


def ledger_table(ledger: Ledger) -> Any:
    """A likelihood ledger as a wandb table."""
    import wandb

    columns = ["layer", "kind", "bound", "mean_nats", "standard_error_nats"]
    rows = [[r.layer, r.kind, r.bound, r.mean, r.standard_error] for r in ledger]
    return wandb.Table(columns=columns, data=rows)
