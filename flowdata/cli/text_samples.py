"""The text of a file, or of a hub data set, as samples for a model: options and reading."""

from __future__ import annotations

import argparse
from typing import Any

from flowdata._common.notices import logger
from flowdata.cli.template_options import add_template_options, load_tokenizer_with_template
from flowdata.store.fingerprint import fingerprint_tokenizer
from flowdata.text.formats import Fields, find_fields
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
    add_template_options(parser)


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
    tokenizer = load_tokenizer_with_template(options, model)
    template = options.template
    if template is None:
        template = tokenizer.chat_template is not None and fields.prompt is not None
    samples = tokenize_rows(
        rows,
        tokenizer,
        fields,
        template=template,
        template_options=dict(options.template_option),
        max_length=options.max_length,
        truncation=options.truncation,
    )
    if options.chat_template is not None and samples.replies is None:
        raise ValueError("--chat-template has no effect: no row goes through a chat template")
    if samples.num_cut:
        logger.warning("%s", _cut(samples, options.max_length))
    return samples, {
        "model": model,
        "data": {"source": source, "split": options.split, **vars(fields)},
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "chat_template": samples.replies is not None,
        "replies": samples.replies,
        "template_options": dict(options.template_option),
        "max_length": options.max_length,
        "truncation": options.truncation,
        **cuts_of(samples),
    }


def cuts_of(samples: TokenSamples) -> dict[str, int]:
    """Return how many samples were cut, lost targets, and lost all of them, by name."""
    return {
        name: getattr(samples, name) for name in ("num_cut", "num_cut_targets", "num_lost_targets")
    }


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
