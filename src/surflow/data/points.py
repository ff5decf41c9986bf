"""DataModules of points in the plane with a known density."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surflow.data.module import TensorDataModule
from surflow.data.synthetic import make_dataset
from surflow.errors import check_whole
from surflow.metric import Floor


class SyntheticData(TensorDataModule):
    """A 2-D dataset with known density, drawn once from a seed.

    Args:
        name: of the data, in records and run folders.
        train_size, valid_size, test_size: points to draw for each split.
        batch_size, eval_batch_size, seed: see :class:`~surflow.data.module.TensorDataModule`.
        data_seed: of the draw; all seeds of a table share one draw of data.
        edge: a bound of every sample, for a dataset with thin tails; None: the dataset's own.
        dataset: a key of ``surflow.data.synthetic.DATASETS``; None: ``name``.

    Raises:
        ValueError: for an unknown dataset or sizes that are not positive.
    """

    kind = "points"
    noun = "points"
    runtime = frozenset({"eval_batch_size"})
    from_files = False

    def __init__(
        self,
        name: str,
        train_size: int = 128_000,
        valid_size: int = 12_800,
        test_size: int = 128_000,
        batch_size: int = 128,
        eval_batch_size: int = 8192,
        seed: int = 0,
        data_seed: int = 0,
        edge: float | None = None,
        dataset: str | None = None,
    ) -> None:
        sizes = {"train_size": train_size, "valid_size": valid_size, "test_size": test_size}
        for key, size in sizes.items():
            check_whole(f"data.{key}", size)
        super().__init__(
            name, (2,), **sizes, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed
        )
        self.dataset = make_dataset(dataset or name)
        self.data_seed = data_seed
        self.edge = edge if edge is not None else self.dataset.bound
        self.symmetry = self.dataset.symmetry

    @property
    def floor(self) -> Floor:  # type: ignore[override]
        return Floor(self.dataset.entropy, f"entropy of the data, {self.dataset.entropy_method}")

    def log_prob(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.dataset.log_prob(x.double())

    @property
    def box(self) -> tuple[list[float], list[float]]:
        """Edges that hold the whole support, infinite where there are none."""
        bound = self.edge if self.edge is not None else math.inf
        return [0.0 if self.dataset.positive else -bound] * 2, [bound] * 2

    def load(self) -> dict[str, Tensor]:
        train, valid, test = self.sizes.values()
        return self.dataset.splits(train, valid, test, self.data_seed)


class QuantizedData(SyntheticData):
    r"""A 2-D dataset cut into cells: integers 0 ... K - 1 with known probabilities.

    .. math:: x_d = \lfloor K (y_d + h) / 2h \rfloor, \quad
              P(x) = \int_{\mathrm{cell}(x)} p(y)\,dy

    Points outside the square go into its outermost cells.

    Args:
        num_levels: K, cells a side.
        half_width: h, half the side of the square that is cut.
        others: see :class:`SyntheticData`.

    Raises:
        ValueError: for K < 2, or a square that leaves out more than 1e-6 of the mass.
    """

    dtype = torch.int64

    def __init__(self, num_levels: int = 32, half_width: float = 5.5, **others: Any) -> None:
        super().__init__(**others)
        check_whole("data.num_levels", num_levels, least=2)
        if not half_width > 0:
            raise ValueError(f"data.half_width: expected a positive number, got {half_width}")
        self.num_levels = num_levels
        self.half_width = float(half_width)
        self.symmetry = None  # of the signs, which integers do not have
        left_out = 1 - self.probabilities.sum().item()
        if left_out > 1e-6:
            raise ValueError(
                f"data.half_width: {half_width:g} leaves out {left_out:.1e} of the mass of "
                f"{self.dataset.name}; expected at most 1e-6"
            )

    @cached_property
    def probabilities(self) -> Tensor:
        """P(x), (K, K), index [x_0, x_1], float64: Gauss-Legendre, 12 x 12 nodes a cell."""
        nodes, weights = np.polynomial.legendre.leggauss(12)
        cell = 2 * self.half_width / self.num_levels
        left = torch.arange(self.num_levels, dtype=torch.float64) * cell - self.half_width
        axis = (left.unsqueeze(1) + cell * (torch.from_numpy(nodes) + 1) / 2).flatten()
        density = self.dataset.log_prob(torch.cartesian_prod(axis, axis)).exp()
        density = density.view(self.num_levels, 12, self.num_levels, 12)
        weight = torch.from_numpy(weights) * cell / 2
        return torch.einsum("aibj,i,j->ab", density, weight, weight)

    @property
    def floor(self) -> Floor:  # type: ignore[override]
        p = self.probabilities
        entropy = -torch.special.xlogy(p, p).sum().item()
        return Floor(entropy, "entropy of the quantized data, quadrature in every cell")

    def log_prob(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.probabilities[x[:, 0], x[:, 1]].log()

    @property
    def box(self) -> tuple[list[float], list[float]]:
        return [0.0, 0.0], [float(self.num_levels)] * 2

    def load(self) -> dict[str, Tensor]:
        scale = self.num_levels / (2 * self.half_width)
        return {
            name: ((y + self.half_width) * scale).floor().long().clamp(0, self.num_levels - 1)
            for name, y in super().load().items()
        }
