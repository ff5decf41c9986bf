r"""VAEs with flows: which posterior, which prior, and nets for each.

A VAE is a flow whose first layer is a :class:`~surflow.transforms.VAE`. A richer posterior is a
flow inside its encoder, a richer prior is bijections after it:

    x -> VAE(encoder = flow of z given x, decoder) -> bijections -> base
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from surflow.checks import require_at_least
from surflow.distributions import Bernoulli, Categorical, DiagonalNormal, Distribution
from surflow.distributions.autoregressive import AutoregressiveBernoulli
from surflow.draws import apart
from surflow.errors import check_choice, check_whole
from surflow.flow import Flow
from surflow.models.contract import takes
from surflow.models.posteriors import flow_posterior
from surflow.models.priors import Wanted, prior_of
from surflow.nets import make_activation
from surflow.nets.conv_resnet import ImageDecoder, ImageEncoder
from surflow.nets.masked_conv import LocalPixelCNN
from surflow.nets.maxout import Maxout
from surflow.nets.mlp import Linear
from surflow.transforms import VAE, Planar, Transform

LocalNet = Callable[[int], LocalPixelCNN]
"""``local(channels)`` makes the net of a local decoder."""


class GreyInput(nn.Module):
    """A net after a map of integers 0 ... K - 1 to grey values in [0, 1], in its precision."""

    def __init__(self, net: nn.Module, num_levels: int) -> None:
        super().__init__()
        self.net = net
        self.num_levels = num_levels

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            x = x.to(next(self.net.parameters()).dtype) / max(1, self.num_levels - 1)
        return self.net(x)


def hidden_layers(
    in_features: int, hidden_features: Sequence[int], activation: str, window: int = 4
) -> list[nn.Module]:
    """Linear layers, each followed by an activation, the last one too.

    Args:
        in_features: of the first layer.
        hidden_features: outputs of the activations.
        activation: relu, elu, gelu, silu, tanh, or maxout, over ``window`` linear units each.

    Raises:
        ValueError: for no hidden layer, or an unknown activation.
    """
    sizes = [in_features, *hidden_features]
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(
            f"model.hidden_features: expected at least one positive size, got {sizes[1:]}"
        )
    wide = window if activation == "maxout" else 1
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers.append(Linear(a, wide * b))
        layers.append(Maxout(window) if activation == "maxout" else make_activation(activation))
    return layers


# Likelihoods: the decoder's distribution, from how many outputs a pixel its net must give


def bernoulli(shape: Sequence[int], num_levels: int, net: nn.Module) -> Distribution:
    """Pixels 0.0 and 1.0; of grey values between, the cross-entropy, which is no likelihood of
    them but the mean log-likelihood of their binarizations."""
    if num_levels != 2:
        raise ValueError(f"model.likelihood: expected 2 levels with bernoulli, got {num_levels}")
    return Bernoulli(shape, net=net)


LIKELIHOODS: dict[
    str, tuple[Callable[[int], int], Callable[[Sequence[int], int, nn.Module], Distribution]]
] = {
    "bernoulli": (lambda levels: 1, bernoulli),
    "categorical": (lambda levels: levels, lambda shape, k, net: Categorical(shape, k, net=net)),
    "normal": (lambda levels: 2, lambda shape, k, net: DiagonalNormal(shape, net=net)),
}
"""Pixels 0.0 and 1.0, integers 0 ... K - 1, or real values with location and scale from the net."""


def likelihood_of(
    likelihood: str, shape: Sequence[int], num_levels: int, net: Callable[[int], nn.Module]
) -> Distribution:
    """The decoder: ``net(P)`` makes its net with P outputs a pixel.

    Raises:
        ValueError: for an unknown likelihood, or levels that do not fit it.
    """
    check_choice("model.likelihood", likelihood, LIKELIHOODS)
    outputs, make = LIKELIHOODS[likelihood]
    return make(shape, num_levels, net(outputs(num_levels)))


class VAEFlow(Flow):
    """A flow that begins with a VAE layer, whose posterior's layers may learn apart from the nets.

    Args:
        base, transforms: see :class:`~surflow.flow.Flow`; the first transform is a VAE layer whose
            encoder is a :class:`~surflow.flow.FlowDistribution`.
        posterior_rate: factor of the learning rate of the layers after the encoder's draw, with
            the maps of h to their parameters.
        posterior_start: the optimizer step from which they are there and learn. Until then the
            model is that of a diagonal posterior, bit by bit.

    Raises:
        ValueError: for a rate that is not positive, or a negative start.
    """

    def __init__(
        self,
        base: Distribution,
        transforms: Sequence[Transform],
        posterior_rate: float = 1.0,
        posterior_start: int = 0,
    ) -> None:
        super().__init__(base, transforms)
        if not posterior_rate > 0:
            raise ValueError(f"model.posterior_rate: expected > 0, got {posterior_rate}")
        check_whole("model.posterior_start", posterior_start, least=0)
        self.posterior_rate = posterior_rate
        self.posterior_start = posterior_start

    def at_step(self, step: int) -> None:
        self.transforms[0].encoder.resting = step < self.posterior_start

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For an optimizer: the nets, and the posterior's layers where they learn apart."""
        layers = list(self.transforms[0].encoder.flow.transforms.parameters())
        if not layers or (self.posterior_rate == 1 and not self.posterior_start):
            return [{"params": list(self.parameters()), "lr": lr}]
        apart = {id(p) for p in layers}
        nets = [p for p in self.parameters() if id(p) not in apart]
        late = {"params": layers, "lr": self.posterior_rate * lr, "start": self.posterior_start}
        return [{"params": nets, "lr": lr}, late]


def xavier_normal(flow: Flow) -> None:
    """Weights of linear layers and free directions of planar ones from a normal of variance
    2 / (inputs + outputs), biases zero (Glorot & Bengio 2010)."""
    for layer in flow.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, Planar) and layer.net is None:
            with torch.no_grad():
                rows = layer.params.view(layer.num_layers, -1)
                rows[:, :-1].normal_(std=(2 / (layer.features + 1)) ** 0.5)
                rows[:, -1].zero_()


STARTS: dict[str, Callable[[Flow], None]] = {
    "default": lambda flow: None,
    "xavier_normal": xavier_normal,
}


@takes("points", "table", "image", facts=("features", "num_levels"))
def vae_of_vectors(
    features: int,
    latent_features: int,
    posterior: str = "diagonal",
    num_layers: int = 0,
    amortised: bool = True,
    prior: str = "standard",
    prior_layers: int = 4,
    num_components: int = 16,
    spread: float = 1.0,
    likelihood: str = "bernoulli",
    num_levels: int = 2,
    hidden_features: Sequence[int] = (500, 500),
    activation: str = "relu",
    flow_hidden_features: Sequence[int] = (320,),
    flow_activation: str = "relu",
    posterior_rate: float = 1.0,
    posterior_start: int = 0,
    heads: str = "linear",
    start: str = "default",
) -> VAEFlow:
    r"""VAE layer with a flow as its posterior -> a flow as its prior -> base.

    .. math:: \log p(x) \ge \mathbb E_{q(z|x)}[\log p(x \mid z) + \log p(z) - \log q(z \mid x)]

    The encoder's net (``hidden_features``, an activation after each layer) gives h once a row; all
    parameters of the posterior are linear in h, or see h and the latent. The decoder's net has the
    same hidden layers, in reverse.

    Args:
        features: D, the size of x: (B, D).
        latent_features: L.
        posterior, num_layers, amortised: see :func:`~surflow.models.posteriors.flow_posterior`.
        prior: standard, mixture, vamp, realnvp or autoregressive; see :mod:`surflow.models.priors`.
        prior_layers: of a flow as the prior.
        num_components: K of a mixture or a vamp prior.
        spread: standard deviation of a mixture's locations at the start.
        likelihood: bernoulli (0.0 and 1.0, or grey values between), categorical (integers 0 ...
            ``num_levels`` - 1) or normal.
        num_levels: of integers.
        hidden_features, activation: of encoder and decoder; see :func:`hidden_layers`.
        flow_hidden_features, flow_activation: of the nets of couplings and masked layers.
        posterior_rate, posterior_start: see :class:`VAEFlow`.
        heads: see :func:`~surflow.models.posteriors.flow_posterior`.
        start: initial weights: default (torch's) or :func:`xavier_normal`.

    Raises:
        ValueError: for an unknown name, or numbers that do not fit.

    Source: Kingma & Welling 2014, arXiv 1312.6114; Rezende & Mohamed 2015, arXiv 1505.05770
    (posteriors); Tomczak & Welling 2018, arXiv 1705.07120, and Chen et al. 2017, arXiv 1611.02731
    (priors).

    >>> import torch
    >>> flow = vae_of_vectors(6, 2, "planar", 3, hidden_features=[8])
    >>> x = torch.randint(2, (5, 6)).float()
    >>> flow.log_prob(x).shape, flow.sample(5).shape, flow.lower_bound
    (torch.Size([5]), torch.Size([5, 6]), True)
    """
    require_at_least(
        "model.", 1, features=features, latent_features=latent_features, num_levels=num_levels
    )
    check_choice("model.start", start, STARTS)
    embed = nn.Sequential(*hidden_layers(features, hidden_features, activation))
    grey, nets = GreyInput(embed, num_levels), (flow_hidden_features, flow_activation)
    after = (posterior, num_layers, amortised, *nets)
    with apart():
        encoder = flow_posterior(latent_features, grey, hidden_features[-1], *after, heads)

    def net(outputs: int) -> nn.Module:
        body = hidden_layers(latent_features, hidden_features[::-1], activation)
        return nn.Sequential(*body, Linear(hidden_features[0], features * outputs))

    decoder = likelihood_of(likelihood, (features,), num_levels, net)
    wanted = Wanted(encoder, (features,), num_components, spread, prior_layers, *nets)
    base, layers = prior_of(prior, wanted)
    flow = VAEFlow(base, [VAE(encoder, decoder), *layers], posterior_rate, posterior_start)
    STARTS[start](flow)
    return flow


def independent(
    shape: Sequence[int], num_levels: int, net: Callable[[int], nn.Module], local: LocalNet
) -> Distribution:
    """Pixels that are independent given the latent: 0.0 and 1.0, or integers of more levels."""
    likelihood = "bernoulli" if num_levels == 2 else "categorical"
    return likelihood_of(likelihood, shape, num_levels, lambda count: net(count * shape[0]))


def local_pixelcnn(
    shape: Sequence[int], num_levels: int, net: Callable[[int], nn.Module], local: LocalNet
) -> Distribution:
    """Binary pixels, each given the latent and a small window before it."""
    if num_levels != 2:
        raise ValueError(f"model.decoder: expected 2 levels with local, got {num_levels}")
    cnn = local(shape[0])
    return AutoregressiveBernoulli(shape, cnn, net(cnn.context_features))


DECODERS: dict[str, Callable[..., Distribution]] = {
    "independent": independent,
    "local": local_pixelcnn,
}


@takes("image", facts=("shape", "num_levels"))
def vae_of_images(
    shape: Sequence[int],
    latent_features: int = 32,
    posterior: str = "diagonal",
    num_layers: int = 0,
    amortised: bool = True,
    prior: str = "standard",
    prior_layers: int = 4,
    num_components: int = 16,
    spread: float = 1.0,
    decoder: str = "independent",
    num_levels: int = 2,
    channels: Sequence[int] = (32, 32, 64),
    num_blocks: int = 2,
    embed_features: int = 450,
    flow_hidden_features: Sequence[int] = (640,),
    flow_activation: str = "elu",
    local: LocalNet | None = None,
) -> Flow:
    r"""VAE layer with a flow as its posterior -> a flow as its prior -> base, with image nets.

    :func:`vae_of_vectors` with residual convolutional nets. With ``decoder="local"`` a pixel also
    sees a small window before it: a variational lossy autoencoder.

    Args:
        shape: (C, H, W) of x.
        latent_features: L.
        posterior, num_layers, amortised: see :func:`~surflow.models.posteriors.flow_posterior`.
        prior, prior_layers, num_components, spread: see :func:`vae_of_vectors`.
        decoder: independent, or local (one channel of binary pixels).
        num_levels: 2 for pixels 0.0 and 1.0 (or grey values between), more for integers.
        channels, num_blocks: see :class:`~surflow.nets.conv_resnet.ImageEncoder`.
        embed_features: H, outputs of the encoder's net, and the size of a layer of the decoder's.
        flow_hidden_features, flow_activation: of the nets of couplings and masked layers.
        local: makes the net of the local decoder; None: one with 32 features of the place.

    Raises:
        ValueError: for an unknown name, or numbers that do not fit.

    Source: Chen et al. 2017, arXiv 1611.02731, Sec. 4.1; Kingma et al. 2016, arXiv 1606.04934. The
    sizes of the nets are this library's.

    >>> import torch
    >>> flow = vae_of_images((1, 8, 8), 4, prior="autoregressive", decoder="local",
    ...                      channels=(4, 4), flow_hidden_features=[8])
    >>> flow.log_prob(torch.zeros(5, 1, 8, 8)).shape, flow.sample(2).shape
    (torch.Size([5]), torch.Size([2, 1, 8, 8]))
    """
    shape = tuple(shape)
    check_choice("model.decoder", decoder, DECODERS)
    grey = GreyInput(ImageEncoder(shape, embed_features, channels, num_blocks), num_levels)
    nets = (flow_hidden_features, flow_activation)
    after = (posterior, num_layers, amortised, *nets)
    with apart():
        encoder = flow_posterior(latent_features, grey, embed_features, *after)

    def net(outputs: int) -> nn.Module:
        return ImageDecoder(latent_features, shape, outputs, embed_features, channels, num_blocks)

    local = local or partial(LocalPixelCNN, context_features=32)
    likelihood = DECODERS[decoder](shape, num_levels, net, local)
    wanted = Wanted(encoder, shape, num_components, spread, prior_layers, *nets)
    base, layers = prior_of(prior, wanted)
    return Flow(base, [VAE(encoder, likelihood), *layers])
