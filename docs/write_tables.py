"""Write the tables of results that README.md and docs/*.md repeat.

    make docs

A block between ``<!-- results/.../table.md -->`` and ``<!-- end -->`` holds the first Markdown
table of that file.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- (results/\S+\.md) -->\n).*?(<!-- end -->)", re.S)


def first_table(text: str) -> str:
    """The first Markdown table of a text, with its last line break.

    Raises:
        ValueError: for a text without one.
    """
    found = re.search(r"(?:^\|.*\|\n)+", text, re.M)
    if found is None:
        raise ValueError("expected a Markdown table")
    return found[0]


def filled(text: str, root: Path = ROOT) -> str:
    """A page with every block as its file in `root` has it."""
    return BLOCK.sub(lambda m: f"{m[1]}{first_table((root / m[2]).read_text('utf-8'))}{m[3]}", text)


def main() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        page.write_text(filled(text), "utf-8")
        if BLOCK.search(text):
            print(f"{page.relative_to(ROOT)}: {len(BLOCK.findall(text))} tables")


if __name__ == "__main__":
    main()
