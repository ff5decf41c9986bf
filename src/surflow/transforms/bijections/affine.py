"""Affine bijections, and the affine map that couplings and autoregressive layers use."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import InputError, require_one_of
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import as_shape, register_value, sum_event
from surflow.nets import MLP
from surflow.transforms.base import Bijection, Example
from surflow.transforms.maps import ElementwiseMap


def _log_softplus(s: Tensor) -> Tensor:
    # log(softplus(s)) -> s - exp(s)/2 for very negative s, where softplus underflows
    small = s < -15.0
    return torch.where(small, s, F.softplus(torch.where(small, 0.0, s)).log())


def _log_sigmoid_scale(s: Tensor) -> Tensor:
    # the floor keeps the inverse bounded; the shift starts the scale near one
    return torch.log(torch.sigmoid(s + 2.0) + 1e-3)


def _identity(s: Tensor) -> Tensor:
    return s


def _log_tanh_exp(s: Tensor) -> Tensor:
    return 2.0 * torch.tanh(s / 2.0)


LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": _identity,
    "softplus": _log_softplus,
    "sigmoid": _log_sigmoid_scale,
    "tanh_exp": _log_tanh_exp,
}


class AffineMap(ElementwiseMap):
    r"""The affine map with a positive scale.

    .. math:: z = g(s)\, x + t, \qquad \log |dz/dx| = \log g(s)

    with g one of exp: e^s; softplus: log(1 + e^s); sigmoid: σ(s + 2) + 10⁻³;
    tanh_exp: exp(2 tanh(s/2)).

    Args:
        scale: the name of g.

    Raises:
        ValueError: for an unknown name.

    Cost: O(1) an element; forward and inverse alike.
    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.2 (with g = exp).

    >>> z, ldj = AffineMap("softplus").forward(torch.ones(1), torch.zeros(1, 2))
    >>> z, ldj
    (tensor([0.6931]), tensor([-0.3665]))
    """

    num_params = 2
    exact_inverse = True

    def __init__(self, scale: str = "exp") -> None:
        require_one_of("AffineMap", LOG_SCALES, scale=scale)
        self.scale = scale
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        unconstrained, shift = params.unbind(-1)
        log_scale = self.log_scale(unconstrained)
        return x * torch.exp(log_scale) + shift, log_scale

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        unconstrained, shift = params.unbind(-1)
        return (z - shift) * torch.exp(-self.log_scale(unconstrained))

    def inverse_and_ldj(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(z, params), self.log_scale(params[..., 0])


class AdditiveMap(ElementwiseMap):
    r"""The shift.

    .. math:: z = x + t, \qquad \log |dz/dx| = 0

    Cost: O(1) an element; forward and inverse alike.
    Source: Dinh et al. 2015, arXiv 1410.8516, Sec. 3.2.

    >>> z, ldj = AdditiveMap().forward(torch.ones(1), torch.ones(1, 1))
    >>> z, ldj
    (tensor([2.]), tensor([0.]))
    """

    num_params = 1
    exact_inverse = True

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params[..., 0], torch.zeros_like(x)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return z - params[..., 0]

    def inverse_and_ldj(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(z, params), torch.zeros_like(z)


def net_output_fits(out: Tensor, batch: int, expected: tuple[int, ...]) -> bool:
    """Whether a net's output has the right batch and channels, and broadcasts over the rest."""
    return (
        out.dim() == 1 + len(expected)
        and tuple(out.shape[:2]) == (batch, expected[0])
        and all(s in (1, e) for s, e in zip(out.shape[2:], expected[1:], strict=True))
    )


class Affine(Bijection):
    r"""An elementwise affine bijection with fixed, learned or context-dependent parameters.

    .. math:: z = s \odot x + t, \qquad \mathrm{ldj} = \sum_d \log |s_d|

    Args:
        shift: t, broadcastable to the event.
        scale: s, not zero, broadcastable to the event; its sign is kept when it is learned.
        learn: whether t and log |s| are parameters.
        net: maps a context (B, ...) to (B, 2 C, ...), channels alternating log-scale, shift; it
            acts on top of ``shift`` and ``scale``.

    Raises:
        ValueError: for a zero scale, parameters that do not broadcast, or a wrong shape of x.

    Cost: O(D) a row, and one pass of the net if there is one; forward and inverse alike.
    Source: elementary; the map of Dinh et al. 2017, arXiv 1605.08803, Sec. 3.2.

    >>> layer = Affine(3, shift=1.0, scale=[2.0, 0.5, -1.0])
    >>> layer(torch.ones(1, 3))
    (tensor([[3.0000, 1.5000, 0.0000]]), tensor([0.]))
    """

    reversible = True

    def __init__(
        self,
        event_shape: int | Sequence[int],
        shift: float | Sequence[float] | Tensor = 0.0,
        scale: float | Sequence[float] | Tensor = 1.0,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        shift = torch.as_tensor(shift, dtype=torch.get_default_dtype())
        scale = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        if bool((scale == 0).any()):
            raise ValueError(f"Affine: expected a scale other than 0, got {scale.tolist()}")
        try:
            shift, scale = (t.expand(self.event_shape).clone() for t in (shift, scale))
        except RuntimeError:
            raise ValueError(
                f"Affine: expected shift and scale that broadcast to the event {self.event_shape}, "
                f"got shapes {tuple(shift.shape)} and {tuple(scale.shape)}"
            ) from None
        self.register_buffer("sign", scale.sign())
        register_value(self, "shift", shift, learn)
        register_value(self, "log_scale", scale.abs().log(), learn)
        self.net = net

    conditional = property(lambda self: self.net is not None)

    def _scale_and_shift(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.net is None:
            return self.log_scale, self.shift
        if context is None:
            raise InputError("expected a context, got none")
        out = self.net(context).to(self.shift.dtype)
        expected = (2 * self.event_shape[0], *self.event_shape[1:])
        if not net_output_fits(out, context.shape[0], expected):
            wanted = ", ".join(map(str, expected))
            raise InputError(
                f"expected the net to give shape (batch, {wanted}), got {tuple(out.shape)}"
            )
        extra = out.unflatten(1, (self.event_shape[0], 2))
        return self.log_scale + extra[:, :, 0], self.shift + extra[:, :, 1]

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(context)
        z = x * (self.sign * torch.exp(log_scale)) + shift
        return z, sum_event(log_scale.expand(x.shape))

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        log_scale, shift = self._scale_and_shift(context)
        return (z - shift) * (self.sign * torch.exp(-log_scale))

    @classmethod
    def example(cls) -> Example:
        transform = cls((3,), [0.5, 0.0, -1.0], [1.3, -0.6, 2.0], learn=True, net=MLP(2, 6, [8]))
        return Example(transform, DiagonalNormal((3,), scale=2.5), StandardNormal((3,)), context=2)
