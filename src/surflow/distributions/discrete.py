"""Discrete distributions: categorical and Bernoulli; fixed, learned or from a context."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import InputError, require, require_at_least, require_fraction
from surflow.distributions.base import (
    Distribution,
    draw_index,
    expand_to,
    register_value,
    sum_event,
)


class Bernoulli(Distribution):
    r"""Independent Bernoullis over {0, 1}.

    .. math:: \log p(x) = \sum_d x_d \log\pi_d + (1 - x_d)\log(1 - \pi_d)

    ``log_prob`` takes real-valued x in [0, 1] too (the cross-entropy of a grey value).

    Args:
        probability: P(x = 1), broadcastable to the event.
        learn: whether the logits are a parameter.
        net: maps a context to logits, (B, *event).

    Raises:
        ValueError: for a probability outside (0, 1); from ``log_prob``, for x outside [0, 1].
    """

    discrete = True
    has_mean = True

    def __init__(
        self,
        event_shape: int | Sequence[int],
        probability: float | Sequence[float] | Tensor = 0.5,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, net)
        if net is not None:
            return
        p = torch.as_tensor(probability, dtype=torch.get_default_dtype())
        require_fraction("Bernoulli", probability=p)
        logits = expand_to(torch.logit(p), self.event_shape, "Bernoulli: probability").clone()
        register_value(self, "logits", logits, learn)

    def logits_of(self, context: Tensor | None) -> Tensor:
        """The logits of P(x = 1), broadcastable to (B, *event)."""
        return self._net_parameters(context, 1)[0] if self.conditional else self.logits

    def mean(self, context: Tensor | None = None) -> Tensor:
        return torch.sigmoid(self.logits_of(context))

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        logits = self.logits_of(context)
        x = x.to(logits.dtype)
        require((x >= 0) & (x <= 1), "values in [0, 1]", x)
        return sum_event(x * logits + F.logsigmoid(-logits))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        p = torch.sigmoid(self.logits_of(context) / temperature)
        return torch.bernoulli(p.expand(n, *self.event_shape))


class Categorical(Distribution):
    r"""Independent categoricals over {0, ..., K - 1}.

    .. math:: \log p(x) = \sum_d \log \mathrm{softmax}(\ell_d)_{x_d}

    Args:
        num_classes: K.
        logits: (K,) or (*event, K); zeros if left out.
        learn: whether the logits are a parameter.
        net: maps a context to (B, C * K, ...), channels alternating over classes.

    Raises:
        ValueError: for K < 1, logits of a wrong shape, or (from ``log_prob``) a class outside
            0 ... K - 1 or a tensor that is not of integers.
    """

    discrete = True
    integer = True
    has_mean = True

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_classes: int,
        logits: Sequence[float] | Tensor | None = None,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(event_shape, net)
        require_at_least("Categorical", 1, num_classes=num_classes)
        self.num_classes = num_classes
        if net is not None:
            return
        shape = (*self.event_shape, num_classes)
        value = torch.zeros(shape) if logits is None else torch.as_tensor(logits)
        if value.shape[-1] != num_classes:
            raise ValueError(
                f"Categorical: expected logits over {num_classes} classes, "
                f"got shape {tuple(value.shape)}"
            )
        value = expand_to(value, shape, "Categorical: logits").clone()
        register_value(self, "logits", value, learn)

    def log_probabilities(self, context: Tensor | None) -> Tensor:
        """Normalised log-probabilities, broadcastable to (B, *event, K)."""
        if self.conditional:
            logits = torch.stack(self._net_parameters(context, self.num_classes), dim=-1)
        else:
            logits = self.logits
        return F.log_softmax(logits, dim=-1)

    def mean(self, context: Tensor | None = None) -> Tensor:
        p = self.log_probabilities(context).exp()
        return p @ torch.arange(self.num_classes, device=p.device, dtype=p.dtype)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        if x.is_floating_point():
            raise InputError(f"expected an integer tensor, got {x.dtype}")
        inside = (x >= 0) & (x < self.num_classes)
        require(inside, f"classes 0 to {self.num_classes - 1}", x)
        table = self.log_probabilities(context).expand(*x.shape, self.num_classes)
        return sum_event(table.gather(-1, x.long().unsqueeze(-1)).squeeze(-1))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        logits = self.log_probabilities(context) / temperature
        p = logits.softmax(-1).expand(n, *self.event_shape, self.num_classes)
        return draw_index(p.contiguous()).squeeze(-1)
