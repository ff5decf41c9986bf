"""A filled table into its folder, and onto the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surflow.files import write_json, write_text
from surflow.reporting import bounds, comparison, grid
from surflow.reporting.table import Table
from surflow.reporting.text import file_name

LAYOUTS = {"grid": grid, "bounds": bounds, "comparison": comparison}
"""The module of each `layout`: `render_csv`, `render_markdown`, `summary`."""


def write_table(table: Table, folder: Path, command: str) -> dict[str, str]:
    """Write table.csv, table.md, the figures, and the records of the table into a folder.

    `command` writes the table again. Returns the figures: files by caption.
    """
    from surflow.reporting.figures.registry import write_figures

    folder.mkdir(parents=True, exist_ok=True)
    layout = LAYOUTS[table.spec.layout]
    figures = write_figures(table, folder)
    _write_records(table, folder / "records")
    write_text(folder / "table.csv", layout.render_csv(table))
    write_text(folder / "table.md", layout.render_markdown(table, command=command, figures=figures))
    return figures


def _write_records(table: Table, folder: Path) -> None:
    """The records of the table, one a run, in place of those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    shared = [c.data for c in table.spec.columns if table.spec.layout != "comparison"]
    for cell in table.cells.values():
        column = cell.column
        name = column.data if shared.count(column.data) > 1 else column.name
        for record in cell.records:
            file = file_name(f"{cell.row.name}-{name}-seed{record.seed}.json")
            write_json(folder / file, _portable(record.to_json()))


def _portable(content: Any) -> Any:
    """The content with the file's name in place of every absolute path."""
    if isinstance(content, dict):
        return {key: _portable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_portable(value) for value in content]
    return Path(content).name if isinstance(content, str) and content.startswith("/") else content


def print_table(table: Table) -> None:
    """Print the table on the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    title, header, lines = LAYOUTS[table.spec.layout].summary(table)
    rich = RichTable(title=title)
    for name in header:
        rich.add_column(name)
    for line in lines:
        rich.add_row(*line)
    Console(width=180).print(rich)
