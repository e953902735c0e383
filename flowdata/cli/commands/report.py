"""`flowdata report`: a store's figures, pictures and samples, for a reader."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowdata._common.notices import logger
from flowdata._common.unreadable import Unreadable
from flowdata.cli.exit_codes import DONE, USER_ERRORS
from flowdata.cli.growing import REPORT
from flowdata.cli.options import add_temperature
from flowdata.cli.output import list_figures, print_result
from flowdata.drift.comparing import compare
from flowdata.report.report import write_report
from flowdata.scores import Scores
from flowdata.scores.matching import identity_of_rows, rows_difference, rows_identity
from flowdata.text.read import read_rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("store", help="folder with finished scores")
    parser.add_argument(
        "--after",
        metavar="STORE",
        help="scores of the same samples by the tuned model: report what it learned and forgot",
    )
    parser.add_argument("--output", help="folder for the report (default: STORE/report)")
    add_temperature(parser, "number or rule")
    parser.add_argument("--top", type=int, default=10, help="samples shown at either end")


def run(options: argparse.Namespace) -> int:
    """Write a store's report: summary, histogram, easiest and hardest samples."""
    scores = Scores.load(options.store)
    folder = Path(options.output or Path(options.store) / REPORT)
    if options.after is not None:
        return _compare(options, scores, folder)
    report = write_report(
        scores,
        folder,
        temperature=options.temperature,
        samples=_sample_texts(scores),
        top=options.top,
    )
    print_result(
        options,
        {**report.summary, "page": str(report.page), "picture": str(report.picture)},
        f"{list_figures(report.summary)}\n{report.page}\n{report.picture}",
    )
    return DONE


def _compare(options: argparse.Namespace, before: Scores, folder: Path) -> int:
    """Write what a tuned model learned and forgot of the samples."""
    if options.temperature != "median":
        raise ValueError("--temperature says how losses are weighed; it has no use with --after")
    comparison = compare(before, Scores.load(options.after))
    page = comparison.write(folder, samples=_sample_texts(before), top=options.top)
    figures = comparison.summary()
    facts = {
        **figures,
        "most_learned": comparison.learned(options.top),
        "most_forgotten": comparison.forgotten(options.top),
        "page": str(page),
    }
    print_result(options, facts, f"{list_figures(figures)}\n{page}")
    return DONE


def _sample_texts(scores: Scores) -> Callable[[int], str] | None:
    """The text of sample i; None where the store doesn't name the data or the data is gone."""
    data = scores.metadata.get("details", {}).get("data")
    if not isinstance(data, dict):  # not scored by `flowdata score`
        return None
    try:
        where: Any = {name: data.get(name) for name in ("split", "configuration", "revision")}
        rows = read_rows(
            data["source"],
            limit=data.get("rows", len(scores)),
            encoding=data.get("encoding", "utf-8"),
            on_error="skip",
            **where,
        )
    except USER_ERRORS as error:
        logger.warning("samples are shown without their text: %s", error)
        return None
    if data.get("rows", len(scores)) != len(scores):
        logger.warning("samples are shown without their text: rows have several samples each")
        return None
    identity = rows_identity(scores.metadata)
    difference = identity and rows_difference(identity, identity_of_rows(rows, identity))
    if difference:
        logger.warning(
            "samples are shown without their text: %s is not what was scored: %s",
            data["source"],
            difference,
        )
        return None
    names = ("system", "history", "messages", "prompt", "input", "completion")
    fields = [data[name] for name in names if data.get(name)]

    def text(index: int) -> str:
        row = rows[index]
        if isinstance(row, Unreadable):
            return row.reason
        return "\n".join(
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in (row[field] for field in fields if row.get(field))
        )

    return text
