"""VAEs: how much of a training step is the arithmetic of their nets.

For each model three things are timed, in turns, block by block:

* the nets alone, by hand: encoder, heads, reparametrised draw, decoder, the bound, backward, Adam.
  Of a flow posterior only its nets (planar and radial: the linear map to their parameters);
* our step: the loss of the training module, backward, Adam;
* the loop: the same step in a real training run, with its data module, checks, callbacks and log.
  The run itself hands over the turns, between two of its steps.

The nets alone run eager, and compiled where ours is: eager is compared with eager. The images are
noise, so no data are needed; they are as many as those of the real run.
"""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks import harness
from surflow.checks import check_values
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
SIZES = ("hidden_features", "flow_hidden_features", "latent_features")
TIMES = {
    "nets, eager": "nets alone, eager, ms",
    "nets, compiled": "nets alone, compiled, ms",
    "step, eager": "step, eager, ms",
    "step, compiled": "step, compiled, ms",
    "loop": "loop, ms",
}
SHARES = {
    "step, eager": "of the eager step",
    "step, compiled": "of the compiled step",
    "loop": "of the loop",
    "loop, nets eager": "of the loop, nets eager",
    "epoch": "of an epoch",
}


# The nets alone -----------------------------------------------------------------------------------


def chain(part: nn.Module, last: bool = False) -> nn.Sequential:
    """Copies of the linear maps of a net with a ReLU between them, and at the end if ``last``."""
    layers: list[nn.Module] = []
    for one in part.modules():
        if isinstance(one, nn.Linear):
            layers += [copy.deepcopy(one), nn.ReLU()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class ParametersOnly(nn.Module):
    """A layer whose parameters are linear in h: that map alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = chain(layer)

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return z, self.net(h).sum(1)


class AllNet(ParametersOnly):
    """A masked layer's net, its two outputs an element added instead of applied."""

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.net(torch.cat([z, h], dim=1)).chunk(2, dim=1)
        return z + scale + shift, z.new_zeros(())


class HalfNet(AllNet):
    """The same of a coupling, which moves one half of z."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.swap = layer.swap

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        first, second = z.chunk(2, dim=1)
        seen, moved = (second, first) if self.swap else (first, second)
        scale, shift = self.net(torch.cat([seen, h], dim=1)).chunk(2, dim=1)
        moved = moved + scale + shift
        both = [moved, seen] if self.swap else [seen, moved]
        return torch.cat(both, dim=1), z.new_zeros(())


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


# The loop -----------------------------------------------------------------------------------------


class Turns:
    """The clock of a training loop, and what runs in its pauses.

    Args:
        blocks, steps, warm_up: steps of each block, and of the loop before the first.

    Attributes:
        times: name -> seconds a step of each block; "loop" among them.
        end: seconds from the last step to the end of training.
    """

    def __init__(self, blocks: int, steps: int, warm_up: int) -> None:
        self.blocks, self.steps, self.warm_up = blocks, steps, warm_up
        self.others: dict[str, Callable[[], float]] = {}
        self.times: dict[str, list[float]] = {"loop": []}
        self.asked = 0
        self.start = self.end = 0.0

    def enter(self, name: str, clock: Callable[[], float]) -> None:
        """Time something in the pauses; its clock gives the seconds of a step."""
        self.others[name], self.times[name] = clock, []

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
            with check_values(False):
                for name in harness.turn(self.others, block - 1):
                    self.times[name].append(self.others[name]())
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


def inked(values: Tensor, generator: torch.Generator) -> Tensor:
    """Values with as many zeros as MNIST has."""
    return values * (torch.rand(values.shape, generator=generator) < INK)


class Noise(MNIST):
    """Grey noise in the place of MNIST, as dark as it, batched likewise; its training is timed."""

    def read(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def images(count: int) -> Tensor:
            shape = (count, *self.image_shape)
            grey = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            return inked(grey, generator)

        held_in = self.sizes["train"] + self.sizes["valid"]
        return {"train": images(held_in), "test": images(self.sizes["test"])}

    def batches(self, split: str, batch_size: int, **keys: Any) -> Any:
        batches = super().batches(split, batch_size, **keys)
        return TimedBatches(batches) if split == "train" else batches

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            TURNS.get().after_training()


def run_of(
    cfg: DictConfig, overrides: list[str], steps: int, folder: str, compiled: bool
) -> DictConfig:
    """The config of a training run of one epoch of so many steps over noise."""
    train = compose(
        [
            *overrides,
            *cfg.overrides,
            *cfg.run,
            f"data._target_={__name__}.Noise",
            f"compute.compile={str(compiled).lower()}",
            f"run.root={folder}",
        ]
    )
    train.data.train_size = steps * harness.options(train.data)["batch_size"]
    train.data.valid_size = train.data.test_size = HELD_OUT
    return train


# Where an eager step's time goes ------------------------------------------------------------------

KINDS = {
    "products": ("mm", "addmm", "addmv", "bmm"),
    "optimizer": ("_fused_adam_",),
    "activations and losses": (
        "relu", "clamp_min", "threshold_backward", "log_sigmoid_forward", "log_sigmoid_backward",
        "binary_cross_entropy_with_logits", "sigmoid", "tanh", "tanh_backward", "exp",
    ),
}  # fmt: skip


def profiled(step: harness.Step, steps: int) -> dict[str, float]:
    """Shares of the profiler's own time of an operator, by kind; the rest is "other"."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        harness.seconds(step, steps)
    events = found.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    shares = {
        kind: sum(e.self_cpu_time_total for e in events if e.key.split("::")[-1] in names) / total
        for kind, names in KINDS.items()
    }
    return {k: round(v, 4) for k, v in (shares | {"other": 1 - sum(shares.values())}).items()}


# The whole ----------------------------------------------------------------------------------------


def check(cfg: DictConfig) -> None:
    """UserError for what cannot be timed."""
    if cfg.blocks < 3 or min(cfg.steps, cfg.warm_up, cfg.profile_steps) < 1 or not cfg.models:
        raise UserError(
            "vae: expected blocks >= 3, steps, warm_up and profile_steps >= 1 and a model, got "
            f"{cfg.blocks}, {cfg.steps}, {cfg.warm_up}, {cfg.profile_steps} and {len(cfg.models)}"
        )


def check_model(name: str, model: Mapping[str, Any]) -> None:
    """UserError for a VAE whose nets are not written down here; ``model``: its options."""
    plain = model["prior"] == "standard" and model["activation"] == "relu"
    if model["posterior"] not in LAYERS or not plain:
        raise UserError(
            f"vae.models.{name}: expected model.posterior as one of {', '.join(LAYERS)}, "
            "model.prior=standard and model.activation=relu, got "
            f"{model['posterior']}, {model['prior']} and {model['activation']}"
        )


def direct_steps(
    run: harness.Training, nets: Nets, pool: Tensor, batch: int, compiled: bool
) -> dict[str, harness.Step]:
    """Steps called directly: of the nets alone and ours, eager, and compiled if asked."""
    steps = {}
    for label in ("eager", "compiled")[: 1 + compiled]:
        own, flow = copy.deepcopy(nets), copy.deepcopy(run.flow)
        way = label == "compiled"
        losses = {
            "nets": (own, torch.compile(own.loss, dynamic=False) if way else own.loss),
            "step": (flow, run.loss(flow, way)),
        }
        for name, (module, loss) in losses.items():
            optimizer = run.optimizer(module.parameters())
            steps[f"{name}, {label}"] = harness.Step(loss, optimizer, pool, batch)
    return steps


def measure(cfg: DictConfig, name: str, overrides: list[str], compiled: bool) -> dict[str, Any]:
    """One model."""
    turns = Turns(cfg.blocks, cfg.steps, cfg.warm_up)
    with tempfile.TemporaryDirectory() as folder:
        config = run_of(cfg, overrides, turns.total, folder, compiled)
        model = harness.options(config.model)
        check_model(name, model)
        training = harness.build(config)
        batch, (features,) = training.data.batch_size, training.data.event_shape
        generator = torch.Generator().manual_seed(0)
        pool = inked(torch.rand(POOL * batch, features, generator=generator), generator)
        nets = Nets(training.flow, model["posterior"])
        difference = check_same(training.flow, nets, pool[:batch])
        steps = direct_steps(training, nets, pool, batch, compiled)
        with check_values(False):
            warm_up = {key: round(3 * harness.seconds(step, 3), 1) for key, step in steps.items()}
        for key, step in steps.items():
            turns.enter(key, partial(harness.seconds, step, cfg.steps))
        token = TURNS.set(turns)
        quiet = io.StringIO()  # what the run says is the loss of noise
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                training.train()
        finally:
            TURNS.reset(token)
    with check_values(False):
        kinds = profiled(steps["step, eager"], cfg.profile_steps)
    return {
        "parameters": sum(p.numel() for p in training.flow.parameters()),
        "relative_difference_of_losses": difference,
        "ms_per_step": harness.milliseconds(turns.times, 3),
        "epoch_end_ms": round(1e3 * turns.end, 1),
        "share": shares(turns, "compiled" if compiled else "eager"),
        "profile": kinds,
        "warm_up_s": warm_up,
        "run": {
            "batch_size": batch,
            "images": turns.total * batch,
            "validation_images": HELD_OUT,
            **{key: model[key] for key in SIZES},
            "features": features,
            "precision": str(config.trainer.precision),
            "threads": torch.get_num_threads(),
        },
    }


def shares(turns: Turns, label: str) -> dict[str, dict[str, float]]:
    """The nets alone over a step, the loop and an epoch; the loop runs as ``label`` says."""
    eager, like, loop = (turns.times[key] for key in ("nets, eager", f"nets, {label}", "loop"))
    pairs = {"step, eager": (eager, turns.times["step, eager"])}
    pairs[f"step, {label}"] = like, turns.times[f"step, {label}"]
    pairs["loop"], pairs["loop, nets eager"] = (like, loop), (eager, loop)
    n = turns.total
    pairs["epoch"] = [s * n for s in like], [s * n + turns.end for s in loop]
    return {name: harness.ratios(*pair, 3) for name, pair in pairs.items()}


def run(cfg: DictConfig, compiled: bool) -> dict[str, Any]:
    """Measure; ``cfg`` is the part ``vae`` of the config."""
    check(cfg)
    threads = torch.get_num_threads()
    models = {}
    try:
        for name, overrides in cfg.models.items():
            torch.compiler.reset()  # the losses of all models are one function's compilations
            models[name] = measure(cfg, name, list(overrides), compiled)
    finally:
        torch.set_num_threads(threads)
        torch.compiler.reset()
    return {
        "what": "one training step of a VAE: forward, backward, Adam",
        "setting": {
            **harness.picked(cfg, "models", "overrides"),
            "compiled": compiled,
            "blocks": cfg.blocks,
            "steps_per_block": cfg.steps,
            "warm_up": cfg.warm_up,
        },
        "wanted_share": WANTED,
        "models": models,
    }


# What is written ----------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    s, models = result["setting"], result["models"]
    first = next(iter(models.values()))
    r, kinds = first["run"], list(first["profile"])
    needs_compiler = () if s["compiled"] else ("step, compiled", "loop, nets eager")
    columns = [key for key in SHARES if key not in needs_compiler]

    def rows(cells: Callable[[dict[str, Any]], Iterable[str]]) -> Iterator[list[str]]:
        return ([name, *cells(m)] for name, m in models.items())

    def times(m: dict[str, Any]) -> Iterator[str]:
        ms = m["ms_per_step"]
        return (harness.shown(ms[key]) if key in ms else "not compiled" for key in TIMES)

    def shared(m: dict[str, Any]) -> list[str]:
        return [*(harness.shown(m["share"][k]) for k in columns), f"{m['epoch_end_ms']:.0f}"]

    low = [name for name, m in models.items() if m["share"]["loop"]["median"] < WANTED]
    verdict = (
        f"Below {WANTED:.0%} of the loop's step: {', '.join(low)}."
        if low
        else f"In every model's loop the nets are at least {WANTED:.0%} of a step."
    )
    worst = max(m["relative_difference_of_losses"] for m in models.values())
    blocks = [
        f"{r['features']} pixels, hidden layers {r['hidden_features']}, {r['latent_features']} "
        f"latents, batch {r['batch_size']}, {r['precision']}, {r['threads']} thread(s); "
        f"{r['images']} grey images of noise in memory. {s['blocks']} blocks of "
        f"{s['steps_per_block']} steps each, in turns; medians, in brackets least and greatest.",
        harness.table(("model", *TIMES.values()), rows(times)),
        "The nets' share, block by block: nets alone over step, like over like. The loop and its "
        f"nets are {'compiled' if s['compiled'] else 'eager'}; of an epoch: with its end, where "
        "validation and checkpoints are.",
        harness.table(
            ("model", *(SHARES[k] for k in columns), "end of the epoch, ms"), rows(shared)
        ),
        "Shares of torch's profiler, the eager step:",
        harness.table(("model", *kinds), rows(lambda m: [f"{m['profile'][k]:.1%}" for k in kinds])),
        f"{verdict} Without the posterior's layers the losses of step and nets differ by "
        f"at most {worst:.1e} of themselves, in float64; with them, they have as many parameters.",
    ]
    return harness.page_of("VAEs: the nets' share of a training step", blocks, result)
