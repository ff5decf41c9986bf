"""The VAE as a stochastic layer."""

from typing import Any

import torch
from torch import Tensor

from surflow.checks import require_at_least
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import Distribution
from surflow.latents import Tape
from surflow.nets import MLP
from surflow.numeric import repeat_rows
from surflow.transforms.base import Example, Tail, Transform
from surflow.transforms.conditioning import concatenate_context


class VAE(Transform):
    r"""A stochastic layer in both directions: encoder q(z|x), decoder p(x|z).

    .. math:: z \sim q(z \mid x), \quad x \sim p(x \mid z), \qquad
              V = \log p(x \mid z) - \log q(z \mid x)

    A lower bound: with a base p(z), the expectation of log p(z) + V over q is the ELBO.

    Args:
        encoder: q, a distribution of z whose net takes x; any, a
            :class:`~surflow.flow.FlowDistribution` too. A discrete one gets its gradient by the
            score function.
        decoder: p, a distribution of x whose net takes z. With one over integers, such as a
            categorical, x is an integer tensor.
        context_features: features F of the flow's context that encoder and decoder see too:
            their context is then (x, context) and (z, context), joined along dimension 1.

    Raises:
        ValueError: for an encoder or a decoder without a net, an x of a wrong shape, or a context
            that is missing.

    Cost: one pass of the encoder's net and one of the decoder's; generating alone takes the
    decoder's.
    Source: Kingma & Welling 2014, arXiv 1312.6114; as a layer, Nielsen et al. 2020, arXiv
    2007.02731, Sec. 2.

    >>> layer = VAE(DiagonalNormal(1, net=MLP(2, 2, [64])), DiagonalNormal(2, net=MLP(1, 4, [64])))
    >>> layer(torch.zeros(5, 2))[0].shape
    torch.Size([5, 1])
    """

    bijective = False
    stochastic_forward = True
    stochastic_inverse = True

    def __init__(
        self, encoder: Distribution, decoder: Distribution, context_features: int = 0
    ) -> None:
        super().__init__()
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(part, Distribution) or not part.conditional:
                raise ValueError(f"VAE: expected a conditional distribution as {name}, got {part}")
        require_at_least("VAE", 0, context_features=context_features)
        self.encoder, self.decoder, self.context_features = encoder, decoder, context_features
        self.event_shape = decoder.event_shape
        self.latent_shape = encoder.event_shape
        self.integer_data = decoder.integer
        self.integer_latent = encoder.integer

    def _given(self, seen: Tensor, context: Tensor | None) -> Tensor:
        return concatenate_context(seen, context, self.context_features)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, log_q = self.encoder.sample_and_log_prob(context=self._given(x, context))
        return z, self.decoder.log_prob(x, self._given(z, context)) - log_q

    def _forward_samples(
        self, x: Tensor, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        given = self._given(x, context)
        z, log_q = self.encoder.sample_and_log_prob(context=given, num_samples=num_samples)
        x, context = repeat_rows(x, num_samples), repeat_rows(context, num_samples)
        return z, self.decoder.log_prob(x, self._given(z, context)) - log_q

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.decoder.sample(context=self._given(z, context))

    def _latent(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.encoder.sample(context=self._given(x, context))

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        given = self._given(z, context)
        x, log_p = self.decoder.sample_and_log_prob(context=given)
        return x, log_p - self.encoder.log_prob(z, self._given(x, context))

    def infer(self, x: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        z = self.latent(x, context)
        self.decoder.write(x, self._given(z, context), tape)
        return z

    def generate(self, z: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        return self.decoder.read(self._call("inverse", self._given, z, context), tape)

    def summed(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        nodes, log_volume = rule.line(self.latent_shape, x, "a latent")
        log_prior = rule.once(lambda: tail(nodes) + log_volume)
        log_likelihood = self.decoder.pairwise(nodes)
        return rule.in_chunks(
            lambda part: torch.logsumexp(log_likelihood(part) + log_prior, 1), x, len(nodes)
        )

    @classmethod
    def example(cls) -> Example:
        encoder = DiagonalNormal((1,), net=MLP(2, 2, [8], "tanh"))
        decoder = DiagonalNormal((2,), net=MLP(1, 4, [8], "tanh"))
        with torch.no_grad():  # a wide encoder, so that importance weights stay bounded
            encoder.net.layers[-1].bias.copy_(torch.tensor([0.0, 0.4]))
        wide = DiagonalNormal((2,), scale=2.0)
        return Example(cls(encoder, decoder), wide, StandardNormal((1,)))
