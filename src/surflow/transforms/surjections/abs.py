"""The absolute-value surjection, in both directions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require, require_fraction
from surflow.distributions import DiagonalNormal, HalfNormal, StandardNormal
from surflow.distributions.base import as_shape, register_value, sum_event
from surflow.nets import MLP
from surflow.score_function import record_score
from surflow.transforms.base import Box, Example, Surjection, Tail, net_output
from surflow.transforms.inverse import _InverseOf


class AbsInference(Surjection):
    r"""The inference surjection z = |x|, with a distribution of the sign to undo it.

    .. math:: z_d = |x_d|, \quad x_d = s_d z_d,\ s_d \sim \mathrm{sign}(\pi_d(z)), \qquad
              V = \sum_d \log p(s_d \mid z)

    Exact. With :math:`\pi = 1/2` the model is symmetric in every
    folded coordinate; with a learned :math:`\pi(z)` it can be anti-symmetric.

    Args:
        element: the coordinate along dimension 1 to fold, or several; None folds all. The others
            are unchanged.
        probability: P(x_d >= 0), in (0, 1), for every folded coordinate.
        learn: whether its logit is a parameter.
        net: maps z (and the context, if it has ``context_features``) to the logits of
            P(x_d >= 0), (B, C_folded, ...); replaces ``probability``.

    Raises:
        ValueError: for a probability outside (0, 1), an unknown element, a net whose
            output has a wrong shape, or, from ``inverse``, a negative z.

    Cost: O(D) a row, and one pass of the net if there is one; forward and inverse alike.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Tables 6, 7.

    >>> layer = AbsInference(2, probability=0.5)
    >>> z, ldj = layer(torch.tensor([[-1.0, 2.0]]))
    >>> z, ldj  # log 1/2 for each sign
    (tensor([[1., 2.]]), tensor([-1.3863]))
    """

    constraint = "the latents are >= 0"

    def __init__(
        self,
        event_shape: int | Sequence[int],
        element: int | Sequence[int] | None = None,
        probability: float = 0.5,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        channels = self.event_shape[0]
        element = range(channels) if element is None else element
        elements = [element] if isinstance(element, int) else list(element)
        if not elements or any(not 0 <= e < channels for e in elements):
            raise ValueError(
                f"{type(self).__name__}: expected elements in 0 to {channels - 1}, got {elements}"
            )
        require_fraction(type(self).__name__, probability=probability)
        self.element = tuple(sorted(set(elements)))
        self.folds_all = len(self.element) == channels
        folded = torch.zeros(channels, dtype=torch.bool)
        folded[list(self.element)] = True
        folded = folded.view(-1, *[1] * (len(self.event_shape) - 1))
        self.register_buffer("folded", folded, persistent=False)
        self.register_buffer("index", torch.tensor(self.element), persistent=False)
        self.net = net
        if net is None:
            shape = (len(self.element), *self.event_shape[1:])
            logit = torch.full(shape, probability, dtype=torch.float64).logit()
            register_value(self, "logit", logit.to(torch.get_default_dtype()), learn)

    def _logits(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Logits of P(x >= 0) at the folded coordinates, (B, C_folded, ...)."""
        if self.net is None:
            return self.logit.expand(z.shape[0], *self.logit.shape)
        expected = (z.shape[0], len(self.element), *z.shape[2:])
        return net_output(self.net, z, context, expected)

    @staticmethod
    def _score(positive: Tensor, logits: Tensor) -> Tensor:
        return sum_event(F.logsigmoid(torch.where(positive, logits, -logits)))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        chosen = x if self.folds_all else x.index_select(1, self.index)
        z = x.abs() if self.folds_all else torch.where(self.folded, x.abs(), x)
        return z, self._score(chosen >= 0, self._logits(z, context))

    def _draw(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A signed x for z; whether each folded sign is positive; the logits it came from."""
        require((z >= 0) | ~self.folded, "values >= 0 at the folded coordinates", z)
        logits = self._logits(z, context)
        positive = torch.rand_like(logits) < torch.sigmoid(logits)
        signs = torch.where(positive, 1.0, -1.0).to(z.dtype)
        if self.folds_all:
            return z * signs, positive, logits
        return z * torch.ones_like(z).index_copy(1, self.index, signs), positive, logits

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._draw(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        # scored by the sign that was drawn, which at z = 0 the product no longer shows
        x, positive, logits = self._draw(z, context)
        log_probability = self._score(positive, logits)
        record_score(log_probability)
        return x, log_probability

    def image(self, low: Sequence[float], high: Sequence[float]) -> Box:
        low, high = list(low), list(high)
        for d in self.element:
            low[d], high[d] = 0.0, max(abs(low[d]), abs(high[d]))
        return low, high

    def summed_inverse(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        rule.say("enumeration of signs")
        shape = self.event_shape
        folded = len(self.element) * math.prod(shape[1:])
        parts = []
        for pattern in range(1 << folded):
            bits = [1.0 - 2.0 * (pattern >> i & 1) for i in range(folded)]
            signs = torch.ones(shape, dtype=x.dtype, device=x.device)
            signs[list(self.element)] = x.new_tensor(bits).view(-1, *shape[1:])
            parts.append(tail(x * signs))
        return torch.logsumexp(torch.stack(parts), 0)

    @classmethod
    def example(cls) -> Example:
        net = MLP(2, 2, [8], "tanh", context_features=1)
        return Example(cls((2,), net=net), StandardNormal((2,)), HalfNormal((2,)), context=1)


class AbsGenerative(_InverseOf):
    r"""The generative surjection x = |z|: inference draws the sign.

    .. math:: x_d = |z_d|, \quad z_d = s_d x_d,\ s_d \sim \mathrm{sign}(\pi_d(x)), \qquad
              V = -\sum_d \log q(s_d \mid x)

    A lower bound; a learned sign distribution is the variational posterior q(s|x).

    Args:
        event_shape, element, probability, learn, net: see :class:`AbsInference`; the net sees x.

    Raises:
        ValueError: as :class:`AbsInference`; from ``forward``, for a negative x.

    Cost: O(D) a row, and one pass of the net if there is one; forward and inverse alike.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Tables 6, 7.

    >>> layer = AbsGenerative(2, learn=True)
    >>> layer.inverse(torch.tensor([[-1.0, 2.0]]))
    tensor([[1., 2.]])
    """

    of = AbsInference

    def image(self, low: Sequence[float], high: Sequence[float]) -> Box:
        low, high = list(low), list(high)
        for d in self.transform.element:
            if low[d] < 0:
                raise ValueError(
                    "surjection: AbsGenerative is for data >= 0, and these reach down to "
                    f"{low[d]:g}; choose abs (AbsInference)"
                )
            low[d] = -high[d]
        return low, high

    @classmethod
    def example(cls) -> Example:
        base = DiagonalNormal((2,), loc=[0.4, -0.3], scale=[0.8, 1.1])
        return Example(cls((2,), probability=0.3, learn=True), HalfNormal((2,), scale=1.5), base)
