"""Time ours against others, side by side.

    make bench
    python -m benchmarks 'parts=[vae]' vae.blocks=5

:mod:`~benchmarks.step`: a training step against a plain implementation of the same flow.
:mod:`~benchmarks.spline`: a spline coupling flow against three other libraries.
:mod:`~benchmarks.images`: an image flow against plain training; at full size: ``make bench-gpu``.
:mod:`~benchmarks.vae`: the nets of VAEs against their training step and the training loop.

Options are those of conf/bench.yaml. Results: ``<results_root>/bench/``, as JSON and Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from benchmarks import harness, images, spline, step, vae
from surflow.cli.command import command
from surflow.errors import UserError

CONF = Path(__file__).parent / "conf"


class Part(NamedTuple):
    """A benchmark: (options, whether ours is compiled) -> result -> Markdown, maybe a PNG."""

    run: Callable[[DictConfig, bool], dict[str, Any]]
    page: Callable[[dict[str, Any]], str]
    picture: Callable[[dict[str, Any]], bytes] | None = None


PARTS = {
    "step": Part(step.run, step.page),
    "spline": Part(spline.run, spline.page, spline.picture),
    "images": Part(images.run, images.page),
    "vae": Part(vae.run, vae.page),
}


def bench(cfg: DictConfig) -> None:
    """Run the parts that the config names, and write what they give."""
    wrong = [part for part in cfg.parts if part not in PARTS]
    if wrong:
        raise UserError(f"parts: expected some of {', '.join(PARTS)}, got {wrong[0]!r}")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    compiled = harness.compiles(cfg.compile)
    for name in cfg.parts:
        part = PARTS[name]
        options = cfg if name == "step" else cfg[name]
        result = part.run(options, compiled) | harness.origin()
        folder, file = Path(cfg.results_root) / "bench", options.get("name", name)
        png = part.picture(result) if part.picture else None
        harness.write(folder, file, result, part.page(result), png)


if __name__ == "__main__":
    command("bench", str(CONF))(bench)()
