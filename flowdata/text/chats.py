"""Conversations as text: the pieces that a tokenizer gets, and which of them are targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowdata.text.conversation import Conversation, Message

Segment = tuple[str, bool]  # a piece of text, and whether its tokens are targets


def conversation_segments(
    conversation: Conversation, tokenizer: Any, template: bool
) -> list[Segment]:
    """Return the pieces of a conversation's text in order, each with whether it is a target.

    Args:
        conversation: the conversation.
        tokenizer: renders chats.
        template: whether what can do without the chat template goes through it all the same.

    Raises:
        ValueError: the chat can't be cut.
    """
    if conversation.plain is not None and not template:
        prompt, completion = conversation.plain
        return [(prompt, False), (completion, True)]
    return _chat_segments(conversation, tokenizer)


def _chat_segments(conversation: Conversation, tokenizer: Any) -> list[Segment]:
    """Cut a rendered chat at the beginning and the end of every reply of the assistant."""
    # Templates don't say where a reply lies in the text, so the chat's beginning is rendered twice
    # for each reply: up to the reply, and with it. The reply is what the second adds to the first.
    #
    #   whole    <user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>d</s>\n
    #   before   <user>a</s>\n<assistant>
    #   after    <user>a</s>\n<assistant>b</s>\n
    #   target                           b</s>
    messages = list(conversation.messages)

    def render(messages: Sequence[Message], **options: Any) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            tools=conversation.tools,
            tokenize=False,
            **conversation.template_options,
            **options,
        )
        return text

    whole = render(messages)
    segments: list[Segment] = []
    position = 0
    for index, is_target in enumerate(conversation.is_target):
        if not is_target:
            continue
        before = ""
        if index:
            before = render(messages[:index], add_generation_prompt=True)
        after = render(messages[: index + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                "the chat template writes earlier turns differently once later ones follow, so "
                "its replies can't be told apart; give each reply a row of its own"
            )
        reply_end = len(after.rstrip())  # a line break after the end of turn is nobody's reply
        segments += [(whole[position : len(before)], False), (whole[len(before) : reply_end], True)]
        position = reply_end
    return [*segments, (whole[position:], False)]
