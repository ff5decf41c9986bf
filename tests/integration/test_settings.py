"""What a table calls published is what its runs are composed of, or stands there as a deviation."""

import re
from dataclasses import replace
from functools import cache

import pytest

from surflow.cli.request import table_spec
from surflow.config import compose, project_root, resolved, with_defaults

KEY = re.compile(r"[a-z_]+(\.\w+)+")
TABLES = sorted(p.parent.name for p in (project_root() / "experiments").glob("*/table.yaml"))


@cache
def options(*overrides: str) -> dict:
    """A composed config, with what its targets take by default."""
    return with_defaults(resolved(compose([*overrides, "profile=paper"])), {})


def value(config: dict, key: str):
    for part in key.split("."):
        config = config[part]
    return list(config) if isinstance(config, tuple) else config


def published_cells(spec):
    """The cells that have both a published value and a run under profile paper."""
    rows, columns = ({item.name: item for item in items} for items in (spec.rows, spec.columns))
    found = [(rows[quote.row], columns[quote.column]) for quote in spec.published]
    return [(row, col) for row, col in found if row.experiment and "paper" in col.profiles]


def mistakes(spec) -> list[str]:
    """Settings that are no keys though they look like one, or not as the table says."""
    found = []
    for setting in spec.settings:
        if setting.ours is not None and setting.ours == setting.published:
            found.append(f"{setting.text}: no deviation")
        if not KEY.fullmatch(setting.setting):
            continue
        said = setting.published if setting.ours is None else setting.ours
        for row, column in published_cells(spec):
            if not setting.applies(row.name, column.name):
                continue
            config = options(f"experiment={row.experiment}", *row.overrides, *column.overrides)
            where = f"{row.name}, {column.name}: {setting.setting}"
            try:
                got = value(config, setting.setting)
            except KeyError:
                found.append(f"{where} is no key")
            else:
                if got != said:
                    found.append(f"{where} is {got!r}, the table says {said!r}")
    return found


@pytest.mark.parametrize("artefact", TABLES)
def test_settings_are_those_of_the_runs(artefact):
    spec = table_spec(artefact)
    assert bool(spec.settings) == bool(published_cells(spec))
    assert mistakes(spec) == []


@pytest.mark.parametrize("artefact", TABLES)
def test_settings_are_of_published_numbers(artefact):
    """A row whose number nobody published has no settings to deviate from."""
    spec = table_spec(artefact)
    cells = [(row.name, column.name) for row, column in published_cells(spec)]
    for setting in spec.settings:
        for row in setting.rows or [row.name for row in spec.rows]:
            assert any(setting.applies(row, c) for r, c in cells if r == row), (setting, row)
        for column in setting.columns:
            assert any(setting.applies(r, column) for r, c in cells if c == column), setting


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"published": 11}, "flow, checkerboard: trainer.max_epochs is 10, the table says 11"),
        ({"ours": 11}, "flow, checkerboard: trainer.max_epochs is 10, the table says 11"),
        ({"setting": "trainer.max_epoch"}, "flow, checkerboard: trainer.max_epoch is no key"),
        ({"ours": 10}, "trainer.max_epochs: published 10, ours 10: no deviation"),
        ({"setting": "epochs of training", "published": 11}, None),
    ],
)
def test_what_is_not_so_shows(change, line):
    spec = table_spec("synthetic")
    epochs = next(s for s in spec.settings if s.setting == "trainer.max_epochs")
    changed = replace(epochs, rows=("flow",), columns=("checkerboard",), **change)
    assert mistakes(replace(spec, settings=(changed,))) == [line] * (line is not None)
