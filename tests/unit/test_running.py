"""Means over batches and processes, against sums by hand."""

import copy
import math

import pytest
import torch

from surflow.training.running import RunningMean


def test_a_mean_is_that_of_a_sum_by_hand():
    torch.manual_seed(0)
    values = torch.randn(50)
    mean = RunningMean()
    total = torch.zeros(())
    for value in values:
        mean.update(value)
        total = total + value
    assert torch.equal(mean.total, total)  # float32, in order: bit for bit
    assert mean.compute() == total.item() / 50
    assert mean.state_dict() == {}  # nothing of it is among a checkpoint's parameters
    mean.reset()
    assert not mean.update_called
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(mean.compute())


def test_sums_are_as_wide_as_their_values():
    mean = RunningMean()
    mean.update(torch.tensor(1.0, dtype=torch.float64) / 3, 2)
    assert mean.total.dtype == torch.float64 and mean.compute() == 1 / 6
    wide = RunningMean(torch.float64)
    wide.update(torch.tensor(0.1))
    assert copy.deepcopy(wide).total.dtype == torch.float64


def test_processes_have_one_mean():
    """Of another process with 2 rows, or without any; each keeps its own sum."""
    for total, count, expected in ((3.0, 2, 1.5), (0.0, 0, 1.5), (6.0, 0, 3.0)):
        mean = RunningMean(torch.float64)
        mean.update(torch.tensor(6.0), 4)
        other = {torch.float64: total, torch.int64: count}
        mean.distributed_available_fn = lambda: True
        mean.dist_sync_fn = lambda x, group=None, other=other: [
            x,
            torch.tensor(other[x.dtype]).to(x),
        ]
        assert mean.compute() == expected
        assert (float(mean.total), int(mean.count)) == (6.0, 4)
