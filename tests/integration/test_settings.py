"""What a table calls published is what its runs are composed of, or stands there as a deviation;
what it says of two rows is what both are composed of."""

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


def claims(spec, setting):
    """The cells that a setting is of, each with the value that the table says it has there."""
    if not setting.than:
        said = setting.published if setting.ours is None else setting.ours
        cells = published_cells(spec)
        return [(row, col, said) for row, col in cells if setting.applies(row.name, col.name)]
    said = dict.fromkeys(setting.rows, setting.ours) | setting.than
    columns = [col for col in spec.columns if setting.applies(setting.rows[0], col.name)]
    return [(row, col, said[row.name]) for row in spec.rows if row.name in said for col in columns]


def mistakes(spec) -> list[str]:
    """Settings that are no keys though they look like one, or not as the table says."""
    found = []
    for setting in spec.settings:
        if setting.ours is not None and setting.ours in (setting.published, *setting.than.values()):
            found.append(f"{setting.setting}: {setting.ours} is no deviation")
        if not KEY.fullmatch(setting.setting):
            continue
        for row, column, said in claims(spec, setting):
            config = options(f"experiment={row.experiment}", *row.overrides, *column.overrides)
            where = f"{row.name}, {column.name}: {setting.setting}"
            try:
                got = value(config, setting.setting)
            except KeyError:
                if said is not None:
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
    for setting in (setting for setting in spec.settings if not setting.than):
        for row in setting.rows or [row.name for row in spec.rows]:
            assert any(setting.applies(row, c) for r, c in cells if r == row), (setting, row)
        for column in setting.columns:
            assert any(setting.applies(r, column) for r, c in cells if c == column), setting


SPLINE = {"published": None, "than": {"flow": 10}, "ours": 20, "rows": ("abs_spline_flow",)}
EMA = SPLINE | {"setting": "callbacks.ema.decay", "than": {"flow": None}, "ours": 0.999}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"published": 11}, "flow, checkerboard: trainer.max_epochs is 10, the table says 11"),
        ({"ours": 11}, "flow, checkerboard: trainer.max_epochs is 10, the table says 11"),
        ({"setting": "trainer.max_epoch"}, "flow, checkerboard: trainer.max_epoch is no key"),
        ({"ours": 10}, "trainer.max_epochs: 10 is no deviation"),
        ({"setting": "epochs of training", "published": 11}, None),
        (SPLINE, None),
        (SPLINE | {"ours": 21}, "abs_spline_flow, checkerboard: {} is 20, the table says 21"),
        (SPLINE | {"than": {"flow": 9}}, "flow, checkerboard: {} is 10, the table says 9"),
        (SPLINE | {"than": {"flow": None}}, "flow, checkerboard: {} is 10, the table says None"),
        (SPLINE | {"than": {"flow": 20}}, "{}: 20 is no deviation"),
        (EMA, None),
        (
            EMA | {"setting": "callbacks.ema.rate"},
            "abs_spline_flow, checkerboard: callbacks.ema.rate is no key",
        ),
    ],
)
def test_what_is_not_so_shows(change, line):
    spec = table_spec("synthetic")
    epochs = next(s for s in spec.settings if s.setting == "trainer.max_epochs")
    changed = {"rows": ("flow",), "columns": ("checkerboard",), **change}
    found = mistakes(replace(spec, settings=(replace(epochs, **changed),)))
    assert found[:1] == ([] if line is None else [line.format("trainer.max_epochs")])
