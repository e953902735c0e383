"""A conversation: what a row says, whatever the format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowdata._common.excerpts import FROM_0

Row = Mapping[str, Any]
Message = dict[str, Any]
LEFT_OUT = "; on_error='skip' leaves such rows without a loss"  # ends a message on one of them


def why_unreadable(number: int, error: Exception) -> str:
    """Return which row can't be read, and why.

    Example:
        >>> why_unreadable(3, ValueError("it holds nothing"))
        'row 3: it holds nothing; rows count from 0'
    """
    return f"row {number}: {error}; {FROM_0}"


@dataclass(frozen=True)
class Conversation:
    """A row's messages in the form that chat templates take, and which of them are targets.

    Formats make conversations of rows (`flowdata.text.formats`), and nothing after them looks at a
    row again: templates make tokens of conversations.

    Attributes:
        messages: each has `role` (system, user, assistant or tool) and `content`: a string, or a
            list of `{"type": "text", "text": str}` where the row has parts. A reply may have
            `reasoning_content` (str) and `tool_calls`, a list of `{"type": "function", "function":
            {"name": str, "arguments": dict}}`. Further keys of the row's message are kept.
        is_target: one a message: whether its tokens are targets. Only replies can be.
        tools: functions that the model may call, `{"type": "function", "function": {...}}` each;
            None where there are none.
        template_options: further names for the chat template, the row's `chat_template_kwargs`.
        documents: what the model is to answer from, objects such as `{"title": str, "text": str}`.
        num_prompt: how many messages, from the first, are the prompt of a row that has prompt and
            completion apart, both as messages; 0 where the row is one chat, or is text.
        flags: one a message: the weights and flags that it has in the data, by name.
        plain: prompt and completion as bare text, where the row can do without a chat template;
            None where it is a chat, which can't.
    """

    messages: tuple[Message, ...]
    is_target: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    documents: list[dict[str, Any]] = field(default_factory=list)
    num_prompt: int = 0
    flags: tuple[Mapping[str, Any], ...] = ()
    plain: tuple[str, str] | None = None
