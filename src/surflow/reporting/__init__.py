"""Run records in, tables and figures out. Imports no torch, Lightning, Hydra or wandb.

`figures` needs matplotlib and is imported by name only.
"""

from surflow.reporting.filling import build_table, without_stale
from surflow.reporting.spec import ColumnSpec, TableSpec, load_spec
from surflow.reporting.table import Cell, Key, Table
from surflow.reporting.write import print_table, write_table

__all__ = [
    "Cell",
    "ColumnSpec",
    "Key",
    "Table",
    "TableSpec",
    "build_table",
    "load_spec",
    "print_table",
    "without_stale",
    "write_table",
]
