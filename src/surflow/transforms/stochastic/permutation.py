"""A random permutation as a stochastic layer."""

import torch
from torch import Tensor, nn

from surflow.checks import InputError, require_at_least
from surflow.distributions import DiagonalNormal
from surflow.distributions.order import draw_order, inverse_order, permuted, score_order
from surflow.nets import MLP
from surflow.numeric import working_dtype
from surflow.score_function import record_score
from surflow.transforms.base import Example, Transform, net_output, zero_ldj


class StochasticPermutation(Transform):
    r"""Elements along dimension 1 in a random order, in both directions.

    .. math:: z_i = x_{\tau_i},\ \tau \sim q(\tau \mid x), \qquad
              x_i = z_{\sigma_i},\ \sigma \sim p(\sigma \mid z), \qquad
              V = \log p(\tau^{-1} \mid z) - \log q(\tau \mid x)

    A lower bound. With uniform orders V = 0 and any model that
    follows becomes exchangeable. Learned orders are Plackett-Luce: places are filled one by one, an
    element with a weight :math:`e^{\ell}` among those left. V scores the permutation that was drawn
    and its inverse; for distinct elements that is the only one that leads from x to z, and elements
    that coincide have measure zero. A drawn order has no pathwise gradient: the objectives add the
    score-function gradient of q.

    Args:
        num_elements: N; needed where orders are learned.
        learn: whether both p and q have learned logits, (N,), unless they have a net.
        encoder_net: maps x (and the context, if it has ``context_features``) to the logits of q,
            (B, N).
        decoder_net: maps z (and the context) to the logits of p, (B, N).

    Raises:
        ValueError: for learned orders of an unknown number of elements, x or z of another number,
            or a net whose output has a wrong shape.

    Cost: O(N log N) a row in both directions, and a pass of both nets where V is computed.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 5 (exchangeable data) and Table 7.

    >>> layer = StochasticPermutation()
    >>> z, ldj = layer(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> z.sort().values, ldj
    (tensor([[1., 2., 3.]]), tensor([0.]))
    """

    bijective = False
    stochastic_forward = True
    stochastic_inverse = True

    def __init__(
        self,
        num_elements: int | None = None,
        learn: bool = False,
        encoder_net: nn.Module | None = None,
        decoder_net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.learned = learn or encoder_net is not None or decoder_net is not None
        if num_elements is None and self.learned:
            raise ValueError("StochasticPermutation: expected num_elements for learned orders")
        if num_elements is not None:
            require_at_least("StochasticPermutation", 1, num_elements=num_elements)
        self.num_elements = num_elements
        self.encoder_net, self.decoder_net = encoder_net, decoder_net
        for name, net in (("encoder_logits", encoder_net), ("decoder_logits", decoder_net)):
            free = learn and net is None
            setattr(self, name, nn.Parameter(torch.zeros(num_elements)) if free else None)

    def _check(self, value: Tensor, context: Tensor | None) -> None:
        if context is None and self.conditional:  # even where this direction has no use for it
            raise InputError("expected a context, got none")
        if self.num_elements is not None and value.shape[1] != self.num_elements:
            raise InputError(
                f"expected {self.num_elements} elements along dimension 1, "
                f"got shape {tuple(value.shape)}"
            )

    @staticmethod
    def _logits(
        net: nn.Module | None, free: Tensor | None, value: Tensor, context: Tensor | None
    ) -> Tensor | None:
        if net is not None:
            return net_output(net, value, context, tuple(value.shape[:2]))
        return None if free is None else free.to(working_dtype(value))

    def _draw(self, logits: Tensor | None, value: Tensor) -> Tensor:
        return draw_order(logits, value)

    def _q(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        return self._logits(self.encoder_net, self.encoder_logits, x, context)

    def _p(self, z: Tensor, context: Tensor | None) -> Tensor | None:
        return self._logits(self.decoder_net, self.decoder_logits, z, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        q = self._q(x, context)
        order = self._draw(q, x)
        z = permuted(x, order)
        if not self.learned:
            return z, zero_ldj(x)
        p = self._p(z, context)
        log_q = score_order(q, order, x)
        record_score(log_q)
        return z, score_order(p, inverse_order(order), z) - log_q

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        self._check(z, context)
        return permuted(z, self._draw(self._p(z, context), z))

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        self._check(z, context)
        p = self._p(z, context)
        order = self._draw(p, z)
        x = permuted(z, order)
        if not self.learned:
            return x, zero_ldj(z)
        q = self._q(x, context)
        log_p = score_order(p, order, z)
        record_score(log_p)
        return x, log_p - score_order(q, inverse_order(order), x)

    @classmethod
    def example(cls) -> Example:
        transform = cls(3, True, MLP(3, 3, [8], "tanh", context_features=1), MLP(3, 3, [8], "tanh"))
        sample = DiagonalNormal((3,), scale=1.4)
        base = DiagonalNormal((3,), [0.4, -0.4, 0.0], [0.9, 1.0, 0.8])
        return Example(transform, sample, base, context=1)
