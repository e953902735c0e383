"""The text of a file, or of a hub data set, as samples for a model: options and reading."""

from __future__ import annotations

import argparse
from typing import Any

from flowdata._common.notices import logger
from flowdata.store.fingerprint import fingerprint_tokenizer
from flowdata.text.formats import Fields, find_fields
from flowdata.text.models import load_tokenizer
from flowdata.text.read import read_rows
from flowdata.text.tokens import TokenSamples, tokenize_rows


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which text is read, and how it becomes tokens."""
    add = parser.add_argument
    add("--split", default="train", help="of a hub data set (default: %(default)s)")
    add("--limit", type=int, help="take the first rows only")
    add("--prompt-column", help="default: prompt, question, query or instruction")
    add("--completion-column", help="default: the completion that goes with it")
    add("--messages-column", help="column of chats (default: messages or conversations)")
    add(
        "--template",
        action=argparse.BooleanOptionalAction,
        help="put pairs through the chat template (default: if the tokenizer has one)",
    )
    add("--max-length", type=int, help="cut samples to so many tokens")
    add("--tokenizer", help="hub id or folder (default: the model's)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def text_samples(
    options: argparse.Namespace, source: str, model: str
) -> tuple[TokenSamples, dict[str, Any]]:
    """Return a source's samples, and how they were made: details that a store keeps.

    Args:
        options: those of `add_text_options`.
        source: a file, a saved data set, or a hub id.
        model: whose tokenizer it is, if none was named.
    """
    rows = read_rows(source, split=options.split, limit=options.limit)
    fields = find_fields(
        rows[0],
        Fields(
            messages=options.messages_column,
            prompt=options.prompt_column,
            completion=options.completion_column,
        ),
    )
    tokenizer = load_tokenizer(
        options.tokenizer or model, trust_remote_code=options.trust_remote_code
    )
    template = options.template
    if template is None:
        template = tokenizer.chat_template is not None and fields.prompt is not None
    samples = tokenize_rows(
        rows, tokenizer, fields, template=template, max_length=options.max_length
    )
    if samples.num_cut:
        logger.warning(
            "%d of %d samples were longer than %d tokens and were cut",
            samples.num_cut,
            len(samples),
            options.max_length,
        )
    return samples, {
        "model": model,
        "data": {"source": source, "split": options.split, **vars(fields)},
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "chat_template": template or fields.messages is not None,
        "max_length": options.max_length,
        "num_cut": samples.num_cut,
    }
