"""The slicing surjection: dropping channels, and in the other direction augmenting with noise."""

from typing import Any

import torch
from torch import Tensor

from surflow.checks import require_at_least
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import Distribution
from surflow.latents import Tape
from surflow.nets import MLP
from surflow.numeric import repeat_rows
from surflow.transforms.base import Example, Surjection, Tail, require_context
from surflow.transforms.conditioning import check_distribution, concatenate_context, draw, score
from surflow.transforms.inverse import _InverseOf


class Slice(Surjection):
    r"""The inference surjection that keeps the first channels and lets a density give the others.

    .. math:: x = (x_1, x_2), \quad z = x_1, \quad x_2 \sim p(x_2 \mid z), \qquad
              V = \log p(x_2 \mid z)

    Exact. With an unconditional decoder it factors dimensions out, as a multi-scale flow does;
    with a decoder whose net takes z, the dropped channels follow the kept ones.

    Args:
        decoder: p, any density; its event shape is the shape of x2, (C - keep, ...). If it is
            conditional its context is z, (B, keep, ...).
        keep: how many channels z has, along ``dim``.
        dim: the dimension that is cut, counted with the batch as 0.
        context_features: features F of the flow's context that the decoder sees too: its context
            is then (z, context), joined along dimension 1; a context (B, F) is spread over the
            other dimensions.

    Raises:
        ValueError: for keep < 1, a dim that the decoder's event does not have, a decoder that is
            no density, or an x or z of a wrong shape.

    Cost: forward one log-density of the decoder, inverse one sample.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Tables 6, 7; as factoring out,
    Dinh et al. 2017, arXiv 1605.08803, Sec. 3.6.

    >>> halve = Slice(StandardNormal((2, 4, 4)), keep=2)  # images of 4 channels
    >>> z, ldj = halve(torch.zeros(1, 4, 4, 4))
    >>> tuple(z.shape), round(ldj.item(), 4)  # 32 dropped values at the mode of N(0, 1)
    ((1, 2, 4, 4), -29.406)
    """

    def __init__(
        self, decoder: Distribution, keep: int, dim: int = 1, context_features: int = 0
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_distribution(decoder, name, "decoder", context_features)
        if not 1 <= dim <= len(decoder.event_shape):
            raise ValueError(
                f"{name}: expected dim in 1 to {len(decoder.event_shape)} for a decoder of "
                f"events {decoder.event_shape}, got {dim}"
            )
        require_at_least(name, 1, keep=keep)
        self.decoder = decoder
        self.keep = keep
        self.dim = dim
        self.context_features = context_features
        before, after = decoder.event_shape[: dim - 1], decoder.event_shape[dim:]
        self.dropped = decoder.event_shape[dim - 1]
        self.event_shape = (*before, keep + self.dropped, *after)
        self.latent_shape = (*before, keep, *after)

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the dropped channels."""
        kept, rest = x.split([self.keep, self.dropped], dim=self.dim)
        return kept, rest

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, rest = self.cut(x)
        return z, score(self.decoder, rest, z, context, self.context_features)

    def _latent(self, x: Tensor, context: Tensor | None) -> Tensor:
        require_context(context, self.context_features)
        return x.narrow(self.dim, 0, self.keep)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._inverse_and_ldj(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse_and_ldj_samples(z, context, 1)

    def _inverse_and_ldj_samples(
        self, z: Tensor, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        rest, log_p = draw(self.decoder, z, context, self.context_features, num_samples)
        z = repeat_rows(z, num_samples)
        return torch.cat([z, rest.to(z.dtype)], dim=self.dim), log_p

    def _given(self, z: Tensor, context: Tensor | None) -> Tensor:
        """What the decoder is conditioned on."""
        return self._call("inverse", concatenate_context, z, context, self.context_features)

    def infer(self, x: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        z, rest = self.cut(x)
        self.decoder.write(rest, self._given(z, context), tape)
        return z

    def generate(self, z: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        rest = self.decoder.read(self._given(z, context), tape)
        return torch.cat([z, rest.to(z.dtype)], dim=self.dim)

    def summed_inverse(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        nodes, log_volume = rule.line(self.decoder.event_shape, x, "an added")
        count = len(nodes)

        def rows(part: Tensor) -> Tensor:
            added = nodes.repeat(len(part), *[1] * (nodes.dim() - 1))
            joint = torch.cat([part.repeat_interleave(count, 0), added], dim=self.dim)
            return torch.logsumexp(tail(joint).view(-1, count), 1) + log_volume

        return rule.in_chunks(rows, x, 32 * count)

    @classmethod
    def example(cls) -> Example:
        decoder = DiagonalNormal((1,), net=MLP(2 + 1, 2, [8], "tanh"))
        sample, base = DiagonalNormal((3,), scale=[1.3, 1.3, 2.0]), StandardNormal((2,))
        return Example(cls(decoder, keep=2, context_features=1), sample, base, context=1)


class Augment(_InverseOf):
    r"""The generative surjection that drops channels: inference draws them.

    .. math:: x = z_1, \quad z = (x, u),\ u \sim q(u \mid x), \qquad V = -\log q(u \mid x)

    A lower bound: forward is stochastic. It is the other direction of :class:`Slice`; flows on
    the joint space of x and u (augmented normalizing flows, VFlow) follow it.

    Args:
        encoder: q, any density; its event shape is the shape of u. If it is conditional its
            context is x.
        keep: how many channels x has, along ``dim``.
        dim, context_features, and errors: see :class:`Slice`.

    Cost: forward one sample of the encoder with its log-density, inverse O(1).
    Source: Nielsen et al. 2020, arXiv 2007.02731, Tables 3, 6; Huang et al. 2020, arXiv
    2002.07101, Sec. 3; Chen et al. 2020 (VFlow), arXiv 2002.09741, Sec. 3.

    >>> augment = Augment(StandardNormal(1), keep=2)
    >>> z, ldj = augment(torch.zeros(5, 2))
    >>> tuple(z.shape), tuple(augment.inverse(z).shape), augment.lower_bound
    ((5, 3), (5, 2), True)
    """

    of = Slice

    def __init__(self, encoder: Distribution, *arguments: Any, **options: Any) -> None:
        check_distribution(encoder, "Augment", "encoder", options.get("context_features", 0))
        super().__init__(encoder, *arguments, **options)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        # the cut alone: generation does not score the encoder
        require_context(context, self.transform.context_features)
        return self.transform.cut(z)[0]

    @classmethod
    def example(cls) -> Example:
        encoder = DiagonalNormal((1,), net=MLP(2, 2, [8], "tanh"))
        with torch.no_grad():  # a wide encoder, so that importance weights stay bounded
            encoder.net.layers[-1].bias.copy_(torch.tensor([0.1, 0.4]))
        wide = DiagonalNormal((2,), scale=1.5)
        return Example(cls(encoder, keep=2), wide, StandardNormal((3,)))
