"""Every test starts from one seed, in float32, on one thread."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests that the rebuild of the pipeline left failing: expected to fail until mended.

    The file shrinks to nothing and goes: it is no place for a new failure.
    """
    listed = Path(__file__).with_name("open_after_the_rebuild.txt").read_text("utf-8").splitlines()
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.xfail(reason="open after the rebuild", strict=False))


@pytest.fixture(autouse=True)
def _fixed_start():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def double():
    """New tensors and parameters are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
