"""`flowdata weigh`: a scored data set with its weights beside it, for trainers that read files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from fnmatch import fnmatch
from math import isnan
from pathlib import Path
from typing import Any

from flowdata._common.excerpts import FROM_0
from flowdata._common.notices import logger
from flowdata.cli.exit_codes import DONE
from flowdata.cli.options import add_temperature
from flowdata.cli.output import list_figures, print_result
from flowdata.cli.weighing import Weighing
from flowdata.report.markdown import count
from flowdata.scores import Scores
from flowdata.scores.matching import rows_identity
from flowdata.store.places import local_path
from flowdata.text.files.places import hub_id
from flowdata.text.files.writing import check_output
from flowdata.text.formats import Fields
from flowdata.text.weighted_rows import WeightedColumns, weigh_rows
from flowdata.weights import check_temperature

_NULL = "get null for a weight, which no trainer should meet (--missing drop leaves them out)"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("store", help="folder or URL with finished scores of `flowdata score`")
    add("--output", required=True, type=Path, metavar="FILE", help=".jsonl, .parquet, or a folder")
    add("--overwrite", action="store_true", help="replace what is at the output's place")
    add("--data", help="where the data is now (default: where it was scored)")
    add_temperature(parser, "of the weights")
    add(
        "--normalize",
        choices=("none", "mean"),
        default="none",
        help="mean makes the weights average 1 (default: %(default)s)",
    )
    add("--max-weight", type=float, help="cap the weights")
    add("--weight-column", default="weight", metavar="NAME", help="default: %(default)s")
    add("--loss", action="store_true", help="write the column loss, too")
    add(
        "--token-weights",
        action="store_true",
        help="write the column token_weights, too: a weight for each target token, in order, by "
        "the temperature alone",
    )
    add(
        "--message-weight",
        metavar="NAME",
        help="write the weight into the replies of chats, too: loss_weight, loss_scale",
    )
    add(
        "--keep-above",
        type=float,
        metavar="WEIGHT",
        help="write the column keep, too: whether the weight is at least so large",
    )
    add(
        "--missing",
        choices=("null", "drop"),
        default="null",
        help="rows without a loss get null for a weight, or are left out (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Write a scored data set with its weights, for trainers that read files."""
    check_temperature(options.temperature)
    if options.keep_above is not None and isnan(options.keep_above):
        raise ValueError("--keep-above should be a weight, it is nan")
    check_output(local_path(options.output, "--output"), overwrite=options.overwrite)
    scores = Scores.load(options.store)
    data = _data_of(scores, options.store)
    source = options.data or data["source"]
    _check_not_the_data(options.output, source)
    columns = WeightedColumns(
        temperature=options.temperature,
        normalize=options.normalize,
        max_weight=options.max_weight,
        name=options.weight_column,
        loss=options.loss,
        token_weights=options.token_weights,
        keep_above=options.keep_above,
        message_weight=options.message_weight,
    )
    weights = weigh_rows(scores, columns, Fields.of(data))
    names = ("split", "configuration", "revision", "encoding", "limit")
    where = {name: data[name] for name in names}
    weighing = Weighing(scores, weights, drop=options.missing == "drop")
    weighing.write(source, where, options.output)
    _say_what_lacks(weighing, drop=options.missing == "drop")
    figures = weighing.figures()
    if figures.get("keep") == 0:
        logger.warning(
            "--keep-above %g keeps no row: the mean weight is %.4g",
            options.keep_above,
            figures["mean_weight"],
        )
    print_result(
        options,
        {"output": str(options.output), **figures},
        f"{count(weighing.written, 'row')} written to {options.output}\n{list_figures(figures)}",
    )
    return DONE


def _data_of(scores: Scores, store: str) -> Mapping[str, Any]:
    """What the store tells of its rows.

    Raises:
        ValueError: nothing, or not which rows they were.
    """
    data = scores.metadata.get("details", {}).get("data")
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{store} names no data: it was not made by flowdata score. Of scores made in Python, "
            "scores.to_column(dataset) writes the weights into a data set"
        )
    if rows_identity(scores.metadata) is None:
        raise ValueError(
            f"{store} was made by an earlier version of flowdata, which did not note its rows' "
            "identity; the same flowdata score command notes it, and takes the losses as they are"
        )
    return data


def _check_not_the_data(output: Path, source: str) -> None:
    """Refuse to write over the data, or to where it would be read as more of the data."""
    if hub_id(source) is not None:
        return
    data, place = Path(source).expanduser().resolve(), output.resolve()
    if place == data or place in data.parents:  # a folder is replaced with all that is in it
        raise ValueError(f"--output {output} is the data itself; name another file")
    if data in place.parents or _is_named_by(data, place):
        raise ValueError(
            f"--output {output} would be read as part of the data, {source}; name another place"
        )


def _is_named_by(pattern: Path, place: Path) -> bool:
    """Whether a path is one of those that a pattern stands for, as in data/*.jsonl."""
    if place.match(str(pattern)):
        return True
    # `match` takes "**" for one folder, and it stands for any number of them.
    folder, is_deep, _ = str(pattern).partition("**")
    return bool(is_deep) and Path(folder) in place.parents and fnmatch(place.name, pattern.name)


def _say_what_lacks(weighing: Weighing, *, drop: bool) -> None:
    """Say how many rows have no weight, or are not there."""
    if weighing.without_loss:
        reason = weighing.first_reason.removeprefix("ValueError: ")  # a sentence without it
        reason = reason.removesuffix(f"; {FROM_0}")  # which is said at the end
        logger.warning(
            "%d of %d rows have no loss%s and %s; the first is row %d (%s)",
            weighing.without_loss,
            weighing.rows,
            f" ({reason})" if reason else "",
            "are left out" if drop else _NULL,
            weighing.first_without_loss,
            FROM_0,
        )
    if weighing.no_rows:
        logger.warning(
            "%d lines of the data are no rows and are left out; the first: %s",
            weighing.no_rows,
            weighing.first_no_row,
        )
