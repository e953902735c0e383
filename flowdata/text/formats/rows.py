"""Rows to conversations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from flowdata.text.conversation import Conversation, Row
from flowdata.text.formats.fields import Fields
from flowdata.text.formats.find import CHAT_TEMPLATE_OPTIONS, COMPANIONS, MEDIA
from flowdata.text.formats.messages import Turn, chat_in, parse, read_tools, read_turns


def read_conversation(row: Row, fields: Fields) -> Conversation:
    """Return what a row says.

    Args:
        row: the row.
        fields: the columns to read, as `find_fields` returns them.

    Raises:
        ValueError: the row lacks a column or holds something else than text or a chat there, has
            nothing to score, or holds images, sound or video.

    Example:
        >>> fields = Fields(prompt="instruction", input="input", completion="output")
        >>> row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
        >>> conversation = read_conversation(row, fields)
        >>> conversation.messages[0], conversation.plain
        ({'role': 'user', 'content': 'Add.\\n2, 2'}, ('Add.\\n2, 2', '4'))
    """
    _refuse_unread(row, fields)
    row = _with_chats(row, fields)
    tools, documents = _tools(row, fields), _documents(row, fields)
    system = _optional(row, fields.system)
    turns, plain = (_chat(row, fields), None) if fields.messages else _pair(row, fields)
    turns = _history(row, fields) + turns
    if _holds(system):
        turns = _with_system(turns, system, fields.system or "")
    if not any(turn.is_target for turn in turns):
        raise ValueError(
            "the chat has no message with role 'assistant' that is to be learned, so it has no "
            "target"
        )
    needs_template = len(turns) > 2 or _holds(system) or tools or documents
    return Conversation(
        messages=tuple(turn.message for turn in turns),
        is_target=tuple(turn.is_target for turn in turns),
        flags=tuple(turn.flags for turn in turns),
        tools=tools,
        template_options=_template_options(row),
        num_prompt=_num_prompt(row, fields, turns),
        plain=None if needs_template else plain,
        documents=documents,
    )


def _with_chats(row: Row, fields: Fields) -> Row:
    """The row with the chats that stand in its columns as text, as CSV files hold them."""
    columns = [name for name in (fields.prompt, fields.completion, fields.rejected) if name in row]
    return {**row, **{str(name): chat_in(row[str(name)]) for name in columns}}


def _tools(row: Row, fields: Fields) -> list[dict[str, Any]] | None:
    """The functions that the model may call: those of their column, or those within the chat."""
    with _naming(fields.tools):
        tools = read_tools(_optional(row, fields.tools))
    chat = _optional(row, fields.messages)
    return tools or (read_tools(chat.get("tools")) if _is_wrapped(chat) else None)


def _is_wrapped(chat: Any) -> bool:
    """Whether a chat is an object with messages and tools, as in OpenAI's preference sets."""
    return isinstance(chat, Mapping) and "messages" in chat


def _num_prompt(row: Row, fields: Fields, turns: Sequence[Turn]) -> int:
    """How many turns are the prompt, in a row that has prompt and completion apart, as messages."""
    is_apart = not fields.messages and fields.prompt and not isinstance(row[fields.prompt], str)
    return len(turns) - len(_reply(row[fields.completion or ""])) if is_apart else 0


def _template_options(row: Row) -> dict[str, Any]:
    """The row's own values for the template's variables."""
    with _naming(CHAT_TEMPLATE_OPTIONS):
        options = _parsed(_optional(row, CHAT_TEMPLATE_OPTIONS)) or {}
        if not isinstance(options, Mapping):
            raise ValueError(f"should hold an object, it holds {_kind(options)}")
    return dict(options)


def _documents(row: Row, fields: Fields) -> list[dict[str, Any]]:
    """What the model is to answer from, as chat templates take it."""
    with _naming(fields.documents):
        documents = _parsed(_optional(row, fields.documents_column())) or []
        are_many = isinstance(documents, list | tuple)
        if not are_many or not all(isinstance(each, Mapping) for each in documents):
            raise ValueError(
                'should hold objects, such as {"title": "…", "text": "…"} each; an empty name '
                "reads none (documents='')"
            )
    return [dict(document) for document in documents]


@contextmanager
def _naming(column: str | None) -> Iterator[None]:
    """Name a column in what is said of it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"column {column!r}: {error}") from None


def _parsed(value: Any) -> Any:
    return parse(value) if isinstance(value, str) and value.strip() else value


def _refuse_unread(row: Row, fields: Fields) -> None:
    """Raise ValueError for a column that would belong to the text, and isn't read: `context`."""
    for name, companion in _unread(tuple(row), fields):
        if not _holds(row[name]):
            continue
        if companion is None:
            raise ValueError(
                f"column {name!r} holds something, and text is scored alone: score such rows with "
                "LossScorer and the model's processor, in Python, or take the column out"
            )
        raise ValueError(
            f"column {name!r} holds something, and is not read: name it ({companion}={name!r}), or "
            f"name an empty one ({companion}='')"
        )


@functools.lru_cache  # nearly all rows of a data set have the same columns
def _unread(names: tuple[str, ...], fields: Fields) -> list[tuple[str, str | None]]:
    """The columns that go with the text and are not read: each with what it would be, or None.

    None stands for images, sound and video.
    """
    goes_with = {"input": fields.prompt, "documents": fields.documents_column()}
    companions = {
        name: companion
        for companion, usual in COMPANIONS.items()
        if getattr(fields, companion) != "" and goes_with.get(companion, True)
        for name in usual
    }
    known = {*fields.columns(), fields.label}
    unread: list[tuple[str, str | None]] = []
    for name in names:
        usual_name = str(name).lower()  # another case may first come late in the data
        if name not in known and (usual_name in companions or MEDIA.fullmatch(usual_name)):
            unread.append((name, companions.get(usual_name)))
    return unread


def _chat(row: Row, fields: Fields) -> list[Turn]:
    """The turns of a column that holds a chat, alone or beside other replies to it."""
    chat = _required(row, fields.messages or "")
    turns = read_turns(chat["messages"] if _is_wrapped(chat) else chat)
    if fields.completion:
        return [*_context(turns), *_reply(_required(row, fields.completion))]
    if fields.rejected:
        return _after_common_beginning(turns, row.get(fields.rejected))
    return _last_reply(turns) if fields.label else turns


def _pair(row: Row, fields: Fields) -> tuple[list[Turn], tuple[str, str] | None]:
    """A prompt and its completion, as messages and, where both are text, as text."""
    if not fields.prompt:
        return _completion_alone(row, fields)
    completion, prompt = _required(row, fields.completion or ""), _required(row, fields.prompt)
    for column in (fields.prompt, fields.completion):
        _refuse_texts(row, column or "")
    if not isinstance(prompt, str):
        if _holds(_optional(row, fields.input)):
            raise ValueError(f"column {fields.input!r} holds something, and the prompt is a chat")
        return [*_context(read_turns(prompt)), *_reply(completion)], None
    prompt = _with_input(row, prompt, fields)
    if isinstance(completion, str):
        return [_question(prompt), _answer(completion)], (prompt, completion)
    return _chat_to(prompt, read_turns(completion), row, fields), None


def _completion_alone(row: Row, fields: Fields) -> tuple[list[Turn], tuple[str, str] | None]:
    """The same of a row without a prompt's column: what a rejected reply shares is the prompt."""
    completion = _required(row, fields.completion or "")
    rejected = _optional(row, fields.rejected)
    if not isinstance(completion, str):
        return _after_common_beginning(read_turns(completion), rejected), None
    prompt, reply = _split(completion, rejected) if isinstance(rejected, str) else ("", completion)
    return [_question(prompt)] * bool(prompt) + [_answer(reply)], (prompt, reply)


def _chat_to(prompt: str, turns: list[Turn], row: Row, fields: Fields) -> list[Turn]:
    """A prompt that is text, and its completion's turns, which may be a whole chat with it."""
    questions = [turn.message["content"] for turn in turns if turn.message["role"] == "user"]
    if not questions:
        return [_question(prompt), *turns]
    if prompt not in questions:
        raise ValueError(
            f"column {fields.completion!r} holds a chat without the text of {fields.prompt!r}; "
            f"name one of them (--messages-column {fields.completion})"
        )
    return _after_common_beginning(turns, _optional(row, fields.rejected))


def _refuse_texts(row: Row, column: str) -> None:
    """Raise ValueError for several texts, of which it is not said what each of them is."""
    value = row[column]
    if _is_texts(value):
        raise ValueError(
            f"column {column!r} should hold one text or a list of messages, it holds a list of "
            "texts; make one of them the text"
        )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, str) for item in value)


def _split(chosen: str, rejected: str) -> tuple[str, str]:
    """The prompt that two texts begin with, and the chosen reply."""
    pairs = zip(chosen, rejected, strict=False)
    begin = chosen[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]
    # Replies may begin alike. HH-RLHF's say where they begin; elsewhere it is after a line or word.
    mark = begin.rfind("Assistant:") + len("Assistant:")
    end = mark if mark >= len("Assistant:") else max(begin.rfind("\n"), begin.rfind(" ")) + 1
    return chosen[:end], chosen[end:]


def _question(text: str) -> Turn:
    return Turn({"role": "user", "content": text}, is_target=False)


def _answer(text: str) -> Turn:
    return Turn({"role": "assistant", "content": text}, is_target=True)


def _with_input(row: Row, prompt: str, fields: Fields) -> str:
    """The prompt with its input below, as LLaMA-Factory and ms-swift write it."""
    value = _optional(row, fields.input if fields.input != fields.prompt else None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {fields.input!r} should hold text, it holds {_kind(value)}")
    return "\n".join(text for text in (prompt, value) if text)


def _context(turns: Sequence[Turn]) -> list[Turn]:
    """Turns of a prompt, which are no targets."""
    return [turn._replace(is_target=False) for turn in turns]


def _reply(value: Any) -> list[Turn]:
    return [_answer(value)] if isinstance(value, str) else read_turns(value)


def _after_common_beginning(turns: list[Turn], rejected: Any) -> list[Turn]:
    """A chosen chat whose targets are those after what it shares with the rejected one."""
    if rejected is None:
        return turns
    if isinstance(rejected, str):
        return _last_reply(turns)
    pairs = zip(turns, read_turns(rejected), strict=False)
    num_common = sum(1 for _ in takewhile(lambda pair: pair[0].message == pair[1].message, pairs))
    return _targets_from(turns, num_common) if num_common < len(turns) else _last_reply(turns)


def _last_reply(turns: list[Turn]) -> list[Turn]:
    """A chat of which the reply is judged: only what follows the last question is a target."""
    users = [n for n, turn in enumerate(turns) if turn.message["role"] in ("user", "tool")]
    return _targets_from(turns, users[-1] + 1 if users else 0)


def _targets_from(turns: list[Turn], start: int) -> list[Turn]:
    return [*_context(turns[:start]), *turns[start:]]


def _history(row: Row, fields: Fields) -> list[Turn]:
    """Earlier turns; their replies are targets, too, unless the row is a preference."""
    with _naming(fields.history):
        history = _parsed(_optional(row, fields.history))
    turns: list[Turn] = []
    for pair in history or []:
        if isinstance(pair, Mapping):
            turns += read_turns([pair])
            continue
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"column {fields.history!r} should hold pairs of prompt and reply")
        turns += read_turns(list(pair))
    return _context(turns) if fields.rejected or fields.label else turns


def _with_system(turns: list[Turn], system: Any, column: str) -> list[Turn]:
    if not isinstance(system, str):
        raise ValueError(f"column {column!r} should hold text, it holds {_kind(system)}")
    if not turns or turns[0].message["role"] != "system":
        return [Turn({"role": "system", "content": system}, is_target=False), *turns]
    if turns[0].message["content"] != system:
        raise ValueError(f"column {column!r} and the chat's own system message differ")
    return turns


def _required(row: Row, column: str) -> Any:
    value = row.get(column)
    if not isinstance(value, str | list | tuple | Mapping):
        content = _kind(value) if column in row else "nothing"
        raise ValueError(f"column {column!r} should hold text, it holds {content}")
    return value


def _optional(row: Row, column: str | None) -> Any:
    return row.get(column) if column else None


def _holds(value: Any) -> bool:
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
