"""Committed results belong to the configs there are."""

import json
import re
from pathlib import Path

import pytest

from surflow.config import compose, config_hash

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
