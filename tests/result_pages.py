"""Results files and the pages that tell of them, as the tests of figures read them."""

import functools
import json
import re
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
GUIDES = BENCHMARKS.parent / "examples" / "guides"
CODE_OR_LINK = re.compile(r"`[^`]*`|\]\([^)]*\)")
FIGURE = re.compile(r"(?<![\w.,^-])\d[\d.,]*(?![\w^-])")


def text(path):
    """A page on one line, so that it does not matter where its lines break."""
    return " ".join(path.read_text("utf-8").split())


def tables(path):
    """A page's tables, in order, each as the list of its rows' cells; the first row names them."""
    all_tables = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("|"):
            all_tables.append([])
        elif not set(line) <= set("|-: "):
            all_tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table for table in all_tables if table]


@functools.cache
def runs(name):
    """The runs that benchmarks/results/NAME.json keeps, the oldest first."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def run(name, *marks):
    """The one run of a file whose command and processor hold all marks."""
    (only,) = [
        run
        for run in runs(name)
        if all(mark in run["command"] + run["machine"]["processor"] for mark in marks)
    ]
    return only


def check_section(page, title, fragments, sizes=()):
    """Check that a section of a page has all fragments once, and no other figure but some sizes.

    A fragment is text with places for figures, and the figures; … stands for any words between.
    """
    rest = re.search(rf"# {re.escape(title)} (.*?)(?= ## |$)", text(page))[1]
    for fragment, values in fragments:
        written = re.sub(r"(?<=\d)%", " %", fragment.format(*values)).replace("e-0", "e-")
        pattern = "(.*?)".join(map(re.escape, written.split("…")))
        places = list(re.finditer(pattern, rest))
        assert len(places) == 1, f"not there once, as the results have it: {written}"
        rest = " ".join([rest[: places[0].start()], *places[0].groups(), rest[places[0].end() :]])
    for size in sizes:
        rest = rest.replace(size, "")
    assert FIGURE.findall(CODE_OR_LINK.sub("", rest)) == [], "figures that no results file holds"
