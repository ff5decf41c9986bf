"""The rectifier as a surjection, in both directions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require, require_positive
from surflow.distributions import DiagonalNormal, ZeroInflated
from surflow.distributions.base import as_shape, expand_to, register_value, sum_event
from surflow.distributions.location_scale import HALF_LOG_TWO_PI
from surflow.nets import MLP
from surflow.numeric import working_dtype
from surflow.transforms.base import Example, Surjection, net_output
from surflow.transforms.inverse import _InverseOf


class ReLUInference(Surjection):
    r"""The inference surjection z = max(x, 0), with a half-normal for negative values.

    .. math:: z_d = \max(x_d, 0), \quad
              x_d = z_d \text{ if } z_d > 0,\ -x_d \sim \mathrm{HalfNormal}(\sigma_d(z))
              \text{ if } z_d = 0, \qquad
              V = \sum_{d:\, x_d \le 0} \log \tfrac{2}{\sigma_d} \varphi(x_d / \sigma_d)

    Exact: forward is deterministic. z is a mixed variable: every coordinate has an atom at 0 and
    a density above it, so log p(z) must be taken with respect to Lebesgue measure on z > 0 plus
    a unit atom at 0, as :class:`ZeroInflated` has it; then exp(log p(z) + V) is a density of x
    with respect to Lebesgue measure. A continuous density as base gives no mass to 0 and is
    wrong here, and so is a later layer that adds a log-determinant for a coordinate at
    its atom.

    Args:
        scale: sigma, positive, broadcastable to the event.
        learn: whether log sigma is a parameter.
        net: maps z (and the context, if it has ``context_features``) to log sigma, (B, *event);
            replaces ``scale``.

    Raises:
        ValueError: for a scale that is not positive, a net whose output has a wrong shape, or,
            from ``inverse``, a negative z.

    Cost: O(D) in both directions, and a pass of the net.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Tables 6, 7.

    >>> layer = ReLUInference((2,))
    >>> layer(torch.tensor([[1.5, -1.0]]))  # log 2 N(-1; 0, 1)
    (tensor([[1.5000, 0.0000]]), tensor([-0.7258]))
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        scale: float | Sequence[float] | Tensor = 1.0,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        name = type(self).__name__
        scale = expand_to(scale, self.event_shape, f"{name}: scale")
        require_positive(name, scale=scale)
        self.net = net
        if net is None:
            register_value(self, "log_scale", scale.log(), learn)

    def _log_scale(self, z: Tensor, context: Tensor | None) -> Tensor:
        if self.net is None:
            return self.log_scale.to(working_dtype(z))
        return net_output(self.net, z, context, tuple(z.shape))

    @staticmethod
    def _score(eps: Tensor, below: Tensor, log_scale: Tensor) -> Tensor:
        density = math.log(2) - 0.5 * eps.square() - HALF_LOG_TWO_PI - log_scale
        return sum_event(torch.where(below, density, 0.0))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = F.relu(x)
        log_scale = self._log_scale(z, context)
        return z, self._score(F.relu(-x) * torch.exp(-log_scale), x <= 0, log_scale)

    def _draw(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        require(z >= 0, "values >= 0", z)
        log_scale = self._log_scale(z, context)
        eps = torch.randn(z.shape, device=z.device, dtype=log_scale.dtype).abs()
        below = z <= 0
        x = torch.where(below, (-eps * log_scale.exp()).to(z.dtype), z)
        return x, eps, below, log_scale

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._draw(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, *drawn = self._draw(z, context)
        return x, self._score(*drawn)

    @classmethod
    def example(cls) -> Example:
        net = MLP(2, 2, [8], "tanh", context_features=1)
        sample, base = DiagonalNormal((2,), -0.3, 2.2), ZeroInflated((2,), [0.4, 0.6], [1.0, 1.3])
        return Example(cls((2,), net=net), sample, base, context=1)


class ReLUGenerative(_InverseOf):
    r"""The generative surjection x = max(z, 0): inference draws what lies below a zero.

    .. math:: x_d = \max(z_d, 0), \quad
              z_d = x_d \text{ if } x_d > 0,\ -z_d \sim \mathrm{HalfNormal}(\sigma_d(x))
              \text{ if } x_d = 0, \qquad
              V = -\sum_{d:\, x_d = 0} \log \tfrac{2}{\sigma_d} \varphi(z_d / \sigma_d)

    A lower bound, for data with exact zeros. The latents have an ordinary density, so any flow may
    follow; log p(x) is with respect to Lebesgue measure on x > 0 plus a unit atom at 0: with z_d ~
    p, a zero has the probability that p gives to z_d <= 0, and x_d > 0 the density p(x_d). Draws
    are reparametrised, so the half-normal learns as a variational posterior.

    Args:
        event_shape, scale, learn, net: see :class:`ReLUInference`; the net sees x.

    Raises:
        ValueError: as :class:`ReLUInference`; from ``forward``, for a negative x.

    Cost: O(D) in both directions, and a pass of the net.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Tables 6, 7.

    >>> layer = ReLUGenerative((2,))
    >>> layer.inverse(torch.tensor([[1.5, -1.0]]))
    tensor([[1.5000, 0.0000]])
    """

    of = ReLUInference

    @classmethod
    def example(cls) -> Example:
        sample, base = ZeroInflated((2,), 0.4, 1.3), DiagonalNormal((2,), [0.4, -0.3], [0.8, 0.75])
        return Example(cls((2,), scale=[1.1, 0.9], learn=True), sample, base)
