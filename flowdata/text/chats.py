"""Formats of rows: which columns hold the text, and what of it is a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
CHATS = ("messages", "conversations", "conversation")
Row = Mapping[str, Any]
Segment = tuple[str, bool]  # a piece of text, and whether its tokens are targets


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text: a chat, or a completion with or without a prompt."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None


def find_columns(row: Row, wanted: Columns) -> Columns:
    """Return the columns to read: those asked for, else the first known names that are there.

    Raises:
        ValueError: a column asked for is missing, or no known name is there.
    """
    asked = [name for name in (wanted.messages, wanted.prompt, wanted.completion) if name]
    missing = [name for name in asked if name not in row]
    if missing:
        raise ValueError(f"column {missing[0]!r} is missing; there are {_listed(row)}")
    if asked:
        if wanted.prompt and not wanted.completion:
            raise ValueError("a prompt column needs a completion column beside it")
        return wanted
    for messages in CHATS:
        if messages in row:
            return Columns(messages=messages)
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            return Columns(prompt=prompt, completion=completion)
    if "text" in row:
        return Columns(completion="text")
    raise ValueError(
        f"no known text columns among {_listed(row)}; name them (prompt and completion, "
        "messages, or completion alone)"
    )


def row_segments(
    row: Row, number: int, tokenizer: Any, columns: Columns, template: bool
) -> list[Segment]:
    """Return the pieces of text of one row, and which of them are targets."""
    try:
        if columns.messages is not None:
            return _chat_segments(row[columns.messages], tokenizer)
        completion = _text(row, columns.completion or "")
        prompt = _text(row, columns.prompt) if columns.prompt else ""
        if template:
            chat = [{"role": "user", "content": prompt}] if columns.prompt else []
            return _chat_segments([*chat, {"role": "assistant", "content": completion}], tokenizer)
        return [(prompt, False), (completion, True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"row {number}: {error}") from None


def _chat_segments(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Segment]:
    """Cut a rendered chat at the beginning and end of every reply of the assistant."""
    messages = list(messages)
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    segments: list[Segment] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = (
            tokenizer.apply_chat_template(
                messages[:index], tokenize=False, add_generation_prompt=True
            )
            if index
            else "",
            tokenizer.apply_chat_template(messages[: index + 1], tokenize=False),
        )
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                "the chat template writes earlier turns differently once later ones follow, so "
                "its replies can't be told apart; give each reply a row of its own"
            )
        reply_end = len(after.rstrip())  # a line break after the end of turn is nobody's reply
        segments += [(whole[position : len(before)], False), (whole[len(before) : reply_end], True)]
        position = reply_end
    if not segments:
        raise ValueError("the chat has no message with role 'assistant', so it has no target")
    return [*segments, (whole[position:], False)]


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = f"a {type(value).__name__}" if column in row else "nothing"
        raise ValueError(f"column {column!r} should hold text, it holds {found}")
    return value


def _listed(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"
