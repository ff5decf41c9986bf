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
BEFORE = 10  # lines of the log, whose median loss the next ones are compared with
AROUND = 2  # epochs on each side, whose median loss that of an epoch is compared with
START = 0.1  # of the training, where norms are large and the loss falls: left out
FEWEST = 3  # lines that a median needs

Pairs = tuple[np.ndarray, np.ndarray]
Traces = Mapping[str, Sequence["Trace"]]
"""The runs of each row on one dataset, by the row's label."""


@dataclass(frozen=True)
class Trace:
    """What a run has logged, and its `final` number.

    `epochs` (N,) are fractions; `norms` (N,) are the largest since the line before, `losses` (N,)
    the means. `validation` is (epochs, losses), both (E,).
    """

    record: Record
    final: float
    epochs: np.ndarray
    norms: np.ndarray
    losses: np.ndarray
    validation: Pairs

    @property
    def ratios(self) -> np.ndarray:
        """The norms in medians of the run, (N,)."""
        return self.norms / np.median(self.norms)

    @cached_property
    def lines(self) -> Pairs:
        """(ratios, changes), both (M,): the norm of a line of the log, and the loss of the next
        line less the median of the lines before."""
        first = max(BEFORE, int(START * len(self.norms)))
        at = range(first, len(self.norms) - 1)
        changes = [self.losses[i + 1] - np.median(self.losses[i - BEFORE : i]) for i in at]
        return self.ratios[first:-1], np.array(changes)

    @cached_property
    def by_epoch(self) -> Pairs:
        """(ratios, changes), both (M,): the largest norm of an epoch, and the validation loss after
        it less the median of the epochs around."""
        ends, losses = self.validation
        found = []
        for i in range(AROUND, len(ends)):
            norms = self.ratios[(ends[i - 1] < self.epochs) & (self.epochs <= ends[i])]
            around = [*losses[i - AROUND : i], *losses[i + 1 : i + AROUND + 1]]
            found.append((norms.max(), losses[i] - np.median(around)))
        return tuple(np.array(found).reshape(-1, 2).T)


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
    """What a run has logged; None without norms or without a validation."""
    file = record.run_dir / "metrics.csv"
    if not file.is_file() or NORM not in logged(file, "train") or not logged(file):
        return None
    name = logged(file)[0]
    loss = name.replace("val", "train", 1)
    curves = (read_curve(file, column, "step") for column in (name, NORM, loss))
    (ends, validation), (at, norms), (steps, losses) = curves
    of_epoch = ends[-1] / (read_curve(file, name)[0][-1] + 1)
    steps, one, other = np.intersect1d(at, steps, return_indices=True)
    found = (ends / of_epoch, validation)
    return Trace(record, final, steps / of_epoch, norms[one], losses[other], found)


def spike_figure(
    data: Mapping[str, Traces], columns: Mapping[str, ColumnSpec], path: str | Path
) -> Path:
    """Plot the gradient norms of runs and their losses, a column of panels a dataset.

    From above: the norms of the seed whose final number is the worst, in every row; its losses; of
    all seeds, the change of the loss after each line of the log against the norm there, with the
    median over norms that are alike; likewise the validation loss of each epoch, less those around,
    against the largest norm in it, with a ring for the last epoch.
    """
    labels = list(dict.fromkeys(name for of in data.values() for name, runs in of.items() if runs))
    figure, panels = layout.sheet_of(4, len(data), 4 * len(data), (3.5 * len(data), 10.4))
    handles: dict[str, Any] = {}
    places = panels.reshape(4, len(data)).T
    for (above, below, lines, epochs), (name, traces) in zip(places, data.items(), strict=True):
        runs = [trace for of_row in traces.values() for trace in of_row]
        worst = max(runs, key=lambda trace: columns[name].worse_by(trace.final, 0.0))
        shown = {
            label: (trace, color)
            for label, color in zip(labels, cycle(LINES), strict=False)
            for trace in traces[label]
            if trace.record.seed == worst.record.seed
        }
        for trace, color in shown.values():
            above.semilogy(trace.epochs, trace.norms, color=color, lw=0.9)
        curves = {label: (trace.epochs, trace.losses) for label, (trace, _) in shown.items()}
        curve_panel(below, labels, curves, None, 1.0, handles)
        rows = [traces[label] for label in labels]
        dose_panel(lines, [[trace.lines for trace in of_row] for of_row in rows], hollow=False)
        dose_panel(epochs, [[trace.by_epoch for trace in of_row] for of_row in rows], hollow=True)
        above.sharex(below)
        above.set_title(f"{name}, seed {worst.record.seed}", fontsize=11, color=INK)
        words = ("", "epoch", "norm / median of the run", "largest norm of an epoch / median")
        for axes, text in zip((above, below, lines, epochs), words, strict=True):
            layout.plot_axes(axes)
            axes.set_xlabel(text, fontsize=9, color=INK)
    words = (
        "largest gradient norm",
        "training loss",
        "training loss after it, change",
        "validation loss after it, change",
    )
    for axes, text in zip(panels[:: len(data)], words, strict=True):
        axes.set_ylabel(text, fontsize=9, color=INK)
    layout.legend_below(figure, [handles[name] for name in labels if name in handles], 4, 9)
    records = (trace.record for of in data.values() for runs in of.values() for trace in runs)
    layout.warn(figure, layout.caution_of(records))
    return layout.save(figure, path)


def binned(ratios: np.ndarray, changes: np.ndarray) -> Pairs:
    """(ratios, changes): medians of those between two powers of two of the ratio, not of few."""
    powers = np.floor(np.log2(ratios))
    alike = [powers == power for power in np.unique(powers)]
    alike = [same for same in alike if same.sum() >= FEWEST]
    return tuple(np.array([np.median(v[same]) for same in alike]) for v in (ratios, changes))


def dose_panel(axes: Axes, rows: Sequence[Sequence[Pairs]], hollow: bool) -> None:
    """A dot a pair, row by row, and their medians; `hollow`: a ring for the last one of each run.

    What lies beyond nearly all others is a triangle on the edge.
    """
    rows = [[pair for pair in pairs if pair[0].size] for pairs in rows]
    everything = [changes for pairs in rows for _, changes in pairs]
    if not everything:
        layout.say(axes, "too short a run", 0.5, 0.5, ha="center", va="center", size=10)
        return
    low, high = np.quantile(np.concatenate(everything), (0.0, 1.0) if hollow else (0.005, 0.995))
    for pairs, color in zip(rows, cycle(LINES), strict=False):
        if pairs:
            ratios, changes = np.concatenate(pairs, 1)
            out = (changes < low) | (changes > high)
            axes.semilogx(ratios[~out], changes[~out], ".", color=color, ms=3, alpha=0.4)
            axes.plot(ratios[out], changes[out].clip(low, high), "^", color=color, ms=4)
            axes.plot(*binned(ratios, changes), color=color, lw=1.6, marker="o", ms=3.5, zorder=4)
        if pairs and hollow:
            last = [[values[-1] for values in pair] for pair in pairs]
            axes.plot(*np.transpose(last), marker="o", color=color, **{**HOLLOW, "ms": 5})
    axes.axhline(0.0, color=INK, lw=0.6)
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5) if right < 100 * left else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
