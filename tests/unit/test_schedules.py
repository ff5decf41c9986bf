"""Learning-rate schedules, against torch's own schedulers stepped in the official order."""

import math

import pytest
import torch
from hydra.utils import instantiate
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

from surflow.config import compose
from surflow.training.schedules import constant, cosine, exponential, staged

LR, COOL = 1e-3, 2e-5
STEPS, MAIN, ALL = 7, 5, 8  # steps an epoch, main epochs, all epochs
OPTIONS = dict(gamma=0.8, warmup_steps=10, main_epochs=MAIN, cooldown_lr=COOL)


def optimizer():
    return torch.optim.Adamax([torch.nn.Parameter(torch.ones(3))], lr=LR)


def rates(schedule, steps, **options):
    """The rate of every step of a run, as Lightning steps a schedule: after each optimizer step."""
    adamax = optimizer()
    scheduler = schedule(adamax, **options)
    out = []
    for _ in range(steps):
        out.append(adamax.param_groups[0]["lr"])
        adamax.step()
        scheduler.step()
    return out


class Warmup(LRScheduler):
    """The rate that the group began with, times the share of the warm-up that is done."""

    def __init__(self, optimizer, steps):
        self.steps = steps
        super().__init__(optimizer)

    def get_lr(self):
        return [base * min(1.0, self.last_epoch / self.steps) for base in self.base_lrs]


def executed(decay_first):
    """Every step's rate where both schedulers act on one optimizer, in the official order."""
    adamax = optimizer()
    makers = [lambda: ExponentialLR(adamax, OPTIONS["gamma"]), lambda: Warmup(adamax, 10)]
    made = [make() for make in (makers if decay_first else makers[::-1])]
    decay, warmup = made if decay_first else made[::-1]
    out = []
    for epoch in range(ALL):
        if epoch == MAIN:
            adamax.param_groups[0]["lr"] = COOL
        for _ in range(STEPS):
            out.append(adamax.param_groups[0]["lr"])
            adamax.step()
            if epoch < MAIN:
                warmup.step()
        if epoch < MAIN - 1:
            decay.step()
    return out


@pytest.mark.filterwarnings("ignore:To get the last learning rate")
@pytest.mark.parametrize("decay_first", [True, False])
def test_as_executed_is_what_torchs_schedulers_do_together(decay_first):
    expected = executed(decay_first)
    sizes = dict(total_steps=ALL * STEPS, steps_per_epoch=STEPS)
    got = rates(staged, ALL * STEPS, **sizes, **OPTIONS, warmup_overwrites_decay=True)
    assert got == pytest.approx(expected, rel=1e-12)
    # the decay is seen, in one step an epoch and no other
    full = [LR * min(1, t / 10) for t in range(MAIN * STEPS)]
    lower = [t for t in range(MAIN * STEPS) if got[t] < 0.99 * full[t]]
    assert lower == [STEPS * e for e in range(1, MAIN)]


def test_as_written():
    sizes = dict(total_steps=ALL * STEPS, steps_per_epoch=STEPS)
    got = rates(staged, ALL * STEPS, **sizes, **OPTIONS, warmup_overwrites_decay=False)
    rate, expected = LR, []
    for epoch in range(ALL):
        for step in range(STEPS):
            done = epoch * STEPS + step
            expected.append(rate * min(1.0, done / 10) if epoch < MAIN else COOL)
        rate *= OPTIONS["gamma"]
    assert got == pytest.approx(expected, rel=1e-12)
    assert got[0] == 0.0


def test_a_schedule_without_stages_and_warm_up():
    options = dict(OPTIONS, warmup_steps=0, main_epochs=3, cooldown_lr=None)
    sizes = dict(total_steps=3 * STEPS, steps_per_epoch=STEPS)
    got = rates(staged, 3 * STEPS, **sizes, **options, warmup_overwrites_decay=False)
    assert got == pytest.approx([LR * 0.8 ** (t // STEPS) for t in range(3 * STEPS)])
    assert got == pytest.approx(rates(exponential, 3 * STEPS, **sizes, gamma=0.8))
    got = rates(staged, 3 * STEPS, **sizes, **options, warmup_overwrites_decay=True)
    assert got == pytest.approx([LR * (0.8 if t in (7, 14) else 1.0) for t in range(3 * STEPS)])


def test_the_others():
    sizes = dict(total_steps=20, steps_per_epoch=5)
    warm = [min(1.0, (t + 1) / 4) for t in range(20)]
    assert rates(constant, 20, **sizes, warmup_steps=4) == pytest.approx([LR * w for w in warm])
    half = [0.1 + 0.9 * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(20)]
    expected = [LR * w * h for w, h in zip(warm, half, strict=True)]
    assert rates(cosine, 20, **sizes, warmup_steps=4, final=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (constant, dict(warmup_steps=3)),
        (cosine, dict(warmup_steps=3)),
        (exponential, dict(gamma=0.8)),
        (staged, dict(OPTIONS, warmup_overwrites_decay=False)),
    ],
)
def test_a_group_that_begins_later(schedule, options):
    """Its rate is 0 before its start, and then follows the others' in its own proportion."""
    sizes = dict(total_steps=ALL * STEPS, steps_per_epoch=STEPS)
    whole = rates(schedule, ALL * STEPS, **sizes, **options)
    late = {"params": [torch.nn.Parameter(torch.ones(2))], "lr": LR / 4, "start": 12}
    adamax = optimizer()
    adamax.add_param_group(late)
    scheduler = schedule(adamax, **sizes, **options)
    got = []
    for _ in range(ALL * STEPS):
        got.append([group["lr"] for group in adamax.param_groups])
        adamax.step()
        scheduler.step()
    first, second = zip(*got, strict=True)
    assert list(first) == whole
    tail = [rate / 4 for rate in whole[12:]]
    if schedule is staged:  # its cool-down names a rate, which is the first group's
        assert first[-1] == pytest.approx(COOL)
    assert list(second[:12]) == [0.0] * 12
    assert list(second[12:]) == pytest.approx(tail)
    assert max(tail) > 0


def test_a_state_goes_on():
    sizes = dict(total_steps=ALL * STEPS, steps_per_epoch=STEPS)
    options = dict(sizes, **OPTIONS, warmup_overwrites_decay=True)
    whole = rates(staged, ALL * STEPS, **options)
    for stop in (3, STEPS, 2 * STEPS + 1, MAIN * STEPS, MAIN * STEPS + 2):
        first, second = optimizer(), optimizer()
        one, two = staged(first, **options), staged(second, **options)
        for _ in range(stop):
            first.step()
            one.step()
        second.load_state_dict(first.state_dict())
        two.load_state_dict(one.state_dict())
        rest = []
        for _ in range(ALL * STEPS - stop):
            rest.append(second.param_groups[0]["lr"])
            second.step()
            two.step()
        assert rest == whole[stop:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(gamma=0.0), "schedule.gamma: expected 0 < gamma <= 1, got 0"),
        (dict(gamma=1.1), "schedule.gamma: expected 0 < gamma <= 1, got 1.1"),
        (dict(main_epochs=0), "schedule.main_epochs: expected 1 to the 8 epochs of the run, got 0"),
        (dict(main_epochs=9), "schedule.main_epochs: expected 1 to the 8 epochs of the run, got 9"),
        (dict(warmup_steps=-1), "schedule.warmup_steps: expected 0 to 34, .*got -1"),
        (dict(warmup_steps=35), "schedule.warmup_steps: expected 0 to 34, .*got 35"),
        (dict(cooldown_lr=None), "schedule.cooldown_lr: .* for the 3 epochs .*, got None"),
        (dict(cooldown_lr=0.0), "schedule.cooldown_lr: expected a positive rate .*got 0"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    options = dict(OPTIONS, warmup_overwrites_decay=True)
    options.update(change)
    with pytest.raises(ValueError, match=message):
        staged(optimizer(), ALL * STEPS, STEPS, **options)


@pytest.mark.parametrize(("recipe", "overwrites"), [("as_written", False), ("as_executed", True)])
def test_recipes_compose(recipe, overwrites):
    cfg = compose(["schedule=staged", "optimizer=adamax", f"recipe={recipe}"])
    assert cfg.schedule.warmup_overwrites_decay is overwrites
    spec = {k: v for k, v in cfg.schedule.items() if k != "name"}
    adamax = instantiate({k: v for k, v in cfg.optimizer.items() if k != "name"})
    made = adamax([torch.nn.Parameter(torch.ones(2))])
    assert type(made) is torch.optim.Adamax and made.param_groups[0]["lr"] == 1e-3
    schedule = instantiate({**spec, "_partial_": True})(made, 550 * 20, 20)
    factor = schedule.lr_lambdas[0]
    # main epochs 500, then 2e-5; 45,000 images in batches of 32 are 1,406 steps an epoch, here 20
    assert factor(0) == 0.0 and factor(2500) == pytest.approx(
        0.5 * (1 if overwrites else 0.995**125), rel=6e-3
    )
    assert factor(9_999) == pytest.approx(1.0 if overwrites else 0.995**499)
    assert factor(10_000) == factor(10_999) == pytest.approx(2e-5 / 1e-3)
