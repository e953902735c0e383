"""Messages of any format in the form that chat templates take, and which of them are targets."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flowdata._common.notices import warn_once
from flowdata.text.conversation import Message

Turn = tuple[Message, bool]  # a message, and whether it is a target

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
_WEIGHTS = ("weight", "loss_weight", "loss_scale", "train", "training", "loss")
_CONTENTS = ("content", "value", "text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_BESIDE_CONTENT = ("tool_calls", "function_call", *_WEIGHTS, *_REASONING)
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


def weight_of(item: Mapping[str, Any], name: str) -> float:
    """Return the weight that a message has already, 1 without any.

    Args:
        item: a message of a row.
        name: the field that is asked for first; else the smallest of the others counts.

    Example:
        >>> weight_of({"role": "assistant", "weight": 0.5, "train": True}, "loss_weight")
        0.5
    """
    flags = _flags_of_parts(item.get("content")) | _flags(item)
    return float(flags.get(name, min(flags.values(), default=1.0)))


def parse(text: str) -> Any:
    """Return what a text holds as JSON, or as a Python literal, which CSV files often have."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
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
        turns.append(({"role": role, "content": item}, role == "assistant"))
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
        turns.append(({"role": "system", "content": _text(item["system"])}, False))
    turns.append(({"role": "user", "content": _text(item[prompt])}, False))
    is_target = _is_target(_flags(item), "assistant")
    turns.append(({"role": "assistant", "content": _text(item[reply])}, is_target))


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
    role, content = _role(item[role_name]), item.get(content_name)
    if role == "user" and _is_list(content) and content:
        content = _without_results(turns, content)
        if not content:  # it held nothing else
            return
    message = _for_templates(role, content, item)
    if content is None and len(message) == 2:  # no more than a role and empty content
        raise ValueError(f"has no content; there are {', '.join(map(repr, item))}")
    if item.get("train_detail"):
        raise ValueError("train_detail trains parts of a text; whole replies are scored alone")
    flags = _flags_of_parts(content) | _flags(item)
    is_target = _is_target(flags, message["role"])
    if role == "call" and turns and turns[-1][0]["role"] == "assistant":
        _join_call(turns[-1], message, is_target=is_target, says_so=bool(flags))
        return
    known = {role_name, content_name, *_BESIDE_CONTENT}
    rest = {name: value for name, value in item.items() if name not in known and value is not None}
    turns.append((rest | message, is_target))


def _role(name: Any) -> str:
    """The role by its name in any format: one of `_ROLES`."""
    role = _ROLE_OF.get(str(name).lower().replace("-", "_"))
    if role is None:
        raise ValueError(f"role {name!r} is not known; there are {', '.join(_ROLE_OF)}")
    return role


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


def _join_call(reply: Turn, call: Message, *, is_target: bool, says_so: bool) -> None:
    """Add a call to the reply before it: models write a text and its calls as one reply.

    Args:
        reply: the last turn, a text or another call.
        call: the message that holds the call alone.
        is_target: whether the call is to be learned.
        says_so: whether a weight or flag of the call says that, and not the rule for all replies.
    """
    message, is_target_before = reply
    if is_target != is_target_before and says_so:
        raise ValueError("is one reply with the message before, and only one is to be learned")
    for name in ("tool_calls", "reasoning_content"):
        if name in call:
            message[name] = message.get(name, type(call[name])()) + call[name]


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
        turns.append((result, False))
    return others


def _flags(item: Mapping[str, Any]) -> dict[str, Any]:
    """The weights and flags that a message, or a part of one, has."""
    return {name: item[name] for name in _WEIGHTS if item.get(name) is not None}


def _flags_of_parts(content: Any) -> dict[str, Any]:
    """The weight or flag that all parts of a message share."""
    parts = [part for part in content if isinstance(part, Mapping)] if _is_list(content) else []
    flags = [_flags(part) for part in parts]
    if any(other != flags[0] for other in flags):
        raise ValueError("its parts have different weights; whole replies are scored alone")
    return flags[0] if flags else {}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_target(weights: Mapping[str, Any], role: str) -> bool:
    """Whether a message is to be learned: replies are, unless a weight or flag says no."""
    for name, weight in weights.items():
        if not isinstance(weight, bool | int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"{name} should be a number of at least 0 or a flag, it is {weight!r}")
        if weight not in (0, 1):
            warn_once(
                f"messages have a {name} of {weight:g}: every message with one above 0 is scored, "
                "and its tokens count alike",
                about="fractional weights of messages",
            )
    if len({bool(weight) for weight in weights.values()}) > 1:
        raise ValueError(f"{' and '.join(map(repr, weights))} say different things")
    says_yes = any(weights.values())
    if role != "assistant":
        if says_yes:
            raise ValueError(f"has a weight and the role {role!r}; only replies can be targets")
        return False
    return says_yes or not weights


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
