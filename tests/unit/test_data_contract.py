"""What every DataModule declares, and what the base makes of rows."""

import hashlib
import importlib
import math
import pkgutil

import pytest
import torch

import surflow.data
from surflow.config import options_of
from surflow.data.module import TensorDataModule
from surflow.data.pixels import BrokenSamples
from surflow.data.points import QuantizedData, SyntheticData
from surflow.data.published import CIFAR10

for found in pkgutil.iter_modules(surflow.data.__path__):
    importlib.import_module(f"surflow.data.{found.name}")


def below(cls: type) -> list[type]:
    return [cls, *(k for sub in cls.__subclasses__() for k in below(sub))]


CLASSES = sorted(
    (k for k in below(TensorDataModule) if k.__module__.startswith("surflow.")),
    key=lambda k: k.__name__,
)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda k: k.__name__)
def test_declarations(cls):
    options, others = options_of(cls)
    assert cls.kind in {"points", "table", "image", "set"}
    assert cls.unit in {"nats", "bpd"}
    assert cls.runtime <= set(options)
    sizes = {f"{split}_size" for split in ("train", "valid", "test")}
    assert {"name", "seed", "batch_size", "eval_batch_size"} | sizes <= set(options)
    assert not others


def test_options_have_those_that_are_passed_on():
    defaults, _ = options_of(CIFAR10)
    assert (defaults["flip"], defaults["pad"], defaults["translate"]) == (True, 2, 0.04)
    assert (defaults["batch_size"], defaults["num_levels"]) == (32, 256)
    assert defaults["train_size"] is None


class Rows(TensorDataModule):
    """Four rows, and a test split of two."""

    def __init__(self, rows, **others):
        super().__init__(**{"name": "rows", "event_shape": (2,), "batch_size": 1, **others})
        self.rows = rows

    def load(self):
        return {"train": self.rows, "test": self.rows[:2]}


def test_a_table_of_real_values():
    data = Rows(torch.arange(8.0).view(4, 2), valid_size=1)
    data.setup()
    assert [len(data.splits[s]) for s in ("train", "valid", "test")] == [3, 1, 2]
    assert data.box == ([-math.inf] * 2, [math.inf] * 2)
    assert data.labels("test") is None and data.floor is None and data.image_shape is None
    with pytest.raises(BrokenSamples, match="data=rows: its rows are no images"):
        data.pixels(data.splits["test"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(4, 3), r"train rows of rows: expected float32 \(N, 2\), got float32 \(4, 3\)"),
        (torch.zeros(4, 2).double(), "expected float32 .*, got float64"),
        (torch.tensor([[0.0, math.nan]] * 4), "train rows of rows: expected finite values"),
        (torch.zeros(0, 2), "rows has no train rows"),
    ],
)
def test_rows_are_checked(rows, message):
    with pytest.raises(ValueError, match=message):
        Rows(rows, valid_size=1).setup()


def test_synthetic_data_say_what_they_are():
    sizes = {"train_size": 200, "valid_size": 20, "test_size": 30}
    data = SyntheticData("checkerboard", **sizes)
    data.setup()
    x = data.splits["test"]
    expected = hashlib.sha256(b"(30, 2)" + x.numpy().astype("<f4").tobytes()).hexdigest()
    assert data.provenance()["splits"]["test"] == {"rows": 30, "sha256": expected}
    assert (data.symmetry, data.from_files, data.kind) == ("antisymmetric", False, "points")
    cut = QuantizedData(name="cut", dataset="eight_gaussians", **sizes)
    cut.setup()
    assert (cut.name, cut.num_levels, cut.splits["test"].dtype) == ("cut", 32, torch.int64)
