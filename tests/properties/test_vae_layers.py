"""The VAE layer with encoders and decoders of every kind."""

import pytest
import torch
from torch import nn

from surflow.distributions import (
    Bernoulli,
    Categorical,
    DiagonalNormal,
    DiagonalNormalMixture,
    StandardNormal,
)
from surflow.flow import Flow, FlowDistribution
from surflow.nets import MLP
from surflow.proofs import CHECKS, double_precision
from surflow.transforms import VAE, AffineCoupling, Example, Inverse, Planar


def net(inputs: int, outputs: int) -> MLP:
    return MLP(inputs, outputs, [8], "tanh")


def wide_normal(latent: int, inputs: int) -> DiagonalNormal:
    """An encoder wider than the posterior, so that importance weights stay bounded."""
    encoder = DiagonalNormal(latent, net=net(inputs, 2 * latent))
    with torch.no_grad():
        encoder.net.layers[-1].bias[1::2] = 0.4
    return encoder


def with_context() -> Example:
    layer = VAE(wide_normal(1, 2 + 1), DiagonalNormal(2, net=net(1 + 1, 4)), context_features=1)
    wide = DiagonalNormal(2, scale=2.0)
    return Example(
        layer,
        wide.sample_and_log_prob,
        StandardNormal(1),
        context=lambda n: torch.randn(n, 1),
    )


class Planted(nn.Module):
    """Planar parameters w, u, b from a context, and small ones, so that the weights are bounded."""

    context_features = 0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = net(inputs, outputs)

    def forward(self, x):
        return 0.4 * self.net(x)


def flow_encoder() -> Example:
    """q(z|x): two amortised planar layers over a normal that depends on x too."""
    layers = [Inverse(Planar(2, net=Planted(2, 5))) for _ in range(2)]
    encoder = FlowDistribution(Flow(wide_normal(2, 2), layers))
    decoder = DiagonalNormal(2, net=net(2, 4))
    wide = DiagonalNormal(2, scale=2.0)
    return Example(VAE(encoder, decoder), wide.sample_and_log_prob, StandardNormal(2))


def flow_decoder() -> Example:
    """p(x|z): a coupling flow that sees z."""
    coupling = AffineCoupling(MLP(1, 2, [8], "tanh", context_features=1), "tanh_exp")
    decoder = FlowDistribution(Flow(StandardNormal(2), [coupling]))
    wide = DiagonalNormal(2, scale=2.0)
    return Example(VAE(wide_normal(1, 2), decoder), wide.sample_and_log_prob, StandardNormal(1))


def mixture_decoder() -> Example:
    decoder = DiagonalNormalMixture(2, 2, net=net(1, 2 * 6))
    wide = DiagonalNormal(2, scale=2.5)
    return Example(VAE(wide_normal(1, 2), decoder), wide.sample_and_log_prob, StandardNormal(1))


def binary_data() -> Example:
    fair = Bernoulli(3)
    return Example(
        VAE(wide_normal(1, 3), Bernoulli(3, net=net(1, 3))),
        fair.sample_and_log_prob,
        StandardNormal(1),
    )


class Embedded(nn.Module):
    """Integers to float, then a net."""

    context_features = 0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = net(inputs, outputs)

    def forward(self, x):
        return self.net(x.to(self.net.layers[0].weight.dtype) - 1)


def integer_data() -> Example:
    even = Categorical(2, 3)
    encoder = DiagonalNormal(1, net=Embedded(2, 2))
    with torch.no_grad():
        encoder.net.net.layers[-1].bias[1::2] = 0.3
    layer = VAE(encoder, Categorical(2, 3, net=net(1, 6)))
    return Example(layer, even.sample_and_log_prob, StandardNormal(1))


def integer_latent() -> Example:
    """A mixture as a VAE layer: a discrete encoder."""
    layer = VAE(Categorical(1, 3, net=net(2, 3)), DiagonalNormal(2, net=Embedded(1, 4)))
    wide = DiagonalNormal(2, scale=2.5)
    return Example(layer, wide.sample_and_log_prob, Categorical(1, 3, [0.2, -0.1, 0.4]))


EXAMPLES = {
    function.__name__: function
    for function in (
        with_context,
        flow_encoder,
        flow_decoder,
        mixture_decoder,
        binary_data,
        integer_data,
        integer_latent,
    )
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_holds(name, check):
    with double_precision():
        torch.manual_seed(0)
        proof = CHECKS[check](EXAMPLES[name]())
    assert proof.ok, proof.message


def test_integers_are_declared():
    assert integer_data().transform.integer_data
    assert not integer_data().transform.integer_latent
    assert integer_latent().transform.integer_latent
    turned = Inverse(integer_latent().transform)
    assert turned.integer_data
    with pytest.raises(ValueError, match="expected an integer tensor"):
        turned(torch.zeros(2, 1))


def test_a_context_is_insisted_on():
    layer = with_context().transform.float()
    with pytest.raises(ValueError, match=r"VAE.forward: expected a context with 1 features"):
        layer(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="expected context_features >= 0"):
        VAE(wide_normal(1, 2), DiagonalNormal(2, net=net(1, 4)), context_features=-1)
