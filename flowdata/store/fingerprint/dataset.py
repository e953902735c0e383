"""The fingerprint of a data set: its length and its samples."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch.utils.data import Dataset, TensorDataset

from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import Readable, Unreadable
from flowdata.store.fingerprint.values import NoContentError, canonical, class_name, update_digest

# Reading a sample runs the data set's own code, such as decoding an image, so that reading all of a
# large data set may take as long as scoring it. Evenly spread samples notice another file, order or
# transform; a change to a few samples between them goes unnoticed.
_MOST_SAMPLES_OF_CODE = 512
_ARROW_ROWS = 4096  # rows of a Hugging Face data set that are in memory at a time


def fingerprint_dataset(dataset: Any, *, skip_unreadable: bool = False) -> str:
    """Return the digest of a map-style data set's length and content.

    Tensor data sets, Arrow tables of Hugging Face data sets (their rows before any transform)
    and lists are read whole. Of any other data set at most 512 samples, evenly spread from the
    first to the last, are read through `__getitem__`, with the random generators seeded alike
    each time, so that random transforms give the same digest again.

    Args:
        dataset: map-style.
        skip_unreadable: let a mark stand for a sample on which the data set raises.

    Raises:
        TypeError: a sample holds something without stable content; pass `dataset_id`.
        SampleError: the data set raises on a sample.
    """
    digest = hashlib.sha256(canonical([_kind(dataset), len(dataset)]))
    if isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            update_digest(digest, tensor)
    elif hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        _update_from_arrow_table(digest, dataset)
    else:
        _update_from_samples(digest, dataset, skip_unreadable=skip_unreadable)
    return digest.hexdigest()


def _kind(dataset: Any) -> str:
    """The class of a torch data set; one word for everything else that can be indexed."""
    return class_name(dataset) if isinstance(dataset, Dataset) else "sequence"


def _update_from_samples(digest: hashlib._Hash, dataset: Any, *, skip_unreadable: bool) -> None:
    samples = Readable(dataset, skip=skip_unreadable)
    with preserved_rng(seed=0):
        for index in _sample_indices(dataset):
            sample = samples[index]
            try:
                update_digest(digest, None if isinstance(sample, Unreadable) else sample)
            except NoContentError as error:
                raise TypeError(
                    f"dataset[{index}] holds a {error}, whose content can't be "
                    "fingerprinted; pass dataset_id='a name that changes when the data does'"
                ) from None


def _sample_indices(dataset: Any) -> list[int]:
    """The indices of the samples that are read: all of a list, some of a large data set."""
    length = len(dataset)
    if isinstance(dataset, list | tuple) or length <= _MOST_SAMPLES_OF_CODE:
        return list(range(length))
    indices: list[int] = np.linspace(0, length - 1, _MOST_SAMPLES_OF_CODE).astype(int).tolist()
    return indices


def _update_from_arrow_table(digest: hashlib._Hash, dataset: Any) -> None:
    rows = dataset.with_format("arrow")
    for start in range(0, len(dataset), _ARROW_ROWS):
        table = rows[start : start + _ARROW_ROWS]
        for name in sorted(table.column_names):
            digest.update(canonical(name))
            _update_from_arrow_array(digest, table[name].combine_chunks())


def _update_from_arrow_array(digest: hashlib._Hash, array: Any) -> None:
    """Feed an Arrow array into a digest by value.

    Its bytes in memory would not do: equal rows may lie in other chunks and at other places of
    their buffers, and what lies in the place of a null is arbitrary.
    """
    import pyarrow as pa

    kind = array.type
    digest.update(canonical([str(kind), len(array), array.null_count]))
    if array.null_count:
        update_digest(digest, array.is_null().to_numpy(zero_copy_only=False))
        array = array.drop_null()
    if pa.types.is_struct(kind):
        for field, values in zip(kind, array.flatten(), strict=True):
            digest.update(canonical(field.name))
            _update_from_arrow_array(digest, values)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        update_digest(digest, array.value_lengths().to_numpy(zero_copy_only=False))
        _update_from_arrow_array(digest, array.flatten())
    elif pa.types.is_primitive(kind):
        update_digest(digest, array.to_numpy(zero_copy_only=False))
    else:  # strings, bytes and rare types
        update_digest(digest, array.to_pylist())
