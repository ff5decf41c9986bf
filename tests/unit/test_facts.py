"""What layers say of themselves: the image of a box, constraints of latents, nested layers."""

import math

import pytest

from surflow.models.coupling_flow import support_of
from surflow.transforms import (
    AbsGenerative,
    AbsInference,
    Affine,
    AffineCoupling,
    AffineMap,
    Coupling,
    DihedralFold,
    Inverse,
    LogisticMixtureMap,
    OrderedToReal,
    Permute,
    Sequential,
    Sigmoid,
    SortInference,
    Squeeze,
    Unsqueeze,
)

INF = math.inf
LINE = ([-INF, -INF], [INF, INF])


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (AbsInference(2), ([0.0, 0.0], [3.0, 2.0])),
        (AbsInference(2, element=1), ([-3.0, 0.0], [1.0, 2.0])),
        (DihedralFold(), ([0.0, 0.0], [INF, INF])),
        (SortInference(2), LINE),
        (Affine(2), LINE),
        (Sequential([]), ([-3.0, -1.0], [1.0, 2.0])),
        (Sequential([AbsInference(2), AbsGenerative(2)]), ([-3.0, -2.0], [3.0, 2.0])),
        (Sequential([AbsInference(2), Affine(2)]), LINE),
    ],
)
def test_the_image_of_a_box(layer, expected):
    assert layer.image([-3.0, -1.0], [1.0, 2.0]) == expected


def test_supports_after_a_surjection():
    whole = [-INF, -INF], [INF, INF]
    for layer in (AbsInference(2), DihedralFold()):
        with pytest.raises(ValueError, match=rf"real_line or unit_box after {layer.label}, .*>= 0"):
            support_of(2, "unmapped", layer, *whole)
        assert len(support_of(2, "real_line", layer, *whole)[0]) == 2
    for support in ("unmapped", "unit_box"):
        with pytest.raises(ValueError, match=r"expected real_line after SortInference, .*sorted"):
            support_of(2, support, SortInference(2), *whole)
    (_, onto_space), _ = support_of(2, "real_line", SortInference(2), *whole)
    assert isinstance(onto_space, OrderedToReal)
    with pytest.raises(ValueError, match=r"AbsGenerative is for data >= 0, .* reach down to -1"):
        support_of(2, "real_line", AbsGenerative(2), [0.0, -1.0], [1.0, 1.0])
    assert support_of(2, "unmapped", None, [0.0, 0.0], [1.0, 1.0])[0] == []


def test_nested_layers_are_unfolded_in_the_order_in_which_they_run():
    a, b, c, d = Permute([1, 0]), Affine(2), Unsqueeze(), Sigmoid()
    nested = Sequential([a, Inverse(Sequential([b, Inverse(c)])), Sequential([d])])
    assert list(nested.unfold()) == [(a, False), (c, False), (b, True), (d, False)]
    assert list(nested.unfold(turned=True)) == [(d, True), (b, False), (c, True), (a, True)]
    names = [name for name, _ in nested.layers()]
    assert names == ["0.Permute", "1.Inverse(Sequential)", "2.0.Sigmoid"]
    assert [name for name, _ in a.layers("3.")] == ["3.Permute"]


def test_what_a_backward_pass_can_recompute():
    assert AffineCoupling(None).reversible and Squeeze().reversible and Unsqueeze().reversible
    assert Coupling(AffineMap(), None).reversible and Inverse(Affine(2)).reversible
    assert not Coupling(LogisticMixtureMap(2), None).reversible
    assert not (Sigmoid().reversible or Inverse(Sigmoid()).reversible)
