"""Elementwise bijections without parameters, and a learned elementwise layer of any map."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require, require_positive
from surflow.distributions import DiagonalNormal, HalfNormal, Logistic, StandardNormal, Uniform
from surflow.distributions.base import as_shape, sum_event
from surflow.transforms.base import Bijection, Example, output_of_context
from surflow.transforms.bijections.splines import RationalQuadraticSpline
from surflow.transforms.inverse import _InverseOf
from surflow.transforms.maps import ElementwiseMap


class _ElementwiseBijection(Bijection):
    """z_d = f(x_d): a subclass gives f, its inverse and log |f'|, and checks its range."""

    _map: Callable[[Tensor], Tensor]
    _inverse_map: Callable[[Tensor], Tensor]
    _log_derivative: Callable[[Tensor, Tensor], Tensor]

    def _check_range(self, z: Tensor) -> None:
        """Raise ValueError for a z outside the range of f; nothing to check by default."""

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = self._map(x)
        return z, sum_event(self._log_derivative(x, z))

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        self._check_range(z)
        return self._inverse_map(z)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self._inverse(z, context)
        return x, sum_event(self._log_derivative(x, z))


class Exp(_ElementwiseBijection):
    r"""The exponential, :math:`\mathbb R \to (0, \infty)`.

    .. math:: z = e^x, \qquad \mathrm{ldj} = \sum_d x_d

    Raises:
        ValueError: from ``inverse``, for z that is not positive.

    Cost: O(D) a row; forward and inverse alike.
    Source: elementary; as layers of flows, Papamakarios et al. 2021, arXiv 1912.02762, Sec. 3.

    >>> z, ldj = Exp()(torch.zeros(1, 2))
    >>> z, ldj
    (tensor([[1., 1.]]), tensor([0.]))
    """

    _map = staticmethod(torch.exp)
    _inverse_map = staticmethod(torch.log)

    def _log_derivative(self, x: Tensor, z: Tensor) -> Tensor:
        return x

    def _check_range(self, z: Tensor) -> None:
        require(z > 0, "values > 0", z)

    @classmethod
    def example(cls) -> Example:
        return Example(cls(), Logistic((2,)), HalfNormal((2,)))


class Log(_InverseOf):
    r"""The logarithm, :math:`(0, \infty) \to \mathbb R`.

    .. math:: z = \log x, \qquad \mathrm{ldj} = -\sum_d \log x_d

    Raises:
        ValueError: for x that is not positive.

    Cost: O(D) a row; forward and inverse alike.
    Source: elementary; as layers of flows, Papamakarios et al. 2021, arXiv 1912.02762, Sec. 3.

    >>> z, ldj = Log()(torch.full((1, 2), math.e))
    >>> z, ldj
    (tensor([[1., 1.]]), tensor([-2.]))
    """

    of = Exp

    @classmethod
    def example(cls) -> Example:
        wide = DiagonalNormal((2,), scale=1.5)

        def sample(n: int) -> tuple[Tensor, Tensor]:
            y = wide.sample(n)  # x is log-normal
            return y.exp(), wide.log_prob(y) - y.sum(1)

        return Example(cls(), sample, StandardNormal((2,)))


class Sigmoid(_ElementwiseBijection):
    r"""The logistic function, :math:`\mathbb R \to (0, 1)`.

    .. math:: z = \sigma(x), \qquad \mathrm{ldj} = \sum_d \log\sigma(x_d) + \log\sigma(-x_d)

    Beyond |x| of about 17 (float32) z rounds to 0 or 1 and the round trip ends there.

    Raises:
        ValueError: from ``inverse``, for z outside (0, 1).

    Cost: O(D) a row; forward and inverse alike.
    Source: elementary; as layers of flows, Papamakarios et al. 2021, arXiv 1912.02762, Sec. 3.

    >>> z, ldj = Sigmoid()(torch.zeros(1, 2))
    >>> z, ldj
    (tensor([[0.5000, 0.5000]]), tensor([-2.7726]))
    """

    _map = staticmethod(torch.sigmoid)

    def _inverse_map(self, z: Tensor) -> Tensor:
        return torch.log(z) - torch.log1p(-z)

    def _log_derivative(self, x: Tensor, z: Tensor) -> Tensor:
        return F.logsigmoid(x) + F.logsigmoid(-x)

    def _check_range(self, z: Tensor) -> None:
        require((z > 0) & (z < 1), "values in (0, 1)", z)

    @classmethod
    def example(cls) -> Example:
        return Example(cls(), Logistic((2,)), Uniform((2,)))


class Logit(_InverseOf):
    r"""The inverse of the logistic function, :math:`(0, 1) \to \mathbb R`.

    .. math:: z = \log x - \log(1 - x), \qquad
              \mathrm{ldj} = -\sum_d \log x_d + \log(1 - x_d)

    Raises:
        ValueError: for x outside (0, 1); 0 and 1 themselves have no latent.

    Cost: O(D) a row; forward and inverse alike.
    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 4.1.

    >>> z, ldj = Logit()(torch.full((1, 2), 0.5))
    >>> z, ldj
    (tensor([[0., 0.]]), tensor([2.7726]))
    """

    of = Sigmoid

    @classmethod
    def example(cls) -> Example:
        return Example(cls(), Uniform((2,)), StandardNormal((2,)))


class Softplus(_ElementwiseBijection):
    r"""The softplus, :math:`\mathbb R \to (0, \infty)`.

    .. math:: z = \log(1 + e^x), \qquad \mathrm{ldj} = \sum_d \log\sigma(x_d)

    Raises:
        ValueError: from ``inverse``, for z that is not positive.

    Cost: O(D) a row; forward and inverse alike.
    Source: elementary; as layers of flows, Papamakarios et al. 2021, arXiv 1912.02762, Sec. 3.

    >>> z, ldj = Softplus()(torch.zeros(1, 2))
    >>> z, ldj
    (tensor([[0.6931, 0.6931]]), tensor([-1.3863]))
    """

    _map = staticmethod(F.softplus)

    def _inverse_map(self, z: Tensor) -> Tensor:
        return z + torch.log(-torch.expm1(-z))

    def _log_derivative(self, x: Tensor, z: Tensor) -> Tensor:
        return F.logsigmoid(x)

    def _check_range(self, z: Tensor) -> None:
        require(z > 0, "values > 0", z)

    @classmethod
    def example(cls) -> Example:
        return Example(cls(), Logistic((2,)), HalfNormal((2,)))


class SoftplusInverse(_InverseOf):
    r"""The inverse of the softplus, :math:`(0, \infty) \to \mathbb R`.

    .. math:: z = x + \log(1 - e^{-x}), \qquad \mathrm{ldj} = -\sum_d \log(1 - e^{-x_d})

    Raises:
        ValueError: for x that is not positive.

    Cost: O(D) a row; forward and inverse alike.
    Source: elementary; as layers of flows, Papamakarios et al. 2021, arXiv 1912.02762, Sec. 3.

    >>> z, ldj = SoftplusInverse()(torch.ones(1, 2))
    >>> z, ldj
    (tensor([[0.5413, 0.5413]]), tensor([0.9174]))
    """

    of = Softplus

    @classmethod
    def example(cls) -> Example:
        return Example(cls(), HalfNormal((2,), scale=2.0), StandardNormal((2,)))


class Tanh(_ElementwiseBijection):
    r"""The hyperbolic tangent, :math:`\mathbb R \to (-1, 1)`.

    .. math:: z = \tanh x, \qquad
              \mathrm{ldj} = \sum_d 2(\log 2 - x_d - \log(1 + e^{-2 x_d}))

    Beyond |x| of about 9 (float32) z rounds to ±1 and the round trip ends there.

    Raises:
        ValueError: from ``inverse``, for z outside (-1, 1).

    Cost: O(D) a row; forward and inverse alike.
    Source: elementary; as layers of flows, Papamakarios et al. 2021, arXiv 1912.02762, Sec. 3.

    >>> z, ldj = Tanh()(torch.zeros(1, 2))
    >>> z, ldj
    (tensor([[0., 0.]]), tensor([0.]))
    """

    _map = staticmethod(torch.tanh)
    _inverse_map = staticmethod(torch.atanh)

    def _log_derivative(self, x: Tensor, z: Tensor) -> Tensor:
        return 2 * (math.log(2) - x - F.softplus(-2 * x))

    def _check_range(self, z: Tensor) -> None:
        require(z.abs() < 1, "values in (-1, 1)", z)

    @classmethod
    def example(cls) -> Example:
        return Example(cls(), StandardNormal((2,)), Uniform((2,), -1.0, 1.0))


class LeakyReLU(_ElementwiseBijection):
    r"""The leaky rectifier.

    .. math:: z = \max(x, 0) + a \min(x, 0), \qquad
              \mathrm{ldj} = \log a \cdot \#\{d : x_d < 0\}

    Args:
        slope: a, positive.

    Raises:
        ValueError: for a slope that is not positive.

    Cost: O(D) a row; forward and inverse alike.
    Source: elementary; as layers of flows, Papamakarios et al. 2021, arXiv 1912.02762, Sec. 3.

    >>> z, ldj = LeakyReLU(0.5)(torch.tensor([[-1.0, 1.0]]))
    >>> z, ldj
    (tensor([[-0.5000,  1.0000]]), tensor([-0.6931]))
    """

    def __init__(self, slope: float = 0.01) -> None:
        super().__init__()
        require_positive("LeakyReLU", slope=slope)
        self.slope = slope

    def _map(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, self.slope * x)

    def _inverse_map(self, z: Tensor) -> Tensor:
        return torch.where(z >= 0, z, z / self.slope)

    def _log_derivative(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.where(x >= 0, torch.zeros_like(x), math.log(self.slope))

    @classmethod
    def example(cls) -> Example:
        return Example(cls(0.4), DiagonalNormal((2,), scale=2.5), StandardNormal((2,)))


class Elementwise(Bijection):
    r"""Each element through its own learned monotone map.

    .. math:: z_d = f(x_d; \theta_d), \qquad \mathrm{ldj} = \sum_d \log |f'(x_d; \theta_d)|

    Args:
        map: the map f, such as a spline.
        net: maps a context (B, ...) to parameters (B, C * P, ...), channels alternating over the
            P parameters; without it the parameters are free and start at zero.

    Raises:
        ValueError: for a wrong shape of x, or a missing context.

    Cost: one evaluation of the map an element, and one pass of the net if there is one; forward and
    inverse alike, unless the map's differ.
    Source: elementary; the maps are those of couplings, Papamakarios et al. 2021, arXiv
    1912.02762, Sec. 3.

    >>> layer = Elementwise(3, RationalQuadraticSpline(num_bins=8, bound=3.0))
    >>> tuple(layer.params.shape)  # K widths, K heights, K - 1 slopes
    (3, 23)
    """

    def __init__(
        self, event_shape: int | Sequence[int], map: ElementwiseMap, net: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        self.map, self.net = map, net
        if net is None:
            self.params = nn.Parameter(torch.zeros(*self.event_shape, map.num_params))

    conditional = property(lambda self: self.net is not None)

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.net is None:
            return self.params.expand(*x.shape, -1)
        expected = (x.shape[0], x.shape[1] * self.map.num_params, *x.shape[2:])
        out = output_of_context(self.net, context, expected).to(x.dtype)
        return out.unflatten(1, (self.event_shape[0], self.map.num_params)).movedim(2, -1)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, log_derivative = self.map.forward(x, self._params(x, context))
        return z, sum_event(log_derivative)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.map.inverse(z, self._params(z, context))

    @classmethod
    def example(cls) -> Example:
        transform = cls((3,), RationalQuadraticSpline(num_bins=5, bound=3.0))
        nn.init.normal_(transform.params, std=0.5)
        return Example(transform, DiagonalNormal((3,), scale=2.0), StandardNormal((3,)))
