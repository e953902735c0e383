"""Whether a template wrote all that a chat says: templates leave out what they don't know."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowdata.text.conversation import Message
from flowdata.text.renderings import Rendering

_MOST_CHARACTERS = 40  # of an excerpt in a message
_THOUGHT = re.compile(r"</?think>")


class LeftOutError(ValueError):
    """A template leaves out part of a chat: its content, or of what is content something else.

    A template that leaves out a reply's reasoning reads its content: it is nearer to the truth
    than the same template given messages of a form whose content it does not read.
    """

    def __init__(self, message: str, *, is_content: bool = False) -> None:
        super().__init__(message)
        self.is_content = is_content


def check_complete(
    rendering: Rendering, messages: Sequence[Message], replies: Sequence[int]
) -> None:
    """Check that a text holds its chat, and its targets hold their replies.

    Line breaks and spaces are not compared: templates trim them and add their own.

    Args:
        rendering: the text.
        messages: the chat that it is of, no message more.
        replies: the indices of the messages that are targets.

    Raises:
        LeftOutError: something is missing; it is named.
    """
    text, target = _Text(rendering.text), _Text(rendering.target_text())
    for index, message in enumerate(messages):
        is_target = index in replies
        for thing, piece in _said(message, is_target=is_target):
            # Marks may leave reasoning out of the targets on purpose. It is written all the same.
            is_context = not is_target or thing == "reasoning"
            if piece not in (text if is_context else target):
                raise _left_out(thing, piece, message, is_target=is_target)
        for part in _parts(message):  # printed as Python or JSON would print it
            if str(part) in rendering.text or json.dumps(part) in rendering.text:
                raise LeftOutError("the chat template can't read content in parts", is_content=True)


def content_text(message: Message) -> str:
    """Return a message's content as text; parts follow one another.

    Raises:
        ValueError: a part is no text.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ValueError(f"content should be text or a list of parts, got {type(content).__name__}")
    for part in _parts(message):
        if not isinstance(part.get("text"), str):
            raise ValueError(
                f"content has a part of type {part.get('type')!r}, and only text can be scored here"
            )
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return []
    return [part for part in content if isinstance(part, Mapping)]


def _said(message: Message, *, is_target: bool) -> Iterator[tuple[str, str]]:
    """What a template must write of a message, piece by piece, each with what it is."""
    thoughts_and_answer = _THOUGHT.split(content_text(message))
    # Earlier replies lose their reasoning in most templates; no model is given it then.
    yield from (("content", piece) for piece in thoughts_and_answer[0 if is_target else -1 :])
    if is_target:
        yield "reasoning", message.get("reasoning_content") or ""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        yield "a tool call", str(function.get("name") or "")
        yield from (("a tool call", leaf) for leaf in _leaves(function.get("arguments")))


def _leaves(value: Any) -> Iterator[str]:
    """The texts within a tool call's arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _leaves(item)


class _Text:
    """A text that is searched without its line breaks and spaces."""

    def __init__(self, text: str) -> None:
        self._text = _without_space(text)

    def __contains__(self, piece: str) -> bool:
        if _without_space(piece) in self._text:
            return True
        # Tool calls and results may stand in quotes, as JSON or Python writes them.
        quoted = (json.dumps(piece, ensure_ascii=False), json.dumps(piece), repr(piece))
        return any(_without_space(text[1:-1]) in self._text for text in quoted)


def _without_space(text: str) -> str:
    return "".join(text.split())


def _left_out(thing: str, piece: str, message: Message, *, is_target: bool) -> LeftOutError:
    piece = piece.strip()
    excerpt = piece if len(piece) <= _MOST_CHARACTERS else f"{piece[: _MOST_CHARACTERS - 1]}…"
    place = "the targets" if is_target else "the text"
    remedy = ""
    if thing == "reasoning":
        remedy = "; name a template that writes it, or leave it out of the data"
    return LeftOutError(
        f"the chat template leaves {thing} of a message of role {message['role']!r} out of {place} "
        f"({excerpt!r}){remedy}",
        is_content=thing == "content",
    )
