"""The layout `bounds`: a row a model, its bounds and the likelihood they bound.

Each record's `truth` and `ledger` hold what a row shows. Numbers here are log-likelihoods, higher
is better; a gap is negative by its Monte-Carlo error alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean

from surflow.record import Record
from surflow.reporting.table import Cell, Table, distinct
from surflow.reporting.text import (
    bullets,
    closing,
    csv_text,
    duration,
    figure_links,
    machine_facts,
    markdown_grid,
    titled,
)

EXACT_TOLERANCE = 1e-4
"""Nats by which an exact model may differ from its likelihood computed otherwise."""

_ERRORS = 4.0  # standard errors that a claim on a mean allows


@dataclass(frozen=True)
class BoundsRow:
    """One model, averaged over the accepted seeds. Nats a point; errors are standard errors.

    `gaps` maps K to (bound, its error, gap, its error); empty for an exact model, whose `worst` is
    the greatest difference from the likelihood computed otherwise.
    """

    name: str
    label: str
    data: str
    layers: str
    exact: bool
    log_prob: float
    log_prob_error: float
    method: str
    numerical_error: float
    elbo: float
    elbo_error: float
    gaps: Mapping[int, tuple[float, float, float, float]]
    worst: float | None
    entropy: float | None
    parameters: int | None
    records: tuple[Record, ...]

    @property
    def number(self) -> str:
        """What the model's own number is: exact, or a bound."""
        return "exact" if self.exact else "bound"

    @property
    def problems(self) -> tuple[str, ...]:
        """What contradicts the theory: a bound above the likelihood, one that gets looser with K,
        an exact model that is off. Empty where all holds."""
        found = []
        if self.exact:
            if self.worst is None or not self.worst <= EXACT_TOLERANCE:
                found.append(f"exact model off by {self.worst} nats, allowed {EXACT_TOLERANCE:g}")
            return tuple(found)
        for k, (_, _, gap, error) in sorted(self.gaps.items()):
            if gap < -(_ERRORS * error + self.numerical_error):
                found.append(f"IWBO, K = {k}, above the likelihood by {-gap:.2g} ± {error:.1g}")
        for one, next_one in pairwise(sorted(self.gaps.items())):
            (k, (_, _, gap, error)), (more, (_, _, less, other)) = one, next_one
            if less - gap > _ERRORS * math.hypot(error, other):
                found.append(f"gap grows from K = {k} to {more} by {less - gap:.2g}")
        return tuple(found)

    @property
    def verdict(self) -> str:
        """In words, whether theory and numbers agree."""
        if self.problems:
            return "; ".join(self.problems)
        if self.exact:
            return f"exact: within {self.worst:.0e} nats of the likelihood computed otherwise"
        return "below the likelihood within its error, tightening with K"


def layers_of(record: Record) -> str:
    """The kinds of a model's layers in order, like ones together: '2 x VAE (stochastic) → ...'."""
    shown = []
    rows = [r for r in record.ledger.get("rows", ()) if r["kind"] != "base"]
    names = [(r["layer"].rpartition(".")[2], r["kind"]) for r in rows]
    for (layer, kind), same in groupby(names):
        count = len(list(same))
        shown.append(f"{f'{count} × ' if count > 1 else ''}{layer} ({kind})")
    return " → ".join(shown)


def _error(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values)) / len(values)


def bounds_rows(table: Table) -> list[BoundsRow]:
    """The rows of a table that have records, in order.

    Raises ValueError for a record without `truth`, or seeds that disagree on what they computed.
    """
    return [_row(cell) for cell in table.cells.values() if cell.records]


def _row(cell: Cell) -> BoundsRow:
    records = cell.records
    truths = [record.truth for record in records]
    for record in records:
        if not record.truth:
            raise ValueError(f"{record.path}: no truth in this record; run it again")
    if len({truth["exact"] for truth in truths}) > 1:
        raise ValueError(f"{cell.row.name}: seeds disagree whether the model is exact")
    gaps = {}
    for parts in zip(*(truth["gaps"] for truth in truths), strict=True):
        means = {"bound": fmean, "bound_error": _error, "mean": fmean, "standard_error": _error}
        found = (mean([part[name] for part in parts]) for name, mean in means.items())
        gaps[parts[0]["num_samples"]] = tuple(found)
    exact = bool(truths[0]["exact"])
    metric = "test/nll_nats" if exact else "test/elbo_nats"
    scores = [record.metrics[metric] for record in records]
    floors = [record.floor[metric].value for record in records if metric in record.floor]
    return BoundsRow(
        name=cell.row.name,
        label=cell.row.label,
        data=records[0].data,
        layers=layers_of(records[0]),
        exact=exact,
        log_prob=fmean([truth["log_prob"] for truth in truths]),
        log_prob_error=_error([truth["standard_error"] for truth in truths]),
        method=truths[0]["method"],
        numerical_error=max(truth["mean_error"] for truth in truths),
        elbo=-fmean([score.value for score in scores]),
        elbo_error=_error([score.standard_error or 0.0 for score in scores]),
        gaps=gaps,
        worst=max(truth["worst"] for truth in truths) if exact else None,
        entropy=fmean(floors) if floors else None,
        parameters=records[0].parameters,
        records=records,
    )


def _signed(value: float, error: float) -> str:
    """A small number with its error, both with as many digits as the error has."""
    digits = 4
    if error > 0 and math.isfinite(error):
        digits = min(6, max(3, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _counts(rows: Sequence[BoundsRow]) -> list[int]:
    """Every K of the rows' bounds."""
    return sorted({k for row in rows for k in row.gaps})


def render_markdown(
    table: Table, *, command: str, figures: Mapping[str, str | Path] | None = None
) -> str:
    """The table as Markdown. `command` regenerates it; `figures` are files by caption."""
    rows = bounds_rows(table)
    refused = [f"{c.row.name}, {text}" for c in table.cells.values() for text in c.refusals]
    blocks = [
        f"# {table.spec.title}",
        _first_line(table),
        "Nats a test point, higher is better, mean ± standard error over the points. `log p(x)` is "
        "the likelihood of the trained model itself. ELBO: mean of many draws; IWBO, K = 1: a "
        "single draw.",
        _bounds_grid(table, rows),
        "## Gaps",
        "`log p(x)` less the bound, on the same points, ± its own standard error; for an exact "
        "model the greatest difference between its log_prob and the likelihood computed otherwise. "
        "`−entropy` is what a perfect model of the data would have as `log p(x)`.",
        _gaps_grid(rows),
        "## Layers",
        _layers_grid(rows),
        *titled("Warnings:", table.warnings),
        *figure_links(figures),
        *titled("Refused records:", refused),
        "## Runs",
        *_run_facts(table, rows),
        *closing(table, command),
    ]
    return "\n\n".join(blocks) + "\n"


def _first_line(table: Table) -> str:
    seeds = " ".join(str(seed) for seed in table.seeds)
    if table.profile == "paper":
        return f"**Profile `paper`**: the full budget. Seeds: {seeds}."
    return (
        f"**Profile `{table.profile}`**: a smaller budget than `paper`, so the models fit less "
        f"well; what is said of the bounds holds all the same. Seeds: {seeds}."
    )


def _bounds_grid(table: Table, rows: Sequence[BoundsRow]) -> str:
    counts = _counts(rows)
    header = ["model", "number", "log p(x)", "ELBO", *(f"IWBO, K = {k}" for k in counts)]
    lines = []
    for row in rows:
        elbo = "= log p(x)" if row.exact else f"{row.elbo:.4f} ± {row.elbo_error:.4f}"
        truth = f"{row.log_prob:.4f} ± {row.log_prob_error:.4f}"
        bounds = [_pair(row.gaps.get(k), 0) for k in counts]
        lines.append([row.label, row.number, truth, elbo, *bounds])
    for cell in table.cells.values():
        if not cell.records:
            lines.append([cell.row.label, cell.verdict, *[""] * (len(header) - 2)])
    return markdown_grid(header, lines, range(2, len(header)))


def _gaps_grid(rows: Sequence[BoundsRow]) -> str:
    counts = _counts(rows)
    lines = []
    for row in rows:
        gaps = [_pair(row.gaps.get(k), 2) for k in counts]
        if row.exact:
            gaps = [f"{row.worst:.0e} at most", *[""] * (len(counts) - 1)]
        entropy = "" if row.entropy is None else f"{-row.entropy:.4f}"
        lines.append([row.label, row.data, entropy, *gaps, row.verdict])
    header = ["model", "data", "−entropy", *(f"gap, K = {k}" for k in counts), "verdict"]
    return markdown_grid(header, lines, range(2, 3 + len(counts)))


def _layers_grid(rows: Sequence[BoundsRow]) -> str:
    header = ["model", "layers, data side first", "parameters", "log p(x) by"]
    lines = []
    for row in rows:
        error = f"{row.numerical_error:.0e}" if row.numerical_error else "none"
        count = "" if row.parameters is None else str(row.parameters)
        lines.append([row.label, row.layers, count, row.method, error])
    return markdown_grid([*header, "its numerical error"], lines, (2,))


def _run_facts(table: Table, rows: Sequence[BoundsRow]) -> list[str]:
    if not rows:
        return ["No run entered this table."]
    times = []
    for row in rows:
        seconds = [r.wall_time_s for r in row.records if r.wall_time_s is not None]
        times.append(f"{row.label}: {', '.join(map(duration, seconds))}")
    return ["Wall time of each run, seed by seed:", bullets(times), bullets(machine_facts(table))]


def summary(table: Table) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and lines of the table as text."""
    rows = bounds_rows(table)
    counts = _counts(rows)
    header = ["", "number", "log p(x)", *(f"gap, K = {k}" for k in counts), "verdict"]
    lines = []
    for row in rows:
        gaps = [f"{row.gaps[k][2]:.4f} ± {row.gaps[k][3]:.4f}" if row.gaps else "" for k in counts]
        lines.append([row.label, row.number, f"{row.log_prob:.4f}", *gaps, row.verdict])
    return f"{table.spec.title} (nats), profile {table.profile}", header, lines


def _pair(entry: tuple[float, float, float, float] | None, start: int) -> str:
    if entry is None:
        return ""
    value, error = entry[start : start + 2]
    return _signed(value, error) if start else f"{value:.4f} ± {error:.4f}"


CSV_START = ("row", "data", "layers", "number", "log_prob", "log_prob_se", "method")
CSV_END = ("max_difference", "entropy", "parameters", "verdict", "seeds", "profile", "commit")


def render_csv(table: Table) -> str:
    """The table as CSV, a line a model: log-likelihoods in nats, higher is better."""
    rows = bounds_rows(table)
    counts = _counts(rows)
    middle = ["numerical_error", "elbo", "elbo_se"]
    for k in counts:
        middle += [f"iwbo{k}", f"iwbo{k}_se", f"gap{k}", f"gap{k}_se"]
    lines = []
    for row in rows:
        line = {
            "row": row.name,
            "data": row.data,
            "layers": row.layers,
            "number": row.number,
            "log_prob": f"{row.log_prob:.6f}",
            "log_prob_se": f"{row.log_prob_error:.6f}",
            "method": row.method,
            "numerical_error": f"{row.numerical_error:.2e}",
            "elbo": f"{row.elbo:.6f}",
            "elbo_se": f"{row.elbo_error:.6f}",
            "max_difference": "" if row.worst is None else f"{row.worst:.2e}",
            "entropy": "" if row.entropy is None else f"{row.entropy:.6f}",
            "parameters": row.parameters,
            "verdict": row.verdict,
            "seeds": " ".join(str(r.seed) for r in row.records),
            "profile": table.profile,
            "commit": " ".join(distinct(r.short_commit for r in row.records)),
        }
        for k, entry in row.gaps.items():
            names = (f"iwbo{k}", f"iwbo{k}_se", f"gap{k}", f"gap{k}_se")
            line |= {n: f"{v:.6f}" for n, v in zip(names, entry, strict=True)}
        lines.append(line)
    return csv_text([*CSV_START, *middle, *CSV_END], lines)
