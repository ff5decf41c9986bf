"""Monotone maps of one variable whose parameters come from elsewhere.

A coupling, an autoregressive layer and an unconditional elementwise layer differ only in where
the parameters come from; the map itself is written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class ElementwiseMap(ABC):
    """z = f(x; theta), strictly monotone in x, elementwise.

    Attributes:
        num_params: P, the number of parameters an element takes.
        exact_inverse: whether the inverse is a formula rather than a search.
    """

    num_params: int
    exact_inverse: bool = False

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x (...), params (..., P) -> z (...) and log |dz/dx| (...), float32 or better."""

    @abstractmethod
    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """z (...), params (..., P) -> x (...)."""

    def inverse_and_ldj(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x and log |dz/dx| at that x."""
        x = self.inverse(z, params)
        return x, self.forward(x, params)[1]
