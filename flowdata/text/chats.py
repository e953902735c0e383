"""Formats of rows: which fields hold the text, and which parts of the text are targets."""

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
class Fields:
    """The names of the fields that hold a row's text.

    Data sets, the command line and this module's messages call them columns.

    Attributes:
        messages: holds a chat, a list of messages with `role` and `content`.
        prompt: holds the text before the completion; None where there is none.
        completion: holds the text whose tokens are the targets.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None


def find_fields(row: Row, fields: Fields) -> Fields:
    """Return the fields to read: those that are named, else the first usual names in the row.

    Args:
        row: any row of the data set; only its names are looked at.
        fields: the names that the user gave, if any.

    Raises:
        ValueError: a field that is named is missing, or the row has none of the usual names.

    Example:
        >>> find_fields({"question": "2+2=", "answer": "4"}, Fields())
        Fields(messages=None, prompt='question', completion='answer')
    """
    names = [name for name in (fields.messages, fields.prompt, fields.completion) if name]
    absent_names = [name for name in names if name not in row]
    if absent_names:
        raise ValueError(f"column {absent_names[0]!r} is missing; there are {_names_of(row)}")
    if names:
        if fields.prompt and not fields.completion:
            raise ValueError("a prompt column needs a completion column beside it")
        return fields
    for messages in CHATS:
        if messages in row:
            return Fields(messages=messages)
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            return Fields(prompt=prompt, completion=completion)
    if "text" in row:
        return Fields(completion="text")
    raise ValueError(
        f"no known text columns among {_names_of(row)}; name them (prompt and completion, "
        "messages, or completion alone)"
    )


def row_segments(
    row: Row, number: int, tokenizer: Any, fields: Fields, template: bool
) -> list[Segment]:
    """Return the pieces of a row's text in order, each with whether it is a target.

    Args:
        row: the row.
        number: its place in the data set, for messages.
        tokenizer: renders chats.
        fields: the fields that hold the text.
        template: whether a prompt and its completion are rendered as a chat.

    Raises:
        ValueError: the row has no such text, or its chat can't be cut; the row is named.
    """
    try:
        if fields.messages is not None:
            return _chat_segments(row[fields.messages], tokenizer)
        completion = _text(row, fields.completion or "")
        prompt = _text(row, fields.prompt) if fields.prompt else ""
        if template:
            chat = [{"role": "user", "content": prompt}] if fields.prompt else []
            return _chat_segments([*chat, {"role": "assistant", "content": completion}], tokenizer)
        return [(prompt, False), (completion, True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"row {number}: {error}") from None


def _chat_segments(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Segment]:
    """Cut a rendered chat at the beginning and the end of every reply of the assistant."""
    # Templates don't say where a reply lies in the text, so the chat's beginning is rendered twice
    # for each reply: up to the reply, and with it. The reply is what the second adds to the first.
    #
    #   whole    <user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>d</s>\n
    #   before   <user>a</s>\n<assistant>
    #   after    <user>a</s>\n<assistant>b</s>\n
    #   target                           b</s>
    messages = list(messages)
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    segments: list[Segment] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ""
        if index:
            before = tokenizer.apply_chat_template(
                messages[:index], tokenize=False, add_generation_prompt=True
            )
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
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


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        content = f"a {type(value).__name__}" if field in row else "nothing"
        raise ValueError(f"column {field!r} should hold text, it holds {content}")
    return value


def _names_of(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"
