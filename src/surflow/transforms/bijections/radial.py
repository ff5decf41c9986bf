"""The radial flow."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from surflow.nets import MLP
from surflow.transforms.base import Example
from surflow.transforms.bijections.planar import MARGIN, _example, _spread, _Stack


class Radial(_Stack):
    r"""The radial flow: x moves towards a centre or away from it; K times.

    .. math:: x_k = c_k + \frac{\gamma_k + r_k}{\alpha_k + r_k} (x_{k-1} - c_k), \quad
              r_k = \lVert x_{k-1} - c_k \rVert, \qquad
              \mathrm{ldj} = \sum_{k=1}^K (D - 1) \log \frac{\gamma_k + r_k}{\alpha_k + r_k}
              + \log \frac{r_k^2 + 2 \alpha_k r_k + \alpha_k \gamma_k}{(\alpha_k + r_k)^2}

    Exact. With :math:`\beta = \gamma - \alpha` this is the source's
    :math:`z = x + \beta (x - c) / (\alpha + r)`, and its condition :math:`\beta > -\alpha` is
    :math:`\gamma > 0`; :math:`\alpha` and :math:`\gamma` are softplus functions of the parameters.
    Both directions are closed forms: the radius of x is the positive root of
    :math:`r^2 + (\gamma - \rho) r - \alpha \rho = 0`, where :math:`\rho = \lVert z - c \rVert`.

    Args:
        event_shape: the shape of x, D elements in all.
        net: maps the context to (B, K (D + 2)): the centre and the parameters of alpha and gamma
            of the first layer, then of the second, and so on. None: they are free parameters.
        num_layers: K.

    Raises:
        ValueError: for K < 1, a wrong shape of x, a missing context, or a net whose output has a
            wrong shape.

    Cost: forward O(K D), inverse O(K D).
    Source: Rezende and Mohamed 2015, arXiv 1505.05770, Sec. 4.1 and Appendix A.2.

    >>> layer = Radial(2, num_layers=4)
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-5)
    True
    """

    def _start(self, k: int) -> Tensor:
        centre = torch.randn(k, self.features) / self.features**0.5
        radii = math.log(math.e - 1) + 0.1 * torch.randn(k, 2)  # alpha and gamma near 1
        return torch.cat([centre, radii], dim=1)

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The centre (N, D), alpha and gamma (N, 1), both positive."""
        centre, alpha, gamma = params.split([self.features, 1, 1], dim=1)
        return centre, MARGIN + F.softplus(alpha), MARGIN + F.softplus(gamma)

    def _log_slopes(self, r: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
        """The contribution of a layer, elementwise over batch and layers."""
        across = torch.log((gamma + r) / (alpha + r))
        # the slope along the radius, r + ... over (alpha + r)^2, without squares of a large r
        share = r / (alpha + r)
        along = torch.log(share * (share + 2 * (1 - share)) + (1 - share) * gamma / (alpha + r))
        return (self.features - 1) * across + along

    def _map(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        centre, alpha, gamma = self._by_layer(params)
        radii = []
        for c_k, alpha_k, gamma_k in zip(
            centre.unbind(1), alpha.unbind(1), gamma.unbind(1), strict=True
        ):
            offset = x - c_k
            r = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
            x = torch.addcmul(c_k, offset, (gamma_k + r) / (alpha_k + r))
            radii.append(r)
        slopes = self._log_slopes(torch.cat(radii, dim=1), alpha.squeeze(2), gamma.squeeze(2))
        return x, slopes.sum(1)

    def _solve(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        centre, alphas, gammas = self._by_layer(params)
        ldj = torch.zeros_like(z[:, :1])
        for k in reversed(range(self.num_layers)):
            alpha, gamma = alphas[:, k], gammas[:, k]
            offset = z - centre[:, k]
            rho = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
            half = (rho - gamma) / 2
            root = torch.sqrt(half.square() + alpha * rho)
            # the sum of two positive terms in each branch: no cancellation
            below = half.clamp_max(0)
            above = half.clamp_min(0)
            r = torch.where(half > 0, above + root, alpha * rho / (root - below))
            z = centre[:, k] + offset * ((alpha + r) / (gamma + r))
            ldj = ldj + self._log_slopes(r, alpha, gamma)
        return z, ldj.squeeze(1)

    @classmethod
    def example(cls) -> Example:
        return _example(cls((3,), _spread(MLP(2, 3 * 5, [8], "tanh"), 1.5), num_layers=3), 2.0)
