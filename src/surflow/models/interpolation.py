"""All the latents of a flow, also those cut off on the way, and paths between images."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from surflow.checks import require_at_least
from surflow.errors import check_choice
from surflow.flow import Flow
from surflow.latents import Latent, Tape

PATHS = ("spherical", "linear")


@contextlib.contextmanager
def _at_rest(flow: Flow, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, and random numbers from ``seed`` alone."""
    if flow.conditional:
        raise ValueError("interpolation: expected a flow without a context")
    held = next((t for t in (*flow.parameters(), *flow.buffers())), torch.empty(0)).device
    training = flow.training
    try:
        with torch.no_grad(), torch.random.fork_rng([held] if held.type == "cuda" else []):
            torch.manual_seed(seed)
            flow.eval()
            yield
    finally:
        flow.train(training)


def all_latents(flow: Flow, x: Tensor, seed: int = 0) -> list[Latent]:
    r"""Everything a flow knows of a batch: the base's latent, and all that was cut off before it.

    .. math:: x \leftrightarrow (\epsilon_1, \ldots, \epsilon_n)

    Bijections, and surjections that generate without a draw, keep all in z. A :class:`Slice` gives
    what its decoder would draw, standardised given the rest; a :class:`VAE` the noise of its
    decoder; max pooling the remainders, and Gumbel noise that elects the place of the max.
    :func:`from_latents` undoes it.

    Args:
        flow: without a context; it is run in evaluation mode.
        x: data, (B, *event).
        seed: of what inference draws: dequantization noise, posteriors.

    Returns:
        The latents in the order in which inference finds them, the base's last.

    Raises:
        ValueError: for a conditional flow, and for a layer whose draws cannot be kept, by name.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.6 (the factored-out parts are latents too).

    >>> from surflow.distributions import StandardNormal
    >>> from surflow.transforms import Slice
    >>> flow = Flow(StandardNormal(1), Slice(StandardNormal(2), keep=1))
    >>> [(one.layer, tuple(one.value.shape)) for one in all_latents(flow, torch.zeros(5, 3))]
    [('0.Slice', (5, 2)), ('base', (5, 1))]
    """
    with _at_rest(flow, seed):
        tape = Tape()
        flow.write(x, None, tape)
    return tape.latents


def from_latents(flow: Flow, latents: list[Latent]) -> Tensor:
    """The data of latents as :func:`all_latents` gives them: (B, *event).

    Nothing is drawn; see there for what can be raised.
    """
    with _at_rest(flow, 0):
        return flow.read(None, Tape(latents))


def path_weights(a: list[Latent], b: list[Latent], t: Tensor) -> tuple[Tensor, Tensor]:
    r"""The weights of a great circle through all normal latents at once.

    .. math:: z_t = \left(\frac{\sin (1 - t)\Omega}{\sin \Omega} \frac{z_0}{|z_0|}
              + \frac{\sin t\Omega}{\sin \Omega} \frac{z_1}{|z_1|}\right)
              \big((1 - t) |z_0| + t |z_1|\big)

    with Ω the angle between z_0 and z_1, each the concatenated normal latents of a row.
    For an angle of 0 or π, where no circle is the shortest, the line.

    Args:
        a, b: latents of the two ends, (B, ...) each.
        t: (T,), from 0 to 1, float64 on the host.

    Returns:
        The weights of z_0 and of z_1, (B, T) each, float64 on the host; (1, 0) and (0, 1) at the
        ends.

    Source: White 2016, arXiv 1609.04468; Dinh et al. 2017, arXiv 1605.08803, Sec. 4.2.
    """
    ends = [
        torch.cat([one.value.flatten(1) for one in s if one.normal], 1).cpu().double()
        for s in (a, b)
    ]
    length = [torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1e-300) for z in ends]
    cosine = (ends[0] / length[0] * (ends[1] / length[1])).sum(1, keepdim=True)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    circle = sine > 1e-6
    sine = torch.where(circle, sine, 1.0)
    norm = (1 - t) * length[0] + t * length[1]
    w0 = torch.sin((1 - t) * angle) / sine * norm / length[0]
    w1 = torch.sin(t * angle) / sine * norm / length[1]
    return torch.where(circle, w0, 1 - t), torch.where(circle, w1, t)


def latent_interpolation(
    flow: Flow, a: Tensor, b: Tensor, steps: int = 9, path: str = "spherical", seed: int = 0
) -> Tensor:
    """Images on the way from one to another, through all latents of the flow.

    The ends are the two images themselves, decoded. Of integer data dequantization noise is kept
    off the edges of its cell by a tenth of a level; where a deep flow's rounding errors are larger,
    a copy of the flow in float64 takes over.

    Args:
        flow: without a context; it is run in evaluation mode.
        a, b: data, (P, *event) each.
        steps: S, the ends included.
        path: "spherical": the normal latents, all together, on the great circle, with their length
            interpolated (:func:`path_weights`), and others in a straight line; or "linear".
        seed: of what inference draws.

    Returns:
        (P, S, *event), as ``flow.decode`` gives them.

    Raises:
        ValueError: for ends of different shapes, fewer than 2 steps, an unknown path, and as
            :func:`all_latents`; for integer data that the flow does not give back in float64
            either.

    Cost: inference of 2 P and generation of P S rows; twice where float64 is needed.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 4.2; Kingma & Dhariwal 2018, arXiv 1807.03039,
    Sec. 6.

    >>> from surflow.distributions import StandardNormal
    >>> from surflow.transforms import Affine
    >>> flow = Flow(StandardNormal(2), Affine(2, scale=3.0))
    >>> ends = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> half_way = latent_interpolation(flow, *ends, steps=3)[0, 1]
    >>> bool(torch.allclose(half_way, torch.full((2,), 0.5**0.5)))  # of length 1, as the ends
    True
    """
    if a.shape != b.shape:
        raise ValueError(
            f"latent_interpolation: expected two batches of one shape, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    require_at_least("latent_interpolation", 2, steps=steps)
    check_choice("latent_interpolation: path", path, PATHS)
    way = _way(flow, a, b, steps, path, seed)
    if a.is_floating_point() or _joins(way, a, b):
        return way
    way = _way(copy.deepcopy(flow).double(), a, b, steps, path, seed)
    if not _joins(way, a, b):
        raise ValueError(
            "latent_interpolation: expected a flow that gives integer data back from its latents, "
            "got other values in float64 too"
        )
    return way


def _joins(way: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether a way begins at a and ends at b."""
    return torch.equal(way[:, 0], a.to(way.dtype)) and torch.equal(way[:, -1], b.to(way.dtype))


def _way(flow: Flow, a: Tensor, b: Tensor, steps: int, path: str, seed: int) -> Tensor:
    """The way, whose ends are not checked."""
    pairs = a.shape[0]
    latents = all_latents(flow, torch.cat([a, b]), seed)
    first = [replace(one, value=one.value[:pairs]) for one in latents]
    second = [replace(one, value=one.value[pairs:]) for one in latents]
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    line = (1 - t).expand(pairs, -1), t.expand(pairs, -1)
    turned = path == "spherical" and any(one.normal for one in latents)
    circle = path_weights(first, second, t) if turned else line

    def between(start: Latent, end: Latent) -> Latent:
        w0, w1 = (
            w.to(start.value).reshape(pairs, steps, *[1] * (start.value.dim() - 1))
            for w in (circle if start.normal else line)
        )
        value = w0 * start.value.unsqueeze(1) + w1 * end.value.unsqueeze(1)
        return replace(start, value=value.flatten(0, 1))

    on_the_way = [between(s, e) for s, e in zip(first, second, strict=True)]
    return from_latents(flow, on_the_way).unflatten(0, (pairs, steps))
