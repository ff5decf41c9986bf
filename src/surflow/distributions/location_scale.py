"""Location-scale families: normal, half-normal, logistic; fixed, learned or from a context."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_positive
from surflow.distributions.base import Distribution, as_shape, register_value, sum_event
from surflow.latents import Tape

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class LocationScale(Distribution):
    r"""A family x = loc + exp(log_scale) * eps with eps from a standard density.

    .. math:: \log p(x) = \sum_d \log s((x_d - \mu_d) e^{-\lambda_d}) - \lambda_d

    Args:
        loc: location, broadcastable to the event.
        scale: positive scale, broadcastable to the event.
        learn: whether loc and log_scale are parameters.
        parameter_shape: the shape of the parameters, broadcastable to the event; (C, 1, 1) gives
            one location and scale a channel. Default: the event shape.
        net: maps a context to (B, 2 C, ...), channels alternating loc, log_scale.

    Raises:
        ValueError: for a scale that is not positive, or parameters that do not broadcast.
    """

    learns_loc = True  # whether ``learn`` includes the location

    def __init__(
        self,
        event_shape: int | Sequence[int],
        loc: float | Sequence[float] | Tensor = 0.0,
        scale: float | Sequence[float] | Tensor = 1.0,
        learn: bool = False,
        parameter_shape: Sequence[int] | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, net)
        if net is not None:
            return
        shape = self.event_shape if parameter_shape is None else as_shape(parameter_shape)
        loc = torch.as_tensor(loc, dtype=torch.get_default_dtype())
        scale = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        require_positive(type(self).__name__, scale=scale)
        try:
            torch.broadcast_shapes(shape, self.event_shape)
            loc, log_scale = (t.expand(shape).clone() for t in (loc, scale.log()))
        except RuntimeError:
            raise ValueError(
                f"{type(self).__name__}: loc {tuple(loc.shape)}, scale {tuple(scale.shape)} and "
                f"parameters {tuple(shape)} must broadcast to the event {self.event_shape}"
            ) from None
        register_value(self, "loc", loc, learn and self.learns_loc)
        register_value(self, "log_scale", log_scale, learn)

    def parameters_of(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """loc and log_scale, each broadcastable to (B, *event)."""
        return self._net_parameters(context, 2) if self.conditional else (self.loc, self.log_scale)

    def write(self, x: Tensor, context: Tensor | None, tape: Tape) -> None:
        loc, log_scale = self.parameters_of(context)
        tape.write((x - loc) * torch.exp(-log_scale), self.normal)

    def read(self, context: Tensor | None, tape: Tape) -> Tensor:
        loc, log_scale = self.parameters_of(context)
        return loc + torch.exp(log_scale) * tape.read()

    def _standard_log_prob(self, eps: Tensor) -> Tensor:
        raise NotImplementedError

    def _standard_sample(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        raise NotImplementedError

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        loc, log_scale = self.parameters_of(context)
        eps = (x - loc) * torch.exp(-log_scale)
        return sum_event(self._standard_log_prob(eps) - log_scale)

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        loc, log_scale = self.parameters_of(context)
        eps = self._standard_sample((n, *self.event_shape), loc)
        return loc + torch.exp(log_scale) * temperature * eps


class DiagonalNormal(LocationScale):
    r"""Independent normals, fixed, learned or conditional.

    .. math:: \log p(x) = \sum_d -\tfrac12 ((x_d - \mu_d)/\sigma_d)^2 - \log \sigma_d
              - \tfrac12 \log 2\pi

    Arguments, shapes and errors: see :class:`LocationScale`.
    """

    normal = True
    has_mean = True

    def mean(self, context: Tensor | None = None) -> Tensor:
        return self.parameters_of(context)[0]

    def pairwise(self, contexts: Tensor) -> Callable[[Tensor], Tensor]:
        """See :class:`Distribution`; the net sees each context once."""
        loc, log_scale = self.parameters_of(contexts)
        loc, log_scale = loc.flatten(1), log_scale.expand_as(loc).flatten(1)
        constant = -(log_scale + HALF_LOG_TWO_PI).sum(1)
        precision = torch.exp(-log_scale)

        def log_prob(x: Tensor) -> Tensor:
            total = constant.expand(len(x), -1).clone()
            for d, column in enumerate(x.flatten(1).unbind(1)):  # over dimensions of the data
                total -= 0.5 * ((column.unsqueeze(1) - loc[:, d]) * precision[:, d]).square()
            return total

        return log_prob

    def _standard_log_prob(self, eps: Tensor) -> Tensor:
        return -0.5 * eps.square() - HALF_LOG_TWO_PI

    def _standard_sample(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.randn(shape, device=like.device, dtype=like.dtype)

    def _sample_and_log_prob(
        self, n: int | None, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        if not self.conditional:
            return super()._sample_and_log_prob(n, context, num_samples)
        n, context = self._rows(n, context, num_samples)
        loc, log_scale = self.parameters_of(context)  # one pass of the net
        eps = self._standard_sample((n, *self.event_shape), loc)
        log_prob = sum_event(self._standard_log_prob(eps) - log_scale)
        return loc + torch.exp(log_scale) * eps, log_prob


class StandardNormal(DiagonalNormal):
    r"""The standard normal, :math:`\mathcal N(0, I)`."""

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape, parameter_shape=[1] * len(as_shape(event_shape)))


class HalfNormal(LocationScale):
    r"""Independent half-normals on :math:`x \ge 0`; loc shifts the edge of the support.

    .. math:: \log p(x) = \sum_d \log 2 + \log \mathcal N(x_d; \mu_d, \sigma_d^2),
              \quad x_d \ge \mu_d

    With ``learn`` or a net, loc is learned too, and data below it score -inf. Where the edge must
    stay, take :class:`TruncatedNormal` with ``low=0, learn_loc=False``, or :class:`Exponential`.

    Arguments, shapes and errors: see :class:`LocationScale`.
    """

    def _standard_log_prob(self, eps: Tensor) -> Tensor:
        inside = math.log(2) - 0.5 * eps.square() - HALF_LOG_TWO_PI
        return torch.where(eps >= 0, inside, -math.inf)

    def _standard_sample(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.randn(shape, device=like.device, dtype=like.dtype).abs()


class Logistic(LocationScale):
    r"""Independent logistics.

    .. math:: \log p(x) = \sum_d \log\sigma(e_d) + \log\sigma(-e_d) - \log s_d,
              \quad e_d = (x_d - \mu_d)/s_d

    Arguments, shapes and errors: see :class:`LocationScale`.
    """

    def _standard_log_prob(self, eps: Tensor) -> Tensor:
        return F.logsigmoid(eps) + F.logsigmoid(-eps)

    def _standard_sample(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        u = torch.rand(shape, device=like.device, dtype=like.dtype)
        tiny = torch.finfo(like.dtype).eps / 2
        return torch.logit(u.clamp(tiny, 1 - tiny))
