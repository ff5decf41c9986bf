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
    assert not mean.update_called and math.isnan(mean.compute())


def test_sums_are_as_wide_as_their_values():
    mean = RunningMean()
    mean.update(torch.tensor(1.0, dtype=torch.float64) / 3, 2)
    assert mean.total.dtype == torch.float64 and mean.compute() == 1 / 6
    wide = RunningMean(torch.float64)
    wide.update(torch.tensor(0.1))
    assert copy.deepcopy(wide).total.dtype == torch.float64


def shares(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    mean = RunningMean(torch.float64)
    if rank == 0:  # the other process has no rows
        mean.update(torch.tensor(6.0), 4)
    own = float(mean.total)
    torch.save((mean.compute(), own, float(mean.total)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_have_one_mean(tmp_path):
    torch.multiprocessing.spawn(shares, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found == [(1.5, 6.0, 6.0), (1.5, 0.0, 0.0)]
