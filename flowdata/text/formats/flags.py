"""The weights and flags that messages have of their own: whether and how much a reply counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowdata._common.notices import warn_once

WEIGHTS = ("weight", "loss_weight", "loss_scale", "train", "training", "loss")


def flags_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights and flags that a message, or a part of one, has, by name."""
    return {name: item[name] for name in WEIGHTS if item.get(name) is not None}


def flags_of_parts(content: Any) -> dict[str, Any]:
    """Return the weights and flags that all parts of a message share.

    Raises:
        ValueError: its parts have different ones.
    """
    parts = content if isinstance(content, list | tuple) else ()
    flags = [flags_of(part) for part in parts if isinstance(part, Mapping)]
    if any(other != flags[0] for other in flags):
        raise ValueError("its parts have different weights; whole replies are scored alone")
    return flags[0] if flags else {}


def weight_of(flags: Mapping[str, Any], name: str) -> float:
    """Return the weight that a message has already, 1 without any.

    Args:
        flags: the message's weights and flags, by name.
        name: the one that is asked for first; else the smallest of the others counts.

    Example:
        >>> weight_of({"weight": 0.5, "train": True}, "loss_weight")
        0.5
    """
    return float(flags.get(name, min(flags.values(), default=1.0)))


def is_target_by(flags: Mapping[str, Any], role: str) -> bool:
    """Return whether a message is to be learned: replies are, unless a weight or flag says no.

    Raises:
        ValueError: a weight is no number of at least 0, two of them say different things, or one
            above 0 is that of a message that is no reply.
    """
    for name, weight in flags.items():
        if not isinstance(weight, bool | int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"{name} should be a number of at least 0 or a flag, it is {weight!r}")
        if weight not in (0, 1):
            warn_once(
                f"messages have a {name} of {weight:g}: every message with one above 0 is scored, "
                "and its tokens count alike",
                about="fractional weights of messages",
            )
    if len({bool(weight) for weight in flags.values()}) > 1:
        raise ValueError(f"{' and '.join(map(repr, flags))} say different things")
    says_yes = any(flags.values())
    if role != "assistant":
        if says_yes:
            raise ValueError(f"has a weight and the role {role!r}; only replies can be targets")
        return False
    return says_yes or not flags
