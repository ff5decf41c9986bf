"""docs/add-a-dataset.md: its files and commands run as they stand, in an empty folder."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import Page, run

PAGE = Page("add-a-dataset.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder with the page's files, and the table that its Python block writes."""
    place = PAGE.write(tmp_path_factory.mktemp("own"))
    language, body = PAGE.commands[0]
    done = run(language, body, place)
    assert done.returncode == 0, done.stderr
    (place / "printed.txt").write_text(done.stdout)
    return place


def sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(repr(rows.shape).encode() + rows.astype("<f4").tobytes()).hexdigest()


def test_the_page_has_one_class_and_one_yaml():
    assert list(PAGE.files) == ["csv_table.py", "my_conf/data/helix.yaml"]
    assert [language for language, _ in PAGE.commands] == ["python", "bash"]


def test_the_table_of_declarations_names_what_the_base_has():
    from surflow.data.module import TensorDataModule

    names = re.findall(r"^\| (`.*?) \|", PAGE.text, re.M)
    found = {name for cell in names for name in re.findall(r"`(\w+)", cell)}
    assert {"kind", "box", "runtime", "pixels", "labels"} <= found
    assert all(name in dir(TensorDataModule) for name in found - {"name"})


def test_it_runs_in_python(folder):
    rows = np.loadtxt(folder / "helix.csv", np.float32, delimiter=",")
    expected = {"rows": 500, "sha256": sha256(rows[-500:])}
    assert f"'test': {expected}" in (folder / "printed.txt").read_text()


def test_it_trains_and_evaluates_from_the_yaml(folder):
    language, body = PAGE.commands[1]
    done = run(language, body, folder)
    assert done.returncode == 0, done.stderr
    nll = float(re.search(r"test/nll_nats = ([\d.]+)", done.stdout)[1])
    assert 0 < nll < 3.5
    (path,) = folder.glob("runs/**/record.json")
    record = json.loads(path.read_text())
    assert record["data"] == "helix" and record["floor"] == {}
    rows = np.loadtxt(folder / "helix.csv", np.float32, delimiter=",")
    splits = {"train": rows[:3000], "valid": rows[3000:3500], "test": rows[3500:]}
    assert record["provenance"] == {
        "name": "helix",
        "version": "1",
        "splits": {s: {"rows": len(x), "sha256": sha256(x)} for s, x in splits.items()},
    }
    again = run("bash", body.replace("my_conf", "my_conf ++data.eval_batch_size=77"), folder)
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stdout  # a runtime option makes no other run


def test_a_missing_file_is_one_line(folder, tmp_path):
    done = run(
        "bash",
        f"python -m surflow.cli.train --config-dir my_conf data=helix data.root={tmp_path} "
        "logger=csv",
        folder,
    )
    assert done.returncode == 2
    assert done.stderr == f"surflow: error: data.file: no file {tmp_path}/helix.csv\n"
