"""Layers one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surflow.distributions import DiagonalNormal, HalfNormal
from surflow.latents import Tape
from surflow.numeric import repeat_rows
from surflow.transforms.base import Box, Example, Transform, zero_ldj
from surflow.transforms.bijections.affine import Affine
from surflow.transforms.bijections.elementwise import Softplus
from surflow.transforms.surjections.abs import AbsInference


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

    >>> from surflow.transforms import Inverse
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
                what = type(t).__name__
                raise TypeError(f"Sequential: layer {i} must be a Transform, got {what}")
        self.transforms = nn.ModuleList(transforms)

    def __len__(self) -> int:
        return len(self.transforms)

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.transforms)

    def __getitem__(self, index: int) -> Transform:
        return self.transforms[index]

    bijective = property(lambda self: all(t.bijective for t in self.transforms))
    stochastic_forward = property(lambda self: any(t.stochastic_forward for t in self.transforms))
    stochastic_inverse = property(lambda self: any(t.stochastic_inverse for t in self.transforms))
    conditional = property(lambda self: any(t.conditional for t in self.transforms))
    compiles = property(lambda self: all(t.compiles for t in self.transforms))
    estimated = property(lambda self: any(t.estimated for t in self.transforms))

    event_shape = property(lambda self: self.transforms[0].event_shape if len(self) else None)
    latent_shape = property(lambda self: self._shape_of_latent())
    integer_data = property(lambda self: self.transforms[0].integer_data if len(self) else False)
    integer_latent = property(
        lambda self: self.transforms[-1].integer_latent if len(self) else False
    )

    @property
    def why_not_compiled(self) -> str:  # type: ignore[override]
        return "; ".join(
            f"{t.label}: {t.why_not_compiled}" for t in self.transforms if not t.compiles
        )

    def _shape_of_latent(self) -> tuple[int | None, ...] | None:
        # the last layer's own: where that takes any shape, the first layer's says nothing of z
        return self.transforms[-1]._shape_of_latent() if len(self) else None

    def _run(
        self,
        layers: Sequence[Transform],
        x: Tensor,
        context: Tensor | None,
        turned: bool = False,
        scored: bool = True,
        ldj: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output of ``layers``, from z to x where ``turned``, and their contributions added to
        ``ldj`` where ``scored``."""
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
        first = Affine((2,), shift=[0.3, -0.2], scale=[1.5, 0.7])
        last = Affine((2,), shift=-0.6931471805599453)
        layers = [first, AbsInference((2,), probability=0.3), Softplus(), last]
        return Example(cls(layers), DiagonalNormal((2,), scale=2.0), HalfNormal((2,)))
