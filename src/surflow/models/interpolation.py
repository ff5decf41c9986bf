"""All the latents of a flow, also those cut off on the way, and paths between images."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from torch import Tensor

from surflow.distributions import ChannelAutoregressive, DiagonalNormal
from surflow.distributions.base import Distribution
from surflow.distributions.location_scale import LocationScale
from surflow.errors import close_match
from surflow.flow import Flow, FlowDistribution
from surflow.transforms import VAE, Dequantization, Sequential, Slice, Transform
from surflow.transforms.conditioning import concatenate_context
from surflow.transforms.surjections.max import _Max, insert_one, remove_one

PATHS = ("spherical", "linear")
EDGE = 0.1  # of a cell: how far dequantization noise stays off its edges


@dataclass(frozen=True)
class Latent:
    """One of the variables that together say all about a batch.

    Attributes:
        value: (B, ...), standardised where its density is of a location-scale family.
        normal: whether it is standard normal under the model; all such ones turn together on a
            great circle.
        layer: whence it comes, such as ``base`` or ``7.Slice``.
    """

    value: Tensor
    normal: bool
    layer: str


class _Tape:
    """Latents in the order in which inference writes them; generation reads them backwards."""

    def __init__(self, latents: list[Latent] | None = None) -> None:
        self.latents = list(latents or [])
        self.layer = "base"

    def write(self, value: Tensor, normal: bool = False) -> None:
        self.latents.append(Latent(value, normal, self.layer))

    def read(self) -> Tensor:
        return self.latents.pop().value


# What a density makes of an event, and back ----------------------------------------------------


@singledispatch
def _write(density: Distribution, x: Tensor, given: Tensor | None, tape: _Tape) -> None:
    """Write the latents of an event under ``density``: the event itself, if it is of reals."""
    if density.discrete or not x.is_floating_point():
        raise ValueError(
            f"interpolation: {tape.layer} draws a discrete {type(density).__name__}, "
            "and between its values there is nothing"
        )
    tape.write(x)


@singledispatch
def _read(density: Distribution, given: Tensor | None, tape: _Tape) -> Tensor:
    """The event of the latents on top of the tape."""
    return tape.read()


@_write.register
def _(density: LocationScale, x: Tensor, given: Tensor | None, tape: _Tape) -> None:
    loc, log_scale = density.parameters_of(given)
    tape.write((x - loc) * torch.exp(-log_scale), isinstance(density, DiagonalNormal))


@_read.register
def _(density: LocationScale, given: Tensor | None, tape: _Tape) -> Tensor:
    loc, log_scale = density.parameters_of(given)
    return loc + torch.exp(log_scale) * tape.read()


@_write.register
def _(density: ChannelAutoregressive, x: Tensor, given: Tensor | None, tape: _Tape) -> None:
    tape.write(density.standardised(x, given), True)


@_read.register
def _(density: ChannelAutoregressive, given: Tensor | None, tape: _Tape) -> Tensor:
    return density.from_standardised(tape.read(), given)


@_write.register
def _(density: FlowDistribution, x: Tensor, given: Tensor | None, tape: _Tape) -> None:
    _write_flow(density.flow, x, density._embed(given), tape)


@_read.register
def _(density: FlowDistribution, given: Tensor | None, tape: _Tape) -> Tensor:
    return _read_flow(density.flow, density._embed(given), tape)


def _write_flow(flow: Flow, x: Tensor, context: Tensor | None, tape: _Tape) -> None:
    outer = tape.layer
    for i, layer in enumerate(flow.transforms):
        tape.layer = f"{i}.{layer.label}" if outer == "base" else outer
        x = _infer(layer, x, context, tape)
    tape.layer = outer
    _write(flow.base, x, context, tape)


def _read_flow(flow: Flow, context: Tensor | None, tape: _Tape) -> Tensor:
    z = _read(flow.base, context, tape)
    for layer in reversed(list(flow.transforms)):
        z = _generate(layer, z, context, tape)
    return z


# What a layer makes of a batch, and back -------------------------------------------------------


@singledispatch
def _infer(layer: Transform, x: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    """z, with what generation would draw on the tape.

    A layer whose generation is deterministic loses nothing: z says all about x.
    """
    if layer.stochastic_inverse:
        raise ValueError(
            f"interpolation: {tape.layer} draws when it generates, and what it drew cannot be "
            "kept; there is a way for layers that generate without a draw, and for Slice, "
            "MaxPool2d, MaxInference and VAE"
        )
    return layer(x, context)[0]


@singledispatch
def _generate(layer: Transform, z: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    """x, with what would be drawn from the tape."""
    return layer.inverse(z, context)


@_infer.register
def _(layer: Sequential, x: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    for part in layer:
        x = _infer(part, x, context, tape)
    return x


@_generate.register
def _(layer: Sequential, z: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    for part in reversed(list(layer)):
        z = _generate(part, z, context, tape)
    return z


@_infer.register
def _(layer: Dequantization, x: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    # off the edges of the cell, so that rounding errors of a deep flow do not leave it
    z, _ = layer(x, context)
    width = 1 / layer.transform.num_levels if layer.transform.scale else 1.0
    low = x.to(z.dtype) * width
    return low + (z - low).clamp(EDGE * width, (1 - EDGE) * width)


def _beside(layer: Slice | VAE, z: Tensor, context: Tensor | None) -> Tensor:
    """What the decoder of a layer is given."""
    return concatenate_context(z, context, layer.context_features)


@_infer.register
def _(layer: Slice, x: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    z, rest = layer.cut(x)
    _write(layer.decoder, rest, _beside(layer, z, context), tape)
    return z


@_generate.register
def _(layer: Slice, z: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    rest = _read(layer.decoder, _beside(layer, z, context), tape)
    return torch.cat([z, rest.to(z.dtype)], dim=layer.dim)


@_infer.register
def _(layer: VAE, x: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    z = layer.latent(x, context)
    _write(layer.decoder, x, _beside(layer, z, context), tape)
    return z


@_generate.register
def _(layer: VAE, z: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    return _read(layer.decoder, _beside(layer, z, context), tape)


def _race(index: Tensor, log_p: Tensor, dim: int) -> Tensor:
    """Gumbel noise e with argmax(log p + e) = index, from its distribution given the index.

    Args:
        index: of the winner, one element along ``dim``.
        log_p: normalised log-probabilities along ``dim``.
        dim: the dimension of the race.

    Source: Maddison et al. 2014, arXiv 1411.0030 (the top first, the others below it).
    """
    gumbel = -torch.empty_like(log_p).exponential_().log()
    top = -torch.empty_like(index, dtype=log_p.dtype).exponential_().log()
    below = -torch.logaddexp(-top, -(log_p + gumbel))
    return torch.scatter(below, dim, index, top) - log_p


def _log_index(layer: _Max, z: Tensor, context: Tensor | None) -> Tensor:
    """Log-probability of each place of the max, (B, ...) like blocks."""
    table = layer._log_index(z, context)
    top = layer._unsqueeze(z)
    shape = [*top.shape]
    shape[layer.dim] = layer.num_elements
    if table is None:
        return torch.full(shape, -math.log(layer.num_elements), dtype=z.dtype, device=z.device)
    return table.expand(shape).to(z.dtype)


@_infer.register
def _(layer: _Max, x: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    blocks = layer._cut(x)
    top, index = blocks.max(layer.dim, keepdim=True)
    z = layer._squeeze(top)
    tape.write(_race(index, _log_index(layer, z, context), layer.dim))
    rest = remove_one(blocks, index, layer.dim)
    _write(layer.decoder, layer._pack(top - rest if layer.differences else rest), z, tape)
    return z


@_generate.register
def _(layer: _Max, z: Tensor, context: Tensor | None, tape: _Tape) -> Tensor:
    rest = layer._unpack(_read(layer.decoder, z, tape))
    top = layer._unsqueeze(z)
    index = (_log_index(layer, z, context) + tape.read()).argmax(layer.dim, keepdim=True)
    rest = (top - rest if layer.differences else rest).to(z.dtype)
    return layer._join(insert_one(top, rest, index, layer.dim))


# What a user calls -----------------------------------------------------------------------------


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
            yield
    finally:
        flow.train(training)


def all_latents(flow: Flow, x: Tensor, seed: int = 0) -> list[Latent]:
    r"""Everything a flow knows of a batch: the base's latent, and all that was cut off before it.

    .. math:: x \leftrightarrow (\epsilon_1, \ldots, \epsilon_n)

    Bijections, and surjections that generate without a draw (dequantization: its noise is part of
    z), keep all in z. A :class:`Slice` gives up what its decoder would draw, standardised given
    the rest; a :class:`VAE` the noise of its decoder; max pooling the remainders, and for the
    place of the max Gumbel noise that elects it, drawn given that it did.
    :func:`from_latents` undoes it.

    Args:
        flow: without a context; it is run in evaluation mode.
        x: data, (B, *event).
        seed: of what inference draws: dequantization noise, posteriors.

    Returns:
        The latents in the order in which inference finds them, the base's last.

    Raises:
        ValueError: for a conditional flow, and for a layer that draws when it generates and of
            which what it drew is not known how to keep; the layer is named.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.6 (the factored-out parts are latents too).

    >>> from surflow.distributions import StandardNormal
    >>> from surflow.transforms import Slice
    >>> flow = Flow(StandardNormal(1), Slice(StandardNormal(2), keep=1))
    >>> [(one.layer, tuple(one.value.shape)) for one in all_latents(flow, torch.zeros(5, 3))]
    [('0.Slice', (5, 2)), ('base', (5, 1))]
    """
    with _at_rest(flow, seed):
        flow.eval()
        tape = _Tape()
        _write_flow(flow, x, None, tape)
    return tape.latents


def from_latents(flow: Flow, latents: list[Latent]) -> Tensor:
    """The data of latents as :func:`all_latents` gives them: (B, *event).

    Nothing is drawn; see there for what can be raised.
    """
    with _at_rest(flow, 0):
        flow.eval()
        return _read_flow(flow, None, _Tape(latents))


def path_weights(a: list[Latent], b: list[Latent], t: Tensor) -> tuple[Tensor, Tensor]:
    r"""The weights of a great circle through all normal latents at once.

    .. math:: z_t = \left(\frac{\sin (1 - t)\Omega}{\sin \Omega} \frac{z_0}{|z_0|}
              + \frac{\sin t\Omega}{\sin \Omega} \frac{z_1}{|z_1|}\right)
              \big((1 - t) |z_0| + t |z_1|\big)

    with Ω the angle between z_0 and z_1, each the normal latents of a row one behind the other.
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
    off the edges of its cell by a tenth of a level, which leaves room for the rounding errors of a
    deep flow; where they are larger than that, a copy of the flow in float64 takes over.

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
    if steps < 2:
        raise ValueError(f"latent_interpolation: expected steps >= 2, got {steps}")
    if path not in PATHS:
        raise ValueError(
            f"latent_interpolation: expected path to be one of {', '.join(PATHS)}, got {path!r}"
            + close_match(path, PATHS)
        )
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
    """Whether a way begins and ends where it should."""
    return torch.equal(way[:, 0], a.to(way.dtype)) and torch.equal(way[:, -1], b.to(way.dtype))


def _way(flow: Flow, a: Tensor, b: Tensor, steps: int, path: str, seed: int) -> Tensor:
    """The way, without a look at where it ends; see :func:`latent_interpolation`."""
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
