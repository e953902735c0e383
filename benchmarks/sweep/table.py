"""The sweep's rows in words: a line each for the terminal, and a table in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.sweep.architectures import KINDS
from benchmarks.sweep.verdicts import REFUSED, RIGHT, UNJUDGED, WRONG

Row = dict[str, Any]
_ORDER = (WRONG, RIGHT, REFUSED, UNJUDGED, "too slow", "not buildable")


def status(row: Row) -> str:
    """The one word for a row: its worse verdict of the two dtypes, or why there is none."""
    if not row["built"]:
        return "too slow" if row.get("too_slow") else "not buildable"
    verdicts = {row["float32"]["verdict"], row["bfloat16"]["verdict"]}
    return next(word for word in (WRONG, REFUSED, UNJUDGED, RIGHT) if word in verdicts)


def line(row: Row) -> str:
    """A row as it is printed."""
    cells = [row["why"]] if not row["built"] else [_cell(row["float32"]), _cell(row["bfloat16"])]
    return f"{row['kind']:24} {row['name']:28} {status(row):14} {' | '.join(cells)}"


def table(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """The rows as Markdown: counts on top, then a table for each kind."""
    counts = Counter(status(row) for row in rows)
    versions = machine["versions"]
    lines = [
        "# Every architecture of transformers against the truth",
        "",
        ", ".join(f"{counts[word]} {word}" for word in _ORDER if counts[word])
        + f"; {len(rows)} in all.",
        "",
        f"Made by `python -m benchmarks sweep` at commit {machine['commit']}, "
        f"{machine['processor']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}. Tiny random models; what is compared, and how far a score "
        "may be off, stands in `benchmarks/sweep/__init__.py`. Errors are the largest of the "
        "samples, in nats; in bfloat16 the plain forward's own in brackets.",
        "",
        "| kind | " + " | ".join(_ORDER) + " |",
        "| --- " * (len(_ORDER) + 1) + "|",
    ]
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    for kind, group in groups.items():
        numbers = Counter(status(row) for row in group)
        lines.append(f"| {kind} | " + " | ".join(str(numbers[word]) for word in _ORDER) + " |")
    for kind, group in groups.items():
        if group:
            lines += ["", f"## {kind}", "", "| architecture | float32 | bfloat16 |"]
            lines += ["| --- | --- | --- |"]
            lines += [_markdown(row) for row in sorted(group, key=lambda row: row["name"])]
    return "\n".join(lines) + "\n"


def _markdown(row: Row) -> str:
    if row["built"]:
        cells = [_cell(row["float32"]), _cell(row["bfloat16"])]
    else:
        cells = [f"{status(row)}: {row['why']}", ""]
    return f"| {' | '.join(_safe(cell) for cell in (row['name'], *cells))} |"


def _cell(part: Row) -> str:
    """A verdict with how and how far off, or with the first refusal."""
    if part["verdict"] == REFUSED:
        return f"refused: {next(iter(part['refusals'].values()))[:140]}"
    plain = part["plain_error"]
    error = f"{part['error']:.2g}" + ("" if plain is None else f" ({plain:.2g})")
    loss = "" if part["loss"] == "auto" else f", loss={part['loss']!r}"
    samples = f", samples {part['wrong']}" if part["verdict"] == WRONG else ""
    why = f", {part['why_no_plain_error'][:80]}" if part["why_no_plain_error"] else ""
    return f"{part['verdict']}, {part['how']}, {error}{loss}{samples}{why}"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
