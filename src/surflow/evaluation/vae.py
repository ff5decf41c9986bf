"""A VAE in pictures: decoder means, and of a 2-D latent its posterior and its prior."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surflow.flow import Flow
from surflow.variational import has_vae_layer, split_at_vae

GRID = 256
LATENT_DRAWS = 200_000  # of a posterior without a density in closed form, over all rows
LATENT_GRID = 128  # cells a side of their histogram
ROWS = 1024  # test images at a time
CELLS = 16_384  # latents at a time
MEANS, DRAWS = "decoder means", "decoder draws"


class Decoded(nn.Module):
    """The parts of a flow around its first VAE layer, and images of its latents.

    The parts are the flow's own, not copies: ``front``, the layers before the VAE layer, data side
    first; ``vae``; ``prior``, what follows, as a flow over latents.

    Raises ValueError for a flow without a VAE layer, or one that takes a context.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if flow.conditional:
            raise ValueError("pictures of a VAE: expected a flow without a context")
        self.flow = flow
        self.front, self.vae, after = split_at_vae(flow, "pictures of a VAE")
        self.prior = Flow(flow.base, after)
        self.train(flow.training)

    @property
    def shows_means(self) -> bool:
        """Whether a decoder's mean is shown; a mean of integers fits no layer in front."""
        return self.vae.decoder.has_mean and not (self.front and self.vae.decoder.discrete)

    @property
    def has_grey(self) -> bool:
        """Whether the mean is of bits or levels, so that its images are grey and draws are not."""
        return self.shows_means and self.vae.decoder.discrete

    def inner(self, x: Tensor) -> Tensor:
        """The input of the VAE layer for data (B, *event), on the flow's device, in its type."""
        weight = next(self.flow.parameters())
        x = x.to(weight.device)
        x = x.to(weight.dtype) if x.is_floating_point() else x
        for layer in self.front:
            x = layer.latent(x)
        return x

    def posterior(self, x: Tensor) -> Tensor:
        """A draw of q(z|x) for every row."""
        return self.vae.latent(self.inner(x))

    def images(self, z: Tensor) -> Tensor:
        """The decoder's mean for every latent, where it has one, else a draw: (B, *event)."""
        x = self.vae.decoder.mean(z) if self.shows_means else self.vae.inverse(z)
        for layer in reversed(self.front):
            x = layer.inverse(x)
        return x

    def sample(self, n: int, temperature: float = 1.0) -> Tensor:
        """The images of n draws from the prior: the latents are those of ``flow.sample``."""
        return self.images(self.prior.sample(n, temperature=temperature))

    def pixels(self, values: Tensor, data: Any) -> tuple[Tensor, int, str]:
        """Values of :meth:`images` as 8-bit images, their levels, and what is seen in words."""
        if self.has_grey:
            grey = values.reshape(len(values), *data.image_shape).cpu() * 255
            return (grey / (data.num_levels - 1)).round().to(torch.uint8), 256, MEANS
        return *data.pixels(values.cpu()), MEANS if self.shows_means else DRAWS


def decoded_of(flow: Flow) -> Decoded | None:
    """The parts of a flow with a VAE layer and without a context; None for another one."""
    return Decoded(flow) if has_vae_layer(flow) and not flow.conditional else None


# 2-D latents


def _cell_mass(loc: Tensor, scale: Tensor, edges: Tensor) -> Tensor:
    """The mass of N(loc, scale^2) between neighbouring edges: (N,), (N,), (G + 1,) -> (N, G)."""
    e = (edges - loc.unsqueeze(1)) / scale.unsqueeze(1)
    # the smaller tail on either side, so that no difference cancels far out
    below, above = torch.special.ndtr(e), torch.special.ndtr(-e)
    right = e[:, :-1] > 0
    return torch.where(right, above[:, :-1] - above[:, 1:], below[:, 1:] - below[:, :-1])


def aggregated_density(loc: Tensor, scale: Tensor, edges: Tensor) -> Tensor:
    r"""The aggregated posterior of 2-D diagonal normals, averaged over the cells of a grid.

    .. math:: q(z) = \frac1N \sum_n \mathcal N(z_1; \mu_{n1}, \sigma_{n1}^2)
              \mathcal N(z_2; \mu_{n2}, \sigma_{n2}^2)

    The mass of a cell is exact (normal distribution functions), however narrow a posterior is.

    Args:
        loc, scale: (N, 2).
        edges: (2, G + 1), of the cells along each axis, ascending and evenly spaced.

    Returns:
        (G, G), float64, [i, j] at (z1_i, z2_j); its sum times a cell's area is the mass inside.

    Source: Hoffman & Johnson 2016, "ELBO surgery"; Tomczak & Welling 2018, arXiv 1705.07120.
    """
    edges = edges.double()
    total = loc.new_zeros(edges.shape[1] - 1, edges.shape[1] - 1, dtype=torch.float64)
    for mu, sigma in zip(loc.double().split(ROWS), scale.double().split(ROWS), strict=True):
        first, second = (_cell_mass(mu[:, k], sigma[:, k], edges[k]) for k in range(2))
        total += first.T @ second
    return total / len(loc) / _area(edges)


def _area(edges: Tensor) -> Tensor:
    """Of a cell."""
    return (edges[:, 1] - edges[:, 0]).prod()


def grid_log_density(flow: Flow, edges: Tensor) -> Tensor:
    """log p(z) at the centres of the cells: (2, G + 1) -> (G, G), nats, float64, on the CPU."""
    like = next((t for t in (*flow.parameters(), *flow.buffers())), torch.empty(0))
    centres = (edges[:, 1:] + edges[:, :-1]) / 2
    z = torch.cartesian_prod(*centres).to(like)
    log_p = torch.cat([flow.log_prob(part).cpu().double() for part in z.split(CELLS)])
    return log_p.reshape(centres.shape[1], -1)


def grid_divergence(density: Tensor, log_prior: Tensor, area: float) -> float:
    r"""KL(q || p) in nats, :math:`\sum_{ij} A q_{ij} (\log q_{ij} - \log p_{ij})` over a grid.

    Mass outside the grid and differences within a cell do not count.
    """
    log_ratio = torch.where(density > 0, density.log() - log_prior, 0.0)
    return float((density * log_ratio).sum() * area)


def latent_arrays(parts: Decoded, test: Tensor) -> dict[str, np.ndarray]:
    """The arrays of ``latent.npz``, of a 2-D latent.

    ``test`` are data, (N, *event).

    Returns:
        grid_low, grid_high (2,), the edges of the grid; aggregated, prior (G, G), densities, [i, j]
        at (z1_i, z2_j); points (N, 2), posterior means; kl, nats, NaN where the posterior has no
        density in closed form; inside, the share of the aggregated posterior on the grid.

    Raises ValueError for a prior whose density is only a bound.
    """
    if parts.prior.lower_bound:
        raise ValueError("latent: expected a prior with a density, got one with a bound on it")
    factorised = parts.vae.encoder.factorised
    if not factorised:
        count = -(-LATENT_DRAWS // len(test))
        draw = partial(parts.vae.encoder.sample_and_log_prob, num_samples=count)
        found = [draw(context=parts.inner(x))[0] for x in test.split(max(1, CELLS // count))]
        blocks = [z.cpu().double().unflatten(0, (count, -1)) for z in found]
        draws = torch.cat([block.flatten(0, 1) for block in blocks])
        points = torch.cat([block.mean(0) for block in blocks])
        low, high = _range(draws)
    else:
        found = [parts.vae.encoder.normal_parameters(parts.inner(x)) for x in test.split(ROWS)]
        points = torch.cat([loc for loc, _ in found]).cpu().double()
        scale = torch.cat([log_scale for _, log_scale in found]).cpu().double().exp()
        low = _range(points - 4 * scale)[0]
        high = _range(points + 4 * scale)[1]
    edges = _edges(parts.prior, low, high, GRID if factorised else LATENT_GRID)
    area = _area(edges)
    if not factorised:
        cells = [edges.shape[1] - 1] * 2
        window = [(float(e[0]), float(e[-1])) for e in edges]
        counts, *_ = np.histogram2d(*draws.numpy().T, bins=cells, range=window)
        density = torch.from_numpy(counts) / len(draws) / area
    else:
        density = aggregated_density(points, scale, edges)
    log_prior = grid_log_density(parts.prior, edges)
    kl = grid_divergence(density, log_prior, float(area)) if factorised else math.nan
    return {
        "grid_low": edges[:, 0].numpy(),
        "grid_high": edges[:, -1].numpy(),
        "aggregated": density.numpy().astype(np.float32),
        "prior": log_prior.exp().numpy().astype(np.float32),
        "points": points.numpy().astype(np.float32),
        "kl": np.float64(kl),
        "inside": np.float64(density.sum() * area),
    }


def _range(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Between the thousandths of both ends, (2,) each: a few outliers would make the cells wide."""
    low, high = np.quantile(draws.numpy(), (0.001, 0.999), axis=0)
    return torch.from_numpy(low), torch.from_numpy(high)


def _edges(prior: Flow, low: Tensor, high: Tensor, cells: int) -> Tensor:
    """The edges of a square grid, (2, cells + 1), around the posterior and nearly all the prior."""
    z = prior.sample(10_000).cpu().double().numpy()
    ends = torch.from_numpy(np.quantile(z, (0.001, 0.999), axis=0))
    low, high = torch.minimum(low, ends[0]), torch.maximum(high, ends[1])
    middle, half = (low + high) / 2, 1.02 * (high - low).max() / 2
    steps = torch.linspace(-1, 1, cells + 1, dtype=torch.float64)
    return middle.unsqueeze(1) + half * steps
