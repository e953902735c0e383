"""Messages of any format in the form that chat templates take, and which of them are targets."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flowdata.text.conversation import Message
from flowdata.text.formats.flags import WEIGHTS, flags_of, flags_of_parts, is_target_by


class Turn(NamedTuple):
    """A message as chat templates take it.

    Attributes:
        message: its role and content.
        is_target: whether it is to be learned.
        flags: the weights and flags that it has in the data, by name.
    """

    message: Message
    is_target: bool
    flags: Mapping[str, Any] = MappingProxyType({})


_ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatbot", "chatgpt", "ai", "bing", "bard"),
    "system": ("system", "developer"),
    "tool": (
        *("tool", "observation", "observations", "tool_response", "function_response"),
        *("function", "ipython"),
    ),
    "call": ("function_call", "tool_call"),  # a reply whose content is the call
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_CONTENTS = ("content", "value", "text")
_SAYING = (*_CONTENTS, "tool_calls", "function_call")
_MAY_BE_CHAT = re.compile(r"""\s*(?:\[\s*)?\{.*["'](?:role|from)["']\s*:""", re.DOTALL)
_REASONING = ("reasoning_content", "reasoning", "thinking")
_BESIDE_CONTENT = ("tool_calls", "function_call", *WEIGHTS, *_REASONING)
_PAIR_NAMES = (
    *(("human", "assistant"), ("user", "assistant"), ("input", "output")),
    *(("question", "answer"), ("query", "response")),
)


def read_turns(value: Any) -> list[Turn]:
    """Return a chat's messages, each with whether it is a target: every reply, unless it says no.

    Args:
        value: a list of messages, of pairs or of texts in turn; one message; or any of these as
            JSON text.

    Raises:
        ValueError: something in it is no message, or has a role or a part that is not known.
    """
    value = parse(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        # Earlier versions of `datasets` kept a list of objects as an object of lists.
        is_turned = bool(value) and all(_is_list(column) for column in value.values())
        columns = zip(*value.values(), strict=True) if is_turned else ()
        value = [dict(zip(value, row, strict=True)) for row in columns] if is_turned else [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"a chat should be a list of messages, it is a {type(value).__name__}")
    turns: list[Turn] = []
    for number, item in enumerate(value):
        try:
            _add(turns, item, number)
        except (ValueError, TypeError) as error:
            raise ValueError(f"message {number}: {error}") from None
    return turns


def chat_in(value: Any) -> Any:
    """Return the chat that a text holds, as CSV files hold chats; any other value as it is.

    A reply may be JSON itself: only what is nothing but messages is taken for a chat.

    Example:
        >>> chat_in("[{'role': 'assistant', 'content': 'Yes.'}]")
        [{'role': 'assistant', 'content': 'Yes.'}]
        >>> chat_in('[{"role": "CEO", "name": "Ada"}]')
        '[{"role": "CEO", "name": "Ada"}]'
    """
    if not isinstance(value, str) or not _MAY_BE_CHAT.match(value):
        return value
    try:
        chat = parse(value)
    except ValueError:
        return value
    items = chat if isinstance(chat, list) else [chat]
    if not all(map(_is_message, items)):
        return value
    names = (item["from" if "from" in item else "role"] for item in items)
    return chat if any(map(_role_of, names)) else value


def _is_message(item: Any) -> bool:
    """Whether a value has the names of a message."""
    names = set(item) if isinstance(item, Mapping) else set()
    return not names.isdisjoint(("role", "from")) and not names.isdisjoint(_SAYING)


def parse(text: str) -> Any:
    """Return what a text holds as JSON, or as a Python literal, which CSV files often have."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"should hold JSON, it holds {text[:60]!r}") from None


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return tools in the form that chat templates take; None where there are none.

    Args:
        value: None, tools, one tool, or any of these as JSON text; a tool may be the bare function.
    """
    if isinstance(value, str) and value.strip():
        value = parse(value)
    if not value:
        return None
    tools = [value] if isinstance(value, Mapping) else list(value)
    return [_tool(parse(tool) if isinstance(tool, str) else tool) for tool in tools]


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise ValueError(f"a tool should be an object, it is a {type(tool).__name__}")
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}


def _add(turns: list[Turn], item: Any, number: int) -> None:
    """Append what one item of a chat says: a text, a message, or a pair of prompt and reply."""
    if isinstance(item, str):  # texts in turn, the user's first
        role = "assistant" if number % 2 else "user"
        turns.append(Turn({"role": role, "content": item}, role == "assistant"))
    elif not isinstance(item, Mapping):
        raise ValueError(f"should be an object, it is a {type(item).__name__}")
    elif "from" in item:
        _add_message(turns, item, "from", "value")
    elif "role" in item:
        _add_message(turns, item, "role", "content")
    else:
        _add_pair(turns, item)


def _add_pair(turns: list[Turn], item: Mapping[str, Any]) -> None:
    """Append a prompt and its reply, which one object holds, and its system message if any."""
    pair = next((names for names in _PAIR_NAMES if all(name in item for name in names)), None)
    if pair is None:
        raise ValueError(f"has no role; there are {', '.join(map(repr, item)) or 'no names'}")
    prompt, reply = pair
    if item.get("system"):
        turns.append(Turn({"role": "system", "content": _text(item["system"])}, False))
    turns.append(Turn({"role": "user", "content": _text(item[prompt])}, False))
    message, flags = {"role": "assistant", "content": _text(item[reply])}, flags_of(item)
    turns.append(Turn(message, is_target_by(flags, "assistant"), flags))


def _content_name(item: Mapping[str, Any], usual: str) -> str:
    """The name of a message's content; a message may not say two things under two names."""
    there = [name for name in dict.fromkeys((usual, *_CONTENTS)) if name in item]
    name, *others = [name for name in there if item[name]] or there or [usual]
    for other in others:
        if item[other] != item[name]:
            raise ValueError(f"{name!r} and {other!r} say different things; leave one of them out")
    return name


def _add_message(turns: list[Turn], item: Mapping[str, Any], role_name: str, usual: str) -> None:
    """Append a message.

    Args:
        turns: the chat so far.
        item: the message.
        role_name: the name of its role.
        usual: the name that its content has beside this one.
    """
    content_name = _content_name(item, usual)
    role, content = _role_of(item[role_name]), item.get(content_name)
    if role is None:
        raise ValueError(f"role {item[role_name]!r} is not known; there are {', '.join(_ROLE_OF)}")
    if role == "user" and _is_list(content) and content:
        content = _without_results(turns, content)
        if not content:  # it held nothing else
            return
    message = _for_templates(role, content, item)
    if content is None and len(message) == 2:  # no more than a role and empty content
        raise ValueError(f"has no content; there are {', '.join(map(repr, item))}")
    if item.get("train_detail"):
        raise ValueError("train_detail trains parts of a text; whole replies are scored alone")
    flags = flags_of_parts(content) | flags_of(item)
    turn = Turn(message, is_target_by(flags, message["role"]), flags)
    if role == "call" and turns and turns[-1].message["role"] == "assistant":
        turns[-1] = _with_call(turns[-1], turn)
        return
    known = {role_name, content_name, *_BESIDE_CONTENT}
    rest = {name: value for name, value in item.items() if name not in known and value is not None}
    turns.append(turn._replace(message=rest | message))


def _role_of(name: Any) -> str | None:
    """The role by its name in any format: one of `_ROLES`; None of another name."""
    return _ROLE_OF.get(str(name).lower().replace("-", "_"))


def _for_templates(role: str, content: Any, item: Mapping[str, Any]) -> Message:
    """What chat templates read of a message: role and content, and a reply's calls and reasoning.

    Args:
        role: one of `_ROLES`.
        content: what is left of its content.
        item: the message, which may hold calls and reasoning beside its content.
    """
    message: Message
    if role == "call":
        message = {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    else:
        message = {"role": role}
        _put_content(message, content)
        if calls := item.get("tool_calls") or item.get("function_call"):
            message["tool_calls"] = message.get("tool_calls", []) + _calls(calls)
    reasoning = next((item[name] for name in _REASONING if item.get(name)), None)
    if reasoning is not None:
        message["reasoning_content"] = _text(reasoning)
    return message


def _with_call(reply: Turn, call: Turn) -> Turn:
    """A reply with the call after it: models write a text and its calls as one reply.

    Args:
        reply: the last turn, a text or another call.
        call: one whose message holds the call alone.
    """
    if call.is_target != reply.is_target and call.flags:  # and not by the rule for all replies
        raise ValueError("is one reply with the message before, and only one is to be learned")
    message, added = dict(reply.message), call.message
    for name in ("tool_calls", "reasoning_content"):
        if name in added:
            message[name] = message.get(name, type(added[name])()) + added[name]
    flags = dict(reply.flags)
    for name, weight in call.flags.items():
        flags[name] = min(weight, flags.get(name, weight))
    return Turn(message, reply.is_target, flags)


def _without_results(turns: list[Turn], parts: list[Any]) -> list[Any]:
    """Append what tools gave back, which Anthropic's messages of the user hold as parts."""
    others = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "tool_result":
            others.append(part)
            continue
        result: Message = {"role": "tool"}
        if part.get("tool_use_id"):
            result["tool_call_id"] = part["tool_use_id"]
        _put_content(result, part.get("content"))
        turns.append(Turn(result, False))
    return others


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _put_content(message: Message, content: Any) -> None:
    """Set a message's content, and what its parts hold beside text."""
    if not _is_list(content):
        message["content"] = _text(content)
        return
    texts: list[str] = []
    are_usual = True
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping):
            raise ValueError(f"a part should be an object, it is a {type(part).__name__}")
        kind = part.get("type", "text")
        value = next((part[name] for name in ("text", "value", kind) if part.get(name)), "")
        if kind in ("text", "input_text", "output_text"):
            texts.append(_text(value))
            are_usual &= "value" not in part
        elif kind in ("reasoning", "thinking"):
            message["reasoning_content"] = message.get("reasoning_content", "") + _text(value)
        elif kind == "tool_call":
            message["tool_calls"] = message.get("tool_calls", []) + _calls(value)
        elif kind == "tool_use":
            call = {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
            message["tool_calls"] = message.get("tool_calls", []) + _calls(call)
        else:
            raise ValueError(f"a part of type {kind!r} can't be read: text is scored alone")
    # LLaMA-Factory's parts, which have a `value`, are pieces of one text.
    usual = [{"type": "text", "text": text} for text in texts]
    message["content"] = usual if usual and are_usual else "".join(texts)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls: one or several, bare functions or not, as objects or as JSON text."""
    value = parse(value) if isinstance(value, str) else value
    calls = []
    for call in [value] if isinstance(value, Mapping) else value or []:
        if not isinstance(call, Mapping):
            raise ValueError(f"a tool call should be an object, it is a {type(call).__name__}")
        function = call.get("function") or call
        if not function.get("name"):
            raise ValueError("a tool call has no name")
        arguments = function.get("arguments")
        if arguments is None:
            arguments = function.get("parameters")
        if isinstance(arguments, str):
            try:
                arguments = parse(arguments) if arguments.strip() else {}
            except ValueError as error:
                raise ValueError(f"arguments of the call of {function['name']!r} {error}") from None
        calls.append(
            {
                **({"id": call["id"]} if call.get("id") else {}),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments or {}},
            }
        )
    return calls


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping | list):  # what a tool gave back, as an object
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise ValueError(f"the content should be text, it is a {type(value).__name__}")
    return value
