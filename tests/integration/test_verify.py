"""The proof as a command: what holds, what fails and with which sentence, what cannot be meant."""

import json
import re
import tomllib

import pytest

from surflow.cli import verify
from surflow.config import project_root
from surflow.proofs.lookup import find_layers
from surflow.proofs.rows import COLUMNS, Row
from surflow.transforms import catalogue

OWN = """
import torch

from surflow.transforms import AbsInference, Affine, Transform


class Right(Affine):
    pass


class WrongSign(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, -ldj


class WrongConstant(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, ldj + 0.2


class WrongInverse(Affine):
    def _inverse(self, z, context):
        return super()._inverse(z, context) + 1e-3


class OtherSign(AbsInference):
    def _draw(self, z, context):
        x, positive, logits = super()._draw(z, context)
        return -x, positive, logits


class ReadsAValue(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z + 0 * x.abs().max().item(), ldj


class Talks(Affine):
    def _inverse(self, z, context):
        print(end="")
        return super()._inverse(z, context)


class NoGradient(Affine):
    def _scale_and_shift(self, context):
        log_scale, shift = super()._scale_and_shift(context)
        return log_scale + ((log_scale - log_scale.detach()) ** 2).sqrt(), shift


class NoGradientOfX(AbsInference):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z + ((x - x.detach()) ** 2).sqrt(), ldj


class NeverCompiled(Talks):
    compiles = False
    why_not_compiled = "it talks"


class NeverCompiledForNoReason(Right):
    compiles = False


class BrokenExample(Right):
    @classmethod
    def example(cls):
        return {}["nothing"]


class OtherExample(Right):
    @classmethod
    def example(cls):
        return cls((2,))


class _Hidden(Right):
    pass


def helper():
    pass


class NoTransform:
    pass
"""
MISSING = """
from surflow.transforms import Transform


class Unfinished(Transform):
    bijective, stochastic_forward, stochastic_inverse = True, False, False


class WithoutExample(Unfinished):
    def _forward(self, x, context):
        return x, x.sum(1)

    def _inverse(self, z, context):
        return z
"""
QUICK = ("workers=1", "n=50000")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with layers of one's own, the working folder of the test."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "missing.py").write_text(MISSING)
    (tmp_path / "package_of_one").mkdir()
    (tmp_path / "package_of_one" / "__init__.py").write_text("")
    (tmp_path / "package_of_one" / "inner.py").write_text(OWN)
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "needs.py").write_text("\n\nimport no_such_thing\n")
    (tmp_path / "raises.py").write_text("x = 1\ny = undefined\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "empty.py").write_text("from surflow.transforms import Tanh\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def rows(out: str) -> dict[str, str]:
    """The lines of the table by layer, those above the first empty line."""
    head, *lines = out.partition("\n\n")[0].splitlines()
    assert head.split() == " ".join(COLUMNS).split()
    return {line.split()[0]: line for line in lines}


# What holds and what fails ----------------------------------------------------------------------


def test_layers_of_the_catalogue(call, monkeypatch):
    monkeypatch.setattr("surflow.progress.LINE_EVERY_S", float("inf"))  # however slow the machine
    done = call("verify", "layers=[Tanh,AbsInference,AbsGenerative]", *QUICK)
    assert done.code == 0, done.out + done.err
    table = rows(done.out)
    assert list(table) == ["Tanh", "AbsInference", "AbsGenerative"]
    number = r"\d\.\de[-+]\d\d"
    mass = r"\d\.\d{4} ± 0\.\d{4}"
    for name, pattern in {
        "Tanh": rf"bijective +{number} +{number} +{mass} +exact +finite +yes +holds$",
        "AbsInference": rf"surjective \(inference\) +{number} +- +{mass} +exact +finite +yes +h",
        "AbsGenerative": rf"surjective \(generative\) +{number} +- +{mass} +bound +finite +yes +h",
    }.items():
        assert re.search(pattern, table[name]), table[name]
    assert "3 layers: every one holds" in done.out
    assert done.err == ""


SENTENCES = {
    "WrongSign": ["jacobian: ldj - log |det dz/dx|: off by 0.", "unit_mass: mass "],
    "WrongConstant": [
        "jacobian: ldj - log |det dz/dx|: off by 0.",
        "not 1 within 4 standard errors",
    ],
    "WrongInverse": ["round_trip: forward(inverse(z)) - z: off by 0.00"],
    "OtherSign": ["generation: means of 12 features differ", "agreement: ldj: off by 0."],
    "ReadsAValue": [
        "compiles: forward: graph break at own.py:",
        "x.abs().max().item()",
        "to the host",
    ],
    "Talks": ["compiles: inverse: graph break at own.py:", '`print(end="")`'],
    "NoGradient": ["gradients: the gradient of log_scale is not finite"],
    "NoGradientOfX": ["gradients: the gradient of x is not finite"],
    "NeverCompiledForNoReason": ["compiles: declares compiles = False without saying why"],
    "BrokenExample": ["example: example() raised KeyError: 'nothing'"],
    "OtherExample": ["example: example() raised TypeError: expected an Example, got OtherExample"],
}


def test_deliberately_wrong_layers_fail_by_name(call, folder):
    right = ["Right", "NeverCompiled"]
    names = ",".join(f"./own.py:{name}" for name in [*right, *SENTENCES])
    done = call("verify", f"layers=[{names}]", *QUICK)
    assert done.code == 1, done.out + done.err
    table = rows(done.out)
    assert list(table) == [*right, *SENTENCES]
    for name in right:
        assert table[name].endswith("holds")
    assert re.search(r"finite +declared not +holds$", table["NeverCompiled"])
    assert "NeverCompiled, compiles: declared as not compiled: it talks" in done.out
    for name, parts in SENTENCES.items():
        said = [line for line in done.out.splitlines() if line.startswith(f"{name}, ")]
        assert "FAILS: " in table[name]
        for part in parts:
            assert any(part in line for line in said), (name, said)
        for line in said:  # the row names each check that a sentence explains
            assert line.split(", ")[1].split(":")[0] in table[name].partition("FAILS: ")[2]
    assert f"{len(right) + len(SENTENCES)} layers: {len(SENTENCES)} fail (" in done.out
    assert "(!)" in table["WrongSign"] and "(!)" not in table["Right"]


@pytest.mark.parametrize(
    "spec",
    ["./own.py:Right", "own.py:Right", "package_of_one.inner.Right", "package_of_one.inner:Right"],
)
def test_ways_to_name_a_layer(spec, folder):
    (cls,) = find_layers(spec).values()
    assert cls.__name__ == "Right"
    assert find_layers(str(folder / "own.py:Right")).keys() == {str(folder / "own.py:Right")}


def test_a_file_or_a_module_names_every_layer_of_it(folder):
    found = find_layers("./own.py")
    assert [cls.__name__ for cls in found.values()] == ["Right", *[
        "WrongSign", "WrongConstant", "WrongInverse", "OtherSign", "ReadsAValue", "Talks",
        "NoGradient", "NoGradientOfX", "NeverCompiled", "NeverCompiledForNoReason",
        "BrokenExample", "OtherExample",
    ]]  # fmt: skip
    for spec, cls in found.items():
        assert find_layers(spec) == {spec: cls}
    assert len(find_layers("package_of_one.inner")) == len(found)


def test_processes_find_a_layer_by_its_file(command, folder):
    done = command("verify", "layers=[./own.py:Right,./own.py:WrongSign]", "workers=2", "n=50000")
    assert done.code == 1, done.err
    assert re.search(r"^Right .* holds$", done.out, re.M)
    assert re.search(r"^WrongSign .* FAILS: jacobian", done.out, re.M)
    assert done.err == ""


def test_a_process_that_dies(command, folder):
    (folder / "dies.py").write_text(
        "import os\nfrom surflow.transforms import Tanh\n"
        "class Dies(Tanh):\n    @classmethod\n    def example(cls):\n        os._exit(3)\n"
    )
    done = command("verify", "layers=[./dies.py:Dies,Tanh]", "workers=2", "n=50000")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1, done.err
    line = done.err
    assert "surflow: error: a worker process died" in line
    assert "./dies.py:Dies" in line and "workers=1" in line


def test_the_catalogue_is_what_is_proved_by_default(call, monkeypatch):
    asked = []

    def prove(specs, n, seed, backend, workers):
        asked.append((list(specs), n, seed, backend))
        for spec in reversed(specs):  # in any order
            row = Row(spec, spec, "bijective", "exact")
            if spec == "Tanh":
                row.failures["round_trip"] = "off"
            yield row

    monkeypatch.setattr(verify, "prove_layers", prove)
    done = call("verify")
    names = [cls.__name__ for cls in catalogue()]
    assert asked == [(names, 200_000, 0, "aot_eager")]
    assert list(rows(done.out)) == names
    assert done.code == 1
    assert "Tanh, round_trip: off" in done.out and f"{len(names)} layers: 1 fails" in done.out


def test_another_seed_is_another_example(call):
    def mass(seed):
        done = call("verify", "layers=AffineCoupling", f"seed={seed}", *QUICK)
        assert done.code == 0, done.out
        return re.search(r"\d\.\d{4} ± ", done.out)[0]

    assert mass(0) == mass(0) != mass(1)


# What is written --------------------------------------------------------------------------------


def test_the_table_is_written(call, folder):
    done = call("verify", "layers=[Tanh,./own.py:WrongSign]", "output=results/verify", *QUICK)
    assert done.code == 1
    assert done.out.splitlines()[-1] == "results/verify/table.md, results/verify/table.json"
    assert sorted(p.name for p in (folder / "results/verify").iterdir()) == [
        "table.json",
        "table.md",
    ]
    page = (folder / "results/verify/table.md").read_text()
    body = [line for line in page.splitlines() if line.startswith("|")]
    assert len(body) == 2 + 2
    for line in body:
        assert len(re.findall(r"(?<!\\)\|", line)) == len(COLUMNS) + 1
    assert "* WrongSign, jacobian: " in page and "2 layers: 1 fails" in page
    assert "commit " in page and "torch " in page
    found = json.loads((folder / "results/verify/table.json").read_text())
    assert found["holds"] is False
    assert found["setting"] == {"n": 50000, "seed": 0, "backend": "aot_eager"}
    assert {"commit", "dirty", "machine", "versions", "seconds", "workers"} <= set(found)
    right, wrong = found["layers"]
    assert (right["layer"], right["ok"], right["number"]) == ("Tanh", True, "exact")
    assert [p["check"] for p in right["proofs"]][-1] == "compiles"
    assert wrong["ok"] is False and "jacobian" in wrong["failures"]
    assert wrong["proofs"][1]["measured"]["gap"] > 0.1


@pytest.mark.parametrize("suffix", [".md", ".json"])
def test_one_file_where_one_is_named(suffix, call, folder):
    done = call("verify", "layers=Tanh", f"output=proof{suffix}", *QUICK)
    assert done.code == 0, done.err
    assert [p.name for p in folder.glob("proof*")] == [f"proof{suffix}"]


def test_make_verify_and_the_short_name():
    makefile = (project_root() / "Makefile").read_text()
    assert re.search(r"^verify:.*\n\t\$\(RUN\)\.verify .*output=results/verify$", makefile, re.M)
    scripts = tomllib.loads((project_root() / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["surflow-verify"] == "surflow.cli.verify:main"


# What cannot be meant ---------------------------------------------------------------------------

REFUSED = {
    "unknown layer": (
        ["layers=[AbsInferense]"],
        ["'AbsInferense'", "AbsInference", "./file.py:Cl"],
    ),
    "other case": (["layers=[actnorm]"], ["'actnorm'", "ActNorm"]),
    "no such module": (["layers=[nowhere.at.All]"], ["nowhere.at.All", "no module 'nowhere'"]),
    "no such inner module": (["layers=[package_of_one.x.Y]"], ["no module 'package_of_one.x'"]),
    "no such class": (
        ["layers=[package_of_one.inner.Rigth]"],
        ["'Rigth'", "did you mean 'Right'?"],
    ),
    "no such class in a file": (
        ["layers=[own.py:Zzz]"],
        ["'Zzz'", "own.py", "there: Right, Wrong"],
    ),
    "no such file": (["layers=[not_there.py:Layer]"], ["not_there.py: no such file"]),
    "no transform": (["layers=[own.py:NoTransform]"], ["subclass of", "got the class NoTransform"]),
    "a function": (["layers=[own.py:helper]"], ["subclass of", "got a function"]),
    "a flow": (["layers=[surflow.flow.Flow]"], ["subclass of", "got the class Flow"]),
    "abstract": (["layers=[missing.py:Unfinished]"], ["abstract", "_forward, _inverse"]),
    "no example": (
        ["layers=[missing.py:WithoutExample]"],
        ["no example()", "Example(transform, sam"],
    ),
    "no layer in it": (["layers=[./empty.py]"], ["empty.py", "no transform of its own"]),
    "syntax": (
        ["layers=[syntax.py:A]"],
        ["cannot be imported: SyntaxError", "(syntax.py, line 2)"],
    ),
    "its import": (
        ["layers=[needs.py:A]"],
        ["ModuleNotFoundError", "no_such_thing", "(needs.py, line 3"],
    ),
    "its error": (["layers=[raises.py:A]"], ["NameError", "undefined", "(raises.py, line 2)"]),
    "it leaves": (["layers=[leaves.py:A]"], ["SystemExit: 3", "(leaves.py, line 2)"]),
    "by module": (["layers=[raises.A]"], ["raises.A", "NameError", "(raises.py, line 2)"]),
    "no names": (["layers=[]"], ["layers:", "expected names"]),
    "a number": (["layers=3"], ["layers:", "got 3"]),
    "n too small": (["n=10"], ["n:", "1000 or more", "got 10"]),
    "n a word": (["n=many"], ["n:", "got many"]),
    "seed": (["seed=-1"], ["seed:", "got -1"]),
    "workers": (["workers=0"], ["workers:", "auto", "got 0"]),
    "backend": (["backend=inducter"], ["backend:", "did you mean 'inductor'?"]),
    "misspelt key": (["layer=Tanh"], ["layer:", "did you mean 'layers'?"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_request_that_cannot_be_meant(name, call, folder):
    arguments, parts = REFUSED[name]
    done = call("verify", *arguments, "output=out")
    assert done.code == 2, done
    (line,) = done.err.splitlines()
    assert line.startswith("surflow: error: ")
    for part in parts:
        assert part in line, line
    assert done.out == "" and not (folder / "out").exists()


def test_inductor_needs_a_compiler(call, monkeypatch):
    monkeypatch.setattr("surflow.training.hardware.can_compile", lambda: False)
    done = call("verify", "layers=Tanh", "backend=inductor")
    assert done.code == 2
    assert "backend=inductor: no C++ compiler found; use backend=aot_eager" in done.err


@pytest.mark.slow
def test_inductor(call):
    from surflow.training.hardware import can_compile

    if not can_compile():
        pytest.skip("no C++ compiler")
    done = call("verify", "layers=[AbsInference,AffineCoupling]", "backend=inductor", *QUICK)
    assert done.code == 0, done.out
