"""Answer a question from the records of finished runs: a table with intervals, a figure, a page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from surflow.cli.command import command
from surflow.config import computed_of, option, resolved
from surflow.errors import UserError, check_choice
from surflow.files import relative
from surflow.record import load_records
from surflow.reporting import Table, answer, print_table, write_table
from surflow.reporting.spec import DIRECTIONS


def compare(request: DictConfig) -> None:
    """Write the answer into its folder and onto the terminal."""
    asked = resolved(request)
    if not isinstance(asked["where"], dict | None):
        raise UserError(f"where: expected such as {{model: vae}}, got {asked['where']}")
    if asked["direction"] is not None:
        check_choice("direction", asked["direction"], DIRECTIONS, UserError)
    out, roots = asked.pop("out"), asked.pop("roots")
    lists = {name: _keys(name, asked.pop(name)) for name in ("rows", "columns")}
    table = ask([roots] if isinstance(roots, str) else roots, **lists, **asked)
    out = out or f"comparisons/{re.sub('[/ ]', '_', table.spec.title)}"
    words = ["python", "-m", "surflow.cli.compare", *HydraConfig.get().overrides.task]
    figures = write_table(table, Path(out), shlex.join(words))
    print(*table.spec.notes, *(f"Warning: {text}" for text in table.warnings), sep="\n")
    print_table(table)
    print(f"{relative(out)}/: {', '.join(['table.md', 'table.csv', *figures.values()])}")


def ask(roots: Sequence[str | Path], **question: Any) -> Table:
    """The answer of the records in some folders; `question` is of :func:`answer`."""
    for root in roots:
        if not Path(root).is_dir():
            raise UserError(f"roots: no such folder: {root}")
    found = {item.path.resolve(): item for root in roots for item in load_records(root)}
    return answer(found.values(), option, computed_of, **question)


def _keys(name: str, asked: Any) -> list[str] | None:
    keys = [asked] if isinstance(asked, str) else asked
    if keys is not None and not (isinstance(keys, list) and all(isinstance(k, str) for k in keys)):
        raise UserError(f"{name}: expected keys such as [surjection,model], got {asked}")
    return keys


main = command("compare")(compare)

if __name__ == "__main__":
    main()
