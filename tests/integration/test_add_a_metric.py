"""docs/add-a-metric.md: its files and commands run as they stand, in an empty folder."""

import json
from pathlib import Path

import pytest
from pages import Page, run

PAGE = Page("add-a-metric.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder with the page's files in it, after its first command."""
    place = PAGE.write(tmp_path_factory.mktemp("own"))
    done = run(*PAGE.commands[0], place)
    assert done.returncode == 0, done.stderr
    (place / "printed.txt").write_text(done.stdout)
    return place


def metrics(folder) -> dict:
    (path,) = folder.glob("runs/**/seed0-*/record.json")
    return json.loads(path.read_text())["metrics"]


def test_the_page_has_one_function_and_one_yaml():
    assert list(PAGE.files) == ["my_measures.py", "conf/experiment/outside.yaml"]
    assert [language for language, _ in PAGE.commands] == ["bash", "bash"]


def test_it_stands_in_the_record_and_is_computed_once_per_option(folder):
    first = metrics(folder)
    own = first["test/outside"]
    assert 0 <= own["value"] < 0.2
    assert (own["unit"], own["kind"], own["count"]) == ("score", "score", 10_000)
    assert own["protocol"] == {"n": 10_000, "seed": 0}
    assert f"test/outside {own['value']:.4f}" in (folder / "printed.txt").read_text()

    repeated = run(*PAGE.commands[0], folder)
    assert repeated.returncode == 0, repeated.stderr
    assert "already complete" in repeated.stdout

    # the same run with another option of the measure: measured again, not trained again
    other = run(*PAGE.commands[1], folder)
    assert other.returncode == 0, other.stderr
    second = metrics(folder)
    assert second.pop("test/outside")["protocol"] == {"n": 1000, "seed": 0}
    assert second == {name: m for name, m in first.items() if name != "test/outside"}
    repeated = run(*PAGE.commands[1], folder)
    assert "already complete" in repeated.stdout


def test_a_measure_joins_a_run_that_is_complete(folder):
    plain = PAGE.commands[0][1].split(" +measures.")[0] + " seed=1"
    done = run("bash", plain, folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("runs/**/seed1-*/record.json")
    before = json.loads(path.read_text())
    assert "test/outside" not in before["metrics"]
    done = run("bash", PAGE.commands[0][1].rstrip() + " seed=1", folder)
    assert done.returncode == 0, done.stderr
    after = json.loads(path.read_text())
    assert after["metrics"].pop("test/outside")["protocol"]["seed"] == 1
    assert after["metrics"] == before["metrics"]
    assert after["train_time_s"] == before["train_time_s"]
