"""The contract of a transform, and the composites that keep it.

A transform relates data x and latents z. Whatever its kind (Nielsen et al. 2020, arXiv 2007.02731,
Sec. 2 and Table 1), ``forward`` infers a latent and gives the likelihood contribution
V(x, z), and ``inverse`` generates x:

    log p(x) = log p(z) + V(x, z)          exactly, or in expectation a lower bound.

    kind                     forward x -> z    inverse z -> x    V(x, z)
    bijective                deterministic     deterministic     log |det dz/dx|
    inference surjection     deterministic     stochastic        log p(x | z)
    generative surjection    stochastic        deterministic     -log q(z | x)
    stochastic               stochastic        stochastic        log p(x | z) - log q(z | x)

A number is a bound exactly where the forward direction is stochastic.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surflow.checks import check_values, require, values_are_checked
from surflow.distributions.base import sum_event
from surflow.latents import Tape

__all__ = [
    "Box",
    "Example",
    "Inverse",
    "Sequential",
    "Transform",
    "check_values",
    "repeat_rows",
    "require",
    "run_net",
    "sum_event",
    "takes_context",
    "values_are_checked",
    "zero_ldj",
]


Box = tuple[list[float], list[float]]
"""Lower and upper edges of each coordinate, infinite where there are none."""

Tail = Callable[[Tensor], Tensor]
"""log p of what comes out of a layer: (B, *latent) -> (B,)."""


def zero_ldj(x: Tensor) -> Tensor:
    """A contribution of nothing, (B,), float32 or better."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return torch.zeros(x.shape[0], device=x.device, dtype=dtype)


def contribution_dtype(ldj: Tensor) -> Tensor:
    """Lift a half-precision contribution to float32."""
    return ldj.float() if ldj.dtype in (torch.float16, torch.bfloat16) else ldj


def repeat_rows(value: Tensor | None, num_samples: int) -> Tensor | None:
    """The rows, again and again: (B, ...) -> (K B, ...), row b of sample k at k B + b."""
    if value is None or num_samples == 1:
        return value
    return value.expand(num_samples, *value.shape).flatten(0, 1)


def takes_context(module: nn.Module | None) -> bool:
    """Whether a net reads the context: it says so with ``context_features > 0``."""
    return bool(getattr(module, "context_features", 0))


def run_net(net: nn.Module, x: Tensor, context: Tensor | None, where: str) -> Tensor:
    """Evaluate ``net`` on ``x``, with the context if it is one that takes it."""
    features = getattr(net, "in_features", None)
    if isinstance(features, int) and x.dim() == 2 and x.shape[1] != features:
        raise ValueError(
            f"{where}: expected {features} features for the net, got shape {tuple(x.shape)}"
        )
    if not takes_context(net):
        return net(x)
    if context is None:
        raise ValueError(
            f"{where}: expected a context with {net.context_features} features, got none"
        )
    if context.dim() < 2 or context.shape[1] != net.context_features:
        raise ValueError(
            f"{where}: expected a context with {net.context_features} features, "
            f"got shape {tuple(context.shape)}"
        )
    return net(x, context)


@dataclass
class Example:
    """A small instance with what is needed to prove it.

    Attributes:
        transform: the instance.
        sample: ``sample(n) -> (x, log_r)`` with x (n, *event) drawn from a density r that covers
            the support of the model, and log_r (n,) its log-density in nats.
        base: a distribution with ``log_prob``, supported on the codomain of ``forward``.
        context: ``context(n)`` draws a context for n rows, None for an unconditional instance.
        latent: ``latent(n)`` draws points z of the codomain for the round trip that starts there;
            None: ``base.sample(n)``.
    """

    transform: Transform
    sample: Callable[[int], tuple[Tensor, Tensor]]
    base: Any
    context: Callable[[int], Tensor] | None = None
    latent: Callable[[int], Tensor] | None = None


class Transform(nn.Module, ABC):
    """One layer of a SurVAE flow.

    A subclass declares three booleans and implements :meth:`_forward`, :meth:`_inverse` and
    :meth:`example`. It must guarantee:

    * ``_forward`` returns z and a contribution of shape (B,) in nats, such that with base density
      p the expectation of exp(log p(z) + ldj) over z is the density of x;
    * a row of the result depends on that row of the input only;
    * a layer with a stochastic forward also implements :meth:`_inverse_and_ldj`, which scores the
      pair (x, z) that it generates, so that :class:`Inverse` can turn it round.

    Attributes:
        bijective: both directions are deterministic and undo each other.
        stochastic_forward: inference samples; the likelihood contribution is then a bound.
        stochastic_inverse: generation samples.
        event_shape: the shape of x without the batch, None where any shape will do. An entry of
            None stands for any size.
        latent_shape: the same for z.
        integer_data: x is an integer tensor.
        integer_latent: z is an integer tensor.
        compiles: both directions go through ``torch.compile(fullgraph=True)``.
        why_not_compiled: where they do not, one sentence that says why.
        estimated: the contribution is a random, unbiased estimate of V(x, z), such as that of a
            log-determinant by random probes, here or in a part of this layer. The number is then
            neither exact nor a bound.
        reversible: the inverse is a formula that costs about as much as forward, so that a backward
            pass can recompute x from z (:mod:`surflow.memory`).
        repeatable: a second run on the same input gives the same output and changes nothing. A net
            may have this attribute too.
        heavy_nets: nets that are worth compiling by themselves.
        constraint: where latents fill only a part of the space, which, in words for a message.
    """

    bijective: ClassVar[bool]
    stochastic_forward: ClassVar[bool]
    stochastic_inverse: ClassVar[bool]
    compiles: ClassVar[bool] = True
    why_not_compiled: ClassVar[str] = ""
    reversible: bool = False
    repeatable: bool = True
    heavy_nets: tuple[nn.Module, ...] = ()
    constraint: ClassVar[str] = ""

    event_shape: tuple[int | None, ...] | None = None
    latent_shape: tuple[int | None, ...] | None = None
    integer_data: bool = False
    integer_latent: bool = False

    _label: str | None = None
    _turned_into: str | None = None  # the class that turned this layer round, for messages

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._several_as_one("_forward_samples", "_forward")
        cls._several_as_one("_inverse_and_ldj_samples", "_inverse_and_ldj")
        if inspect.isabstract(cls) or cls.__name__.startswith("_"):
            return
        missing = [
            flag
            for flag in ("bijective", "stochastic_forward", "stochastic_inverse")
            if not hasattr(cls, flag)
        ]
        if missing:
            raise TypeError(f"{cls.__name__} must declare {', '.join(missing)}")

    @classmethod
    def _several_as_one(cls, several: str, one: str) -> None:
        """Drop a parent's way to several samples where a class has overridden what it is of."""
        place = {name: i for i, c in reversed([*enumerate(cls.__mro__)]) for name in vars(c)}
        if place[one] < place[several]:
            setattr(cls, several, vars(Transform)[several])

    # What a subclass writes -------------------------------------------------------------------

    @abstractmethod
    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Data to latent: (B, *event) -> z, ldj (B,)."""

    @abstractmethod
    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Latent to data."""

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latent to data, with the contribution V(x, z) of the pair that results."""
        if self.stochastic_forward:
            raise NotImplementedError(
                f"{type(self).__name__} samples in its forward direction and does not say "
                "how to score a pair (x, z): it has no _inverse_and_ldj"
            )
        x = self._inverse(z, context)
        return x, self._forward(x, context)[1]

    def _latent(self, x: Tensor, context: Tensor | None) -> Tensor:
        """z alone: what a turned layer generates. Override it where V costs more than z."""
        return self._forward(x, context)[0]

    def _forward_samples(
        self, x: Tensor, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        """Several draws of ``_forward`` a row. Override it, with the same draws in the same order,
        where a part of the work does not depend on the draw."""
        return self(repeat_rows(x, num_samples), repeat_rows(context, num_samples))

    def _inverse_and_ldj_samples(
        self, z: Tensor, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        """The same of ``_inverse_and_ldj``."""
        return self.inverse_and_ldj(repeat_rows(z, num_samples), repeat_rows(context, num_samples))

    @classmethod
    def example(cls) -> Example:
        """A small instance, inputs with their density, and a base: what the proofs run on."""
        raise NotImplementedError(f"{cls.__name__} has no example()")

    # What a subclass may say of itself --------------------------------------------------------

    def layers(self, prefix: str = "") -> Iterator[tuple[str, Transform]]:
        """Name (such as ``2.AffineCoupling``) and layer, nested sequences unfolded."""
        yield f"{prefix}{self.label}", self

    def unfold(self, turned: bool = False) -> Iterator[tuple[Transform, bool]]:
        """The layers in the order in which they run, nested sequences and inverses unfolded.

        Args:
            turned: whether this one runs from z to x.

        Yields:
            each layer, and whether it runs from z to x.
        """
        yield self, turned

    def image(self, low: Sequence[float], high: Sequence[float]) -> Box:
        """The box in which latents lie for data in the box low ... high: the whole space."""
        return [-math.inf] * len(low), [math.inf] * len(high)

    def onto_space(self) -> Transform | None:
        """A bijection of the latents onto the whole space, where their box does not tell it."""
        return None

    def infer(self, x: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        """z, with what generation would draw written on the tape.

        A layer whose generation is deterministic writes nothing: z says all about x.
        """
        if self.stochastic_inverse:
            raise ValueError(
                f"interpolation: {tape.layer} draws when it generates, and what it drew cannot be "
                "kept; there is a way for layers that generate without a draw, and for Slice, "
                "MaxPool2d, MaxInference and VAE"
            )
        return self(x, context)[0]

    def generate(self, z: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        """x, with what would be drawn read from the tape: the inverse of :meth:`infer`."""
        return self.inverse(z, context)

    def summed(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        """log p(x), with what inference draws summed or integrated out.

        Args:
            x: (B, *event).
            tail: log p of latents.
            rule: how to integrate: a :class:`surflow.evaluation.marginal.Rule`.

        Returns:
            (B,), nats.
        """
        if self.stochastic_forward:
            raise ValueError(f"marginal_log_prob: does not know how to sum out {self.label}")
        z, ldj = self(x)
        return tail(z) + ldj

    def summed_inverse(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        """:meth:`summed` of this layer turned round, for one that generates by a draw."""
        name = self._turned_into or f"Inverse({self.label})"
        raise ValueError(f"marginal_log_prob: does not know how to sum out {name}")

    def retrace(
        self, value: Tensor, context: Tensor | None, turned: bool
    ) -> tuple[tuple[Tensor, ...], Callable[..., Tensor], Tensor, Tensor]:
        """From an output, the input and the graph that leads back.

        For a backward pass that kept the output only; to be called with gradients enabled.

        Args:
            value: z, or x where ``turned``.
            context: (B, ...) or None.
            turned: whether the layer ran from z to x.

        Returns:
            The input in parts that are leaves of the graph; a function that joins such parts (their
            gradients too); the output and the contribution as the graph gives them.
        """
        with torch.no_grad():
            x = (self.latent if turned else self.inverse)(value, context)
        x = x.detach().requires_grad_()
        again, ldj = (self.inverse_and_ldj if turned else self)(x, context)
        return (x,), lambda part: part, again, ldj

    # What a user calls ------------------------------------------------------------------------

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Infer a latent.

        Args:
            x: data, (B, *event).
            context: conditioning, (B, ...), or None.

        Returns:
            z: the latent, (B, *latent).
            ldj: likelihood contribution V(x, z), (B,), nats, float32 or better.

        Raises:
            ValueError: for a wrong shape, dtype or value.
        """
        self._check_tensor(x, self.event_shape, "forward", self.integer_data)
        self._check_context(context, x.shape[0], "forward")
        z, ldj = self._forward(x, context)
        return z, contribution_dtype(ldj)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Generate data from a latent: (B, *latent) -> (B, *event)."""
        self._check_tensor(z, self._shape_of_latent(), "inverse", self.integer_latent)
        self._check_context(context, z.shape[0], "inverse")
        return self._inverse(z, context)

    def latent(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latent of ``forward`` without its contribution: (B, *event) -> (B, *latent)."""
        self._check_tensor(x, self.event_shape, "forward", self.integer_data)
        self._check_context(context, x.shape[0], "forward")
        return self._latent(x, context)

    def inverse_and_ldj(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Generate x and score the pair: x (B, *event) and V(x, z), (B,), nats."""
        self._check_tensor(z, self._shape_of_latent(), "inverse", self.integer_latent)
        self._check_context(context, z.shape[0], "inverse")
        x, ldj = self._inverse_and_ldj(z, context)
        return x, contribution_dtype(ldj)

    def forward_samples(
        self, x: Tensor, context: Tensor | None = None, num_samples: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Infer several latents of each row: ``forward`` of the rows repeated, draw for draw.

        What does not depend on a draw (deterministic layers before the first stochastic one, the
        embedding of a dequantizer's context) is computed once a row. A layer with random estimates
        draws them for every sample.

        Args:
            x: data, (B, *event).
            context: (B, ...) or None.
            num_samples: K.

        Returns:
            z: (K B, *latent), sample k of row b at k B + b.
            ldj: (K B,), nats.

        Raises:
            ValueError: as ``forward``, and for num_samples < 1.
        """
        if not self._several(num_samples, "forward"):
            return self(x, context)
        self._check_tensor(x, self.event_shape, "forward", self.integer_data)
        self._check_context(context, x.shape[0], "forward")
        z, ldj = self._forward_samples(x, context, num_samples)
        return z, contribution_dtype(ldj)

    def inverse_and_ldj_samples(
        self, z: Tensor, context: Tensor | None = None, num_samples: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Generate several x of each latent, and score the pairs; see :meth:`forward_samples`."""
        if not self._several(num_samples, "inverse"):
            return self.inverse_and_ldj(z, context)
        self._check_tensor(z, self._shape_of_latent(), "inverse", self.integer_latent)
        self._check_context(context, z.shape[0], "inverse")
        x, ldj = self._inverse_and_ldj_samples(z, context, num_samples)
        return x, contribution_dtype(ldj)

    def _several(self, num_samples: int, method: str) -> bool:
        if num_samples < 1:
            raise ValueError(f"{self.where(method)}: expected num_samples >= 1, got {num_samples}")
        return num_samples > 1

    @property
    def lower_bound(self) -> bool:
        """Whether the contribution makes the likelihood a lower bound."""
        return self.stochastic_forward

    @property
    def estimated(self) -> bool:
        """Whether the contribution is a random, unbiased estimate of V(x, z)."""
        return any(has_estimates(m) for m in self.children())

    @property
    def conditional(self) -> bool:
        """Whether this layer reads the context."""
        return any(takes_context(m) for m in self.children())

    @property
    def label(self) -> str:
        """The short name of this layer in a ledger: its own, if it was given one."""
        return self._label or type(self).__name__

    @label.setter
    def label(self, name: str) -> None:
        self._label = name

    @property
    def kind(self) -> str:
        """'bijective', 'surjective (inference)', 'surjective (generative)' or 'stochastic'."""
        return kind_of(self.bijective, self.stochastic_forward, self.stochastic_inverse)

    @property
    def number(self) -> str:
        """What the likelihood becomes by this layer: 'bound', 'estimate' or 'exact'."""
        return number_of(self.lower_bound, self.estimated)

    # Checks -----------------------------------------------------------------------------------

    def where(self, method: str) -> str:
        """The name of this layer in an error message."""
        if self._turned_into is not None:
            method = {"forward": "inverse", "inverse": "forward"}.get(method, method)
            return f"{self._turned_into}.{method}"
        return f"{type(self).__name__}.{method}"

    def _shape_of_latent(self) -> tuple[int | None, ...] | None:
        """The shape that z must have: a layer that does not say keeps the shape of x."""
        return self.latent_shape or self.event_shape

    def _check_tensor(
        self,
        value: Tensor,
        shape: tuple[int | None, ...] | None,
        method: str,
        integer: bool,
    ) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(f"{self.where(method)}: expected a tensor, got {type(value).__name__}")
        if integer == value.is_floating_point() or value.is_complex():
            wanted = "an integer tensor" if integer else "a floating-point tensor"
            raise ValueError(f"{self.where(method)}: expected {wanted}, got {value.dtype}")
        if value.dim() < 2:
            raise ValueError(
                f"{self.where(method)}: expected (batch, *event), got shape {tuple(value.shape)}"
            )
        if shape is not None and not shapes_match(tuple(value.shape[1:]), shape):
            wanted = ", ".join("any" if s is None else str(s) for s in shape)
            raise ValueError(
                f"{self.where(method)}: expected shape (batch, {wanted}), got {tuple(value.shape)}"
            )

    def _check_context(self, context: Tensor | None, batch: int, method: str) -> None:
        if context is None:
            return
        if not isinstance(context, Tensor):
            raise ValueError(
                f"{self.where(method)}: expected the context as a tensor, "
                f"got {type(context).__name__}"
            )
        if context.dim() < 1 or context.shape[0] != batch:
            raise ValueError(
                f"{self.where(method)}: expected a context of {batch} rows, "
                f"got shape {tuple(context.shape)}"
            )


def kind_of(bijective: bool, stochastic_forward: bool, stochastic_inverse: bool) -> str:
    """The name of a kind from its three flags."""
    if bijective:
        return "bijective"
    if stochastic_forward and stochastic_inverse:
        return "stochastic"
    if stochastic_forward:
        return "surjective (generative)"
    return "surjective (inference)"


def number_of(lower_bound: bool, estimated: bool) -> str:
    """'bound', 'estimate' or 'exact'; an estimate of a bound is a bound."""
    return "bound" if lower_bound else "estimate" if estimated else "exact"


def has_estimates(module: nn.Module) -> bool:
    """Whether it has, or is, a transform whose contribution is a random estimate."""
    return any(isinstance(m, Transform) and m.estimated for m in module.modules())


def shapes_match(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape fits one in which None stands for any size."""
    return len(shape) == len(expected) and all(
        e is None or s == e for s, e in zip(shape, expected, strict=True)
    )


def _has_gradient(*tensors: Tensor | None) -> bool:
    """Whether there can be a backward pass to any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Sequential(Transform):
    r"""Transforms in order: x -> f_1 -> f_2 -> ... -> z.

    .. math:: V(x, z) = \sum_i V_i(x_{i-1}, x_i)

    Its kind follows from its parts. ``forward`` runs them first to last, ``inverse`` last to
    first.

    Args:
        transforms: the layers, data side first.

    Raises:
        ValueError: from the layer to which a wrong input came; TypeError if a part is no
            :class:`Transform`.

    Cost: the sum of its parts'; forward and inverse each run every layer once.

    Source: Nielsen et al. 2020, arXiv 2007.02731, Algorithm 1.

    >>> from surflow.transforms import AbsInference, Softplus
    >>> layer = Sequential([AbsInference(2), Inverse(Softplus())])
    >>> layer.kind
    'surjective (inference)'
    """

    memory: Any = None
    """How layers run before a backward pass; set by :func:`surflow.memory.set_memory`."""

    def __init__(self, transforms: Iterable[Transform] = ()) -> None:
        super().__init__()
        transforms = list(transforms)
        for i, t in enumerate(transforms):
            if not isinstance(t, Transform):
                raise TypeError(
                    f"Sequential: layer {i} must be a Transform, got {type(t).__name__}"
                )
        self.transforms = nn.ModuleList(transforms)

    def __len__(self) -> int:
        return len(self.transforms)

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.transforms)

    def __getitem__(self, index: int) -> Transform:
        return self.transforms[index]

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return all(t.bijective for t in self.transforms)

    @property
    def stochastic_forward(self) -> bool:  # type: ignore[override]
        return any(t.stochastic_forward for t in self.transforms)

    @property
    def stochastic_inverse(self) -> bool:  # type: ignore[override]
        return any(t.stochastic_inverse for t in self.transforms)

    @property
    def conditional(self) -> bool:
        return any(t.conditional for t in self.transforms)

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return all(t.compiles for t in self.transforms)

    @property
    def estimated(self) -> bool:  # type: ignore[override]
        return any(t.estimated for t in self.transforms)

    @property
    def why_not_compiled(self) -> str:  # type: ignore[override]
        return "; ".join(
            f"{t.label}: {t.why_not_compiled}" for t in self.transforms if not t.compiles
        )

    @property
    def event_shape(self) -> tuple[int | None, ...] | None:  # type: ignore[override]
        return self.transforms[0].event_shape if len(self) else None

    @property
    def latent_shape(self) -> tuple[int | None, ...] | None:  # type: ignore[override]
        return self.transforms[-1]._shape_of_latent() if len(self) else None

    def _shape_of_latent(self) -> tuple[int | None, ...] | None:
        # the last layer's own: where that takes any shape, the first layer's says nothing of z
        return self.latent_shape

    @property
    def integer_data(self) -> bool:  # type: ignore[override]
        return self.transforms[0].integer_data if len(self) else False

    @property
    def integer_latent(self) -> bool:  # type: ignore[override]
        return self.transforms[-1].integer_latent if len(self) else False

    def _run(
        self,
        layers: Sequence[Transform],
        x: Tensor,
        context: Tensor | None,
        turned: bool = False,
        scored: bool = True,
        ldj: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output of ``layers``, and their contributions added to ``ldj``.

        Args:
            turned: whether to run from z to x.
            scored: whether contributions are asked for.
        """
        if self.memory is not None and _has_gradient(x, context, *self.parameters()):
            x, part = self.memory.run(layers, x, context, turned, scored)
            return x, part if ldj is None else ldj + part
        for layer in reversed(layers) if turned else layers:
            if not scored:
                x = layer.inverse(x, context)
                continue
            x, part = layer.inverse_and_ldj(x, context) if turned else layer(x, context)
            ldj = part if ldj is None else ldj + part
        return x, zero_ldj(x) if ldj is None else ldj

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run(list(self), x, context)

    def _forward_samples(
        self, x: Tensor, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        layers = list(self)
        drawn = (i for i, t in enumerate(layers) if t.stochastic_forward or t.estimated)
        first = next(drawn, len(layers))
        x, ldj = self._run(layers[:first], x, context)
        ldj = repeat_rows(ldj, num_samples)
        if first == len(layers):
            return repeat_rows(x, num_samples), ldj
        x, part = layers[first].forward_samples(x, context, num_samples)
        context = repeat_rows(context, num_samples)
        return self._run(layers[first + 1 :], x, context, ldj=ldj + part)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._run(list(self), z, context, turned=True, scored=False)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run(list(self), z, context, turned=True)

    def layers(self, prefix: str = "") -> Iterator[tuple[str, Transform]]:
        for i, transform in enumerate(self.transforms):
            yield from transform.layers(f"{prefix}{i}.")

    def unfold(self, turned: bool = False) -> Iterator[tuple[Transform, bool]]:
        for transform in reversed(list(self)) if turned else self:
            yield from transform.unfold(turned)

    def image(self, low: Sequence[float], high: Sequence[float]) -> Box:
        for transform in self:
            low, high = transform.image(low, high)
        return list(low), list(high)

    def infer(self, x: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        for transform in self:
            x = transform.infer(x, context, tape)
        return x

    def generate(self, z: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        for transform in reversed(list(self)):
            z = transform.generate(z, context, tape)
        return z

    def trace(
        self, x: Tensor, context: Tensor | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, Transform, Tensor, Tensor]]:
        """Run forward layer by layer, nested sequences unfolded.

        Yields:
            name (as in :meth:`layers`), the layer, its output z, its ldj (B,) in nats.
        """
        for name, transform in self.layers(prefix):
            x, ldj = transform(x, context)
            yield name, transform, x, ldj

    @classmethod
    def example(cls) -> Example:
        from surflow.distributions import DiagonalNormal, HalfNormal
        from surflow.transforms.bijections.affine import Affine
        from surflow.transforms.bijections.elementwise import Softplus
        from surflow.transforms.surjections.abs import AbsInference

        wide = DiagonalNormal((2,), scale=2.0)
        return Example(
            cls(
                [
                    Affine((2,), shift=[0.3, -0.2], scale=[1.5, 0.7]),
                    AbsInference((2,), probability=0.3),
                    Softplus(),
                    Affine((2,), shift=-0.6931471805599453),
                ]
            ),
            wide.sample_and_log_prob,
            HalfNormal((2,)),
        )


class Inverse(Transform):
    r"""A transform turned round: its forward is the other's inverse.

    .. math:: V_{\mathrm{inv}}(x, z) = -V(z, x)

    For a bijection the log-determinant changes its sign. For an inference surjection,
    V = log p(x|z), the result is the generative surjection with the same right-inverse,
    -log q(z|x), and the other way round; a stochastic layer swaps encoder and decoder. One class
    therefore gives the second direction of every layer.

    Args:
        transform: the layer to turn round.

    Cost: that of the layer, forward and inverse exchanged.

    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.1 (the two directions of a surjection).

    >>> from surflow.transforms import AbsInference
    >>> layer = Inverse(AbsInference(2))
    >>> layer.kind
    'surjective (generative)'
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise TypeError(f"Inverse: expected a Transform, got {type(transform).__name__}")
        self.transform = transform
        if type(self) is not Inverse:  # a message of the inner layer then names this one
            transform._turned_into = type(self).__name__

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return self.transform.bijective

    @property
    def stochastic_forward(self) -> bool:  # type: ignore[override]
        return self.transform.stochastic_inverse

    @property
    def stochastic_inverse(self) -> bool:  # type: ignore[override]
        return self.transform.stochastic_forward

    @property
    def conditional(self) -> bool:
        return self.transform.conditional

    @property
    def estimated(self) -> bool:  # type: ignore[override]
        return self.transform.estimated

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return self.transform.compiles

    @property
    def why_not_compiled(self) -> str:  # type: ignore[override]
        return self.transform.why_not_compiled

    @property
    def event_shape(self) -> tuple[int | None, ...] | None:  # type: ignore[override]
        return self.transform._shape_of_latent()

    @property
    def latent_shape(self) -> tuple[int | None, ...] | None:  # type: ignore[override]
        return self.transform.event_shape

    def _shape_of_latent(self) -> tuple[int | None, ...] | None:
        return self.transform.event_shape

    @property
    def integer_data(self) -> bool:  # type: ignore[override]
        return self.transform.integer_latent

    @property
    def integer_latent(self) -> bool:  # type: ignore[override]
        return self.transform.integer_data

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        return self.transform.reversible

    def unfold(self, turned: bool = False) -> Iterator[tuple[Transform, bool]]:
        if type(self) is Inverse:
            yield from self.transform.unfold(not turned)
        else:  # a class of its own may add to the layer that it turns round
            yield self, turned

    def summed(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        if self.stochastic_forward:
            return self.transform.summed_inverse(x, tail, rule)
        return super().summed(x, tail, rule)

    def summed_inverse(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        return self.transform.summed(x, tail, rule)

    @property
    def label(self) -> str:
        name = type(self).__name__
        return f"Inverse({self.transform.label})" if name == "Inverse" else name

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, ldj = self.transform.inverse_and_ldj(x, context)
        return z, -ldj

    def _forward_samples(
        self, x: Tensor, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        z, ldj = self.transform.inverse_and_ldj_samples(x, context, num_samples)
        return z, -ldj

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.transform.latent(z, context)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, ldj = self.transform(z, context)
        return x, -ldj

    def _inverse_and_ldj_samples(
        self, z: Tensor, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        x, ldj = self.transform.forward_samples(z, context, num_samples)
        return x, -ldj

    @classmethod
    def example(cls) -> Example:
        from surflow.distributions import DiagonalNormal, StandardNormal
        from surflow.transforms.bijections.affine import Affine

        wide = DiagonalNormal((3,), scale=[3.0, 1.5, 2.0])
        affine = Affine((3,), shift=[0.5, -1.0, 0.0], scale=[2.0, 0.5, -1.5])
        return Example(cls(affine), wide.sample_and_log_prob, StandardNormal((3,)))
