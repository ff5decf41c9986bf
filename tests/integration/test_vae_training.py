"""Training of VAEs: annealing by the step, free bits, what is logged, active units of a record."""

import json

import pytest
import torch

import surflow.training.module as training
from surflow.config import compose, config_hash
from surflow.objectives import elbo
from surflow.training.hardware import can_compile
from surflow.training.objective import Objective
from surflow.training.run import Run
from surflow.variational import annealed_elbo

VAE = (
    "data=digits_binary",
    "model=vae_posterior",
    "model.latent_features=3",
    "model.hidden_features=[16]",
    "data.train_size=256",
    "data.valid_size=64",
    "data.test_size=100",
    "data.batch_size=64",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=2",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "run.pictures=false",
    "logger=csv",
)


@pytest.fixture
def config(root):
    """The config of a small VAE, where the other tests of this folder have a coupling flow."""
    return lambda *overrides, name="train": compose([*VAE, f"run.root={root}", *overrides], name)


@pytest.fixture
def losses(monkeypatch):
    """What the annealed bound was asked for, step by step."""
    asked = []
    plain = training.annealed_elbo

    def recorded(flow, x, **how):
        asked.append({**how, "beta": how["beta"].item()})
        return plain(flow, x, **how)

    monkeypatch.setattr(training, "annealed_elbo", recorded)
    return asked


def test_beta_follows_the_optimizer_steps(train, rows, losses):
    annealed = ["objective.beta_start=0.25", "objective.beta_steps=4", "objective.annealed=joint"]
    _, folder, metrics = train(*annealed, "objective.free_bits=0.125")
    assert [a["beta"] for a in losses] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]  # two epochs of four
    assert {a["annealed"] for a in losses} == {"joint"}
    assert {a["free_bits"] for a in losses} == {0.125}
    names = set(rows(folder)[0])
    assert "train/annealed_elbo_nats" in names  # a loss, and no bound
    assert "train/elbo_nats" not in names
    assert "val/elbo_nats" in names
    assert metrics["test/elbo_nats"] > 0


def test_beta_of_accumulated_batches_is_that_of_the_step(train, losses):
    train("objective.beta_start=0.0", "objective.beta_steps=4", "trainer.accumulate_grad_batches=2")
    assert [a["beta"] for a in losses] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_without_annealing_the_loss_is_the_bound(train, rows, losses):
    cfg, folder, _ = train()
    assert losses == []
    assert "train/elbo_nats" in rows(folder)[0]
    # options at their defaults make no other run
    plain = ("annealed=divergence", "beta_start=1.0", "beta_steps=0", "free_bits=0.0")
    overrides = [f"objective.{option}" for option in plain]
    assert config_hash(compose([*VAE, *overrides])) == config_hash(cfg)
    assert config_hash(compose([*VAE, "objective.beta_steps=9"])) != config_hash(cfg)


def test_kong_and_li_as_executed_and_as_written(train, rows):
    """The recipes differ in the training loss alone, and the numbers of both are in the record."""
    for recipe, loss in (("as_executed", "annealed_elbo"), ("as_written", "elbo")):
        how = (f"recipe=kong_li/{recipe}", "model.posterior=planar", "model.num_layers=2")
        cfg, folder, metrics = train(*how)
        assert f"train/{loss}_nats" in rows(folder)[0]
        run = Run(cfg)
        flow = run.load_flow()[0]
        record = json.loads((folder / "record.json").read_text())["metrics"]
        for split, x in run.data.splits.items():
            if split == "valid":
                continue
            torch.manual_seed(1)
            many = annealed_elbo(flow, x, num_samples=400, annealed="latent_mean")
            bound = elbo(flow, x, num_samples=400)
            found, score = record[f"{split}/elbo_nats"], record[f"{split}/as_printed_nats"]
            # the noise of one and of ten draws an image, about a nat a draw
            assert found["value"] == pytest.approx(-bound.mean().item(), abs=0.4)
            assert score["value"] == pytest.approx(-0.9984 * many.mean().item(), abs=0.15)
            assert (found["kind"], score["kind"]) == ("bound", "score")
            assert score["estimator"].startswith("no bound: latent_mean")
            assert score["value"] < found["value"] - 0.5
        assert not list(folder.glob("*.partial.npz"))
        assert metrics["train/as_printed_nats"] == record["train/as_printed_nats"]["value"]


def test_an_annealed_step_is_the_gradient_of_its_formula(config):
    """Against the terms written out with torch.distributions."""
    how = Objective(annealed="divergence", beta_start=0.5, beta_steps=10)
    run = Run(config())
    flow = run.build_flow().double()
    module = training.FlowModule(flow, None, None, how)
    x = run.data.splits["train"][:32].double()
    beta = torch.tensor(how.beta(2), dtype=torch.float64)
    assert beta == 0.7
    torch.manual_seed(5)
    module._eager_loss(x, beta).backward()
    mine = [p.grad.clone() for p in flow.parameters()]

    layer = flow.transforms[0]
    for p in flow.parameters():
        p.grad = None
    torch.manual_seed(5)
    loc, log_scale = layer.encoder.flow.base.parameters_of(layer.encoder.net(x))
    q = torch.distributions.Normal(loc, log_scale.exp())
    z = loc + log_scale.exp() * torch.randn_like(loc)
    p_x = torch.distributions.Bernoulli(logits=layer.decoder.net(z), validate_args=False)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    terms = p_x.log_prob(x).sum(1) - beta * (q.log_prob(z).sum(1) - log_p)
    (-terms.mean()).backward()
    for a, p in zip(mine, flow.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-9)


def test_compiled_annealing_agrees_with_eager(config, tmp_path, weights):
    from torch._inductor import config as inductor

    from surflow.cli.train import train as run
    from surflow.config import run_dir

    if not can_compile():
        pytest.skip("no C++ compiler")
    found = []
    for name in ("false", "true"):
        cfg = config(
            f"compute.compile={name}",
            f"run.root={tmp_path / name}",
            "objective.beta_start=0.25",
            "objective.beta_steps=4",
            "objective.free_bits=0.1",
        )
        with inductor.patch(fallback_random=True):  # the draws of eager code
            run(cfg)
        found.append(weights(run_dir(cfg)))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("posterior", ["diagonal", "planar"])
def test_active_units_of_a_record(train, posterior):
    layers = 2 if posterior == "planar" else 0
    learned = ["trainer.max_epochs=15", "optimizer.lr=1e-2"]  # some dimensions are used by then
    cfg, folder, metrics = train(
        f"model.posterior={posterior}", f"model.num_layers={layers}", *learned
    )
    run = Run(cfg)
    flow, _ = run.load_flow(folder / "last.ckpt")
    encoder = flow.transforms[0].encoder
    x = run.data.splits["test"]
    with torch.no_grad():
        if posterior == "diagonal":
            mean = encoder.flow.base.parameters_of(encoder.net(x))[0]
        else:
            mean = torch.stack([encoder.sample(context=x) for _ in range(4000)]).mean(0)
    variance = mean.var(0)
    noise = 0.0 if posterior == "diagonal" else 0.003  # of the record's 32 draws a row
    least, most = (int((variance > 0.01 + edge).sum()) for edge in (noise, -noise))
    assert most > 0
    metric = json.loads((folder / "record.json").read_text())["metrics"]["test/active_units"]
    assert metrics["test/active_units"] == metric["value"]
    assert least <= metric["value"] <= most
    assert (metric["unit"], metric["kind"], metric["count"]) == ("units", "score", 100)
    assert metric["protocol"] == {"of": 3, "threshold": 0.01, "rows": 100}


LATE = ["model.posterior=planar", "model.num_layers=3"]


def test_a_posterior_that_begins_later(train, weights):
    def trained(start, rate):
        how = (f"model.posterior_start={start}", f"model.posterior_rate={rate}")
        _, folder, _ = train(*LATE, *how)
        found = weights(folder)
        late = {n for n in found if ".encoder.flow.transforms." in n}
        assert len(late) == 2  # weight and bias of their map
        return [{n: v for n, v in found.items() if (n in late) is part} for part in (False, True)]

    def same(one, two):
        return [torch.equal(one[name], two[name]) for name in one]

    still = trained(7, 1e-30)  # of 8 steps; these layers never move
    last = trained(7, 0.5)
    early = trained(6, 0.5)
    # what moves in the last step is seen by nobody before it, what moves one earlier is
    assert all(same(still[0], last[0]))
    assert not any(same(still[1], last[1]))
    assert not all(same(still[0], early[0]))  # but for the constants of the base


def test_until_then_every_depth_is_the_same_model(train, rows):
    """The diagonal posterior and any number of layers that begin later, of one seed, bit by bit."""
    curves = []
    for posterior, layers in (("diagonal", 0), ("planar", 1), ("planar", 5), ("iaf", 2)):
        how = (f"model.posterior={posterior}", f"model.num_layers={layers}")
        _, folder, _ = train(*how, "model.posterior_start=4")  # the second of two epochs
        curves.append([float(r["val/elbo_nats"]) for r in rows(folder) if r["val/elbo_nats"]])
    for curve in curves[1:]:
        assert curve[0] == curves[0][0]
        assert curve[1] != curves[0][1]


def test_a_posterior_cannot_begin_behind_the_end(call, root):
    done = call("train", *VAE, *LATE, "model.posterior_start=8", f"run.root={root}")
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith(
        "model.posterior_start: expected fewer than the 8 optimizer steps of the run, got 8"
    )
    assert not list(root.rglob("last.ckpt"))


def test_annealing_needs_a_vae_layer(call, root):
    done = call(
        "train",
        "data=corners",
        "objective.beta_steps=10",
        f"run.root={root}",
        "logger=csv",
        "trainer.accelerator=cpu",
    )
    assert done.code == 2
    lines = [line for line in done.err.splitlines() if line.startswith("surflow: error")]
    assert lines == [
        "surflow: error: objective.beta_steps, objective.free_bits: expected a model with a VAE "
        "layer, got one without"
    ]
    assert not list(root.rglob("*.ckpt"))
