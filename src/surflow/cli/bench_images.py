"""Time image flows: training, sampling, bounds, memory, and where an FID run's time goes.

The part ``images`` of ``make bench``, and ``make bench-gpu``. Ours is a PoolFlow as it trains here:
channels last, compiled, batched optimizer kernels, no value read back. It is set against the same
model with the same weights as its authors' code runs it: eager, float32, layout as stored, one
optimizer kernel a parameter and the loss read back each step. Both take the same batches, in turns,
block by block.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from surflow.cli.common import origin_line
from surflow.errors import UserError
from surflow.evaluation.generation import GenerationProtocol, generation_seconds
from surflow.flow import Flow
from surflow.memory import MODES, LiveBytes, set_memory, use_channels_last
from surflow.models import pool_flow
from surflow.objectives import bits_per_dim, iwbo
from surflow.transforms import Conv1x1, Coupling, check_values

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POOL = 512  # images that batches are cut from


def compile_whole(flow: Flow, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.compile(loss, dynamic=False)


def compile_layers(flow: Flow, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    for part in flow.modules():
        if isinstance(part, Coupling | Conv1x1):
            part.compile(dynamic=False)
    return loss


def compile_nets(flow: Flow, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    set_memory(flow, "stored", compile_nets=True)
    return loss


COMPILE = {
    "whole": compile_whole,
    "layers": compile_layers,
    "nets": compile_nets,
    "none": lambda flow, loss: loss,
}


class Training:
    """A model, its optimizer and what a step of it does.

    Args:
        flow: the model, on its device.
        images: (N, C, H, W), integers, on the same device.
        lr: learning rate of Adamax.
        batched: whether the optimizer's kernels take many parameters at a time.
        compile: how the loss is compiled, a key of ``COMPILE``.
        precision: of autocast, a key of ``PRECISIONS``.
        channels_last: layout of images and weights.
        read_back: whether each step reads the loss.
    """

    def __init__(
        self,
        flow: Flow,
        images: Tensor,
        lr: float,
        batched: bool = True,
        compile: str = "none",
        precision: str = "float32",
        channels_last: bool = False,
        read_back: bool = False,
    ) -> None:
        self.flow = flow
        self.device = images.device.type
        self.precision = PRECISIONS[precision]
        self.read_back = read_back
        self.position = 0
        if channels_last:
            use_channels_last(flow)
            images = images.contiguous(memory_format=torch.channels_last)
        self.images = images
        self.optimizer = torch.optim.Adamax(flow.parameters(), lr=lr, foreach=batched)
        self.loss = COMPILE[compile](flow, lambda x: -flow.log_prob(x).mean())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def batch(self, size: int) -> Tensor:
        if self.position + size > len(self.images):
            self.position = 0
        x = self.images[self.position : self.position + size]
        self.position += size
        return x

    def step(self, size: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(self.batch(size))
        (loss / self.images[0].numel()).backward()
        self.optimizer.step()
        if self.read_back:
            loss.item()

    def seconds(self, steps: int, size: int) -> float:
        """For so many steps."""
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step(size)
        synchronise(self.device)
        return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(
    contenders: dict[str, Training], blocks: int, steps: int, size: int
) -> dict[str, list[float]]:
    """Seconds a step of each, block by block, the order turned round each time."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for block in range(blocks):
        for name in list(contenders) if block % 2 == 0 else list(reversed(contenders)):
            times[name].append(contenders[name].seconds(steps, size) / steps)
    return times


def spread(values: list[float], digits: int = 2) -> dict[str, float]:
    ordered = {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }
    return {k: round(v, digits) for k, v in ordered.items()}


def count_flops(training: Training, size: int) -> dict[str, float]:
    """Floating-point operations of convolutions and products, an image: forward, and a step."""
    x = training.batch(size)
    with FlopCounterMode(display=False) as forward:
        loss = training.flow.log_prob(x).mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    training.flow.zero_grad(set_to_none=True)
    one, other = forward.get_total_flops(), backward.get_total_flops()
    return {"forward": one / size, "step": (one + other) / size}


@contextlib.contextmanager
def peak_bytes(device: str, found: dict[str, float]) -> Iterator[None]:
    """The most memory that tensors made inside take up: of the allocator, or counted."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    with LiveBytes() as live:
        yield
    found["peak_mib"] = live.peak / 2**20


def measure_memory(training: Training, size: int, steps: int) -> list[dict[str, Any]]:
    """What a backward pass takes in each mode, gradients included, and how long a step is."""
    rows = []
    for mode in MODES:
        set_memory(training.flow, mode)
        training.flow.zero_grad(set_to_none=True)
        row: dict[str, Any] = {"mode": mode}
        x = training.batch(size)
        with peak_bytes(training.device, row):
            with training.autocast():
                loss = -training.flow.log_prob(x).mean()
            loss.backward()
        del loss
        row["peak_mib"] = round(row["peak_mib"], 3)
        training.seconds(1, size)
        row["images_per_s"] = round(size * steps / training.seconds(steps, size), 2)
        rows.append(row)
    set_memory(training.flow, "stored")
    training.flow.zero_grad(set_to_none=True)
    return rows


def throughput(training: Training, run: Callable[[], Any], count: int, repeats: int) -> float:
    """``count`` things a second, the median over repeats."""
    seconds = []
    with torch.no_grad(), training.autocast():
        run()
        for _ in range(repeats):
            synchronise(training.device)
            start = time.perf_counter()
            run()
            synchronise(training.device)
            seconds.append(time.perf_counter() - start)
    return round(count / statistics.median(seconds), 2)


def fid_seconds(flow: Flow, cfg: DictConfig, shape: tuple[int, ...]) -> dict[str, Any]:
    """Where the time of drawing and scoring samples goes; the reference images are noise."""
    if not cfg.n:
        return {}
    reference = torch.randint(256, (cfg.reference, *shape), dtype=torch.uint8)
    protocol = GenerationProtocol(n=cfg.n, extractor=cfg.extractor)
    try:
        seconds = generation_seconds(
            flow, reference, protocol, inception_weights=cfg.inception_weights
        )
    except ValueError as reason:
        return {"missing": str(reason)}
    return {
        "n": cfg.n,
        "reference": cfg.reference,
        "extractor": cfg.extractor,
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
    }


def check(cfg: DictConfig, can_compile: bool) -> list[str]:
    """The ways to compile that will be timed; UserError for what cannot be."""
    for key, known in (("precision", PRECISIONS), ("compile", COMPILE)):
        given = [cfg[key]] if isinstance(cfg[key], str) else list(cfg[key])
        wrong = [value for value in given if value not in known]
        if wrong or not given:
            raise UserError(
                f"images.{key}: expected one of {', '.join(known)}, got "
                f"{wrong[0] if wrong else 'none of them'!r}"
            )
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("images.device: expected a CUDA device, got a machine without one")
    largest = max(cfg.batch_size, cfg.memory_batch, cfg.iwbo.rows, *cfg.larger_batches, 1)
    if cfg.blocks < 3 or cfg.steps < 1 or largest > POOL:
        raise UserError(
            "images: expected blocks >= 3, steps >= 1 and batches of at most "
            f"{POOL}, got {cfg.blocks}, {cfg.steps} and {largest}"
        )
    ways = [way for way in cfg.compile if can_compile or way == "none"]
    return ways or ["none"]


def run(cfg: DictConfig, can_compile: bool) -> dict[str, Any]:
    """Measure; ``cfg`` is the part ``images`` of the config."""
    ways = check(cfg, can_compile)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch.manual_seed(0)
    model = OmegaConf.to_container(cfg.model, resolve=True)
    flow = pool_flow(**model).to(cfg.device)
    shape = tuple(model["shape"])
    images = torch.randint(256, (POOL, *shape), device=cfg.device)
    lr = cfg.optimizer.lr

    ours = dict(precision=cfg.precision, channels_last=cfg.channels_last)
    plain = Training(flow, images, lr, batched=False, read_back=True)
    contenders = {"plain": plain} | {
        way: Training(copy.deepcopy(flow), images, lr, compile=way, **ours) for way in ways
    }
    flops = count_flops(plain, cfg.batch_size)
    bpd = {}
    with torch.no_grad(), check_values(False):
        for name in ("plain", ways[0]):
            training = contenders[name]
            torch.manual_seed(1)
            with training.autocast():
                log_p = training.flow.log_prob(training.images[: cfg.batch_size])
            bpd[name] = bits_per_dim(log_p, math.prod(shape)).mean().item()
    with check_values(False):
        warm_up = {name: t.seconds(3, cfg.batch_size) for name, t in contenders.items()}
        times = in_turns(contenders, cfg.blocks, cfg.steps, cfg.batch_size)
        best = min(ways, key=lambda way: statistics.median(times[way]))
        for name in [n for n in contenders if n not in (best, "plain")]:
            del contenders[name]
        fast = contenders[best]
        del contenders["plain"], plain, flow
        batches = []
        for size in (cfg.batch_size, *cfg.larger_batches):
            fast.seconds(2, size)
            seconds = statistics.median(fast.seconds(cfg.steps, size) / cfg.steps for _ in range(3))
            batches.append(rate(size, seconds, flops["step"], cfg))
        eager = Training(copy.deepcopy(fast.flow), images, lr, **ours)
        memory = measure_memory(eager, cfg.memory_batch, cfg.steps)
        flow = eager.flow.eval()
        sampling = throughput(eager, lambda: flow.sample(cfg.samples), cfg.samples, 3)
        rows = eager.batch(cfg.iwbo.rows)
        bound = throughput(
            eager,
            lambda: iwbo(flow, rows, num_samples=cfg.iwbo.samples),
            cfg.iwbo.rows * cfg.iwbo.samples,
            3,
        )
    with check_values(False):
        fid = fid_seconds(flow, cfg.fid, shape)
    against = {
        way: spread([a / b for a, b in zip(times["plain"], times[way], strict=True)])
        for way in ways
    }
    return {
        "what": "one training step of a PoolFlow: forward, backward, Adamax",
        "setting": {
            "device": device_name(cfg.device),
            "model": model,
            "parameters": sum(p.numel() for p in flow.parameters()),
            "batch_size": cfg.batch_size,
            "precision": cfg.precision,
            "channels_last": cfg.channels_last,
            "threads": torch.get_num_threads(),
            "tf32": {
                "convolutions": torch.backends.cudnn.allow_tf32,
                "products": torch.backends.cuda.matmul.allow_tf32,
            },
            "blocks": cfg.blocks,
            "steps_per_block": cfg.steps,
        },
        "bpd_of_the_same_weights": {"plain": bpd["plain"], "ours": bpd[ways[0]]},
        "warm_up_s": {name: round(s, 1) for name, s in warm_up.items()},
        "ms_per_step": {name: spread([1e3 * s for s in v]) for name, v in times.items()},
        "images_per_s": {
            name: round(cfg.batch_size / statistics.median(v), 2) for name, v in times.items()
        },
        "speedup": against,
        "best": best,
        "gflop_per_image": {k: round(v / 1e9, 3) for k, v in flops.items()},
        "peak_tflops": peak_of(cfg),
        "batches": batches,
        "memory": {"batch_size": cfg.memory_batch, "rows": memory},
        "samples_per_s": sampling,
        "samples_at_a_time": cfg.samples,
        "iwbo_draws_per_s": bound,
        "iwbo": OmegaConf.to_container(cfg.iwbo),
        "fid": fid,
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def peak_of(cfg: DictConfig) -> float | None:
    """The device's dense bfloat16 peak, TFLOP/s; None where the config does not know it."""
    name = device_name(cfg.device)
    return next((peak for part, peak in cfg.peak_tflops.items() if part in name), None)


def rate(size: int, seconds: float, flops: float, cfg: DictConfig) -> dict[str, Any]:
    """Images a second of one batch size, and what that is in arithmetic."""
    achieved = size * flops / seconds / 1e12
    peak = peak_of(cfg)
    return {
        "batch_size": size,
        "images_per_s": round(size / seconds, 2),
        "tflops": round(achieved, 4),
        "share_of_peak": None if peak is None else round(achieved / peak, 4),
    }


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    s = result["setting"]
    command = "make bench" if s["device"] == "cpu" else "make bench-gpu"
    lines = [
        "# Image flows",
        "",
        f"PoolFlow, {s['parameters'] / 1e6:.2f} M parameters, images "
        f"{' x '.join(map(str, s['model']['shape']))}, on {s['device']}"
        + (f", {s['threads']} thread(s)" if s["device"] == "cpu" else "")
        + f". {result['what']}, batch {s['batch_size']}; {s['blocks']} blocks of "
        f"{s['steps_per_block']} step(s) each, in turns.",
        "",
        "| implementation | images/s | min, ms | median, ms | max, ms | against plain |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    layout = ", channels last" if s["channels_last"] else ""
    compiled = {"none": "not compiled"}
    for name, ms in result["ms_per_step"].items():
        label = f"surflow: {s['precision']}{layout}, " + compiled.get(name, f"compiled ({name})")
        if name == "plain":
            label = "plain: float32, eager, layout as stored, the loss read each step"
        ratio = result["speedup"].get(name)
        lines.append(
            f"| {label} | {result['images_per_s'][name]:.1f} | {ms['min']:.1f} | "
            f"{ms['median']:.1f} | {ms['max']:.1f} | "
            + ("" if ratio is None else f"{ratio['median']:.2f} x")
            + " |"
        )
    k = result["iwbo"]
    r, g, b = result["speedup"][result["best"]], result["gflop_per_image"], result["warm_up_s"]
    bpd = result["bpd_of_the_same_weights"]
    lines += [
        "",
        f"Best, block by block: median {r['median']:.2f} x (min {r['min']:.2f}, max "
        f"{r['max']:.2f}). The same weights give {bpd['plain']:.4f} and {bpd['ours']:.4f} bits a "
        "dimension. First steps, with compilation: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in b.items())
        + ".",
        "",
        f"Arithmetic, counted: {g['forward']:.2f} GFLOP forward and {g['step']:.2f} a step, an "
        "image (convolutions and products).",
        "",
        "| batch | images/s | TFLOP/s | share of the bfloat16 peak |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row in result["batches"]:
        share = row["share_of_peak"]
        shown = "not known" if share is None else f"{share:.1%} of {result['peak_tflops']} TFLOP/s"
        lines.append(
            f"| {row['batch_size']} | {row['images_per_s']:.1f} | {row['tflops']:.3f} | {shown} |"
        )
    lines += [
        "",
        f"Memory of a forward and backward pass, gradients included, weights and optimizer not; "
        f"batch {result['memory']['batch_size']}, eager:",
        "",
        "| memory | peak, MiB | images/s |",
        "| --- | ---: | ---: |",
        *(
            f"| {row['mode']} | {row['peak_mib']:.1f} | {row['images_per_s']:.1f} |"
            for row in result["memory"]["rows"]
        ),
        "",
        f"Sampling, {result['samples_at_a_time']} at a time: {result['samples_per_s']:.1f} "
        f"images/s. IWBO, {k['rows']} images with {k['samples']} draws each: "
        f"{result['iwbo_draws_per_s']:.1f} draws/s. Both eager, {s['precision']}.",
    ]
    fid = result["fid"]
    if "seconds" in fid:
        lines += [
            "",
            f"Scoring {fid['n']} samples against {fid['reference']} images, {fid['extractor']}: "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in fid["seconds"].items())
            + ". Samples are drawn in float32.",
        ]
    elif fid:
        lines += ["", f"Scoring samples was not timed: {fid['missing']}"]
    lines += ["", origin_line(result, command), ""]
    return "\n".join(lines)
