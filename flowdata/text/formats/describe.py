"""What is said of a format: its columns, what is scored, and what is left out."""

from __future__ import annotations

from flowdata.text.conversation import Row
from flowdata.text.formats.fields import Fields
from flowdata.text.formats.find import CHAT_TEMPLATE_OPTIONS, MEDIA
from flowdata.text.formats.messages import chat_in


def read_columns(row: Row, fields: Fields) -> list[str]:
    """Return the columns of a row that a format reads."""
    known = {*fields.columns(), CHAT_TEMPLATE_OPTIONS}
    not_scored = {fields.rejected, fields.label}
    return [name for name in row if name in known - not_scored]


def deciding_columns(fields: Fields) -> list[str]:
    """Return the columns that decide on a row's tokens and targets, in rows that have them.

    Without a prompt of its own, a preferred reply begins where it parts from the other one.

    Example:
        >>> deciding_columns(Fields(prompt="q", completion="a", label="good"))
        ['q', 'input', 'a', 'system', 'history', 'tools', 'documents', 'chat_template_kwargs']
    """
    known = [*fields.columns(), CHAT_TEMPLATE_OPTIONS]
    not_scored = {fields.label, fields.rejected if fields.prompt else None}
    return [name for name in known if name not in not_scored]


def unread_columns(row: Row, fields: Fields) -> list[str]:
    """Return the columns of a row that play no part; media are no such: they are refused."""
    known = {*read_columns(row, fields), fields.rejected, fields.label}
    return [name for name in row if name not in known and not MEDIA.fullmatch(name.lower())]


def scored_part(row: Row, fields: Fields) -> str:
    """Return which part of a row is scored, in words.

    Example:
        >>> fields = Fields(prompt="prompt", completion="chosen", rejected="rejected")
        >>> scored_part({}, fields)
        "the preferred reply ('chosen'), and not the one in 'rejected'"
    """
    if fields.rejected:
        preferred = fields.completion or fields.messages
        return f"the preferred reply ({preferred!r}), and not the one in {fields.rejected!r}"
    if fields.messages:
        replies = "last reply" if fields.label else "replies"
        part = f"the assistant's {replies} in {fields.messages!r}"
    elif fields.prompt or not isinstance(chat_in(row.get(fields.completion or "")), str):
        part = f"the reply in {fields.completion!r}"
        if fields.history and row.get(fields.history) and not fields.label:
            part += f", and those in {fields.history!r}"
    else:
        part = f"all of the text in {fields.completion!r}"
    return part + (f", whatever {fields.label!r} says" if fields.label else "")
