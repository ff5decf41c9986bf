"""A filled table: cells, the records in them, and what a reader must know of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from surflow.metric import Metric
from surflow.record import Record
from surflow.reporting.spec import ColumnSpec, Quote, RowSpec, TableSpec
from surflow.reporting.statistics import Interval, of_mean

NOT_RUN = "not run"
QUOTED_ONLY = "quoted only"
NO_SUCH_NUMBER = "no such number"

EXCESS_DIGITS = 4

Key = tuple[str, str, int]
"""Row, column and seed."""


def distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    """The values in order, each once."""
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class Cell:
    """One cell: mean `ours` and sample standard deviation `std` over the accepted `records`.

    `ours` is None where nothing was accepted; `verdict` then is ``not run``, ``quoted only``,
    ``no such number`` (the column is not about this model), ``missing: <reason>`` or
    ``refused: <reason>``. `refusals` and `missing` name every seed that was refused or lacks the
    metric.
    """

    row: RowSpec
    column: ColumnSpec
    published: float | None
    quoted: tuple[Quote, ...]
    ours: float | None = None
    std: float | None = None
    delta: float | None = None
    floor: float | None = None
    unit: str = ""
    kind: str = ""
    estimator: str = ""
    verdict: str = NOT_RUN
    wall_time_s: float | None = None
    records: tuple[Record, ...] = ()
    refusals: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of `ours`."""
        return tuple(record.seed for record in self.records)

    @property
    def commits(self) -> tuple[str, ...]:
        """The distinct short commits of `ours`."""
        return distinct(record.short_commit for record in self.records)

    @property
    def digits(self) -> int:
        """The decimals of `ours`: a mean of whole numbers is none itself."""
        return max(self.column.digits, int(len(self.records) > 1))

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; of one seed, the standard error over test points."""
        if len(self.records) == 1:
            return self.metrics[0].standard_error
        return self.std

    @property
    def values(self) -> dict[int, float]:
        """The number of each seed."""
        return dict(zip(self.seeds, (metric.value for metric in self.metrics), strict=True))

    @property
    def interval(self) -> Interval | None:
        """The interval of the mean over seeds; None where fewer than two have a record."""
        return of_mean(list(self.values.values())) if len(self.records) > 1 else None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The column's metric of each record."""
        return tuple(record.metrics[self.column.metric] for record in self.records)

    @property
    def excess(self) -> Cell:
        """The same cell of the excess over the entropy of the same rows, in nats, from the records
        that have it."""
        name = f"{self.column.metric.partition('/')[0]}/excess_nats"
        records = tuple(record for record in self.records if name in record.metrics)
        values = [record.metrics[name].value for record in records]
        return Cell(
            self.row,
            replace(self.column, metric=name, digits=EXCESS_DIGITS),
            None,
            (),
            ours=statistics.fmean(values) if values else None,
            std=statistics.stdev(values) if len(values) > 1 else None,
            verdict=f"no {name}" if self.records else self.verdict,
            records=records,
        )


@dataclass(frozen=True)
class Table:
    """A filled table. `problems` are unreadable records of no known cell, `costs` what the runs of
    a row take, in words; `budgets` what those of a comparison took, by cell and name."""

    spec: TableSpec
    profile: str
    seeds: tuple[int, ...]
    cells: Mapping[tuple[str, str], Cell]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    costs: Mapping[str, str] = field(default_factory=dict)
    budgets: Mapping[tuple[str, str], Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def records(self) -> tuple[Record, ...]:
        """Every accepted record, row by row."""
        return tuple(record for cell in self.cells.values() for record in cell.records)

    @property
    def commits(self) -> tuple[str, ...]:
        """The distinct short commits of the records."""
        return distinct(record.short_commit for record in self.records)

    @property
    def released(self) -> bool:
        """Whether its numbers are of released weights that nothing of ours trained."""
        return any(record.weights for record in self.records)

    @property
    def of_known_densities(self) -> bool:
        """Whether its data are known densities: their runs name the entropy, the floor."""
        return any(record.floor for record in self.records)

    def without_empty_rows(self) -> Table:
        """The same table without the rows that have neither a value nor a run, refused ones too."""
        silent = (NOT_RUN, NO_SUCH_NUMBER)
        told = {
            cell.row.name
            for cell in self.cells.values()
            if cell.quoted or cell.published is not None or cell.verdict not in silent
        }
        rows = tuple(row for row in self.spec.rows if row.name in told)
        cells = {key: cell for key, cell in self.cells.items() if cell.row.name in told}
        return replace(self, spec=replace(self.spec, rows=rows), cells=cells)

    def of_column(self, column: ColumnSpec) -> tuple[Cell, ...]:
        """The cells of a column, row by row."""
        return tuple(cell for cell in self.cells.values() if cell.column.name == column.name)


_OF_ONE_RUN = ("seed", "splits_standard_deviation")


def protocol_of(metric: Metric) -> dict[str, Any]:
    """The protocol of a score without what belongs to one run of it."""
    return {key: value for key, value in metric.protocol.items() if key not in _OF_ONE_RUN}


def column_floor(table: Table, column: str) -> tuple[float, float] | None:
    """The lowest and highest floor that the runs of a column name, in the unit of the metric."""
    cells = [cell for (_, name), cell in table.cells.items() if name == column]
    floors = [cell.floor for cell in cells if cell.floor is not None]
    return (min(floors), max(floors)) if floors else None
