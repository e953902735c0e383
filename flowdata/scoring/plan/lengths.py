"""How long samples are, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata._common.unreadable import first_readable

_CHARACTERS_PER_TOKEN = 3  # of raw text, when only a collate function knows its tokens


def sample_lengths(dataset: Any, lengths: Any = None) -> Tensor | None:
    """Return every sample's length in tokens, (N,) int64, or None where all are alike in size.

    Given lengths are taken; else those of the `input_ids` (a column, or one pass over the
    samples), with the `labels` added where they are another sequence; else of raw text, a
    third of its characters.

    Raises:
        ValueError: `lengths` is not (N,) non-negative integers.
    """
    if lengths is not None:
        return _given_lengths(lengths, len(dataset))
    if "input_ids" in (getattr(dataset, "column_names", None) or ()):
        return torch.from_numpy(_column_lengths(dataset))
    if length_of(first_readable(dataset)) is None:
        return None
    found = [length_of(dataset[index]) for index in range(len(dataset))]
    return torch.tensor([0 if length is None else length for length in found])


def _given_lengths(lengths: Any, num_samples: int) -> Tensor:
    given = torch.as_tensor(lengths).cpu()
    if given.shape != (num_samples,):
        raise ValueError(
            f"lengths must have shape ({num_samples},), one for each sample, "
            f"got {tuple(given.shape)}"
        )
    if given.is_floating_point() or (given < 0).any():
        raise ValueError("lengths must be non-negative integers: tokens in each sample")
    return given.long()


def _column_lengths(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    names = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    columns = dataset.select_columns(names).with_format("arrow")[:]
    arrays = [columns[name].combine_chunks() for name in names]
    found = [
        array.value_lengths().to_numpy() for array in arrays if hasattr(array, "value_lengths")
    ]
    ids: np.ndarray[Any, np.dtype[np.int64]] = found[0].astype(np.int64)
    if len(found) == 2:  # else the labels are one a sample
        ids += np.where(found[1] == found[0], 0, found[1])
    return ids


def length_of(sample: Any) -> int | None:
    """Return a sample's length in tokens, estimated where it is text; None where it has none."""
    if isinstance(sample, Mapping) and "input_ids" in sample:
        length, labels = len(sample["input_ids"]), sample.get("labels")
        other = length if labels is None or np.ndim(labels) == 0 else len(labels)
        return length if other == length else length + other
    texts = [sample] if isinstance(sample, str) else _texts(sample)
    return sum(map(len, texts)) // _CHARACTERS_PER_TOKEN + 1 if texts else None


def _texts(sample: Any) -> list[str]:
    if not isinstance(sample, Mapping | tuple | list):
        return []
    fields = sample.values() if isinstance(sample, Mapping) else sample
    return [field for field in fields if isinstance(field, str)]
