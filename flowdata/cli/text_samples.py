"""The text of a file, or of a hub data set, as samples for a model: options and reading."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from flowdata._common.notices import is_first_rank, logger, say
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
    "documents": "column of texts to answer from (default: documents)",
    "rejected": "column of replies that were not preferred (default: rejected)",
}

_MOST_REASONS = 5  # why rows can't be read, in one message


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


class _Text:
    """A source's rows, and what makes samples of them.

    Args:
        options: those of `add_text_options`.
        source: files, a saved data set, or a hub id.
        model: whose tokenizer it is, if none was named.
    """

    def __init__(self, options: argparse.Namespace, source: str, model: str) -> None:
        self._options = options
        self.where = {
            name: getattr(options, name)
            for name in ("split", "configuration", "revision", "encoding", "limit")
        }
        self.rows = read_rows(
            source, streaming=options.streaming, on_error=options.on_error, **self.where
        )
        self._first_row, self.fields = _recognise_first(self.rows, source, options)
        self.tokenizer = load_tokenizer_with_template(options, model)

    def samples(self, rows: Iterable[Any], on_first: Callable[[Recognised], None]) -> TokenSamples:
        """The samples of rows; what is recognised is told once the first of them is there."""
        options, template = self._options, self._options.template
        if template is None:
            template = self.tokenizer.chat_template is not None and self.fields.prompt is not None
        samples = tokenize_rows(
            rows,
            self.tokenizer,
            self.fields,
            template=template,
            template_options=dict(options.template_option),
            max_length=options.max_length,
            truncation=options.truncation,
            on_error=options.on_error,
            on_first=lambda sample: on_first(
                recognise(self._first_row, self.fields, sample, self.tokenizer)
            ),
        )
        if len(samples.unreadable) == len(samples):
            raise ValueError(f"no row can be scored; {next(iter(samples.unreadable.values()))}")
        if options.chat_template is not None and samples.replies is None:
            raise ValueError("--chat-template has no effect: no row goes through a chat template")
        if options.template is False and samples.replies is not None:
            raise ValueError(
                "--no-template would be ignored: chats, and pairs with a system message, history, "
                "tools or documents, always go through the chat template; leave it out, or leave "
                "out what needs one (--system-column '' reads no system messages)"
            )
        return samples


def preview_text(options: argparse.Namespace, source: str, model: str) -> tuple[Recognised, int]:
    """Return what is recognised in a source's first row, and how many rows were made samples of.

    What a run would refuse in one of these rows is refused, and what it would warn of is warned of.

    Args:
        options: those of `add_text_options`.
        source: files, a saved data set, or a hub id.
        model: whose tokenizer it is, if none was named.
    """
    text = _Text(options, source, model)
    results: list[Recognised] = []
    samples = text.samples(text.rows, results.append)
    _warn(options, samples)
    return results[0], int(samples.rows[-1]) + 1


def text_samples(
    options: argparse.Namespace, source: str, model: str
) -> tuple[TokenSamples, dict[str, Any]]:
    """Return a source's samples and how they were made; what was recognised is said first.

    Args:
        options: those of `add_text_options`.
        source: files, a saved data set, or a hub id.
        model: whose tokenizer it is, if none was named.

    Returns:
        The samples; details that a store keeps.
    """
    text = _Text(options, source, model)
    digest = RowsDigest(deciding_columns(text.fields))
    is_shown = is_first_rank() and not options.quiet
    total = len(text.rows) if hasattr(text.rows, "__len__") else None
    rows = _counted(digest.watch(text.rows), total, shown=is_shown)
    samples = text.samples(rows, lambda recognised: say(recognised.text(), shown=is_shown))
    _warn(options, samples)
    if not samples.num_targets:
        raise ValueError(f"none of the {len(samples):,} samples has a target: nothing is scored")
    return samples, {
        "model": model,
        "data": {
            "source": source,
            **text.where,
            **vars(text.fields),
            **_rows_of(digest, samples),
        },
        "tokenizer": fingerprint_tokenizer(text.tokenizer),
        # What a report makes the same tokens of again.
        "tokenizer_source": options.tokenizer or model,
        "chat_template_given": text.tokenizer.chat_template if options.chat_template else None,
        "chat_template": samples.replies is not None,
        "replies": samples.replies,
        "template_options": dict(options.template_option),
        "max_length": options.max_length,
        "truncation": options.truncation,
        **cuts_of(samples),
    }


def _rows_of(digest: RowsDigest, samples: TokenSamples) -> dict[str, Any]:
    """The rows' number and identity, with that of their tokens where each row is one sample."""
    identity = digest.identity()
    if not samples.is_split:
        identity["tokens"] = digest_tokens(samples.input_ids, samples.offsets, None)
    return {"rows": len(digest), "identity": identity}


def _counted(rows: Iterable[Any], total: int | None, *, shown: bool) -> Iterator[Any]:
    """Rows whose reading and tokenising is shown, where their number is known before."""
    rows, progress = iter(rows), 1
    yield from islice(rows, 1)  # what it holds is told before a bar begins
    with progress_bar(
        total or 0, "reading", "rows", initial=progress, shown=shown and total is not None
    ) as advance:
        for number, row in enumerate(rows, 2):
            yield row
            if number % _ROWS_A_STEP == 0 or number == total:
                advance(number - progress)
                progress = number


def cuts_of(samples: TokenSamples) -> dict[str, int]:
    """Return how many samples were cut, lost targets, and lost all of them, by name."""
    return {
        name: getattr(samples, name) for name in ("num_cut", "num_cut_targets", "num_lost_targets")
    }


def _fields_named(options: argparse.Namespace) -> Fields:
    """The columns that the user named."""
    columns = {name: getattr(options, f"{name}_column") for name in _COLUMNS}
    return Fields(**{name: column for name, column in columns.items() if column is not None})


def _recognise_first(rows: Any, source: str, options: argparse.Namespace) -> tuple[Row, Fields]:
    """The first row that can be read, and the columns that were found in it.

    Where rows may be skipped, those may be whose columns can't be told.
    """
    fields, error = _fields_named(options), None
    readable = (row for row in rows if not isinstance(row, Unreadable))
    for row in islice(readable, _ROWS_A_STEP):
        try:
            return row, find_fields(row, fields)
        except ValueError as of_row:
            error = error or of_row
            if options.on_error != "skip":
                break
    raise error or ValueError(f"no row of {source} can be read: {next(iter(rows)).reason}")


def _warn(options: argparse.Namespace, samples: TokenSamples) -> None:
    """Say how many samples are not whole."""
    if samples.num_targets and samples.num_cut:  # without targets `tokenize_rows` has said it
        logger.warning(_cut(samples, options.max_length))
    if samples.unreadable:
        reasons = list(samples.unreadable.values())
        logger.warning(
            "%d of %d rows can't be read and have no loss: %s%s",
            len(reasons),
            int(samples.rows[-1]) + 1,
            "; ".join(reasons[:_MOST_REASONS]),
            "; …" if len(reasons) > _MOST_REASONS else "",
        )


def _cut(samples: TokenSamples, max_length: int) -> str:
    """How many samples were cut, and what they lost, as a sentence."""
    sentence = (
        f"{samples.num_cut:,} of {len(samples):,} samples were longer than {max_length:,} tokens "
        "and were cut"
    )
    if samples.num_cut_targets:
        sentence += (
            f"; {samples.num_cut_targets:,} of them lost part or all of their target"
            f" ({samples.num_lost_targets:,} all of it, and have no loss)"
        )
        if samples.truncation == "keep_start":
            sentence += ". --truncation keep_end cuts the prompt instead"
    return sentence
