"""The radial flow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.transforms.base import Example
from surflow.transforms.bijections.planar import MARGIN, _FromParameters, _spread


class Radial(_FromParameters):
    r"""The radial flow: x moves towards a centre or away from it.

    .. math:: z = x_0 + \frac{\gamma + r}{\alpha + r} (x - x_0), \quad
              r = \lVert x - x_0 \rVert, \qquad
              \mathrm{ldj} = (D - 1) \log \frac{\gamma + r}{\alpha + r}
              + \log \frac{r^2 + 2 \alpha r + \alpha \gamma}{(\alpha + r)^2}

    Exact. With :math:`\beta = \gamma - \alpha` this is the source's
    :math:`z = x + \beta (x - x_0) / (\alpha + r)`, and its condition :math:`\beta > -\alpha` is
    :math:`\gamma > 0`; :math:`\alpha` and :math:`\gamma` are softplus functions of what is
    learned. Both directions are closed forms: the radius of x is the positive root of
    :math:`r^2 + (\gamma - \rho) r - \alpha \rho = 0`, where :math:`\rho = \lVert z - x_0 \rVert`.

    Args:
        event_shape: the shape of x, D elements in all.
        net: maps the context to (B, D + 2): x_0 and what gives alpha and gamma, in this order.
            None: they are free parameters.

    Raises:
        ValueError: for a wrong shape of x, a missing context, or a net whose output has a wrong
            shape.

    Cost: forward O(D), inverse O(D).
    Source: Rezende and Mohamed 2015, arXiv 1505.05770, Sec. 4.1 and Appendix A.2.

    >>> import torch
    >>> from surflow.transforms import Radial
    >>> layer = Radial(2)
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-6)
    True
    """

    def __init__(self, event_shape: int | Sequence[int], net: nn.Module | None = None) -> None:
        super().__init__(event_shape, net)
        centre = torch.randn(self.features) / self.features**0.5
        radii = math.log(math.e - 1) + 0.1 * torch.randn(2)  # alpha and gamma near 1
        self._declare(torch.cat([centre, radii]))

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_0 (B or 1, D), alpha and gamma (B or 1, 1), both positive."""
        centre, alpha, gamma = params.split([self.features, 1, 1], dim=1)
        return centre, MARGIN + F.softplus(alpha), MARGIN + F.softplus(gamma)

    def _ldj(self, r: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
        across = torch.log((gamma + r) / (alpha + r))
        # the slope along the radius, r + ... over (alpha + r)^2, without squares of a large r
        share = r / (alpha + r)
        along = torch.log(share * (share + 2 * (1 - share)) + (1 - share) * gamma / (alpha + r))
        return ((self.features - 1) * across + along).squeeze(1)

    def _map(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        centre, alpha, gamma = self._unpack(params)
        offset = x - centre
        r = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        z = centre + offset * ((gamma + r) / (alpha + r))
        return z, self._ldj(r, alpha, gamma)

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        centre, alpha, gamma = self._unpack(params)
        offset = z - centre
        rho = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        half = (rho - gamma) / 2
        root = torch.sqrt(half.square() + alpha * rho)
        # the sum of two positive terms in each branch: no cancellation
        below = half.clamp_max(0)
        above = half.clamp_min(0)
        r = torch.where(half > 0, above + root, alpha * rho / (root - below))
        x = centre + offset * ((alpha + r) / (gamma + r))
        return x, self._ldj(r, alpha, gamma)

    @classmethod
    def example(cls) -> Example:
        from surflow.distributions import DiagonalNormal, StandardNormal
        from surflow.nets import MLP

        wide = DiagonalNormal((3,), scale=2.0)
        return Example(
            cls((3,), net=_spread(MLP(2, 5, [8], "tanh"))),
            wide.sample_and_log_prob,
            StandardNormal((3,)),
            context=lambda n: torch.randn(n, 2),
        )
