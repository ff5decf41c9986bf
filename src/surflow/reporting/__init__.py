"""Run records in, tables and figures out. Imports no torch, Lightning, Hydra or wandb.

`figures` needs matplotlib and is imported by name only: ``from surflow.reporting import figures``.
"""

from surflow.reporting.records import (
    Floor,
    Metric,
    Record,
    RecordError,
    find_records,
    load_record,
    load_records,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from surflow.reporting.spec import TableSpec, load_spec
from surflow.reporting.table import (
    CSV_FIELDS,
    Cell,
    Table,
    build_table,
    render_csv,
    render_markdown,
    write_csv,
    write_markdown,
)

__all__ = [
    "CSV_FIELDS",
    "Cell",
    "Floor",
    "Metric",
    "Record",
    "RecordError",
    "Table",
    "TableSpec",
    "build_table",
    "find_records",
    "load_record",
    "load_records",
    "load_spec",
    "render_csv",
    "render_markdown",
    "write_bytes_atomic",
    "write_csv",
    "write_json_atomic",
    "write_markdown",
    "write_text_atomic",
]
