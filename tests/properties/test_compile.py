"""Every layer of the catalogue compiles as one graph, both ways; what does not is found."""

import pytest
import torch

from surflow.nets import MLP
from surflow.proofs import CHECKS, compiles, double_precision, example_of, prove
from surflow.transforms import (
    AbsInference,
    Affine,
    Example,
    Inverse,
    Sequential,
    Tanh,
    catalogue,
)

LAYERS = {cls.__name__: cls for cls in catalogue()}


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_each_way(name, double):
    proof = compiles(example_of(LAYERS[name]))
    assert proof.ok, proof.message


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_each_way_with_inductor(name, double):
    from surflow.training.module import can_compile

    if not can_compile():
        pytest.skip("no C++ compiler")
    proof = compiles(example_of(LAYERS[name]), backend="inductor")
    assert proof.ok, proof.message


def test_what_does_not_compile_says_why():
    for cls in LAYERS.values():
        assert cls.__dict__.get("compiles", True) is not False or cls.why_not_compiled.strip(), cls


# The check itself -------------------------------------------------------------------------------


class Prints(Affine):
    def _forward(self, x, context):
        print("forward", end="")
        return super()._forward(x, context)


class ReadsAValue(Affine):
    def _inverse(self, z, context):
        return super()._inverse(z, context) + 0.0 * z.max().item()


class Branches(Affine):
    def _forward(self, x, context):
        if x.sum() > 1e9:
            x = x + 1
        return super()._forward(x, context)


class BreaksWhenScoringAPair(Affine):
    def _inverse_and_ldj(self, z, context):
        z.tolist()
        return super()._inverse_and_ldj(z, context)


class OtherWhenCompiled(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, ldj + 1e-3 if torch.compiler.is_compiling() else ldj


class OtherGradientWhenCompiled(Affine):
    def _forward(self, x, context):
        z, ldj = super()._forward(x, context)
        return z, ldj.detach() if torch.compiler.is_compiling() else ldj


class NoNumberWhenCompiled(AbsInference):
    def _draw(self, z, context):
        x, positive, logits = super()._draw(z, context)
        return x / 0 if torch.compiler.is_compiling() else x, positive, logits


class Declared(Prints):
    compiles = False
    why_not_compiled = "it prints"


class DeclaredWithoutReason(Affine):
    compiles = False
    why_not_compiled = " "


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Prints, r"forward: graph break at test_compile.py:\d+ in _forward, `print\("),
        (ReadsAValue, r"inverse: graph break at test_compile.py:\d+ in _inverse, .*reads a value"),
        (Branches, r"forward: graph break at .* in _forward, `if x.sum\(\) > 1e9:`: Data-dep"),
        (BreaksWhenScoringAPair, r"inverse_and_ldj: graph break at .*`z.tolist\(\)`"),
        (OtherWhenCompiled, r"forward: ldj changes by 0.0\d+ when compiled"),
        (OtherGradientWhenCompiled, r"gradient of .* changes by|gradient of .* is missing"),
        (DeclaredWithoutReason, r"declares compiles = False without saying why"),
    ],
)
def test_a_break_is_found(cls, said, double, capsys):
    import re

    proof = compiles(example_of(cls))
    assert not proof.ok
    assert re.search(said, proof.message), proof.message
    assert "\n" not in proof.message


def test_a_stochastic_direction_must_be_finite(double):
    proof = compiles(example_of(NoNumberWhenCompiled))
    assert not proof.ok and "inverse, compiled: the x is not finite" in proof.message


def test_a_declared_layer_is_left_alone(double, capsys):
    proof = compiles(example_of(Declared))
    assert proof.ok and not proof.applies
    assert proof.message == "declared as not compiled: it prints"
    assert capsys.readouterr().out == ""


def test_a_composite_compiles_where_its_parts_do():
    declared, other = Declared(2), Tanh()
    assert Sequential([other]).compiles and Inverse(other).compiles
    assert not Sequential([other, declared]).compiles and not Inverse(declared).compiles
    assert Sequential([other, declared]).why_not_compiled == "Declared: it prints"
    assert Inverse(declared).why_not_compiled == "it prints"


def test_prove_compiles_only_where_a_backend_is_named():
    assert "compiles" not in CHECKS
    example = example_of(Tanh)
    with double_precision():
        assert [p.check for p in prove(example, n=2000)] == list(CHECKS)
        proofs = prove(example, n=2000, backend="aot_eager")
    assert [p.check for p in proofs] == [*CHECKS, "compiles"]
    assert proofs[-1].ok and proofs[-1].applies


def test_a_context_and_an_image_compile(double):
    from surflow.distributions import StandardNormal

    normal = StandardNormal((3,))
    example = Example(
        Sequential([Affine((3,), net=MLP(2, 6, [8])), AbsInference((3,))]),
        normal.sample_and_log_prob,
        normal,
        context=lambda n: torch.randn(n, 2),
        latent=lambda n: normal.sample(n).abs(),
    )
    assert compiles(example).ok
