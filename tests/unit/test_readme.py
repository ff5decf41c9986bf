"""The README's library example runs and says what it claims; so do the docstrings' examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from surflow import (
    distributions,
    evaluation,
    flow,
    memory,
    models,
    nets,
    objectives,
    proofs,
    transforms,
    variational,
)

ROOT = Path(__file__).parents[2]


def modules_of(package):
    """Every module of a package, the package included."""
    yield package
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        yield importlib.import_module(found.name)


MODULES = [
    flow,
    memory,
    objectives,
    proofs,
    variational,
    *modules_of(evaluation),
    *modules_of(models),
    *modules_of(transforms),
    *modules_of(distributions),
    *modules_of(nets),
]


def test_library_example():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    model, x = scope["flow"], scope["x"]
    assert model.lower_bound is False
    assert model.log_prob(x).shape == (1000,)
    assert torch.equal(model.log_prob(x), model.log_prob(-x))  # symmetric, as |x| makes it
    assert model.ledger(x).total == pytest.approx(model.log_prob(x).mean().item(), abs=1e-4)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.removeprefix("surflow."))
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    if module in (flow, proofs):
        assert result.attempted > 0


def test_every_layer_has_a_doctest():
    finder = doctest.DocTestFinder(recurse=False)
    without = [
        cls.__name__
        for cls in transforms.catalogue()
        if not any(t.examples for t in finder.find(cls, cls.__name__))
    ]
    assert without == []


def test_every_make_target_in_the_pages_exists():
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = re.findall(r"`make ([a-z][a-z0-9-]*[a-z0-9])[` ]|^make ([a-z][a-z0-9-]*)", text, re.M)
    targets = {a or b for a, b in named}
    assert {"reproduce-synthetic", "test", "bench"} <= targets
    tables = [p.parent.name.replace("_", "-") for p in ROOT.glob("experiments/*/table.yaml")]
    assert re.search(r"^\$\(addprefix reproduce-,\$\(TABLES\)\): reproduce-%:", makefile, re.M)
    assert re.search(r"^\$\(addprefix report-,\$\(TABLES\)\): report-%:", makefile, re.M)
    made = {f"{verb}-{table}" for verb in ("reproduce", "report") for table in tables}
    for target in targets - made:
        assert re.search(rf"^{target}:", makefile, re.M), target
