"""What the suite found of each layer, as a table: text, Markdown, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surflow.files import write_json, write_text
from surflow.proofs.proof import Proof

ABSENT = "-"
MEANING = (
    "round trip: greatest error, relative to 1 + |value|; log-det: against the Jacobian of "
    "autograd; mass: of the model, 1 where it is right, ± standard error; gradient: of the "
    "parameters and x; compiles: one graph each way; -: does not apply"
)


@dataclass
class Row:
    """What was found of one layer: its class, the request that names it, a sentence a failure."""

    layer: str
    spec: str
    kind: str = "?"
    number: str = "?"  # exact, or a bound
    failures: dict[str, str] = field(default_factory=dict)
    proofs: list[Proof] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failures

    def texts(self) -> list[str]:
        """The line of the table."""
        return [text(self) for text in COLUMNS.values()]


def _cell(
    check: str, text: str, fails: str = "", skipped: Callable[[str], str] = lambda _: ABSENT
) -> Callable[[Row], str]:
    """The numbers of one check in a text, marked where it fails."""

    def cell(row: Row) -> str:
        proof = next((p for p in row.proofs if p.check == check), None)
        if proof is None or not proof.applies:
            return ABSENT if proof is None else skipped(proof.message)
        numbers = proof.measured
        if not proof.ok and (fails or not numbers):
            return f"{fails or 'raised'} (!)"
        said = text.format(greatest=max(numbers.values(), default=0.0), **numbers)
        return said if proof.ok else f"{said} (!)"

    return cell


COLUMNS: dict[str, Callable[[Row], str]] = {
    "layer": lambda row: row.layer,
    "kind": lambda row: row.kind,
    "round trip": _cell("round_trip", "{greatest:.1e}"),
    "log-det": _cell("jacobian", "{greatest:.1e}"),
    "mass": _cell("unit_mass", "{mass:.4f} ± {standard_error:.4f}"),
    "exact or bound": lambda row: row.number,
    "gradient": _cell("gradients", "finite", "no", lambda m: "finite" if ";" in m else ABSENT),
    "compiles": _cell("compiles", "yes", "no", lambda _: "declared not"),
    "verdict": lambda row: "holds" if row.ok else f"FAILS: {', '.join(row.failures)}",
}


def summary(rows: Sequence[Row], seconds: float) -> str:
    """How many hold, in one sentence."""
    failed, several = sum(not row.ok for row in rows), len(rows) > 1
    verdict = "every one holds" if several else "it holds"
    verdict = f"{failed} fail{'s' * (failed == 1)}" if failed else verdict
    return f"{len(rows)} layer{'s' if several else ''}: {verdict} ({seconds:.0f} s)"


def sentences(rows: Sequence[Row]) -> list[str]:
    """What failed, one sentence each; and the layers that say why they do not compile."""
    undone = [(r, p) for r in rows for p in r.proofs if p.check == "compiles" and not p.applies]
    return [
        *(f"{r.layer}, {check}: {text}" for r in rows for check, text in r.failures.items()),
        *(f"{r.layer}, compiles: {proof.message}" for r, proof in undone),
    ]


def aligned(rows: Sequence[Row]) -> str:
    """The table as text, columns of one width each with two spaces between them."""
    lines = [list(COLUMNS), *(row.texts() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def page(rows: Sequence[Row], result: dict[str, Any], origin: str) -> str:
    """The table as Markdown, with the setting of the result and a line of its origin."""
    s = result["setting"]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(row.texts() for row in rows)]
    table = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    parts = (
        "# Proofs",
        "What the property suite (`surflow.proofs`) finds, in float64. "
        f"{MEANING[0].upper()}{MEANING[1:]}.",
        "\n".join(table),
        "\n".join(f"* {text}" for text in sentences(rows)),
        f"{summary(rows, result['seconds'])}; {result['workers']} processes, {s['n']} draws of "
        f"the mass check, seed {s['seed']}, compile backend {s['backend']}.",
        f"{origin}\n",
    )
    return "\n\n".join(filter(None, parts))


def content(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """Verdict, rows and time for JSON; a number that is not finite becomes a word."""
    layers = json.dumps([{**asdict(row), "ok": row.ok} for row in rows])
    layers = json.loads(layers, parse_constant=lambda word: str(float(word)))
    return {"holds": all(row.ok for row in rows), "layers": layers, "seconds": round(seconds, 1)}


def write(output: Path, rows: Sequence[Row], result: dict[str, Any], origin: str) -> list[Path]:
    """Write ``table.md`` and ``table.json`` into a folder, or the one file that is named."""
    if output.suffix == ".md":
        return [write_text(output, page(rows, result, origin))]
    if output.suffix == ".json":
        return [write_json(output, result)]
    files = (output / "table.md", output / "table.json")
    return [path for file in files for path in write(file, rows, result, origin)]
