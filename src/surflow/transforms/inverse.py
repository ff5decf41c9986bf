"""A layer in its other direction."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.transforms.base import Example, Tail, Transform
from surflow.transforms.bijections.affine import Affine


class Inverse(Transform):
    r"""A transform in its other direction: its forward is the other's inverse.

    .. math:: V_{\mathrm{inv}}(x, z) = -V(z, x)

    An inference surjection, V = log p(x|z), becomes the generative surjection with the same
    right-inverse, -log q(z|x), and the other way round; a stochastic layer swaps its two parts.

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

    bijective = property(lambda self: self.transform.bijective)
    stochastic_forward = property(lambda self: self.transform.stochastic_inverse)
    stochastic_inverse = property(lambda self: self.transform.stochastic_forward)
    conditional = property(lambda self: self.transform.conditional)
    estimated = property(lambda self: self.transform.estimated)
    compiles = property(lambda self: self.transform.compiles)
    why_not_compiled = property(lambda self: self.transform.why_not_compiled)
    event_shape = property(lambda self: self.transform._shape_of_latent())
    latent_shape = property(lambda self: self.transform.event_shape)
    integer_data = property(lambda self: self.transform.integer_latent)
    integer_latent = property(lambda self: self.transform.integer_data)
    reversible = property(lambda self: self.transform.reversible)

    def _shape_of_latent(self) -> tuple[int | None, ...] | None:
        return self.transform.event_shape

    @property
    def label(self) -> str:
        name = type(self).__name__
        return f"Inverse({self.transform.label})" if name == "Inverse" else name

    def unfold(self, turned: bool = False) -> Iterator[tuple[Transform, bool]]:
        if type(self) is Inverse:
            yield from self.transform.unfold(not turned)
        else:  # a subclass may add to the layer
            yield self, turned

    def summed(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        if self.stochastic_forward:
            return self.transform.summed_inverse(x, tail, rule)
        return super().summed(x, tail, rule)

    def summed_inverse(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        return self.transform.summed(x, tail, rule)

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
        affine = Affine((3,), shift=[0.5, -1.0, 0.0], scale=[2.0, 0.5, -1.5])
        return Example(
            cls(affine), DiagonalNormal((3,), scale=[3.0, 1.5, 2.0]), StandardNormal((3,))
        )


def _options(construct: Callable[..., None]) -> list[inspect.Parameter]:
    parameters = inspect.signature(construct).parameters.values()
    return [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


class _InverseOf(Inverse):
    """The other direction of one class of layers, made from that class's arguments.

    The constructor has the signature of that class, from which options in a config are known; an
    ``__init__`` may rename the first arguments.
    """

    of: ClassVar[type[Transform]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "of" not in vars(cls):
            return
        construct = cls.__init__
        own, of = _options(construct), _options(cls.of.__init__)

        @functools.wraps(construct)
        def __init__(self: _InverseOf, *arguments: Any, **options: Any) -> None:
            construct(self, *arguments, **options)

        __init__.__signature__ = inspect.Signature([*own, *of[len(own) :]])
        cls.__init__ = __init__

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(self.of(*arguments, **options))
