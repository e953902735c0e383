"""Fields: which columns of a row hold its text, its chat and what goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Fields:
    """The names of the columns that a format reads; None or "" where it reads none.

    What a column holds decides on how it is read: a prompt may be text or a list of messages. Only
    the columns of `messages`, `prompt` and `completion` must be in every row.

    Attributes:
        messages: holds a chat: messages with `role` and `content` or `from` and `value`, pairs of
            human and assistant, or texts in turn.
        prompt: holds what comes before the completion.
        completion: holds the reply that is scored; the preferred one where there is another.
        input: holds text that belongs below the prompt: Alpaca's `input`, Dolly's `context`.
        system: holds the system message.
        history: holds earlier turns, pairs of prompt and reply.
        tools: holds the functions that the model may call.
        documents: holds texts that the model is to answer from, objects such as `{"title": str,
            "text": str}`.
        rejected: holds the reply that was not preferred, which is not scored.
        label: tells good completions from bad ones, which are scored alike.
        name: what the format is called, for messages.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    input: str | None = "input"
    system: str | None = "system"
    history: str | None = "history"
    tools: str | None = "tools"
    documents: str | None = "documents"
    rejected: str | None = None
    label: str | None = None
    name: str = field(default="columns named by you", compare=False)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Fields:
        """Return the fields that a store noted of its data, among other things.

        Example:
            >>> Fields.of({"source": "train.jsonl", "messages": "chat"}).messages
            'chat'
        """
        return cls(**{each.name: data[each.name] for each in fields(cls) if each.name in data})

    def columns(self) -> list[str]:
        """Return the names of all columns that are read or known."""
        names = (
            *(self.messages, self.prompt, self.input if self.prompt else None),
            *(self.completion, self.system),
            *(self.history, self.tools, self.documents_column()),
            *(self.rejected, self.label),
        )
        return [name for name in names if name]

    def documents_column(self) -> str | None:
        """Return the column of documents; those beside a bare text are nobody's."""
        return self.documents if self.prompt or self.messages else None
