"""How long samples are, in tokens: only token sequences and raw text have such a length."""

from __future__ import annotations

import mimetypes
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata._common.large_array import large_array
from flowdata._common.offsets import lengths_of
from flowdata._common.unreadable import Unreadable, first_readable

_CHARACTERS_PER_TOKEN = 3  # of raw text, whose tokens only a collate function knows
_MEDIA = ("image", "audio", "video")  # whose files a sample may name
_LABELS = ("labels", "label")  # where floating-point numbers are targets, of many classes
_SIGNALS = ("pixel", "image", "video", "audio", "input_features", "input_values")
_PLAIN = (str, bytes, numbers.Number, list, tuple, Mapping, Tensor, np.ndarray, np.generic)
_Integers = np.ndarray[Any, np.dtype[np.int32]]


def sample_lengths(dataset: Any, lengths: Any = None) -> Tensor | None:
    """Return every sample's length in tokens, (N,) int32, or None where tokens don't tell its size.

    A sample of tokens is as long as its `input_ids`. An encoder-decoder's is as long as these and
    its `labels` together: they are another sequence, as their number shows. Raw text has a token
    for three characters. Where one sample is no such sequence (`length_of`), none has a length:
    what an image costs beside a caption of five words is no matter of tokens.

    Args:
        dataset: map-style. The lengths of a Hugging Face data set's lists, and those of
            `flowdata.text.TokenSamples`, are read off its offsets; of any other data set every
            sample is read.
        lengths: (N,) lengths that the user knows, so that nothing is read.

    Raises:
        ValueError: `lengths` is not (N,) non-negative integers.
    """
    if lengths is not None:
        return _check_lengths(lengths, len(dataset))
    if getattr(dataset, "offsets_tell_lengths", False):
        return torch.from_numpy(lengths_of(dataset.offsets))
    if length_of(first_readable(dataset)) is None:
        return None
    if _shows_its_lists(dataset):
        return torch.from_numpy(_lengths_of_fields(dataset))
    counts = large_array(len(dataset), np.int32)
    for index in range(len(dataset)):
        sample = dataset[index]
        length = 0 if isinstance(sample, Unreadable) else length_of(sample)
        if length is None:
            return None
        counts[index] = length
    return torch.from_numpy(counts)


def _check_lengths(lengths: Any, num_samples: int) -> Tensor:
    tensor = torch.as_tensor(lengths).cpu()
    if tensor.shape != (num_samples,):
        raise ValueError(
            f"lengths must have shape ({num_samples},), one for each sample, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.is_floating_point() or (tensor < 0).any():
        raise ValueError("lengths must be non-negative integers: tokens in each sample")
    return tensor.clamp_max(torch.iinfo(torch.int32).max).int()


def _shows_its_lists(dataset: Any) -> bool:
    """Whether a Hugging Face data set gives its columns as they lie in memory, tokens alone.

    A transform may cut samples or make them of something else, and a column that most samples have
    nothing in may hold images.
    """
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return False
    settings = getattr(dataset, "format", None)
    if settings is None or settings["type"] == "custom":
        return False
    names = dataset.column_names if settings["output_all_columns"] else settings["columns"]
    shown = {name: dataset.features[name] for name in names}
    return "input_ids" in shown and not any(_may_hold_signals(*column) for column in shown.items())


def _may_hold_signals(name: str, feature: Any, depth: int = 0) -> bool:
    """Whether a column may hold images, sound or other arrays beside tokens."""
    if hasattr(feature, "decode") or hasattr(feature, "shape") or depth > 1:
        return True
    if isinstance(feature, Mapping):
        return any(_may_hold_signals(name, inner, depth) for inner in feature.values())
    if hasattr(feature, "feature"):
        return _may_hold_signals(name, feature.feature, depth + 1)
    return depth > 0 and "float" in str(getattr(feature, "dtype", "")) and name not in _LABELS


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
    total: _Integers = lengths[0].astype(np.int32)
    if len(lengths) == 2:
        total += np.where(lengths[1] == lengths[0], 0, lengths[1])
    return total


def length_of(sample: Any) -> int | None:
    """Return a sample's length in tokens, estimated where it is text; None where it has none.

    It has one where it is a mapping with one-dimensional integer `input_ids` whose other fields
    are about these tokens, or where it is text with numbers alone beside it. Images, sound, other
    floating-point arrays and the names of such files have none, nor has what holds them.
    """
    if isinstance(sample, Mapping) and "input_ids" in sample:
        length = _number_of_tokens(sample["input_ids"])
        if length is None or any(_is_signal(name, field, length) for name, field in sample.items()):
            return None
        labels = sample.get("labels")
        label_length = length if labels is None or np.ndim(labels) == 0 else len(labels)
        return length if label_length == length else length + label_length
    texts = _texts_in([sample] if isinstance(sample, str) else sample)
    return sum(map(len, texts)) // _CHARACTERS_PER_TOKEN + 1 if texts else None


def _number_of_tokens(field: Any) -> int | None:
    """The length of a one-dimensional field of integers, None of any other."""
    if isinstance(field, Tensor):
        is_integer = not (field.is_floating_point() or field.is_complex())
        return len(field) if is_integer and field.dim() == 1 else None
    if isinstance(field, np.ndarray):
        return len(field) if field.dtype.kind in "iu" and field.ndim == 1 else None
    if not isinstance(field, Sequence) or isinstance(field, str | bytes):
        return None
    # Looking at a few is enough to tell tokens from anything else.
    is_integer = all(isinstance(token, numbers.Integral) for token in field[:8])
    return len(field) if is_integer else None


def _is_signal(name: str, field: Any, length: int) -> bool:
    """Whether a field beside `length` tokens is of a size that these do not tell.

    Numbers, text, labels and what has a row for every token are no signals, nor are whole numbers
    in one dimension. An image or a recording is one, as an array or as an object of its own.
    """
    if isinstance(field, Mapping):
        return {"bytes", "path"} <= field.keys()  # an encoded image
    if isinstance(field, list | tuple):
        leaf, depth = _first_leaf(field)
        if not isinstance(leaf, numbers.Number):
            return _is_object(leaf)
        is_whole, rows = isinstance(leaf, numbers.Integral), len(field)
    elif isinstance(field, Tensor | np.ndarray):
        if isinstance(field, np.ndarray) and field.dtype.kind not in "biufc":
            return False
        is_whole = not torch.as_tensor(field).is_floating_point()
        rows, depth = len(field) if field.ndim else 1, field.ndim
    else:
        return _is_object(field)
    is_vector = depth <= 1 and (is_whole or name in _LABELS)
    is_of_tokens = rows == length and depth <= 2 and not name.startswith(_SIGNALS)
    return not (depth == 0 or is_vector or is_of_tokens)


def _first_leaf(field: Any) -> tuple[Any, int]:
    """The first value inside nested lists, None where they are empty, and how deep it lies."""
    depth = 0
    while isinstance(field, list | tuple):
        field, depth = (field[0] if field else None), depth + 1
    if isinstance(field, Tensor | np.ndarray) and field.size:
        return (0.5 if field.ndim else 0), depth + field.ndim
    return field, depth


def _is_object(value: Any) -> bool:
    """Whether a value is neither number, text, list nor array: an image, a recording."""
    return value is not None and not isinstance(value, _PLAIN)


def _texts_in(sample: Any) -> list[str]:
    """The texts of a sample that holds nothing beside them but numbers; else none."""
    if not isinstance(sample, Mapping | tuple | list):
        return []
    fields = list(sample.values() if isinstance(sample, Mapping) else sample)
    texts = [field for field in fields if isinstance(field, str)]
    others = [field for field in fields if not isinstance(field, str)]
    return texts if all(map(_is_number, others)) and not any(map(_is_media, texts)) else []


def _is_number(field: Any) -> bool:
    is_array = isinstance(field, Tensor | np.ndarray) and field.ndim == 0
    return field is None or is_array or isinstance(field, numbers.Number | np.bool_)


def _is_media(text: str) -> bool:
    """Whether a text names a file of an image, a recording or a film."""
    if len(text) > 1000 or "\n" in text:
        return False
    kind = mimetypes.guess_type(text)[0] or ""
    return kind.partition("/")[0] in _MEDIA
