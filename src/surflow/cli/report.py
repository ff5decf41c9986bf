"""Write a table and its figures from the records there are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from surflow.cli.common import guarded, one_line_errors, relative
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
from surflow.reporting import (
    Record,
    Table,
    TableSpec,
    build_table,
    load_record,
    load_records,
    load_spec,
    write_csv,
    write_markdown,
)
from surflow.reporting.records import RecordError, write_json_atomic
from surflow.reporting.spec import ColumnSpec
from surflow.reporting.table import Key


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
    folder.mkdir(parents=True, exist_ok=True)
    drawn = table.without_empty_rows() if spec.figure == "vae" else table
    pictures = {**DRAWN[spec.figure](drawn, folder), **_draw_curves(drawn, folder)}
    _copy_records(table, folder / "records")
    LAYOUTS[spec.layout](table, folder, make_command(cfg), pictures)
    return folder


def fill_table(cfg: DictConfig, spec: TableSpec, cells: Cells) -> Table:
    """The table, filled with the records of its runs that there are."""
    found = []
    exact = set(cells.hashes.values())
    current = {(c.row, c.data.name, c.seed) for k, c in cells.configs.items() if cells.complete(k)}
    for record in load_records(Path(cfg.run_root) / cfg.profile.name / spec.runs):
        # a record of another config counts (as refused) only where the right one is missing
        stale = not isinstance(record, RecordError) and record.config_hash not in exact
        if stale and (record.row, record.data, record.seed) in current:
            continue
        # trained and released weights are no earlier states of each other
        if stale and bool(record.weights) != (cfg.weights is not None):
            continue
        found.append(record)
    of_samples = {name for scores in SCORES.values() for name in scores}
    protocols = {
        key: wanted_protocol(config)
        for key, config in cells.configs.items()
        if cells.columns[key[1]].metric in of_samples
    }
    seeds = [int(seed) for seed in cfg.seeds]
    return build_table(spec, found, cells.hashes, cfg.profile.name, seeds, protocols)


def _any_file(files: dict[str, dict[str, Path | None]]) -> bool:
    return any(file for row in files.values() for file in row.values())


def _draw_comparison(table: Table, folder: Path) -> dict[str, str]:
    from surflow.reporting import figures

    files = figures.run_files(table, "picture.npz")
    if not _any_file(files):
        return {}
    figures.density_figure(files, folder / "density.png", metric=table.spec.metric)
    figures.sample_figure(files, folder / "samples.png", metric=table.spec.metric)
    return {
        "Densities: data and models": "density.png",
        "Samples: data and models": "samples.png",
    }


def _draw_each(table: Table, folder: Path) -> dict[str, str]:
    from surflow.reporting import figures

    pictures = {}
    for row, files in figures.run_files(table, "picture.npz").items():
        for file in filter(None, files.values()):
            name = f"{load_record(file.parent).row}.png"
            figures.model_figure(file, folder / name, title=row, metric=table.spec.metric)
            pictures[row] = name
    return pictures


def _draw_published(table: Table, folder: Path) -> dict[str, str]:
    from surflow.reporting import figures

    if all(cell.ours is None and cell.published is None for cell in table.cells.values()):
        return {}
    figures.published_figure(table, folder / "published.png")
    return {"Published values and ours": "published.png"}


def _draw_images(table: Table, folder: Path) -> dict[str, str]:
    from surflow.reporting import figures

    pictures = _draw_published(table, folder)
    if _any_file(figures.run_files(table, "images.npz")):
        figures.image_figure(table, folder / "samples.png")
        pictures["Samples: data and models"] = "samples.png"
    if _any_file(figures.run_files(table, "pyramid.npz")):
        drawn = figures.pyramid_figures(table, folder)
        captions = {
            "super_resolution": "Test images, and draws of the finest given the coarsest",
            "levels": "Unconditional draws, level by level",
        }
        pictures |= {captions[name]: path.name for name, path in drawn.items()}
    return pictures


def _draw_vae(table: Table, folder: Path) -> dict[str, str]:
    """Those of images, and what a VAE's posterior, prior and depth do."""
    from surflow.reporting import figures

    pictures = _draw_images(table, folder)
    placed = [cell for cell in table.cells.values() if cell.row.depth is not None]
    if any(cell.ours is not None or cell.published is not None for cell in placed):
        figures.depth_figure(table, folder / "depth.png")
        pictures["Against the number of flow layers"] = "depth.png"
    if _any_file(figures.run_files(table, "reconstructions.npz")):
        figures.reconstruction_figure(table, folder / "reconstructions.png")
        pictures["Reconstructions of training images"] = "reconstructions.png"
    if _any_file(figures.run_files(table, "latent.npz")):
        figures.latent_figure(table, folder / "latent.png")
        pictures["Aggregated posterior and prior"] = "latent.png"
    return pictures


def _draw_sets(table: Table, folder: Path) -> dict[str, str]:
    from surflow.reporting import figures, point_sets

    pictures = _draw_published(table, folder)
    if _any_file(figures.run_files(table, "points.npz")):
        point_sets.set_figure(table, folder / "samples.png")
        pictures["Samples: data and models"] = "samples.png"
    return pictures


DRAWN = {
    "comparison": _draw_comparison,
    "each": _draw_each,
    "images": _draw_images,
    "vae": _draw_vae,
    "sets": _draw_sets,
}
"""The pictures of a table beside its learning curves: captions and files, by its `figure`."""


def _draw_curves(table: Table, folder: Path) -> dict[str, str]:
    """The learning curves of the validation metric that most runs have logged."""
    from surflow.reporting import figures

    files = figures.run_files(table, "metrics.csv")
    if table.spec.layout != "grid" or not _any_file(files):
        return {}
    if table.spec.figure == "sets":
        from surflow.reporting.point_sets import set_curve_figure

        path = set_curve_figure(table, folder / "learning_curves.png")
        return {} if path is None else {"Learning curves": path.name}
    logged = {f: figures.validation_columns(f) for row in files.values() for f in row.values() if f}
    names = [name for columns in logged.values() for name in columns]
    if not names:
        return {}
    column = max(dict.fromkeys(names), key=names.count)
    shown = {
        row: {label: f if f and column in logged[f] else None for label, f in of_row.items()}
        for row, of_row in files.items()
    }
    metric = table.spec.metric or table.spec.columns[0].metric
    path = folder / "learning_curves.png"
    figures.learning_curve_figure(shown, path, column=column, metric=metric)
    return {"Learning curves": path.name}


def _copy_records(table: Table, folder: Path) -> None:
    """The records behind the table, one a run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    shared = [column.data for column in table.spec.columns]
    for cell in table.cells.values():
        column = cell.column
        name = column.data if shared.count(column.data) > 1 else column.name
        for record in cell.records:
            path = folder / f"{cell.row.name}-{name}-seed{record.seed}.json"
            write_json_atomic(path, _portable(json.loads(record.path.read_text("utf-8"))))


def _portable(content: Any) -> Any:
    """A record without the places of its files on the machine: of an absolute path, the name."""
    if isinstance(content, dict):
        return {key: _portable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_portable(value) for value in content]
    return Path(content).name if isinstance(content, str) and content.startswith("/") else content


def _write_grid(table: Table, folder: Path, command: str, pictures: dict[str, str]) -> None:
    write_csv(table, folder / "table.csv")
    write_markdown(table, folder / "table.md", command=command, figures=pictures)
    _say_where(folder, pictures)
    _print_table(table)


def _write_bounds(table: Table, folder: Path, command: str, pictures: dict[str, str]) -> None:
    from surflow.reporting import bounds, figures

    rows = bounds.bounds_rows(table)
    if any(row.gaps for row in rows):
        figures.gap_figure(rows, folder / "gap.png", profile=table.profile)
        pictures = {"Gap against the number of samples": "gap.png", **pictures}
    bounds.write_bounds(table, folder, command=command, figures=pictures)
    _say_where(folder, pictures)
    _print_bounds(table, rows)


LAYOUTS = {"grid": _write_grid, "bounds": _write_bounds}
"""What writes a table's pages, by its `layout`."""


def _say_where(folder: Path, pictures: dict[str, str]) -> None:
    drawn = ", ".join(pictures.values()) or "no figures"
    print(f"{relative(folder)}/: table.md, table.csv, {drawn}")


def _print_table(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    from surflow.reporting.table import cell_text

    unit = f" ({table.spec.unit})" if table.spec.one_metric else ""
    rich = RichTable(title=f"{table.spec.title}{unit}, profile {table.profile}")
    rich.add_column("")
    for column in table.spec.columns:
        rich.add_column(column.label)
    for row in table.spec.rows:
        cells = [table.cells[row.name, column.name] for column in table.spec.columns]
        rich.add_row(row.label, *(cell_text(cell, len(table.seeds)) for cell in cells))
    Console(width=140).print(rich)


def _print_bounds(table: Table, rows: list) -> None:
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
        register_resolvers()
        check_request(cfg)
        print(settle(cfg))
        spec = load_table_spec(cfg.artefact, cfg.profile.name)
        write_report(cfg, spec, plan_cells(cfg, spec))


main = guarded(_main)

if __name__ == "__main__":
    main()
