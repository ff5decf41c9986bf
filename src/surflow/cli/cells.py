"""The runs of a table: the config of every cell, which of them are to be run, what they have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from surflow.cli.request import make_command, results_folder, shared_overrides
from surflow.config import compose, conf_dir
from surflow.errors import UserError, close_match
from surflow.files import relative
from surflow.record import lacking, load_records
from surflow.reporting import Key, TableSpec, build_table, print_table, without_stale, write_table
from surflow.training.run import Run


@dataclass(frozen=True)
class Cell:
    """The run of a cell.

    Attributes:
        metric, data: of its column.
        overrides: what composes its config.
        config: composed.
        run: of the config, wherever it is to be carried out.
        chosen: whether it is to be run; all are reported.
    """

    metric: str
    data: str
    overrides: tuple[str, ...]
    config: DictConfig
    run: Run
    chosen: bool

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The protocol that the cell's metric must have; empty where any is right."""
        return self.run.wanted.get(self.metric, {})

    def to_run(self) -> bool:
        """Whether the cell has no record, or one without the score that it shows.

        A score that could not be computed (say, for want of the extractor's weights) is tried
        again: the run then computes that alone.
        """
        record = self.run.own_record()
        if record is None:
            return True
        return self.metric in self.run.wanted and lacking(record, self.run.wanted)


def plan_cells(cfg: DictConfig, spec: TableSpec) -> dict[Key, Cell]:
    """Compose the config of every cell; a mistake in any of them shows before one runs.

    Cells that are not chosen are not run, but what they have is reported. Rows that are quoted
    only have no config, nor have, where released weights are asked for, rows without any.
    """
    with_runs = [r for r in spec.rows if r.experiment and (r.official or cfg.weights is None)]
    if not with_runs:
        raise UserError(f"weights: no row of {spec.artefact} has released weights")
    rows = _chosen("rows", cfg.rows, [r.name for r in with_runs])
    columns = _chosen("columns", cfg.columns, [c.name for c in spec.columns])
    cells = {}
    for seed in cfg.seeds:
        for row in with_runs:
            for column in (c for c in spec.columns if c.shows(row.name)):
                published = [
                    f"experiment={row.experiment}",
                    *row.overrides,
                    *column.overrides,
                    f"profile={cfg.profile.name}",
                    f"seed={seed}",
                    f"run.root={cfg.run_root}",
                    *shared_overrides(cfg),
                ]
                overrides = (*published, *cfg.overrides)
                config = compose(overrides)
                run = Run(config, here=False)
                if cfg.overrides and cfg.profile.name == "paper":
                    _refuse_changed(run, Run(compose(published), here=False), cfg.overrides)
                chosen = row.name in rows and column.name in columns
                cell = Cell(column.metric, column.data, overrides, config, run, chosen)
                cells[row.name, column.name, int(seed)] = cell
    return cells


def runs_of(cells: Mapping[Key, Cell], to_run: bool = False) -> list[Key]:
    """The chosen cells, one a run, in the table's order, seed by seed; those that need one."""
    keys = [key for key, cell in cells.items() if cell.chosen and (not to_run or cell.to_run())]
    return list({cells[key].run.folder: key for key in reversed(keys)}.values())[::-1]


def _refuse_changed(run: Run, published: Run, overrides: Sequence[str]) -> None:
    """Under the paper's profile nothing may change what is computed: its cells get a verdict."""
    if run.hash != published.hash or run.wanted != published.wanted:
        raise UserError(
            f"overrides: {list(overrides)} change what the published protocol computes; keep to "
            "keys such as logger or compute.compile, choose profile=short, or train the run by "
            "itself with surflow-train"
        )


def _chosen(name: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    for item in wanted or ():
        if item not in known:
            wanted = f"{name}: expected some of {', '.join(known)}"
            raise UserError(f"{wanted}, got {item!r}{close_match(str(item), known)}")
    return list(wanted or known)


def cost_of(experiment: str) -> str:
    """What an experiment takes, as the head of its file says; empty where it does not."""
    head = (Path(conf_dir()) / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    found = re.search(r"^# Cost: +(.*(?:\n# {2,}.*)*)", head, re.M)
    return " ".join(found[1].replace("\n#", " ").split()) if found else ""


def write_report(cfg: DictConfig, spec: TableSpec, cells: Mapping[Key, Cell]) -> None:
    """Write results/<profile>/<artefact>/ (table.md, table.csv, figures, records) and say where."""
    hashes = {key: cell.run.hash for key, cell in cells.items()}
    found = load_records(Path(cfg.run_root) / cfg.profile.name / spec.runs)
    records = without_stale(found, hashes, released=cfg.weights is not None)
    protocols = {key: cell.protocol for key, cell in cells.items()}
    seeds = [int(seed) for seed in cfg.seeds]
    table = build_table(spec, records, hashes, cfg.profile.name, seeds, protocols)
    costs = {row.name: cost_of(row.experiment) for row in spec.rows if row.experiment}
    table = replace(table, costs=costs)
    folder = results_folder(cfg)
    figures = write_table(table, folder, make_command(cfg))
    shown = ", ".join(figures.values()) or "no figures"
    print(f"{relative(folder)}/: table.md, table.csv, {shown}")
    print_table(table)
