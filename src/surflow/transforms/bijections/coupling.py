"""Coupling layers: one part of x sets the parameters of an elementwise map of the other."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surflow.checks import InputError, require_at_least
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import sum_event
from surflow.nets import MLP
from surflow.transforms.base import Bijection, Example, require_dim, require_output, run_net
from surflow.transforms.bijections.affine import AdditiveMap, AffineMap
from surflow.transforms.bijections.mixtures import LogisticMixtureMap
from surflow.transforms.bijections.splines import RationalQuadraticSpline
from surflow.transforms.maps import ElementwiseMap

SPLITS = ("half", "alternate")


class Coupling(Bijection):
    r"""A coupling with any elementwise map.

    .. math:: z_1 = x_1, \quad z_2 = f(x_2;\, \theta(x_1, c)), \qquad
              \mathrm{ldj} = \sum_d \log |f'(x_{2,d})|

    x is split in one of two ways. A split along a dimension, by default 1: the net sees the first
    part, (B, C1, ...), and gives (B, C2 * P, ...), channels alternating over the P parameters of an
    element. A mask: the net sees the whole of x with the transformed places at zero, and gives (B,
    C * P, ...).

    Args:
        map: the elementwise map f.
        net: a module; it is called with the context as second argument if its attribute
            ``context_features`` is positive.
        split: "half" (the first floor(C/2) channels condition), "alternate" (the even ones), or
            an int, the number of conditioning channels at the front.
        swap: exchange the roles of the two parts.
        mask: boolean, broadcastable to the event; True conditions, False is transformed. It
            replaces ``split``.
        dim: the dimension of the channels, 1 or more.

    Raises:
        ValueError: for an unknown split, a split that leaves a part empty, a mask that does not
            fit, a dimension that x does not have, or a net whose output has a wrong shape.

    Cost: one pass of the net and one evaluation of the map an element; forward and inverse alike,
    unless the map's differ.
    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.2; with splines Durkan et al. 2019.

    >>> layer = Coupling(AffineMap("softplus"), MLP(2, 4, [64]), split="alternate")
    >>> layer.kind
    'bijective'
    """

    def __init__(
        self,
        map: ElementwiseMap,
        net: nn.Module,
        split: str | int = "half",
        swap: bool = False,
        mask: Tensor | None = None,
        dim: int = 1,
    ) -> None:
        super().__init__()
        require_at_least(type(self).__name__, 1, dim=dim)
        if split not in SPLITS and not (isinstance(split, int) and split > 0):
            raise ValueError(
                f"{type(self).__name__}: expected split to be one of {', '.join(SPLITS)} or a "
                f"positive int, got {split!r}"
            )
        self.map, self.net, self.split, self.swap, self.dim = map, net, split, swap, dim
        if mask is not None:
            mask = torch.as_tensor(mask, dtype=torch.bool)
            mask = ~mask if swap else mask
        self.register_buffer("mask", mask)

    reversible = property(lambda self: self.map.exact_inverse)

    heavy_nets = property(lambda self: (self.net,))

    # Splitting x and joining it ---------------------------------------------------------

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        require_dim(x, self.dim)
        dim, channels = self.dim, x.shape[self.dim]
        if self.split == "alternate":
            before = (slice(None),) * dim
            first, second = (x[(*before, slice(start, None, 2))] for start in (0, 1))
        else:
            size = min(channels // 2 if self.split == "half" else self.split, channels)
            first, second = x.split([size, channels - size], dim)
        if first.shape[dim] == 0 or second.shape[dim] == 0:
            raise InputError(
                f"expected channels that split {self.split!r} parts in two, "
                f"got shape {tuple(x.shape)}"
            )
        return (second, first) if self.swap else (first, second)

    def _merge(self, x: Tensor, conditioning: Tensor, changed: Tensor) -> Tensor:
        first, second = (changed, conditioning) if self.swap else (conditioning, changed)
        if self.split != "alternate":
            return torch.cat([first, second], dim=self.dim)
        return torch.slice_scatter(x, changed, dim=self.dim, start=0 if self.swap else 1, step=2)

    def _join(self, like: Tensor, conditioning: Tensor, changed: Tensor) -> Tensor:
        """The same without x: the result has the memory format of ``like``."""
        if self.split == "alternate":
            like = torch.empty_like(like, dtype=conditioning.dtype)
            start = 1 if self.swap else 0
            like = torch.slice_scatter(like, conditioning, dim=self.dim, start=start, step=2)
        return self._merge(like, conditioning, changed)

    def _params(self, seen: Tensor, like: Tensor, context: Tensor | None) -> Tensor:
        count, dim = self.map.num_params, self.dim
        expected = (*like.shape[:dim], like.shape[dim] * count, *like.shape[dim + 1 :])
        out = require_output(run_net(self.net, seen, context), expected)
        return out.to(like.dtype).unflatten(dim, (like.shape[dim], count)).movedim(dim + 1, -1)

    def _mask_for(self, x: Tensor) -> Tensor:
        require_dim(x, self.dim)
        try:
            return self.mask.expand(x.shape[1:])
        except RuntimeError:
            raise InputError(
                f"expected a mask that broadcasts to {tuple(x.shape[1:])}, "
                f"got {tuple(self.mask.shape)}"
            ) from None

    # Both directions ---------------------------------------------------------------------------

    def _apply_map(
        self,
        x: Tensor,
        context: Tensor | None,
        function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        if self.mask is not None:
            mask = self._mask_for(x)
            params = self._params(torch.where(mask, x, 0.0), x, context)
            changed, log_derivative = function(x, params)
            ldj = sum_event(torch.where(mask, 0.0, log_derivative))
            return torch.where(mask, x, changed), ldj
        conditioning, second = self._parts(x)
        params = self._params(conditioning, second, context)
        changed, log_derivative = function(second, params)
        return self._merge(x, conditioning, changed), sum_event(log_derivative)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._apply_map(x, context, self.map.forward)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        def inverse(value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
            x = self.map.inverse(value, params)
            return x, x

        return self._apply_map(z, context, inverse)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._apply_map(z, context, self.map.inverse_and_ldj)

    def retrace(
        self, value: Tensor, context: Tensor | None, turned: bool
    ) -> tuple[tuple[Tensor, Tensor], Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
        """See :class:`Transform`; one pass of the net serves the inverse and the graph, since the
        part that conditions is the same in input and output."""
        function = self.map.inverse_and_ldj if turned else self.map.forward
        if self.mask is not None:
            mask = self._mask_for(value)
            kept = torch.where(mask, value, 0.0).detach().requires_grad_()
            params = self._params(kept, value, context)
            moved = torch.where(mask, 0.0, self._undo(value, params, turned)).requires_grad_()
            whole = torch.where(mask, kept, moved)
            changed, log_derivative = function(whole, params)
            changed = torch.where(mask, whole, changed)
            ldj = sum_event(torch.where(mask, 0.0, log_derivative))
            return (kept, moved), lambda a, b: torch.where(mask, a, b), changed, ldj
        kept, changed = self._parts(value)
        kept = kept.detach().requires_grad_()
        params = self._params(kept, changed, context)
        moved = self._undo(changed, params, turned).requires_grad_()
        changed, log_derivative = function(moved, params)
        joined = self._join(value, kept, changed)
        return (kept, moved), partial(self._join, value), joined, sum_event(log_derivative)

    @torch.no_grad()
    def _undo(self, value: Tensor, params: Tensor, turned: bool) -> Tensor:
        """What the map took to ``value``."""
        if turned:
            return self.map.forward(value, params)[0]
        return self.map.inverse(value, params)

    @classmethod
    def example(cls) -> Example:
        net = MLP(2, 2 * 14, [16], "tanh", context_features=1)
        return _example(
            cls(RationalQuadraticSpline(5, bound=3.0), net, split="alternate", swap=True), context=1
        )


class AffineCoupling(Coupling):
    r"""The affine coupling of Real NVP.

    .. math:: z_2 = g(s(x_1)) \odot x_2 + t(x_1), \qquad \mathrm{ldj} = \sum_d \log g(s_d)

    Args:
        net: gives s and t, channels alternating.
        scale: g: exp, softplus, sigmoid or tanh_exp; see :class:`AffineMap`.
        split, swap, mask, dim: see :class:`Coupling`.

    Cost: one pass of the net and O(D) a row; forward and inverse alike.
    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.2.

    >>> layer = AffineCoupling(MLP(2, 4, [64]), scale="tanh_exp")
    >>> x = torch.ones(1, 4)
    >>> bool(torch.allclose(layer.inverse(layer(x)[0]), x))
    True
    """

    def __init__(self, net: nn.Module, scale: str = "exp", **parts: Any) -> None:
        super().__init__(AffineMap(scale), net, **parts)

    @classmethod
    def example(cls) -> Example:
        return _example(cls(MLP(2, 4, [16], "tanh"), scale="softplus"))


class AdditiveCoupling(Coupling):
    r"""The additive coupling of NICE.

    .. math:: z_2 = x_2 + t(x_1), \qquad \mathrm{ldj} = 0

    Args:
        net: gives t.
        split, swap, mask, dim: see :class:`Coupling`.

    Cost: one pass of the net and O(D) a row; forward and inverse alike.
    Source: Dinh et al. 2015, arXiv 1410.8516, Sec. 3.2.

    >>> layer = AdditiveCoupling(MLP(2, 2, [64]), swap=True)
    >>> layer(torch.ones(1, 4))[1]
    tensor([0.])
    """

    def __init__(self, net: nn.Module, **parts: Any) -> None:
        super().__init__(AdditiveMap(), net, **parts)

    @classmethod
    def example(cls) -> Example:
        mask = torch.tensor([True, False, True, False])
        return _example(cls(MLP(4, 4, [16], "tanh"), mask=mask))


class RationalQuadraticSplineCoupling(Coupling):
    r"""The coupling with a monotone rational-quadratic spline.

    .. math:: z_2 = \mathrm{RQS}(x_2;\ \theta(x_1)), \qquad
              \mathrm{ldj} = \sum_d \log \mathrm{RQS}'(x_{2,d})

    Args:
        net: gives 3 K - 1 parameters an element with tails (``bound``), 3 K + 1 without.
        num_bins, bound, min_bin, min_slope: see :class:`RationalQuadraticSpline`.
        split, swap, mask, dim: see :class:`Coupling`.

    Cost: one pass of the net and O(K) an element, K the number of bins; forward and inverse alike.
    Source: Durkan et al. 2019, arXiv 1906.04032.

    >>> layer = RationalQuadraticSplineCoupling(MLP(2, 2 * 23, [64]), num_bins=8, bound=3.0)
    >>> x = torch.tensor([[0.1, 0.2, 0.3, 7.0]])
    >>> bool((layer(x)[0][:, 3] == 7.0).all())  # beyond the bound: as it is
    True
    """

    def __init__(
        self,
        net: nn.Module,
        num_bins: int = 8,
        bound: float | Sequence[float] | None = 3.0,
        min_bin: float = 1e-3,
        min_slope: float = 1e-3,
        **parts: Any,
    ) -> None:
        spline = RationalQuadraticSpline(num_bins, bound, min_bin, min_slope)
        super().__init__(spline, net, **parts)

    @classmethod
    def example(cls) -> Example:
        return _example(cls(MLP(2, 2 * 17, [16], "tanh"), num_bins=6))


class LogisticMixtureCoupling(Coupling):
    r"""The coupling with the distribution function of a logistic mixture.

    .. math:: z_2 = e^{a}\,\mathrm{logit}(F(x_2;\ \theta(x_1))) + b

    Args:
        net: gives 3 K + 2 parameters an element; see :class:`LogisticMixtureMap`.
        num_components: K.
        split, swap, mask, dim: see :class:`Coupling`.

    Cost: one pass of the net and O(K) an element; the inverse is a bisection, some tens of
    evaluations of the map.
    Source: Ho et al. 2019 (Flow++), arXiv 1902.00275, Sec. 3.2.

    >>> layer = LogisticMixtureCoupling(MLP(2, 2 * 14, [64]), num_components=4)
    >>> layer.map.num_params
    14
    """

    def __init__(self, net: nn.Module, num_components: int = 8, **parts: Any) -> None:
        super().__init__(LogisticMixtureMap(num_components), net, **parts)

    @classmethod
    def example(cls) -> Example:
        return _example(cls(MLP(2, 2 * 11, [16], "tanh"), num_components=3))


def _example(transform: Coupling, context: int | None = None) -> Example:
    """Four dimensions, wide normal inputs, a standard normal base."""
    wide = DiagonalNormal((4,), scale=1.5)
    return Example(transform, wide, StandardNormal((4,)), context=context)
