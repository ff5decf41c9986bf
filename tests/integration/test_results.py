"""Committed results belong to the configs there are, and the README quotes them rightly."""

import csv
import json
import re
from pathlib import Path

import pytest

from surflow.config import compose, config_hash
from surflow.reporting import load_spec

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "results").glob("*/*/records/*.json"))


def test_there_are_records():
    assert len(RECORDS) >= 36


@pytest.mark.parametrize(
    ("profile", "artefact"), sorted({(p.parts[-4], p.parts[-3]) for p in RECORDS})
)
def test_records_are_of_the_experiments(profile, artefact):
    for path in RECORDS:
        record = json.loads(path.read_text())
        if path.parts[-4:-2] != (profile, artefact):
            continue
        assert record["profile"] == profile
        assert record["dirty"] is False, path.name
        if "measures" not in record:  # of the earlier layout of the config
            assert re.fullmatch("[0-9a-f]{16}", record["former_hash"]), path.name
            assert record["former_hash"] != record["config_hash"], path.name
        if record["seed"] != 0:  # composing takes long, and the seeds share their config
            continue
        now = compose(
            [
                f"experiment={record['experiment']}",
                f"data={record['data']}",
                f"profile={record['profile']}",
                f"seed={record['seed']}",
            ]
        )
        assert config_hash(now) == record["config_hash"], path.name


def test_readme_quotes_the_table():
    spec = load_spec(ROOT / "experiments/synthetic/table.yaml")
    with open(ROOT / "results/paper/synthetic/table.csv", newline="") as file:
        cells = {(c["row"], c["column"]): c for c in csv.DictReader(file)}
    lines = (ROOT / "README.md").read_text().splitlines()
    for row in spec.rows:
        (line,) = [text for text in lines if text.startswith(f"| {row.label} |")]
        shown = [part.strip() for part in line.strip("|").split("|")][1:]
        for column, text in zip(spec.columns, shown, strict=True):
            cell = cells[row.name, column.name]
            assert text.startswith(f"{cell['ours']} ± {cell['std']}")
            if cell["published"]:
                assert float(text.split("(")[1].rstrip(")")) == float(cell["published"])
