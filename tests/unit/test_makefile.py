"""The Makefile has one rule for all tables, and its help lists what there is."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLES = sorted(path.parent.name for path in ROOT.glob("experiments/*/table.yaml"))

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess:
    # of the environment only the path: MAKEFLAGS of an outer make, or PROFILE, would be obeyed
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_help_lists_every_target():
    shown = re.findall(r"^  ([a-z0-9-]+) ", make("help").stdout, re.M)
    assert {f"reproduce-{name.replace('_', '-')}" for name in TABLES} <= set(shown)
    described = re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert {"setup", "test", "lint", "verify", "docs", "bench", "clean"} <= set(described)
    assert set(described) <= set(shown)
    assert make().stdout == make("help").stdout


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_its_targets(table):
    for verb in ("reproduce", "report"):
        done = make("-n", f"{verb}-{table.replace('_', '-')}")
        assert done.returncode == 0, done.stderr
        line = done.stdout.splitlines()[-1].split()
        assert line[1:3] == ["-m", f"surflow.cli.{verb}"]
        assert f"artefact={table}" in line and "'seeds=[0]'" in line
        assert not any(word.startswith("profile=") for word in line)  # the table's own


def test_what_is_passed_on():
    values = ("PROFILE=short", "SEEDS=0,1", "ROWS=slice,max_pool", "COLUMNS=cifar10", "DEVICES=2")
    (line,) = make("-n", "reproduce-table4", *values).stdout.splitlines()[-1:]
    words = ("profile=short", "'seeds=[0,1]'", "'rows=[slice,max_pool]'", "'columns=[cifar10]'")
    assert {*words, "devices=2", "launcher=local", "workers=auto"} <= set(line.split())


def test_a_table_that_is_not_there():
    done = make("-n", "reproduce-nothing")
    assert done.returncode == 2 and "No rule to make target 'reproduce-nothing'" in done.stderr
