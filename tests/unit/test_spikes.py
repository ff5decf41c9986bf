"""The figure of the gradient norms: what it reads of a run, and what it draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from surflow.files import write_json
from surflow.record import load_records
from surflow.reporting.figures import spikes
from surflow.reporting.figures.registry import FIGURES, write_figures
from surflow.reporting.filling import build_table
from surflow.reporting.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]
RECORD = next((ROOT / "results/paper/synthetic/records").glob("flow-corners-seed0.json"))
HEADER = "step,epoch,train/nll_nats,val/nll_nats,lr,train/gradient_norm_max\n"
LINES = 40  # of 50 steps; 5 an epoch


def losses_of(jump):
    """A loss that jumps by `jump` in the line after a spike, and is back at 3 an epoch later."""
    losses = np.full(LINES, 3.0)
    losses[20], losses[21:25] = 3.5, 3 + jump
    return losses


def norms_of():
    norms = np.full(LINES, 2.0)
    norms[::2] = 3.0  # the median is 2.5
    norms[20] = 200.0
    return norms


def put(root, row="flow", data="corners", seed=0, value=3.2, jump=1.0, log=True):
    """A run of 8 epochs with one spike, in the fifth."""
    folder = root / row / data / str(seed)
    content = json.loads(RECORD.read_text())
    metric = content["metrics"]["test/nll_nats"] | {"value": value}
    changes = {"row": row, "experiment": f"synthetic/{row}", "data": data, "seed": seed}
    write_json(folder / "record.json", content | changes | {"metrics": {"test/nll_nats": metric}})
    text = HEADER
    for i, (loss, norm) in enumerate(zip(losses_of(jump), norms_of(), strict=True)):
        step, epoch = 50 * (i + 1), i // 5
        text += f"{step},{epoch},{loss},,0.001,{norm}\n"
        if i % 5 == 4:
            text += f"{step},{epoch},,{3.1 + (jump / 2 if epoch == 4 else 0.002 * epoch**2)},,\n"
    if not log:
        text = "\n".join(line.rpartition(",")[0] for line in text.split("\n"))
    (folder / "metrics.csv").write_text(text)


def table_of(root, seeds=(0, 1)):
    spec = load_spec(ROOT / "experiments/synthetic/table.yaml")
    records = load_records(root)
    expected = {(r.row, r.data, r.seed): r.config_hash for r in records}
    return build_table(spec, records, expected, "paper", seeds)


def traces(root, **changes):
    put(root, **changes)
    table = table_of(root)
    return spikes.traces_of(table, table.spec.columns[1])


def test_what_a_run_has_logged(tmp_path):
    found = traces(tmp_path, value=3.25)
    assert list(found) == ["Flow", "AbsFlow", "Flow, clipped (ours)", "AbsSplineFlow (ours)"]
    assert [len(of_row) for of_row in found.values()] == [1, 0, 0, 0]
    (trace,) = found["Flow"]
    assert (trace.final, trace.record.seed) == (3.25, 0)
    assert trace.epochs == pytest.approx(np.arange(1, 41) / 5)
    assert trace.norms.tolist() == norms_of().tolist()
    assert trace.losses.tolist() == losses_of(1.0).tolist()
    ends, losses = trace.validation
    assert ends.tolist() == list(range(1, 9))
    assert losses == pytest.approx([3.1, 3.102, 3.108, 3.118, 3.6, 3.15, 3.172, 3.198])


def test_changes_of_the_loss_after_a_line(tmp_path):
    """The loss of the line of the spike itself is that of its batch: the next one counts."""
    (trace,) = traces(tmp_path, jump=0.25)["Flow"]
    ratios, changes = trace.lines
    assert len(ratios) == len(changes) == 29  # lines 10 to 38
    assert ratios.tolist() == [*[1.2, 0.8] * 5, 80.0, *[0.8, 1.2] * 9]
    expected = np.zeros(29)
    expected[9] = 0.5  # line 19, before that of the spike
    expected[10:14] = 0.25  # the spike, and the three lines of the jump
    expected[15:21] = -0.125  # half of the lines before are those of the jump
    assert changes == pytest.approx(expected)


def test_changes_of_the_validation_after_an_epoch(tmp_path):
    (trace,) = traces(tmp_path)["Flow"]
    ratios, changes = trace.by_epoch
    assert ratios.tolist() == [1.2, 1.2, 80.0, 1.2, 1.2, 1.2]
    medians = [3.11, 3.129, 3.134, 3.185, 3.198, 3.161]  # of four, at the end of three and two
    assert changes == pytest.approx(np.array([3.108, 3.118, 3.6, 3.15, 3.172, 3.198]) - medians)


def test_medians_of_alike_norms():
    ratios = np.array([1.0, 1.5, 1.9, 2.0, 3.9, 4.0, 5.0, 7.0])
    changes = np.array([0.0, 1.0, 5.0, 9.0, 9.0, 2.0, 3.0, 10.0])
    found = spikes.binned(ratios, changes)  # two lines between 2 and 4 are few
    assert [values.tolist() for values in found] == [[1.5, 5.0], [1.0, 3.0]]


@pytest.fixture
def drawn(monkeypatch):
    found = []
    savefig = Figure.savefig
    look = lambda figure, *args, **kwargs: found.append(figure) or savefig(figure, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", look)
    return found


def test_a_panel_has_the_seed_of_the_worst_run(tmp_path, drawn):
    put(tmp_path, seed=0, value=3.2)
    put(tmp_path, seed=1, value=3.3)
    put(tmp_path, "flow_clipped", seed=1, value=3.1, jump=0.0)
    put(tmp_path, data="four_circles", value=3.4)
    assert spikes.spikes in FIGURES
    assert (
        write_figures(table_of(tmp_path), tmp_path)["Spikes of the gradient norm"] == "spikes.png"
    )
    panels = np.reshape(drawn[-1].axes, (4, 2))
    assert [axes.get_title() for axes in panels[0]] == ["Corners, seed 1", "Circles, seed 0"]
    norms, losses, lines, epochs = (
        [line.get_ydata() for line in axes.lines] for axes in panels[:, 0]
    )
    assert [values.tolist() for values in norms] == [norms_of().tolist()] * 2
    assert [values.tolist() for values in losses] == [losses_of(j).tolist() for j in (1.0, 0.0)]
    assert [len(values) for values in lines] == [58, 0, 2, 29, 0, 2, 2]  # dots, beyond, medians
    assert [len(values) for values in epochs] == [12, 0, 1, 2, 6, 0, 1, 1, 2]  # rings, too
    assert (lines[0].max(), epochs[0].max()) == pytest.approx((1.0, 0.466))
    assert (epochs[2], epochs[3]) == (pytest.approx([-0.011]), pytest.approx([0.037] * 2))


def test_what_lies_beyond_is_on_the_edge():
    changes = np.linspace(-1, 1, 1001)
    changes[[0, 500]] = -50.0, 40.0
    ratios = np.linspace(2.0, 3.9, 1001)
    low, high = np.quantile(changes, (0.005, 0.995))
    axes = Figure().subplots()
    spikes.dose_panel(axes, [[], [(ratios, changes)]], hollow=False)
    dots, edge, medians, _ = axes.lines
    assert len(dots.get_ydata()) == 991 and abs(dots.get_ydata()).max() < 1
    assert sorted(set(edge.get_ydata())) == [low, high]
    assert {ratios[0], ratios[500]} < set(edge.get_xdata())
    assert medians.get_ydata().tolist() == [np.median(changes)]
    spikes.dose_panel(axes := Figure().subplots(), [[(ratios, changes)]], hollow=True)
    assert len(axes.lines[0].get_ydata()) == 1001  # of epochs, all
    assert [line.get_xydata().tolist() for line in axes.lines[3:4]] == [[[3.9, 1.0]]]


def test_runs_without_norms_and_short_ones(tmp_path, drawn):
    put(tmp_path, log=False)
    table = table_of(tmp_path)
    assert spikes.spikes(table, tmp_path) == {}
    put(tmp_path)
    file = tmp_path / "flow/corners/0/metrics.csv"
    file.write_text("\n".join(file.read_text().split("\n")[:8]) + "\n")  # an epoch
    assert spikes.spikes(table, tmp_path)
    assert len(drawn[-1].axes) == 4
