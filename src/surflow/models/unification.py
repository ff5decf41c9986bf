r"""The models that SurVAE flows unify, each from layers of this library.

Every function gives the :class:`~surflow.flow.Flow` of one published family for 2-D points (Nielsen
et al. 2020, arXiv 2007.02731, Table 3): its list of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from surflow.distributions import Categorical, DiagonalNormal, StandardNormal, Uniform
from surflow.errors import check_choice
from surflow.flow import Flow, FlowDistribution
from surflow.models.contract import takes
from surflow.models.coupling_flow import support_of
from surflow.nets import MLP
from surflow.transforms import (
    VAE,
    ActNorm,
    Affine,
    AffineCoupling,
    DiscretelyIndexed,
    IntervalFold,
    Logit,
    RationalQuadraticSplineCoupling,
    Transform,
)
from surflow.transforms.surjections.rounding import Dequantization
from surflow.transforms.surjections.slicing import Augment, Slice

Net = Callable[[int, int], nn.Module]
"""``net(in_features, out_features)`` makes a net."""


@takes("points", "table", facts=("features", "low", "high"), surjection="surjection")
def model_after(
    features: int,
    model: Callable[..., Flow],
    support: str = "unmapped",
    surjection: Transform | None = None,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> Flow:
    """A model after a surjection and the map of its support, or by itself.

    Args:
        features: D.
        model: ``model(features=D)`` makes the flow.
        support, surjection, low, high: see :func:`surflow.models.coupling_flow`.
    """
    flow = model(features=features)
    first, _ = support_of(features, support, surjection, low, high)
    if first and flow.transforms.integer_data:
        raise ValueError(
            "model: this one begins with a dequantization, which takes integers: expected "
            f"surjection=none and model.support=unmapped, got support {support!r} and "
            f"{type(surjection).__name__}"
        )
    return Flow(flow.base, [*first, *flow.transforms]) if first else flow


smooth_mlp = partial(MLP, hidden_features=(64, 64), activation="silu")
"""The nets of encoders and decoders."""

zero_mlp = partial(smooth_mlp, zero_init=True)
"""The nets of couplings and gates: the output starts at zero."""


def alternate(loc: Tensor, log_scale: Tensor) -> Tensor:
    """Parameters of a diagonal normal in its order: (B, D) and what expands to it -> (B, 2 D)."""
    return torch.stack([loc, log_scale.expand_as(loc)], dim=-1).flatten(1)


class LinearNormalNet(nn.Module):
    """Context -> (loc, log_scale) with a linear loc and one free log-scale: (B, in) -> (B, 2 out).

    Args:
        in_features, out_features: sizes of the context and of the event.
        isotropic: one scale for all features, as in PPCA.
    """

    def __init__(self, in_features: int, out_features: int, isotropic: bool) -> None:
        super().__init__()
        self.loc = nn.Linear(in_features, out_features)
        self.log_scale = nn.Parameter(torch.zeros(1 if isotropic else out_features))

    def forward(self, x: Tensor) -> Tensor:
        return alternate(self.loc(x), self.log_scale)


def ppca(features: int = 2, latent_features: int = 1) -> Flow:
    """Probabilistic PCA: a VAE layer with linear means and one noise scale.

    The encoder is linear too, as the exact posterior is, so the bound becomes tight.

    Source: Tipping & Bishop 1999; Nielsen et al. 2020, Table 3.
    """
    up = LinearNormalNet(features, latent_features, isotropic=False)
    down = LinearNormalNet(latent_features, features, isotropic=True)
    layer = VAE(DiagonalNormal(latent_features, net=up), DiagonalNormal(features, net=down))
    return Flow(StandardNormal(latent_features), layer)


def ppca_log_prob(flow: Flow, x: Tensor) -> Tensor:
    """log N(x; b, W Wᵀ + σ² I), the likelihood of :func:`ppca` in closed form, (B,), nats."""
    net = flow.transforms[0].decoder.net
    weight = net.loc.weight
    noise = torch.exp(2 * net.log_scale) * torch.eye(len(weight), dtype=weight.dtype)
    covariance = weight @ weight.T + noise
    normal = torch.distributions.MultivariateNormal(net.loc.bias, covariance)
    return normal.log_prob(x)


def vae(features: int = 2, latent_features: int = 2, net: Net = smooth_mlp) -> Flow:
    """The VAE: one stochastic layer.

    Source: Kingma & Welling 2014, arXiv 1312.6114; Rezende et al. 2014, arXiv 1401.4082.
    """
    return hvae(features, [latent_features], net)


def hvae(features: int = 2, latent_features: Sequence[int] = (2, 1), net: Net = smooth_mlp) -> Flow:
    """The hierarchical VAE: a stochastic layer a level, inference from the data upwards.

    Source: Rezende et al. 2014, arXiv 1401.4082; Sønderby et al. 2016, arXiv 1602.02282.
    """
    layers = [
        VAE(
            encoder=DiagonalNormal(above, net=NearIdentityNet(net(below, 2 * above), below, above)),
            decoder=DiagonalNormal(below, net=NearIdentityNet(net(above, 2 * below), above, below)),
        )
        for below, above in pairwise([features, *latent_features])
    ]
    return Flow(StandardNormal(latent_features[-1]), layers)


class NearIdentityNet(nn.Module):
    """A net of (loc, log_scale) whose loc starts at the input and whose scales start small.

    Args:
        net: an MLP, (B, in) -> (B, 2 out); its output layer is set to zero where the sizes agree.
        in_features, out_features: sizes of the context and of the event.
        scale: the scale at the start.
    """

    def __init__(self, net: MLP, in_features: int, out_features: int, scale: float = 0.3) -> None:
        super().__init__()
        self.net = net
        self.skip = in_features == out_features
        with torch.no_grad():
            if self.skip:
                net.layers[-1].weight.zero_()
                net.layers[-1].bias.zero_()
            net.layers[-1].bias[1::2] = math.log(scale)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out + alternate(x, torch.zeros_like(x)) if self.skip else out


class NoisingNet(nn.Module):
    r"""The fixed step q(x_t | x_{t-1}) = N(√(1-β) x_{t-1}, β I), as parameters loc, log_scale."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.keep, self.log_scale = math.sqrt(1 - beta), 0.5 * math.log(beta)

    def forward(self, x: Tensor) -> Tensor:
        return alternate(self.keep * x, torch.full_like(x, self.log_scale))


class DenoisingNet(nn.Module):
    r"""The learned step p(x_{t-1} | x_t), with noise predicted by a net shared over the steps.

    .. math:: \mu = \frac{1}{\sqrt{1-\beta_t}} \Big(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}
              \epsilon(x_t, t)\Big), \qquad \sigma^2 = \beta_t e^{2 s_t}

    Args:
        net: (B, D + 1) -> (B, D), the noise from x_t and t / T.
        time: t / T.
        beta: β_t.
        alpha_bar: ᾱ_t, the product of 1 - β up to t.
    """

    def __init__(self, net: nn.Module, time: float, beta: float, alpha_bar: float) -> None:
        super().__init__()
        self.net = net
        self.time, self.beta = time, beta
        self.gain = 1 / math.sqrt(1 - beta)
        self.weight = beta / math.sqrt(1 - alpha_bar)
        self.log_scale = nn.Parameter(torch.tensor(0.5 * math.log(beta)))

    def forward(self, x: Tensor) -> Tensor:
        time = torch.full_like(x[:, :1], self.time)
        loc = self.gain * (x - self.weight * self.net(torch.cat([x, time], dim=1)))
        return alternate(loc, self.log_scale)


def ddpm(
    features: int = 2,
    num_steps: int = 12,
    beta: Sequence[float] = (0.01, 0.7),
    scale: float = 1.0,
    net: Net = zero_mlp,
) -> Flow:
    """A denoising diffusion model: a stochastic layer a step, with a fixed encoder.

    Args:
        features: D.
        num_steps: T.
        beta: the first and the last β; between them β is geometric.
        scale: the data times this enter the first step.
        net: makes ε, shared by all steps.

    Source: Sohl-Dickstein et al. 2015, arXiv 1503.03585; Ho et al. 2020, arXiv 2006.11239. The
    variance of a reverse step is learned, one number a step.
    """
    shared = net(features + 1, features)
    betas = torch.logspace(*(math.log10(b) for b in beta), num_steps).tolist()
    layers: list[Transform] = [Affine(features, scale=scale)]
    alpha_bar = 1.0
    for t, b in enumerate(betas, start=1):
        alpha_bar *= 1 - b
        denoising = DenoisingNet(shared, t / num_steps, b, alpha_bar)
        nets = (NoisingNet(b), denoising)
        layers.append(VAE(*(DiagonalNormal(features, net=made) for made in nets)))
    return Flow(StandardNormal(features), layers)


def spline_couplings(
    features: int, num_couplings: int, num_bins: int, bound: float, net: Net
) -> list[Transform]:
    """Spline couplings that take turns in the half they transform."""
    first, layers = features // 2, []
    for i in range(num_couplings):
        seen = features - first if i % 2 else first
        inner = net(seen, (features - seen) * (3 * num_bins - 1))
        layers.append(RationalQuadraticSplineCoupling(inner, num_bins, bound, swap=i % 2 == 1))
    return layers


@takes("points", "image", facts=("features", "num_levels"))
def dequantization(
    num_levels: int,
    noise: str = "uniform",
    features: int = 2,
    num_couplings: int = 4,
    num_bins: int = 8,
    net: Net = zero_mlp,
) -> Flow:
    """Integers by rounding: a generative surjection, then a flow on the unit box.

    Args:
        num_levels: K.
        noise: "uniform", or "variational": a flow of its own given x.
        features, num_couplings, num_bins, net: of the flow after it.

    Source: Theis et al. 2016, arXiv 1511.01844; Ho et al. 2019, arXiv 1902.00275; trained with
    several samples it is the importance-weighted one of Hoogeboom et al. 2020, arXiv 2001.11235.
    """
    check_choice("model.noise", noise, ("uniform", "variational"))
    posterior = None
    if noise == "variational":
        nets = [MLP(1, 2, (32, 32), "silu", context_features=features) for _ in range(2)]
        layers = [Logit(), AffineCoupling(nets[0]), AffineCoupling(nets[1], swap=True)]
        posterior = FlowDistribution(Flow(StandardNormal(features), layers), features)
    first = [Dequantization(num_levels, posterior), Logit(), Affine(features, scale=0.6)]
    couplings = spline_couplings(features, num_couplings, num_bins, 4.0, net)
    return Flow(StandardNormal(features), [*first, *couplings])


def anf(features: int = 2, num_augmented: int = 1, num_steps: int = 3, net: Net = zero_mlp) -> Flow:
    """The augmented normalizing flow: noise appended to the data, then autoencoding couplings.

    Source: Huang et al. 2020, arXiv 2002.07101.
    """
    layers: list[Transform] = [Augment(StandardNormal(num_augmented), keep=features)]
    for _ in range(num_steps):
        layers += [
            AffineCoupling(net(features, 2 * num_augmented), "tanh_exp", split=features),
            AffineCoupling(net(num_augmented, 2 * features), "tanh_exp", split=features, swap=True),
        ]
    return Flow(StandardNormal(features + num_augmented), layers)


def vflow(
    features: int = 2, num_augmented: int = 2, num_couplings: int = 8, net: Net = zero_mlp
) -> Flow:
    """VFlow: dimensions drawn from a learned q(e|x), then a flow of all of them together.

    Source: Chen et al. 2020, arXiv 2002.09741.
    """
    encoder = DiagonalNormal(num_augmented, net=net(features, 2 * num_augmented))
    total = features + num_augmented
    first = total // 2
    layers: list[Transform] = [Augment(encoder, keep=features), ActNorm(total)]
    for i in range(num_couplings):
        # alternate channels: the data's and the added ones mix in every coupling
        seen, changed = (first, total - first) if i % 2 else (total - first, first)
        inner = net(seen, 2 * changed)
        layers.append(AffineCoupling(inner, "tanh_exp", split="alternate", swap=i % 2 == 1))
    return Flow(StandardNormal(total), layers)


def multi_scale(
    features: int = 2, num_couplings: int = 4, num_bins: int = 8, net: Net = zero_mlp
) -> Flow:
    """The multi-scale flow: after some layers a part is sliced off, the rest goes on.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.6; the sliced part given the rest as in
    Kingma & Dhariwal 2018, arXiv 1807.03039.
    """
    keep = features // 2
    decoder = DiagonalNormal(features - keep, net=net(keep, 2 * (features - keep)))
    couplings = spline_couplings(features, num_couplings, num_bins, 4.0, net)
    last = [Slice(decoder, keep=keep), Affine(keep, learn=True)]
    return Flow(StandardNormal(keep), [Affine(features, scale=0.7), *couplings, *last])


def cif(
    features: int = 2,
    num_layers: int = 2,
    num_couplings: int = 2,
    num_bins: int = 8,
    net: Net = zero_mlp,
) -> Flow:
    """The continuously indexed flow: augment, a bijection indexed by what was added, slice.

    Source: Cornish et al. 2020, arXiv 1909.13833.
    """
    layers: list[Transform] = []
    for _ in range(num_layers):
        layers += [
            *spline_couplings(features, num_couplings, num_bins, 4.0, net),
            Augment(DiagonalNormal(1, net=net(features, 2)), keep=features),
            AffineCoupling(net(1, 2 * features), "tanh_exp", split=features, swap=True),
            Slice(DiagonalNormal(1, net=net(features, 2)), keep=features),
        ]
    return Flow(StandardNormal(features), layers)


def _affine_components(features: int, count: int, reach: float) -> list[Transform]:
    """Affine bijections whose centres lie on a circle of radius ``reach``."""
    angles = [2 * math.pi * k / count for k in range(count)]
    shifts = [[-reach * math.cos(a), -reach * math.sin(a)] for a in angles]
    return [Affine(features, shift, scale=1.0, learn=True) for shift in shifts]


def dif(
    features: int = 2, num_components: int = 8, reach: float = 2.0, net: Net = zero_mlp
) -> Flow:
    """The discretely indexed flow: an affine map chosen by a net, both ways.

    Source: Duan 2019, arXiv 1904.05243; Orozco et al. 2022, arXiv 2204.01361.
    """
    maps = _affine_components(features, num_components, reach)
    gate = Categorical(1, num_components, net=net(features, num_components))
    encoder = Categorical(1, num_components, net=net(features, num_components))
    return Flow(StandardNormal(features), DiscretelyIndexed(maps, gate=gate, encoder=encoder))


def deep_gmm(
    features: int = 2,
    num_components: Sequence[int] = (8, 2),
    reach: Sequence[float] = (2.5, 0.5),
    net: Net = zero_mlp,
) -> Flow:
    """The deep Gaussian mixture: layers of affine maps, chosen with fixed probabilities.

    Source: van den Oord & Schrauwen 2014, Factoring variations in natural images with deep Gaussian
    mixture models.
    """
    layers = [
        DiscretelyIndexed(
            _affine_components(features, count, radius),
            gate=Categorical(1, count, learn=True),
            encoder=Categorical(1, count, net=net(features, count)),
        )
        for count, radius in zip(num_components, reach, strict=True)
    ]
    return Flow(StandardNormal(features), layers)


def rad(
    features: int = 2,
    num_intervals: int = 4,
    half_width: float = 4.0,
    net: Net = zero_mlp,
) -> Flow:
    """The RAD flow: each coordinate's intervals folded upon one another, a net unfolds them.

    Source: Dinh et al. 2019, arXiv 1903.07714.
    """
    edges, nets = (-half_width, half_width), [net(features, num_intervals) for _ in range(features)]
    folds = [
        IntervalFold(features, d, num_intervals, *edges, learn_edges=True, net=unfold)
        for d, unfold in enumerate(nets)
    ]
    return Flow(Uniform(features), folds)
