"""The contract of a transform.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surflow.checks import InputError, require_at_least
from surflow.distributions.base import Distribution
from surflow.latents import Tape
from surflow.numeric import at_least_float32, repeat_rows, working_dtype

Box = tuple[list[float], list[float]]
"""Lower and upper edges of each coordinate, infinite where there are none."""

Sampler = Callable[[int], tuple[Tensor, Tensor]]
"""n -> draws (n, *event) and their log-densities (n,), nats."""

Tail = Callable[[Tensor], Tensor]
"""log p of what comes out of a layer: (B, *latent) -> (B,)."""


def zero_ldj(x: Tensor) -> Tensor:
    """A contribution of zero, (B,), float32 or better."""
    return torch.zeros(x.shape[0], device=x.device, dtype=working_dtype(x))


def require_size(x: Tensor, size: int, dim: int = 1) -> None:
    """Raise an error unless x has this size along a dimension."""
    if x.dim() <= dim or x.shape[dim] != size:
        raise InputError(f"expected size {size} along dimension {dim}, got shape {tuple(x.shape)}")


def require_dim(x: Tensor, dim: int) -> None:
    """Raise an error for an x without this dimension."""
    if x.dim() <= dim:
        raise InputError(f"expected a dimension {dim}, got shape {tuple(x.shape)}")


def takes_context(module: nn.Module | None) -> bool:
    """Whether a net reads the context: it says so with ``context_features > 0``."""
    return bool(getattr(module, "context_features", 0))


def run_net(net: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Evaluate ``net`` on ``x``, and on the context if it takes one."""
    features = getattr(net, "in_features", None)
    if isinstance(features, int) and x.dim() == 2 and x.shape[1] != features:
        raise InputError(f"expected {features} features for the net, got shape {tuple(x.shape)}")
    if not takes_context(net):
        return net(x)
    require_context(context, net.context_features)
    if context.dim() < 2 or context.shape[1] != net.context_features:
        raise InputError(
            f"expected a context with {net.context_features} features, "
            f"got shape {tuple(context.shape)}"
        )
    return net(x, context)


def require_context(context: Tensor | None, features: int) -> None:
    """Raise an error for a missing context where ``features`` of it are read."""
    if features and context is None:
        raise InputError(f"expected a context with {features} features, got none")


def require_output(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The output of a net, if it has this shape."""
    if tuple(out.shape) != shape:
        raise InputError(f"expected the net to give shape {shape}, got {tuple(out.shape)}")
    return out


def net_output(
    net: nn.Module, value: Tensor, context: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """The net's output on ``value``, of this shape (batch included), float32 or better."""
    return require_output(run_net(net, value, context), shape).to(working_dtype(value))


def output_of_context(net: nn.Module, context: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The output of a net that sees the context alone."""
    if context is None:
        raise InputError("expected a context, got none")
    return require_output(net(context), shape)


@dataclass
class Example:
    """A small instance with what is needed to prove it.

    Attributes:
        transform: the instance.
        sample: a density r that covers the support of the model: a distribution or a sampler.
        base: a distribution with ``log_prob``, supported on the codomain of ``forward``.
        context: ``context(n)`` draws a context for n rows, or an int F: (n, F) normals; None for an
            unconditional instance.
        latent: ``latent(n)`` draws points z of the codomain for the round trip that starts there;
            None: ``base.sample(n)``.
    """

    transform: Transform
    sample: Distribution | Sampler
    base: Any
    context: Callable[[int], Tensor] | int | None = None
    latent: Callable[[int], Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.context, int):
            features = self.context
            self.context = lambda n: torch.randn(n, features)
        if isinstance(self.sample, Distribution):
            self.sample = self.sample.sample_and_log_prob


class Transform(nn.Module, ABC):
    """One layer of a SurVAE flow.

    A subclass declares three booleans and implements :meth:`_forward`, :meth:`_inverse` and
    :meth:`example`, such that

    * with base density p the expectation of exp(log p(z) + ldj) over z is the density of x;
    * a row of the result depends on that row of the input only;
    * a layer with a stochastic forward also implements :meth:`_inverse_and_ldj`, which scores the
      pair (x, z) that it generates, which :class:`Inverse` needs.

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
        estimated: the contribution is a random, unbiased estimate of V(x, z), here or in a part of
            this layer. The number is then neither exact nor a bound.
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
        flags = ("bijective", "stochastic_forward", "stochastic_inverse")
        missing = [flag for flag in flags if not hasattr(cls, flag)]
        if missing:
            raise TypeError(f"{cls.__name__} must declare {', '.join(missing)}")

    @classmethod
    def _several_as_one(cls, several: str, one: str) -> None:
        """Drop a parent's ``several`` where a class has overridden ``one``, which it repeats."""
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
        return x, self.forward(x, context)[1]  # not _forward: its errors name the method

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
        """The layers in the order in which they run, each with whether it runs from z to x.

        Nested sequences and inverses are unfolded.
        """
        yield self, turned

    def image(self, low: Sequence[float], high: Sequence[float]) -> Box:
        """The box in which latents lie for data in the box low ... high: the whole space."""
        return [-math.inf] * len(low), [math.inf] * len(high)

    def onto_space(self) -> Transform | None:
        """A bijection of the latents onto the whole space, where their box does not tell it."""
        return None

    def infer(self, x: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        """z, with what generation would draw (if anything) written on the tape."""
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
        """log p(x), (B,), nats, with what inference draws summed or integrated out.

        Args:
            x: (B, *event).
            tail: log p of latents.
            rule: how to integrate: a :class:`surflow.evaluation.marginal.Rule`.
        """
        if self.stochastic_forward:
            raise ValueError(f"marginal_log_prob: does not know how to sum out {self.label}")
        z, ldj = self(x)
        return tail(z) + ldj

    def summed_inverse(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        """:meth:`summed` of the other direction, for a layer that generates by a draw."""
        name = self._turned_into or f"Inverse({self.label})"
        raise ValueError(f"marginal_log_prob: does not know how to sum out {name}")

    def retrace(
        self, value: Tensor, context: Tensor | None, turned: bool
    ) -> tuple[tuple[Tensor, ...], Callable[..., Tensor], Tensor, Tensor]:
        """From an output (z, or x where ``turned``), the input and the graph that leads back.

        For a backward pass that kept the output only; to be called with gradients enabled.

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
            z (B, *latent), and V(x, z), (B,), nats, float32 or better.

        Raises:
            ValueError: for a wrong shape, dtype or value.
        """
        z, ldj = self._call("forward", self._forward, x, context)
        return z, at_least_float32(ldj)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Generate data from a latent: (B, *latent) -> (B, *event)."""
        return self._call("inverse", self._inverse, z, context)

    def latent(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latent of ``forward`` without its contribution: (B, *event) -> (B, *latent)."""
        return self._call("forward", self._latent, x, context)

    def inverse_and_ldj(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Generate x and score the pair: x (B, *event) and V(x, z), (B,), nats."""
        x, ldj = self._call("inverse", self._inverse_and_ldj, z, context)
        return x, at_least_float32(ldj)

    def forward_samples(
        self, x: Tensor, context: Tensor | None = None, num_samples: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Infer several latents of each row: ``forward`` of the rows repeated, draw for draw.

        What does not depend on a draw (deterministic layers before the first stochastic one, the
        embedding of a dequantizer's context) is computed once a row. A layer with random estimates
        draws them for every sample.

        Returns:
            z (K B, *latent) and ldj (K B,), nats, K = num_samples; sample k of row b at k B + b.

        Raises:
            ValueError: as ``forward``, and for num_samples < 1.
        """
        require_at_least(self.where("forward"), 1, num_samples=num_samples)
        if num_samples == 1:
            return self(x, context)
        z, ldj = self._call("forward", self._forward_samples, x, context, num_samples)
        return z, at_least_float32(ldj)

    def inverse_and_ldj_samples(
        self, z: Tensor, context: Tensor | None = None, num_samples: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Generate several x of each latent, and score the pairs; see :meth:`forward_samples`."""
        require_at_least(self.where("inverse"), 1, num_samples=num_samples)
        if num_samples == 1:
            return self.inverse_and_ldj(z, context)
        x, ldj = self._call("inverse", self._inverse_and_ldj_samples, z, context, num_samples)
        return x, at_least_float32(ldj)

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
        return takes_context(self) or any(takes_context(m) for m in self.children())

    @property
    def label(self) -> str:
        """The short name of this layer in a ledger: the class's, unless one was set."""
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
        """The name of this layer and its method in an error message."""
        if self._turned_into is not None:
            method = {"forward": "inverse", "inverse": "forward"}.get(method, method)
            return f"{self._turned_into}.{method}"
        return f"{type(self).__name__}.{method}"

    def _call(
        self,
        direction: str,
        function: Callable[..., Any],
        value: Tensor,
        context: Tensor | None,
        *more: Any,
    ) -> Any:
        """Check the input, call ``function``, and add the layer's name to an error."""
        try:
            if direction == "forward":
                check_tensor(value, self.event_shape, self.integer_data)
            else:
                check_tensor(value, self._shape_of_latent(), self.integer_latent)
            check_context(context, value.shape[0])
            return function(value, context, *more)
        except InputError as error:
            raise ValueError(f"{self.where(direction)}: {error}") from None

    def _shape_of_latent(self) -> tuple[int | None, ...] | None:
        """The shape that z must have; by default the shape of x."""
        return self.latent_shape or self.event_shape


class Bijection(Transform):
    """A layer that is deterministic in both directions, which undo each other."""

    bijective = True
    stochastic_forward = False
    stochastic_inverse = False


class Surjection(Transform):
    """An inference surjection: forward is deterministic, generation samples.

    :class:`~surflow.transforms.Inverse` turns it into a generative one.
    """

    bijective = False
    stochastic_forward = False
    stochastic_inverse = True


def check_tensor(value: Tensor, shape: tuple[int | None, ...] | None, integer: bool) -> None:
    """Raise an error unless ``value`` is (batch, *shape), of integers or floating-point."""
    if not isinstance(value, Tensor):
        raise InputError(f"expected a tensor, got {type(value).__name__}")
    if integer == value.is_floating_point() or value.is_complex():
        wanted = "an integer tensor" if integer else "a floating-point tensor"
        raise InputError(f"expected {wanted}, got {value.dtype}")
    if value.dim() < 2:
        raise InputError(f"expected (batch, *event), got shape {tuple(value.shape)}")
    if shape is not None and not shapes_match(tuple(value.shape[1:]), shape):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise InputError(f"expected shape (batch, {wanted}), got {tuple(value.shape)}")


def check_context(context: Tensor | None, batch: int) -> None:
    """Raise an error unless ``context`` is None or a tensor of ``batch`` rows."""
    if context is None:
        return
    if not isinstance(context, Tensor):
        raise InputError(f"expected the context as a tensor, got {type(context).__name__}")
    if context.dim() < 1 or context.shape[0] != batch:
        raise InputError(f"expected a context of {batch} rows, got shape {tuple(context.shape)}")


def kind_of(bijective: bool, stochastic_forward: bool, stochastic_inverse: bool) -> str:
    """The name of a kind from its three flags."""
    if bijective:
        return "bijective"
    if stochastic_forward:
        return "stochastic" if stochastic_inverse else "surjective (generative)"
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


def generated_by(
    transform: Transform, base: Distribution
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A sampler for :class:`Example`: what the layer generates from a base, with its density."""

    def sample(n: int) -> tuple[Tensor, Tensor]:
        z, log_r = base.sample_and_log_prob(n)
        x, ldj = transform.inverse_and_ldj(z)
        return x, log_r + ldj

    return sample
