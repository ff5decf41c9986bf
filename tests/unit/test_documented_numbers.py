"""Numbers in README.md and docs/*.md are those of the committed results.

Tables that repeat results are written by docs/write_tables.py. The rule for the rest: a number of
two or more decimals, or "a ± b", stands in the file under results/, experiments/ or tests/fixtures/
that its sentence links. A sentence without such a link has those of the nearest one before it in
its section. The number is what the file's number rounds to.

A table.md counts without its notes, and with its records: their metrics, standard errors and
millions of parameters. Of a table.yaml its numeric values count. A number after "=" is the value of
the arithmetic before it, whose operands need a source. Code, formulas and arXiv numbers are left
out. Times and memory are no exception: they are those of results/bench.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import write_tables
import yaml

NUMBER = r"(?<![\w.,])[−+-]?\d[\d,]*\.\d+(?!\w|\.\d)"
PAIR = rf"({NUMBER}) ± (\d[\d,]*\.\d+)"
ARITHMETIC = rf"((?:[\d.,·/+−() ]|\blog\b)+) = ({NUMBER})"
LINK = r"(?<!!)\[[^\]]*\]\(([^)#\s]+)[^)]*\)"
SOURCE = r"(\.\./)?(results|experiments|tests/fixtures)/"
NOT_PROSE = (
    r"(?s)^```.*?^```$|<!--.*?-->|\$[^$\n]+\$|`[^`]*`"
    r"|!\[[^\]]*\]\([^)]*\)|https?://\S+|doi \S+|\b(?:arXiv )?\d{4}\.\d{4,5}\b"
)
START = r"\n\s*\n|\n(?=\s*[*\-|#] ?)|(?<=[.!?])(?:\*\*|\))?\s+(?=[A-Z*(\[])"


class Numbers:
    """The numbers of sources, and their pairs "a ± b"."""

    def __init__(self) -> None:
        self.singles: set[float] = set()
        self.pairs: set[tuple[float, float]] = set()

    def add_text(self, text: str) -> None:
        self.singles |= {value(n) for n in re.findall(NUMBER, text)}
        self.pairs |= {(value(a), value(b)) for a, b in re.findall(PAIR, text)}
        self.singles |= {error for _, error in self.pairs}

    def add_record(self, record: dict) -> None:
        for metric in record["metrics"].values():
            self.pairs.add((metric["value"], metric.get("standard_error", math.nan)))
        self.singles |= {number for pair in self.pairs for number in pair}
        self.singles.add(record["parameters"] / 1e6)

    def add_values(self, content: object) -> None:
        if isinstance(content, dict | list):
            for item in content.values() if isinstance(content, dict) else content:
                self.add_values(item)
        elif isinstance(content, float):
            self.singles.add(content)


@cache
def numbers_of(path: Path) -> Numbers:
    """The numbers of a linked file."""
    found = Numbers()
    text = path.read_text("utf-8")
    if path.suffix == ".yaml":
        found.add_values(yaml.safe_load(text))
        return found
    found.add_text(text.partition("\n## Notes\n")[0])
    if path.name == "table.md":
        for record in path.parent.glob("records/*.json"):
            found.add_record(json.loads(record.read_text("utf-8")))
    return found


def value(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def rounds(number: float, text: str) -> bool:
    """Whether a number rounds to the decimals of a text."""
    decimals = len(text.partition(".")[2])
    return abs(number - value(text)) <= 0.5 * 10**-decimals + 1e-9


def computed(expression: str) -> float:
    """The value of arithmetic such as "2 log 28"; NaN for what is none."""
    code = expression.replace(",", "").replace("·", "*").replace("−", "-").strip()
    code = re.sub(r"log (\d+)", r"log(\1)", code)
    code = re.sub(r"(?<=\d) (?=log)", "*", code)
    try:
        return float(eval(code, {"__builtins__": {}, "log": math.log}))
    except (SyntaxError, TypeError):
        return math.nan


def sentences(page: str) -> Iterator[tuple[str, list[str]]]:
    """Each sentence, list item or line of a table, with the targets of the links that it has."""
    text = re.sub(NOT_PROSE, " ", write_tables.BLOCK.sub("", page), flags=re.M)
    links: list[str] = []
    for sentence in re.split(START, text):
        if sentence.startswith("#"):
            links = []
        own = [target for target in re.findall(LINK, sentence) if re.match(SOURCE, target)]
        links = own or links
        yield " ".join(re.sub(LINK, " ", sentence).split()), links


def faults(page: str, folder: Path) -> list[str]:
    """The numbers of a page in `folder` that their sources do not have, with the sentences."""
    found = []
    for sentence, links in sentences(page):
        sources = [numbers_of((folder / link).resolve()) for link in links]
        singles = {number for source in sources for number in source.singles}
        pairs = {pair for source in sources for pair in source.pairs}
        sums = [m for m in re.finditer(ARITHMETIC, sentence) if rounds(computed(m[1]), m[2])]
        known = {m.start(2) for m in sums}
        for m in re.finditer(PAIR, sentence):
            known |= {m.start(1), m.start(2)}
            if not any(rounds(a, m[1]) and rounds(b, m[2]) for a, b in pairs):
                found.append(f"{m[0]}: {sentence}")
        for m in re.finditer(NUMBER, sentence):
            loose = m.start() not in known and re.search(r"\.\d\d", m[0])
            if loose and not any(rounds(number, m[0]) for number in singles):
                found.append(f"{m[0]}: {sentence}")
    return found


@pytest.mark.parametrize("page", write_tables.PAGES, ids=lambda page: page.name)
def test_every_number_of_a_page_has_its_source(page):
    found = faults(page.read_text("utf-8"), page.parent)
    assert not found, "\n".join(found)


def test_every_block_is_what_the_script_writes():
    texts = {page.name: page.read_text("utf-8") for page in write_tables.PAGES}
    stale = [name for name, text in texts.items() if write_tables.filled(text) != text]
    assert not stale, "make docs"


TABLE = """# A title of 9.99

| | bound |
| --- | ---: |
| one | 1.23 ± 0.04 (1.30) |
| two | -2.50 ± 0.06 |

| | other |
| --- | ---: |
| one | 7.77 |

## Notes

- Typed: 6.66.
"""
RECORD = {"metrics": {"test/elbo_nats": {"value": 3.14159, "standard_error": 0.027}}}
YAML = "published: [{value: 5.55, source: an, note: 6.66}]\nnotes: [typed 4.44]\n"


@pytest.fixture
def folder(tmp_path):
    """A root with one table, its record, and the specification of another."""
    for name, text in {
        "results/short/mine/table.md": TABLE,
        "results/short/mine/records/one-seed0.json": json.dumps({**RECORD, "parameters": 441_000}),
        "experiments/other/table.yaml": YAML,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


LINKED = "See [it](results/short/mine/table.md). "


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (LINKED + "It is 1.23 ± 0.04 (1.30), and −2.5 ± 0.06.", []),
        (LINKED + "It is 1.24.", ["1.24"]),
        (LINKED + "It is 2.50.", ["2.50"]),  # the sign counts
        (LINKED + "It is 1.23 ± 0.06.", ["1.23 ± 0.06"]),  # of two rows
        (LINKED + "It is 3.142 ± 0.03 with 0.44 million parameters.", []),  # of the record
        (LINKED + "It is 3.141.", ["3.141"]),  # cut, not rounded
        (LINKED + "It is 6.66.", ["6.66"]),  # the notes of a table are typed
        (LINKED + "\n\n| a | b |\n| --- | --- |\n| c | 1.24 |", ["1.24"]),  # a table typed by hand
        ("It is 1.23.", ["1.23"]),  # no source
        ("It is 1.23. " + LINKED, ["1.23"]),  # the source comes later
        (LINKED + "\n\n## Next\n\nIt is 1.23.", ["1.23"]),  # of another section
        ("* " + LINKED + "\n* [Other](experiments/other/table.yaml): 5.55, not 1.23.", ["1.23"]),
        ("[Other](experiments/other/table.yaml): 4.44.", ["4.44"]),  # typed in its notes
        ("2 · 3 + 1 = 7.00 and 2 log 28 = 6.664.", []),
        ("2 · 3 + 1 = 7.01.", ["7.01"]),
        (LINKED + "(1.23 + 1.30) / 2 = 1.265, (1.24 + 1.30) / 2 = 1.27.", ["1.24"]),
        ("`1.24`, arXiv 2007.02731, $1.24$, https://a.b/1.24\n\n```\n1.24\n```", []),
    ],
)
def test_a_wrong_number_is_found(text, wrong, folder):
    assert [fault.partition(":")[0] for fault in faults(text, folder)] == wrong


def test_a_block_holds_the_first_table_of_its_file(folder):
    start, end = "Before.\n<!-- results/short/mine/table.md -->\n", "<!-- end -->\nIt is 1.24.\n"
    page = write_tables.filled(f"{start}| stale | 1.24 |\n{end}", folder)
    assert page == start + "".join(TABLE.splitlines(keepends=True)[2:6]) + end
    assert write_tables.filled(page, folder) == page
    assert [fault[:4] for fault in faults(page, folder)] == ["1.24"]  # a block is no source
    with pytest.raises(ValueError, match="expected a Markdown table"):
        write_tables.first_table("none\n")
