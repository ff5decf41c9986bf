"""Answer a question from the records of finished runs: a table with intervals, a figure, a page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from surflow.cli.command import command
from surflow.config import counts, option, resolved
from surflow.errors import UserError, check_choice
from surflow.files import relative
from surflow.record import load_records
from surflow.reporting import Question, Table, answer, print_table, write_table
from surflow.reporting.spec import DIRECTIONS


def compare(request: DictConfig) -> None:
    """Write the answer into its folder and onto the terminal."""
    asked = resolved(request)
    rows, columns = (_keys(asked, name) for name in ("rows", "columns"))
    where, roots = asked["where"], asked["roots"]
    if not isinstance(where, dict | None):
        raise UserError(f"where: expected keys with values, such as {{model: vae}}, got {where}")
    if asked["direction"] is not None:
        check_choice("direction", asked["direction"], DIRECTIONS, UserError)
    others = {key: asked[key] for key in ("metric", "direction")}
    reference = None if asked["reference"] is None else str(asked["reference"])
    question = Question(rows=rows, columns=columns, where=where, reference=reference, **others)
    table = ask(question, [roots] if isinstance(roots, str) else roots)
    out = asked["out"] or f"comparisons/{_name(table)}"
    given = HydraConfig.get().overrides.task
    figures = write_table(
        table, Path(out), shlex.join(["python", "-m", "surflow.cli.compare", *given])
    )
    for line in (*table.spec.notes, *(f"Warning: {text}" for text in table.warnings)):
        print(line)
    print_table(table)
    print(f"{relative(out)}/: {', '.join(['table.md', 'table.csv', *figures.values()])}")


def ask(question: Question, roots: Sequence[str | Path]) -> Table:
    """The answer of the records in some folders.

    Raises:
        UserError: for a folder that is not there.
        ValueError: for a question that the records do not answer.
    """
    for root in roots:
        if not Path(root).is_dir():
            raise UserError(f"roots: no such folder: {root}")
    found = {item.path.resolve(): item for root in roots for item in load_records(root)}
    return answer(question, found.values(), option, counts)


def _keys(asked: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    keys = [asked[name]] if isinstance(asked[name], str) else asked[name]
    if keys is not None and not (isinstance(keys, list) and all(isinstance(k, str) for k in keys)):
        raise UserError(f"{name}: expected keys such as [surjection,model], got {asked[name]}")
    return None if keys is None else tuple(keys)


def _name(table: Table) -> str:
    """The folder of an answer: what its title says."""
    return table.spec.title.replace("/", "_").replace(" ", "_")


main = command("compare")(compare)

if __name__ == "__main__":
    main()
