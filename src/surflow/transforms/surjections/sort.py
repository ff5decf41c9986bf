"""The sorting surjection, in both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surflow.checks import require
from surflow.distributions import DiagonalNormal, OrderStatistics, StandardNormal
from surflow.distributions.base import as_shape
from surflow.distributions.order import (
    draw_order,
    feature_index,
    inverse_order,
    permuted,
    score_order,
)
from surflow.nets import MLP
from surflow.numeric import working_dtype
from surflow.score_function import record_score
from surflow.transforms.base import Example, Surjection, Transform, net_output
from surflow.transforms.bijections.ordered import OrderedToReal
from surflow.transforms.inverse import _InverseOf


class SortInference(Surjection):
    r"""The inference surjection z = sort(x), ascending, with a distribution of the order.

    .. math:: z = \mathrm{sort}(x), \quad x_i = z_{\sigma_i},\ \sigma \sim p(\sigma \mid z), \qquad
              V = \log p(\sigma \mid z)

    Exact. :math:`\sigma_i` is the rank of :math:`x_i`. Uniform orders give V = -log N!, and a model
    in which the elements are exchangeable; else p is Plackett-Luce: the places of x are filled one
    by one, the element of rank k with a weight :math:`e^{\ell_k(z)}` among those left. Elements are
    sorted along dimension 1; where they are vectors, whole, by one feature. The base must live on
    sorted z. Of equal elements the first counts as the lower.

    Args:
        event_shape: the shape of x, (N, *rest).
        by: the feature to sort by, an index into ``rest``; the first if left out.
        learn: whether the orders have learned logits, (N,), one for each rank.
        net: maps z (and the context, if it has ``context_features``) to logits, (B, N).

    Raises:
        ValueError: for an index that does not point at one feature, a net whose output has a
            wrong shape, or, from ``inverse``, a z that is not sorted.

    Cost: O(N log N) a row in both directions, and a pass of the net.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Tables 6, 7.

    >>> layer = SortInference((3,))
    >>> z, ldj = layer(torch.tensor([[0.3, -1.0, 2.0]]))
    >>> z, ldj  # -log 3!
    (tensor([[-1.0000,  0.3000,  2.0000]]), tensor([-1.7918]))
    """

    constraint = "the latents are sorted"

    def __init__(
        self,
        event_shape: int | Sequence[int],
        by: int | Sequence[int] | None = None,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        self.num_elements = self.event_shape[0]
        self.by = feature_index(by, self.event_shape[1:], type(self).__name__)
        self.net = net
        free = learn and net is None
        self.logits = nn.Parameter(torch.zeros(self.num_elements)) if free else None

    def _key(self, x: Tensor) -> Tensor:
        return x[(slice(None), slice(None), *self.by)]

    def _order_logits(self, z: Tensor, context: Tensor | None) -> Tensor | None:
        """Logits of the ranks, broadcastable to (B, N); None for uniform orders."""
        if self.net is not None:
            return net_output(self.net, z, context, (z.shape[0], self.num_elements))
        return None if self.logits is None else self.logits.to(working_dtype(z))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        order = torch.sort(self._key(x), dim=1, stable=True).indices
        z = permuted(x, order)
        logits = self._order_logits(z, context)
        return z, score_order(logits, inverse_order(order), z)

    def _draw(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        key = self._key(z)
        require(
            key[:, 1:] >= key[:, :-1], "elements in ascending order along dimension 1", key[:, 1:]
        )
        logits = self._order_logits(z, context)
        ranks = draw_order(logits, z)
        return permuted(z, ranks), ranks, logits

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._draw(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        # scored by the order that was drawn, which among ties x no longer shows
        x, ranks, logits = self._draw(z, context)
        log_probability = score_order(logits, ranks, z)
        record_score(log_probability)
        return x, log_probability

    def onto_space(self) -> Transform:
        return OrderedToReal()

    @classmethod
    def example(cls) -> Example:
        transform = cls((3,), net=MLP(3, 3, [8], "tanh", context_features=1))
        sample, base = DiagonalNormal((3,), scale=1.3), OrderStatistics(StandardNormal((3,)))
        return Example(transform, sample, base, context=1)


class SortGenerative(_InverseOf):
    r"""The generative surjection x = sort(z): inference draws the order that sorting forgets.

    .. math:: x = \mathrm{sort}(z), \quad z_i = x_{\sigma_i},\ \sigma \sim q(\sigma \mid x), \qquad
              V = -\log q(\sigma \mid x)

    A lower bound: forward is stochastic. For data that come sorted; it is the other direction of
    :class:`SortInference`. Uniform orders are tight if an exchangeable model follows. A drawn order
    has no pathwise gradient: the objectives add the score-function gradient of q.

    Args:
        event_shape, by, learn, net: see :class:`SortInference`; the net sees x.

    Raises:
        ValueError: as :class:`SortInference`; from ``forward``, for an x that is not sorted.

    Cost: O(N log N) a row in both directions, and a pass of the net.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Tables 6, 7.

    >>> layer = SortGenerative((2,))
    >>> layer.inverse(torch.tensor([[3.0, 1.0]]))
    tensor([[1., 3.]])
    """

    of = SortInference

    @classmethod
    def example(cls) -> Example:
        transform = cls((3,), learn=True)
        with torch.no_grad():
            transform.transform.logits.copy_(torch.tensor([0.4, -0.2, 0.1]))
        sample = OrderStatistics(DiagonalNormal((3,), scale=1.4))
        return Example(transform, sample, DiagonalNormal((3,), [0.3, 0.0, -0.2], [0.8, 1.0, 0.9]))
