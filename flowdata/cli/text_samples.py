"""The text of a file, or of a hub data set, as samples for a model: options and reading."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flowdata._common.notices import logger, say
from flowdata._common.progress import progress_bar
from flowdata._common.unreadable import Unreadable
from flowdata.cli.recognised import Recognised, recognise
from flowdata.cli.template_options import add_template_options, load_tokenizer_with_template
from flowdata.store.fingerprint import fingerprint_tokenizer
from flowdata.store.fingerprint.rows import RowsDigest, digest_tokens
from flowdata.text.conversation import Row
from flowdata.text.formats import Fields, deciding_columns, find_fields
from flowdata.text.read import read_rows
from flowdata.text.tokens import TokenSamples, tokenize_rows

_ROWS_A_STEP = 1024  # that progress is told by: the first row alone, which is slow, tells nothing
_COLUMNS = {
    "messages": "column of chats (default: messages or conversations)",
    "prompt": "default: prompt, question, query, instruction and other usual names",
    "completion": "default: the completion that goes with it",
    "input": "column of text below the prompt (default: input or context)",
    "system": "column of system messages (default: system or system_prompt)",
    "history": "column of earlier turns (default: history)",
    "tools": "column of tools (default: tools or functions)",
    "rejected": "column of replies that were not preferred (default: rejected)",
}


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which text is read, and how it becomes tokens."""
    add = parser.add_argument
    add("--split", help="of a folder or hub data set that has splits (default: train)")
    add("--configuration", help="of a hub data set that has several")
    add("--revision", help="of a hub data set: a branch, tag or commit")
    add("--encoding", default="utf-8", help="of JSON, CSV and text files (default: %(default)s)")
    add("--streaming", action="store_true", help="read rows while they are used, and keep none")
    add("--limit", type=int, help="take the first rows only")
    add(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="skip leaves rows that can't be read without a loss (default: %(default)s)",
    )
    for name, text in _COLUMNS.items():
        add(f"--{name}-column", help=text)
    add_template_options(parser)


def text_samples(
    options: argparse.Namespace, source: str, model: str
) -> tuple[TokenSamples, dict[str, Any], Recognised]:
    """Return a source's samples, how they were made, and what was recognised, which is also said.

    Args:
        options: those of `add_text_options`.
        source: files, a saved data set, or a hub id.
        model: whose tokenizer it is, if none was named.

    Returns:
        The samples; details that a store keeps; what was recognised.
    """
    where = {
        name: getattr(options, name)
        for name in ("split", "configuration", "revision", "encoding", "limit")
    }
    rows = read_rows(source, streaming=options.streaming, on_error=options.on_error, **where)
    row = _first_row(rows, source)
    fields = find_fields(row, _fields_named(options))
    tokenizer = load_tokenizer_with_template(options, model)
    template = options.template
    if template is None:
        template = tokenizer.chat_template is not None and fields.prompt is not None
    digest = RowsDigest(deciding_columns(fields))
    with _counted(digest.watch(rows), _length_of(rows), shown=_speaks(options)) as counted:
        samples = tokenize_rows(
            counted,
            tokenizer,
            fields,
            template=template,
            template_options=dict(options.template_option),
            max_length=options.max_length,
            truncation=options.truncation,
            on_error=options.on_error,
        )
    if options.chat_template is not None and samples.replies is None:
        raise ValueError("--chat-template has no effect: no row goes through a chat template")
    _warn(options, samples)
    recognised = recognise(row, fields, samples, tokenizer)
    if _speaks(options):
        say(recognised.text(whole=False))
    return (
        samples,
        {
            "model": model,
            "data": {"source": source, **where, **vars(fields), **_rows_of(digest, samples)},
            "tokenizer": fingerprint_tokenizer(tokenizer),
            # What a report makes the same tokens of again.
            "tokenizer_source": options.tokenizer or model,
            "chat_template_given": tokenizer.chat_template if options.chat_template else None,
            "chat_template": samples.replies is not None,
            "replies": samples.replies,
            "template_options": dict(options.template_option),
            "max_length": options.max_length,
            "truncation": options.truncation,
            **cuts_of(samples),
        },
        recognised,
    )


def _rows_of(digest: RowsDigest, samples: TokenSamples) -> dict[str, Any]:
    """The rows' number and identity, with that of their tokens where each row is one sample."""
    identity = digest.identity()
    if not samples.is_split:
        identity["tokens"] = digest_tokens(samples.input_ids, samples.offsets, None)
    return {"rows": len(digest), "identity": identity}


def _length_of(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None


def _speaks(options: argparse.Namespace) -> bool:
    """Whether this process is the one that speaks, if any does."""
    return os.environ.get("RANK", "0") == "0" and not options.quiet


@contextmanager
def _counted(rows: Any, total: int | None, *, shown: bool) -> Iterator[Iterator[Any]]:
    """Rows whose reading and tokenising is shown, where their number is known before."""
    with progress_bar(total or 0, "reading", "rows", shown=shown and total is not None) as advance:

        def counted() -> Iterator[Any]:
            for number, row in enumerate(rows, 1):
                yield row
                if number % _ROWS_A_STEP == 0 or number == total:
                    advance((number - 1) % _ROWS_A_STEP + 1)

        yield counted()


def cuts_of(samples: TokenSamples) -> dict[str, int]:
    """Return how many samples were cut, lost targets, and lost all of them, by name."""
    return {
        name: getattr(samples, name) for name in ("num_cut", "num_cut_targets", "num_lost_targets")
    }


def _fields_named(options: argparse.Namespace) -> Fields:
    """The columns that the user named."""
    named = {name: getattr(options, f"{name}_column") for name in _COLUMNS}
    return Fields(**{name: column for name, column in named.items() if column is not None})


def _first_row(rows: Any, source: str) -> Row:
    """The first row that can be read."""
    first = next((row for row in rows if not isinstance(row, Unreadable)), None)
    if first is None:
        raise ValueError(f"no row of {source} can be read: {next(iter(rows)).reason}")
    row: Row = first
    return row


def _warn(options: argparse.Namespace, samples: TokenSamples) -> None:
    """Say how many samples are not whole."""
    if samples.num_cut:
        logger.warning("%s", _cut(samples, options.max_length))
    if samples.unreadable:
        logger.warning(
            "%d of %d rows can't be read and have no loss; the first: %s",
            len(samples.unreadable),
            int(samples.rows[-1]) + 1,
            next(iter(samples.unreadable.values())),
        )


def _cut(samples: TokenSamples, max_length: int) -> str:
    """How many samples were cut, and what they lost, as a sentence."""
    told = (
        f"{samples.num_cut:,} of {len(samples):,} samples were longer than {max_length:,} tokens "
        "and were cut"
    )
    if samples.num_cut_targets:
        told += (
            f"; {samples.num_cut_targets:,} of them lost part or all of their target"
            f" ({samples.num_lost_targets:,} all of it, and have no loss)"
        )
        if samples.truncation == "keep_start":
            told += ". --truncation keep_end cuts the prompt instead"
    return told
