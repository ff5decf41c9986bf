"""The house in figures: sizes of src/ and conf/, each with its bound.

`python tests/house.py` prints them, and exits with 1 where one is passed; test_house.py holds them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "surflow"
PASSED_ON = re.compile(r"^\s*(\w+): \$\{(\w+\.)+\1\}\s*(#.*)?$")

BOUNDS = {
    # the rebuild left 30,458; then came scores a row, recipes, and comparisons (730)
    "lines under src": 32_500,
    "lines under cli": 2_000,
    "longest file of cli": 200,
    "functions over 60 lines": 0,
    "modules over 500 lines": 4,
    "longest module": 700,
    "functions that take cfg": 25,
    "import circles": 0,
    "lines under conf that only pass a name on": 0,
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - len((docstring or "").splitlines())


def imports(path: Path, tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules of ours that a file imports, inside functions too; not for type checkers."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules
            if not names <= modules:
                found.add(node.module)
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            component, stack[cut:] = stack[cut:], []
            if len(component) > 1:
                found.append(component)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def figures() -> tuple[dict[str, int], dict[str, list[str]]]:
    """The figures by name, and the places behind those that are counted."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    cli = {path: n for path, n in lines.items() if path.parent.name == "cli"}
    all_functions = [(p, f) for p, tree in trees.items() for f in functions(tree)]
    names = {
        path: ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        )
        for path in trees
    }
    graph = {names[p]: imports(p, tree, set(names.values())) for p, tree in trees.items()}
    graph = {name: others - {name} for name, others in graph.items()}
    conf = [
        (path, line)
        for path in sorted((ROOT / "conf").rglob("*.yaml"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    places = {
        "functions over 60 lines": [
            f"{p.name}:{f.name} ({length(f)})" for p, f in all_functions if length(f) > 60
        ],
        "modules over 500 lines": [f"{p.name} ({n})" for p, n in lines.items() if n > 500],
        "functions that take cfg": [
            f"{p.name}:{f.name}"
            for p, f in all_functions
            if any(a.arg == "cfg" for a in [*f.args.args, *f.args.kwonlyargs])
        ],
        "import circles": [" <-> ".join(circle) for circle in circles(graph)],
        "lines under conf that only pass a name on": [
            f"{path.relative_to(ROOT)}: {line.strip()}"
            for path, line in conf
            if PASSED_ON.match(line)
        ],
    }
    counts = {
        "lines under src": sum(lines.values()),
        "lines under cli": sum(cli.values()),
        "longest file of cli": max(cli.values()),
        "longest module": max(lines.values()),
        **{name: len(found) for name, found in places.items()},
    }
    return {name: counts[name] for name in BOUNDS}, places


def main() -> int:
    counts, places = figures()
    passed = [name for name, bound in BOUNDS.items() if counts[name] > bound]
    for name, bound in BOUNDS.items():
        mark = "  <- passed" if name in passed else ""
        print(f"{name:45} {counts[name]:7,} of at most {bound:,}{mark}")
        if name in passed:
            print(*(f"    {place}" for place in places.get(name, [])), sep="\n")
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main())
