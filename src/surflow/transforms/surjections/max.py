"""The max surjection, in both directions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require
from surflow.distributions import DiagonalNormal, Exponential
from surflow.distributions.base import Distribution, as_shape, sum_event
from surflow.distributions.location_scale import HalfNormal
from surflow.latents import Tape
from surflow.nets import MLP
from surflow.numeric import working_dtype
from surflow.score_function import record_score
from surflow.transforms.base import Example, Surjection, generated_by, net_output, zero_ldj
from surflow.transforms.inverse import _InverseOf


def remove_one(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Leave out the element ``index`` along ``dim``: (..., K, ...) -> (..., K - 1, ...)."""
    k = values.shape[dim] - 1
    place = torch.arange(k, device=values.device).view(k, *[1] * (values.dim() - dim - 1))
    return torch.where(place < index, values.narrow(dim, 0, k), values.narrow(dim, 1, k))


def insert_one(value: Tensor, others: Tensor, index: Tensor, dim: int) -> Tensor:
    """Undo :func:`remove_one`: put ``value`` at ``index`` among the others."""
    k = others.shape[dim]
    place = torch.arange(k + 1, device=others.device).view(k + 1, *[1] * (others.dim() - dim - 1))
    before = torch.cat([others, others.narrow(dim, k - 1, 1)], dim)
    after = torch.cat([others.narrow(dim, 0, 1), others], dim)
    return torch.where(place == index, value, torch.where(place < index, before, after))


def _race(index: Tensor, log_p: Tensor, dim: int) -> Tensor:
    """Gumbel noise e with argmax(log p + e) = index along ``dim``, given that index.

    Source: Maddison et al. 2014, arXiv 1411.0030 (the top first, the others below it).
    """
    gumbel = -torch.empty_like(log_p).exponential_().log()
    top = -torch.empty_like(index, dtype=log_p.dtype).exponential_().log()
    below = -torch.logaddexp(-top, -(log_p + gumbel))
    return torch.scatter(below, dim, index, top) - log_p


class _Max(Surjection):
    """The max over K elements along ``dim`` of blocks into which a subclass cuts x."""

    dim: int

    def _setup(
        self,
        num_elements: int,
        logits_shape: tuple[int, ...],
        remainders_shape: tuple[int, ...],
        decoder: Distribution | None,
        differences: bool,
        learn: bool,
        net: nn.Module | None,
    ) -> None:
        name = type(self).__name__
        if decoder is None:
            if not differences:
                raise ValueError(f"{name}: expected a decoder of the values below the max")
            decoder = HalfNormal(remainders_shape, parameter_shape=[1] * len(remainders_shape))
        if not isinstance(decoder, Distribution):
            raise ValueError(f"{name}: expected a Distribution as decoder, got {decoder!r}")
        if decoder.event_shape != remainders_shape:
            raise ValueError(
                f"{name}: expected a decoder of shape {remainders_shape}, got {decoder.event_shape}"
            )
        self.num_elements = num_elements
        self.logits_shape = logits_shape
        self.decoder = decoder
        self.differences = differences
        self.net = net
        self.logits = nn.Parameter(torch.zeros(logits_shape)) if learn and net is None else None

    # What a subclass may write: how x is cut into blocks, and what the decoder and z are of them

    def _cut(self, x: Tensor) -> Tensor:
        """x as blocks, their K elements along ``dim``."""
        return x

    def _join(self, blocks: Tensor) -> Tensor:
        """Blocks as x."""
        return blocks

    def _pack(self, remainders: Tensor) -> Tensor:
        """K - 1 elements a block as an event of the decoder."""
        return remainders

    def _unpack(self, event: Tensor) -> Tensor:
        return event

    def _log_index(self, z: Tensor, context: Tensor | None) -> Tensor | None:
        """Log-probability of each of the K places, like blocks; None for uniform."""
        if self.net is not None:
            logits = net_output(self.net, z, context, (z.shape[0], *self.logits_shape))
        elif self.logits is not None:
            logits = self.logits.to(working_dtype(z)).unsqueeze(0)
        else:
            return None
        return F.log_softmax(self._blocks_of_logits(logits), dim=self.dim)

    def _blocks_of_logits(self, logits: Tensor) -> Tensor:
        return logits

    def _score_index(self, table: Tensor | None, index: Tensor, z: Tensor) -> Tensor:
        if table is None:
            return zero_ldj(z) - math.prod(z.shape[1:]) * math.log(self.num_elements)
        table = table.expand(index.shape[0], *table.shape[1:])
        return sum_event(table.gather(self.dim, index))

    def _squeeze(self, top: Tensor) -> Tensor:
        """Tops of blocks as z."""
        return top

    def _unsqueeze(self, z: Tensor) -> Tensor:
        return z

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        blocks = self._cut(x)
        top, index = blocks.max(self.dim, keepdim=True)
        z = self._squeeze(top)
        rest = remove_one(blocks, index, self.dim)
        event = self._pack(top - rest if self.differences else rest)
        ldj = self._score_index(self._log_index(z, context), index, z)
        return z, ldj + self.decoder.log_prob(event, z)

    def _draw(self, z: Tensor, event: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
        """x for z, given what the decoder drew; the places of the maxima."""
        top = self._unsqueeze(z)
        if table is None:
            index = torch.randint(self.num_elements, top.shape, device=z.device)
        else:
            u = torch.rand(top.shape, device=z.device, dtype=table.dtype)
            steps = table.detach().exp().cumsum(self.dim).narrow(self.dim, 0, self.num_elements - 1)
            index = (u >= steps).sum(self.dim, keepdim=True)
        rest = self._unpack(event.to(z.dtype))
        rest = top - rest if self.differences else rest
        slack = 8 * torch.finfo(z.dtype).eps * (1 + top.abs())  # for a decoder's rounding
        drawn = "a decoder whose draws lie at or below the max (how far above they lie)"
        require(rest <= top + slack, drawn, rest - top)
        return self._join(insert_one(top, rest, index, self.dim)), index

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        table = self._log_index(z, context)
        return self._draw(z, self.decoder.sample(z.shape[0], z), table)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        table = self._log_index(z, context)
        event, log_p = self.decoder.sample_and_log_prob(z.shape[0], z)
        x, index = self._draw(z, event, table)
        log_index = self._score_index(table, index, z)
        record_score(log_index)
        return x, log_index + log_p

    def _log_places(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Log-probability of each place of the max, (B, ...) like blocks."""
        table = self._call("inverse", self._log_index, z, context)
        top = self._unsqueeze(z)
        shape = [*top.shape]
        shape[self.dim] = self.num_elements
        if table is None:
            return torch.full(shape, -math.log(self.num_elements), dtype=z.dtype, device=z.device)
        return table.expand(shape).to(z.dtype)

    def infer(self, x: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        """z, with Gumbel noise that elects the place of the max, and the decoder's latents."""
        blocks = self._cut(x)
        top, index = blocks.max(self.dim, keepdim=True)
        z = self._squeeze(top)
        tape.write(_race(index, self._log_places(z, context), self.dim))
        rest = remove_one(blocks, index, self.dim)
        self.decoder.write(self._pack(top - rest if self.differences else rest), z, tape)
        return z

    def generate(self, z: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        rest = self._unpack(self.decoder.read(z, tape))
        top = self._unsqueeze(z)
        index = (self._log_places(z, context) + tape.read()).argmax(self.dim, keepdim=True)
        rest = (top - rest if self.differences else rest).to(z.dtype)
        return self._join(insert_one(top, rest, index, self.dim))


class MaxInference(_Max):
    r"""The inference surjection z = max(x) over dimension 1, with a model of all else.

    .. math:: z = \max_k x_k, \quad k \sim \mathrm{Cat}(\pi(z)),\ x_k = z,\
              x_{-k} \sim p(x_{-k} \mid z), \qquad
              V = \log \pi_k(z) + \log p(x_{-k} \mid z)

    Exact. The other K - 1 elements, in their order, come from ``decoder``: their distances
    z - x >= 0, or (with ``differences=False``) their values. Each position after dimension 1 has
    its own max and index. Of equal maxima the first counts.

    Args:
        event_shape: the shape of x, (K, *rest), K >= 2; z has (1, *rest).
        decoder: a distribution over (K - 1, *rest) on >= 0, such as :class:`Exponential`, or, for
            values, one kept below z, such as ``TruncatedNormal(..., high="context")``. A
            conditional one gets z as its context. Half-normal with scale 1 if left out.
        differences: whether the decoder is of z - x; else of x.
        learn: whether the index has learned logits, (K, *rest).
        net: maps z (and the context, if it has ``context_features``) to logits of the index,
            (B, K, *rest).

    Raises:
        ValueError: for K < 2, a decoder of a wrong shape, or a net whose output has a wrong shape.

    Cost: O(D) in both directions, and a pass of the net and of the decoder.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Tables 6, 7.

    >>> layer = MaxInference((3,))
    >>> layer(torch.tensor([[1.0, 4.0, 2.5]]))[0]
    tensor([[4.]])
    """

    dim = 1

    def __init__(
        self,
        event_shape: int | Sequence[int],
        decoder: Distribution | None = None,
        differences: bool = True,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        k, *rest = self.event_shape
        if k < 2:
            raise ValueError(f"{type(self).__name__}: expected K >= 2 elements, got {k}")
        self.latent_shape = (1, *rest)
        self._setup(k, self.event_shape, (k - 1, *rest), decoder, differences, learn, net)

    @classmethod
    def example(cls) -> Example:
        net = MLP(1, 3, [8], "tanh", context_features=1)
        decoder = Exponential((2,), net=MLP(1, 2, [8], "tanh"))
        with torch.no_grad():
            decoder.net.layers[-1].bias.copy_(torch.tensor([-0.3, -0.5]))
        base = DiagonalNormal((1,), 0.2, 0.8)
        # the same structure with wider parts: a normal max, exponentials below, any place
        same = cls((3,), Exponential((2,), 1.5))
        sample = generated_by(same, DiagonalNormal((1,), 0.2, 1.2))
        return Example(cls((3,), decoder, net=net), sample, base, context=1)


class MaxGenerative(_InverseOf):
    r"""The generative surjection x = max(z) over dimension 1: inference draws the rest.

    .. math:: x = \max_k z_k, \quad k \sim \mathrm{Cat}(\pi(x)),\ z_k = x,\
              z_{-k} \sim q(z_{-k} \mid x), \qquad
              V = -\log \pi_k(x) - \log q(z_{-k} \mid x)

    A lower bound; the decoder is the variational posterior of the elements below the max. A drawn
    index has no pathwise gradient: the objectives add its score-function gradient.

    Args:
        event_shape: the shape of z, (K, *rest); x has (1, *rest).
        decoder, differences, learn, net, and errors: see :class:`MaxInference`; nets see x.

    Cost: O(D) in both directions, and a pass of the net and of the decoder.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Tables 6, 7.

    >>> layer = MaxGenerative((3,))
    >>> layer.inverse(torch.tensor([[1.0, 4.0, 2.5]]))
    tensor([[4.]])
    """

    of = MaxInference

    @classmethod
    def example(cls) -> Example:
        transform = cls((3,), Exponential((2,), [1.5, 1.2], learn=True), learn=True)
        with torch.no_grad():
            transform.transform.logits.copy_(torch.tensor([0.3, -0.2, 0.1]))
        base = DiagonalNormal((3,), [0.0, 0.2, -0.1], [0.9, 1.0, 0.8])
        return Example(transform, DiagonalNormal((1,), 0.7, 1.2), base)
