"""docs/layers.md is what the docstrings say; and the generator reads them as a person would."""

import re
import textwrap

import pytest
import write_layers as layers

from surflow.errors import UserError
from surflow.transforms import Affine, ElementwiseMap, Transform, catalogue

DOC = textwrap.dedent(
    r"""
    A layer of `no` use, with p(a|b).

    .. math::
        z = |x|^2, \quad
        \operatorname{tr} \|A\| = 0

    Exact, as :class:`surflow.transforms.Affine` is.

    Args:
        shape: of x; Cost: is no paragraph here.

    Cost: O(D) forward,
    ``O(D**2)`` inverse.
    Source: Somebody 2020, arXiv 2007.02731, Sec. 3; someone 2015, arXiv math/0309136.

    >>> import torch
    >>> from surflow.transforms import (
    ...     Affine,
    ... )
    >>> layer = Affine(  # not here
    ...     [3, 2],
    ... )
    >>> layer.kind
    'bijective'
    """
).strip()


@pytest.fixture(scope="module")
def page():
    return layers.page()


def cells(row: str) -> list[str]:
    """The cells of a table's row, split where GitHub splits it."""
    assert row.startswith("| ") and row.endswith(" |"), row
    return re.split(r"(?<!\\) \| |^\| | \|$", row)[1:-1]


def test_the_page_is_fresh(page):
    committed = layers.PAGE.read_text(encoding="utf-8")
    assert committed == page, "docs/layers.md is stale: make docs"


def test_every_layer_has_its_row(page):
    import surflow.transforms as transforms

    names = re.findall(r"^\| \*\*(\w+)\*\*", page, re.M)
    maps = {
        n for n in transforms.__all__ if isinstance(c := getattr(transforms, n), type)
        and issubclass(c, ElementwiseMap) and c is not ElementwiseMap
    }  # fmt: skip
    assert sorted(names) == sorted({c.__name__ for c in catalogue()} | maps)


def test_every_row_is_whole(page):
    rows = [r for r in page.splitlines() if r.startswith("| **")]
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == len(layers.COLUMNS) + 1, row
        name, formula, kind, number, cost, source, use = cells(row)
        assert re.fullmatch(r"\*\*\w+\*\*<br>.+\.", name), row
        assert re.fullmatch(r"\$`[^`|]+`\$", formula), row
        inner = formula[2:-2].replace(r"\{", "").replace(r"\}", "")
        assert inner.count("{") == inner.count("}"), row
        assert inner.count(r"\begin") == inner.count(r"\end"), row
        assert cost.endswith(".") and "Source" not in cost, row
        assert len(source) > 10, row
        assert re.fullmatch(r"`[^`]+`", use), row
        assert (kind, number) in {
            ("bijective", "exact"),
            ("surjective (inference)", "exact"),
            ("surjective (generative)", "bound"),
            ("stochastic", "bound"),
            ("monotone map", "exact"),
            ("that of its parts", "that of its parts"),
        }, row


def test_it_renders_as_tables(page):
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(page)
    bodies = re.findall(r"<tbody>(.*?)</tbody>", html, re.S)
    assert len(bodies) == len(layers.FAMILIES)
    assert sum(b.count("<tr>") for b in bodies) == page.count("| **")
    for row in re.findall(r"<tr>(.*?)</tr>", "".join(bodies), re.S):
        found = re.findall(r"<td>(.*?)</td>", row, re.S)
        assert len(found) == len(layers.COLUMNS)
        assert all(found), row
        assert re.fullmatch(r"\$<code>[^<]+</code>\$", found[1]), row  # nothing in it was Markdown
        assert re.fullmatch(r"<code>[^<]+</code>", found[-1]), row


def test_kinds_are_those_of_the_examples(page):
    for name, kind, number in (
        ("AbsInference", "surjective (inference)", "exact"),
        ("AbsGenerative", "surjective (generative)", "bound"),
        ("VAE", "stochastic", "bound"),
        ("Logit", "bijective", "exact"),
    ):
        row = next(r for r in page.splitlines() if r.startswith(f"| **{name}**"))
        assert cells(row)[2:4] == [kind, number]


def test_what_is_read_from_a_docstring():
    assert layers.missing_parts(DOC) == []
    assert layers.formula_of(DOC) == r"z = |x|^2, \quad \operatorname{tr} \|A\| = 0"
    assert layers.paragraph_of(DOC, "Cost") == "O(D) forward, ``O(D**2)`` inverse."
    assert layers.paragraph_of(DOC, "Source").startswith("Somebody 2020, arXiv 2007.02731")
    assert layers.paragraph_of(DOC, "Source").endswith("math/0309136.")
    assert layers.use_of(DOC) == "layer = Affine([3, 2])"


def test_a_formula_on_the_line_of_its_directive():
    one = ".. math:: z = x,\n          ldj = 0\n\nProse."
    assert layers.formula_of(one) == "z = x, ldj = 0"
    two = ".. math:: z = x\n\nProse.\n\n.. math:: no"
    assert layers.formula_of(two) == "z = x"


def test_what_markdown_would_take_for_its_own():
    assert layers.math_cell(r"|x| \|y\|") == r"$`\vert x\vert \Vert y\Vert`$"
    assert layers.math_cell(r"\operatorname{tr} A") == r"$`\mathrm{tr} A`$"
    assert layers.prose_cell("q(z|x) and a_1*b") == r"q(z\|x) and a\_1\*b"
    assert layers.prose_cell("see :class:`surflow.flow.Flow`, ``a|b``") == r"see `Flow`, `a\|b`"
    assert layers.prose_cell(":math:`|x|_1`") == r"$`\vert x\vert \_1`$".replace(r"\_", "_")
    linked = layers.prose_cell("X 2020, arXiv 2007.02731, Sec. 3")
    assert linked == "X 2020, [arXiv 2007.02731](https://arxiv.org/abs/2007.02731), Sec. 3"


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        (r"\.\. math::(.|\n)*?\n\n", ".. math::"),
        (r"\nCost:(.|\n)*?(?=\nSource)", "Cost:"),
        (r"Source:.*\n", "Source:"),
        (r">>> layer = (.|\n)*", "a doctest"),
    ],
)
def test_what_is_missing_is_named(drop, named):
    doc = re.sub(drop, "", DOC)
    assert layers.missing_parts(doc) == [named]

    class Undocumented(Affine):
        pass

    Undocumented.__doc__ = doc
    with pytest.raises(UserError, match=rf"Undocumented: its docstring lacks {re.escape(named)}$"):
        layers.entry_of(Undocumented)


def test_no_docstring_at_all():
    class Bare(Affine):
        pass

    Bare.__doc__ = None
    with pytest.raises(UserError, match=r"lacks a first line, \.\. math::, Cost:, Source:, a doct"):
        layers.entry_of(Bare)


def test_the_command_refuses_and_checks(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(layers, "PAGE", tmp_path / "layers.md")
    monkeypatch.setattr("sys.argv", ["layers"])
    monkeypatch.setattr(layers, "page", lambda: "| **A** |\n")
    layers.main()
    assert layers.PAGE.read_text() == "| **A** |\n"
    assert "docs/layers.md: 1 layers" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["layers", "--check"])
    for text, code in (("| **A** |\n", 0), ("| **B** |\n", 1)):
        monkeypatch.setattr(layers, "page", lambda text=text: text)
        with pytest.raises(SystemExit) as stop:
            layers.main()
        assert int(stop.value.code) == code
    assert layers.PAGE.read_text() == "| **A** |\n"

    def faulty():
        raise UserError("a.A: its docstring lacks Cost:\nb.B: its docstring lacks a doctest")

    monkeypatch.setattr(layers, "page", faulty)
    with pytest.raises(SystemExit) as stop:
        layers.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "surflow: error: a.A: its docstring lacks Cost:",
        "surflow: error: b.B: its docstring lacks a doctest",
    ]


def test_public_layers_are_imported_where_they_are_looked_for(monkeypatch):
    class Hidden(Affine):
        pass

    monkeypatch.setattr("surflow.transforms.catalogue", lambda: [Hidden])
    with pytest.raises(UserError, match=r"Hidden: is not in surflow\.transforms"):
        layers.layer_classes()
    assert issubclass(Hidden, Transform)
