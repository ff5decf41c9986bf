"""The contract of a distribution: a base of a flow, or a conditional inside a stochastic layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surflow.checks import InputError
from surflow.latents import Tape
from surflow.numeric import at_least_float32, repeat_rows
from surflow.score_function import record_score


def as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """A tuple of positive sizes from an int or a sequence; ValueError otherwise."""
    shape = (shape,) if isinstance(shape, int) else tuple(int(s) for s in shape)
    if not shape or any(s <= 0 for s in shape):
        raise ValueError(f"expected positive sizes for an event shape, got {shape}")
    return shape


def expand_to(
    value: float | Sequence[float] | Tensor, shape: tuple[int, ...], where: str
) -> Tensor:
    """A parameter as a tensor of ``shape``, default dtype; ValueError if it does not broadcast."""
    value = torch.as_tensor(value, dtype=torch.get_default_dtype())
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{where}: expected a shape that broadcasts to {shape}, got {tuple(value.shape)}"
        ) from None


class Distribution(nn.Module, ABC):
    r"""A density or mass over events, conditional on a context or not.

    One class serves both cases: where a ``net`` is given, it maps the context to the parameters;
    otherwise the parameters are fixed or learned.

    Attributes:
        event_shape: the shape of one x.
        discrete: whether ``log_prob`` is of a mass rather than a density.
        integer: whether events are integer tensors.
        net: the context net, None for an unconditional distribution.
        normal: it is of independent normals, given the context.
        has_mean: whether :meth:`mean` has a closed form.
        factorised: it is a diagonal normal given the context, and says so by
            ``normal_parameters(context)``: its location and log-scale.
    """

    discrete: bool = False
    integer: bool = False
    normal: bool = False
    has_mean: bool = False
    factorised: bool = False

    def __init__(self, event_shape: int | Sequence[int], net: nn.Module | None = None) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        self.net = net

    @property
    def conditional(self) -> bool:
        """Whether the parameters come from a context."""
        return self.net is not None

    # What a subclass writes -------------------------------------------------------------------

    @abstractmethod
    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(B, *event) -> (B,), nats."""

    @abstractmethod
    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        """n events, (n, *event); reparametrised where the family allows."""

    # What a subclass may say of itself --------------------------------------------------------

    def mean(self, context: Tensor | None = None) -> Tensor:
        """E[x | context], broadcastable to (B, *event), real; of integers too.

        Raises:
            ValueError: for a distribution whose mean has no closed form here.
        """
        raise ValueError(f"mean: expected a density with a known mean, got {type(self).__name__}")

    def write(self, x: Tensor, context: Tensor | None, tape: Tape) -> None:
        """Write the latents of an event on the tape: the event itself, if it is of reals."""
        if self.discrete or not x.is_floating_point():
            raise ValueError(
                f"interpolation: {tape.layer} draws a discrete {type(self).__name__}, "
                "and between its values there is nothing"
            )
        tape.write(x)

    def read(self, context: Tensor | None, tape: Tape) -> Tensor:
        """The event of the latents on top of the tape: the inverse of :meth:`write`."""
        return tape.read()

    def pairwise(self, contexts: Tensor) -> Callable[[Tensor], Tensor]:
        """(B, *event) -> log p(x_b | c_j), (B, J), for contexts c, (J, ...), nats."""
        count = len(contexts)

        def log_prob(x: Tensor) -> Tensor:
            given = contexts.repeat(len(x), *[1] * (contexts.dim() - 1))
            return self.log_prob(x.repeat_interleave(count, 0), given).view(-1, count)

        return log_prob

    # What a user calls ------------------------------------------------------------------------

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density (or log-mass) of each row.

        Args:
            x: (B, *event).
            context: (B, ...) for a conditional distribution.

        Returns:
            (B,), nats, float32 or better; -inf outside the support.

        Raises:
            ValueError: for a wrong shape, or a context that is missing.
        """
        return self._call("log_prob", self._checked_log_prob, x, context)

    def sample(
        self, n: int | None = None, context: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Draw events.

        Args:
            n: how many; None: one for each row of the context.
            context: (n, ...) or (1, ...), the latter for n events under one context.
            temperature: 1 is the distribution itself. Location-scale families multiply their
                scale by it, discrete ones divide their logits by it.

        Returns:
            (n, *event).
        """
        return self._call("sample", self._checked_sample, n, context, temperature)

    def sample_and_log_prob(
        self, n: int | None = None, context: Tensor | None = None, num_samples: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Draw events and score them.

        Args:
            n, context: as in :meth:`sample`.
            num_samples: K draws a row, sample k of row b at k n + b.

        Returns:
            Events (K n, *event) and their log-probabilities (K n,), nats.
        """
        return self._call("sample_and_log_prob", self._sample_and_log_prob, n, context, num_samples)

    def _sample_and_log_prob(
        self, n: int | None, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        """Override it where a draw and its score share work."""
        n, context = self._rows(n, context, num_samples)
        x = self.sample(n, context)
        log_prob = self.log_prob(x, context)
        if self.discrete:
            record_score(log_prob)
        return x, log_prob

    def draw_in_parts(
        self, n: int | None = None, context: Tensor | None = None, num_samples: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`sample_and_log_prob` with the log-probability in two parts, that of the draw and
        what the layers of a flow add to it, zero for other distributions."""
        return self._call("draw_in_parts", self._draw_in_parts, n, context, num_samples)

    def _draw_in_parts(
        self, n: int | None, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_prob = self._sample_and_log_prob(n, context, num_samples)
        return x, log_prob, torch.zeros_like(log_prob)

    def _call(self, method: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function``; an error gets the name of this class and of the method."""
        try:
            return function(*arguments)
        except InputError as error:
            raise ValueError(f"{type(self).__name__}.{method}: {error}") from None

    def _checked_log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        if tuple(x.shape[1:]) != self.event_shape:
            raise InputError(
                f"expected shape (batch, {', '.join(map(str, self.event_shape))}), "
                f"got {tuple(x.shape)}"
            )
        return self._log_prob(x, self._rows(x.shape[0], context)[1])

    def _checked_sample(self, n: int | None, context: Tensor | None, temperature: float) -> Tensor:
        n, context = self._rows(n, context)
        if n < 0:
            raise InputError(f"expected n >= 0, got {n}")
        if not temperature > 0:
            raise InputError(f"expected temperature > 0, got {temperature}")
        return self._sample(n, context, temperature)

    def _rows(
        self, n: int | None, context: Tensor | None, num_samples: int = 1
    ) -> tuple[int, Tensor | None]:
        """The number of draws, and the context of each; None where it is not read."""
        if n is None:
            if context is None:
                raise InputError("expected n or a context")
            n = context.shape[0]
        if not self.conditional:
            return num_samples * n, None
        if context is None:
            raise InputError("expected a context, got none")
        if context.shape[0] == 1 and n != 1:
            context = context.expand(n, *context.shape[1:])
        if context.shape[0] != n:
            raise InputError(f"expected a context of {n} rows, got shape {tuple(context.shape)}")
        return num_samples * n, repeat_rows(context, num_samples)

    def _net_parameters(self, context: Tensor, count: int) -> tuple[Tensor, ...]:
        """The net's output, (B, C * count, ...), as ``count`` tensors of shape (B, *event).

        Output channels alternate over the parameters: a0 b0 a1 b1 ... for count 2.
        """
        weight = next(self.net.parameters(), None)
        if weight is not None and context.is_floating_point():
            context = context.to(weight.dtype)  # a latent is float32 even where a net is bfloat16
        out = at_least_float32(self.net(context))
        expected = (self.event_shape[0] * count, *self.event_shape[1:])
        if tuple(out.shape[1:]) != expected:
            raise ValueError(
                f"{type(self).__name__}: expected the net to give shape "
                f"(batch, {', '.join(map(str, expected))}), got {tuple(out.shape)}"
            )
        return out.unflatten(1, (self.event_shape[0], count)).unbind(2)


def draw_index(probabilities: Tensor) -> Tensor:
    """One index along the last dimension, (..., K) -> (..., 1), int64.

    A race of exponentials, the algorithm of ``torch.multinomial``, draw for draw, which however
    reads the values, so that a GPU has to wait.
    """
    p = probabilities.detach()
    return (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)


def sum_event(values: Tensor) -> Tensor:
    """Sum over everything but the batch, in float32 or better: (B, *event) -> (B,)."""
    values = at_least_float32(values)
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def register_value(module: nn.Module, name: str, value: Tensor, learn: bool) -> None:
    """Keep a value in a module: as a parameter where it is learned, else as a buffer."""
    if learn:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def register_edges(
    module: Distribution,
    low: float | Sequence[float] | Tensor,
    high: float | Sequence[float] | Tensor,
) -> None:
    """Keep the edges of a box as buffers of the event's shape; ValueError unless low < high."""
    name = type(module).__name__
    low = expand_to(low, module.event_shape, f"{name}: low").clone()
    high = expand_to(high, module.event_shape, f"{name}: high").clone()
    if not bool((low < high).all()):
        raise ValueError(f"{name}: expected low < high, got {low.tolist()} and {high.tolist()}")
    module.register_buffer("low", low)
    module.register_buffer("high", high)
