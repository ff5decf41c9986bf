"""A choice among bijections: discretely indexed flows and deep Gaussian mixtures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import Distribution
from surflow.distributions.discrete import Categorical
from surflow.nets import MLP
from surflow.transforms.base import Example, Tail, Transform
from surflow.transforms.bijections.affine import Affine


class DiscretelyIndexed(Transform):
    r"""A layer that chooses one of K bijections: generation by w(k|z), inference by q(k|x).

    .. math:: k \sim q(k \mid x),\ z = T_k(x); \quad k \sim w(k \mid z),\ x = T_k^{-1}(z), \qquad
              V = \log w(k \mid z) + \log |\det T_k'(x)| - \log q(k \mid x)

    A lower bound. With affine T_k and weights that do not depend on z, layers of it over a normal
    are a deep Gaussian mixture; with weights that do, a discretely indexed flow. The likelihood
    itself is a sum over k: see :func:`surflow.evaluation.marginal.marginal_log_prob`.

    Args:
        transforms: T_1 ... T_K, bijections of the same event.
        gate: w, a :class:`Categorical` over K of event shape (1,); its net, if any, takes z.
        encoder: q, a :class:`Categorical` over K of event shape (1,); its net, if any, takes x.

    Raises:
        ValueError: for fewer than two transforms, one that is not a bijection or reads a context,
            or a gate or encoder over another number of classes.

    Cost: K times a component's forward in inference, K times its inverse in generation.
    Source: Duan 2019, arXiv 1904.05243 and Orozco et al. 2022, arXiv 2204.01361 (discretely indexed
    flows); van den Oord & Schrauwen 2014 (deep mixtures); Nielsen et al. 2020, arXiv 2007.02731,
    Table 3.

    >>> DiscretelyIndexed(
    ...     [Affine(2, -1.0), Affine(2, 1.0)], Categorical(1, 2), Categorical(1, 2)
    ... ).kind
    'stochastic'
    """

    bijective = False
    stochastic_forward = True
    stochastic_inverse = True

    def __init__(
        self, transforms: Sequence[Transform], gate: Categorical, encoder: Categorical
    ) -> None:
        super().__init__()
        transforms = list(transforms)
        if len(transforms) < 2:
            raise ValueError(
                f"DiscretelyIndexed: expected two transforms or more, got {len(transforms)}"
            )
        for t in transforms:
            if not isinstance(t, Transform) or not t.bijective or t.conditional:
                raise ValueError(
                    "DiscretelyIndexed: expected bijections that read no context, got "
                    f"{getattr(t, 'label', type(t).__name__)}"
                )
        for name, part in (("gate", gate), ("encoder", encoder)):
            fits = isinstance(part, Categorical) and part.event_shape == (1,)
            if not fits or part.num_classes != len(transforms):
                raise ValueError(
                    f"DiscretelyIndexed: expected as {name} a Categorical of event shape (1,) over "
                    f"{len(transforms)} classes, got {part}"
                )
        self.transforms = nn.ModuleList(transforms)
        self.gate, self.encoder = gate, encoder
        self.event_shape = transforms[0].event_shape
        self.latent_shape = transforms[0].latent_shape

    conditional = False  # gate and encoder are conditioned on z and x, not on the flow's context

    @staticmethod
    def _given(part: Distribution, value: Tensor) -> Tensor | None:
        return value if part.conditional else None

    @staticmethod
    def _pick(values: Tensor, index: Tensor) -> Tensor:
        """(K, B, ...) and (B, 1) -> (B, ...): each row's own component."""
        rows = torch.arange(index.shape[0], device=index.device)
        return values[index.squeeze(1), rows]

    def components(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All T_k(x), (K, B, *event), and their log-determinants, (K, B)."""
        parts = [t(x) for t in self.transforms]
        return torch.stack([z for z, _ in parts]), torch.stack([ldj for _, ldj in parts])

    def _draw_index(self, part: Categorical, value: Tensor) -> tuple[Tensor, Tensor]:
        return part.sample_and_log_prob(value.shape[0], self._given(part, value))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        index, log_q = self._draw_index(self.encoder, x)
        z, ldj = (self._pick(part, index) for part in self.components(x))
        return z, self.gate.log_prob(index, self._given(self.gate, z)) + ldj - log_q

    def _generate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index, log_w = self._draw_index(self.gate, z)
        return self._pick(torch.stack([t.inverse(z) for t in self.transforms]), index), index, log_w

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._generate(z)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, index, log_w = self._generate(z)
        ldj = self._pick(self.components(x)[1], index)
        return x, log_w + ldj - self.encoder.log_prob(index, self._given(self.encoder, x))

    def summed(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        rule.say(f"enumeration of {len(self.transforms)} components")
        parts = []
        for k, (z, ldj) in enumerate(t(x) for t in self.transforms):
            index = torch.full((len(x), 1), k, device=x.device)
            parts.append(tail(z) + ldj + self.gate.log_prob(index, self._given(self.gate, z)))
        return torch.logsumexp(torch.stack(parts), 0)

    @classmethod
    def example(cls) -> Example:
        transforms = [
            Affine((2,), shift, scale, learn=True)
            for shift, scale in (([0.5, 0.0], 1.2), ([-0.4, 0.3], [0.9, -1.1]), ([0.0, -0.5], 0.8))
        ]
        gate, encoder = (Categorical((1,), 3, net=MLP(2, 3, [8], "tanh")) for _ in range(2))
        sample = DiagonalNormal((2,), scale=2.2)
        return Example(cls(transforms, gate, encoder), sample, StandardNormal((2,)))
