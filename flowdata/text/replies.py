"""Where the replies lie in a chat that its template writes without marks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from flowdata._common.notices import say_once
from flowdata.text.completeness import content_text
from flowdata.text.conversation import Message
from flowdata.text.renderings import Rendering, common_length

_TAG = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")

Write = Callable[..., str]  # (messages, *, prompt=False) -> text, as `ChatTemplate.write`


def find_replies(
    write: Write, messages: Sequence[Message], replies: Sequence[int], ends: Sequence[str]
) -> list[Rendering]:
    """Return a chat with its replies as targets: in one text, or in one for each of them.

    A template that writes earlier turns differently once later ones follow (without their
    reasoning, say) never shows a model the whole text when it generates an earlier reply. Each
    reply then has a text of its own, which ends with it.

    Args:
        write: the template.
        messages: the chat.
        replies: the indices of the messages that are targets, ascending.
        ends: the tokenizer's special tokens; a template may put one after the last message alone.

    Raises:
        ValueError: as `find_start`.
    """
    # Templates don't say where a reply lies in the text, so the chat's beginning is rendered twice
    # for each reply: up to the reply, and with it. The reply is what the second adds to the first.
    #
    #   whole    <user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>d</s>\n
    #   before   <user>a</s>\n<assistant>
    #   after    <user>a</s>\n<assistant>b</s>\n
    #   target                           b</s>
    whole = write(messages)
    alone: list[Rendering] = []
    spans: list[tuple[int, int]] = []
    for index in replies:
        after = whole if index == len(messages) - 1 else write(messages[: index + 1])
        start = find_start(write, messages, index, after)
        alone.append(Rendering(after, index + 1, ((start, _end(after)),)))
        end = next((_end(text) for text in _without(after, ends) if whole.startswith(text)), None)
        if end is not None:
            spans.append((start, end))
    if len(spans) < len(replies):
        return alone
    return [Rendering(whole, len(messages), tuple(spans))]


def find_start(write: Write, messages: Sequence[Message], index: int, after: str) -> int:
    """Return where a reply begins in a text, in characters.

    Args:
        write: the template.
        messages: the chat.
        index: the reply's.
        after: the text of the chat up to the reply, or further.

    Raises:
        ValueError: the template writes the chat before the reply differently in `after`.
    """
    if index == 0:  # nothing can be rendered before it; what begins a reply is seen behind it
        opening = write(messages[:1], prompt=True).removeprefix(write(messages[:1]))
        if opening and opening in after:
            return after.find(opening) + len(opening)
        return max(0, after.find(content_text(messages[0]).strip()))
    before = write(messages[:index], prompt=True)
    start = common_length(before, after)
    if start == len(before):
        return start
    # The beginning of a reply may stand differently where the reply follows: an empty thought that
    # is left out, say. All that was said before must stand as it is.
    if start < common_length(before, write(messages[:index])):
        raise ValueError(
            "the chat template writes the chat before a reply differently once the reply follows, "
            "so the reply can't be told apart; give each reply a row of its own, its prompt and "
            "completion as rendered text"
        )
    # Both may go on with tags of one first letter, "<think>" here and "<b>" there.
    cut_tags = (tag.start() for tag in _TAG.finditer(before) if tag.start() < start < tag.end())
    start = next(cut_tags, start)
    say_once(
        f"the chat template writes {before[start:]!r} before a reply that is generated, and not "
        "before one that is there: replies are scored without it"
    )
    return start


def _end(text: str) -> int:
    """Where a reply at a text's end ends: a line break after the end of turn is nobody's."""
    return len(text.rstrip())


def _without(text: str, ends: Sequence[str]) -> list[str]:
    """A text, and the same without the end of the text, where that stands after an end of turn."""
    stem = text.rstrip()
    shorter = [stem.removesuffix(end).rstrip() for end in ends if stem.endswith(end)]
    return [text, stem, *(other for other in shorter if other.endswith(tuple(ends)))]


def find_marks(
    mark: Callable[[Sequence[Message]], tuple[str, list[tuple[int, int]]]],
    messages: Sequence[Message],
    replies: Sequence[int],
) -> Rendering:
    """Return a chat whose targets are the marks of some of its replies.

    Args:
        mark: writes messages, and gives the marks of its replies.
        messages: the chat.
        replies: the indices of the messages that are targets, ascending.

    Raises:
        ValueError: the template's marks can't be told apart by message.
    """
    text, spans = mark(messages)
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if list(replies) == assistants:
        return Rendering(text, len(messages), tuple(spans))
    if len(spans) == len(assistants):
        pairs = [(i, span) for i, span in zip(assistants, spans, strict=True) if i in replies]
        if all(content_text(messages[i]).strip() in text[slice(*span)] for i, span in pairs):
            return Rendering(text, len(messages), tuple(span for _, span in pairs))
    # A reply may have several marks or none. Those of a message are what the chat up to it has more
    # of than the chat before.
    targets: list[tuple[int, int]] = []
    for index in replies:
        upto = mark(messages[: index + 1])[1]
        before = mark(messages[:index])[1] if index else []
        if spans[: len(upto)] != upto or upto[: len(before)] != before:
            raise ValueError(
                "some replies are no targets, and the chat template's marks don't tell which reply "
                "they belong to"
            )
        targets += upto[len(before) :]
    return Rendering(text, len(messages), tuple(targets))
