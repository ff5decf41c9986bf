"""The benchmark at a size that takes seconds; none of the libraries is needed."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from benchmarks import harness, images, spline, vae
from benchmarks.__main__ import CONF, bench
from surflow.config import build
from surflow.errors import UserError
from surflow.models import pool_flow

TINY = (
    "compile=false",
    "batch_size=16",
    "blocks=3",
    "steps=2",
    "spline.features=5",
    "spline.batch_size=32",
    "spline.num_couplings=2",
    "spline.num_bins=3",
    "spline.hidden=[8,8]",
    "spline.blocks=3",
    "spline.calls=1",
    "spline.compile_theirs=false",
    "images.model={shape: [3, 8, 8], num_steps: 2, mid_channels: 8, depth: 2, growth: 4, "
    "dequant_steps: 1, context_channels: 4}",
    "images.batch_size=4",
    "images.memory_batch=4",
    "images.blocks=3",
    "images.steps=1",
    "images.samples=4",
    "images.iwbo={rows: 2, samples: 3}",
    "images.fid.n=0",
    'vae.overrides=["profile=paper","model.hidden_features=[8,6]","model.latent_features=4",'
    '"model.flow_hidden_features=[5]","data.batch_size=8"]',
    "vae.blocks=3",
    "vae.steps=2",
    "vae.warm_up=1",
    "vae.profile_steps=1",
)


def settings(*overrides):
    """conf/bench.yaml at tiny size, with these overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("bench", overrides=[*TINY, *overrides])


@pytest.fixture
def path(monkeypatch):
    """sys.path as it was, afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return sys.path


@pytest.fixture
def run(tmp_path, path):
    def run(*overrides):
        bench(settings(f"results_root={tmp_path}", *overrides))
        return tmp_path / "bench"

    return run


def stand_in(cfg):
    """Another library's flow: ours, but with a function of its own."""
    model = spline.surflow_model(cfg)
    model.same_function = False
    return model


def missing(cfg):
    raise ModuleNotFoundError("No module named 'zuko'")


def test_step_and_spline(run, monkeypatch, capsys):
    monkeypatch.setattr(spline, "LIBRARIES", {"nflows": stand_in, "zuko": missing})
    monkeypatch.setattr(spline, "version", lambda name: "1.2.3")
    folder = run("parts=[step,spline]", "spline.libraries=[nflows,zuko]")
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("bench: ")]
    assert lines == ["bench: zuko left out: No module named 'zuko'; `make bench` installs it"]
    step = json.loads((folder / "step.json").read_text())
    assert step["largest_difference_nats"] < 1e-4 and step["setting"]["compiled"] is False
    result = json.loads((folder / "spline.json").read_text())
    assert [(c["library"], c["compiled"]) for c in result["contenders"]] == [
        ("surflow", False),
        ("nflows", False),
    ]
    assert result["left_out"] == {"zuko": "No module named 'zuko'"}
    # 2 couplings of 5 features: 2 -> 8 -> 8 -> 3 * 8 and 3 -> 8 -> 8 -> 2 * 8
    assert result["parameters"] == (24 + 72 + 216) + (32 + 72 + 144)
    for c in result["contenders"]:
        for spread in c["ms"].values():
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert math.isfinite(c["last_loss"])
    # the same weights, batches and optimizer
    assert len({c["last_loss"] for c in result["contenders"]}) == 1
    assert [(r["task"], r["ours"], r["against"]) for r in result["speedup"]] == [
        (task, "surflow, eager", "nflows, eager") for task in ("train", "sample")
    ]
    page = (folder / "spline.md").read_text()
    assert "| nflows 1.2.3 | eager |" in page and "zuko was left out" in page
    assert (folder / "spline.png").read_bytes().startswith(b"\x89PNG")


def test_without_any_library_ours_is_still_timed(run, monkeypatch):
    monkeypatch.setattr(spline, "LIBRARIES", {"zuko": missing})
    folder = run("parts=[spline]", "spline.libraries=[zuko]")
    result = json.loads((folder / "spline.json").read_text())
    assert [c["library"] for c in result["contenders"]] == ["surflow"]
    assert result["speedup"] == [] and "Speed-up" not in (folder / "spline.md").read_text()
    assert not (folder / "step.json").exists()


def test_speedup_is_of_blocks_and_against_the_fastest():
    times = {
        ("train", ("surflow", False)): [1.0, 2.0, 4.0],
        ("train", ("slow", False)): [9.0, 9.0, 9.0],
        ("train", ("fast", False)): [2.0, 6.0, 16.0],
        ("sample", ("surflow", False)): [1.0, 1.0, 1.0],
        ("sample", ("slow", False)): [2.0, 2.0, 3.0],
        ("sample", ("fast", False)): [5.0, 5.0, 5.0],
    }
    rows = spline.speedups(times)
    assert [(r["task"], r["against"]) for r in rows] == [
        ("train", "fast, eager"),
        ("sample", "slow, eager"),
    ]
    assert (rows[0]["min"], rows[0]["median"], rows[0]["max"]) == (2.0, 3.0, 4.0)


def test_an_unlike_flow_is_not_compared(run, monkeypatch):
    def larger(cfg):
        return spline.surflow_model(OmegaConf.merge(cfg, {"hidden": [9, 8]}))

    def other_function(cfg):
        model = spline.surflow_model(cfg)
        log_prob = model.log_prob
        model.log_prob = lambda x: log_prob(x) + 0.1
        return model

    for builder, message in ((larger, "parameters, ours"), (other_function, "differ by")):
        monkeypatch.setattr(spline, "LIBRARIES", {"nflows": builder})
        with pytest.raises(RuntimeError, match=message):
            run("parts=[spline]", "spline.libraries=[nflows]")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parts=[spine]", "parts: expected some of step, spline, images, vae, got 'spine'"),
        ("spline.libraries=[zuki]", "spline.libraries: expected some of nflows, normflows, zuko"),
        ("spline.blocks=2", "spline.blocks, spline.calls: expected >= 3 and >= 1, got 2, 1"),
        ("blocks=1", "blocks and steps: expected >= 3 and >= 1, got 1, 2"),
        ("compile=maybe", "compile: expected auto, true or false, got 'maybe'"),
    ],
)
def test_mistakes(run, override, message):
    with pytest.raises(UserError, match=message):
        run(override)


@pytest.mark.filterwarnings("ignore")  # advice on the net that all of them share here
@pytest.mark.parametrize("name", list(spline.LIBRARIES))
def test_each_library_builds_the_same_flow(name, path):
    path.append(str(spline.FOLDER))
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; `make bench` installs it")
    cfg = settings().spline
    torch.manual_seed(0)
    ours = spline.surflow_model(cfg)
    theirs = spline.LIBRARIES[name](cfg)
    spline.copy_weights(ours, theirs, cfg)
    count = [sum(p.numel() for p in m.module.parameters()) for m in (ours, theirs)]
    assert count[0] == count[1]
    x = torch.randn(64, 5)
    difference = spline.check_same(name, ours, theirs, x)
    assert difference is None if name == "zuko" else difference < 1e-4
    assert theirs.sample(7).shape == (7, 5) and theirs.log_prob(x).isfinite().all()


# Image flows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_image_flows(run, profile):
    """The script of `make bench-gpu` too, at small size and on the CPU."""
    folder = run(
        "parts=[images]",
        f"bench_images@images={profile}",
        "images.device=cpu",
        "images.larger_batches=[8]",
        "+images.peak_tflops.cpu=0.5",
        "images.fid={n: 8, reference: 8, extractor: random_features, inception_weights: null}",
    )
    name = {"cpu": "images", "gpu": "images_gpu"}[profile]
    result = json.loads((folder / f"{name}.json").read_text())
    half = profile == "gpu"
    assert result["setting"]["precision"] == ("bfloat16" if half else "float32")
    assert result["best"] == "none" and set(result["ms_per_step"]) == {"plain", "none"}
    bpd = result["bpd_of_the_same_weights"]
    assert abs(bpd["plain"] - bpd["ours"]) < 1e-3
    rows = result["batches"]
    assert [row["batch_size"] for row in rows] == [4, 8]
    per_image = result["gflop_per_image"]["step"]
    for row in rows:
        achieved = row["images_per_s"] * per_image / 1e3
        assert row["tflops"] == pytest.approx(achieved, rel=0.02, abs=1e-4)
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / 0.5, abs=2e-4)
    peaks = {row["mode"]: row["peak_mib"] for row in result["memory"]["rows"]}
    assert list(peaks) == ["stored", "reversible", "checkpoint"]
    assert 0 < peaks["reversible"] < peaks["stored"] and peaks["checkpoint"] < peaks["stored"]
    assert min(result["samples_per_s"], result["iwbo_draws_per_s"]) > 0
    seconds = result["fid"]["seconds"]
    assert {"sampling", "sample features", "statistics", "total"} <= set(seconds)
    page = (folder / f"{name}.md").read_text()
    assert "| reversible |" in page and "of 0.5 TFLOP/s" in page and "not compiled" in page


def test_counted_arithmetic():
    """Convolutions and products of one image, by hand: 2 operations a weight and position."""
    cfg = settings("parts=[images]", "+images.model.dequantization=uniform").images
    flow = pool_flow(**OmegaConf.to_container(cfg.model))
    x = torch.randint(256, (8, 3, 8, 8))
    counted = images.count_flops(images.Training(flow, x, lr=1e-3), 4)
    weights = {name: p for name, p in flow.named_parameters() if p.dim() > 1 and "base" not in name}
    by_hand = sum(
        2 * p.numel() * (16 if int(name.split(".")[2]) < 7 else 4) for name, p in weights.items()
    )
    assert counted["forward"] == by_hand
    # backward: once for the weights and once for what they act on, except at the data
    assert 2.8 * by_hand < counted["step"] <= 3 * by_hand


def test_image_benchmark_names_what_is_wrong(run):
    for wrong, message in [
        ("images.precision=float8", "images.precision: expected one of float32, bfloat16"),
        ("images.compile=[all]", "images.compile: expected one of whole, layers, nets, none"),
        ("images.batch_size=4096", "batches of at most 512, got 3, 1 and 4096"),
        ("images.blocks=1", "images: expected blocks >= 3"),
    ]:
        with pytest.raises(UserError, match=message):
            run("parts=[images]", wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_one_line_says_so(run):
    with pytest.raises(UserError, match="expected a CUDA device, got a machine without one"):
        run("parts=[images]", "images.device=cuda")


def test_known_chips_have_a_peak(monkeypatch):
    cfg = settings("bench_images@images=gpu").images
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA H100 PCIe": None,
    }.items():
        monkeypatch.setattr(images, "device_name", lambda device, name=name: name)
        assert images.peak_of(cfg) == peak


# VAEs ---------------------------------------------------------------------------------------------


def test_vaes(run, capsys):
    """Each model through its real training run, timed in turns with its nets alone."""
    threads = torch.get_num_threads()
    folder = run("parts=[vae]")
    assert torch.get_num_threads() == threads
    assert "nll" not in capsys.readouterr().out  # of noise, by the runs
    result = json.loads((folder / "vae.json").read_text())
    vae = (784 * 8 + 8) + (8 * 6 + 6) + (6 * 8 + 8) + (4 * 6 + 6) + (6 * 8 + 8) + (8 * 784 + 784)
    by_hand = {
        "vae": vae,
        "planar_8": vae + 7 * 8 * 9,  # 6 features and a bias -> u, w, b of 8 layers
        "radial_8": vae + 7 * 8 * 6,
        "iaf_8": vae + 8 * ((4 + 6) * 5 + 5 + 5 * 8 + 8),
        "realnvp_8": vae + 8 * ((2 + 6) * 5 + 5 + 5 * 4 + 4),
    }
    assert {name: m["parameters"] for name, m in result["models"].items()} == by_hand
    for m in result["models"].values():
        assert m["relative_difference_of_losses"] < 1e-10
        ms = m["ms_per_step"]
        assert set(ms) == {"nets, eager", "step, eager", "loop"}
        for spread in ms.values():
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        for key, over in (("step, eager", "step, eager"), ("loop", "loop")):
            low = ms["nets, eager"]["min"] / ms[over]["max"]
            high = ms["nets, eager"]["max"] / ms[over]["min"]
            share = m["share"][key]
            assert low * 0.98 <= share["min"] <= share["max"] <= high * 1.02
        assert m["share"]["epoch"]["median"] < m["share"]["loop"]["median"]
        assert m["run"]["images"] == (1 + 3 * 2 + 1) * 8
        assert sum(m["profile"].values()) == pytest.approx(1, abs=1e-3)
        assert min(m["profile"][kind] for kind in ("products", "optimizer")) > 0
    page = (folder / "vae.md").read_text()
    assert "| planar_8 |" in page and "not compiled" in page


def flow_of(name):
    cfg = settings().vae
    return harness.build(vae.run_of(cfg, list(cfg.models[name]), 1, "unused", False)).flow


@pytest.mark.parametrize(("name", "posterior"), [("iaf_8", "iaf"), ("realnvp_8", "realnvp")])
def test_nets_alone_of_layers_that_start_as_the_identity(name, posterior):
    """There the nets' outputs are zero: to leave out how they are applied changes nothing."""
    flow = flow_of(name).double()
    nets = vae.Nets(flow, posterior).double()
    x = torch.rand(16, 784, dtype=torch.float64)
    losses = []
    for loss in (lambda: -flow.log_prob(x).mean(), lambda: nets.loss(x)):
        torch.manual_seed(0)
        losses.append(loss())
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for one in losses:
        one.backward()
    ours = torch.cat([p.grad.flatten() for p in flow.transforms[0].encoder.net.parameters()])
    theirs = torch.cat([p.grad.flatten() for p in nets.embed.parameters()])
    torch.testing.assert_close(ours, theirs)
    assert all(p.grad is not None for p in nets.parameters())


def test_other_nets_are_not_compared():
    flow, x = flow_of("planar_8"), torch.rand(8, 784)
    nets = vae.Nets(flow, "planar")
    assert vae.check_same(flow, nets, x) < 1e-10
    with torch.no_grad():
        nets.decoder[-1].bias[3] += 0.01
    with pytest.raises(RuntimeError, match="the losses differ by"):
        vae.check_same(flow, nets, x)
    nets.layers = torch.nn.ModuleList()
    with pytest.raises(RuntimeError, match="the nets alone have"):
        vae.check_same(flow, nets, x)


def test_pauses_of_the_loop_do_not_count(monkeypatch):
    """A loop of 3 s a step whose pauses take 100 s, and an end of 7 s."""
    now = 0.0
    monkeypatch.setattr(vae.time, "perf_counter", lambda: now)

    def other():
        nonlocal now
        now += 100.0
        return 1.5

    turns = vae.Turns(blocks=2, steps=4, warm_up=2)
    turns.enter("other", other)
    for i in range(turns.total):
        turns.before_step()
        now += 50.0 if i < 2 else 3.0
    now += 7.0
    turns.after_training()
    assert turns.times == {"loop": [3.0, 3.0], "other": [1.5, 1.5]}
    assert turns.end == 7.0 and now == 2 * 50.0 + 9 * 3.0 + 2 * 100.0 + 7.0


def test_noise_is_as_dark_as_digits():
    cfg = settings().vae
    training = vae.run_of(cfg, list(cfg.models.vae), 2, "unused", False)
    data = build(training.data)
    data.setup()
    assert [len(data.splits[s]) for s in ("train", "valid", "test")] == [16, 1000, 1000]
    valid = data.splits["valid"]
    assert (valid != 0).float().mean().item() == pytest.approx(0.19, abs=0.01)
    assert valid[valid != 0].mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vae.blocks=2", "vae: expected blocks >= 3, steps, warm_up and profile_steps >= 1"),
        (
            'vae.models.vae=["experiment=vae_planar/planar_8","model.posterior=sylvester"]',
            "vae.models.vae: expected model.posterior as one of diagonal, planar, radial, realnvp",
        ),
    ],
)
def test_vae_benchmark_names_what_is_wrong(run, override, message):
    with pytest.raises(UserError, match=message):
        run("parts=[vae]", override)
