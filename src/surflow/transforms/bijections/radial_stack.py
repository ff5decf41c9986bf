"""Many radial layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surflow.transforms.base import Example
from surflow.transforms.bijections.planar import _spread
from surflow.transforms.bijections.radial import Radial


class RadialStack(Radial):
    r"""K radial layers, one behind the other.

    .. math:: x_k = c_k + \frac{\gamma_k + r_k}{\alpha_k + r_k} (x_{k-1} - c_k), \quad
              r_k = \lVert x_{k-1} - c_k \rVert, \qquad
              \mathrm{ldj} = \sum_{k=1}^K (D - 1) \log \frac{\gamma_k + r_k}{\alpha_k + r_k}
              + \log \frac{r_k^2 + 2 \alpha_k r_k + \alpha_k \gamma_k}{(\alpha_k + r_k)^2}

    Exact, and the same map as K layers :class:`Radial` with these parameters, which see. Parameters
    and log-determinants are computed for all layers together.

    Args:
        event_shape: the shape of x, D elements in all.
        num_layers: K.
        net: maps the context to (B, K (D + 2)): centre, alpha and gamma of the first layer, then
            of the second, and so on. None: they are free parameters.

    Raises:
        ValueError: for K < 1, a wrong shape of x, a missing context, or a net whose output has a
            wrong shape.

    Cost: forward O(K D), inverse O(K D).
    Source: Rezende and Mohamed 2015, arXiv 1505.05770, Sec. 4.1.

    >>> import torch
    >>> layer = RadialStack(2, num_layers=4)
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-5)
    True
    """

    def __init__(
        self, event_shape: int | Sequence[int], num_layers: int, net: nn.Module | None = None
    ) -> None:
        super().__init__(event_shape, net)
        if num_layers < 1:
            raise ValueError(f"RadialStack: expected num_layers >= 1, got {num_layers}")
        self.num_layers = num_layers
        centre = torch.randn(num_layers, self.features) / self.features**0.5
        radii = math.log(math.e - 1) + 0.1 * torch.randn(num_layers, 2)  # as of one layer
        self._declare(torch.cat([centre, radii], dim=1).flatten())

    def _map(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        one = params.reshape(-1, self.features + 2)
        centre, alpha, gamma = (t.unflatten(0, (-1, self.num_layers)) for t in self._unpack(one))
        radii = []
        for c_k, alpha_k, gamma_k in zip(
            centre.unbind(1), alpha.unbind(1), gamma.unbind(1), strict=True
        ):
            offset = x - c_k
            r = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
            x = torch.addcmul(c_k, offset, (gamma_k + r) / (alpha_k + r))
            radii.append(r)
        r = torch.cat(radii, dim=1).unsqueeze(1)  # (B, 1, K)
        return x, self._ldj(r, alpha.transpose(1, 2), gamma.transpose(1, 2)).sum(1)

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for part in reversed(params.unflatten(1, (self.num_layers, -1)).unbind(1)):
            z, ldj = super()._solve(z, part)
            total = total + ldj
        return z, total

    @classmethod
    def example(cls) -> Example:
        from surflow.distributions import DiagonalNormal, StandardNormal
        from surflow.nets import MLP

        wide = DiagonalNormal((3,), scale=2.0)
        return Example(
            cls((3,), 3, net=_spread(MLP(2, 3 * 5, [8], "tanh"), 1.5)),
            wide.sample_and_log_prob,
            StandardNormal((3,)),
            context=lambda n: torch.randn(n, 2),
        )
