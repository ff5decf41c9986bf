"""A training step of a flow of two features, against a plain implementation of the same flow.

The plain implementation is what a textbook gives: separate modules, eager mode, torch Adam
with neither fused nor batched kernels, one loop over parameters. Both run the published setting
(batch 128, 4 affine couplings, MLP [200, 100], float32) from the same initial weights on the same
batches; their losses are compared before they are timed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks.harness import Step, in_turns, milliseconds, page_of, picked, ratios, seconds, table
from surflow.data.synthetic import make_dataset
from surflow.errors import UserError
from surflow.models import coupling_flow, coupling_net
from surflow.transforms import AffineMap, check_values

HIDDEN = (200, 100)


class PlainAffineCoupling(nn.Module):
    """An affine coupling as one would first write it."""

    def __init__(self) -> None:
        super().__init__()
        first, last = nn.Linear(1, HIDDEN[0]), nn.Linear(*HIDDEN)
        self.net = nn.Sequential(first, nn.ReLU(), last, nn.ReLU(), nn.Linear(HIDDEN[1], 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        params = self.net(x1).view(-1, 1, 2)
        scale, shift = F.softplus(params[..., 0]), params[..., 1]
        z2 = scale * x2 + shift
        return torch.cat([x1, z2], dim=1), torch.log(scale).sum(dim=1)


class PlainReverse(nn.Module):
    """Exchange the two coordinates, by index."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([1, 0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.index), torch.zeros(len(x))


class PlainFlow(nn.Module):
    """Couplings with reversals between them and a standard normal."""

    def __init__(self, num_couplings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_couplings):
            layers += [PlainAffineCoupling(), PlainReverse()]
        self.layers = nn.ModuleList(layers[:-1])

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, 2) -> (B,), nats."""
        total = torch.zeros(len(x))
        for layer in self.layers:
            x, ldj = layer(x)
            total = total + ldj
        base = -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
        return total + base.sum(dim=1)


def build_pair(num_couplings: int) -> tuple[PlainFlow, nn.Module]:
    """A plain flow and ours, of the same function: the same weights."""
    torch.manual_seed(0)
    plain = PlainFlow(num_couplings)
    ours = coupling_flow(
        2,
        AffineMap("softplus"),
        lambda i, o: coupling_net(i, o, HIDDEN),
        num_couplings=num_couplings,
        support="unmapped",
    )
    theirs = [m for m in plain.layers if isinstance(m, PlainAffineCoupling)]
    for a, b in zip(theirs, ours.transforms, strict=True):
        b.net.load_state_dict({f"layers.{k}": v.clone() for k, v in a.net.state_dict().items()})
    return plain, ours


def run(cfg: DictConfig, compiled: bool) -> dict[str, Any]:
    """Measure; ``cfg`` is the whole config, whose top level holds this part's options."""
    if cfg.blocks < 3 or cfg.steps < 1:
        raise UserError(f"blocks and steps: expected >= 3 and >= 1, got {cfg.blocks}, {cfg.steps}")
    data = make_dataset("corners").sample(64_000, torch.Generator().manual_seed(0))
    plain, ours = build_pair(cfg.num_couplings)
    with torch.no_grad():
        difference = (plain.log_prob(data[:4096]) - ours.log_prob(data[:4096])).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(f"the two flows differ by {difference} nats: nothing to compare")

    def our_loss(x: Tensor) -> Tensor:
        return -ours.log_prob(x).mean()

    slow = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=False, foreach=False)
    fast = torch.optim.Adam(ours.parameters(), lr=1e-3, fused=True)
    fast_loss = torch.compile(our_loss, dynamic=False) if compiled else our_loss
    steps = {
        "plain": Step(lambda x: -plain.log_prob(x).mean(), slow, data, cfg.batch_size),
        "ours": Step(fast_loss, fast, data, cfg.batch_size),
    }
    with check_values(False):
        warm_up = sum(20 * seconds(step, 20) for step in steps.values())
        clocks = {name: partial(seconds, step, cfg.steps) for name, step in steps.items()}
        times = in_turns(clocks, cfg.blocks)
    return {
        "what": "one training step: forward, backward, Adam",
        "setting": {
            **picked(cfg, "batch_size", "num_couplings"),
            "hidden_features": list(HIDDEN),
            "precision": "float32",
            "threads": torch.get_num_threads(),
            "compiled": compiled,
            "blocks": cfg.blocks,
            "steps_per_block": cfg.steps,
        },
        "largest_difference_nats": difference,
        "warm_up_s": round(warm_up, 2),
        "ms_per_step": milliseconds(times, 3),
        "speedup": ratios(times["plain"], times["ours"]),
    }


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    s, r = result["setting"], result["speedup"]
    mode = "torch.compile" if s["compiled"] else "eager (not compiled)"
    labels = {
        "plain": "plain: separate modules, eager, Adam without fused or batched kernels",
        "ours": f"surflow: {mode}, fused Adam",
    }
    cells = {name: [f"{t:.2f}" for t in ms.values()] for name, ms in result["ms_per_step"].items()}
    blocks = [
        f"{result['what']}; batch {s['batch_size']}, {s['num_couplings']} affine couplings, "
        f"MLP {s['hidden_features']}, {s['precision']}, {s['threads']} thread(s); "
        f"{s['blocks']} blocks of {s['steps_per_block']} steps each, in turns.",
        table(
            ("implementation", "min, ms", "median, ms", "max, ms"),
            ((label, *cells[name]) for name, label in labels.items()),
        ),
        f"Speed-up, block by block: median {r['median']:.2f} x (min {r['min']:.2f}, "
        f"max {r['max']:.2f}). The two flows have the same weights and differ by at most "
        f"{result['largest_difference_nats']:.1e} nats. Compilation and warm-up took "
        f"{result['warm_up_s']:.0f} s and are not in the times.",
    ]
    return page_of("Training step, side by side", blocks, result)
