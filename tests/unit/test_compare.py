"""Comparisons: their statistics against scipy and by hand, and tables of made records."""

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from surflow.config import computed_of, option
from surflow.files import write_json
from surflow.record import find_records, load_records
from surflow.reporting.comparison import differences, render_csv, render_markdown, summary
from surflow.reporting.question import answer
from surflow.reporting.statistics import holm, paired_t_p, sign_flip_p, smallest_found
from surflow.reporting.write import write_table

METRIC = "test/nll_nats"
DRAWS = np.random.default_rng(0).normal(0.3, 1.0, 12)

# ---------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [2, 3, 12])
def test_paired_t_is_that_of_scipy(n):
    other = np.random.default_rng(1).normal(size=n)
    expected = scipy.stats.ttest_rel(DRAWS[:n] + other, other).pvalue
    assert paired_t_p(list(DRAWS[:n])) == pytest.approx(expected, rel=1e-9)


def test_equal_differences_and_single_ones():
    assert paired_t_p([0.0, 0.0]) == 1
    assert paired_t_p([0.5, 0.5]) == 0
    assert (paired_t_p([0.5]), sign_flip_p([0.5])) == (None, None)
    assert smallest_found([0.5]) == math.inf
    assert smallest_found([0.5, 0.5]) == 0


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1, 2, 3], 2 / 8),  # only all plus and all minus are as far as 6
        ([3, -1, 2], 4 / 8),  # sums ±6, ±4, ±2, 0, 0 against 4
        ([1, 2, -3], 1.0),
        ([0.1, 0.1, 0.1, 0.1], 2 / 16),
    ],
)
def test_flips_of_signs_by_hand(values, expected):
    assert sign_flip_p(values) == expected


def test_flips_of_signs_are_those_of_scipy():
    values = DRAWS[:7]
    exact = scipy.stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(list(values)) == pytest.approx(exact.pvalue, abs=1e-12)
    assert sign_flip_p(list(DRAWS)) is not None
    assert sign_flip_p([*DRAWS, 1.0]) is None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.001, 0.5]) == pytest.approx([1.0, 0.003, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_power_of_the_smallest_difference(n):
    """By the noncentral t of scipy.stats, another code than the one inverted."""
    values = DRAWS[:n]
    shift = smallest_found(values) * math.sqrt(n) / np.std(values, ddof=1)
    edge = scipy.stats.t.ppf(0.975, n - 1)
    assert scipy.stats.nct.sf(edge, n - 1, shift) == pytest.approx(0.8, abs=1e-4)


def test_power_of_the_smallest_difference_by_simulation():
    unit = np.array([-1.0, 0.0, 1.0, -1.0, 1.0]) / np.std([-1, 0, 1, -1, 1], ddof=1)
    draws = np.random.default_rng(3).normal(smallest_found(unit), 1.0, (40_000, 5))
    found = scipy.stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.008)  # four standard errors


# ------------------------------------------------------------------------------------- records


class Node:
    """A target: one option that counts, one that does not."""

    runtime = frozenset({"threads"})

    def __init__(self, width=70, threads=1):
        pass


def config(seed=0, data="corners", surjection="none", **options):
    found = {
        "seed": seed,
        "data": {"name": data, "train_size": 105, "batch_size": 10, "data_seed": 0},
        "model": {"name": "node", "_target_": f"{__name__}.Node"},
        "surjection": {"name": surjection},
        "optimizer": {"lr": 0.01},
        "trainer": {"max_epochs": 4, "accumulate_grad_batches": 3},
        "logger": {"offline": True},
    }
    for key, value in options.items():
        group, _, name = key.partition("__")
        found[group][name] = value
    return found


def put(
    root, value, seed=0, data="corners", surjection="none", scores=None, record=None, **options
):
    """A run's record.json, and scores.npz where there are scores."""
    metric = {"value": value, "unit": "nats", "kind": "likelihood", "estimator": "exact"}
    found = {
        "schema": 1,
        "experiment": "own",
        "artefact": "adhoc",
        "row": "own",
        "data": data,
        "model": "node",
        "surjection": surjection,
        "profile": "paper",
        "seed": seed,
        "config_hash": f"{abs(hash(str((seed, data, surjection, options)))) % 16**16:016x}",
        "config": config(seed, data, surjection, **options),
        "status": "complete",
        "metrics": {METRIC: metric},
        "parameters": 1000,
        "commit": "ab" * 20,
        "wall_time_s": 60.0,
        "provenance": {"splits": {"test": {"sha256": "f" * 64}}},
        **(record or {}),
    }
    folder = root / f"run{len(list(root.glob('run*')))}"
    write_json(folder / "record.json", found)
    if scores is not None:
        np.savez(folder / "scores.npz", **{METRIC: np.float32(scores)})
    return folder


def ask(root, **question):
    question = {"rows": ["surjection"], "columns": ["data"], "metric": METRIC, **question}
    return answer(load_records(root), option, computed_of, **question)


def lines(table):
    found = csv.DictReader(io.StringIO(render_csv(table)))
    return {(line["row"], line["column"]): line for line in found}


NONE, ABS, SORT = [3.1, 3.2, 3.3, 3.25], [3.0, 3.05, 3.2, 3.1], [3.2, 3.1, 3.35, 3.3]


@pytest.fixture
def three(tmp_path):
    """Three rows of four seeds on one dataset."""
    for name, values in (("none", NONE), ("abs", ABS), ("sort", SORT)):
        for seed, value in enumerate(values):
            put(tmp_path, value, seed, surjection=name)
    return tmp_path


def test_means_and_intervals(three):
    line = lines(ask(three))["abs", "corners"]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(ABS), scipy.stats.sem(ABS))
    assert (line["seeds"], line["mean"]) == ("0 1 2 3", f"{np.mean(ABS):.4f}")
    assert (line["low"], line["high"]) == (f"{low:.4f}", f"{high:.4f}")
    assert line["std"] == f"{np.std(ABS, ddof=1):.4f}"


def test_differences_are_paired_by_seed_and_adjusted(three):
    found = differences(ask(three, reference="none"))
    tests = {row: scipy.stats.ttest_rel(v, NONE) for row, v in (("abs", ABS), ("sort", SORT))}
    for row, test in tests.items():
        one, ends = found[row, "corners"], test.confidence_interval()
        assert one.p == pytest.approx(test.pvalue, rel=1e-6)
        assert one.interval.low == pytest.approx(ends.low, abs=1e-9)
        assert one.interval.high == pytest.approx(ends.high, abs=1e-9)
        assert one.over == "4 seeds"
    small, large = (found[row, "corners"] for row in ("abs", "sort"))
    assert small.p_holm == pytest.approx(2 * small.p)  # the smaller of two
    assert large.p_holm == large.p
    assert small.p_signs == 2 / 16  # all four differences are negative


def test_outcomes_in_words(three):
    table = ask(three, reference="none")
    told = lines(table)
    assert told["abs", "corners"]["outcome"] == "better"
    small = smallest_found(np.subtract(SORT, NONE))
    assert told["sort", "corners"]["outcome"] == f"no difference found, {small:.4f} could be shown"
    assert told["none", "corners"]["outcome"] == ""
    assert lines(ask(three, reference="abs"))["none", "corners"]["outcome"] == "worse"
    higher = lines(ask(three, reference="none", direction="higher"))
    assert higher["abs", "corners"]["outcome"] == "worse"


def test_the_reference_is_the_first_row(three):
    assert [row.label for row in ask(three).spec.rows] == ["abs", "none", "sort"]
    assert [row.label for row in ask(three, reference="sort").spec.rows] == ["sort", "abs", "none"]
    with pytest.raises(ValueError, match="reference: no row 'fold'; rows: abs; none; sort"):
        ask(three, reference="fold")


def test_only_common_seeds_are_paired(tmp_path):
    for seed in (0, 1, 2):
        put(tmp_path, 3.0 + seed / 10, seed)
    for seed in (1, 2, 7):
        put(tmp_path, 2.5 + seed / 10 + (seed == 2) * 0.2, seed, surjection="abs")
    found = differences(ask(tmp_path, reference="none"))["abs", "corners"]
    assert found.over == "2 seeds"
    assert found.interval.mean == pytest.approx(np.mean([-0.5, -0.3]))


# One seed


def one_seed(root, **record):
    rng = np.random.default_rng(5)
    one, other = rng.normal(3.0, 1.0, 400), rng.normal(0.05, 0.2, 400)
    put(root, one.mean(), scores=one)
    put(root, (one + other).mean(), surjection="abs", scores=one + other, record=record)
    return other


def test_one_seed_is_compared_over_test_points(tmp_path):
    gap = one_seed(tmp_path)
    table = ask(tmp_path, reference="none")
    found = differences(table)["abs", "corners"]
    test = scipy.stats.ttest_1samp(gap, 0.0)
    ends = test.confidence_interval()
    assert found.over == "400 test points of seed 0"
    assert found.interval.low == pytest.approx(ends.low, abs=1e-6)
    assert found.interval.high == pytest.approx(ends.high, abs=1e-6)
    assert found.p == pytest.approx(test.pvalue, rel=1e-3)
    assert lines(table)["abs", "corners"]["outcome"] == "worse on these points"
    line = lines(table)["none", "corners"]
    assert (line["mean"] != "", line["low"], line["std"]) == (True, "", "")
    assert "over test points, not over trainings" in render_markdown(table, command="c")


def test_other_test_points_are_not_paired(tmp_path):
    one_seed(tmp_path, provenance={"splits": {"test": {"sha256": "e" * 64}}})
    line = lines(ask(tmp_path, reference="none"))["abs", "corners"]
    assert (line["over"], line["p"], line["outcome"]) == ("1 seed", "", "not decided")
    assert (line["difference"] != "", line["difference_low"]) == (True, "")


# What is refused


def refused(root, match, **question):
    with pytest.raises(ValueError, match=match):
        ask(root, **question)


def test_runs_that_differ_in_another_key_are_named(tmp_path):
    put(tmp_path, 3.0, 0)
    put(tmp_path, 3.1, 1, optimizer__lr=0.5)
    refused(
        tmp_path,
        r"none / corners: runs that differ in optimizer.lr are not averaged; .*"
        r"0.01 in \S*run0/record.json, 0.5 in \S*run1/record.json",
    )
    table = ask(tmp_path, where={"optimizer.lr": 0.5})
    assert table.cells["none", "corners"].seeds == (1,)
    both = ask(tmp_path, rows=["surjection", "optimizer.lr"], where={"optimizer.lr": [0.01, 0.5]})
    assert [row.label for row in both.spec.rows] == ["none, lr 0.01", "none, lr 0.5"]


def test_defaults_runtime_options_and_loggers_make_no_difference(tmp_path):
    put(tmp_path, 3.0, 0)
    put(tmp_path, 3.1, 1, model__width=70)
    put(tmp_path, 3.2, 2, model__threads=4, logger__offline=False)
    assert ask(tmp_path).cells["none", "corners"].seeds == (0, 1, 2)
    assert [row.label for row in ask(tmp_path, rows=["model.width"]).spec.rows] == ["width 70"]
    put(tmp_path, 3.3, 3, model__width=71)
    refused(tmp_path, "differ in model.width ")


def test_a_seed_of_the_data_that_follows_the_seed_is_a_seed(tmp_path):
    for seed in (0, 1):
        put(tmp_path, 3.0 + seed, seed, data__data_seed=seed)
    assert ask(tmp_path).cells["none", "corners"].seeds == (0, 1)
    put(tmp_path, 3.5, 2, data__data_seed=1)
    refused(tmp_path, "differ in data.data_seed ")


def test_two_records_of_one_seed_but_not_two_copies(tmp_path):
    put(tmp_path, 3.0)
    put(tmp_path, 3.0)
    assert ask(tmp_path).cells["none", "corners"].seeds == (0,)
    put(tmp_path, 3.4)
    refused(tmp_path, r"none / corners: 2 records of seed 0: \S*run0\S*, \S*run2")


def test_mixed_estimators_and_metrics(tmp_path):
    put(tmp_path, 3.0)
    metric = {"value": 3.0, "unit": "nats", "kind": "bound", "estimator": "ELBO"}
    put(tmp_path, 3.0, surjection="abs", record={"metrics": {METRIC: metric}})
    refused(tmp_path, "corners: test/nll_nats by several estimators: abs: bound.*none: likelihood")
    refused(tmp_path, "metric: 2 of 2 runs have no test/elbo, such as", metric="test/elbo")


def test_unknown_keys_and_no_records(tmp_path):
    refused(tmp_path, "roots: no record of a complete run among 0 files")
    put(tmp_path, 3.0, record={"status": "failed"})
    refused(tmp_path, "roots: no record of a complete run among 1 files")
    put(tmp_path, 3.0)
    for name in ("rows", "columns"):
        refused(
            tmp_path,
            f"{name}: unknown key 'surjecton'; did you mean 'surjection'",
            **{name: ["surjecton"]},
        )
    refused(tmp_path, "where: unknown key 'optimizer.l'", where={"optimizer.l": 1})
    refused(tmp_path, "where: no run has data=ring; known: corners", where={"data": "ring"})


# What is found, and what is warned of


def test_keys_that_vary_are_found(three):
    put(three, 3.3, data="rings", optimizer__lr=0.5)
    table = ask(three, rows=None, columns=None)
    assert table.spec.notes == ("Found by what varies: rows surjection; columns data.",)
    table = ask(three, columns=None)
    assert [column.label for column in table.spec.columns] == ["corners", "rings"]
    put(three, 3.3, data="rings")
    note = ask(three, rows=None, columns=None).spec.notes[0]
    assert note == "Found by what varies: rows surjection, optimizer.lr; columns data."


def test_numbers_are_in_order(tmp_path):
    for lr in (0.5, 0.01, 2.0):
        put(tmp_path, 3.0 + lr, optimizer__lr=lr)
    rows = ask(tmp_path, rows=["optimizer.lr"], columns=[]).spec.rows
    assert [row.label for row in rows] == ["lr 0.01", "lr 0.5", "lr 2"]


def test_rows_that_differ_in_more_are_warned_of(three):
    assert not any("as well" in text for text in ask(three).warnings)
    put(three, 3.0, surjection="fold", optimizer__lr=0.5, surjection__element=1)
    assert "The rows differ in optimizer.lr as well." in ask(three).warnings


def test_budgets_by_hand_and_a_warning_above_five_per_cent(tmp_path):
    put(tmp_path, 3.0)
    put(tmp_path, 3.1, surjection="abs", record={"parameters": 1049})
    table = ask(tmp_path)
    assert table.budgets["none", "corners"] == {
        "parameters": 1000,
        "optimizer_steps": 4 * 4,  # of 10 whole batches, three at a time
        "samples_seen": 4 * 100,
        "wall_time_s": 60,
    }
    assert table.warnings == ()
    put(tmp_path, 3.2, surjection="sort", record={"parameters": 1100})
    expected = "Budgets differ by 10%: parameters 1,000 (none) to 1,100 (sort), corners."
    assert ask(tmp_path).warnings == (expected,)
    put(tmp_path, 3.2, surjection="fold", trainer__max_steps=5)
    assert ask(tmp_path).budgets["fold", "corners"]["optimizer_steps"] is None


# The answer


def test_what_is_written(three, tmp_path):
    put(three, 3.3, data="rings", surjection="abs")
    out = tmp_path / "answer"
    table = ask(three, reference="none")
    figures = write_table(table, out, "the command")
    assert figures == {"Means with 95% intervals over seeds": "means.png"}
    assert (out / "means.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.csv").read_text() == render_csv(table)
    page = (out / "table.md").read_text()
    half = scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(NONE)
    assert f"| none | {np.mean(NONE):.4f} ± {half:.4f} [4] | – |" in page
    assert "| abs |" in page and "| 3.3000 [1] |" in page
    assert "## Differences from none" in page and "the command" in page
    assert len(list((out / "records").glob("*.json"))) == 13
    assert len(find_records(out)) == 13  # as a folder of results: it can be asked again
    again = answer(
        load_records(out),
        option,
        computed_of,
        rows=["surjection"],
        columns=["data"],
        metric=METRIC,
        reference="none",
    )
    assert summary(again) == summary(table)


def test_likelihoods_a_point_of_sets_are_better_where_higher(tmp_path):
    metric = {"value": 1.0, "unit": "nats/point", "kind": "likelihood", "estimator": "exact"}
    put(tmp_path, 1.0, record={"metrics": {METRIC: metric}})
    assert ask(tmp_path).spec.direction == "higher"
    assert replace(ask(tmp_path, direction="lower").spec.columns[0]).direction == "lower"


def test_columns_of_one_dataset_keep_their_own_records(tmp_path):
    for lr in (0.01, 0.5):
        put(tmp_path, 3.0 + lr, optimizer__lr=lr)
    table = ask(tmp_path, columns=["data", "optimizer.lr"])
    write_table(table, tmp_path / "answer", "the command")
    names = [path.name for path in sorted((tmp_path / "answer" / "records").iterdir())]
    assert names == [f"none-corners_lr_{lr}-seed0.json" for lr in (0.01, 0.5)]
