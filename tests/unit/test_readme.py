"""The README's library example runs and says what it claims; so do the docstrings' examples."""

import doctest
import re
from pathlib import Path

import pytest
import torch

from surflow import flow, proofs

ROOT = Path(__file__).parents[2]


def test_library_example():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    model, x = scope["flow"], scope["x"]
    assert model.lower_bound is False
    assert model.log_prob(x).shape == (1000,)
    assert torch.equal(model.log_prob(x), model.log_prob(-x))  # symmetric, as |x| makes it
    assert model.ledger(x).total == pytest.approx(model.log_prob(x).mean().item(), abs=1e-4)


@pytest.mark.parametrize("module", [flow, proofs])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_make_target_in_the_pages_exists():
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = re.findall(r"`make ([a-z][a-z0-9-]*[a-z0-9])[` ]|^make ([a-z][a-z0-9-]*)", text, re.M)
    targets = {a or b for a, b in named}
    assert {"reproduce-synthetic", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
