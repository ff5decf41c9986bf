"""The command that compares runs, on runs that were trained."""

import csv

import numpy as np
import pytest


@pytest.fixture
def runs(train):
    """Two runs of one seed: their folders, by surjection."""
    return {
        name: train(f"surjection={name}", "data=corners", "model.support=real_line")[1]
        for name in ("none", "abs")
    }


def test_compare(runs, root, call, tmp_path):
    question = ("columns=data", "metric=test/nll_nats", f"roots={root}", f"out={tmp_path / 'out'}")
    done = call("compare", "rows=surjection", "reference=none", *question)
    assert (done.code, done.err) == (0, "")
    lines = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [line["row"] for line in lines] == ["none", "abs"]
    one, other = (np.load(runs[name] / "scores.npz")["test/nll_nats"] for name in ("abs", "none"))
    assert lines[1]["over"] == "500 test points of seed 0"
    assert float(lines[1]["difference"]) == pytest.approx((one - other).mean(), abs=1e-4)
    assert {line["optimizer_steps"] for line in lines} == {"10"}
    assert {line["samples_seen"] for line in lines} == {"1280"}
    page = (tmp_path / "out" / "table.md").read_text()
    assert "python -m surflow.cli.compare rows=surjection reference=none columns=data" in page
    assert "learning_curves.png" in page and (tmp_path / "out" / "means.png").is_file()

    done = call("compare", *question)
    assert "Found by what varies: rows surjection; columns data." in done.out

    for bad, said in (
        ("rows=surjecton", "rows: unknown key 'surjecton'; did you mean 'surjection'?"),
        ("rows=model", "runs that differ in surjection are not averaged"),
        ("where={data: rings}", "where: no run has data=rings; known: corners"),
        ("roots=nowhere", "roots: no such folder: nowhere"),
        ("direction=up", "direction: expected one of lower, higher"),
    ):
        done = call("compare", *question, bad)
        assert done.code == 2 and done.out == "", bad
        assert done.err.startswith("surflow: error: ") and said in done.err, bad
        assert done.err.count("\n") == 1
