"""A run's TensorBoard events hold what metrics.csv and the record hold."""

import csv
import json
import struct
from collections import defaultdict

import pytest

from surflow.config import run_dir


def scalars(folder):
    """Step and value of every scalar, by tag.

    A file is a sequence of records: length (8 bytes), checksum (4), event, checksum (4).
    """
    from tensorboardX.proto.event_pb2 import Event

    found = defaultdict(dict)
    for path in folder.glob("events.out.tfevents.*"):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack("<Q", data[place : place + 8])
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                found[value.tag][event.step] = value.simple_value
    return found


def test_events(command, tiny, config):
    arguments = ("logger=[csv,tensorboard]", "data=corners")
    done = command("train", *tiny(*arguments))
    assert done.code == 0, done.err
    folder = run_dir(config(*arguments))
    found = scalars(folder / "tensorboard")
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/nll_nats", "val/nll_nats", "lr"):
        wanted = {int(row["step"]): pytest.approx(float(row[name])) for row in rows if row[name]}
        assert wanted and found[name] == wanted
    metrics = json.loads((folder / "record.json").read_text())["metrics"]
    assert [*found["test/nll_nats"].values()] == [pytest.approx(metrics["test/nll_nats"]["value"])]
