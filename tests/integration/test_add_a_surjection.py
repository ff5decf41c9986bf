"""docs/add-a-surjection.md does what it says: its files and commands run, in an empty folder."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from pages import Page, run

from surflow.proofs import CHECKS, double_precision
from surflow.transforms import Example, Inverse

PAGE = Page("add-a-surjection.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder with the page's files in it."""
    return PAGE.write(tmp_path_factory.mktemp("own"))


@pytest.fixture
def layer(folder):
    """The page's class, imported from its file."""
    spec = importlib.util.spec_from_file_location("page_rotation_fold", folder / "rotation_fold.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RotationFold


def test_the_page_has_one_file_and_one_yaml():
    assert list(PAGE.files) == ["rotation_fold.py", "conf/surjection/rotation_fold.yaml"]
    assert {lang for lang, _ in PAGE.blocks} == {"math", "python", "bash", "yaml"}
    assert [lang for lang, _ in PAGE.commands] == ["bash", "python", "bash"]


def test_it_verifies(folder):
    language, body = PAGE.commands[0]
    done = run(language, body, folder)
    assert done.returncode == 0, done.stderr + done.stdout
    (row,) = (r for r in done.stdout.splitlines() if r.startswith("RotationFold "))
    assert "surjective (inference)" in row and " exact " in row and " yes " in row
    assert row.endswith("holds")


def test_the_mistake_that_the_page_names_is_found(folder):
    wrong = PAGE.files["rotation_fold.py"].replace(
        "return z, chosen + math.log(self.times)", "return z, chosen"
    )
    assert wrong != PAGE.files["rotation_fold.py"]
    (folder / "wrong.py").write_text(wrong)
    language, body = PAGE.commands[0]
    done = run(language, body.replace("rotation_fold.py", "wrong.py"), folder)
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"unit_mass: mass 0\.33\d+ ± [\d.]+, .*: not 1 within 4 standard errors", done.stdout
    )


def test_it_runs_in_python(folder):
    language, body = PAGE.commands[1]
    done = run(language, body, folder)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^0\.RotationFold +surjective \(inference\) +exact +\+0\.0000", done.stdout, re.M
    )


def test_it_trains_and_evaluates_from_the_yaml(folder):
    language, body = PAGE.commands[2]
    done = run(language, body, folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^0\.RotationFold +surjective \(inference\) +exact", done.stdout, re.M)
    nll = float(re.search(r"test/nll_nats = ([\d.]+)", done.stdout)[1])
    assert 2.83 < nll < 3.5
    (record,) = folder.glob("runs/**/record.json")
    assert '"surjection": "rotation_fold"' in record.read_text()
    # Hydra's other way to name the folder finds the same run
    again = run("bash", body.replace("--config-dir conf", "hydra.searchpath=[file://conf]"), folder)
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stdout


@pytest.mark.slow
def test_the_fold_comes_nearer_to_the_entropy_than_the_flow_without_it(folder):
    nll = {}
    for surjection in ("rotation_fold", "none"):
        done = run(
            "bash",
            "python -m surflow.cli.train --config-dir conf data=eight_gaussians "
            f"data.train_size=64000 surjection={surjection} trainer.max_epochs=4 "
            "compute.compile=false compute.threads=1 logger=csv run.pictures=false",
            folder,
        )
        assert done.returncode == 0, done.stderr
        nll[surjection] = float(re.search(r"test/nll_nats ([\d.]+)", done.stdout)[1])
    assert 2.83 < nll["rotation_fold"] < nll["none"] - 0.1


def test_its_doctest(folder):
    done = run("bash", "python -m doctest rotation_fold.py", folder)
    assert done.returncode == 0, done.stdout


# The layer itself -------------------------------------------------------------------------------


def test_the_determinant_is_n(layer):
    x = torch.randn(20, 2, dtype=torch.float64)
    for times in (2, 3, 8):
        fold = layer(times)
        for row in x:
            jacobian = torch.autograd.functional.jacobian(lambda r, f=fold: f(r[None])[0][0], row)
            assert torch.linalg.det(jacobian).item() == pytest.approx(times, rel=1e-9)
        assert torch.allclose(fold(x)[1], torch.zeros(20, dtype=torch.float64), atol=1e-12)


def test_every_rotated_copy_has_the_same_latent_and_sectors_are_drawn_evenly(layer):
    fold = layer(5)
    x = torch.tensor([[1.2, 0.4]], dtype=torch.float64)
    angles = 2 * math.pi * torch.arange(5, dtype=torch.float64) / 5
    copies = torch.stack([
        torch.stack([a.cos() * x[0, 0] - a.sin() * x[0, 1], a.sin() * x[0, 0] + a.cos() * x[0, 1]])
        for a in angles
    ])  # fmt: skip
    z = fold(copies)[0]
    assert torch.allclose(z, z[:1].expand(5, 2), atol=1e-12)
    drawn = fold.inverse(z[:1].expand(50_000, 2))
    nearest = torch.cdist(drawn, copies)
    assert nearest.min(1).values.max() < 1e-6
    counts = nearest.argmin(1).bincount(minlength=5) / 50_000
    assert (counts - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 50_000)


def test_the_origin(layer):
    x = torch.zeros(3, 2, requires_grad=True)
    z, ldj = layer(4)(x)
    assert torch.equal(z, torch.zeros(3, 2)) and torch.equal(ldj, torch.zeros(3))
    (gradient,) = torch.autograd.grad(z.sum() + ldj.sum(), x)
    assert bool(gradient.isfinite().all())
    assert torch.equal(layer(4).inverse(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_the_generative_twin(layer):
    from surflow.distributions import DiagonalNormal, StandardNormal

    with double_precision():
        folded = layer.example().transform
        wide = DiagonalNormal((2,), scale=1.3)
        twin = Example(Inverse(folded), wide.sample_and_log_prob, StandardNormal((2,)))
        proofs = [check(twin) for check in CHECKS.values()]
    assert [p.message for p in proofs if not p.ok] == []
    assert Inverse(layer(8)).lower_bound


def test_a_mistake_is_refused(layer):
    with pytest.raises(ValueError, match="RotationFold: expected times >= 2, got 1"):
        layer(1)
    with pytest.raises(ValueError, match=r"RotationFold.forward: expected shape \(batch, 2\)"):
        layer(2)(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"expected the net to give shape \(4, 3\), got \(4, 2\)"):
        layer(3, net=torch.nn.Linear(2, 2))(torch.zeros(4, 2))
