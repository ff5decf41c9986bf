"""Distributions of orders: permutations by Plackett-Luce, and sorted samples."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surflow.checks import InputError, require, require_at_least
from surflow.distributions.base import Distribution, expand_to, register_value
from surflow.numeric import at_least_float32, working_dtype


def log_factorial(n: int) -> float:
    """log n!, nats."""
    return math.lgamma(n + 1)


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """Elements of x (B, N, *rest) in an order (B, N) of integers: y[b, i] = x[b, order[b, i]]."""
    index = order.reshape(*order.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand_as(x))


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes each row: (B, N) -> (B, N)."""
    return torch.argsort(order, dim=1)


def uniform_order(n: int, num_elements: int, device: torch.device) -> Tensor:
    """Uniformly random permutations, (n, N)."""
    return torch.rand(n, num_elements, device=device).argsort(dim=1)


def plackett_luce_log_prob(logits: Tensor, order: Tensor) -> Tensor:
    """Log-probability of taking the elements out in this order without replacement, (B,), nats.

    Args:
        logits: broadcastable to (B, N); float32 or better.
        order: (B, N); the element taken i-th is order[:, i].
    """
    taken = logits.expand(order.shape).gather(1, order)
    left = taken.flip(1).logcumsumexp(1).flip(1)  # over the elements not yet taken
    return (taken - left).sum(1)


def plackett_luce_sample(logits: Tensor, n: int) -> Tensor:
    """Orders drawn by sorting logits with Gumbel noise: logits broadcastable to (n, N) -> (n, N).

    The first of a descending sort is element k with probability softmax(logits)_k, and so on
    without replacement: what :func:`plackett_luce_log_prob` scores.
    """
    u = torch.rand(n, logits.shape[-1], device=logits.device, dtype=logits.dtype)
    gumbel = -(-u.clamp_min(torch.finfo(u.dtype).tiny).log()).log()
    return torch.argsort(logits + gumbel, dim=1, descending=True)


def draw_order(logits: Tensor | None, like: Tensor) -> Tensor:
    """An order of the elements of each row of ``like``, (B, N); without logits uniform."""
    if logits is None:
        return uniform_order(*like.shape[:2], like.device)
    return plackett_luce_sample(logits, like.shape[0])


def score_order(logits: Tensor | None, order: Tensor, like: Tensor) -> Tensor:
    """The log-probability of what :func:`draw_order` gives, (B,), nats."""
    if logits is not None:
        return plackett_luce_log_prob(logits, order)
    zero = torch.zeros(like.shape[0], device=like.device, dtype=working_dtype(like))
    return zero - log_factorial(like.shape[1])


class PlackettLuce(Distribution):
    r"""Permutations of N elements, taken out one by one in proportion to their weights.

    .. math:: \log p(\pi) = \sum_{i=1}^{N} \ell_{\pi_i} - \log \sum_{j \ge i} e^{\ell_{\pi_j}}

    An event is an integer row: the first element, the second, ... Equal logits give
    the uniform distribution, -log N!.

    Args:
        num_elements: N.
        logits: (N,); zeros if left out.
        learn: whether the logits are a parameter.
        net: maps a context to logits, (B, N).

    Raises:
        ValueError: for N < 1 or logits of a wrong shape; from ``log_prob``, for rows that are no
            permutations of 0 ... N - 1, or a tensor that is not of integers.

    Cost: O(N log N) to draw and to score a row.
    Source: Plackett 1975, J. R. Stat. Soc. C 24; Gumbel sampling: Yellott 1977, J. Math. Psych. 15.

    >>> p = PlackettLuce(3, logits=[0.0, 1.0, 2.0])
    >>> round(p.log_prob(torch.tensor([[2, 1, 0]])).exp().item(), 4)  # 0.6652 * 0.7311
    0.4863
    """

    discrete = True
    integer = True

    def __init__(
        self,
        num_elements: int,
        logits: Sequence[float] | Tensor | None = None,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        require_at_least("PlackettLuce", 1, num_elements=num_elements)
        super().__init__((num_elements,), net)
        self.num_elements = num_elements
        if net is not None:
            return
        value = torch.zeros(num_elements) if logits is None else logits
        value = expand_to(value, self.event_shape, "PlackettLuce: logits").clone()
        register_value(self, "logits", value, learn)

    def logits_of(self, context: Tensor | None) -> Tensor:
        """The logits, broadcastable to (B, N), float32 or better."""
        logits = self._net_parameters(context, 1)[0] if self.conditional else self.logits
        return at_least_float32(logits)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        if x.is_floating_point():
            raise InputError(f"expected an integer tensor, got {x.dtype}")
        ok = x.sort(1).values == torch.arange(self.num_elements, device=x.device)
        require(ok, f"rows that are permutations of 0 to {self.num_elements - 1}", x)
        return plackett_luce_log_prob(self.logits_of(context), x.long())

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        return plackett_luce_sample(self.logits_of(context) / temperature, n)


class OrderStatistics(Distribution):
    r"""Sorted draws of an exchangeable distribution: the law of sort(x), x ~ component.

    .. math:: \log p(z) = \log N! + \log p_0(z), \quad z_1 \le \dots \le z_N

    A base for the latents of a sorting surjection. Sorted along the first dimension of the event,
    by one feature where the elements are vectors.

    Args:
        component: p_0 over (N, *rest); its density must not change when the N elements change
            places.
        by: the feature to sort by, an index into ``rest``; () for scalar elements.

    Raises:
        ValueError: for an index that does not point at one feature.

    Cost: O(N log N) to draw, O(N) to score, a row.
    Source: David & Nagaraja 2003, Order Statistics, Sec. 2.2.

    >>> from surflow.distributions import StandardNormal
    >>> p = OrderStatistics(StandardNormal((2,)))
    >>> p.log_prob(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))  # log(2 / 2 pi); unsorted
    tensor([-1.1447,    -inf])
    """

    def __init__(self, component: Distribution, by: int | Sequence[int] | None = None) -> None:
        super().__init__(component.event_shape)
        self.component = component
        self.by = feature_index(by, self.event_shape[1:], "OrderStatistics")

    conditional = property(lambda self: self.component.conditional)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        key = x[(slice(None), slice(None), *self.by)]
        in_order = (key[:, 1:] >= key[:, :-1]).all(1)
        log_p = self.component.log_prob(x, context) + log_factorial(self.event_shape[0])
        return torch.where(in_order, log_p, -math.inf)

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        x = self.component.sample(n, context, temperature)
        key = x[(slice(None), slice(None), *self.by)]
        return permuted(x, key.argsort(dim=1))


def feature_index(
    by: int | Sequence[int] | None, rest: tuple[int, ...], where: str
) -> tuple[int, ...]:
    """An index of one feature of an element of shape ``rest``, as a tuple.

    None is the first feature, (0, ..., 0), and () for scalar elements.

    Raises:
        ValueError: for an index that does not point at one feature.
    """
    if by is None:
        return (0,) * len(rest)
    by = (by,) if isinstance(by, int) else tuple(int(i) for i in by)
    if len(by) != len(rest) or any(not 0 <= i < s for i, s in zip(by, rest, strict=True)):
        raise ValueError(f"{where}: expected an index of one feature of shape {rest}, got {by}")
    return by
