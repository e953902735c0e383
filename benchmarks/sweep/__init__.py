"""Every architecture of transformers against the truth: python -m benchmarks sweep [options].

For each architecture that an auto class of transformers names, a tiny random model is made from its
configuration, and a dozen samples of unlike lengths. The truth is each sample alone, collated
alone, through the model's own forward in float32. `LossScorer(model, "auto")` scores the samples
in float32 and in bfloat16. A float32 score may be off by 1e-3 nats (above a loss of 1 nat, by that
share), a bfloat16 score by twice the plain bfloat16 forward's own largest error plus 1e-3 nats.

A row is appended to DIR/sweep.jsonl as soon as it is made, and a command that is started again
goes on where it stopped. The table is rendered from the rows into DIR/sweep.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows as benchmark_rows
from benchmarks.sweep.architectures import KINDS, architectures
from benchmarks.sweep.processes import rows_of
from benchmarks.sweep.row import make_row
from benchmarks.sweep.table import line, table

_SECONDS = 90.0  # that an architecture may take


def main(argv: list[str]) -> None:
    """Make the rows that are missing, keep each as it comes, and render the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures alone")
    parser.add_argument("--output", type=Path, default=benchmark_rows.RESULTS, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for one architecture")
    parser.add_argument("--again", action="store_true", help="make the rows that are there anew")
    options = parser.parse_args(argv)
    _prepare()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "sweep.jsonl"
    tasks = [
        (kind, name)
        for kind in options.kinds
        for name in architectures(KINDS[kind])
        if not options.only or name in options.only
    ]
    complete = read_rows(path)
    if not options.again:
        tasks = [task for task in tasks if task not in complete]
    for row in rows_of(tasks, make_row, limit=options.seconds, jobs=options.jobs):
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)
    text = table(list(read_rows(path).values()), benchmark_rows.machine())
    (options.output / "sweep.md").write_text(text)
    print(f"{options.output / 'sweep.md'}: {text.splitlines()[2]}")


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a file by kind and name, the last of each; a line that is torn is left out."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(text)
        except json.JSONDecodeError:  # the command was killed as it wrote
            continue
        rows[row["kind"], row["name"]] = row
    return rows


def _prepare() -> None:
    """What the forked processes share: imports, one thread each, no words of transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import transformers  # noqa: F401  (once, before the forks)

    logging.getLogger("flowdata").propagate = False
    torch.set_num_threads(1)
