"""The comparison of bounds with a likelihood, and the page made of it."""

import csv
import io
import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.evaluation.trained import Trained, run_measures
from surflow.evaluation.truth import Truth
from surflow.flow import Flow
from surflow.models import unification as models
from surflow.nets import MLP
from surflow.record import load_record
from surflow.reporting import build_table, load_spec
from surflow.reporting.bounds import bounds_rows, render_csv, render_markdown
from surflow.reporting.figures.gaps import gap_figure
from surflow.transforms import VAE, AffineCoupling

HASH = "0123456789abcdef"
SPEC = """\
artefact: toy
title: Toy
metric: test/true_nll_nats
unit: nats
direction: lower
layout: bounds
rows:
  - {name: loose, label: Loose, experiment: toy/loose}
  - {name: exact, label: Exact, experiment: toy/exact}
columns:
  - {name: own_data, label: Own data}
"""


# The comparison


def exact_posterior() -> Flow:
    """x = z + noise, unit variances: the posterior is N(x/2, 1/2), and the encoder has it."""
    encoder = models.LinearNormalNet(1, 1, False)
    decoder = models.LinearNormalNet(1, 1, True)
    with torch.no_grad():
        encoder.loc.weight.fill_(0.5)
        encoder.log_scale.fill_(0.5 * math.log(0.5))
        decoder.loc.weight.fill_(1.0)
        for net in (encoder, decoder):
            net.loc.bias.zero_()
    return Flow(
        StandardNormal(1), VAE(DiagonalNormal(1, net=encoder), DiagonalNormal(1, net=decoder))
    )


def test_a_tight_bound_has_no_gap():
    flow = exact_posterior()
    x = 1.4 * torch.randn(500, 1)
    found = Truth(grids=[[9.0, 401]]).compare(flow, x)
    expected = DiagonalNormal(1, scale=math.sqrt(2)).log_prob(x).mean().item()
    assert found.log_prob == pytest.approx(expected, abs=1e-6)
    assert [g.num_samples for g in found.gaps] == [1, 10, 100, 1000]
    for gap in found.gaps:  # the encoder's float32 half is rounded
        assert abs(gap.mean) < 1e-6
    assert next(flow.parameters()).dtype == torch.float32  # the model is left as it was


def test_a_known_gap():
    """An encoder N(0, 1) whatever x: the ELBO's gap is KL(N(0, 1) || N(x/2, 1/2))."""
    flow = exact_posterior()
    with torch.no_grad():
        flow.transforms[0].encoder.net.loc.weight.zero_()
        flow.transforms[0].encoder.net.log_scale.zero_()
    x = torch.randn(4000, 1)
    gap = Truth(grids=[[9.0, 401]], num_samples=[1]).compare(flow, x).gaps[0]
    divergence = (-0.5 * math.log(2) + (1 + (x / 2).square()) - 0.5).mean().item()
    assert abs(gap.mean - divergence) < 4 * gap.standard_error
    assert gap.standard_error < 0.05


def test_an_exact_model_is_compared_row_by_row():
    flow = Flow(StandardNormal(2), [AffineCoupling(MLP(1, 2, [8]))])
    found = Truth().compare(flow, torch.randn(50, 2))
    assert found.exact
    assert found.gaps == ()
    assert found.worst < 1e-12
    assert found.metrics()["test/true_nll_nats"].kind == "likelihood"


def test_the_measure_keeps_its_details(tmp_path):
    x = torch.randn(20, 1)
    data = SimpleNamespace(splits={"valid": x})
    truth = Truth(grids=[[9.0, 201]], num_samples=[1, 5])
    trained = Trained(exact_posterior(), data, "valid", 3, "nats", 1, 0, tmp_path, tmp_path)
    found = run_measures(trained, {"truth": truth})
    assert list(found) == ["valid/true_nll_nats", "valid/iwbo1_nats", "valid/iwbo5_nats"]
    details = trained.details["truth"]
    assert details == asdict(truth.compare(exact_posterior(), x, seed=3))
    assert found["valid/true_nll_nats"].value == -details["log_prob"]
    json.dumps(details, allow_nan=False)


def test_draws_follow_the_seed_and_leave_the_state():
    flow, x = exact_posterior(), torch.randn(64, 1)
    with torch.no_grad():
        flow.transforms[0].encoder.net.log_scale.zero_()
    truth = Truth(grids=[[9.0, 201]], num_samples=[1, 5])
    state = torch.random.get_rng_state()
    first, again = truth.compare(flow, x, seed=3), truth.compare(flow, x, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == again
    assert truth.compare(flow, x, seed=4).gaps != first.gaps


def test_mistakes_in_the_config():
    with pytest.raises(ValueError, match="num_samples: expected numbers >= 1"):
        Truth(num_samples=[0])
    with pytest.raises(ValueError, match="grids: expected pairs"):
        Truth(grids=[[1.0]])


# The page


def write_record(folder, row, gaps, worst=None, seed=0, truth=True):
    exact = worst is not None
    metric = "test/nll_nats" if exact else "test/elbo_nats"
    kind = "likelihood" if exact else "bound"
    entry = {"value": 2.5, "unit": "nats", "kind": kind, "estimator": "e", "standard_error": 0.01}
    content = {
        "schema": 1,
        "experiment": f"toy/{row}",
        "artefact": "toy",
        "row": row,
        "data": "rings",
        "model": "m",
        "surjection": "none",
        "profile": "paper",
        "seed": seed,
        "config_hash": HASH,
        "config": {},
        "status": "complete",
        "metrics": {metric: entry, "test/true_nll_nats": {**entry, "kind": "likelihood"}},
        "floor": {metric: {"value": 2.0, "source": "s"}},
        "ledger": {
            "rows": [
                {"layer": "0.VAE", "kind": "stochastic"},
                {"layer": "1.VAE", "kind": "stochastic"},
                {"layer": "2.Affine", "kind": "bijective"},
                {"layer": "base.StandardNormal", "kind": "base"},
            ]
        },
        "parameters": 12,
        "commit": "a" * 40,
        "dirty": False,
        "wall_time_s": 3.0,
        "machine": {"cores": 2},
    }
    if truth:
        content["truth"] = {
            "log_prob": -2.4,
            "standard_error": 0.02,
            "count": 100,
            "method": "quadrature",
            "error": 1e-6,
            "mean_error": 1e-7,
            "exact": exact,
            "worst": worst,
            "gaps": [
                {
                    "num_samples": k,
                    "bound": -2.4 - g,
                    "bound_error": 0.02,
                    "mean": g,
                    "standard_error": e,
                }
                for k, g, e in gaps
            ],
        }
    path = folder / row / f"seed{seed}" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    return load_record(path)


def table_of(tmp_path, records, seeds=(0,)):
    (tmp_path / "table.yaml").write_text(SPEC)
    expected = {(r, "own_data", s): HASH for r in ("loose", "exact") for s in seeds}
    spec = load_spec(tmp_path / "table.yaml")
    return build_table(spec, records, expected, "paper", list(seeds))


GOOD = [(1, 0.5, 0.05), (10, 0.1, 0.01), (100, 0.001, 0.002)]


def test_rows_and_verdicts(tmp_path):
    records = [write_record(tmp_path, "loose", GOOD), write_record(tmp_path, "exact", [], 3e-6)]
    loose, exact = bounds_rows(table_of(tmp_path, records))
    assert loose.problems == ()
    assert loose.verdict == "below the likelihood within its error, tightening with K"
    assert loose.layers == "2 × VAE (stochastic) → Affine (bijective)"
    assert loose.gaps[10] == (-2.5, 0.02, 0.1, 0.01)
    assert loose.entropy == 2.0
    assert exact.exact
    assert exact.verdict == "exact: within 3e-06 nats of the likelihood computed otherwise"


@pytest.mark.parametrize(
    ("gaps", "worst", "message"),
    [
        ([(1, 0.5, 0.05), (10, -0.1, 0.01)], None, "IWBO, K = 10, above the likelihood by 0.1"),
        ([(1, 0.1, 0.01), (10, 0.5, 0.01)], None, "gap grows from K = 1 to 10 by 0.4"),
        ([], 0.01, "exact model off by 0.01 nats, allowed 0.0001"),
        ([], math.nan, "exact model off by nan"),
    ],
)
def test_a_row_against_the_theory_says_so(tmp_path, gaps, worst, message):
    record = write_record(tmp_path, "loose", gaps, worst)
    (row,) = bounds_rows(table_of(tmp_path, [record]))
    assert message in row.verdict


def test_seeds_are_averaged(tmp_path):
    other = [(1, 0.7, 0.05), (10, 0.3, 0.01), (100, 0.003, 0.002)]
    records = [
        write_record(tmp_path, "loose", GOOD, seed=0),
        write_record(tmp_path, "loose", other, seed=1),
    ]
    (row,) = bounds_rows(table_of(tmp_path, records, (0, 1)))
    assert row.gaps[1][2] == pytest.approx(0.6)
    assert row.gaps[1][3] == pytest.approx(0.05 / math.sqrt(2))


def test_page_and_csv(tmp_path):
    records = [write_record(tmp_path, "loose", GOOD)]
    table = table_of(tmp_path, records)
    page = render_markdown(table, command="make toy", figures={"Gap": "gap.png"})
    assert "| Loose | bound | -2.4000 ± 0.0200 | -2.5000 ± 0.0100 | -2.9000 ± 0.0200 |" in page
    assert "| Loose | rings | -2.0000 | 0.500 ± 0.050 | 0.100 ± 0.010 | 0.0010 ± 0.0020 |" in page
    assert "| Exact | not run |" in page
    assert "![Gap](gap.png)" in page
    (line,) = csv.DictReader(io.StringIO(render_csv(table)))
    assert line["gap10"] == "0.100000"
    assert line["number"] == "bound"
    assert line["commit"] == "a" * 12


def test_a_record_without_truth_is_refused(tmp_path):
    record = write_record(tmp_path, "loose", GOOD, truth=False)
    with pytest.raises(ValueError, match="no truth in this record; run it again"):
        bounds_rows(table_of(tmp_path, [record]))


def test_figure_draws_every_gap(tmp_path):
    records = [write_record(tmp_path, "loose", GOOD), write_record(tmp_path, "exact", [], 1e-9)]
    rows = bounds_rows(table_of(tmp_path, records))
    first = gap_figure(rows, tmp_path / "gap.png", profile="paper").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    other = tmp_path / "other"
    other.mkdir()
    changed = [(1, 0.5, 0.05), (10, 0.2, 0.01), (100, 0.001, 0.002)]
    rows = bounds_rows(table_of(other, [write_record(other, "loose", changed)]))
    assert gap_figure(rows, other / "gap.png", profile="paper").read_bytes() != first
