"""Checks that all objects which resume have in common: of states, ranks and whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def check_state(
    state_dict: Any, identity: Mapping[str, Any], *, maker: str, what: str, remedy: str
) -> None:
    """Check that a state was saved by an object with the same identity.

    A position has a meaning only in one order of samples. In another order a loop that resumed at
    it would miss or repeat samples, and nobody would notice.

    Args:
        state_dict: the user's argument of `load_state_dict`.
        identity: the entries that the state must have in common with the object that loads it.
        maker: the name of the object's class, for messages.
        what: the word for such an object, for messages: ``"sampler"`` or the like.
        remedy: a sentence that says what the user can do.

    Raises:
        TypeError: the state is no mapping.
        ValueError: an entry is absent or differs.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be what {maker}.state_dict returned, got {type(state_dict).__name__}"
        )
    for name, value in identity.items():
        if name not in state_dict or state_dict[name] != value:
            raise ValueError(
                f"state_dict has {name}={state_dict.get(name)!r}, this {what} {value!r}: it was "
                f"saved by another {what}. {remedy}"
            )


def check_rank(rank: Any, num_replicas: Any) -> None:
    """Check that `rank` is one of `num_replicas` ranks, which are counted from 0.

    Raises:
        ValueError: `num_replicas` is no positive integer, or there is no such rank.
    """
    if not is_integer(num_replicas) or num_replicas < 1:
        raise ValueError(f"num_replicas must be a positive integer, got {num_replicas!r}")
    if not is_integer(rank) or not 0 <= rank < num_replicas:
        raise ValueError(
            f"rank must lie between 0 and num_replicas - 1 = {num_replicas - 1}, got {rank!r}"
        )


def check_natural(name: str, value: Any, least: int = 0) -> int:
    """Return `value` as an int, checked to lie between `least` and 2^64 − 1.

    Seeds, epochs and positions are words of 64 bits in the random generator.

    Raises:
        ValueError: `value` is no integer, or lies outside.
    """
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if value >= 2**64:
        raise ValueError(f"{name} must be below 2^64, got {value!r}")
    return int(value)


def is_integer(value: Any) -> bool:
    """Return whether `value` is an integer of Python or NumPy; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
