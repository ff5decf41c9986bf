"""Training an image flow: exact resumption within an epoch, processes, accumulation, precision."""

import csv
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from surflow.checks import check_values
from surflow.compat import make_torchvision_importable

pytest.importorskip("sklearn")  # the digits
make_torchvision_importable()

import pytorch_lightning as pl  # noqa: E402
from pytorch_lightning.callbacks import Callback, ModelCheckpoint  # noqa: E402
from pytorch_lightning.strategies import DDPStrategy  # noqa: E402

from surflow.data.embedded import Digits  # noqa: E402
from surflow.data.module import block_rows  # noqa: E402
from surflow.distributions import DiagonalNormal, StandardNormal  # noqa: E402
from surflow.distributions.base import Distribution  # noqa: E402
from surflow.draws import seed_draws  # noqa: E402
from surflow.flow import Flow  # noqa: E402
from surflow.models import pool_flow, realnvp  # noqa: E402
from surflow.nets import GlowNet  # noqa: E402
from surflow.training.callbacks import EMA, TimedCheckpoint  # noqa: E402
from surflow.training.checkpoint import (  # noqa: E402
    AtomicCheckpointIO,
    load_checkpoint,
    resume_point,
)
from surflow.training.hardware import can_compile  # noqa: E402
from surflow.training.loggers import CSVMetrics  # noqa: E402
from surflow.training.module import FlowModule  # noqa: E402
from surflow.training.schedules import staged  # noqa: E402
from surflow.transforms import AffineCoupling, Transform  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice

TINY = dict(num_steps=1, mid_channels=4, depth=1, growth=2, dequant_steps=1, context_channels=2)
CPU = torch.device("cpu")


class GivenByImage(DiagonalNormal):
    """A normal whose draws follow from the images, wherever in a batch they are."""

    def _sample(self, n, context, temperature):
        return self.given


class Given(Distribution):
    """Uniform noise that is known."""

    def __init__(self, u):
        super().__init__(tuple(u.shape[1:]))
        self.register_buffer("u", u)

    def _log_prob(self, x, context):
        return x.new_zeros(x.shape[0])

    def _sample(self, n, context, temperature):
        return self.u


def give_noise(flow):
    """Let the dequantizer's draws follow from the pixels alone."""
    base = flow.transforms[0].transform.noise.flow.base
    base.__class__ = GivenByImage

    def give(_, inputs):
        x = inputs[0].flatten(1).double()
        key = x @ torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).cos()
        place = torch.arange(math.prod(base.event_shape), dtype=x.dtype, device=x.device)
        draws = 1.4 * torch.sin(key[:, None] * (1 + place / 17) + place)
        base.given = draws.float().reshape(-1, *base.event_shape)

    flow.transforms.register_forward_pre_hook(give)
    return flow


def make_flow(batch_norm=False, **options):
    torch.manual_seed(5)
    if batch_norm:
        flow = realnvp((1, 8, 8), 17, mid_channels=2, num_blocks=1)
    else:
        flow = pool_flow((1, 8, 8), **{**TINY, **options})
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return flow


def make_data(batch, train=104, augmented=True, **keys):
    extra = dict(flip=True, pad=1, translate=0.1) if augmented else {}
    data = Digits(
        name="digits",
        event_shape=(1, 8, 8),
        num_levels=17,
        train_size=train,
        valid_size=40,
        test_size=10,
        batch_size=batch,
        seed=3,
        **extra,
        **keys,
    )
    data.setup()
    return data


class Stop(Exception):
    """A run that breaks."""


class StopAt(Callback):
    """Break before a batch: by an exception, or as kill -9 does."""

    def __init__(self, epoch, batch, kill=False):
        self.place, self.kill = (epoch, batch), kill

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stop


class Steps(Callback):
    """The flow's weights after every optimizer step, on the first process."""

    def __init__(self, path):
        self.path, self.seen, self.step = path, [], 0

    def on_train_start(self, trainer, module):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > self.step and trainer.is_global_zero:
            self.step = trainer.global_step
            self.seen.append({k: v.clone() for k, v in module.flow.state_dict().items()})

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            torch.save(self.seen, self.path)


def fit(
    folder: Path,
    batch: int = 8,
    accumulate: int = 4,
    epochs: int = 2,
    ema: float | None = 0.9,
    minutes: float | None = 0.0,
    stop: StopAt | None = None,
    processes: int = 1,
    given: bool = False,
    augmented: bool = True,
    train: int = 104,
    precision: str = "32-true",
    **flow_options,
) -> None:
    """Train, or go on with, the run of a folder: 13 batches of 8 an epoch, in steps of 4, 4, 4, 1.

    What it leaves: last.ckpt, metrics.csv, and the weights of every step of this call in steps.pt.
    """
    folder.mkdir(exist_ok=True)
    flow = make_flow(**flow_options)
    data = make_data(batch, train, augmented)
    module = FlowModule(
        give_noise(flow) if given else flow,
        optimizer=lambda parameters: torch.optim.Adamax(parameters, 1e-2),
        schedule=lambda optimizer, **sizes: staged(
            optimizer,
            **sizes,
            gamma=0.5,
            warmup_steps=2,
            main_epochs=max(1, epochs - 1),
            cooldown_lr=1e-3,
            warmup_overwrites_decay=True,
        ),
        unit="bpd",
        num_dims=64,
        seed=3,
    )
    last = folder / "last.ckpt"
    csv_file = CSVMetrics(folder / "metrics.csv", [module.train_key, module.val_key, "lr"])
    csv_file.start(int(load_checkpoint(last)["global_step"]) if last.is_file() else 0)
    saving = dict(dirpath=folder, save_on_train_epoch_end=True, enable_version_counter=False)
    callbacks = [
        Steps(folder / "steps.pt"),
        *([EMA(ema)] if ema else []),
        *([TimedCheckpoint(minutes, look_every=1)] if minutes is not None else []),
        ModelCheckpoint(filename="best", monitor=module.val_key, **saving),
        ModelCheckpoint(filename="last", **saving),
        *([stop] if stop else []),
    ]
    several = DDPStrategy(process_group_backend="gloo", start_method="fork")
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        devices=processes,
        strategy="auto" if processes == 1 else several,
        precision=precision,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=[csv_file],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=3,
    )
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None)


def in_another_process(target, *arguments, **keys) -> int:
    """Its exit code; negative for the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(
        target=target, args=arguments, kwargs=keys
    )
    process.start()
    process.join(120)
    return process.exitcode


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder):
    """After every epoch, in validation."""
    return [float(r["val/elbo_bpd"]) for r in rows(folder) if r["val/elbo_bpd"]]


def steps(folder):
    return torch.load(folder / "steps.pt", weights_only=True)


def assert_same_state(a, b):
    """Every tensor and number of two checkpoints' nested containers, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


PARTS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")


def assert_same_run(one, other):
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (load_checkpoint(folder / name) for folder in (one, other))
        for part in (*PARTS, "lr_schedulers", "global_step", "epoch"):
            if part in a or part in b:
                assert_same_state(a[part], b[part])
    assert rows(one) == rows(other)


# Resuming


def test_a_run_broken_within_its_epochs_ends_where_the_unbroken_one_does(tmp_path):
    """By kill -9 in the first epoch and by an exception in the second, between checkpoints.

    With an average of the weights, accumulation, augmentation and variational dequantization, and
    log lines that reach over the checkpoints.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(whole, minutes=None)
    assert in_another_process(fit, broken, stop=StopAt(0, 6, kill=True)) == -signal.SIGKILL
    first = load_checkpoint(broken / "last.ckpt")
    assert first["global_step"] == 1 and resume_point(first) == "in epoch 1, after step 1"
    assert first["surflow"]["running"]["count"] == 1  # batch 4, behind the line at batch 3
    with pytest.raises(Stop):
        fit(broken, stop=StopAt(1, 10))
    second = load_checkpoint(broken / "last.ckpt")
    assert second["global_step"] == 6 and resume_point(second) == "in epoch 2, after step 6"
    fit(broken)
    assert len(steps(broken)) == 2  # what was left
    end = load_checkpoint(broken / "last.ckpt")
    assert end["global_step"] == 8 and resume_point(end) == "after epoch 2"
    assert "running" not in end["surflow"]
    assert_same_run(whole, broken)


def test_running_statistics_resume_too(tmp_path):
    """The look at the first batch of a resumed run leaves those of batch normalisation alone."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(whole, minutes=None, batch_norm=True, train=96)
    with pytest.raises(Stop):
        fit(broken, stop=StopAt(1, 6), batch_norm=True, train=96)
    assert resume_point(load_checkpoint(broken / "last.ckpt")) == "in epoch 2, after step 4"
    fit(broken, batch_norm=True, train=96)
    assert_same_run(whole, broken)
    state = load_checkpoint(whole / "last.ckpt")["state_dict"]
    assert sum(k.endswith("running_mean") for k in state) > 10


def test_a_look_at_the_first_batch_changes_nothing():
    flow = make_flow(batch_norm=True)
    module = FlowModule(flow, torch.optim.Adam, None)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    module._first_batch(torch.randint(17, (8, 1, 8, 8)))
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_nets_alone_are_initialised_from_the_batch_of_all_processes(monkeypatch):
    """Else each process would keep shifts and scales of its own, and so another model."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 2, 4, 4) + torch.tensor([0.0, 3.0]).view(2, 1, 1, 1, 1)
    states = []
    for share in x:
        torch.manual_seed(1)
        net = GlowNet(1, 2, hidden_channels=4)
        flow = Flow(StandardNormal((2, 4, 4)), AffineCoupling(net, scale="sigmoid"))
        module = FlowModule(flow, torch.optim.Adam, None)
        monkeypatch.setattr(module, "_gathered", lambda value: x)
        module._first_batch(share)
        assert net.first.initialised and net.second.initialised
        states.append(flow.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert states[0]["transforms.transforms.0.net.first.shift"].abs().max() > 0


def test_an_average_begins_with_the_weights(tmp_path):
    """Before its first update too, in a run that is shorter than the steps between two."""
    data = make_data(8, train=32)
    flow = make_flow(actnorm=True)
    module = FlowModule(
        flow,
        optimizer=lambda parameters: torch.optim.Adamax(parameters, 1e-2),
        schedule=lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
    )
    seen = Steps(tmp_path / "steps.pt")
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", callbacks=[EMA(0.9, 10), seen],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(seen.seen) == 4
    for name, value in flow.state_dict().items():
        assert torch.equal(value, seen.seen[-1][name]), name


def test_two_processes_resume_within_an_epoch(tmp_path):
    """Each draws on as it would have; here without accumulation."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    several = dict(accumulate=1, processes=2, train=48)
    fit(whole, minutes=None, **several)
    with pytest.raises(Exception, match="Stop"):
        fit(broken, stop=StopAt(1, 4), **several)
    state = load_checkpoint(broken / "last.ckpt")
    assert resume_point(state) == "in epoch 2, after step 10"
    sums = state["surflow"]["running"]["sums"]
    assert sums.shape == (2,) and sums[0] != sums[1]
    fit(broken, **several)
    assert_same_run(whole, broken)


def test_a_clock_decides(tmp_path):
    now = [0.0]
    saved = []

    class Trainer:
        accumulate_grad_batches, num_training_batches, world_size = 2, 100, 1
        default_root_dir = tmp_path

        def save_checkpoint(self, path):
            saved.append((done, path))

    callback = TimedCheckpoint(0.5, clock=lambda: now[0])
    trainer = Trainer()
    callback.on_train_start(trainer, None)
    for done in range(1, 101):
        now[0] += 5.0
        callback.on_train_batch_end(trainer, None, None, None, done - 1)
    # every 30 seconds are 6 batches, and the epoch's end has a checkpoint of its own
    assert [n for n, _ in saved] == list(range(6, 100, 6))
    assert {path for _, path in saved} == {tmp_path / "last.ckpt"}
    with pytest.raises(ValueError, match=r"timed_checkpoint\.minutes: expected minutes >= 0"):
        TimedCheckpoint(-1)


# One step, however it is cut


def assert_same_steps(one, other, tolerance=2e-5):
    a, b = steps(one), steps(other)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=0, atol=tolerance, msg=name)
    moved = max((a[-1][k] - a[0][k]).abs().max() for k in a[0] if a[0][k].is_floating_point())
    assert moved > 1e-2


PLAIN = dict(ema=None, minutes=None, given=True, train=96)


@pytest.fixture(scope="module")
def batch_of_32(tmp_path_factory):
    """Three steps an epoch, of 32 images each, with noise that follows from the images."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, batch=32, accumulate=1, **PLAIN)
    return folder


def test_four_batches_of_8_are_one_of_32(batch_of_32, tmp_path):
    fit(tmp_path, batch=8, accumulate=4, **PLAIN)
    assert len(steps(tmp_path)) == 6
    assert_same_steps(tmp_path, batch_of_32)
    assert losses(tmp_path) == pytest.approx(losses(batch_of_32), abs=1e-5)
    assert len(losses(tmp_path)) == 2


def test_two_processes_do_what_one_does(batch_of_32, tmp_path):
    fit(tmp_path, batch=32, accumulate=1, processes=2, **PLAIN)
    assert_same_steps(tmp_path, batch_of_32)
    for x, y in zip(rows(tmp_path), rows(batch_of_32), strict=True):
        assert (x["step"], x["epoch"], x["lr"]) == (y["step"], y["epoch"], y["lr"])
        for key in ("train/elbo_bpd", "val/elbo_bpd"):
            assert bool(x[key]) == bool(y[key])
            if x[key]:
                assert float(x[key]) == pytest.approx(float(y[key]), abs=1e-5)


def test_a_group_that_is_not_full_weighs_its_rows_alike(tmp_path):
    """The last step of an epoch, with one batch of four: the mean over that batch, not a quarter.

    A step of plain gradient descent, found here by hand.
    """
    flow = give_noise(make_flow())
    data = make_data(8, train=40, augmented=False)  # steps of 4 batches and of 1
    module = FlowModule(
        flow,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-2),
        schedule=lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        unit="bpd",
        num_dims=64,
    )
    seen = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            state = {k: v.clone() for k, v in module.flow.state_dict().items()}
            seen.append((batch, state))

    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", accumulate_grad_batches=4,
        callbacks=[Keep()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    end = {k: v.clone() for k, v in flow.state_dict().items()}
    for batches, before, after in (
        (torch.cat([b for b, _ in seen[:4]]), seen[0][1], seen[4][1]),
        (seen[4][0], seen[4][1], end),
    ):
        flow.load_state_dict(before)
        loss = -flow.log_prob(batches).mean() / (64 * math.log(2))
        names = dict(flow.named_parameters())
        found = torch.autograd.grad(loss, list(names.values()))
        for (name, p), g in zip(names.items(), found, strict=True):
            torch.testing.assert_close(after[name], p - 1e-2 * g, rtol=0, atol=1e-6, msg=name)
        assert max(g.abs().max() for g in found) > 1e-2


# Validation


def validate(processes=1, eval_batch_size=128, folder=None, rate=0.0):
    """Validation losses of two epochs of a flow that learns nothing, or at some rate."""
    data = make_data(8, 16, eval_batch_size=eval_batch_size)
    module = FlowModule(
        make_flow(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, rate),
        schedule=lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        unit="bpd",
        num_dims=64,
        seed=3,
    )
    file = CSVMetrics(folder / "metrics.csv", [module.train_key, module.val_key, "lr"])
    file.start(0)
    several = DDPStrategy(process_group_backend="gloo", start_method="fork")
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", devices=processes,
        strategy="auto" if processes == 1 else several, logger=[file], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return losses(folder)


def test_validation_depends_on_weights_alone(tmp_path, monkeypatch):
    """Every epoch draws alike, and so do other batch sizes and numbers of processes."""
    from surflow.data import module as data_module

    monkeypatch.setattr(data_module, "BLOCK_NUMBERS", 64 * 16)  # 40 images: 16, 16, 8
    assert block_rows((1, 8, 8)) == 16
    one, two = validate(folder=tmp_path)
    assert one == two
    assert validate(eval_batch_size=7, folder=tmp_path) == [one, one]
    assert validate(processes=2, folder=tmp_path) == [one, one]
    # by hand: the same blocks, one after the other
    flow, images = make_flow().eval(), make_data(8).splits["valid"]
    total = 0.0
    with torch.no_grad():
        for i, block in enumerate(images.split(16)):
            seed_draws(CPU, 2, 3, i)
            total -= flow.log_prob(block).double().sum().item()
    assert one == pytest.approx(total / 40 / (64 * math.log(2)), abs=1e-6)


def test_validation_of_two_processes_has_one_set_of_running_statistics(tmp_path, monkeypatch):
    """Those of the checkpoint, though each process has moved its own since the last step."""
    from surflow.data import module as data_module

    monkeypatch.setattr(data_module, "BLOCK_NUMBERS", 64 * 8)  # 40 images: 3 blocks and 2
    fit(tmp_path, 16, 1, epochs=1, ema=None, minutes=None, processes=2, batch_norm=True, train=48)
    flow = make_flow(batch_norm=True).eval()
    state = load_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    flow.load_state_dict({k.removeprefix("flow."): v for k, v in state.items()})
    total = 0.0
    with torch.no_grad():
        for i, block in enumerate(make_data(8).splits["valid"].split(8)):
            seed_draws(CPU, 2, 3, i)
            total -= flow.log_prob(block).double().sum().item()
    assert losses(tmp_path) == [pytest.approx(total / 40 / (64 * math.log(2)), abs=1e-6)]


def test_blocks_hold_about_as_many_numbers():
    assert [block_rows(s) for s in ((3, 32, 32), (3, 64, 64), (2,), (3, 512, 512))] == [
        85, 21, 4096, 1,
    ]  # fmt: skip


def test_seeds_mix_all_their_bits():
    """The CPU's generator looks at 32 bits of a seed; numbers that far apart give other draws."""
    draws = set()
    for key in [(0, s, e) for s in (0, 1, 4096, 8192, 2**20, 2**30) for e in (0, 1, 4096)]:
        seed_draws(CPU, *key)
        draws.add(tuple(torch.rand(3).tolist()))
    assert len(draws) == 18


def test_every_step_and_epoch_draws_for_itself(tmp_path):
    """With a rate of 0 and the same images, what differs is what was drawn."""

    class Losses(Callback):
        seen = ()

        def on_train_batch_end(self, trainer, module, outputs, *_):
            self.seen = (*self.seen, float(outputs["loss"]))

    data = make_data(8, 24, augmented=False)
    data.splits["train"] = data.splits["train"][:1].expand(24, -1, -1, -1)
    module = FlowModule(
        make_flow(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.0),
        schedule=lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
    )
    losses = Losses()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", callbacks=[losses],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(losses.seen) == len(set(losses.seen)) == 6


# Precision, layout, compilation


def test_a_step_reads_nothing_from_the_device():
    """On tensors without values: an accelerator is never waited for."""
    x = make_data(8).splits["train"][:4]
    flow = make_flow(actnorm=True)
    flow.log_prob(x)  # sets the normalisations
    module = FlowModule(flow, None, None, unit="bpd", num_dims=64)
    adamax = torch.optim.Adamax(flow.parameters(), foreach=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(DataDependentOutputException):
            bool((x + 0 >= 0).all())
        with check_values(False):
            loss = module._eager_loss(x)
            loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        adamax.step()


def test_autocast_keeps_likelihoods_and_latents_in_float32():
    """In bits a dimension, bfloat16 nets are within 0.05 of float32 ones, here within 0.02."""
    flow = make_flow(num_steps=2, mid_channels=8, depth=2, growth=4, actnorm=True)
    give_noise(flow)
    module = FlowModule(flow, None, None, unit="bpd", num_dims=64)
    x = make_data(8).splits["train"][:64]
    flow.log_prob(x)  # sets the normalisations
    seen = {}

    def note(layer, _, output):
        z, ldj = output
        seen.setdefault(type(layer).__name__, set()).update({z.dtype, ldj.dtype})

    nets = set()
    for layer in flow.modules():
        if isinstance(layer, Transform):
            layer.register_forward_hook(note)
        elif isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda m, i, output: nets.add(output.dtype))
    exact = flow.log_prob(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.clear(), nets.clear()
        rough = flow.log_prob(x)
        loss = module._eager_loss(x)
    assert torch.bfloat16 in nets
    assert {"Conv1x1", "AffineCoupling", "MaxPool2d", "ActNorm", "Squeeze"} <= seen.keys()
    assert all(kinds == {torch.float32} for kinds in seen.values()), seen
    assert rough.dtype == loss.dtype == torch.float32
    bits = (exact - rough).abs() / (64 * math.log(2))
    assert 0 < bits.max() < 0.02
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in flow.parameters() if p.grad is not None)


def test_a_run_in_bfloat16_learns_as_one_in_float32(batch_of_32, tmp_path):
    fit(tmp_path, batch=32, accumulate=1, precision="bf16-mixed", **PLAIN)
    kinds = {v.dtype for v in steps(tmp_path)[-1].values() if v.is_floating_point()}
    assert kinds == {torch.float32}
    a, b = losses(tmp_path), losses(batch_of_32)
    assert a == pytest.approx(b, abs=0.02) and a != b


def test_channels_last_changes_the_layout_and_not_the_loss():
    x = make_data(8).splits["train"][:6].expand(-1, 3, -1, -1)
    losses, layouts = [], []
    for last in (False, True):
        torch.manual_seed(5)
        flow = pool_flow((3, 8, 8), **TINY)
        module = FlowModule(give_noise(flow), None, None, channels_last=last)
        flow.transforms[0].register_forward_hook(
            lambda m, i, o: layouts.append(o[0].is_contiguous(memory_format=torch.channels_last))
        )
        losses.append(module._eager_loss(module._laid_out(x)).item())
    assert layouts == [False, True]
    weights = [m.weight for m in flow.modules() if isinstance(m, torch.nn.Conv2d)]
    convolution = next(w for w in weights if min(w.shape) > 1)
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one():
    if not can_compile():
        pytest.skip("no C++ compiler")
    x = make_data(8).splits["train"][:8]
    u = torch.rand(x.shape)
    losses, gradients = [], []
    for compiled in (False, True):
        flow = make_flow(dequantization="uniform")
        module = FlowModule(flow, None, None, unit="bpd", num_dims=64, compile=compiled)
        flow.transforms[0].transform.noise = Given(u)
        losses.append(module._loss(x))
        gradients.append(torch.autograd.grad(losses[-1], list(flow.parameters())))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
