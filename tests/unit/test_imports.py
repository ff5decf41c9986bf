"""Imports point one way, and the library loads none of the pipeline."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import surflow

SOURCE = Path(surflow.__file__).parent
HEAVY = (
    "pytorch_lightning",
    "lightning",
    "hydra",
    "omegaconf",
    "wandb",
    "torchvision",
    "torchmetrics",
    "torch_fidelity",
    "matplotlib",
)
FACE = ("Flow", "FlowDistribution", "bits_per_dim", "elbo", "iwbo")
# room: the rooms of ours that it may import from
ALLOWED = {
    "checks": set(),
    "numeric": set(),
    "score_function": set(),
    "latents": set(),
    "draws": set(),
    "errors": set(),
    "files": set(),
    "progress": set(),
    "nets": {"checks", "numeric"},
    "distributions": {"nets", "checks", "numeric", "latents", "score_function"},
    "transforms": {"checks", "numeric", "latents", "score_function", "nets", "distributions"},
    "flow": {"checks", "numeric", "latents", "distributions", "transforms"},
    "objectives": {"checks", "score_function", "distributions", "transforms", "flow"},
    "variational": {
        "checks",
        "errors",
        "numeric",
        "score_function",
        "distributions",
        "transforms",
        "flow",
    },
    "evaluation/marginal": {"checks", "transforms", "flow"},
    "memory": {"checks", "errors", "transforms"},
    "proofs": {"checks", "distributions", "errors", "files", "transforms"},
    "metric": set(),
    "reading": set(),
    "record": {"metric", "reading"},
    "reporting": {"errors", "files", "metric", "reading", "record"},
    "config": {"errors"},
}
FORBIDDEN = {
    "models": {"config", "training", "evaluation", "cli", "record", "reporting"},
    "data": {"models", "config", "training", "evaluation", "cli", "record", "reporting"},
    "evaluation": {"config", "training", "cli", "record"},
    "training": {"cli", "reporting"},
}


def files(room: str) -> list[Path]:
    single = SOURCE / f"{room}.py"
    return [single] if single.exists() else sorted((SOURCE / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too, by its full name."""
    package = ("surflow", *path.relative_to(SOURCE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*up, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def rooms(path: Path) -> set[str]:
    """The rooms of ours that a file imports from."""
    known = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or p.is_dir()}
    parts = (name.split(".") for name in imported(path))
    return {p[1] for p in parts if p[0] == "surflow" and len(p) > 1} & known


LIGHT = ("transforms", "flow", "distributions", "variational", "proofs")


def loaded(*modules: str) -> set[str]:
    """The packages in a fresh process that has imported these modules."""
    code = f"import json, sys, {', '.join(modules)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_the_library_loads_nothing_heavy():
    found = loaded(*(f"surflow.{name}" for name in LIGHT))
    assert {"torch", "surflow"} <= found
    assert found & {*HEAVY, "torchdiffeq"} == set()


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_from_what_lies_before_it(room):
    assert files(room)
    for path in files(room):
        assert rooms(path) - {room} <= ALLOWED[room], path


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_does_not_import_from_what_lies_behind_it(room):
    for path in files(room):
        assert rooms(path) & FORBIDDEN[room] == set(), path


@pytest.mark.parametrize("room", [r for r in ALLOWED if r not in ("reporting", "config")])
def test_the_library_names_no_framework(room):
    for path in files(room):
        assert {name.split(".")[0] for name in imported(path)} & set(HEAVY) == set(), path


def test_the_package_imports_nothing_from_outside_it():
    for path in SOURCE.rglob("*.py"):
        found = {name.split(".")[0] for name in imported(path)}
        assert found & {"benchmarks", "write_layers", "write_tables", "doubles"} == set(), path


@pytest.mark.parametrize(
    "room", ["reporting", "record", "reading", "metric", "files", "errors", "progress"]
)
def test_reporting_imports_nothing_of_torch(room):
    for path in files(room):
        found = {name.split(".")[0] for name in imported(path)}
        assert found & {"torch", "torchvision", "torchmetrics", "pytorch_lightning"} == set(), path


def test_torch_is_loaded_when_it_is_needed():
    light = ("surflow", "surflow.reporting", "surflow.record", "surflow.cli.compare")
    assert "torch" not in loaded(*light)


def test_the_face_of_the_package():
    code = f"import surflow; print(*(getattr(surflow, n).__name__ for n in {FACE}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(FACE)
    assert {*FACE, "__version__"} == set(surflow.__all__)
    with pytest.raises(AttributeError, match="module 'surflow' has no attribute 'Flows'"):
        surflow.Flows  # noqa: B018


def test_evaluation_takes_only_figures_from_reporting():
    drawing = {path.stem for path in files("evaluation") if "reporting" in rooms(path)}
    assert drawing == {"pictures", "sampling"}


def test_only_the_command_line_has_hydra_main():
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] == "cli":
            continue
        tree = ast.parse(path.read_text())
        attributes = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert "hydra.main" not in attributes | imported(path), path


def test_nobody_probes_what_data_declare():
    for path in SOURCE.rglob("*.py"):
        assert "hasattr(data" not in (text := path.read_text()) and "getattr(data" not in text, path


def test_the_reader_of_imports_reads(tmp_path):
    file = SOURCE / "transforms" / "surjections" / "abs.py"
    assert {"surflow.checks", "surflow.checks.require", "torch.nn"} <= imported(file)
    assert {"checks", "distributions", "nets", "transforms"} <= rooms(file)
