"""Spikes of the gradient norm, and what the loss does after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from surflow.record import Record
from surflow.reporting.figures import layout
from surflow.reporting.figures.curves import curve_panel, logged, read_curve
from surflow.reporting.figures.layout import HOLLOW, INK, LINES
from surflow.reporting.spec import ColumnSpec
from surflow.reporting.table import Table

NORM = "train/gradient_norm_max"
BEFORE = 10  # lines of the log, whose median a later loss is compared with
START = END = 0.1  # of the training: the start has large norms, the end decides the final number

Traces = Mapping[str, Sequence["Trace"]]
"""The runs of each row on one dataset, by the row's label."""


@dataclass(frozen=True)
class Trace:
    """What a run has logged, and its `final` number.

    `epochs` (N,) are fractions; `norms` (N,) are the largest since the line before, `losses` (N,)
    the means.
    """

    record: Record
    final: float
    epochs: np.ndarray
    norms: np.ndarray
    losses: np.ndarray

    @cached_property
    def after(self) -> tuple[np.ndarray, np.ndarray]:
        """(ratios, changes), both (M,): the norm of a line in medians of the run, and the loss of
        the next line less the median of the `BEFORE` lines before."""
        first = max(BEFORE, int(START * len(self.norms)))
        at = range(first, len(self.norms) - 1)
        changes = [self.losses[i + 1] - np.median(self.losses[i - BEFORE : i]) for i in at]
        return self.norms[first:-1] / np.median(self.norms), np.array(changes)

    @property
    def late(self) -> float:
        """The largest norm in the end."""
        return float(self.norms[-max(1, int(END * len(self.norms))) :].max())


def spikes(table: Table, folder: Path) -> dict[str, str]:
    """The gradient norms of a table whose runs have logged them."""
    shown = {name: columns[0] for name, columns in layout.columns_of(table).items()}
    data = {name: traces_of(table, column) for name, column in shown.items()}
    data = {name: traces for name, traces in data.items() if any(traces.values())}
    if not data:
        return {}
    spike_figure(data, shown, folder / "spikes.png")
    return {"Spikes of the gradient norm": "spikes.png"}


def traces_of(table: Table, column: ColumnSpec) -> dict[str, list[Trace]]:
    """The runs of a column that have logged the norm, by the label of their row."""
    found = {}
    for row in table.spec.rows:
        cell = table.cells[row.name, column.name]
        pairs = zip(cell.records, cell.metrics, strict=True)
        traces = (trace_of(record, metric.value) for record, metric in pairs)
        found[row.label] = [trace for trace in traces if trace]
    return found


def trace_of(record: Record, final: float) -> Trace | None:
    """What a run has logged; None without norms."""
    file = record.run_dir / "metrics.csv"
    columns = logged(file, "train") if file.is_file() else []
    if NORM not in columns:
        return None
    loss = next(name for name in columns if name != NORM)
    (at, norms), (steps, losses) = (read_curve(file, name, "step") for name in (NORM, loss))
    epochs, _ = read_curve(file, loss)
    of_epoch = steps[-1] / (epochs[-1] + 1)
    steps, one, other = np.intersect1d(at, steps, return_indices=True)
    return Trace(record, final, steps / of_epoch, norms[one], losses[other])


def spike_figure(
    data: Mapping[str, Traces], columns: Mapping[str, ColumnSpec], path: str | Path
) -> Path:
    """Plot the gradient norms of runs and their losses, a column of panels a dataset.

    From above: the norms of the seed whose final number is the worst, in every row; its losses; of
    all seeds, the change of the loss after each line of the log against the norm there, with the
    median over norms that are alike; the final numbers against the largest norms in the end.
    """
    labels = list(dict.fromkeys(name for of in data.values() for name, runs in of.items() if runs))
    figure, panels = layout.sheet_of(4, len(data), 4 * len(data), (3.5 * len(data), 10.4))
    handles: dict[str, Any] = {}
    places = panels.reshape(4, len(data)).T
    for (above, below, changes, finals), (name, traces) in zip(places, data.items(), strict=True):
        column = columns[name]
        runs = [trace for of_row in traces.values() for trace in of_row]
        seed = max(runs, key=lambda trace: column.worse_by(trace.final, 0.0)).record.seed
        shown = {n: trace for n in labels for trace in traces[n] if trace.record.seed == seed}
        above.set_title(f"{name}, seed {seed}", fontsize=11, color=INK)
        curves = {label: (trace.epochs, trace.losses) for label, trace in shown.items()}
        curve_panel(below, labels, curves, None, 1.0, handles)
        for label, color in zip(labels, cycle(LINES), strict=False):
            if label in shown:
                above.semilogy(shown[label].epochs, shown[label].norms, color=color, lw=0.9)
            late = [trace.late for trace in traces[label]]
            style = {**HOLLOW, "ms": 5, "marker": "o", "color": color}
            finals.semilogx(late, [trace.final for trace in traces[label]], **style)
        above.sharex(below)
        _change_panel(changes, [traces[label] for label in labels])
        words = ("", "epoch", "norm / median of the run", f"largest norm, last {END:.0%}")
        for axes, text in zip((above, below, changes, finals), words, strict=True):
            layout.plot_axes(axes)
            axes.set_xlabel(text, fontsize=9, color=INK)
        _plain_ticks(changes)
        _plain_ticks(finals)
        finals.set_ylabel(column.metric, fontsize=9, color=INK)
    words = ("gradient norm, largest of a line", "training loss", "change of the loss after it")
    for axes, text in zip(panels[:: len(data)], words, strict=False):
        axes.set_ylabel(text, fontsize=9, color=INK)
    layout.legend_below(figure, [handles[name] for name in labels if name in handles], 4, 9)
    records = (trace.record for of in data.values() for runs in of.values() for trace in runs)
    layout.warn(figure, layout.caution_of(records))
    return layout.save(figure, path)


def binned(traces: Sequence[Trace]) -> tuple[np.ndarray, np.ndarray]:
    """(ratios, changes), medians of the lines of all runs whose ratio has one power of two."""
    ratios, changes = (
        np.concatenate(parts) for parts in zip(*(t.after for t in traces), strict=True)
    )
    powers = np.floor(np.log2(ratios))
    alike = [powers == power for power in np.unique(powers)]
    return tuple(
        np.array([np.median(values[same]) for same in alike]) for values in (ratios, changes)
    )


def _change_panel(axes: Axes, traces: Sequence[Sequence[Trace]]) -> None:
    """A dot a line of the log, row by row, and their medians; outliers do not stretch the scale."""
    seen = []
    for runs, color in zip(traces, cycle(LINES), strict=False):
        for trace in runs:
            axes.semilogx(*trace.after, ".", color=color, ms=2, alpha=0.3)
        if runs:
            ratios, changes = binned(runs)
            axes.semilogx(ratios, changes, color=color, lw=1.6, marker="o", ms=3.5, zorder=4)
            seen += [
                *changes,
                *np.quantile(np.concatenate([t.after[1] for t in runs]), (0.005, 0.995)),
            ]
    margin = 0.06 * (max(seen) - min(seen))
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    axes.axhline(0.0, color=INK, lw=0.6)


def _plain_ticks(axes: Axes) -> None:
    """Numbers on a logarithmic axis, between powers of ten where it is short."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
