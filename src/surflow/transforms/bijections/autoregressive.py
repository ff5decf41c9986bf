"""Masked autoregressive layers with any elementwise map."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import sum_event
from surflow.nets.made import MADE
from surflow.transforms.base import Bijection, Example, run_net
from surflow.transforms.bijections.affine import AffineMap
from surflow.transforms.bijections.mixtures import LogisticMixtureMap
from surflow.transforms.bijections.splines import RationalQuadraticSpline
from surflow.transforms.maps import ElementwiseMap


class Autoregressive(Bijection):
    r"""An autoregressive bijection with any elementwise map.

    .. math:: z_d = f(x_d;\, \theta_d(x_{<d}, c)), \qquad
              \mathrm{ldj} = \sum_d \log |f'(x_d)|

    :math:`x_{<d}` are the features before d in the net's order. As it stands it is the layer of a
    masked autoregressive flow (MAF): the density takes one pass of the net, a sample D steps.
    ``Inverse(Autoregressive(...))`` is the layer of an inverse autoregressive flow (IAF): one pass
    for a sample, D steps for a density. The steps are a loop over the features, unrolled when
    compiled, so the compile time grows with D.

    Args:
        map: the elementwise map f.
        net: a :class:`MADE` with ``params_per_feature = map.num_params``; x is (B, D) with its
            ``features``, and the context (B, C) with its ``context_features``.

    Raises:
        ValueError: for a net with another number of parameters a feature; for x of another shape
            or a missing context.

    Cost: forward one pass of the net; inverse D steps with the arithmetic of one pass together.
    Source: Papamakarios et al. 2017, arXiv 1705.07057, Sec. 3; Kingma et al. 2016, 1606.04934.

    >>> Autoregressive(AffineMap("softplus"), MADE(3, 2, [16])).inverse(torch.ones(5, 3)).shape
    torch.Size([5, 3])
    """

    def __init__(self, map: ElementwiseMap, net: MADE) -> None:
        super().__init__()
        if net.params_per_feature != map.num_params:
            raise ValueError(
                f"{type(self).__name__}: expected a net with {map.num_params} parameters a "
                f"feature, got {net.params_per_feature}"
            )
        self.map, self.net = map, net
        self.event_shape = (net.features,)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        out = run_net(self.net, x, context).to(x.dtype)
        z, log_derivative = self.map.forward(x, out.unflatten(1, (-1, self.map.num_params)))
        return z, sum_event(log_derivative)

    def _feature_by_feature(
        self, z: Tensor, context: Tensor | None, solve: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        def unmasked(z: Tensor, context: Tensor | None = None) -> Tensor:
            columns = z.unbind(1)
            return self.net.sequential(lambda d, p: solve(columns[d], p.to(z.dtype)), z, context)

        unmasked.context_features = self.net.context_features  # for the check of the context
        return run_net(unmasked, z, context)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._feature_by_feature(z, context, self.map.inverse)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_derivatives = []

        def solve(value: Tensor, params: Tensor) -> Tensor:
            x, log_derivative = self.map.inverse_and_ldj(value, params)
            log_derivatives.append(log_derivative)
            return x

        x = self._feature_by_feature(z, context, solve)
        return x, sum_event(torch.stack(log_derivatives, dim=1))

    @classmethod
    def example(cls) -> Example:
        net = MADE(3, 14, [12, 12], "tanh", context_features=2, ordering=[1, 2, 0], residual=True)
        spline = RationalQuadraticSpline(5, bound=2.0)
        return _example(cls(spline, net), context=2)


class MaskedAffineAutoregressive(Autoregressive):
    r"""The affine autoregressive layer, of a masked autoregressive flow (MAF).

    .. math:: z_d = g(s_d(x_{<d}))\, x_d + t_d(x_{<d}), \qquad \mathrm{ldj} = \sum_d \log g(s_d)

    Exact. Its :class:`Inverse` is the layer of an inverse autoregressive flow (IAF).

    Args:
        features: D; x is (B, D).
        scale: g: exp, softplus, sigmoid or tanh_exp; see :class:`AffineMap`.
        made: further arguments of the :class:`MADE` that gives s and t.

    Raises:
        ValueError: for an unknown scale, or arguments that :class:`MADE` refuses.

    Cost: forward one pass of the net; inverse D steps with the arithmetic of one pass together.
    Source: Papamakarios et al. 2017, arXiv 1705.07057, Sec. 3.1.

    >>> MaskedAffineAutoregressive(2, hidden_features=[8])(torch.zeros(5, 2))[0].shape
    torch.Size([5, 2])
    """

    def __init__(self, features: int, scale: str = "exp", **made: Any) -> None:
        affine = AffineMap(scale)
        super().__init__(affine, MADE(features, affine.num_params, **made))

    @classmethod
    def example(cls) -> Example:
        return _example(cls(3, "softplus", hidden_features=[12, 12], activation="tanh"))


class MaskedSplineAutoregressive(Autoregressive):
    r"""The autoregressive layer with a monotone rational-quadratic spline.

    .. math:: z_d = \mathrm{RQS}(x_d;\, \theta_d(x_{<d})), \qquad
              \mathrm{ldj} = \sum_d \log \mathrm{RQS}'(x_d)

    Args:
        features: D; x is (B, D).
        num_bins, bound, min_bin, min_slope: see :class:`RationalQuadraticSpline`.
        made: further arguments of the :class:`MADE`; see :class:`MaskedAffineAutoregressive`.

    Raises:
        ValueError: for arguments that the spline or :class:`MADE` refuse; without tails
            (``bound=None``), for values outside [0, 1].

    Cost: forward one pass of the net; inverse D steps with the arithmetic of one pass together.
    Source: Durkan et al. 2019, arXiv 1906.04032, Sec. 3.2.

    >>> MaskedSplineAutoregressive(2, num_bins=4, hidden_features=[8])(torch.zeros(5, 2))[1].shape
    torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        num_bins: int = 8,
        bound: float | Sequence[float] | None = 3.0,
        min_bin: float = 1e-3,
        min_slope: float = 1e-3,
        **made: Any,
    ) -> None:
        spline = RationalQuadraticSpline(num_bins, bound, min_bin, min_slope)
        super().__init__(spline, MADE(features, spline.num_params, **made))

    @classmethod
    def example(cls) -> Example:
        return _example(cls(3, 4, hidden_features=[12], activation="tanh", ordering="reversed"))


class MaskedLogisticMixtureAutoregressive(Autoregressive):
    r"""The autoregressive layer with the distribution function of a logistic mixture.

    .. math:: z_d = e^{a_d}\,\mathrm{logit}(F(x_d;\, \theta_d(x_{<d}))) + b_d

    Exact; its log-derivative is that of :class:`LogisticMixtureMap`.

    Args:
        features: D; x is (B, D).
        num_components: K.
        made: further arguments of the :class:`MADE`; see :class:`MaskedAffineAutoregressive`.

    Raises:
        ValueError: for K < 1, or arguments that :class:`MADE` refuses.

    Cost: forward one pass of the net; inverse D steps, each with 32 bisections (64 in float64).
    Source: Ho et al. 2019 (Flow++), arXiv 1902.00275, Sec. 3.2; parameters as in 1705.07057.

    >>> MaskedLogisticMixtureAutoregressive(2, 4, hidden_features=[8])(torch.zeros(5, 2))[1].shape
    torch.Size([5])
    """

    def __init__(self, features: int, num_components: int = 8, **made: Any) -> None:
        mixture = LogisticMixtureMap(num_components)
        super().__init__(mixture, MADE(features, mixture.num_params, **made))

    @classmethod
    def example(cls) -> Example:
        return _example(cls(2, 3, hidden_features=[12], activation="tanh", ordering="reversed"))


def _example(transform: Autoregressive, context: int | None = None) -> Example:
    """Wide normal inputs, a standard normal base."""
    shape = transform.event_shape
    return Example(transform, DiagonalNormal(shape, scale=1.8), StandardNormal(shape), context)
