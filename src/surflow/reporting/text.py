"""Pieces of Markdown and of text that the layouts of a table share."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surflow.reporting.table import Table, distinct


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with its decimals, never -0; empty for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return f"+{text}" if sign and float(text) > 0 else text


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours; empty for None."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def describe(value: Any) -> str:
    """A value of JSON in words: "key value, key value"; empty values are left out."""
    if isinstance(value, Mapping):
        parts = (f"{k} {describe(v)}" for k, v in value.items() if v not in (None, "", [], {}))
        return ", ".join(parts)
    if isinstance(value, list | tuple):
        return ", ".join(describe(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


_DIGEST = re.compile(r"\b[0-9a-f]{13,}\b")


def short_digests(text: str) -> str:
    """The text with every checksum cut to twelve digits."""
    return _DIGEST.sub(lambda found: found[0][:12], text)


def file_name(text: str) -> str:
    """The text as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", text)


def bullets(items: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {' '.join(item.split())}" for item in items)


def csv_text(fields: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """A CSV: the header, then the lines."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def titled(title: str, lines: Sequence[str]) -> list[str]:
    """A title and a list; nothing where there are no lines."""
    return [title, bullets(lines)] if lines else []


def markdown_grid(
    header: Sequence[str], lines: Iterable[Sequence[str]], numeric: Iterable[int]
) -> str:
    """A Markdown table; the columns in `numeric` are set flush right."""

    def line(fields: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(f.split()).replace("|", "\\|") for f in fields) + " |"

    right = set(numeric)
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    return "\n".join([line(header), line(rule), *(line(fields) for fields in lines)])


def figure_links(figures: Mapping[str, str | Path] | None) -> list[str]:
    """The section of figures: captions and files."""
    links = [f"![{caption}]({Path(file).as_posix()})" for caption, file in (figures or {}).items()]
    return ["## Figures", *links] if links else []


def machine_facts(table: Table) -> list[str]:
    """The commits and the machines of the runs."""
    facts = [f"Commit: {', '.join(f'`{c}`' for c in table.commits)}"] if table.commits else []
    machines = distinct(describe(record.machine) for record in table.records)
    return facts + [f"Machine: {text}" for text in machines if text]


def closing(table: Table, command: str) -> list[str]:
    """The sections that a table ends with: its notes, its sources, the command."""
    spec = table.spec
    blocks = titled("## Notes", spec.notes)
    blocks += titled("## Sources", [f"{key}: {text}" for key, text in spec.sources.items()])
    if len({quote.source for quote in spec.published}) > 1:
        labels = {row.name: row.label for row in spec.rows}
        whose = distinct((labels[quote.row], quote.source) for quote in spec.published)
        blocks.append(f"Published values: {', '.join(f'{row} ({key})' for row, key in whose)}.")
    return [*blocks, "## Regenerate", f"```sh\n{command}\n```"]
