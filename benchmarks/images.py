"""An image flow: training, sampling, bounds, memory, and where an FID run's time goes.

Ours is a PoolFlow as it trains here: channels last, compiled, batched optimizer kernels, no value
read back. It is set against the same model with the same weights as its authors' code runs it:
eager, float32, layout as stored, one optimizer kernel a parameter, the loss read each step.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Step, in_turns, milliseconds, page_of, picked, ratios, seconds, table
from benchmarks.live_bytes import LiveBytes
from surflow.errors import UserError
from surflow.evaluation.generation import GenerationProtocol, generation_seconds
from surflow.flow import Flow
from surflow.memory import MODES, set_memory, use_channels_last
from surflow.models import pool_flow
from surflow.objectives import bits_per_dim, iwbo
from surflow.transforms import Conv1x1, Coupling, check_values

PRECISIONS = ("float32", "bfloat16")
WAYS = ("whole", "layers", "nets", "none")
POOL = 512  # images that batches are cut from


def compile_loss(
    way: str, flow: Flow, loss: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The loss compiled as a whole, or with layers or nets of the flow compiled, or as it is."""
    if way == "whole":
        return torch.compile(loss, dynamic=False)
    if way == "layers":
        for part in flow.modules():
            if isinstance(part, Coupling | Conv1x1):
                part.compile(dynamic=False)
    if way == "nets":
        set_memory(flow, "stored", compile_nets=True)
    return loss


class Training:
    """A flow with its optimizer, in one implementation.

    Args:
        flow: the model, on its device.
        images: (N, C, H, W), integers, on the same device.
        lr: learning rate of Adamax.
        batched: whether the optimizer's kernels take many parameters at a time.
        compile: how the loss is compiled, one of ``WAYS``.
        precision: of autocast, one of ``PRECISIONS``.
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
        if channels_last:
            use_channels_last(flow)
            images = images.contiguous(memory_format=torch.channels_last)
        self.flow, self.images, self.read_back = flow, images, read_back
        self.device, self.half = images.device.type, precision == "bfloat16"
        self.optimizer = torch.optim.Adamax(flow.parameters(), lr=lr, foreach=batched)
        self.mean = compile_loss(compile, flow, lambda x: -flow.log_prob(x).mean())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)

    def loss(self, x: Tensor) -> Tensor:
        """Mean nats a dimension."""
        with self.autocast():
            loss = self.mean(x)
        return loss / x[0].numel()

    def clock(self, steps: int, size: int) -> Callable[[], float]:
        """Seconds a step, over so many steps on batches of this size."""
        step = Step(self.loss, self.optimizer, self.images, size, self.read_back)
        return partial(seconds, step, steps, self.device)


def count_flops(training: Training, size: int) -> dict[str, float]:
    """Floating-point operations of convolutions and products, an image: forward, and a step."""
    with FlopCounterMode(display=False) as forward:
        loss = training.flow.log_prob(training.images[:size]).mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    training.flow.zero_grad()
    one, other = forward.get_total_flops(), backward.get_total_flops()
    return {"forward": one / size, "step": (one + other) / size}


def peak_mib(call: Callable[[], Any], device: str) -> float:
    """The most memory that tensors made by a call take up: of the allocator, or counted."""
    gc.collect()
    if device != "cuda":
        with LiveBytes() as live:
            call()
        return live.peak / 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_memory(training: Training, size: int, steps: int) -> list[dict[str, Any]]:
    """What a backward pass takes in each mode, gradients included, and how long a step is."""
    rows = []
    for mode in MODES:
        set_memory(training.flow, mode)
        training.flow.zero_grad()
        x = training.images[:size]
        peak = peak_mib(lambda x=x: training.loss(x).backward(), training.device)
        training.clock(1, size)()
        rate = size / training.clock(steps, size)()
        rows.append({"mode": mode, "peak_mib": round(peak, 3), "images_per_s": round(rate, 2)})
    set_memory(training.flow, "stored")
    training.flow.zero_grad()
    return rows


def throughput(training: Training, call: Callable[[], Any], count: int) -> float:
    """``count`` things a second, the median of three calls without gradients."""
    with torch.no_grad(), training.autocast():
        call()
        times = [seconds(call, 1, training.device) for _ in range(3)]
    return round(count / statistics.median(times), 2)


def fid_seconds(flow: Flow, cfg: DictConfig, shape: tuple[int, ...]) -> dict[str, Any]:
    """Where the time of drawing and scoring samples goes; the reference images are noise."""
    if not cfg.n:
        return {}
    reference = torch.randint(256, (cfg.reference, *shape), dtype=torch.uint8)
    protocol = GenerationProtocol(n=cfg.n, extractor=cfg.extractor)
    try:
        found = generation_seconds(
            flow, reference, protocol, inception_weights=cfg.inception_weights
        )
    except ValueError as reason:
        return {"missing": str(reason)}
    times = {name: round(s, 2) for name, s in found.items()}
    return picked(cfg, "n", "reference", "extractor") | {"seconds": times}


# The whole ----------------------------------------------------------------------------------------


def check(cfg: DictConfig, compiled: bool) -> list[str]:
    """The ways to compile that will be timed; UserError for what cannot be."""
    for key, known in (("precision", PRECISIONS), ("compile", WAYS)):
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
    return [way for way in cfg.compile if compiled or way == "none"] or ["none"]


def run(cfg: DictConfig, compiled: bool) -> dict[str, Any]:
    """Measure; ``cfg`` is the part ``images`` of the config."""
    ways = check(cfg, compiled)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    with check_values(False):
        contenders = entrants(cfg, ways)
        flops = count_flops(contenders["plain"], cfg.batch_size)
        result = {
            "what": "one training step of a PoolFlow: forward, backward, Adamax",
            "setting": setting(cfg, contenders["plain"].flow),
            "bpd_of_the_same_weights": {
                "plain": bpd(contenders["plain"], cfg.batch_size),
                "ours": bpd(contenders[ways[0]], cfg.batch_size),
            },
            **compare(cfg, contenders),
            "gflop_per_image": {k: round(v / 1e9, 3) for k, v in flops.items()},
            "peak_tflops": peak_of(cfg),
        }
        fast = contenders.pop(result["best"])
        contenders.clear()  # their memory is free for larger batches
        sizes = (cfg.batch_size, *cfg.larger_batches)
        result["batches"] = [rate(fast, size, flops["step"], cfg) for size in sizes]
        return result | without_compilation(cfg, fast)


def entrants(cfg: DictConfig, ways: list[str]) -> dict[str, Training]:
    """The plain implementation, and ours compiled in each way, of the same weights."""
    torch.manual_seed(0)
    flow = pool_flow(**picked(cfg, "model")["model"]).to(cfg.device)
    images = torch.randint(256, (POOL, *cfg.model.shape), device=cfg.device)
    plain = Training(flow, images, cfg.optimizer.lr, batched=False, read_back=True)
    return {"plain": plain} | {way: ours(cfg, copy.deepcopy(flow), images, way) for way in ways}


def bpd(training: Training, size: int) -> float:
    """Bits a dimension of the first images."""
    torch.manual_seed(1)
    x = training.images[:size]
    with torch.no_grad(), training.autocast():
        log_p = training.flow.log_prob(x)
    return bits_per_dim(log_p, x[0].numel()).mean().item()


def compare(cfg: DictConfig, contenders: dict[str, Training]) -> dict[str, Any]:
    """Training steps in turns."""
    warm_up = {name: 3 * t.clock(3, cfg.batch_size)() for name, t in contenders.items()}
    clocks = {name: t.clock(cfg.steps, cfg.batch_size) for name, t in contenders.items()}
    times = in_turns(clocks, cfg.blocks)
    medians = {name: statistics.median(v) for name, v in times.items()}
    speedup = {way: ratios(times["plain"], v) for way, v in times.items() if way != "plain"}
    return {
        "warm_up_s": {name: round(s, 1) for name, s in warm_up.items()},
        "ms_per_step": milliseconds(times),
        "images_per_s": {name: round(cfg.batch_size / s, 2) for name, s in medians.items()},
        "speedup": speedup,
        "best": min(speedup, key=medians.__getitem__),
    }


def ours(cfg: DictConfig, flow: Flow, images: Tensor, way: str = "none") -> Training:
    layout = picked(cfg, "precision", "channels_last")
    return Training(flow, images, cfg.optimizer.lr, compile=way, **layout)


def setting(cfg: DictConfig, flow: Flow) -> dict[str, Any]:
    return {
        "device": device_name(cfg.device),
        **picked(cfg, "model"),
        "parameters": sum(p.numel() for p in flow.parameters()),
        **picked(cfg, "batch_size", "precision", "channels_last"),
        "threads": torch.get_num_threads(),
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        },
        "blocks": cfg.blocks,
        "steps_per_block": cfg.steps,
    }


def without_compilation(cfg: DictConfig, fast: Training) -> dict[str, Any]:
    """Memory, sampling, bounds and scores of ours, eager."""
    eager = ours(cfg, copy.deepcopy(fast.flow), fast.images)
    memory = measure_memory(eager, cfg.memory_batch, cfg.steps)
    flow, rows, draws = eager.flow.eval(), eager.images[: cfg.iwbo.rows], cfg.iwbo.samples
    sampled = throughput(eager, lambda: flow.sample(cfg.samples), cfg.samples)
    bound = throughput(eager, lambda: iwbo(flow, rows, num_samples=draws), len(rows) * draws)
    return {
        "memory": {"batch_size": cfg.memory_batch, "rows": memory},
        "samples_per_s": sampled,
        "samples_at_a_time": cfg.samples,
        "iwbo_draws_per_s": bound,
        **picked(cfg, "iwbo"),
        "fid": fid_seconds(flow, cfg.fid, tuple(cfg.model.shape)),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def peak_of(cfg: DictConfig) -> float | None:
    """The device's dense bfloat16 peak, TFLOP/s; None where the config does not know it."""
    name = device_name(cfg.device)
    return next((peak for part, peak in cfg.peak_tflops.items() if part in name), None)


def rate(training: Training, size: int, flops: float, cfg: DictConfig) -> dict[str, Any]:
    """Images a second of one batch size, and what that is in arithmetic."""
    training.clock(2, size)()
    clock = training.clock(cfg.steps, size)
    images_per_s = size / statistics.median(clock() for _ in range(3))
    achieved, peak = images_per_s * flops / 1e12, peak_of(cfg)
    return {
        "batch_size": size,
        "images_per_s": round(images_per_s, 2),
        "tflops": round(achieved, 4),
        "share_of_peak": None if peak is None else round(achieved / peak, 4),
    }


# What is written ----------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    s, r, k = result["setting"], result["speedup"][result["best"]], result["iwbo"]
    cpu = s["device"] == "cpu"
    g, bpd = result["gflop_per_image"], result["bpd_of_the_same_weights"]
    begun = ", ".join(f"{name} {t:.0f} s" for name, t in result["warm_up_s"].items())
    blocks = [
        f"PoolFlow, {s['parameters'] / 1e6:.2f} M parameters, images "
        f"{' x '.join(map(str, s['model']['shape']))}, on {s['device']}"
        + (f", {s['threads']} thread(s)" if cpu else "")
        + f". {result['what']}, batch {s['batch_size']}; {s['blocks']} blocks of "
        f"{s['steps_per_block']} step(s) each, in turns.",
        times_table(result),
        f"Best, block by block: median {r['median']:.2f} x (min {r['min']:.2f}, max "
        f"{r['max']:.2f}). The same weights give {bpd['plain']:.4f} and {bpd['ours']:.4f} bits a "
        f"dimension. First steps, with compilation: {begun}.",
        f"Arithmetic, counted: {g['forward']:.2f} GFLOP forward and {g['step']:.2f} a step, an "
        "image (convolutions and products).",
        batches_table(result),
        f"Memory of a forward and backward pass, gradients included, weights and optimizer not; "
        f"batch {result['memory']['batch_size']}, eager:",
        table(
            ("memory", "peak, MiB", "images/s"),
            (
                (row["mode"], f"{row['peak_mib']:.1f}", f"{row['images_per_s']:.1f}")
                for row in result["memory"]["rows"]
            ),
        ),
        f"Sampling, {result['samples_at_a_time']} at a time: {result['samples_per_s']:.1f} "
        f"images/s. IWBO, {k['rows']} images with {k['samples']} draws each: "
        f"{result['iwbo_draws_per_s']:.1f} draws/s. Both eager, {s['precision']}.",
        *scoring(result["fid"]),
    ]
    return page_of("Image flows", blocks, result, "make bench" if cpu else "make bench-gpu")


def times_table(result: dict[str, Any]) -> str:
    """Each implementation's rate and times, and ours against the plain one."""
    s = result["setting"]
    layout = ", channels last" if s["channels_last"] else ""
    rows = []
    for name, ms in result["ms_per_step"].items():
        way = "not compiled" if name == "none" else f"compiled ({name})"
        label = f"surflow: {s['precision']}{layout}, {way}"
        if name == "plain":
            label = "plain: float32, eager, layout as stored, the loss read each step"
        ratio = result["speedup"].get(name)
        cells = [f"{t:.1f}" for t in (result["images_per_s"][name], *ms.values())]
        rows.append([label, *cells, "" if ratio is None else f"{ratio['median']:.2f} x"])
    columns = ("implementation", "images/s", "min, ms", "median, ms", "max, ms", "against plain")
    return table(columns, rows)


def batches_table(result: dict[str, Any]) -> str:
    """Rates and arithmetic by size of the batch."""
    rows = []
    for row in result["batches"]:
        share = row["share_of_peak"]
        shown = "not known" if share is None else f"{share:.1%} of {result['peak_tflops']} TFLOP/s"
        cells = [str(row["batch_size"]), f"{row['images_per_s']:.1f}", f"{row['tflops']:.3f}"]
        rows.append([*cells, shown])
    return table(("batch", "images/s", "TFLOP/s", "share of the bfloat16 peak"), rows, text=0)


def scoring(fid: dict[str, Any]) -> list[str]:
    """Where the time of an FID run went, if one was timed."""
    if "missing" in fid:
        return [f"Scoring samples was not timed: {fid['missing']}"]
    if not fid:
        return []
    stages = ", ".join(f"{name} {t:.1f} s" for name, t in fid["seconds"].items())
    return [
        f"Scoring {fid['n']} samples against {fid['reference']} images, {fid['extractor']}: "
        f"{stages}. Samples are drawn in float32."
    ]
