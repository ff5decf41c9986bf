"""What a run of a VAE leaves to look at, and the commands and tables that draw it."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from surflow.cli.cells import plan_cells, write_report
from surflow.cli.request import results_folder, table_spec
from surflow.cli.train import train
from surflow.config import compose, run_dir
from surflow.evaluation.pictures import draw_pictures
from surflow.files import write_json
from surflow.training.run import Run

TINY = (
    "model=vae_prior",
    "model.hidden_features=[16]",
    "model.flow_hidden_features=[8]",
    "model.prior_layers=2",
    "data=digits_binary",
    "data.train_size=256",
    "data.test_size=40",
    "data.batch_size=64",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "compute.threads=1",
    "compute.compile=false",
    "logger=csv",
    "seed=3",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The overrides of a trained run, and its folder."""
    overrides = [*TINY, f"run.root={tmp_path_factory.mktemp('runs')}"]
    cfg = compose(overrides)
    train(cfg)
    return overrides, run_dir(cfg)


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def parts_of(overrides):
    """Flow, data, and the nets of the VAE layer by themselves: (loc, scale) and probabilities."""
    run = Run(compose(overrides))
    flow, data = run.load_flow()[0], run.data
    vae = flow.transforms[0]

    def posterior(x):
        out = vae.encoder.flow.base.net(vae.encoder.net(x))
        return out[:, 0::2], out[:, 1::2].exp()

    return flow, data, posterior, lambda z: torch.sigmoid(vae.decoder.net(z))


@torch.no_grad()
def test_reconstructions_are_decoder_means_of_one_draw(run):
    overrides, folder = run
    _, data, posterior, decode = parts_of(overrides)
    found = arrays(folder / "reconstructions.npz")
    x = data.splits["train"][:100]
    assert x.shape == (100, 64)
    assert np.array_equal(found["data"], 255 * x.numpy().reshape(100, 1, 8, 8))
    loc, scale = posterior(x)
    torch.manual_seed(3)
    p = decode(loc + scale * torch.randn(100, 2))
    expected = (255 * p).numpy().reshape(100, 1, 8, 8)
    assert np.abs(found["reconstructions"] - expected).max() <= 0.51
    assert (str(found["shown"]), int(found["num_levels"])) == ("decoder means", 256)
    sheet = np.asarray(Image.open(folder / "reconstructions.png"))
    side = 8 * 8 + 2  # an image and the gap
    assert sheet.shape[0] == 10 * side + 2
    assert np.array_equal(sheet[2 + side : side + 66 : 8, 2:66:8], found["data"][10, 0])
    right = sheet[:, -(10 * side + 2) :]
    assert np.array_equal(right[2:66:8, 2 + side : side + 66 : 8], found["reconstructions"][1, 0])


def test_samples_are_means_beside_draws_of_the_same_latents(run):
    _, folder = run
    found = arrays(folder / "images.npz")
    assert {name: found[name].shape for name in ("samples", "draws", "data")} == {
        name: (n, 1, 8, 8) for name, n in (("samples", 64), ("draws", 64), ("data", 40))
    }
    assert set(np.unique(found["draws"])) == set(np.unique(found["data"])) == {0, 255}
    assert (str(found["shown"]), int(found["num_levels"])) == ("decoder means", 256)
    # bits drawn with the means as probabilities: standardised squares are 1 in the mean
    p = np.clip(found["samples"] / 255.0, 0.01, 0.99)
    deviation = (found["draws"] / 255.0 - p) ** 2 / (p * (1 - p))
    assert deviation.mean() == pytest.approx(1.0, abs=0.15)
    assert Image.open(folder / "samples.png").size[0] > 2 * 8 * 64
    assert (folder / "interpolation.png").is_file()


@torch.no_grad()
def test_latents_of_the_run(run):
    overrides, folder = run
    flow, data, posterior, _ = parts_of(overrides)
    found = arrays(folder / "latent.npz")
    loc, scale = (t.double() for t in posterior(data.splits["test"]))
    np.testing.assert_allclose(found["points"], loc.numpy(), rtol=1e-5, atol=1e-6)
    assert found["labels"].tolist() == data.labels("test").tolist()
    low, high = found["grid_low"], found["grid_high"]
    step = (high - low) / 256
    line = torch.from_numpy(low[:, None] + step[:, None] * (np.arange(256) + 0.5))
    z = torch.cartesian_prod(*line)
    normals = torch.distributions.Normal(loc, scale)
    log_q = torch.logsumexp(normals.log_prob(z.unsqueeze(1)).sum(2), 1) - np.log(len(loc))
    q = log_q.exp().reshape(256, 256).numpy()  # at the centres, against means over the cells
    np.testing.assert_allclose(found["aggregated"], q, atol=2e-3 * q.max())
    base, layers = flow.base, list(flow.transforms)[1:]
    latent, log_p = z.float(), 0.0
    for layer in layers:
        latent, ldj = layer(latent)
        log_p = log_p + ldj
    log_p = (log_p + base.log_prob(latent)).double()
    p = log_p.exp().reshape(256, 256).numpy()
    np.testing.assert_allclose(found["prior"], p, rtol=1e-4, atol=1e-6)
    kl = float((log_q.exp() * (log_q - log_p)).sum() * step.prod())
    assert found["kl"] == pytest.approx(kl, abs=2e-3)
    assert found["inside"] == pytest.approx(1.0, abs=1e-4)
    assert Image.open(folder / "latent.png").size[0] > 600


def test_pictures_are_the_same_twice(run, tmp_path):
    """They follow from the seed, and leave the random state and the mode of the flow alone."""
    overrides, folder = run
    own = Run(compose(overrides))
    flow, _ = own.load_flow()
    flow.train()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    trained = replace(own.trained(flow), folder=tmp_path)
    names = draw_pictures(trained, own.config["row"])
    assert torch.equal(torch.get_rng_state(), state) and flow.training
    assert list(names) == [
        "figures/samples",
        "figures/interpolation",
        "figures/reconstructions",
        "figures/latent",
    ]
    for name in ("images.npz", "reconstructions.npz", "latent.npz"):
        first, second = arrays(folder / name), arrays(tmp_path / name)
        assert first.keys() == second.keys()
        for key in first:
            assert np.array_equal(first[key], second[key], equal_nan=first[key].dtype.kind == "f")


def test_the_command_sample(run, call, tmp_path):
    """Of flat images: images, and the means beside them; a folder holds PNG files."""
    overrides, _ = run
    out = tmp_path / "samples.npz"
    done = call("sample", *overrides, "n=300", f"out={out}")
    assert done.code == 0, done.err
    found = arrays(out)
    assert found["samples"].shape == found["means"].shape == (300, 1, 8, 8)
    assert set(np.unique(found["samples"])) == {0, 1}
    p = found["means"] / 255.0
    assert found["samples"].mean() == pytest.approx(p.mean(), abs=0.02)
    correlation = np.corrcoef(found["samples"].ravel(), p.ravel())[0, 1]
    assert correlation == pytest.approx(p.std() / found["samples"].std(), abs=0.03)
    folder = tmp_path / "files"
    assert call("sample", *overrides, "n=3", f"out={folder}").code == 0
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(3)]
    assert set(np.unique(np.asarray(Image.open(files[0])))) == {0, 255}


@torch.no_grad()
def test_the_command_interpolate(run, call, tmp_path):
    """The ends of the way are the decoder's means at draws of the two posteriors."""
    overrides, _ = run
    out = tmp_path / "way.png"
    done = call("interpolate", *overrides, "pairs=3", "steps=4", f"out={out}")
    assert done.code == 0, done.err
    _, data, posterior, decode = parts_of(overrides)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:6]
    loc, scale = posterior(data.splits["test"][order])
    torch.manual_seed(3)
    means = (255 * decode(loc + scale * torch.randn(6, 2))).view(6, 8, 8).numpy()
    sheet = np.asarray(Image.open(out)).astype(float)
    side = 66
    assert sheet.shape == (3 * side + 2, 4 * side + 2)
    for row in range(3):
        top = 2 + row * side
        for column, mean in ((0, means[row]), (3, means[3 + row])):
            left = 2 + column * side
            shown = sheet[top : top + 64 : 8, left : left + 64 : 8]
            assert np.abs(shown - mean).max() < 2


def test_grey_values_are_shown_as_such(call, tmp_path):
    overrides = [*TINY, f"run.root={tmp_path}", "data=digits_grey", "trainer.max_epochs=1"]
    assert call("train", *overrides).code == 0
    folder = run_dir(compose(overrides))
    data = Run(compose(overrides)).data
    data.setup()
    found = arrays(folder / "reconstructions.npz")
    expected = 255 * data.splits["train"][:100].numpy().reshape(100, 1, 8, 8)
    assert np.abs(found["data"] - expected).max() <= 0.51
    assert len(np.unique(found["data"])) == 17


def test_a_table_of_vaes_is_drawn(run, tmp_path):
    """From the records and files of runs to the pictures of the page."""
    _, folder = run
    cfg = compose(
        [
            "artefact=vae_prior",
            "profile=smoke",
            "seeds=[0]",
            f"run_root={tmp_path}/runs",
            f"results_root={tmp_path}/results",
        ],
        "report",
    )
    spec = table_spec("vae_prior").of_profile("smoke")
    cells = plan_cells(cfg, spec)
    metrics = {
        c.metric: {
            "value": 7.0,
            "unit": c.unit or "nats",
            "kind": "score" if "active" in c.metric else "bound",
            "estimator": "one draw",
            "standard_error": None,
            "count": 40,
            "protocol": {"of": 8},
        }
        for c in spec.columns
    }
    for row in spec.rows:
        key = (row.name, spec.columns[0].name, 0)
        content = {
            "schema": 1,
            "experiment": row.experiment,
            "artefact": "vae_prior",
            "row": row.name,
            "data": spec.columns[0].data,
            "model": "vae_prior",
            "surjection": "none",
            "profile": "smoke",
            "seed": 0,
            "config_hash": cells[key].run.hash,
            "config": {"data": {"num_levels": 17}},
            "status": "complete",
            "metrics": metrics,
            "commit": "ab" * 20,
            "dirty": False,
        }
        home = write_json(cells[key].run.folder / "record.json", content).parent
        for name in ("images.npz", "reconstructions.npz", "latent.npz", "metrics.csv"):
            (home / name).write_bytes((folder / name).read_bytes())
    write_report(cfg, spec, cells)
    out = results_folder(cfg)
    # a count of latents follows no protocol of samples
    with open(out / "table.csv", newline="") as file:
        assert {float(line["ours"]) for line in csv.DictReader(file)} == {7.0}
    page = (out / "table.md").read_text()
    for name in ("published", "samples", "reconstructions", "latent", "learning_curves"):
        assert f"({name}.png)" in page and (out / f"{name}.png").stat().st_size > 5000
