"""Which format a row has: the columns that hold its text, found by their usual names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from flowdata.text.conversation import Row
from flowdata.text.formats.fields import Fields

# Columns of what is no text, as `images`, `image_path` and `videos` are.
MEDIA = re.compile(
    r"(?:image|img|photo|video|audio)s?(?:_?(?:path|file|url|uri|bytes|data)s?)?"
    r"|pixel_values|input_features|input_values"
)
CHAT_TEMPLATE_OPTIONS = "chat_template_kwargs"

# The names that prompts go under, and those of the replies that go with each, the likelier first.
# The order is that of preference: `input` is the prompt only where no `instruction` is.
PAIRS = {
    "prompt": ("completion", "response", "output", "answer", "reply", "target"),
    "instruction": ("output", "response", "completion", "answer"),
    "question": ("answer", "response", "output", "solution"),
    "query": ("response", "answer", "output"),
    "problem": ("solution", "generated_solution", "answer"),
    "user": ("assistant",),
    "human": ("assistant",),
    "source": ("target",),
    "inputs": ("targets", "outputs"),
    "input": ("output", "target", "response", "completion", "answer"),
    "context": ("response", "completion"),
}
PREFERENCE_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "inputs")
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
TEXTS = ("text", "content", "completion", "response")
# Columns that go with a prompt or a chat, by the attribute of Fields: the usual names of each.
COMPANIONS = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "documents": ("documents",),
    "rejected": ("rejected_response", "rejected_messages", "rejected"),
}
_LABELS = ("label", "kto_tag")
CHOSEN = {"chosen": "rejected", "preferred_output": "non_preferred_output"}
_TEXT = "plain text"
_MESSAGE = {"role": {"content", "text", "value"}, "from": {"value", "content"}}
_MOST_NAMES = 24  # of columns in a message
_KNOWN = {*PAIRS, *CHATS, *TEXTS, "chosen", "completion", "response", "output", "answer"}


def find_fields(row: Row, fields: Fields | None = None) -> Fields:
    """Return the columns to read: those that are named, the others by the usual names in the row.

    Args:
        row: any row of the data set.
        fields: the names that the user gave, if any. An empty name reads no such column.

    Raises:
        ValueError: a column that is named is missing, or the row has none of the usual names.

    Example:
        >>> fields = find_fields({"instruction": "Add.", "input": "2, 2", "output": "4"})
        >>> fields.prompt, fields.input, fields.completion, fields.name
        ('instruction', 'input', 'output', 'Alpaca')
    """
    fields = fields or Fields()
    texts = [name for name in (fields.messages, fields.prompt, fields.completion) if name]
    others = [getattr(fields, name) for name in COMPANIONS if not _is_default(fields, name)]
    absent = next((name for name in (*texts, *others) if name and name not in row), None)
    if absent is not None:
        raise ValueError(f"column {absent!r} is missing; there are {_names_of(row)}")
    if fields.prompt and not fields.completion:
        raise ValueError("a prompt column needs a completion column beside it")
    names = {str(name).lower(): str(name) for name in row}
    if not texts:
        usual = _preference(names) or _chat(names, row) or _pair(names) or _text(names)
        if usual is None:
            raise ValueError(_unknown(row))
        if usual.name == _TEXT and _is_message(names):
            raise ValueError(
                f"the rows are messages, with {_names_of(row)}: a row should be a whole chat, such "
                'as {"messages": […]}, or name the column of text that is scored by itself '
                "(--completion-column)"
            )
        fields = replace(
            fields,
            messages=usual.messages,
            prompt=usual.prompt,
            completion=usual.completion,
            rejected=fields.rejected or usual.rejected,
            name=usual.name,
        )
    _refuse_ignored(fields)
    return _with_companions(fields, names, row)


def _refuse_ignored(fields: Fields) -> None:
    """Raise ValueError for a column that is named, and that would not be read beside the others."""
    if fields.messages and fields.prompt:
        raise ValueError(
            f"messages={fields.messages!r} and prompt={fields.prompt!r} both hold what comes "
            "before a reply; name one of them"
        )
    homes = {
        "input": (fields.prompt, "a prompt"),
        "documents": (fields.prompt or fields.messages, "a prompt or a chat"),
    }
    for companion, (home, in_words) in homes.items():
        column = getattr(fields, companion)
        if column and not home and not _is_default(fields, companion):
            raise ValueError(
                f"{companion}={column!r} goes with {in_words}, and the rows have none (format: "
                f"{fields.name}); leave it out"
            )


def _is_default(fields: Fields, companion: str) -> bool:
    """Whether the user left it to the usual names which column goes with the text."""
    return bool(getattr(fields, companion) == getattr(Fields(), companion))


def _is_message(names: Collection[str]) -> bool:
    """Whether an object with such names is one message of a chat."""
    return any(
        role in names and not content.isdisjoint(names) for role, content in _MESSAGE.items()
    )


def _preference(names: Mapping[str, str]) -> Fields | None:
    """A preference set: two replies to a prompt, of which the chosen one is scored."""
    for preferred, other in CHOSEN.items():
        if preferred not in names or other not in names:
            continue
        replies = {"completion": names[preferred], "rejected": names[other]}
        if preferred == "preferred_output" and "input" in names:
            return Fields(messages=names["input"], name="OpenAI preference", **replies)
        prompt = _first(PREFERENCE_PROMPTS, names)
        if prompt:
            return Fields(prompt=prompt, name="preference", **replies)
        if chat := _first(CHATS, names):
            return Fields(messages=chat, name="preference (chat)", **replies)
        return Fields(name="preference (prompt within the replies)", **replies)
    if "chosen_messages" in names:
        chosen, rejected = names["chosen_messages"], names.get("rejected_messages")
        return Fields(messages=chosen, rejected=rejected, name="LLaMA-Factory v1 pairs")
    return None


def _chat(names: Mapping[str, str], row: Row) -> Fields | None:
    chats = [names[name] for name in CHATS if name in names]
    chat = next((name for name in chats if _is_chat(row[name])), None)
    return None if chat is None else Fields(messages=chat, name=_chat_name(row[chat]))


def _is_chat(value: Any) -> bool:
    """Whether a column holds a chat, which CSV files hold as JSON text."""
    text_like = isinstance(value, str) and not value.lstrip().startswith(("[", "{"))
    return not text_like


def _chat_name(value: Any) -> str:
    first = value[0] if isinstance(value, Sequence) and len(value) else None
    if isinstance(first, str):
        return "chat of texts in turn" if not isinstance(value, str) else "chat as JSON text"
    if not isinstance(first, Mapping):
        return "chat"
    if "from" in first:
        return "ShareGPT"
    if "role" not in first:
        return "chat of pairs"
    content = first.get("content")
    part = content[0] if isinstance(content, list) and content else None
    is_v1 = isinstance(part, Mapping) and "value" in part
    return "LLaMA-Factory v1" if is_v1 else "OpenAI or TRL chat"


def _pair(names: Mapping[str, str]) -> Fields | None:
    for prompt, replies in PAIRS.items():
        reply = _first(replies, names)
        if prompt in names and reply:
            return Fields(
                prompt=names[prompt], completion=reply, name=f"{prompt} and {reply.lower()}"
            )
    return None


def _text(names: Mapping[str, str]) -> Fields | None:
    text = _first(TEXTS, names)
    return Fields(completion=text, name=_TEXT) if text else None


def _with_companions(fields: Fields, names: Mapping[str, str], row: Row) -> Fields:
    """The fields with the columns that go with them, unless the user named them.

    A column that the row lacks may come later: its likeliest name is kept.
    """
    texts = {fields.messages, fields.prompt, fields.completion}
    others = {name: column for name, column in names.items() if column not in texts}
    companions: dict[str, Any] = {}
    for companion, usual in COMPANIONS.items():
        goes_with = fields.prompt if companion == "input" else fields.prompt or fields.messages
        always = companion in ("system", "history", "tools")
        if _is_default(fields, companion) and (goes_with or always):
            column = _first(usual, others)
            if column is None and companion != "rejected" and usual[0] not in texts:
                column = usual[0]
            companions[companion] = column
    label = _first(_LABELS, names)
    if label and _is_flag(row[label]) and (fields.prompt or fields.messages):
        companions["label"] = label
    fields = replace(fields, **companions)
    return replace(fields, name=_name(fields, row))


def _is_flag(value: Any) -> bool:
    """Whether a label is true or false, which CSV files hold as text."""
    return isinstance(value, bool) or (
        isinstance(value, str) and value.lower() in ("true", "false")
    )


def _name(fields: Fields, row: Row) -> str:
    """What a format is called, once its companions are known."""
    if fields.label and not fields.name.startswith("KTO"):
        return f"KTO ({fields.name})"
    if fields.rejected and "preference" not in fields.name:
        return f"preference ({fields.name})"
    if fields.name == "instruction and output":
        return "Alpaca"
    if fields.name == "instruction and response" and "context" in row:
        return "Dolly"
    return fields.name


def _first(candidates: Sequence[str], names: Mapping[str, str]) -> str | None:
    return next((names[name] for name in candidates if name in names), None)


def _unknown(row: Row) -> str:
    """What to say of a row of an unknown shape: its columns, the flags, the closest format."""
    prompts = [str(name) for name in row if str(name).lower() in PAIRS]
    close = [
        (name, known)
        for name in map(str, row)
        for known in difflib.get_close_matches(name.lower(), _KNOWN, n=1, cutoff=0.5)
        if name.lower() != known
    ]
    texts = [name for name in row if isinstance(row[name], str)]
    chats = [str(name) for name in row if _may_be_chat(row[name])]
    if "input_ids" in row:
        closest = "; its rows are tokens already: LossScorer scores them in Python"
    elif prompts:
        replies = " or ".join(map(repr, PAIRS[prompts[0].lower()][:3]))
        closest = f"; closest: a pair, with {prompts[0]!r} as its prompt and no {replies}"
    elif close:
        closest = "; closest: " + ", ".join(f"{name!r} to {known!r}" for name, known in close[:3])
    elif chats:
        closest = f"; closest: a chat in {chats[0]!r}"
    elif len(texts) > 1:
        closest = f"; closest: a pair, {texts[0]!r} and {texts[1]!r}"
        if others := {name: row[name] for name in row if name not in texts[:2]}:
            closest += (
                f" ({_names_of(others)} would not be read; if one of several answers is right, "
                "write it into a column of its own first)"
            )
    else:
        closest = ""
    return (
        f"no known text columns among {_names_of(row)}{closest}; name them (prompt and completion, "
        "messages, or completion alone: --prompt-column, --completion-column, --messages-column)"
    )


def _may_be_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _names_of(row: Row) -> str:
    names = ", ".join(map(repr, islice(row, _MOST_NAMES))) or "none"
    return names + f" and {len(row) - _MOST_NAMES:,} more" * (len(row) > _MOST_NAMES)
