"""Prove transforms: the property suite on the catalogue, or on layers of one's own.

    python -m surflow.cli.verify
    python -m surflow.cli.verify 'layers=[AbsInference,my_package.my_module.MyLayer]'
    python -m surflow.cli.verify layers=./my_layer.py:MyLayer

Exit code 0 where every layer holds, 1 where one fails, 2 for a request that cannot be meant.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib
import importlib.util
import inspect
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from surflow.cli.common import guarded, one_line, one_line_errors, origin_line, relative
from surflow.config import conf_dir
from surflow.errors import UserError, close_match
from surflow.files import write_json, write_text

BACKENDS = ("aot_eager", "inductor")
COLUMNS = (
    "layer",
    "kind",
    "round trip",
    "log-det",
    "mass",
    "exact or bound",
    "gradient",
    "compiles",
    "verdict",
)
MEANING = (
    "round trip: greatest error, relative to 1 + |value|; log-det: against the Jacobian of "
    "autograd; mass: of the model, 1 where it is right, ± standard error; gradient: of the "
    "parameters and x; compiles: one graph each way; -: does not apply"
)
ABSENT = "-"


# Which layers -----------------------------------------------------------------------------------


def find_layers(spec: str) -> dict[str, type]:
    """The classes that a request names, by the request that names each of them alone.

    Args:
        spec: a name of the catalogue; ``package.module.Class``; ``file.py:Class``; or a module or
            a file alone, for every concrete transform that it defines.

    Raises:
        UserError: for what is not there, cannot be imported, or is no concrete transform with an
            example.
    """
    from surflow.transforms import catalogue

    known = {cls.__name__: cls for cls in catalogue()}
    if spec in known:
        return {spec: known[spec]}
    path, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        path, name = spec, ""
    if path.endswith(".py"):
        return _classes_of(_import_file(path), name, spec, path)
    if ":" in spec or "." in spec:
        if ":" not in spec:
            path, _, name = spec.rpartition(".")
        module = _import_module(path, spec)
        inner = getattr(module, name, None)
        if isinstance(inner, ModuleType) or (inner is None and _is_module(f"{path}.{name}")):
            path = f"{path}.{name}"
            return _classes_of(_import_module(path, spec), "", spec, path)
        return _classes_of(module, name, spec, path)
    raise UserError(
        f"layers: no layer {spec!r} in the catalogue{_nearest(spec, known)}; a layer of your own "
        "is package.module.Class or ./file.py:Class"
    )


def _nearest(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    import difflib

    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.5)
    near += [k for k in lowered if word.lower() in k and k not in near][: 3 - len(near)]
    return f"; the nearest are {', '.join(lowered[k] for k in near)}" if near else ""


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _see_working_folder() -> None:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _import_module(path: str, spec: str) -> ModuleType:
    _see_working_folder()
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise UserError(
                f"layers: {spec}: no module {error.name!r} here or among the installed packages; "
                "a file is named by its path, such as ./my_layer.py:MyLayer"
            ) from None
        raise UserError(f"layers: {spec}: cannot be imported: {_of_import(error)}") from None


def _import_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"layers: {path}: no such file")
    _see_working_folder()
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    # a name of its own: the file may be called as a module that is there already
    name = f"_verified_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"layers: {path}: cannot be imported: {_of_import(error)}") from None
    return module


def _of_import(error: BaseException) -> str:
    """What broke an import, and at which line."""
    said = f"{type(error).__name__}: {one_line(getattr(error, 'msg', None) or error)}"
    if isinstance(error, SyntaxError):
        return f"{said} ({Path(error.filename or '?').name}, line {error.lineno})"
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "importlib" not in f.filename and f.filename != __file__
    ]
    return (
        f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else said
    )


def _classes_of(module: ModuleType, name: str, spec: str, path: str) -> dict[str, type]:
    from surflow.transforms import Transform

    own = {
        k: v
        for k, v in vars(module).items()
        if inspect.isclass(v) and issubclass(v, Transform) and v.__module__ == module.__name__
    }
    if name:
        if not hasattr(module, name):
            match = close_match(name, own)
            raise UserError(
                f"layers: {spec}: no class {name!r} in {path}{match}"
                + (f"; transforms there: {', '.join(own)}" if own and not match else "")
            )
        return {spec: _provable(getattr(module, name), spec)}
    concrete = [k for k, v in own.items() if not (inspect.isabstract(v) or k.startswith("_"))]
    if not concrete:
        raise UserError(f"layers: {spec}: defines no transform of its own")
    separator = ":" if path.endswith(".py") else "."
    return {f"{path}{separator}{k}": _provable(own[k], f"{path}{separator}{k}") for k in concrete}


def _provable(cls: Any, spec: str) -> type:
    """The class, if the suite can run on it."""
    from surflow.transforms import Transform

    if not inspect.isclass(cls) or not issubclass(cls, Transform):
        got = f"the class {cls.__name__}" if inspect.isclass(cls) else f"a {type(cls).__name__}"
        raise UserError(
            f"layers: {spec}: expected a subclass of surflow.transforms.Transform, got {got}"
        )
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise UserError(f"layers: {spec}: still abstract, it does not define {missing}")
    if cls.example.__func__ is Transform.example.__func__:
        raise UserError(
            f"layers: {spec}: has no example(); give it a classmethod that returns "
            "surflow.transforms.Example(transform, sample, base)"
        )
    return cls


# One layer --------------------------------------------------------------------------------------


@dataclass
class Row:
    """What was found of one layer; errors and masses are floats, None where they do not apply."""

    layer: str
    spec: str
    kind: str = "?"
    number: str = "?"
    cells: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    proofs: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failures

    def texts(self) -> list[str]:
        """The line of the table."""
        verdict = "holds" if self.ok else f"FAILS: {', '.join(self.failures)}"
        values = {
            "layer": self.layer,
            "kind": self.kind,
            "exact or bound": self.number,
            **self.cells,
        }
        return [*(values.get(c, ABSENT) for c in COLUMNS[:-1]), verdict]


def prove_layer(spec: str, n: int, seed: int, backend: str) -> Row:
    """Run the suite on one class; a class that cannot give an example fails with what it said."""
    import torch

    from surflow.proofs import example_of, prove
    from surflow.transforms import Example

    start = time.perf_counter()
    (cls,) = find_layers(spec).values()
    row = Row(cls.__name__, spec)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler; what matters is in the proofs
        try:
            example = example_of(cls, seed)
            if not isinstance(example, Example):
                raise TypeError(f"expected an Example, got {type(example).__name__}")
        except Exception as error:
            row.failures["example"] = f"example() raised {type(error).__name__}: {one_line(error)}"
            row.seconds = time.perf_counter() - start
            return row
        row.kind = example.transform.kind
        layer = example.transform
        row.number = layer.number
        for proof in prove(example, n, seed, backend):
            row.proofs.append(_plain(asdict(proof)))
            if not proof.ok:
                row.failures[proof.check] = one_line(proof.message)
            column, text = _cell(proof)
            if column:
                row.cells[column] = text
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _cell(proof: Any) -> tuple[str | None, str]:
    """The column that a proof fills, and with what."""
    measured = proof.measured
    mark = "" if proof.ok else " (!)"
    if proof.check in ("round_trip", "jacobian"):
        column = {"round_trip": "round trip", "jacobian": "log-det"}[proof.check]
        if not proof.applies:
            return column, ABSENT
        return column, f"{max(measured.values()):.1e}{mark}" if measured else "raised (!)"
    if proof.check == "unit_mass":
        if not proof.applies:
            return "mass", ABSENT
        if not measured:
            return "mass", "raised (!)"
        return "mass", f"{measured['mass']:.4f} ± {measured['standard_error']:.4f}{mark}"
    if proof.check == "gradients":
        silent = not proof.applies and "gradient" not in proof.message
        return "gradient", ABSENT if silent else "finite" if proof.ok else "no (!)"
    if proof.check == "compiles":
        return "compiles", "no (!)" if not proof.ok else "yes" if proof.applies else "declared not"
    return None, ""


def _plain(value: Any) -> Any:
    """Something for JSON: what is not finite becomes a word."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# All of them ------------------------------------------------------------------------------------


def _start_worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself answers ctrl-c
    torch.set_num_threads(1)


def rows_of(specs: Sequence[str], n: int, seed: int, backend: str, workers: int) -> Iterator[Row]:
    """Prove each layer, in any order; over processes where there are several."""
    if workers == 1:
        for spec in specs:
            yield prove_layer(spec, n, seed, backend)
        return
    # of a worker that dies or is stopped Python's tracker frees the semaphores, and would say so
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker
    )
    try:
        futures = {pool.submit(prove_layer, s, n, seed, backend): s for s in specs}
        waiting = set(specs)
        for future in concurrent.futures.as_completed(futures):
            try:
                row = future.result()
            except concurrent.futures.process.BrokenProcessPool:
                raise UserError(
                    "a worker process died (out of memory?), with these not proved: "
                    f"{', '.join(sorted(waiting))}; workers=1 shows which one it is"
                ) from None
            waiting.discard(futures[future])
            yield row
    except BaseException:  # ctrl-c above all: what is under way would go on for seconds
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def verify(cfg: DictConfig) -> bool:
    """Prove what was asked for, print the table, write it if asked; whether every layer holds."""
    from surflow.training.record import commit, cores, origin

    layers = [cfg.layers] if isinstance(cfg.layers, str) else cfg.layers
    _check_request(cfg, layers)
    found: dict[str, type] = {}
    if layers is None:
        from surflow.transforms import catalogue

        found = {cls.__name__: _provable(cls, cls.__name__) for cls in catalogue()}
    else:
        for spec in layers:
            found.update(find_layers(spec))
    workers = min(cores() if cfg.workers == "auto" else cfg.workers, len(found))
    if cfg.output is not None:
        commit()  # of the code that runs
    start = time.perf_counter()
    rows: dict[str, Row] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    with bar:
        task = bar.add_task("proving", total=len(found))
        for row in rows_of(list(found), cfg.n, cfg.seed, cfg.backend, workers):
            rows[row.spec] = row
            bar.update(task, advance=1, description=f"proving (last: {row.layer})")
    ordered = [rows[spec] for spec in found]
    seconds = time.perf_counter() - start
    _print(ordered, seconds)
    if cfg.output is not None:
        result = {
            "setting": {"n": cfg.n, "seed": cfg.seed, "backend": cfg.backend},
            "holds": all(row.ok for row in ordered),
            "layers": [
                {**{k: v for k, v in asdict(row).items() if k != "cells"}, "ok": row.ok}
                for row in ordered
            ],
            "seconds": round(seconds, 1),
            "workers": workers,
            **origin(),
        }
        _write(Path(cfg.output), result, ordered)
    return all(row.ok for row in ordered)


def _check_request(cfg: DictConfig, layers: Any) -> None:
    if layers is not None and not (
        isinstance(layers, list | ListConfig)
        and layers
        and all(isinstance(s, str) and s for s in layers)
    ):
        raise UserError(
            "layers: expected names, such as 'layers=[AbsInference,./my_layer.py:MyLayer]', or "
            f"null for the catalogue, got {layers}"
        )

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    if not whole(cfg.n) or cfg.n < 1000:
        raise UserError(f"n: expected a whole number, 1000 or more, got {cfg.n}")
    if not whole(cfg.seed) or not 0 <= cfg.seed < 2**31:
        raise UserError(f"seed: expected a whole number from 0 to 2^31 - 1, got {cfg.seed}")
    if cfg.workers != "auto" and not (whole(cfg.workers) and cfg.workers > 0):
        raise UserError(f"workers: expected a positive whole number or auto, got {cfg.workers}")
    if cfg.backend not in BACKENDS:
        raise UserError(
            f"backend: expected one of {', '.join(BACKENDS)}, got {cfg.backend!r}"
            + close_match(str(cfg.backend), BACKENDS)
        )
    if cfg.backend == "inductor":
        from surflow.training.module import can_compile

        if not can_compile():
            raise UserError("backend=inductor: no C++ compiler found; use backend=aot_eager")


# The table --------------------------------------------------------------------------------------


def summary(rows: Sequence[Row], seconds: float) -> str:
    """How many hold, in one sentence."""
    failed = [row.layer for row in rows if not row.ok]
    count = f"{len(rows)} layer{'s' if len(rows) > 1 else ''}"
    if not failed:
        return f"{count}: {'every one holds' if len(rows) > 1 else 'it holds'} ({seconds:.0f} s)"
    return f"{count}: {len(failed)} fail{'s' if len(failed) == 1 else ''} ({seconds:.0f} s)"


def sentences(rows: Sequence[Row]) -> list[str]:
    """What failed, one sentence each; and the layers that say why they do not compile."""
    said = [f"{r.layer}, {check}: {text}" for r in rows for check, text in r.failures.items()]
    for row in rows:
        for proof in row.proofs:
            if proof["check"] == "compiles" and not proof["applies"]:
                said.append(f"{row.layer}, compiles: {proof['message']}")
    return said


def _print(rows: Sequence[Row], seconds: float) -> None:
    lines = [row.texts() for row in rows]
    if sys.stdout.isatty():
        from rich.table import Table

        table = Table()
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for row, line in zip(rows, lines, strict=True):
            colour = "green" if row.ok else "red"
            table.add_row(*(escape(t) for t in line[:-1]), f"[{colour}]{escape(line[-1])}[/]")
        Console().print(table)
    else:
        print(aligned([list(COLUMNS), *lines]))
    said = sentences(rows)
    if said:
        print("\n" + "\n".join(said))
    print(f"\n{MEANING}\n{summary(rows, seconds)}")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of one width each, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def page(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """The result as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    s = result["setting"]
    said = [f"* {text}" for text in sentences(rows)]
    return "\n".join(
        [
            "# Proofs",
            "",
            "What the property suite (`surflow.proofs`) finds, in float64. "
            f"{MEANING[0].upper()}{MEANING[1:]}.",
            "",
            line(COLUMNS),
            line(["---"] * len(COLUMNS)),
            *(line(row.texts()) for row in rows),
            "",
            *([*said, ""] if said else []),
            summary(rows, result["seconds"])
            + f"; {result['workers']} processes, {s['n']} draws of the mass check, seed "
            f"{s['seed']}, compile backend {s['backend']}.",
            "",
            origin_line(result, "make verify"),
            "",
        ]
    )


def _write(output: Path, result: dict[str, Any], rows: Sequence[Row]) -> None:
    if output.suffix in (".md", ".json"):
        targets = [output]
    else:
        targets = [output / "table.md", output / "table.json"]
    for target in targets:
        if target.suffix == ".md":
            write_text(target, page(result, rows))
        else:
            write_json(target, result)
    print(", ".join(relative(t) for t in targets))


@hydra.main(config_path=conf_dir(), config_name="verify", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        holds = verify(cfg)
    if not holds:
        raise SystemExit(1)


main = guarded(_main)

if __name__ == "__main__":
    main()
