"""Many planar layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surflow.transforms.base import Example
from surflow.transforms.bijections.planar import Planar, _spread, solve_tanh, tanh_slope


class PlanarStack(Planar):
    r"""K planar layers, one behind the other.

    .. math:: x_k = x_{k-1} + \hat u_k \tanh(y_k), \quad y_k = w_k^\top x_{k-1} + b_k, \qquad
              \mathrm{ldj} = \sum_{k=1}^K \log\big(1 + w_k^\top \hat u_k\,(1 - \tanh^2 y_k)\big)

    Exact, and the same map as K layers :class:`Planar` with these parameters, which see. What does
    not depend on x, and the log-determinants once every :math:`y_k` is known, are computed for all
    layers together, so that a layer costs a product, a tanh and a sum: some times less than K
    layers of their own where D is small.

    Args:
        event_shape: the shape of x, D elements in all.
        num_layers: K.
        net: maps the context to (B, K (2 D + 1)): u, w, b of the first layer, then of the second,
            and so on. None: they are free parameters.

    Raises:
        ValueError: for K < 1, a wrong shape of x, a missing context, or a net whose output has a
            wrong shape.

    Cost: forward O(K D), inverse O(K D) and 18 Newton steps for one scalar a row and layer.
    Source: Rezende and Mohamed 2015, arXiv 1505.05770, Sec. 4.1.

    >>> import torch
    >>> layer = PlanarStack(2, num_layers=4)
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-5)
    True
    """

    def __init__(
        self, event_shape: int | Sequence[int], num_layers: int, net: nn.Module | None = None
    ) -> None:
        super().__init__(event_shape, net)
        if num_layers < 1:
            raise ValueError(f"PlanarStack: expected num_layers >= 1, got {num_layers}")
        self.num_layers = num_layers
        u = 0.1 * torch.randn(num_layers, self.features)
        w = torch.randn(num_layers, self.features) / self.features**0.5
        self._declare(torch.cat([u, w, torch.zeros(num_layers, 1)], dim=1).flatten())

    def _unpack_all(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """û and w, (B or 1, K, D), b (B or 1, K, 1) and the slopes, (B or 1, K)."""
        one = params.reshape(-1, 2 * self.features + 1)
        u, w, b, slope = (t.unflatten(0, (-1, self.num_layers)) for t in self._unpack(one))
        return u, w, b, slope.squeeze(2)

    def _map(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b, slope = self._unpack_all(params)
        places = []
        for u_k, w_k, b_k in zip(u.unbind(1), w.unbind(1), b.unbind(1), strict=True):
            y = (w_k * x).sum(1, keepdim=True) + b_k
            x = torch.addcmul(x, u_k, torch.tanh(y))
            places.append(y)
        return x, tanh_slope(torch.cat(places, dim=1), slope).log().sum(1)

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b, slope = self._unpack_all(params)
        places = []
        for k in reversed(range(self.num_layers)):
            y = solve_tanh((w[:, k] * z).sum(1, keepdim=True) + b[:, k], slope[:, k : k + 1])
            z = torch.addcmul(z, u[:, k], torch.tanh(y), value=-1)
            places.insert(0, y)
        return z, tanh_slope(torch.cat(places, dim=1), slope).log().sum(1)

    @classmethod
    def example(cls) -> Example:
        from surflow.distributions import DiagonalNormal, StandardNormal
        from surflow.nets import MLP

        wide = DiagonalNormal((3,), scale=2.0)
        return Example(
            cls((3,), 3, net=_spread(MLP(2, 3 * 7, [8], "tanh"), 1.5)),
            wide.sample_and_log_prob,
            StandardNormal((3,)),
            context=lambda n: torch.randn(n, 2),
        )
