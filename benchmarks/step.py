"""Time ours against others, side by side.

    make bench

Four parts. The first times a training step against a plain implementation of the same flow, the
second (:mod:`surflow.cli.bench_splines`) a spline coupling flow against three other libraries, the
third (:mod:`surflow.cli.bench_images`) an image flow against the same run plainly; ``make
bench-gpu`` runs that at full size. The fourth (:mod:`surflow.cli.bench_vae`) times the nets of VAEs
alone, their step, and that step in the training loop.

The plain implementation is what a textbook gives: separate modules, eager mode, torch Adam
with neither fused nor batched kernels, one loop over parameters. Both run the published setting
(batch 128, 4 affine couplings, MLP [200, 100], float32) from the same initial weights on the same
batches; first their losses are compared, then they are timed in turns, block by block, so that a
machine whose speed drifts slows both alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from surflow.cli.common import guarded, one_line_errors, origin_line, relative
from surflow.config import conf_dir
from surflow.errors import UserError
from surflow.models import coupling_flow, coupling_net
from surflow.reporting.records import write_bytes_atomic, write_json_atomic, write_text_atomic
from surflow.transforms import AffineMap, check_values

HIDDEN = (200, 100)


class PlainAffineCoupling(nn.Module):
    """An affine coupling as one would first write it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, HIDDEN[0]),
            nn.ReLU(),
            nn.Linear(HIDDEN[0], HIDDEN[1]),
            nn.ReLU(),
            nn.Linear(HIDDEN[1], 2),
        )

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


def stepper(
    loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, data: Tensor, batch: int
) -> Callable[[int], float]:
    """``step(n)``: seconds for n training steps."""
    position = 0

    def steps(n: int) -> float:
        nonlocal position
        start = time.perf_counter()
        for _ in range(n):
            x = data[position : position + batch]
            position = (position + batch) % (len(data) - batch)
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
        return time.perf_counter() - start

    return steps


def compiles(cfg: DictConfig) -> bool:
    """Whether ours is compiled: ``compile`` of the config, by default where it can be."""
    from surflow.training.module import can_compile

    if cfg.compile not in ("auto", True, False):
        raise UserError(f"compile: expected auto, true or false, got {cfg.compile!r}")
    return can_compile() if cfg.compile == "auto" else cfg.compile


def bench(cfg: DictConfig) -> None:
    """Run the parts that the config names."""
    known = {"step": bench_step, "spline": bench_spline, "images": bench_images, "vae": bench_vae}
    wrong = [part for part in cfg.parts if part not in known]
    if wrong:
        raise UserError(f"parts: expected some of {', '.join(known)}, got {wrong[0]!r}")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    for part in cfg.parts:
        known[part](cfg)


def bench_spline(cfg: DictConfig) -> dict[str, object]:
    """The second part; returns what is written to results/bench/spline.json."""
    from surflow.cli import bench_splines
    from surflow.training.record import origin

    result = bench_splines.run(cfg.spline, compiles(cfg)) | origin()
    folder = Path(cfg.results_root) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "spline.json", result)
    write_text_atomic(folder / "spline.md", bench_splines.page(result))
    write_bytes_atomic(folder / "spline.png", bench_splines.picture(result))
    print(bench_splines.page(result))
    print(f"{relative(folder)}/: spline.json, spline.md, spline.png")
    return result


def bench_images(cfg: DictConfig) -> dict[str, object]:
    """The third part; returns what is written to results/bench/images.json."""
    from surflow.cli import bench_images
    from surflow.training.record import origin

    result = bench_images.run(cfg.images, compiles(cfg)) | origin()
    folder = Path(cfg.results_root) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / f"{cfg.images.name}.json", result)
    write_text_atomic(folder / f"{cfg.images.name}.md", bench_images.page(result))
    print(bench_images.page(result))
    print(f"{relative(folder)}/: {cfg.images.name}.json, {cfg.images.name}.md")
    return result


def bench_vae(cfg: DictConfig) -> dict[str, object]:
    """The fourth part; returns what is written to results/bench/vae.json."""
    from surflow.cli import bench_vae
    from surflow.training.record import origin

    result = bench_vae.run(cfg.vae, compiles(cfg)) | origin()
    folder = Path(cfg.results_root) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / f"{cfg.vae.name}.json", result)
    write_text_atomic(folder / f"{cfg.vae.name}.md", bench_vae.page(result))
    print(bench_vae.page(result))
    print(f"{relative(folder)}/: {cfg.vae.name}.json, {cfg.vae.name}.md")
    return result


def bench_step(cfg: DictConfig) -> dict[str, object]:
    """The first part; returns what is written to results/bench/step.json."""
    from surflow.data.synthetic import make_dataset
    from surflow.training.record import origin

    if cfg.blocks < 3 or cfg.steps < 1:
        raise UserError(f"blocks and steps: expected >= 3 and >= 1, got {cfg.blocks}, {cfg.steps}")
    generator = torch.Generator().manual_seed(0)
    data = make_dataset("corners").sample(64_000, generator)
    plain, ours = build_pair(cfg.num_couplings)
    with torch.no_grad():
        difference = (plain.log_prob(data[:4096]) - ours.log_prob(data[:4096])).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(f"the two flows differ by {difference} nats: nothing to compare")
    compiled = compiles(cfg)

    def our_loss(x: Tensor) -> Tensor:
        return -ours.log_prob(x).mean()

    fast_loss = torch.compile(our_loss, dynamic=False) if compiled else our_loss
    runs = {
        "plain": stepper(
            lambda x: -plain.log_prob(x).mean(),
            torch.optim.Adam(plain.parameters(), lr=1e-3, fused=False, foreach=False),
            data,
            cfg.batch_size,
        ),
        "ours": stepper(
            fast_loss,
            torch.optim.Adam(ours.parameters(), lr=1e-3, fused=True),
            data,
            cfg.batch_size,
        ),
    }
    with check_values(False):
        start = time.perf_counter()
        for steps in runs.values():
            steps(20)
        warm_up = time.perf_counter() - start
        times: dict[str, list[float]] = {name: [] for name in runs}
        for block in range(cfg.blocks):
            order = list(runs) if block % 2 == 0 else list(reversed(runs))
            for name in order:
                times[name].append(runs[name](cfg.steps) / cfg.steps * 1e3)
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    result = {
        "what": "one training step: forward, backward, Adam",
        "setting": {
            "batch_size": cfg.batch_size,
            "num_couplings": cfg.num_couplings,
            "hidden_features": list(HIDDEN),
            "precision": "float32",
            "threads": torch.get_num_threads(),
            "compiled": compiled,
            "blocks": cfg.blocks,
            "steps_per_block": cfg.steps,
        },
        "largest_difference_nats": difference,
        "warm_up_s": round(warm_up, 2),
        "ms_per_step": {
            name: {
                "min": round(min(v), 3),
                "median": round(statistics.median(v), 3),
                "max": round(max(v), 3),
            }
            for name, v in times.items()
        },
        "speedup": {
            "min": round(min(ratios), 2),
            "median": round(statistics.median(ratios), 2),
            "max": round(max(ratios), 2),
        },
        **origin(),
    }
    folder = Path(cfg.results_root) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "step.json", result)
    write_text_atomic(folder / "step.md", page(result))
    print(page(result))
    print(f"{relative(folder)}/: step.json, step.md")
    return result


def page(result: dict) -> str:
    """The result as Markdown."""
    s, m = result["setting"], result["ms_per_step"]
    lines = [
        "# Training step, side by side",
        "",
        f"{result['what']}; batch {s['batch_size']}, {s['num_couplings']} affine couplings, "
        f"MLP {s['hidden_features']}, {s['precision']}, {s['threads']} thread(s); "
        f"{s['blocks']} blocks of {s['steps_per_block']} steps each, in turns.",
        "",
        "| implementation | min, ms | median, ms | max, ms |",
        "| --- | ---: | ---: | ---: |",
    ]
    names = {
        "plain": "plain: separate modules, eager, Adam without fused or batched kernels",
        "ours": "surflow: "
        + ("torch.compile, " if s["compiled"] else "eager (not compiled), ")
        + "fused Adam",
    }
    for name, label in names.items():
        v = m[name]
        lines.append(f"| {label} | {v['min']:.2f} | {v['median']:.2f} | {v['max']:.2f} |")
    r = result["speedup"]
    lines += [
        "",
        f"Speed-up, block by block: median {r['median']:.2f} x (min {r['min']:.2f}, "
        f"max {r['max']:.2f}). The two flows have the same weights and differ by at most "
        f"{result['largest_difference_nats']:.1e} nats. Compilation and warm-up took "
        f"{result['warm_up_s']:.0f} s and are not in the times.",
        "",
        origin_line(result, "make bench"),
        "",
    ]
    return "\n".join(lines)


@hydra.main(config_path=conf_dir(), config_name="bench", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        bench(cfg)


main = guarded(_main)

if __name__ == "__main__":
    main()
