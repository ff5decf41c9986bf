"""Run records in, tables and figures out. Imports no torch, Lightning, Hydra or wandb.

`figures` needs matplotlib and is imported by name only.
"""

import inspect

from surflow.reporting.filling import build_table, without_stale
from surflow.reporting.question import answer
from surflow.reporting.spec import ColumnSpec, TableSpec, load_spec
from surflow.reporting.table import Cell, Key, Table
from surflow.reporting.write import print_table, write_table

__all__ = [
    name for name, value in list(vars().items()) if name[0] != "_" and not inspect.ismodule(value)
]
