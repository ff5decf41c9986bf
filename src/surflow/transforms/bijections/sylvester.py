"""The Sylvester flow."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surflow.checks import require_at_least
from surflow.nets import MLP
from surflow.transforms.base import Example
from surflow.transforms.bijections.planar import (
    MARGIN,
    _example,
    _FromParameters,
    _spread,
    solve_tanh,
    tanh_slope,
)


def orthonormal_columns(v: Tensor, count: int) -> Tensor:
    r"""The first columns of a product of Householder reflections.

    .. math:: (I - 2 v_1 v_1^\top) \cdots (I - 2 v_H v_H^\top) = I - V S^{-1} V^\top

    with unit vectors v and S = I/2 + the strict upper triangle of :math:`V^\top V`, so that the
    product is two multiplications and one triangular solve, whatever H.

    Args:
        v: (..., H, D), of any length; a vector of zeros stands for the first axis.
        count: M, at most D.

    Returns:
        (..., D, M), with orthonormal columns.
    """
    norm = v.square().sum(-1, keepdim=True)
    first = torch.zeros_like(v[..., :1, :])
    first[..., 0] = 1.0
    degenerate = norm < 1e-20
    unit = torch.where(degenerate, first, v / torch.where(degenerate, 1.0, norm).sqrt())
    half = 0.5 * torch.eye(v.shape[-2], device=v.device, dtype=v.dtype)
    triangle = half + torch.triu(unit @ unit.mT, 1)
    inner = torch.linalg.solve_triangular(triangle, unit[..., :count], upper=True)
    return torch.eye(v.shape[-1], count, device=v.device, dtype=v.dtype) - unit.mT @ inner


class Sylvester(_FromParameters):
    r"""The Sylvester flow: a planar flow with M directions at once.

    .. math:: z = x + Q R \tanh(y), \quad y = \tilde R Q^\top x + b, \qquad
              \mathrm{ldj} = \sum_{i=1}^{M} \log\big(1 + r_{ii} \tilde r_{ii} (1 - \tanh^2 y_i)\big)

    Exact. Q (D, M) has orthonormal columns, a product of Householder reflections; R and
    :math:`\tilde R` are upper triangular with :math:`|r_{ii}|, |\tilde r_{ii}| < 1` by tanh, so
    that every factor is positive. The inverse needs no iteration over the whole: y solves a
    triangular system, one monotone scalar equation after the other, and
    :math:`x = z - Q R \tanh(y)`.

    As with :class:`Planar`, ``forward`` is the cheap direction: use ``Inverse(Sylvester(...))``
    where samples are drawn and scored.

    Args:
        event_shape: the shape of x, D elements in all.
        num_directions: M, from 1 to D. None: D.
        num_reflections: H; None: M, with which Q can be any frame (H < M confines it).
        net: maps the context to (B, H D + M (M + 2)): the reflections; a matrix with R in its upper
            triangle and the rest of the other in its lower one; the other's diagonal; b. None:
            they are free parameters.

    Raises:
        ValueError: for M or H out of range, a wrong shape of x, a missing context, or a net whose
            output has a wrong shape.

    Cost: forward O(D M + H D (H + M)), inverse the same and M times 18 scalar Newton steps.
    Source: van den Berg et al. 2018, arXiv 1803.05649, Sec. 3 (Householder variant).

    >>> layer = Sylvester(4, num_directions=2)
    >>> x = torch.tensor([[0.5, -1.0, 0.0, 2.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-5)
    True
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_directions: int | None = None,
        num_reflections: int | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, net)
        m = self.features if num_directions is None else num_directions
        h = m if num_reflections is None else num_reflections
        if not 1 <= m <= self.features:
            raise ValueError(f"Sylvester: expected 1 <= num_directions <= {self.features}, got {m}")
        require_at_least("Sylvester", 1, num_reflections=h)
        self.num_directions, self.num_reflections = m, h
        triangles = 0.1 * torch.randn(m * m + m)
        self._declare(torch.cat([torch.randn(h * self.features), triangles, torch.zeros(m)]))

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q (B or 1, D, M), R and R~ (B or 1, M, M), b (B or 1, M)."""
        m, h = self.num_directions, self.num_reflections
        v, square, diagonal, b = params.split([h * self.features, m * m, m, m], dim=1)
        q = orthonormal_columns(v.unflatten(1, (h, self.features)), m)
        square = square.unflatten(1, (m, m))
        bound = (1 - MARGIN) ** 0.5  # the product of two diagonals stays above MARGIN - 1
        first = bound * torch.tanh(square.diagonal(dim1=1, dim2=2))
        second = bound * torch.tanh(diagonal)
        r = torch.triu(square, 1) + torch.diag_embed(first)
        r_tilde = torch.tril(square, -1).mT + torch.diag_embed(second)
        return q, r, r_tilde, b

    def _ldj(self, y: Tensor, slope: Tensor) -> Tensor:
        return tanh_slope(y, slope).log().sum(1)

    def _map(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        q, r, r_tilde, b = self._unpack(params)
        y = (r_tilde @ (q.mT @ x.unsqueeze(2))).squeeze(2) + b
        z = x + (q @ (r @ torch.tanh(y).unsqueeze(2))).squeeze(2)
        slope = 1 + r.diagonal(dim1=1, dim2=2) * r_tilde.diagonal(dim1=1, dim2=2)
        return z, self._ldj(y, slope)

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        q, r, r_tilde, b = self._unpack(params)
        c = (r_tilde @ (q.mT @ z.unsqueeze(2))).squeeze(2) + b
        product = r_tilde @ r  # y + product tanh(y) = c, the last row first
        slope = 1 + r.diagonal(dim1=1, dim2=2) * r_tilde.diagonal(dim1=1, dim2=2)
        solved: list[Tensor] = []
        for i in reversed(range(self.num_directions)):
            rest = c[:, i]
            if solved:
                rest = rest - (product[:, i, i + 1 :] * torch.tanh(torch.stack(solved, 1))).sum(1)
            solved.insert(0, solve_tanh(rest, slope[:, i]))
        y = torch.stack(solved, 1)
        x = z - (q @ (r @ torch.tanh(y).unsqueeze(2))).squeeze(2)
        return x, self._ldj(y, slope)

    @classmethod
    def example(cls) -> Example:
        net = _spread(MLP(2, 14, [8], "tanh"))
        return _example(cls((3,), num_directions=2, net=net), 1.8)
