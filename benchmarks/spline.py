"""A spline coupling flow against nflows, normflows and zuko.

Every library builds the same flow from its own layers: D features, rational-quadratic splines on
[-bound, bound] with identity tails, the same halves taking turns, an MLP of the same sizes for each
coupling, a standard normal. The weights are copied from ours; nflows and normflows then compute the
same function, which is checked, while zuko bounds its bins and slopes in another way and so has the
same sizes only. All take the same batches and the same Adam.

Nothing is imported from these libraries until the benchmark runs; one that is not installed is
left out, and a line says so.
"""

from __future__ import annotations

import io
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks import harness
from surflow.errors import UserError, close_match
from surflow.flow import Flow
from surflow.models import coupling_flow, coupling_net
from surflow.transforms import RationalQuadraticSpline, check_values

TRAIN, SAMPLE = "train", "sample"
WHAT = {
    TRAIN: "a training step: forward, backward, Adam",
    SAMPLE: "sampling, without gradients",
}
FOLDER = Path(sys.prefix) / "bench"  # where `make bench` puts the libraries


@dataclass
class Model:
    """A flow of one library, behind the two functions that are timed.

    Attributes:
        module: holds the parameters.
        log_prob: (B, D) -> (B,), nats.
        sample: a number -> that many samples, (B, D).
        linears: the couplings' linear layers, data side first.
        same_function: whether, with our weights, it computes our function.
    """

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    linears: list[nn.Module]
    same_function: bool = False


class Net(nn.Sequential):
    """An MLP with ReLU that takes and ignores a context, as nflows and normflows call it."""

    def __init__(self, in_features: int, out_features: int, hidden: Sequence[int]) -> None:
        sizes = [in_features, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], out_features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


def linears_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The linear layers inside, in order: what has a weight of its own (zuko has its own class)."""
    return [layer for m in modules for layer in m.modules() if "weight" in layer._parameters]


def masks(cfg: DictConfig) -> list[Tensor]:
    """For each coupling which features it transforms: the second half, the first, and so on."""
    second = torch.arange(cfg.features) >= cfg.features // 2
    return [~second if i % 2 else second for i in range(cfg.num_couplings)]


# The same flow, four times ------------------------------------------------------------------------


def surflow_model(cfg: DictConfig) -> Model:
    """Ours."""
    flow: Flow = coupling_flow(
        cfg.features,
        RationalQuadraticSpline(cfg.num_bins, float(cfg.bound)),
        lambda i, o: coupling_net(i, o, cfg.hidden),
        num_couplings=cfg.num_couplings,
        support="unmapped",
    )
    return Model(flow, flow.log_prob, flow.sample, linears_of(flow.transforms), True)


def coupling_of(cfg: DictConfig, mask: Tensor) -> dict[str, Any]:
    """The arguments of a spline coupling of nflows, and of normflows, which took it over."""
    return {
        "mask": mask.int(),
        "transform_net_create_fn": partial(Net, hidden=cfg.hidden),
        "num_bins": cfg.num_bins,
        "tails": "linear",
        "tail_bound": float(cfg.bound),
    }


def nflows_model(cfg: DictConfig) -> Model:
    """nflows: its coupling, composite transform, standard normal and flow."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform

    couplings = [
        PiecewiseRationalQuadraticCouplingTransform(**coupling_of(cfg, mask)) for mask in masks(cfg)
    ]
    flow = Flow(CompositeTransform(couplings), StandardNormal([cfg.features]))
    return Model(flow, flow.log_prob, flow.sample, linears_of(couplings), True)


def normflows_model(cfg: DictConfig) -> Model:
    """normflows: its spline layer with its coupling inside, without the splines that the layer
    would also put on the conditioning half, so that all four flows are the same."""
    import normflows
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    layers = []
    for mask in masks(cfg):
        layer = normflows.flows.CoupledRationalQuadraticSpline(
            cfg.features, 1, cfg.hidden[0], num_bins=cfg.num_bins, tail_bound=float(cfg.bound)
        )
        layer.prqct = PiecewiseRationalQuadraticCoupling(
            apply_unconditional_transform=False, **coupling_of(cfg, mask)
        )
        layers.append(layer)
    base = normflows.distributions.DiagGaussian(cfg.features, trainable=False)
    flow = normflows.NormalizingFlow(base, layers[::-1])  # listed from the base to the data
    return Model(flow, flow.log_prob, lambda n: flow.sample(n)[0], linears_of(layers), True)


def zuko_model(cfg: DictConfig) -> Model:
    """zuko: its general coupling with its spline, and its diagonal normal."""
    import zuko
    from zuko.flows.coupling import GeneralCouplingTransform

    k = cfg.num_bins
    couplings = [
        GeneralCouplingTransform(
            cfg.features,
            mask=~mask,  # here true is the part that conditions
            univariate=partial(zuko.transforms.MonotonicRQSTransform, bound=float(cfg.bound)),
            shapes=[(k,), (k,), (k - 1,)],
            hidden_features=list(cfg.hidden),
        )
        for mask in masks(cfg)
    ]
    loc, scale = torch.zeros(cfg.features), torch.ones(cfg.features)
    normal = zuko.distributions.DiagNormal
    base = zuko.flows.UnconditionalDistribution(normal, loc, scale, buffer=True)
    flow = zuko.flows.Flow(couplings, base)
    log_prob, sample = lambda x: flow().log_prob(x), lambda n: flow().sample((n,))
    return Model(flow, log_prob, sample, linears_of(couplings))


LIBRARIES: dict[str, Callable[[DictConfig], Model]] = {
    "nflows": nflows_model,
    "normflows": normflows_model,
    "zuko": zuko_model,
}


def copy_weights(ours: Model, theirs: Model, cfg: DictConfig) -> None:
    """Start from the same weights; where an output 0 is not slope 1, move the bias by that."""
    per_coupling = len(cfg.hidden) + 1
    spline = RationalQuadraticSpline(cfg.num_bins, float(cfg.bound))
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(ours.linears, theirs.linears, strict=True)):
            b.weight.copy_(a.weight)
            b.bias.copy_(a.bias)
            if theirs.same_function and (i + 1) % per_coupling == 0:
                slopes = b.bias.view(-1, spline.num_params)[:, 2 * cfg.num_bins :]
                slopes += spline.slope_offset


# Timing -------------------------------------------------------------------------------------------


Entry = tuple[str, bool]
"""A contender: its library, and whether it runs under ``torch.compile``."""


def mode_of(compiled: bool) -> str:
    return "torch.compile" if compiled else "eager"


def calls_of(model: Model, compiled: bool, data: Tensor, n: int) -> dict[str, Callable[[], Any]]:
    """task -> what is timed: a step with an Adam of its own, and drawing n samples."""
    log_prob, sample = model.log_prob, lambda: model.sample(n)
    if compiled:
        log_prob, sample = torch.compile(log_prob), torch.compile(sample)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-3, fused=True)
    step = harness.Step(lambda x: -log_prob(x).mean(), optimizer, data, n, read_back=True)
    return {TRAIN: step, SAMPLE: torch.no_grad()(sample)}


def warm_up(calls: dict[str, Callable[[], Any]], times: int) -> None:
    for _ in range(times):
        for call in calls.values():
            call()


def built(name: str, ours: Model, cfg: DictConfig) -> Model:
    """A library's flow with our weights.

    Raises:
        ImportError: where the library is not installed.
        RuntimeError: where it has more or fewer parameters.
    """
    model = ({"surflow": surflow_model} | LIBRARIES)[name](cfg)
    theirs, count = (sum(p.numel() for p in m.module.parameters()) for m in (model, ours))
    if theirs != count:
        raise RuntimeError(f"{name} has {theirs} parameters, ours {count}: not the same")
    if name == "surflow":
        model.module.load_state_dict(ours.module.state_dict())
    else:
        copy_weights(ours, model, cfg)
    return model


def check_same(name: str, ours: Model, theirs: Model, x: Tensor) -> float | None:
    """The largest difference of the two log-likelihoods, None where the functions differ."""
    if not theirs.same_function:
        return None
    with torch.no_grad():
        difference = (ours.log_prob(x) - theirs.log_prob(x)).abs().max().item()
    if not difference < 1e-2:
        raise RuntimeError(f"{name} and ours differ by {difference} nats: nothing to compare")
    return difference


def contenders(
    cfg: DictConfig, compiled: bool, data: Tensor
) -> tuple[dict[Entry, dict[str, Callable[[], Any]]], dict[str, Any]]:
    """The calls of all that can run here, warmed up, ours first; and what was found on the way."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # last: it can shadow nothing
    found: dict[str, Any] = {"left_out": {}, "not_compiled": {}, "difference_nats": {}}
    torch.manual_seed(0)
    ours = surflow_model(cfg)
    found["parameters"] = sum(p.numel() for p in ours.module.parameters())
    entered = {}
    for name in ["surflow", *cfg.libraries]:
        both = compiled and (name == "surflow" or cfg.compile_theirs)
        for mode in (False, True) if both else (False,):
            try:
                model = built(name, ours, cfg)
            except ImportError as error:
                found["left_out"][name] = str(error)
                print(f"bench: {name} left out: {error}; `make bench` installs it")
                break
            if name != "surflow" and not mode:
                found["difference_nats"][name] = check_same(name, ours, model, data[:4096])
            calls = calls_of(model, mode, data, cfg.batch_size)
            try:
                warm_up(calls, 3)
            except Exception as error:
                if not mode or name == "surflow":
                    raise
                # their code under our compiler: a failure says nothing of theirs as it ships
                found["not_compiled"][name] = type(error).__name__
                print(f"bench: {name} under torch.compile left out: {type(error).__name__}")
                continue
            entered[name, mode] = calls
    return entered, found


def measure(
    cfg: DictConfig, compiled: bool
) -> tuple[dict[Entry, float], dict[tuple[str, Entry], list[float]], dict[str, Any]]:
    """The last losses, the seconds of each task's blocks, and what was found on the way."""
    generator = torch.Generator().manual_seed(0)
    data = 1.2 * torch.randn(16 * cfg.batch_size, cfg.features, generator=generator)
    start = time.perf_counter()
    # one function of theirs compiles once for each layer and mode: more often than the default
    many = torch._dynamo.config.patch(recompile_limit=64)
    with warnings.catch_warnings(), check_values(False), many:
        warnings.simplefilter("ignore")  # theirs, on this torch
        torch._logging.set_logs(dynamo=logging.ERROR)  # theirs break graphs: pages of notes
        entered, found = contenders(cfg, compiled, data)
        for calls in entered.values():  # once more, now that nothing is left to compile
            warm_up(calls, 1)
        found["warm_up_s"] = round(time.perf_counter() - start, 2)
        clocks = {
            (task, entry): partial(harness.seconds, calls[task], cfg.calls)
            for task in WHAT
            for entry, calls in entered.items()
        }
        times = harness.in_turns(clocks, cfg.blocks)
    losses = {entry: calls[TRAIN].last for entry, calls in entered.items()}
    for (library, mode), loss in losses.items():
        if not math.isfinite(loss):
            raise RuntimeError(f"{library}, {mode_of(mode)}: the loss became {loss}")
    return losses, times, found


def run(cfg: DictConfig, compiled: bool) -> dict[str, Any]:
    """Measure; ``cfg`` is the part ``spline`` of the config."""
    if cfg.blocks < 3 or cfg.calls < 1:
        raise UserError(
            f"spline.blocks, spline.calls: expected >= 3 and >= 1, got {cfg.blocks}, {cfg.calls}"
        )
    unknown = [name for name in cfg.libraries if name not in LIBRARIES]
    if unknown:
        raise UserError(
            f"spline.libraries: expected some of {', '.join(LIBRARIES)}, got {unknown[0]!r}"
            + close_match(unknown[0], LIBRARIES)
        )
    losses, times, found = measure(cfg, compiled)
    return {
        "what": WHAT,
        "setting": {
            **harness.picked(cfg, "features", "batch_size", "num_bins", "bound", "num_couplings"),
            "hidden_features": list(cfg.hidden),
            "precision": "float32",
            "threads": torch.get_num_threads(),
            "optimizer": "Adam, fused, the same for all",
            "blocks": cfg.blocks,
            "calls_per_block": cfg.calls,
        },
        **found,
        "versions_of": {name: version(name) for name, _ in losses if name != "surflow"},
        "contenders": [
            {
                "library": entry[0],
                "compiled": entry[1],
                "ms": harness.milliseconds({task: times[task, entry] for task in WHAT}),
                "last_loss": round(loss, 4),
            }
            for entry, loss in losses.items()
        ],
        "speedup": speedups(times),
    }


def speedups(times: dict[tuple[str, Entry], list[float]]) -> list[dict[str, Any]]:
    """Ours against the fastest of the others, block by block, by task and mode."""
    rows = []
    entries = list(dict.fromkeys(entry for _, entry in times))
    for mode in (False, True):
        others = [e for e in entries if e[0] != "surflow" and e[1] == mode]
        for ours in (e for e in entries if e[0] == "surflow" and others):
            for task in WHAT:
                fastest = min(others, key=lambda e: statistics.median(times[task, e]))
                labels = [f"{library}, {mode_of(m)}" for library, m in (ours, fastest)]
                which = dict(zip(("task", "ours", "against"), (task, *labels), strict=True))
                rows.append(which | harness.ratios(times[task, fastest], times[task, ours]))
    return rows


# What is written ----------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    s = result["setting"]

    def row(c: dict[str, Any]) -> list[str]:
        named = f"{c['library']} {result['versions_of'].get(c['library'], '')}".rstrip()
        return [named, mode_of(c["compiled"]), *(harness.shown(c["ms"][task], 1) for task in WHAT)]

    blocks = [
        f"D = {s['features']}, batch {s['batch_size']}, {s['num_couplings']} couplings, "
        f"{s['num_bins']} bins on [-{s['bound']:g}, {s['bound']:g}], MLP {s['hidden_features']}, "
        f"{result['parameters']} parameters in each, {s['precision']}, {s['threads']} thread(s), "
        f"{s['optimizer']}; {s['blocks']} blocks of {s['calls_per_block']} calls each, in turns.\n"
        f"Training: {WHAT[TRAIN]}. Sampling: {s['batch_size']} samples, without gradients. "
        "Median of the blocks, in brackets the fastest and the slowest.",
        harness.table(
            ("library", "mode", "training step, ms", "sampling, ms"),
            map(row, result["contenders"]),
            text=2,
        ),
    ]
    if result["speedup"]:
        columns = ("task", "ours", "the fastest of the others", "median", "min", "max")
        rows = (
            (r["task"], r["ours"], r["against"], *(f"{r[k]:.2f}" for k in columns[3:]))
            for r in result["speedup"]
        )
        blocks += [
            "Speed-up against the fastest of the others, block by block:",
            harness.table(columns, rows, text=3),
        ]
    blocks.append(" ".join(notes(result)))
    return harness.page_of("Spline coupling flow, side by side", blocks, result)


def notes(result: dict[str, Any]) -> list[str]:
    """Which functions are the same, what was left out, how long it took to begin."""
    same = {k: v for k, v in result["difference_nats"].items() if v is not None}
    others = [k for k, v in result["difference_nats"].items() if v is None]
    found = []
    if same:
        found.append(
            f"With the same weights {' and '.join(same)} and surflow differ by at most "
            f"{max(same.values()):.1e} nats."
        )
    if others:
        found.append(
            f"{' and '.join(others)} has the same sizes and weights but bounds its bins and "
            "slopes in another way, so its function is another."
        )
    found += [f"{name} was left out: {why}." for name, why in result["left_out"].items()]
    found += [
        f"{name} does not run under torch.compile here ({why})."
        for name, why in result["not_compiled"].items()
    ]
    return [*found, f"Building, compilation and warm-up took {result['warm_up_s']:.0f} s."]


def picture(result: dict) -> bytes:
    """Bars of the median times, lines from the fastest to the slowest block, cut where that is far
    beyond the bars; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from surflow.reporting.figures.layout import DPI, GREY, INK, LINES

    rows = result["contenders"][::-1]
    labels = [f"{c['library']}, {'compiled' if c['compiled'] else 'eager'}" for c in rows]
    figure = Figure(figsize=(7.2, 0.8 + 0.3 * len(rows)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    titles = {TRAIN: "training step, ms", SAMPLE: "sampling, ms"}
    for axes, task in zip(figure.subplots(1, 2, sharey=True), titles, strict=True):
        times = [c["ms"][task] for c in rows]
        medians = [t["median"] for t in times]
        end = 1.4 * max(medians)  # a block that something else disturbed may reach far beyond
        colours = [LINES[0] if c["library"] == "surflow" else GREY for c in rows]
        axes.barh(labels, medians, color=colours, height=0.65)
        for i, t in enumerate(times):
            reach = min(t["max"], 1.2 * max(medians))
            axes.plot([t["min"], reach], [i, i], color=INK, linewidth=1)
            axes.annotate(
                f"{t['median']:.1f}", (reach, i), (4, 0), textcoords="offset points",
                va="center", fontsize=8, color=INK,
            )  # fmt: skip
        axes.set_title(titles[task], fontsize=9)
        axes.set_xlim(0, end)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
