"""How long samples are, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata._common.unreadable import first_readable

_CHARACTERS_PER_TOKEN = 3  # of raw text, whose tokens only a collate function knows
_Integers = np.ndarray[Any, np.dtype[np.int64]]


def sample_lengths(dataset: Any, lengths: Any = None) -> Tensor | None:
    """Return every sample's length in tokens, (N,) int64, or None where all are alike in size.

    A sample of tokens is as long as its `input_ids`. An encoder-decoder's is as long as these and
    its `labels` together: they are another sequence, as their number shows. Raw text has a token
    for three characters.

    Args:
        dataset: map-style. A Hugging Face data set is asked for the lengths of its lists; of any
            other one every sample is read.
        lengths: (N,) lengths that the user knows, so that nothing is read.

    Raises:
        ValueError: `lengths` is not (N,) non-negative integers.
    """
    if lengths is not None:
        return _check_lengths(lengths, len(dataset))
    if "input_ids" in (getattr(dataset, "column_names", None) or ()):
        return torch.from_numpy(_lengths_of_fields(dataset))
    if length_of(first_readable(dataset)) is None:
        return None
    return torch.tensor([length_of(dataset[index]) or 0 for index in range(len(dataset))])


def _check_lengths(lengths: Any, num_samples: int) -> Tensor:
    tensor = torch.as_tensor(lengths).cpu()
    if tensor.shape != (num_samples,):
        raise ValueError(
            f"lengths must have shape ({num_samples},), one for each sample, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.is_floating_point() or (tensor < 0).any():
        raise ValueError("lengths must be non-negative integers: tokens in each sample")
    return tensor.long()


def _lengths_of_fields(dataset: Any) -> _Integers:
    """The lengths of a Hugging Face data set's samples, read off Arrow's offsets.

    Arrow lays the lists of a field one after another and keeps where each begins, so that no
    token is read.
    """
    names = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    table = dataset.select_columns(names).with_format("arrow")[:]
    fields = [table[name].combine_chunks() for name in names]
    # A field without `value_lengths` is no list: labels that are one class for each sample.
    lengths = [
        field.value_lengths().to_numpy() for field in fields if hasattr(field, "value_lengths")
    ]
    total: _Integers = lengths[0].astype(np.int64)
    if len(lengths) == 2:
        total += np.where(lengths[1] == lengths[0], 0, lengths[1])
    return total


def length_of(sample: Any) -> int | None:
    """Return a sample's length in tokens, estimated where it is text; None where it has none."""
    if isinstance(sample, Mapping) and "input_ids" in sample:
        length, labels = len(sample["input_ids"]), sample.get("labels")
        label_length = length if labels is None or np.ndim(labels) == 0 else len(labels)
        return length if label_length == length else length + label_length
    texts = [sample] if isinstance(sample, str) else _texts_in(sample)
    return sum(map(len, texts)) // _CHARACTERS_PER_TOKEN + 1 if texts else None


def _texts_in(sample: Any) -> list[str]:
    if not isinstance(sample, Mapping | tuple | list):
        return []
    fields = sample.values() if isinstance(sample, Mapping) else sample
    return [field for field in fields if isinstance(field, str)]
