"""Write a table and its figures from the records there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig

from surflow.cli.common import guarded, one_line_errors, relative
from surflow.config import (
    check_config,
    compose,
    conf_dir,
    config_hash,
    project_root,
    register_resolvers,
    run_dir,
)
from surflow.errors import UserError, close_match
from surflow.reporting import (
    TableSpec,
    build_table,
    load_record,
    load_records,
    load_spec,
    write_bytes_atomic,
    write_csv,
    write_markdown,
)
from surflow.reporting.records import RecordError

Key = tuple[str, str, int]
"""Row, column and seed."""


@dataclass
class Cells:
    """The runs of a table: for every row, column and seed its overrides and its config.

    `chosen` are those to run; all are reported.
    """

    overrides: dict[Key, list[str]]
    configs: dict[Key, DictConfig]
    hashes: dict[Key, str]
    chosen: list[Key]

    def folder(self, key: Key) -> Path:
        """Where the run of a cell lies."""
        return run_dir(self.configs[key])

    def complete(self, key: Key) -> bool:
        """Whether the cell has a record of exactly its config."""
        try:
            record = load_record(self.folder(key))
        except RecordError:
            return False
        return record.status == "complete" and record.config_hash == self.hashes[key]

    def missing(self) -> list[Key]:
        """The chosen cells without a record, in the table's order, seed by seed."""
        return [key for key in self.chosen if not self.complete(key)]


def load_table_spec(artefact: str) -> TableSpec:
    """experiments/<artefact>/table.yaml."""
    folder = project_root() / "experiments"
    known = sorted(p.parent.name for p in folder.glob("*/table.yaml"))
    if artefact not in known:
        raise UserError(
            f"artefact: expected one of {', '.join(known)}, got {artefact!r}"
            + close_match(str(artefact), known)
        )
    return load_spec(folder / artefact / "table.yaml")


def plan_cells(cfg: DictConfig, spec: TableSpec) -> Cells:
    """Compose the config of every cell; a mistake in any of them shows before one runs.

    Cells that are not chosen are not run, but what they have is reported.
    """
    rows = _chosen("rows", cfg.rows, [r.name for r in spec.rows])
    columns = _chosen("columns", cfg.columns, [c.name for c in spec.columns])
    cells = Cells({}, {}, {}, [])
    for seed in cfg.seeds:
        for row in spec.rows:
            for column in spec.columns:
                key = (row.name, column.name, int(seed))
                published = [
                    f"experiment={row.experiment}",
                    *row.overrides,
                    *column.overrides,
                    f"profile={cfg.profile.name}",
                    f"seed={seed}",
                    f"run.root={cfg.run_root}",
                ]
                cells.overrides[key] = [*published, *cfg.overrides]
                config = compose(cells.overrides[key])
                cells.configs[key] = config
                cells.hashes[key] = config_hash(config)
                if row.name in rows and column.name in columns:
                    cells.chosen.append(key)
                check_config(config)
                if cfg.overrides and cfg.profile.name == "paper":
                    _refuse_changed(cells.hashes[key], published, cfg.overrides)
    return cells


def _refuse_changed(digest: str, published: list[str], overrides: list[str]) -> None:
    """Under the paper's profile nothing may change what is computed: its cells get a verdict."""
    if digest != config_hash(compose(published)):
        raise UserError(
            f"overrides: {list(overrides)} change what the published protocol computes; keep to "
            "keys such as logger or trainer.compile, choose profile=short, or train the run by "
            "itself with surflow-train"
        )


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
    from surflow.reporting import bounds, figures

    found = []
    exact = set(cells.hashes.values())
    current = {(c.row, c.data.name, c.seed) for k, c in cells.configs.items() if cells.complete(k)}
    for record in load_records(Path(cfg.run_root) / cfg.profile.name / cfg.artefact):
        # a record of another config counts (as refused) only where the right one is missing
        stale = not isinstance(record, RecordError) and record.config_hash not in exact
        if stale and (record.row, record.data, record.seed) in current:
            continue
        found.append(record)
    table = build_table(spec, found, cells.hashes, cfg.profile.name, [int(s) for s in cfg.seeds])
    folder = Path(cfg.results_root) / cfg.profile.name / cfg.artefact
    (folder / "records").mkdir(parents=True, exist_ok=True)
    pictures = {}
    metric = {"metric": spec.metric}
    cells_ = figures.run_files(table, "picture.npz")
    if spec.figure == "each":
        for row, files in cells_.items():
            for file in files.values():
                if file is not None:
                    name = f"{load_record(file.parent).row}.png"
                    figures.model_figure(file, folder / name, title=row, **metric)
                    pictures[row] = name
    elif any(file for files in cells_.values() for file in files.values()):
        figures.density_figure(cells_, folder / "density.png", **metric)
        figures.sample_figure(cells_, folder / "samples.png", **metric)
        pictures["Densities: data and models"] = "density.png"
        pictures["Samples: data and models"] = "samples.png"
    curves = figures.run_files(table, "metrics.csv")
    if spec.layout == "grid" and any(p for r in curves.values() for p in r.values()):
        column = _validation_column(curves)
        figures.learning_curve_figure(
            curves, folder / "learning_curves.png", column=column, **metric
        )
        pictures["Learning curves"] = "learning_curves.png"
    for old in (folder / "records").glob("*.json"):
        old.unlink()
    for cell in table.cells.values():
        for record in cell.records:
            name = f"{cell.row.name}-{cell.column.name}-seed{record.seed}.json"
            write_bytes_atomic(folder / "records" / name, record.path.read_bytes())
    seeds = ",".join(map(str, cfg.seeds))
    target = (
        f"make reproduce-{cfg.artefact.replace('_', '-')} PROFILE={cfg.profile.name} SEEDS={seeds}"
    )
    if spec.layout == "bounds":
        rows = bounds.bounds_rows(table)
        if any(row.gaps for row in rows):
            figures.gap_figure(rows, folder / "gap.png", profile=cfg.profile.name)
            pictures = {"Gap against the number of samples": "gap.png", **pictures}
        bounds.write_bounds(table, folder, command=target, figures=pictures)
    else:
        write_csv(table, folder / "table.csv")
        write_markdown(table, folder / "table.md", command=target, figures=pictures)
    print(
        f"{relative(folder)}/: table.md, table.csv, {', '.join(pictures.values()) or 'no figures'}"
    )
    if spec.layout == "bounds":
        _print_bounds(table, rows)
    else:
        _print_table(table)
    return folder


def _validation_column(curves: dict) -> str:
    """The validation metric that the runs have logged: the objective's, not always the table's."""
    for files in curves.values():
        for file in files.values():
            if file is not None:
                with file.open() as lines:
                    header = lines.readline().strip().split(",")
                return next(c for c in header if c.startswith("val/"))
    raise AssertionError("called with at least one file")


def _print_table(table: object) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    from surflow.reporting.table import cell_text

    rich = RichTable(title=f"{table.spec.title} ({table.spec.unit}), profile {table.profile}")
    rich.add_column("")
    for column in table.spec.columns:
        rich.add_column(column.label)
    for row in table.spec.rows:
        cells = [table.cells[row.name, column.name] for column in table.spec.columns]
        rich.add_row(row.label, *(cell_text(cell, len(table.seeds)) for cell in cells))
    Console(width=140).print(rich)


def _print_bounds(table: object, rows: list) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    counts = sorted({k for row in rows for k in row.gaps})
    rich = RichTable(title=f"{table.spec.title} (nats), profile {table.profile}")
    for name in ("", "number", "log p(x)", *(f"gap, K = {k}" for k in counts), "verdict"):
        rich.add_column(name)
    for row in rows:
        gaps = [f"{row.gaps[k][2]:.4f} ± {row.gaps[k][3]:.4f}" if row.gaps else "" for k in counts]
        number = "exact" if row.exact else "bound"
        rich.add_row(row.label, number, f"{row.log_prob:.4f}", *gaps, row.verdict)
    Console(width=180).print(rich)


@hydra.main(config_path=conf_dir(), config_name="report", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        from surflow.cli.reproduce import check_request

        register_resolvers()
        check_request(cfg)
        spec = load_table_spec(cfg.artefact)
        write_report(cfg, spec, plan_cells(cfg, spec))


main = guarded(_main)

if __name__ == "__main__":
    main()
