"""Kinds: which samples of a data set differ enough that each has to be checked.

A way that is right for one sample can be wrong for another that has other fields, more images,
another length, or a mask that hides tokens elsewhere. These are the differences that the check
looks for.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flowdata.scoring.plan.lengths import length_of
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.targets.which_loss import LANGUAGE_LOSSES

_MOST_KINDS = 6  # of which a sample is checked before a run; others are as they come
_FEWEST = 4  # samples, if there are so many
_MOST_IMAGES = 8  # whose number tells kinds of samples apart
LONGEST_CHECKED = 2048  # tokens of a sample whose full logits still fit into memory

_Bools = np.ndarray[Any, np.dtype[np.bool_]]


def kind_of(sample: Any) -> Hashable:
    """Return what tells kinds of samples apart: the fields that are there, and how many images.

    Tensors are told apart by their dtypes as well: a collation puts bytes and numbers into one. Of
    samples of tokens it is whether they are long, where `attention_mask` hides tokens (on the left,
    inside, on the right), whether these are targets or predict some, and whether `position_ids`
    begin again.

    Example:
        >>> kind_of({"input_ids": [1, 2]}) == kind_of({"input_ids": [1]})
        True
        >>> kind_of({"text": "a", "images": ["b"]}) == kind_of({"text": "c", "images": []})
        False
        >>> kind_of({"attention_mask": [1, 1, 0]}) == kind_of({"attention_mask": [0, 1, 1]})
        False
    """
    if isinstance(sample, Mapping):
        fields = [(str(name), _kind_of_value(sample[name])) for name in sorted(sample, key=str)]
        hidden = _hidden(sample.get("attention_mask"), sample.get("labels"))
        return (*fields, is_short(sample), hidden, _begins_again(sample.get("position_ids")))
    if isinstance(sample, tuple | list):
        return tuple(map(_kind_of_value, sample))
    return _kind_of_value(sample)


def _kind_of_value(value: Any) -> Hashable:
    if isinstance(value, Tensor | np.ndarray):
        # Several images, or what says of each how large it is, lie along the first axis. A long
        # axis is one of time, or of patches.
        size = value.shape[0] if len(value.shape) >= 2 else None
        number = size if size is None or size <= _MOST_IMAGES else "many"
        return (len(value.shape), number, str(value.dtype))
    if isinstance(value, tuple | list):
        is_numbers = bool(value) and isinstance(value[0], int | float)
        return ("numbers",) if is_numbers else ("list", len(value))
    return None if value is None else ()


def _hidden(mask: Any, labels: Any) -> Hashable:
    """Where a mask of one sample hides tokens, and whether targets lie there; () if nowhere.

    For each of the left, the inside and the right: whether tokens are hidden, are targets, and
    predict targets. Nearly all samples hide none, which lists tell the fastest themselves.
    """
    if not _is_row(mask) or (isinstance(mask, list) and 0 not in mask):
        return ()
    is_hidden = _equal(mask, 0)
    if not is_hidden.any():
        return ()
    seen = np.flatnonzero(~is_hidden)
    first, last = (int(seen[0]), int(seen[-1])) if len(seen) else (0, 0)
    is_target = ~is_hidden
    if _is_row(labels) and len(labels) == len(mask):
        is_target = ~_equal(labels, IGNORE_INDEX)
    predicts = np.append(is_target[1:], False)
    parts = slice(first), slice(first, last + 1), slice(last + 1, None)
    return tuple(
        tuple(bool((is_hidden & which)[part].any()) for which in (is_hidden, is_target, predicts))
        for part in parts
    )


def _equal(values: Any, number: int) -> _Bools:
    """Where a sample's values are a number, (T,); NumPy takes lists several times as fast."""
    if isinstance(values, Tensor):  # of any dtype, on any device
        return np.asarray((values == number).cpu())
    return np.asarray(np.asarray(values) == number)


def _begins_again(positions: Any) -> bool:
    """Whether a sample's positions are not those of one text: others rise by one at each token."""
    if not _is_row(positions):
        return False
    return int(positions[-1]) - int(positions[0]) != len(positions) - 1


def _is_row(values: Any) -> bool:
    """Whether a field has a number for each token."""
    if isinstance(values, Tensor | np.ndarray):
        return len(values.shape) == 1 and len(values) > 0
    return isinstance(values, list | tuple) and bool(values) and isinstance(values[0], int | float)


def differing(samples: Sequence[Any], most: int, longest: float = LONGEST_CHECKED) -> list[int]:
    """Return the places of the samples that differ most: what a check should look at.

    They are the shortest, the longest, that with the fewest targets and that with the most, and
    the first of each kind.

    Args:
        samples: readable samples, at least one.
        most: places at most.
        longest: tokens beyond which a sample is none of them, if there are others.
    """
    lengths = [tokens_of(sample) for sample in samples]
    targets = [_count_targets(sample) for sample in samples]
    few_enough = [place for place, length in enumerate(lengths) if length <= longest]
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
    missing = max(0, _FEWEST - len(set(places)))
    places += [others[number * len(others) // missing] for number in range(missing) if others]
    return list(dict.fromkeys(places))[:most]


def is_short(sample: Any) -> bool:
    """Return whether the full logits of a sample fit into memory, so that it can be checked."""
    return tokens_of(sample) <= LONGEST_CHECKED


def longest_checked(loss: object) -> float:
    """Return how many tokens a sample may have for its loss alone to be made of full logits.

    Those of a language model would fill the memory; what others make for one is as large in a run.

    Args:
        loss: the job's.
    """
    return LONGEST_CHECKED if loss in LANGUAGE_LOSSES else math.inf


def tokens_of(sample: Any) -> int:
    """Return the tokens of a sample, those beside images too; 0 where it has none."""
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    return len(ids) if ids is not None else length_of(sample) or 0


def has_target(sample: Any) -> bool:
    """Return whether a sample has a target behind its first token, which no token predicts.

    True where its own fields don't tell.

    Example:
        >>> has_target({"input_ids": [4, 5], "labels": [4, -100]})
        False
    """
    labels: Any = sample.get("labels") if isinstance(sample, Mapping) else None
    if not (_is_row(labels) and len(labels) == tokens_of(sample)):
        return labels is not None or tokens_of(sample) != 1
    return not bool(_equal(labels, IGNORE_INDEX)[1:].all())


def _count_targets(sample: Any) -> int:
    """How many targets a sample has, as far as its own fields tell; 1 where they don't."""
    labels = sample.get("labels") if isinstance(sample, Mapping) else None
    if labels is None or np.ndim(labels) == 0:
        return tokens_of(sample) or 1
    return int((~_equal(labels, IGNORE_INDEX)).sum()) or 1  # none: nothing to compare
