"""Markdown: the lines of a table, and figures as they stand in its cells."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from math import isfinite
from statistics import mean, stdev

DIVERGED = "diverged"  # in the place of figures that are made of a value that is no number


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, words: Container[str] = ()
) -> list[str]:
    """Return the lines of a table.

    Args:
        headings: of the columns.
        rows: the cells of each.
        words: headings of the columns that hold words, as the first one does; the others hold
            numbers, which stand at the right.

    Example:
        >>> print("\\n".join(table(["method", "loss"], [["FLOW", "1.5"]])))
        | method | loss |
        | --- | ---: |
        | FLOW | 1.5 |
    """
    rules = ["---", *("---" if name in words else "---:" for name in headings[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rules, *rows)]


def spread(values: Sequence[float], places: int) -> str:
    """Return mean ± standard deviation; a single value has no deviation.

    Example:
        >>> spread([1.0, 3.0], 1), spread([1.0, float("nan")], 1)
        ('2.0 ± 1.4', 'diverged')
    """
    if not all(map(isfinite, values)):
        return DIVERGED
    deviation = f" ± {stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{mean(values):.{places}f}{deviation}"


def count(number: int, what: str) -> str:
    """Return a number of things, in words.

    Example:
        >>> count(1, "sample"), count(2000, "sample")
        ('1 sample', '2,000 samples')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"
