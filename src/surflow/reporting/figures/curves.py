"""Learning curves, from `metrics.csv`."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from surflow.reporting.figures import layout
from surflow.reporting.figures.layout import GREY, INK, LINES, Cells
from surflow.reporting.table import Table

CURVE_WORDS = {"nll": "NLL", "elbo": "negative ELBO", "iwbo": "negative IWBO"}
CURVE_UNITS = {"bpd": "bits/dim"}
SET_WORDS = {"nll": "log-likelihood", "elbo": "ELBO", "iwbo": "IWBO"}
LONG_LABEL = 32  # letters; half a panel's width
DASHES = ("-", "--", ":")  # of as many lines of each colour
FLOOR = "entropy (floor)"


def learning_curves(table: Table, folder: Path) -> dict[str, str]:
    """The learning curves of the validation metric that most runs have logged."""
    files = layout.run_files(table, "metrics.csv")
    if table.spec.layout == "bounds" or not layout.any_file(files):
        return {}
    path = folder / "learning_curves.png"
    if any(column.metric.startswith("test/point_") for column in table.spec.columns):
        shown = set_curve_figure(table, path)
        return {} if shown is None else {"Learning curves": path.name}
    columns = {f: logged(f) for row in files.values() for f in row.values() if f}
    names = [name for found in columns.values() for name in found]
    if not names:
        return {}
    column = max(dict.fromkeys(names), key=names.count)
    cells = {
        row: {label: f if f and column in columns[f] else None for label, f in of_row.items()}
        for row, of_row in files.items()
    }
    metric = table.spec.metric or table.spec.columns[0].metric
    learning_curve_figure(cells, path, column=column, metric=metric)
    return {"Learning curves": path.name}


def _words_of(column: str) -> tuple[str, str]:
    """The estimator and the unit of a logged metric: ("elbo", "bpd") of ``val/elbo_bpd``."""
    name, _, unit = column.rpartition("/")[2].partition("_")
    return name, unit


def curve_label(column: str) -> str:
    """Such as "validation negative ELBO (bits/dim)" for ``val/elbo_bpd``."""
    name, unit = _words_of(column)
    return f"validation {CURVE_WORDS.get(name, name)} ({CURVE_UNITS.get(unit, unit)})"


def set_curve_label(column: str) -> str:
    """Such as "IWBO, K = 2" for ``val/iwbo2_nats``."""
    name, _ = _words_of(column)
    word = name.rstrip("0123456789")
    count = name[len(word) :]
    return SET_WORDS.get(word, word) + (f", K = {count}" if count else "")


def logged(file: Path, split: str = "val") -> list[str]:
    """The metrics of a split that a run has logged in its metrics.csv: the objective's, not always
    the table's."""
    with open(file, newline="", encoding="utf-8") as lines:
        return [name for name in next(csv.reader(lines), ()) if name.startswith(f"{split}/")]


def read_curve(file: Path, column: str, along: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values), both (N,), from the lines of a metrics.csv where both are given; `along`
    another column, such as step, its values in place of the epochs."""
    with open(file, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in (along, column) if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{file}: lacks column {', '.join(missing)}; expected {along}, {column}"
            )
        pairs = []
        for number, line in enumerate(reader, 2):
            pair = [(line[name] or "").strip() for name in (along, column)]
            try:
                if all(pair):
                    pairs.append([float(text) for text in pair])
            except ValueError:
                why = f"{file}: line {number}: {along} and {column} must be numbers"
                raise ValueError(why) from None
    values = np.array(pairs, float).reshape(-1, 2)
    values = values[np.isfinite(values).all(1)]
    return values[:, 0], values[:, 1]


def set_curve_figure(table: Table, path: str | Path) -> Path | None:
    """Plot the validation scores of sets against the epoch, a point: a panel a dataset, a line a
    model, its estimator in its name. Returns the path, None where no run has logged any."""
    columns: dict[str, str] = {}
    cells: dict[str, dict[str, Path | None]] = {}
    points = set()
    for row, found in layout.run_files(table, "metrics.csv").items():
        file = next(filter(None, found.values()), None)
        column = next(iter(logged(file)), None) if file else None
        record = layout.record_of(file)
        if column is None or record is None:
            continue
        label = f"{row}: {set_curve_label(column)}"
        columns[label] = column
        cells[label] = found
        points.add(int(record.config["data"]["event_shape"][0]))  # of a set
    if len(points) != 1:
        return None
    return learning_curve_figure(
        cells,
        path,
        column=columns,
        label=f"validation, log p / N (nats), N = {min(points)}",
        scale=-1 / points.pop(),
    )


def learning_curve_figure(
    cells: Cells,
    path: str | Path,
    *,
    column: str | Mapping[str, str] = "val/nll_nats",
    metric: str = "test/nll_nats",
    label: str | None = None,
    scale: float = 1.0,
) -> Path:
    """Plot `column` of each run's metrics.csv against the epoch: a panel a dataset, a line a model.

    A dashed line marks the floor that the records name for `metric`. The first twentieth of a curve
    does not stretch the scale.

    Args:
        column: may be one for each row label.
        label: of the vertical axis; None: that of `column`.
        scale: values are shown times it; where it is negative, higher is better.
    """
    label = curve_label(column) if label is None else label
    of_model = column if isinstance(column, Mapping) else dict.fromkeys(cells, column)
    files = layout.existing(cells)
    records = {m: {d: layout.record_of(f) for d, f in row.items()} for m, row in files.items()}
    caution = layout.caution_of([r for row in records.values() for r in row.values()])
    models, datasets = list(files), list(next(iter(files.values())))
    across = min(len(datasets), 2)
    down = math.ceil(len(datasets) / across)
    legend_columns = (1 if max(map(len, models)) > LONG_LABEL else 2) * across
    legend_rows = math.ceil((len(models) + 1) / legend_columns)  # a line more: the floor
    height = 2.7 * down + 0.3 + 0.2 * legend_rows + (0.25 if caution else 0)
    figure, panels = layout.sheet_of(down, across, len(datasets), (4.3 * across, height))
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    handles: dict[str, object] = {}
    for axes, dataset in zip(panels, datasets, strict=True):
        axes.set_title(dataset, fontsize=11, color=INK)
        curves = {}
        for model in models:
            if files[model][dataset] is not None:
                epochs, values = read_curve(files[model][dataset], of_model[model])
                if len(values):
                    curves[model] = (epochs, scale * values)
        if not curves:
            layout.not_run(axes)
            continue
        found = [records[model][dataset] for model in models]
        floor = next((r.floor[metric].value for r in found if r and metric in r.floor), None)
        curve_panel(axes, models, curves, floor, scale, handles)
        axes.set_ylabel(label, fontsize=9, color=INK)
    order = [handles[name] for name in (*models, FLOOR) if name in handles]
    if order:
        layout.legend_below(figure, order, min(len(order), legend_columns), 9)
    layout.warn(figure, caution)
    return layout.save(figure, path)


def curve_panel(
    axes: Axes,
    models: Sequence[str],
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    floor: float | None,
    scale: float,
    handles: dict[str, object],
) -> None:
    """The curves of one dataset; their lines go into `handles` by name."""
    seen = []
    for index, model in enumerate(models):
        if model not in curves:
            continue
        epochs, values = curves[model]
        (line,) = axes.plot(
            epochs,
            values,
            DASHES[index // len(LINES) % len(DASHES)],
            color=LINES[index % len(LINES)],
            lw=1.4,
            marker="o" if len(values) < 3 else None,
            ms=3,
            zorder=3 + index,
        )
        line.set_label(model)
        handles.setdefault(model, line)
        late = values[len(values) // 20 :] if len(values) >= 20 else values
        best, worst = (values.min(), 0.995) if scale > 0 else (values.max(), 0.005)
        seen += [float(best), float(np.quantile(late, worst))]
    if floor is not None:
        line = axes.axhline(floor, color=INK, lw=1.0, ls=(0, (5, 3)), zorder=2, label=FLOOR)
        handles.setdefault(FLOOR, line)
        seen.append(floor)
    low, high = min(seen), max(seen)
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.margins(x=0.02)
    missing = "\n".join(f"{model}: not run" for model in models if model not in curves)
    if missing:
        layout.say(axes, missing, 0.98, 0.95, ha="right", va="top", size=8)
    layout.plot_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("epoch", fontsize=9, color=INK)
    for spine in axes.spines.values():
        spine.set_color(GREY)
        spine.set_linewidth(0.6)
