"""Kinds: which samples of a data set differ enough that each has to be checked.

A way that is right for one sample can be wrong for another that has other fields, more images or
another length. These are the differences that the check looks for.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flowdata.scoring.plan.lengths import length_of
from flowdata.targets.labels import IGNORE_INDEX

_MOST_KINDS = 6  # of which a sample is checked before a run; others are as they come
_FEWEST = 4  # samples, if there are so many
_MOST_IMAGES = 8  # whose number tells kinds of samples apart
LONGEST_CHECKED = 2048  # tokens of a sample whose full logits still fit into memory


def kind_of(sample: Any) -> Hashable:
    """Return what tells kinds of samples apart: the fields that are there, and how many images.

    Example:
        >>> kind_of({"input_ids": [1, 2]}) == kind_of({"input_ids": [1]})
        True
        >>> kind_of({"text": "a", "images": ["b"]}) == kind_of({"text": "c", "images": []})
        False
    """
    if isinstance(sample, Mapping):
        return tuple((str(name), _kind_of_value(sample[name])) for name in sorted(sample, key=str))
    if isinstance(sample, tuple | list):
        return tuple(map(_kind_of_value, sample))
    return _kind_of_value(sample)


def _kind_of_value(value: Any) -> Hashable:
    if isinstance(value, Tensor | np.ndarray):
        # Several images, or what says of each how large it is, lie along the first axis. A long
        # axis is one of time, or of patches.
        size = value.shape[0] if len(value.shape) >= 2 else None
        return (len(value.shape), size if size is None or size <= _MOST_IMAGES else "many")
    if isinstance(value, tuple | list):
        is_numbers = bool(value) and isinstance(value[0], int | float)
        return ("numbers",) if is_numbers else ("list", len(value))
    return None if value is None else ()


def differing(samples: Sequence[Any], most: int) -> list[int]:
    """Return the places of the samples that differ most: what a check should look at.

    They are the shortest, the longest, that with the fewest targets and that with the most, and
    the first of each kind.

    Args:
        samples: readable samples, at least one.
        most: places at most.
    """
    lengths = [tokens_of(sample) for sample in samples]
    targets = [_count_targets(sample) for sample in samples]
    few_enough = [place for place, length in enumerate(lengths) if length <= LONGEST_CHECKED]
    few_enough = few_enough or [int(np.argmin(lengths))]
    places = [
        min(few_enough, key=lambda place: lengths[place]),
        max(few_enough, key=lambda place: lengths[place]),
        min(few_enough, key=lambda place: targets[place]),
        max(few_enough, key=lambda place: targets[place]),
    ]
    kinds: dict[Hashable, int] = {}
    for place in few_enough:
        kinds.setdefault(kind_of(samples[place]), place)
    places += list(kinds.values())[:_MOST_KINDS]
    # Of samples that are alike there are still several, so that some share a batch.
    others = [place for place in few_enough if place not in places]
    places += others[: max(0, _FEWEST - len(set(places)))]
    return list(dict.fromkeys(places))[:most]


def is_short(sample: Any) -> bool:
    """Return whether the full logits of a sample fit into memory, so that it can be checked."""
    return tokens_of(sample) <= LONGEST_CHECKED


def tokens_of(sample: Any) -> int:
    """Return the tokens of a sample, those beside images too; 0 where it has none."""
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    return len(ids) if ids is not None else length_of(sample) or 0


def _count_targets(sample: Any) -> int:
    """How many targets a sample has, as far as its own fields tell; 1 where they don't."""
    labels = sample.get("labels") if isinstance(sample, Mapping) else None
    if labels is None or np.ndim(labels) == 0:
        return tokens_of(sample) or 1
    # NumPy has no bfloat16, and takes no tensor that has a gradient.
    values = labels.detach() if isinstance(labels, Tensor) else np.asarray(labels)
    return int((values != IGNORE_INDEX).sum()) or 1  # none: nothing to compare
