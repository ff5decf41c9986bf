"""What a training step keeps in memory for its backward pass, and how images lie in it.

``stored`` keeps every activation, as autograd does. The two other choices pay with time:

    mode         kept for the backward pass                  passes of the nets a step
    stored       all activations of all layers               forward, backward
    checkpoint   the input of every step of the flow         2 forward, backward
    reversible   the output of every bijective stretch       2 forward, backward

A stretch is a run of bijective layers with a cheap, exact inverse. In the backward pass, from the
last layer to the first, a layer's input is computed from its output and the layer runs once more on
it, with a graph. A coupling needs its net once for both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from surflow.checks import check_values, values_are_checked
from surflow.errors import check_choice
from surflow.transforms import Sequential, Transform
from surflow.transforms.base import zero_ldj

MODES = ("stored", "reversible", "checkpoint")

COMPILED_KINDS = 64
"""Shapes and modes, of all nets of one class, that are compiled."""


def set_memory(module: nn.Module, mode: str, compile_nets: bool = False) -> int:
    """Choose what a flow keeps for its backward pass.

    Values do not change (contributions are added up in another order), nor do names of parameters.
    Gradients of "checkpoint" are those of
    "stored" bit for bit where the kernels are deterministic. Those of "reversible" carry the
    rounding of the inverses: about 1e-15 of their norm in float64 and 1e-7 in float32 for an image
    flow of 12 steps a scale, more where a layer's inverse magnifies more. Under autocast what
    conditions a coupling comes back with float32's rounding, and a few numbers are then rounded to
    another bfloat16: a difference of the size of that between bfloat16 and float32.

    Stored in each mode are layers that are no bijections, and what is not ``repeatable``: an
    :class:`ActNorm` before its first batch, batch normalisation and dropout in training. Mode
    "reversible" also stores layers whose attribute ``reversible`` is False: those without a cheap
    exact inverse, and squashings such as a sigmoid, which lose digits at their ends.

    Args:
        module: a flow, or anything with flows in it; those of dequantizers and posteriors count,
            in whichever direction they run.
        mode: "stored", "reversible" or "checkpoint".
        compile_nets: compile the couplings' nets; False: run them uncompiled. An outer
            ``torch.compile`` leaves out the stretches of "reversible" (the graph breaks around
            each); this compiles what is heavy in them.

    Returns:
        The number of sequences of layers that it concerns.

    Raises:
        ValueError: for an unknown mode.

    Cost: none by itself. A step takes about a third more time in both other modes.

    Source: Gomez et al. 2017, arXiv 1707.04585 (reversible); Chen et al. 2016, arXiv 1604.06174
    (checkpointing).

    >>> from surflow.models import pool_flow
    >>> flow = pool_flow((3, 8, 8), num_steps=1, mid_channels=8, depth=1, growth=4)
    >>> set_memory(flow, "reversible")  # the flow, and that of its dequantizer
    3
    """
    check_choice("memory", mode, MODES)
    count = 0
    for part in module.modules():
        if not isinstance(part, Transform):
            continue
        if isinstance(part, Sequential):
            part.memory = None if mode == "stored" else Recompute(mode)
            count += 1
        for net in part.heavy_nets:
            net._compiled_call_impl = None  # what Module.compile sets, and has no undo for
            if compile_nets:
                _compile(net)
    return count


def _compile(net: nn.Module) -> None:
    """Compile a net for the shapes that come; nets of one class share what is compiled, and an
    image flow has more of them than torch's 8 kinds, beyond which it would compile no more."""
    options: dict[str, Any] = {"dynamic": False}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = COMPILED_KINDS
    else:
        settings = torch._dynamo.config
        settings.recompile_limit = max(COMPILED_KINDS, settings.recompile_limit)
    net.compile(**options)


def use_channels_last(module: nn.Module) -> nn.Module:
    """Lay out the convolutions' weights with channels last, in place; values do not change.

    Convolutions on a GPU in bfloat16 then need no transposition of images that lie so too.
    ``x.to(memory_format=torch.channels_last)`` stays so through the layers of an image flow.

    Returns:
        The module.
    """
    for part in module.modules():
        if getattr(part, "channels_last", None) is False:  # a layer that chooses its layout
            part.channels_last = True
    return module.to(memory_format=torch.channels_last)


# What can be recomputed


def _repeats(layer: Transform) -> bool:
    """Whether a second run on the same input gives the same, and changes nothing."""
    return all(getattr(m, "repeatable", True) and not _changes(m) for m in layer.modules())


def _changes(module: nn.Module) -> bool:
    """Whether it is a module of torch that draws, or updates itself, in training."""
    return module.training and (
        isinstance(module, _BatchNorm)
        or (isinstance(module, _DropoutNd) and module.p > 0)
        or type(module).__name__ == "_SpectralNorm"
    )


@dataclass(eq=False)
class _Step:
    """One layer in the direction in which it runs, and the sign of its contribution."""

    layer: Transform
    turned: bool
    sign: int

    def __call__(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        run = self.layer.inverse_and_ldj if self.turned else self.layer
        z, ldj = run(x, context)
        return z, ldj if self.sign > 0 else -ldj

    def alone(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The output without the contribution, which may not exist where it is not asked for."""
        run = self.layer.inverse if self.turned else self.layer.latent
        return run(x, context)

    def retrace(
        self, z: Tensor, context: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Callable[..., Tensor], Tensor, Tensor]:
        """See :meth:`Transform.retrace`; the contribution with its sign."""
        parts, join, again, ldj = self.layer.retrace(z, context, self.turned)
        return parts, join, again, ldj if self.sign > 0 else -ldj


def _steps(layers: Iterable[Transform], turned: bool) -> Iterator[_Step]:
    """The layers in the order in which they run, nested sequences and inverses unfolded."""
    for layer in reversed(list(layers)) if turned else layers:
        for leaf, way in layer.unfold(turned):
            yield _Step(leaf, way, 1 if way == turned else -1)


def _grouped(steps: Iterable[_Step], mode: str) -> Iterator[tuple[bool, list[_Step]]]:
    """Runs of layers: whether they are to be recomputed in the backward pass, and the layers.

    "reversible": as long as can be. "checkpoint": each ends with the first layer that has a net.
    """
    run: list[_Step] = []
    for step in steps:
        layer = step.layer
        fits = layer.bijective and not layer.estimated and _repeats(layer)
        if mode == "reversible":
            fits = fits and layer.reversible
        if not fits:
            if run:
                yield _worth_it(run), run
                run = []
            yield False, [step]
            continue
        run.append(step)
        if mode == "checkpoint" and _worth_it([step]):
            yield True, run
            run = []
    if run:
        yield _worth_it(run), run


def _worth_it(steps: Sequence[_Step]) -> bool:
    """Whether there is a net in them: it is nets whose activations fill the memory."""
    return any(not isinstance(m, Transform) for step in steps for m in step.layer.children())


# Running them


@dataclass(frozen=True)
class Recompute:
    """How a :class:`Sequential` runs where there will be a backward pass; see :func:`set_memory`.

    Attributes:
        mode: "reversible" or "checkpoint".
    """

    mode: str

    def run(
        self,
        layers: Iterable[Transform],
        x: Tensor,
        context: Tensor | None,
        turned: bool,
        scored: bool,
    ) -> tuple[Tensor, Tensor]:
        """The output of the layers and the sum of their contributions.

        Args:
            turned: whether they run from z to x.
            scored: whether contributions are asked for.
        """
        ldj: Tensor | None = None
        for recomputed, steps in _grouped(_steps(layers, turned), self.mode):
            if recomputed:
                x, part = _RUNS[self.mode](steps, x, context)
            elif scored:
                x, part = _in_turn(steps, x, context)
            else:
                for step in steps:
                    x = step.alone(x, context)
                continue
            ldj = part if ldj is None else ldj + part
        return x, zero_ldj(x) if ldj is None else ldj


def _in_turn(steps: Sequence[_Step], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    ldj: Tensor | None = None
    for step in steps:
        x, part = step(x, context)
        ldj = part if ldj is None else ldj + part
    return x, ldj


def _checkpointed(
    steps: Sequence[_Step], x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    checked = values_are_checked()
    held = () if torch.compiler.is_compiling() else _ids(_parameters(steps))

    def run(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return _in_turn(steps, x, context)
        _check_same(steps, held)
        with check_values(checked):
            return _in_turn(steps, x, context)

    return checkpoint(run, x, context, use_reentrant=False, preserve_rng_state=False)


@torch.compiler.disable
def _reversed(steps: Sequence[_Step], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    parameters = {id(p): p for p in _parameters(steps) if p.requires_grad}
    return _Stretch.apply(steps, x, context, *parameters.values())


def _parameters(steps: Sequence[_Step]) -> list[Tensor]:
    return [p for step in steps for p in step.layer.parameters()]


def _ids(parameters: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, parameters))


def _check_same(steps: Sequence[_Step], held: Iterable[int]) -> None:
    """Raise unless the layers still have the parameters of the forward pass."""
    if not {*held} <= {*_ids(_parameters(steps))}:
        raise RuntimeError(
            "memory: expected the layers to have the same parameters in the backward pass as in "
            "the forward pass, got others (torch.func.functional_call?); take memory=stored"
        )


_RUNS = {"checkpoint": _checkpointed, "reversible": _reversed}


class _Stretch(torch.autograd.Function):
    """Layers of which only the last output is kept.

    The parameters are inputs, so that their gradients go the usual way: into ``.grad``, through
    hooks, and through those of distributed data parallel.
    """

    @staticmethod
    def forward(
        ctx: Any, steps: Sequence[_Step], x: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        ctx.steps = steps
        ctx.dtype = x.dtype
        ctx.held = _ids(parameters)  # what is saved may come back as another object
        # without autocast's cache: here it would keep copies of weights that know no gradient, for
        # the rest of the step to find
        ctx.autocast = dict(
            device_type=device,
            enabled=torch.is_autocast_enabled(device),
            dtype=torch.get_autocast_dtype(device),
            cache_enabled=False,
        )
        with torch.autocast(**ctx.autocast):
            z, ldj = _in_turn(steps, x, context)
        ctx.save_for_backward(z, context, *parameters)
        return z, ldj

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_ldj: Tensor) -> tuple[Tensor | None, ...]:
        z, context, *_ = ctx.saved_tensors  # of the parameters, that nobody has changed them
        _check_same(ctx.steps, ctx.held)
        seen = None
        if context is not None:
            seen = context.detach().requires_grad_(ctx.needs_input_grad[2])
        sums: dict[int, Tensor] = {}
        z = z.detach()
        with check_values(False), torch.autocast(**ctx.autocast):
            for step in reversed(ctx.steps):
                z, grad_z = _back(step, z, seen, grad_z, grad_ldj, sums)
        return (
            None,
            grad_z.to(ctx.dtype) if ctx.needs_input_grad[1] else None,
            None if seen is None else sums.get(id(seen)),
            *(sums.get(key) for key in ctx.held),
        )


def _back(
    step: _Step,
    z: Tensor,
    context: Tensor | None,
    grad_z: Tensor,
    grad_ldj: Tensor,
    sums: dict[int, Tensor],
) -> tuple[Tensor, Tensor]:
    """One layer's input and the gradient there; those of its parameters are added to ``sums``."""
    with torch.enable_grad():
        parts, join, again, ldj = step.retrace(z, context)
    others = [p for p in step.layer.parameters() if p.requires_grad]
    if context is not None and context.requires_grad:
        others.append(context)
    pairs = [(again, grad_z.to(again.dtype)), (ldj, grad_ldj.to(ldj.dtype))]
    outputs, gradients = zip(*(p for p in pairs if p[0].requires_grad), strict=True)
    found = torch.autograd.grad(outputs, [*parts, *others], gradients, allow_unused=True)
    for leaf, gradient in zip(others, found[len(parts) :], strict=True):
        if gradient is not None:
            key = id(leaf)
            sums[key] = sums[key] + gradient if key in sums else gradient
    into = [
        torch.zeros_like(part) if gradient is None else gradient
        for part, gradient in zip(parts, found, strict=False)
    ]
    return join(*(p.detach() for p in parts)), join(*into)
