"""Checks of the graph: its gradients, and that ``torch.compile`` takes it whole."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surflow.proofs.proof import Trial, applies_where, check, expect, expect_small, gap


def _scored(
    trial: Trial, run: Callable, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor | None], Tensor | None]:
    """z, ldj, the gradients of the mean log-likelihood: of parameters and x, None without one."""
    of = {name: p for name, p in trial.t.named_parameters() if p.requires_grad}
    through = [x.detach().clone().requires_grad_()] if x.is_floating_point() else []
    z, ldj = run(*(through or [x]), context)
    mean = (trial.base_log_prob(z, context) + ldj).mean()
    if not (of or through) or not mean.requires_grad:
        return z, ldj, dict.fromkeys(of), None
    found = torch.autograd.grad(mean, [*of.values(), *through], allow_unused=True)
    return z, ldj, dict(zip(of, found, strict=False)), found[-1] if through else None


@check
@torch.enable_grad()
def gradients(trial: Trial, n: int = 64):
    """The mean log-likelihood has finite gradients, and every parameter gets one that is not zero.

    That of x, unless it is an integer, must be finite: the layers before this one learn by it.
    """
    x, context, _ = trial.inputs(n)
    *_, of_parameters, of_x = _scored(trial, trial.t, x, context)
    expect(of_x is None or bool(of_x.isfinite().all()), "the gradient of x is not finite")
    said = "; the gradient of x is finite" if x.is_floating_point() else ""
    applies_where(bool(of_parameters), f"no parameters{said}")
    norms = {}
    for name, gradient in of_parameters.items():
        expect(gradient is not None, f"no gradient reaches {name}")
        expect(bool(gradient.isfinite().all()), f"the gradient of {name} is not finite")
        norms[name] = gradient.norm().item()
        expect(norms[name] >= 1e-12, f"the gradient of {name} is zero", **norms)
    return f"finite and not zero for {len(norms)} parameters", norms


@check
def compiles(trial: Trial, n: int = 8, backend: str = "aot_eager", tolerance: float = 1e-7):
    """Both directions and the gradient go through ``torch.compile`` as one graph each.

    ``forward`` with the backward of the mean log-likelihood, ``inverse`` and ``inverse_and_ldj``
    are compiled with ``fullgraph=True``, where a graph break is an error; so is reading a value
    to the host (``.item()``), which breaks the graph elsewhere. What comes out is finite and, in
    a deterministic direction, what the layer gives uncompiled. ``compiles = False`` needs a reason.

    It takes seconds, so it is no member of ``CHECKS``; ``prove`` runs it where a backend is named.
    With "aot_eager" ``inverse`` is only traced: ``inverse_and_ldj`` lowers the same.
    """
    t, gaps = trial.t, {}
    said = t.compiles or bool(t.why_not_compiled.strip())
    expect(said, "declares compiles = False without saying why in why_not_compiled")
    applies_where(t.compiles, f"declared as not compiled: {t.why_not_compiled}")
    x, context, latent = trial.both_sides(n)

    def scored(run: Callable) -> dict[str, Tensor | None]:
        z, ldj, of_parameters, of_x = _scored(trial, run, x, context)
        of = {f"gradient of {name}": gradient for name, gradient in of_parameters.items()}
        return {"z": z, "ldj": ldj, **of, "gradient of x": of_x}

    def generated(run: Callable) -> dict[str, Tensor | None]:
        return dict(zip(("x", "ldj"), trial.call(run, latent, context), strict=False))

    for name, method, _, stochastic in trial.methods(x, latent):
        collect = scored if name == "forward" else generated
        traced = backend == "aot_eager" and name == "inverse"
        with torch.set_grad_enabled(name == "forward"):
            expected = collect(method)
            with _one_graph(name, method, "eager" if traced else backend) as run:
                found = collect(run)
        for key, value in found.items():
            if expected[key] is None:  # nothing to differentiate
                continue
            expect(value is not None, f"{name}, compiled: the {key} is missing")
            expect(bool(value.isfinite().all()), f"{name}, compiled: the {key} is not finite")
            if not stochastic:
                gaps[f"{name}: {key}"] = gap(value, expected[key])
    worst = expect_small(gaps, tolerance, "{name} changes by {gap:.3g} when compiled")
    return f"one graph each way ({backend}), within {worst:.3g}", gaps


@contextlib.contextmanager
def _one_graph(name: str, method: Callable, backend: str) -> Iterator[Callable]:
    """The compiled method; the block fails where it is not one graph, or reads a value."""
    read: list[str] = []

    def watched(graph: Any, inputs: list[Any]) -> Callable:
        for node in graph.graph.nodes:
            if node.op == "call_method" and node.target in ("item", "tolist"):
                read.append(_last_frame(node.stack_trace or "") or f"`{node}`")
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    try:
        yield torch.compile(method, fullgraph=True, dynamic=False, backend=watched)
    except Exception as error:
        expect(False, f"{name}: {_compile_error(error)}")
    finally:
        torch._dynamo.reset()
    expect(not read, f"{name}: graph break at {'; '.join(read[:1])}: reads a value to the host")


def _compile_error(error: Exception) -> str:
    """One sentence for what the compiler says in many lines: what, where, in whose code."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    # where a backend raised, the second line is what it says
    said = " ".join(lines[: 1 + lines[0].endswith("raised:")])
    key = "Explanation: "
    said += "".join([f": {li.removeprefix(key)}" for li in lines if li.startswith(key)][:1])
    place = _last_frame(text.partition("from user code:")[2])
    where = f"graph break at {place}" if place else f"does not compile, {type(error).__name__}"
    return f"{where}: {said}"


def _last_frame(trace: str) -> str:
    """The innermost place of a stack trace, "" without one."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)', trace)[-1:]
    return "".join(f"{Path(p).name}:{line} in {f}, `{c.strip()}`" for p, line, f, c in frames)
