"""The texts of a store's samples: its rows read again, as conversations and as tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowdata._common.notices import logger
from flowdata._common.unreadable import Unreadable
from flowdata.report.samples import Piece, SampleText
from flowdata.scores import Scores
from flowdata.scores.matching import identity_of_rows, rows_difference, rows_identity
from flowdata.text.completeness import content_text
from flowdata.text.conversation import Message, why_unreadable
from flowdata.text.formats import Fields, read_conversation
from flowdata.text.models import load_tokenizer
from flowdata.text.read import read_rows
from flowdata.text.tokens import TokenSamples, tokenize_rows

_MOST_BYTES = 8  # tokens of one character: UTF-8 takes up to four bytes, and a space may be before
_NO_CHARACTER, _GOES_ON = "\ufffd", "·"  # what bytes decode to alone, and what stands for them here
# What a user can put right: data or a tokenizer that is gone, or has become something else.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


@dataclass(frozen=True)
class Targets:
    """The targets of a store's samples, made of its rows again.

    Attributes:
        words: gives the texts of sample i's targets.
        is_cut: (N,) whether a sample is as long as the longest allowed.
    """

    words: Callable[[int], Sequence[str]]
    is_cut: NDArray[np.bool_] | None


def read_rows_of(scores: Scores) -> Any:
    """Return the rows that scores are of; None where they don't name the data or it is gone."""
    data = scores.metadata.get("details", {}).get("data")
    if not isinstance(data, dict):  # not scored by `flowdata score`
        return None
    where: Any = {name: data.get(name) for name in ("split", "configuration", "revision")}
    try:
        rows = read_rows(
            data["source"],
            limit=data.get("rows", len(scores)),
            encoding=data.get("encoding", "utf-8"),
            on_error="skip",
            **where,
        )
    except _USER_ERRORS as error:
        logger.warning("samples are shown without their text: %s", error)
        return None
    if len(rows) != len(scores):
        logger.warning(
            "samples are shown without their text: the store has %d samples, and %s has %d rows",
            len(scores),
            data["source"],
            len(rows),
        )
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
    return rows


def row_texts(scores: Scores, rows: Any) -> Callable[[int], SampleText] | None:
    """Return what gives the text of sample i: its messages, prompt and targets told apart.

    Args:
        scores: as `flowdata score` makes them.
        rows: as `read_rows_of` returns them.
    """
    if rows is None:
        return None
    details = scores.metadata["details"]
    columns, is_chat = Fields.of(details["data"]), bool(details.get("chat_template"))

    def text(index: int) -> SampleText:
        row = rows[index]
        if isinstance(row, Unreadable):
            return row.reason
        try:
            conversation = read_conversation(row, columns)
        except (KeyError, TypeError, ValueError) as error:
            return why_unreadable(index, error)
        if conversation.plain is not None and not is_chat:
            prompt, completion = conversation.plain
            return [*([Piece(prompt, "prompt")] if prompt else []), _completion(completion)]
        flags = zip(conversation.messages, conversation.is_target, strict=True)
        return [
            Piece(_text_of(message), str(message["role"]), is_target)
            for message, is_target in flags
        ]

    return text


def row_targets(scores: Scores, rows: Any) -> Targets | None:
    """Return the targets of samples; None where they can't be made as they were for the scores.

    They are made only for scores that hold token losses or were cut, and taken only if they are,
    token for token, those that were scored.

    Args:
        scores: as `flowdata score` makes them.
        rows: as `read_rows_of` returns them.
    """
    details = scores.metadata.get("details", {})
    if rows is None or not (scores.flat_token_losses is not None or details.get("num_cut")):
        return None
    # Stores of earlier versions name neither tokenizer nor template: theirs may be the model's.
    source = details.get("tokenizer_source") or details.get("model")
    try:
        tokenizer = load_tokenizer(source)
        if details.get("chat_template_given"):
            tokenizer.chat_template = details["chat_template_given"]
        samples = tokenize_rows(
            rows,
            tokenizer,
            Fields.of(details["data"]),
            template=bool(details.get("chat_template")),
            template_options=details.get("template_options"),
            max_length=details.get("max_length"),
            truncation=details.get("truncation", "keep_start"),
            on_error="skip",
        )
    except (*_USER_ERRORS, KeyError) as error:
        logger.warning("targets can't be shown as they were scored: %s", error)
        return None
    if scores.metadata.get("identity", {}).get("dataset") != samples.identity():
        logger.warning(
            "targets can't be shown as they were scored: by %s, %s has other tokens than these",
            source,
            details["data"]["source"],
        )
        return None
    return Targets(_words_of(samples, tokenizer), _is_cut(samples, details.get("max_length")))


def _completion(text: str) -> Piece:
    return Piece(text, "completion", is_target=True)


def _text_of(message: Message) -> str:
    """All that a message says: reasoning, content, tool calls."""
    calls = message.get("tool_calls")
    parts = (
        message.get("reasoning_content"),
        content_text(message),
        json.dumps(calls, ensure_ascii=False, default=str) if calls else None,
    )
    return "\n".join(str(part) for part in parts if part)


def _words_of(samples: TokenSamples, tokenizer: Any) -> Callable[[int], Sequence[str]]:
    """What gives the texts of a row's targets; a row may be several samples."""
    bounds = np.searchsorted(samples.rows, np.arange(samples.rows[-1] + 2))

    def words(row: int) -> Sequence[str]:
        targets = []
        for index in range(bounds[row], bounds[row + 1]):
            place = slice(samples.offsets[index] + 1, samples.offsets[index + 1])
            targets += samples.input_ids[place][samples.is_target[place]].tolist()
        return _decoded(targets, tokenizer)

    return words


def _decoded(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; of tokens that are bytes of one character the first has all of it."""
    texts: list[str] = []
    start = 0
    while start < len(tokens):
        for end in range(start + 1, min(start + _MOST_BYTES, len(tokens)) + 1):
            text = tokenizer.decode(tokens[start:end])
            if not text.endswith(_NO_CHARACTER):
                break
        else:  # the rest of the character was cut off, or these are no bytes of one
            end, text = start + 1, tokenizer.decode(tokens[start : start + 1])
        texts += [text, *[_GOES_ON] * (end - start - 1)]
        start = end
    return texts


def _is_cut(samples: TokenSamples, max_length: int | None) -> NDArray[np.bool_] | None:
    if max_length is None:
        return None
    is_cut = np.zeros(int(samples.rows[-1]) + 1, dtype=np.bool_)
    is_cut[samples.rows[samples.lengths.numpy() >= max_length]] = True
    return is_cut
