"""The piecewise folding surjection of RAD: intervals laid upon one another."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require, require_at_least
from surflow.distributions import Uniform
from surflow.distributions.base import as_shape, draw_index, register_value
from surflow.nets import MLP
from surflow.score_function import record_score
from surflow.transforms.base import Example, Surjection, Tail, net_output


class IntervalFold(Surjection):
    r"""The inference surjection that lays K intervals of one coordinate upon one another.

    .. math:: x_d \in [b_k, b_{k+1}]:\quad z_d = \frac{x_d - b_k}{b_{k+1} - b_k}, \qquad
              V = \log p(k \mid z) - \log (b_{k+1} - b_k)

    Exact: which interval x lies in is not latent. The intervals cut [low, high], their edges are
    fixed or learned; p(k|z), fixed, learned or from a net of z, undoes the fold. Every second
    interval is reversed (``zigzag``), so that z is continuous in x; the absolute value is the
    case of two intervals. This is the layer of RAD (real and discrete) flows.

    Args:
        event_shape: the shape of x; its first dimension is indexed by ``element``.
        element: d, the coordinate that is folded.
        num_intervals: K >= 2.
        low, high: edges of the coordinate's support.
        learn_edges: whether the inner edges are parameters (softmax of K widths).
        learn: whether the K logits of p(k) are a parameter.
        net: maps z (and the context, if it has ``context_features``) to logits, (B, K); replaces
            the K logits.
        zigzag: reverse every second interval.

    Raises:
        ValueError: for sizes out of range, a net whose output has a wrong shape; from ``forward``
            for x_d outside [low, high], from ``inverse`` for z_d outside [0, 1].

    Cost: O(K) a row and one pass of the net; forward and inverse alike.
    Source: Dinh et al. 2019 (RAD), arXiv 1903.07714, Sec. 3; as a surjection Nielsen et al. 2020,
    arXiv 2007.02731, Table 3.

    >>> IntervalFold(2, element=0, num_intervals=4, low=-4.0, high=4.0).kind
    'surjective (inference)'
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        element: int,
        num_intervals: int,
        low: float,
        high: float,
        learn_edges: bool = False,
        learn: bool = False,
        net: nn.Module | None = None,
        zigzag: bool = True,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        if len(self.event_shape) != 1:
            shape = self.event_shape
            raise ValueError(f"IntervalFold: expected an event of one dimension, got {shape}")
        if not 0 <= element < self.event_shape[0]:
            raise ValueError(
                f"IntervalFold: expected element in 0 to {self.event_shape[0] - 1}, got {element}"
            )
        require_at_least("IntervalFold", 2, num_intervals=num_intervals)
        if not low < high:
            raise ValueError(f"IntervalFold: expected low < high, got {low} and {high}")
        self.element, self.num_intervals = element, num_intervals
        self.low, self.high = float(low), float(high)
        register_value(self, "widths", torch.zeros(num_intervals), learn_edges)
        odd = torch.arange(num_intervals) % 2 == 1
        self.register_buffer("turned", odd & zigzag, persistent=False)
        self.net = net
        if net is None:
            register_value(self, "logits", torch.zeros(num_intervals), learn)

    def edges(self) -> tuple[Tensor, Tensor]:
        """Left edges and widths of the intervals, (K,) each."""
        width = (self.high - self.low) * torch.softmax(self.widths, 0)
        return self.low + F.pad(width.cumsum(0)[:-1], (1, 0)), width

    def log_gate(self, z: Tensor, context: Tensor | None) -> Tensor:
        """log p(k|z), (B, K), nats."""
        if self.net is None:
            return F.log_softmax(self.logits, 0).expand(z.shape[0], -1)
        shape = (z.shape[0], self.num_intervals)
        return F.log_softmax(net_output(self.net, z, context, shape), 1)

    def _require_within(self, value: Tensor, low: float, high: float) -> None:
        expected = f"coordinate {self.element} in [{low:g}, {high:g}]"
        require((value >= low) & (value <= high), expected, value)

    def _replace(self, value: Tensor, column: Tensor) -> Tensor:
        e = self.element
        return torch.cat([value[:, :e], column.unsqueeze(1), value[:, e + 1 :]], dim=1)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        value = x[:, self.element]
        self._require_within(value, self.low, self.high)
        left, width = (part.to(x.dtype) for part in self.edges())
        index = (value.unsqueeze(1) >= left[1:]).sum(1)
        place = ((value - left[index]) / width[index]).clamp(0.0, 1.0)
        z = self._replace(x, torch.where(self.turned[index], 1.0 - place, place))
        gate = self.log_gate(z, context).gather(1, index.unsqueeze(1)).squeeze(1)
        return z, gate - width.log()[index]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        value = z[:, self.element]
        self._require_within(value, 0, 1)
        log_gate = self.log_gate(z, context)
        index = draw_index(log_gate.exp())
        log_probability = log_gate.gather(1, index).squeeze(1)
        record_score(log_probability)
        index = index.squeeze(1)
        left, width = (part.to(z.dtype) for part in self.edges())
        place = torch.where(self.turned[index], 1.0 - value, value)
        # the sum of the widths may round to a little more than high - low
        x = self._replace(z, (left[index] + width[index] * place).clamp(self.low, self.high))
        return x, log_probability - width.log()[index]

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._inverse_and_ldj(z, context)[0]

    def summed(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        rule.say(f"enumeration of {self.num_intervals} intervals")
        left, width = self.edges()
        value, parts = x[:, self.element], []
        for k in range(self.num_intervals):
            place = (value - left[k]) / width[k]
            here = (place >= 0) & ((place < 1) | (k == self.num_intervals - 1))
            z = x.clone()
            z[:, self.element] = (1 - place if self.turned[k] else place).clamp(0, 1)
            part = tail(z) + self.log_gate(z, None)[:, k] - width[k].log()
            parts.append(torch.where(here, part, -torch.inf))
        return torch.logsumexp(torch.stack(parts), 0)

    @classmethod
    def example(cls) -> Example:
        transform = cls(
            (2,), 1, 3, -1.0, 2.0, learn_edges=True, net=MLP(2, 3, [8], "tanh", context_features=1)
        )
        with torch.no_grad():
            transform.widths.copy_(torch.tensor([0.3, -0.2, 0.0]))
        return Example(transform, Uniform((2,), [0.0, -1.0], [1.0, 2.0]), Uniform((2,)), context=1)
