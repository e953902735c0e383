"""The guide's table of names, from those that the reader knows: python -m examples.site.formats."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flowdata.report.markdown import table
from flowdata.text.files.places import COMPRESSIONS, KINDS, kind_of
from flowdata.text.formats.find import (
    CHATS,
    CHOSEN,
    COMPANIONS,
    PAIRS,
    PREFERENCE_PROMPTS,
    TEXTS,
)

GUIDE = Path(__file__).parents[1] / "guides" / "files.md"
BEGIN, END = "<!-- by python -m examples.site.formats -->\n", "<!-- end -->\n"


def main() -> None:
    """Write the table into the guide."""
    GUIDE.write_text(with_table(GUIDE.read_text("utf-8")), "utf-8")


def with_table(page: str) -> str:
    """Return a page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{names()}\n\n{END}{rest.partition(END)[2]}"


def names() -> str:
    """Return the endings of files and the names of columns, as a Markdown table."""
    beside = [f"{_in_code([prompt])} with {_in_code(replies)}" for prompt, replies in PAIRS.items()]
    chosen = [f"{_in_code([good])} with {_in_code([bad])}" for good, bad in CHOSEN.items()]
    packed = [ending for ending in KINDS if kind_of(Path(f"rows{ending}{COMPRESSIONS[0]}"))]
    others = [ending for ending in KINDS if ending not in packed]
    endings = f"{_in_code(packed)}, each also with {_in_code(COMPRESSIONS)}; {_in_code(others)}"
    rows = [
        ["endings of files", endings],
        ["prompt and reply", "; ".join(beside)],
        ["chat", _in_code(CHATS)],
        ["chosen and rejected reply", "; ".join(chosen)],
        ["prompt of these", _in_code(PREFERENCE_PROMPTS)],
        ["plain text", _in_code(TEXTS)],
        *([f"{what}, beside these", _in_code(columns)] for what, columns in COMPANIONS.items()),
    ]
    return "\n".join(table(["what", "names"], rows, words=["names"]))


def _in_code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    main()
