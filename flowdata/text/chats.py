"""Chats to renderings: what the template writes, where the replies are, and that all is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flowdata.text.completeness import LeftOutError, check_complete, content_text
from flowdata.text.conversation import Conversation, Message
from flowdata.text.renderings import Rendering
from flowdata.text.replies import Write, find_marks, find_replies, find_start
from flowdata.text.templates import ChatTemplate

# Ways to write the same messages. Templates of vision models read content in parts alone, others
# read strings alone, and some want the arguments of a tool call as JSON text.
_Rewrite = Callable[[Message], Message]


def render_conversation(conversation: Conversation, template: ChatTemplate) -> list[Rendering]:
    """Return a conversation's text with its replies as targets, or a text for each reply.

    The messages are given to the template as they are; where it can't read them, with content in
    parts or in one string, and with arguments of tool calls as JSON text.

    A row that has its prompt and its completion apart has all of the completion as its target, as
    TRL's SFTTrainer takes it, and the tokenizer's own template writes it.

    Args:
        conversation: the conversation.
        template: the chat template.

    Raises:
        ValueError: the template refuses the chat or leaves out part of it, or its replies can't be
            told apart.
    """
    errors: list[ValueError] = []
    first = _as_given if template.reads_strings else _strings_as_parts
    for rewrite in (first, *_FURTHER_WAYS):
        try:
            messages = [rewrite(message) for message in conversation.messages]
            if rewrite is first or messages != list(conversation.messages):
                return _render(replace(conversation, messages=tuple(messages)), template)
        except ValueError as error:
            errors.append(error)
    raise next(filter(_is_telling, errors), errors[0])


def _is_telling(error: ValueError) -> bool:
    """Whether an error tells what is wrong, and not only that content has another form."""
    if isinstance(error, LeftOutError):
        return not error.is_content
    return type(error.__cause__).__name__ == "TemplateError"  # the template's own words


def _render(conversation: Conversation, template: ChatTemplate) -> list[Rendering]:
    """The first cut of a conversation whose texts and targets hold all that it says."""
    replies = [i for i, is_target in enumerate(conversation.is_target) if is_target]
    first_error: LeftOutError | None = None
    for renderings in _cuts(conversation, replies, template):
        is_split = len(renderings) == len(replies)
        try:
            for number, rendering in enumerate(renderings):
                check_complete(
                    rendering,
                    conversation.messages[: rendering.num_messages],
                    [replies[number]] if is_split else replies,
                )
        except LeftOutError as error:
            first_error = first_error or error
        else:
            return renderings
    raise first_error or ValueError("the chat has no reply")


def _cuts(
    conversation: Conversation, replies: Sequence[int], template: ChatTemplate
) -> Iterator[list[Rendering]]:
    """The ways to cut a conversation into prompts and targets, the most like training first."""
    messages = conversation.messages
    options = dict(conversation.template_options)
    if conversation.documents:
        options["documents"] = conversation.documents
    extras: Any = {"tools": conversation.tools, "options": options}
    write: Write = partial(template.write, **extras)
    if conversation.tools and write(messages) == write(messages, tools=None):
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        raise LeftOutError(
            "the chat template leaves out the tools that come with the chat; name a template that "
            "writes them (--chat-template FILE)"
            + ("" if calls else ", or read no column of tools (tools='')")
        )
    without = {**options, "documents": None}
    if conversation.documents and write(messages) == write(messages, options=without):
        raise LeftOutError(
            "the chat template leaves out the documents that come with the chat; name a template "
            "that writes them (--chat-template FILE), or read none (documents='')"
        )
    if _is_completion(conversation):
        whole, number = write(messages), conversation.num_prompt
        find_start(write, messages, number, whole)
        yield [Rendering(whole, len(messages), prompt=write(messages[:number], prompt=True))]
    if template.form == "own":
        yield find_replies(write, messages, replies, template.special_tokens)
        return
    mark = partial(template.write_marked, **extras)
    yield [find_marks(mark, messages, replies)]
    # Many templates keep a reply's reasoning until the next question alone.
    yield [find_marks(mark, messages[: index + 1], [index]) for index in replies]


def _is_completion(conversation: Conversation) -> bool:
    """Whether all after a prompt is the target: no reply of the completion is taken out of it."""
    completion = slice(conversation.num_prompt, None)
    return conversation.num_prompt > 0 and all(
        is_target or message["role"] != "assistant"
        for message, is_target in zip(
            conversation.messages[completion], conversation.is_target[completion], strict=True
        )
    )


def _as_given(message: Message) -> Message:
    return message


def _strings_as_parts(message: Message) -> Message:
    return _with_parts(message) if isinstance(message.get("content"), str) else message


def _with_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": content_text(message)}]}


def _with_text(message: Message) -> Message:
    return {**message, "content": content_text(message)}


def _with_json(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), Mapping):
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


_FURTHER_WAYS: tuple[_Rewrite, ...] = (
    _with_parts,
    _with_text,
    _with_json,
    lambda message: _with_json(_with_parts(message)),
    lambda message: _with_json(_with_text(message)),
)
