"""Write a table and its figures from the records there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from surflow.cli.common import guarded, one_line_errors
from surflow.cli.request import (
    check_request,
    make_command,
    results_name,
    settle,
    shared_overrides,
)
from surflow.cli.result import SCORES, scores_due, wanted_protocol
from surflow.config import (
    check_config,
    compose,
    conf_dir,
    config_hash,
    project_root,
    register_resolvers,
    resolved,
    run_dir,
)
from surflow.errors import UserError, close_match
from surflow.files import relative
from surflow.record import Record, RecordError, load_record, load_records
from surflow.reporting import (
    ColumnSpec,
    Key,
    Table,
    TableSpec,
    build_table,
    load_spec,
    print_table,
    without_stale,
    write_table,
)


@dataclass
class Cells:
    """The runs of a table: for every row, column and seed its overrides and its config.

    `chosen` are those to run; all are reported. Several cells may be of one run: they show other
    metrics of it.
    """

    columns: dict[str, ColumnSpec]
    overrides: dict[Key, list[str]]
    configs: dict[Key, DictConfig]
    hashes: dict[Key, str]
    chosen: list[Key]

    def folder(self, key: Key) -> Path:
        """Where the run of a cell lies."""
        return run_dir(self.configs[key])

    def record(self, key: Key) -> Record | None:
        """The complete record of exactly the cell's config, if there is one."""
        try:
            record = load_record(self.folder(key))
        except RecordError:
            return None
        complete = record.status == "complete" and record.config_hash == self.hashes[key]
        return record if complete else None

    def complete(self, key: Key) -> bool:
        """Whether the cell has a record of exactly its config."""
        return self.record(key) is not None

    def due(self, key: Key) -> bool:
        """Whether the cell needs a run: it has no record, or one without the score it shows.

        A score that could not be computed (say, for want of the extractor's weights) is tried
        again: the run then computes that alone.
        """
        record, config = self.record(key), self.configs[key]
        if record is None:
            return True
        metric = self.columns[key[1]].metric
        return metric in SCORES[config.metrics.extractor] and scores_due(config, record)

    def runs(self) -> list[Key]:
        """The chosen cells, one a run, in the table's order, seed by seed."""
        return self._distinct(self.chosen)

    def missing(self) -> list[Key]:
        """The chosen cells that need a run, one a run."""
        return self._distinct([key for key in self.chosen if self.due(key)])

    def _distinct(self, keys: list[Key]) -> list[Key]:
        return list({self.folder(key): key for key in reversed(keys)}.values())[::-1]


def load_table_spec(artefact: str, profile: str | None = None) -> TableSpec:
    """experiments/<artefact>/table.yaml, as it is under the profile; None: all of it."""
    folder = project_root() / "experiments"
    known = sorted(p.parent.name for p in folder.glob("*/table.yaml"))
    if artefact not in known:
        raise UserError(
            f"artefact: expected one of {', '.join(known)}, got {artefact!r}"
            + close_match(str(artefact), known)
        )
    spec = load_spec(folder / artefact / "table.yaml")
    return spec if profile is None else spec.of_profile(profile)


def plan_cells(cfg: DictConfig, spec: TableSpec) -> Cells:
    """Compose the config of every cell; a mistake in any of them shows before one runs.

    Cells that are not chosen are not run, but what they have is reported. Rows that are quoted
    only have no config, nor have, where released weights are asked for, rows without any.
    """
    with_runs = [r for r in spec.rows if r.experiment and (r.official or cfg.weights is None)]
    if not with_runs:
        raise UserError(f"weights: no row of {spec.artefact} has released weights")
    rows = _chosen("rows", cfg.rows, [r.name for r in with_runs])
    columns = _chosen("columns", cfg.columns, [c.name for c in spec.columns])
    cells = Cells({c.name: c for c in spec.columns}, {}, {}, {}, [])
    for seed in cfg.seeds:
        for row in with_runs:
            for column in (c for c in spec.columns if c.shows(row.name)):
                key = (row.name, column.name, int(seed))
                published = [
                    f"experiment={row.experiment}",
                    *row.overrides,
                    *column.overrides,
                    f"profile={cfg.profile.name}",
                    f"seed={seed}",
                    f"run.root={cfg.run_root}",
                    *shared_overrides(cfg),
                ]
                cells.overrides[key] = [*published, *cfg.overrides]
                config = compose(cells.overrides[key])
                cells.configs[key] = config
                cells.hashes[key] = config_hash(config)
                if row.name in rows and column.name in columns:
                    cells.chosen.append(key)
                check_config(config)
                if cfg.overrides and cfg.profile.name == "paper":
                    _refuse_changed(config, compose(published), cfg.overrides)
    return cells


def _refuse_changed(config: DictConfig, published: DictConfig, overrides: list[str]) -> None:
    """Under the paper's profile nothing may change what is computed: its cells get a verdict."""
    same = config_hash(config) == config_hash(published)
    if not same or _scoring(config) != _scoring(published):
        raise UserError(
            f"overrides: {list(overrides)} change what the published protocol computes; keep to "
            "keys such as logger or trainer.compile, choose profile=short, or train the run by "
            "itself with surflow-train"
        )


def _scoring(config: DictConfig) -> dict[str, Any]:
    """What samples are scored with, but for what changes no score."""
    free = ("batch_size", "inception_weights")
    return {key: value for key, value in resolved(config)["metrics"].items() if key not in free}


def _chosen(name: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    for item in wanted or ():
        if item not in known:
            raise UserError(
                f"{name}: expected some of {', '.join(known)}, got {item!r}"
                + close_match(item, known)
            )
    return list(wanted or known)


def write_report(cfg: DictConfig, spec: TableSpec, cells: Cells) -> Path:
    """Write results/<profile>/<artefact>/: table.md, table.csv, figures, records; say where."""
    table = fill_table(cfg, spec, cells)
    folder = Path(cfg.results_root) / cfg.profile.name / results_name(cfg)
    figures = write_table(table, folder, make_command(cfg))
    shown = ", ".join(figures.values()) or "no figures"
    print(f"{relative(folder)}/: table.md, table.csv, {shown}")
    print_table(table)
    return folder


def fill_table(cfg: DictConfig, spec: TableSpec, cells: Cells) -> Table:
    """The table, filled with the records of its runs that there are."""
    found = load_records(Path(cfg.run_root) / cfg.profile.name / spec.runs)
    records = without_stale(found, cells.hashes, released=cfg.weights is not None)
    of_samples = {name for scores in SCORES.values() for name in scores}
    protocols = {
        key: wanted_protocol(config)
        for key, config in cells.configs.items()
        if cells.columns[key[1]].metric in of_samples
    }
    seeds = [int(seed) for seed in cfg.seeds]
    return build_table(spec, records, cells.hashes, cfg.profile.name, seeds, protocols)


@hydra.main(config_path=conf_dir(), config_name="report", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        register_resolvers()
        check_request(cfg)
        print(settle(cfg))
        spec = load_table_spec(cfg.artefact, cfg.profile.name)
        write_report(cfg, spec, plan_cells(cfg, spec))


main = guarded(_main)

if __name__ == "__main__":
    main()
