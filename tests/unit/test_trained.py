"""Measures of a trained model: a user's own, what they may give, and what is refused."""

import functools
import importlib
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from surflow.distributions import StandardNormal
from surflow.errors import UserError
from surflow.evaluation import latents
from surflow.evaluation.likelihood import likelihood
from surflow.evaluation.trained import Trained, evenly_spaced, run_measures
from surflow.flow import Flow
from surflow.metric import Metric
from surflow.transforms import Affine

PAGE = Path(__file__).parents[2] / "docs" / "add-a-metric.md"


def trained_in(folder, flow=None):
    rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    data = SimpleNamespace(splits={"test": rows}, kind="points", eval_batch_size=16, log_prob=None)
    flow = Flow(StandardNormal(2), Affine(2, learn=True)) if flow is None else flow
    return Trained(flow, data, "test", 3, "nats", 1, 0, folder, folder)


def metric(name="test/mine", value=1.0, kind="score"):
    return Metric(name, value, "score", kind, "made up")


def test_a_measure_of_a_users_own_module(tmp_path, monkeypatch):
    """The function of docs/add-a-metric.md, with an option, after the likelihood."""
    (body,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (tmp_path / "my_measures.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    outside = importlib.import_module("my_measures").outside
    trained = trained_in(tmp_path)
    state = torch.get_rng_state()
    measures = {"likelihood": likelihood, "outside": functools.partial(outside, n=1000)}
    found = run_measures(trained, measures)
    assert list(found) == ["test/nll_nats", "test/outside"]
    assert torch.equal(torch.get_rng_state(), state) and trained.flow.training
    share = found["test/outside"]
    radius = trained.rows.norm(dim=1).max().item()
    expected = math.exp(-(radius**2) / 2)  # of a standard normal in the plane
    assert abs(share.value - expected) < 5 * (expected / 1000) ** 0.5 + 1e-3
    assert share.to_json()["protocol"] == {"n": 1000, "seed": 3}
    assert run_measures(trained_in(tmp_path), measures) == found
    assert trained.ledger.total == pytest.approx(-found["test/nll_nats"].value, rel=1e-6)


def test_a_measure_sees_evaluation_mode_without_gradients(tmp_path):
    seen = []

    def measure(trained):  # a generator runs in the same mode
        seen.append((trained.flow.training, torch.is_grad_enabled(), torch.rand(()).item()))
        yield metric("test/a")
        seen.append((trained.flow.training, torch.is_grad_enabled()))
        yield metric("test/b")

    trained = trained_in(tmp_path)
    assert list(run_measures(trained, {"m": measure})) == ["test/a", "test/b"]
    torch.manual_seed(3)
    assert seen == [(False, False, torch.rand(()).item()), (False, False)]
    assert run_measures(trained, {"none": lambda trained: []}) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(value, tmp_path):
    trained = trained_in(tmp_path)
    for kind in ("likelihood", "bound"):
        with pytest.raises(UserError, match=r"test/mine: not finite .*no likelihood; try"):
            run_measures(trained, {"m": lambda trained, kind=kind: metric(value=value, kind=kind)})
    with pytest.raises(UserError, match=rf"^test/mine: not finite \({value}\)$"):
        run_measures(trained, {"m": lambda trained: metric(value=value)})


def test_a_likelihood_that_is_not_finite_is_refused(tmp_path):
    trained = trained_in(tmp_path)
    with torch.no_grad():
        trained.flow.transforms[0].shift.fill_(math.inf)
    with pytest.raises(UserError, match=r"test/nll_nats: not finite .*objective\.scored=best"):
        run_measures(trained, {"likelihood": likelihood})


def test_other_things_than_metrics_are_refused(tmp_path):
    trained = trained_in(tmp_path)
    with pytest.raises(UserError, match=r"measures\.m: expected Metrics, got float"):
        run_measures(trained, {"m": lambda trained: [1.0]})
    with pytest.raises(UserError, match=r"measures\.b: another measure gives test/mine too"):
        run_measures(trained, {"a": lambda trained: metric(), "b": lambda trained: metric()})


def test_measures_of_latents_leave_other_flows_alone(tmp_path):
    trained = trained_in(tmp_path)
    measures = {"active_units": latents.active_units, "levels": latents.levels}
    assert run_measures(trained, measures) == {}


def test_rows_are_evenly_spaced():
    rows = torch.arange(10)
    assert evenly_spaced(rows, 4).tolist() == [0, 2, 5, 7]
    assert torch.equal(evenly_spaced(rows, 50), rows)
    assert len(evenly_spaced(rows[:0], 4)) == 0
