"""Whether a template wrote all that a chat says: templates leave out what they don't know."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowdata.text.conversation import Message
from flowdata.text.renderings import Rendering, common_length

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
    # Replies are looked for one after another, since two of them may say the same.
    text, target = _Search(rendering.text), _Search(rendering.target_text())
    starts = dict(zip(replies, _starts(rendering, len(replies)), strict=True))
    for index, message in enumerate(messages):
        is_target = index in replies
        for thing, piece in _said(message, is_target=is_target):
            is_there = target.passes(piece) if is_target else text.has(piece)
            if thing == "reasoning" and not is_there:
                # Marks may leave reasoning out of the targets on purpose, if it is written.
                before = _text_before(rendering.text, starts[index], messages, index)
                is_there = _Search(before).has(piece)
            if not is_there:
                raise _left_out(thing, piece, message, is_target=is_target)
        if is_target:
            target.go_on()
        for part in _parts(message):  # printed as Python or JSON would print it
            if str(part) in rendering.text or json.dumps(part) in rendering.text:
                raise LeftOutError("the chat template can't read content in parts", is_content=True)


def _starts(rendering: Rendering, num_replies: int) -> list[int]:
    """Where the target of each reply begins; the text's end where that can't be told."""
    if rendering.prompt is not None:
        begin = common_length(rendering.prompt, rendering.text)
        return [begin, *[len(rendering.text)] * (num_replies - 1)]
    if len(rendering.targets) == num_replies:
        return [start for start, _ in rendering.targets]
    return [len(rendering.text)] * num_replies


def _text_before(text: str, start: int, messages: Sequence[Message], index: int) -> str:
    """What a text says between the message before a reply and the reply's target."""
    said = content_text(messages[index - 1]).strip() if index else ""
    place = text.rfind(said, 0, start) if said else -1
    return text[0 if place < 0 else place + len(said) : start]


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


class _Search:
    """A text that is searched without its line breaks and spaces, reply after reply."""

    def __init__(self, text: str) -> None:
        self._text = _without_space(text)
        self._start = self._end = 0  # where a reply is looked for, and what was found of it ends

    def has(self, piece: str) -> bool:
        """Whether a piece is anywhere in the text."""
        return any(form in self._text for form in _forms(piece))

    def passes(self, piece: str) -> bool:
        """Whether a piece of the present reply is in the text."""
        places = [(self._text.find(form, self._start), form) for form in _forms(piece)]
        ends = [place + len(form) for place, form in places if place >= 0]
        self._end = max(self._end, min(ends, default=0))
        return bool(ends)

    def go_on(self) -> None:
        """Look for the next reply, behind the present one."""
        self._start = self._end


def _forms(piece: str) -> set[str]:
    """A piece as it is, and in quotes, as JSON or Python writes tool calls and their results."""
    quoted = (json.dumps(piece, ensure_ascii=False), json.dumps(piece), repr(piece))
    return {_without_space(piece), *(_without_space(text[1:-1]) for text in quoted)}


def _without_space(text: str) -> str:
    return "".join(text.split())


def _left_out(thing: str, piece: str, message: Message, *, is_target: bool) -> LeftOutError:
    piece = piece.strip()
    excerpt = piece if len(piece) <= _MOST_CHARACTERS else f"{piece[: _MOST_CHARACTERS - 1]}…"
    place = "the targets" if is_target else "the text"
    leave_out = ", or leave it out of the data" if thing == "reasoning" else ""
    return LeftOutError(
        f"the chat template leaves {thing} of a message of role {message['role']!r} out of {place} "
        f"({excerpt!r}); name a template that writes it (--chat-template FILE){leave_out}",
        is_content=thing == "content",
    )
