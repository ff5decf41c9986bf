"""Time VAEs: how much of a training step is the arithmetic of their nets.

The part ``vae`` of ``make bench``. For each model three things are timed, in turns, block by block:

* the nets alone, by hand: encoder, heads, reparametrised draw, decoder, the bound, backward, Adam.
  Of a flow posterior only its nets (planar and radial: the linear map to their parameters);
* our step: the loss of :class:`~surflow.training.module.FlowModule`, backward, Adam;
* the loop: the same step in the run of ``python -m surflow.cli.train``, with its data module,
  checks, callbacks and log. The run itself hands over the turns, between two of its steps.

The nets alone run eager, and compiled where ours is: like is set against like. The images are
noise, so no data are needed; they are as many as those of the real run.
"""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from surflow.checks import check_values
from surflow.cli.bench_images import spread
from surflow.cli.common import build_flow, origin_line, use_threads
from surflow.config import compose
from surflow.data.digits import DigitBatches
from surflow.data.mnist import MNIST
from surflow.errors import UserError
from surflow.flow import Flow
from surflow.transforms import Sequential

POOL = 32  # batches that the direct steps take turns with
INK = 0.19  # share of MNIST's pixels that are not 0
HELD_OUT = 1000  # rows of validation and test
WANTED = 0.8


# The nets alone


class MaskedNet(nn.Linear):
    """A linear map with some of its weights at zero."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        self.register_buffer("mask", like.mask.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def linear_maps(part: nn.Module) -> list[nn.Linear]:
    """The linear maps of a net, copied with their weights."""
    found = []
    for like in part.modules():
        if isinstance(like, nn.Linear):
            masked = hasattr(like, "mask")
            one = MaskedNet(like) if masked else nn.Linear(like.in_features, like.out_features)
            with torch.no_grad():
                one.weight.copy_(like.weight)
                one.bias.copy_(like.bias)
            found.append(one)
    return found


def chain(part: nn.Module, last: bool = False) -> nn.Sequential:
    """The linear maps of a net with a ReLU between them, and behind the last where asked for."""
    layers: list[nn.Module] = []
    for one in linear_maps(part):
        layers += [one, nn.ReLU()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class ParametersOnly(nn.Module):
    """A layer whose parameters are linear in h: that map alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = chain(layer.transform.net)

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return z, self.net(h).sum(1)


class HalfNet(nn.Module):
    """A coupling's net, its two outputs an element added instead of applied."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = chain(layer.net)
        self.swap = layer.swap

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        first, second = z.chunk(2, dim=1)
        seen, moved = (second, first) if self.swap else (first, second)
        scale, shift = self.net(torch.cat([seen, h], dim=1)).chunk(2, dim=1)
        moved = moved + scale + shift
        both = [moved, seen] if self.swap else [seen, moved]
        return torch.cat(both, dim=1), z.new_zeros(())


class AllNet(nn.Module):
    """A masked layer's net, its two outputs an element added instead of applied."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = chain(layer.transform.net)

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.net(torch.cat([z, h], dim=1)).chunk(2, dim=1)
        return z + scale + shift, z.new_zeros(())


LAYERS: dict[str, type[nn.Module]] = {
    "diagonal": ParametersOnly,  # has none
    "planar": ParametersOnly,
    "radial": ParametersOnly,
    "realnvp": HalfNet,
    "iaf": AllNet,
}


class Nets(nn.Module):
    """The nets of a VAE of vectors by hand, with the weights of one of ours.

    Args:
        flow: from :func:`~surflow.models.vae_studies.vae_of_vectors`: ReLU nets, Bernoulli pixels,
            standard normal prior.
        posterior: its name, a key of ``LAYERS``.
    """

    def __init__(self, flow: Flow, posterior: str) -> None:
        super().__init__()
        vae = flow.transforms[0]
        q = vae.encoder
        self.embed = chain(q.net, last=True)
        self.head = chain(q.flow.base.net)
        # the first layer after the draw is the last of the flow
        self.layers = nn.ModuleList(LAYERS[posterior](t) for t in reversed([*q.flow.transforms]))
        self.decoder = chain(vae.decoder.net)

    def loss(self, x: Tensor) -> Tensor:
        """Mean negative bound of (B, D), one draw a row, less what the layers' maps add to it."""
        h = self.embed(x)
        loc, log_scale = self.head(h).unflatten(1, (-1, 2)).unbind(2)
        eps = torch.randn_like(loc)
        z = torch.addcmul(loc, eps, log_scale.exp())
        used = x.new_zeros(())
        for layer in self.layers:
            z, more = layer(z, h)
            used = used + more
        misfit = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") / len(x)
        divergence = (0.5 * (z.square() - eps.square()) - log_scale).sum(1)
        return misfit + (divergence + used).mean()


def check_same(flow: Flow, nets: Nets, x: Tensor) -> float:
    """How much the losses differ without the posterior's layers, in float64, relative.

    Raises:
        RuntimeError: where it is more than rounding, or the parameters are not as many.
    """
    counts = [sum(p.numel() for p in m.parameters()) for m in (flow, nets)]
    if counts[0] != counts[1]:
        raise RuntimeError(f"the nets alone have {counts[1]} parameters, ours {counts[0]}")
    ours, theirs, x = copy.deepcopy(flow).double(), copy.deepcopy(nets).double(), x.double()
    ours.transforms[0].encoder.flow.transforms = Sequential()
    theirs.layers = nn.ModuleList()
    losses = []
    with torch.no_grad():
        for loss in (lambda: -ours.log_prob(x).mean(), lambda: theirs.loss(x)):
            torch.manual_seed(0)
            losses.append(loss().item())
    difference = abs(losses[0] - losses[1]) / abs(losses[0])
    if not difference < 1e-10:
        raise RuntimeError(f"the losses differ by {difference:.1e} of themselves: {losses}")
    return difference


class Step:
    """Forward, backward and optimizer, called directly on batches in memory.

    Args:
        parameters: to be trained.
        loss: (B, D) -> its mean loss.
        pool: (N, D), cut into batches.
        batch: B, which divides N.
        optimizer: parameters -> optimizer.
    """

    def __init__(
        self,
        parameters: Iterator[nn.Parameter],
        loss: Callable[[Tensor], Tensor],
        pool: Tensor,
        batch: int,
        optimizer: Callable[..., torch.optim.Optimizer],
    ) -> None:
        self.loss = loss
        self.pool = pool.split(batch)
        self.optimizer = optimizer(parameters)
        self.position = 0

    def seconds(self, steps: int) -> float:
        """A step, over so many of them."""
        start = time.perf_counter()
        for _ in range(steps):
            self.position = (self.position + 1) % len(self.pool)
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.pool[self.position]).backward()
            self.optimizer.step()
        return (time.perf_counter() - start) / steps


# The loop


class Turns:
    """The clock of a training loop, and what runs in its pauses.

    Args:
        others: name -> what else is timed.
        blocks, steps, warm_up: steps of each block, and of the loop before the first.

    Attributes:
        times: name -> seconds a step of each block; "loop" among them.
        end: seconds from the last step to the end of training.
    """

    def __init__(self, others: dict[str, Step], blocks: int, steps: int, warm_up: int) -> None:
        self.others = others
        self.blocks, self.steps, self.warm_up = blocks, steps, warm_up
        self.times: dict[str, list[float]] = {name: [] for name in ("loop", *others)}
        self.asked = 0
        self.start = self.end = 0.0

    @property
    def total(self) -> int:
        """Steps that the loop is to take; the last is in no block."""
        return self.warm_up + self.blocks * self.steps + 1

    def before_step(self) -> None:
        """When the loop asks for a batch."""
        block, rest = divmod(self.asked - self.warm_up, self.steps)
        self.asked += 1
        if rest or block < 0:
            return
        if block > 0:
            self.times["loop"].append((time.perf_counter() - self.start) / self.steps)
            names = list(self.others) if block % 2 else list(reversed(self.others))
            with check_values(False):
                for name in names:
                    self.times[name].append(self.others[name].seconds(self.steps))
        self.start = time.perf_counter()

    def after_training(self) -> None:
        """When the loop has ended: validation and checkpoints are over."""
        last_step = statistics.median(self.times["loop"])
        self.end = max(0.0, time.perf_counter() - self.start - last_step)


TURNS: ContextVar[Turns] = ContextVar("turns")
"""Of the run that is being timed: what a config builds cannot be handed an object."""


class TimedBatches:
    """Batches that hand over the turn before each of them."""

    def __init__(self, batches: DigitBatches) -> None:
        self.batches = batches
        self.state_dict = batches.state_dict
        self.load_state_dict = batches.load_state_dict

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        batches, turns = iter(self.batches), TURNS.get()
        for _ in range(len(self)):
            turns.before_step()
            yield next(batches)


class Noise(MNIST):
    """Grey noise in the place of MNIST, as dark as it, batched likewise; its training is timed."""

    def read(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def images(count: int) -> Tensor:
            shape = (count, *self.image_shape)
            grey = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            return grey * (torch.rand(shape, generator=generator) < INK)

        return {
            "train": images(self.sizes["train"] + self.sizes["valid"]),
            "test": images(self.sizes["test"]),
        }

    def batches(self, split: str, batch_size: int, **keys: Any) -> Any:
        batches = super().batches(split, batch_size, **keys)
        return TimedBatches(batches) if split == "train" else batches

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            TURNS.get().after_training()


def run_of(cfg: DictConfig, overrides: list[str], steps: int, folder: str, compiled: bool) -> Any:
    """The config of a training run of one epoch of so many steps over noise."""
    train = compose(
        [
            *overrides,
            *cfg.overrides,
            "data=mnist_grey",
            f"data.module._target_={__name__}.Noise",
            "trainer.max_epochs=1",
            "trainer.accelerator=cpu",
            f"trainer.compile={str(compiled).lower()}",
            "logger=csv",
            "objective.eval_samples=1",
            "objective.iwbo_samples=0",
            "run.pictures=false",
            f"run.root={folder}",
        ]
    )
    train.data.train_size = steps * train.data.batch_size
    train.data.valid_size = train.data.test_size = HELD_OUT
    return train


# Where an eager step's time goes

KINDS = {
    "products": ("mm", "addmm", "addmv", "bmm"),
    "optimizer": ("_fused_adam_",),
    "activations and losses": (
        "relu", "clamp_min", "threshold_backward", "log_sigmoid_forward", "log_sigmoid_backward",
        "binary_cross_entropy_with_logits", "sigmoid", "tanh", "tanh_backward", "exp",
    ),
}  # fmt: skip


def profiled(step: Step, steps: int) -> dict[str, float]:
    """Shares of the profiler's own time of an operator, by kind; the rest is "other"."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step.seconds(steps)
    events = found.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    shares = {
        kind: sum(e.self_cpu_time_total for e in events if e.key.split("::")[-1] in names) / total
        for kind, names in KINDS.items()
    }
    return {k: round(v, 4) for k, v in (shares | {"other": 1 - sum(shares.values())}).items()}


# The whole


def check(cfg: DictConfig) -> None:
    """UserError for what cannot be timed."""
    if cfg.blocks < 3 or min(cfg.steps, cfg.warm_up, cfg.profile_steps) < 1 or not cfg.models:
        raise UserError(
            "vae: expected blocks >= 3, steps, warm_up and profile_steps >= 1 and a model, got "
            f"{cfg.blocks}, {cfg.steps}, {cfg.warm_up}, {cfg.profile_steps} and {len(cfg.models)}"
        )


def measure(cfg: DictConfig, name: str, overrides: list[str], compiled: bool) -> dict[str, Any]:
    """One model."""
    from hydra.utils import instantiate

    from surflow.cli.train import train
    from surflow.training.module import FlowModule

    ways = [False, True] if compiled else [False]
    with tempfile.TemporaryDirectory() as folder:
        turns = Turns({}, cfg.blocks, cfg.steps, cfg.warm_up)
        run = run_of(cfg, overrides, turns.total, folder, compiled)
        posterior = run.model.posterior
        plain = run.model.prior == "standard" and run.model.activation == "relu"
        if posterior not in LAYERS or not plain:
            raise UserError(
                f"vae.models.{name}: expected model.posterior as one of {', '.join(LAYERS)}, "
                "model.prior=standard and model.activation=relu, got "
                f"{posterior}, {run.model.prior} and {run.model.activation}"
            )
        use_threads(run)
        optimizer = instantiate({k: v for k, v in run.optimizer.items() if k != "name"})
        generator = torch.Generator().manual_seed(0)
        batch, (features,) = run.data.batch_size, run.data.event_shape
        pool = torch.rand(POOL * batch, features, generator=generator)
        pool = pool * (torch.rand(pool.shape, generator=generator) < INK)
        flow = build_flow(run, instantiate(run.data.module))
        difference = check_same(flow, Nets(flow, posterior), pool[:batch])
        warm_up = {}
        for way in ways:
            label = "compiled" if way else "eager"
            nets = Nets(flow, posterior)
            loss = torch.compile(nets.loss, dynamic=False) if way else nets.loss
            turns.others[f"nets, {label}"] = Step(nets.parameters(), loss, pool, batch, optimizer)
            own = copy.deepcopy(flow)
            module = FlowModule(own, optimizer, schedule=None, compile=way)
            turns.others[f"step, {label}"] = Step(
                own.parameters(), module._loss, pool, batch, optimizer
            )
        turns.times |= {key: [] for key in turns.others}
        with check_values(False):
            for key, step in turns.others.items():
                start = time.perf_counter()
                step.seconds(3)
                warm_up[key] = round(time.perf_counter() - start, 1)
        token = TURNS.set(turns)
        try:
            # what it says is the loss of noise
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                train(run)
        finally:
            TURNS.reset(token)
        with check_values(False):
            kinds = profiled(turns.others["step, eager"], cfg.profile_steps)
    t = turns.times
    label = "compiled" if compiled else "eager"
    epoch = [s * turns.total + turns.end for s in t["loop"]]

    def share(a: list[float], b: list[float]) -> dict[str, float]:
        return spread([x / y for x, y in zip(a, b, strict=True)], 3)

    shares = {f"step, {w}": share(t[f"nets, {w}"], t[f"step, {w}"]) for w in ("eager", label)}
    shares["loop"] = share(t[f"nets, {label}"], t["loop"])
    shares["loop, nets eager"] = share(t["nets, eager"], t["loop"])
    shares["epoch"] = share([s * turns.total for s in t[f"nets, {label}"]], epoch)
    return {
        "parameters": sum(p.numel() for p in flow.parameters()),
        "relative_difference_of_losses": difference,
        "ms_per_step": {key: spread([1e3 * s for s in v], 3) for key, v in t.items()},
        "epoch_end_ms": round(1e3 * turns.end, 1),
        "share": shares,
        "profile": kinds,
        "warm_up_s": warm_up,
        "run": {
            "batch_size": batch,
            "images": turns.total * batch,
            "validation_images": HELD_OUT,
            "hidden_features": list(run.model.hidden_features),
            "flow_hidden_features": list(run.model.flow_hidden_features),
            "latent_features": run.model.latent_features,
            "features": features,
            "precision": str(run.trainer.precision),
            "threads": torch.get_num_threads(),
        },
    }


def run(cfg: DictConfig, can_compile: bool) -> dict[str, Any]:
    """Measure; ``cfg`` is the part ``vae`` of the config."""
    check(cfg)
    threads = torch.get_num_threads()
    models = {}
    try:
        for name, overrides in cfg.models.items():
            torch.compiler.reset()  # the losses of all models are one function's compilations
            models[name] = measure(cfg, name, list(overrides), can_compile)
    finally:
        torch.set_num_threads(threads)
        torch.compiler.reset()
    return {
        "what": "one training step of a VAE: forward, backward, Adam",
        "setting": {
            "models": OmegaConf.to_container(cfg.models),
            "overrides": list(cfg.overrides),
            "compiled": can_compile,
            "blocks": cfg.blocks,
            "steps_per_block": cfg.steps,
            "warm_up": cfg.warm_up,
        },
        "wanted_share": WANTED,
        "models": models,
    }


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    s = result["setting"]
    label = "compiled" if s["compiled"] else "eager"
    r = next(iter(result["models"].values()))["run"]
    lines = [
        "# VAEs: the nets' share of a training step",
        "",
        f"{r['features']} pixels, hidden layers {r['hidden_features']}, {r['latent_features']} "
        f"latents, batch {r['batch_size']}, {r['precision']}, {r['threads']} thread(s); "
        f"{r['images']} grey images of noise in memory. {s['blocks']} blocks of "
        f"{s['steps_per_block']} steps each, in turns; medians, in brackets least and greatest.",
        "",
        "| model | nets alone, eager, ms | nets alone, compiled, ms | step, eager, ms | "
        "step, compiled, ms | loop, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]

    def shown(v: dict[str, float] | None, digits: int = 2) -> str:
        if v is None:
            return "not compiled"
        return f"{v['median']:.{digits}f} ({v['min']:.{digits}f} to {v['max']:.{digits}f})"

    keys = ("nets, eager", "nets, compiled", "step, eager", "step, compiled", "loop")
    for name, m in result["models"].items():
        cells = [shown(m["ms_per_step"].get(key)) for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    columns = {"step, eager": "of the eager step", "step, compiled": "of the compiled step"}
    columns |= {"loop": "of the loop", "loop, nets eager": "of the loop, nets eager"}
    columns |= {"epoch": "of an epoch"}
    if not s["compiled"]:
        del columns["step, compiled"], columns["loop, nets eager"]
    lines += [
        "",
        f"The nets' share, block by block: nets alone over step, like over like. The loop and its "
        f"nets are {label}; of an epoch: with its end, where validation and checkpoints are.",
        "",
        "| model | " + " | ".join(columns.values()) + " | end of the epoch, ms |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for name, m in result["models"].items():
        cells = [shown(m["share"][key]) for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {m['epoch_end_ms']:.0f} |")
    kinds = list(next(iter(result["models"].values()))["profile"])
    lines += [
        "",
        "Shares of torch's profiler, the eager step:",
        "",
        "| model | " + " | ".join(kinds) + " |",
        "| --- |" + " ---: |" * len(kinds),
        *(
            f"| {name} | " + " | ".join(f"{m['profile'][k]:.1%}" for k in kinds) + " |"
            for name, m in result["models"].items()
        ),
    ]
    low = [n for n, m in result["models"].items() if m["share"]["loop"]["median"] < WANTED]
    verdict = (
        f"In every model's loop the nets are at least {WANTED:.0%} of a step."
        if not low
        else f"Below {WANTED:.0%} of the loop's step: {', '.join(low)}."
    )
    worst = max(m["relative_difference_of_losses"] for m in result["models"].values())
    lines += [
        "",
        f"{verdict} Without the posterior's layers the losses of step and nets differ by "
        f"at most {worst:.1e} of themselves, in float64; with them, they have as many parameters.",
        "",
        origin_line(result, "make bench"),
        "",
    ]
    return "\n".join(lines)
