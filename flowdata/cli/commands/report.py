"""`flowdata report`: a store's figures, pictures and samples, for a reader."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowdata.cli.exit_codes import DONE
from flowdata.cli.growing import REPORT
from flowdata.cli.options import add_temperature
from flowdata.cli.output import list_figures, print_result
from flowdata.drift.comparing import compare
from flowdata.report.markdown import count
from flowdata.report.oddities import reasons_in
from flowdata.report.report import write_report
from flowdata.scores import Scores
from flowdata.store.places import local_path
from flowdata.text.row_texts import read_rows_of, row_targets, row_texts


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("store", help="folder or URL with finished scores")
    parser.add_argument(
        "--after",
        metavar="STORE",
        help="scores of the same samples by the tuned model: report what it learned and forgot",
    )
    parser.add_argument("--output", help="folder for the report (default: STORE/report)")
    add_temperature(parser, "of the weights")
    parser.add_argument(
        "--top", type=int, default=10, help="samples shown at either end (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Write a store's report: a verdict, pictures, what is odd, and a table of all samples."""
    scores = Scores.load(options.store)
    folder = local_path(options.output or f"{options.store}/{REPORT}", "--output")
    if options.after is not None:
        return _compare(options, scores, folder)
    rows = read_rows_of(scores)
    targets = row_targets(scores, rows)
    report = write_report(
        scores,
        folder,
        temperature=options.temperature,
        samples=row_texts(scores, rows),
        top=options.top,
        words=None if targets is None else targets.words,
        is_cut=None if targets is None else targets.is_cut,
    )
    parts = [report.verdict.plain_text(), f"{report.page}\n{report.picture}"]
    if skipped := scores.metadata.get("skipped"):
        rows = count(len(skipped), "row")
        parts.insert(0, f"{rows} could not be read: {reasons_in(scores.metadata)}")
    print_result(
        options,
        {
            **report.summary,
            "verdict": report.verdict.title,
            "advice": report.verdict.text,
            "page": str(report.page),
            "picture": str(report.picture),
        },
        "\n".join(parts),
    )
    return DONE


def _compare(options: argparse.Namespace, before: Scores, folder: Path) -> int:
    """Write what a tuned model learned and forgot of the samples."""
    if options.temperature != "median":
        raise ValueError("--temperature says how losses are weighed; it has no use with --after")
    comparison = compare(before, Scores.load(options.after))
    samples = row_texts(before, read_rows_of(before))
    page = comparison.write(folder, samples=samples, top=options.top)
    figures = comparison.summary()
    facts = {
        **figures,
        "most_learned": comparison.learned(options.top),
        "most_forgotten": comparison.forgotten(options.top),
        "page": str(page),
    }
    print_result(options, facts, f"{list_figures(figures)}\n{page}")
    return DONE
