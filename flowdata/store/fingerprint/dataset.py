"""The fingerprint of a data set: its length, its samples, and the view that gives them."""

from __future__ import annotations

import hashlib
import random
from itertools import count
from typing import Any

import numpy as np
from torch import get_rng_state
from torch.utils.data import Dataset, TensorDataset

from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import Readable, Unreadable
from flowdata.store.fingerprint.callables import fingerprint_callable
from flowdata.store.fingerprint.files import files_of, named_by_size, update_from_files
from flowdata.store.fingerprint.values import NoContentError, canonical, class_name, update_digest
from flowdata.store.fingerprint.view import describe_view

# Reading a sample runs the data set's own code, such as decoding an image, so that reading all of a
# large data set may take as long as scoring it. Evenly spread samples notice another file, order or
# transform; a change to a few samples between them goes unnoticed. So it is with files that rows
# name: the sizes of all count, and the contents of this many rows' files.
_MOST_SAMPLES_OF_CODE = 512
_SAMPLES_OF_TRANSFORM = 8  # that are read through a transform, beside its code
_SAMPLES_READ_AGAIN = 8  # to see whether they come out the same
# How often: three times, and more often where reading draws random numbers. One flip in twenty is
# then noticed in 998 of 1,000 data sets, one in a hundred in 72 of 100.
_READINGS, _READINGS_OF_DRAWN = 3, 16
_ARROW_ROWS = 4096  # rows of a Hugging Face data set that are in memory at a time


def fingerprint_dataset(dataset: Any, *, skip_unreadable: bool = False) -> str:
    """Return the digest of a map-style data set's length, content and view.

    Tensor data sets, Arrow tables of Hugging Face data sets and lists are read whole; of files that
    a table names, the sizes, and the contents for at most 512 rows, evenly spread. Of any other
    data set at most 512 samples, evenly spread from the first to the last, are read through
    `__getitem__`, with the random generators seeded alike each time, so that random transforms
    give the same digest again. The view of a Hugging Face data set is its format, its columns,
    its transform (the code, and what it makes of a few rows) and the decoding of its features.

    Args:
        dataset: map-style.
        skip_unreadable: let a mark stand for a sample on which the data set raises.

    Raises:
        TypeError: a sample holds something without stable content; pass `dataset_id`.
        SampleError: the data set raises on a sample.
    """
    parts = fingerprint_parts(dataset, skip_unreadable=skip_unreadable)
    if len(parts) == 1:
        return parts["samples"]
    return hashlib.sha256(canonical(parts)).hexdigest()


def fingerprint_parts(dataset: Any, *, skip_unreadable: bool = False) -> dict[str, str]:
    """Return the digests that `fingerprint_dataset` is made of, by what each is of.

    They are of the ``samples`` and, where a Hugging Face data set has them, of its ``format``,
    ``columns``, ``transform`` and ``decoding``.

    Args:
        dataset: map-style.
        skip_unreadable: let a mark stand for a sample on which the data set raises.

    Raises:
        TypeError, SampleError: as `fingerprint_dataset`.
    """
    digest = hashlib.sha256(canonical([_kind(dataset), len(dataset)]))
    if _is_tensors(dataset):
        for tensor in dataset.tensors:
            update_digest(digest, tensor)
        return {"samples": digest.hexdigest()}
    if not _is_arrow(dataset):
        _update_from_samples(digest, dataset, skip_unreadable=skip_unreadable)
        return {"samples": digest.hexdigest()}
    _update_from_arrow_table(digest, dataset)
    parts = {"samples": digest.hexdigest(), **describe_view(dataset)}
    if _transform(dataset) is not None:
        # The code may read what no description reaches, so that a few rows go through it as well.
        outputs = hashlib.sha256(fingerprint_callable(_transform(dataset)).encode())
        readable = Readable(dataset, skip=skip_unreadable)
        with preserved_rng(seed=0):
            for index in _spread(len(dataset), _SAMPLES_OF_TRANSFORM):
                outputs.update((_digest_of(readable[index]) or "").encode())
        parts["transform"] = outputs.hexdigest()
    return parts


def sample_count(dataset: Any) -> int | None:
    """Return how many samples a fingerprint rests on; None where it rests on all of them."""
    if _is_tensors(dataset):
        return None
    if _is_arrow(dataset):
        indices = _spread(len(dataset), _MOST_SAMPLES_OF_CODE)
        some = len(indices) < len(dataset) and any(files_of(dataset, indices))
        return len(indices) if some else None
    number = len(_sample_indices(dataset))
    return None if number == len(dataset) else number


def random_sample(dataset: Any, *, skip_unreadable: bool = False) -> tuple[int, bool] | None:
    """Return the first of a few samples that comes out another on a second reading.

    Args:
        dataset: map-style; nothing is read of one that holds its samples as they are.
        skip_unreadable: pass over samples on which the data set raises.

    Returns:
        The sample's index, and whether PyTorch's, NumPy's and Python's seeds fix it: a generator
        of the data set's own is beyond their reach. None where all come out the same.
    """
    holds_samples = _is_tensors(dataset) or isinstance(dataset, list | tuple | str)
    if holds_samples or (_is_arrow(dataset) and _transform(dataset) is None):
        return None
    readable = Readable(dataset, skip=skip_unreadable)
    indices, seeds = _spread(len(dataset), _SAMPLES_READ_AGAIN), count(1)
    first: dict[int, tuple[int, str | None]] = {}  # seed and digest of each one's first reading
    draws = False
    for reading in range(_READINGS_OF_DRAWN):
        if reading >= _READINGS and not draws:
            break
        for index, seed in zip(indices, seeds):  # noqa: B905 (seeds never end)
            digest, has_drawn = _read(readable, index, seed)
            draws |= has_drawn
            first_seed, first_digest = first.setdefault(index, (seed, digest))
            if digest != first_digest:
                again, _ = _read(readable, index, first_seed)
                return index, again == first_digest
    return None


def _read(readable: Readable, index: int, seed: int) -> tuple[str | None, bool]:
    """A sample's digest under a seed, and whether a global generator was drawn from for it."""
    with preserved_rng(seed=seed):
        before = _states()
        digest = _digest_of(readable[index])
        return digest, _states() != before


def _states() -> tuple[Any, ...]:
    """Where Python's, NumPy's and torch's global generators stand."""
    arrays = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    of_numpy = arrays["key"].tobytes(), arrays["pos"]
    return random.getstate(), of_numpy, get_rng_state().numpy().tobytes()


def _digest_of(sample: Any) -> str | None:
    """One sample's digest; None where it holds something without content, or can't be read."""
    digest = hashlib.sha256()
    try:
        update_digest(digest, None if isinstance(sample, Unreadable) else sample)
    except NoContentError:
        return None
    return digest.hexdigest()


def _is_tensors(dataset: Any) -> bool:
    """Whether a data set gives its tensors' rows as they are; a class made of it may not."""
    return (
        isinstance(dataset, TensorDataset)
        and type(dataset).__getitem__ is TensorDataset.__getitem__
    )


def _is_arrow(dataset: Any) -> bool:
    """Whether a data set is Hugging Face's; a class made of it may give samples of its own."""
    home = getattr(type(dataset).__getitem__, "__module__", "")
    return home.partition(".")[0] == "datasets" and hasattr(dataset, "column_names")


def _transform(dataset: Any) -> Any:
    """The function that a Hugging Face data set's rows go through, None where there is none."""
    settings = dataset.format
    return settings["format_kwargs"].get("transform") if settings["type"] == "custom" else None


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
    return _spread(length, _MOST_SAMPLES_OF_CODE)


def _spread(length: int, number: int) -> list[int]:
    """Indices from the first to the last, evenly spread: `number` of them, or all of fewer."""
    if length <= number:
        return list(range(length))
    indices: list[int] = np.linspace(0, length - 1, number).astype(int).tolist()
    return indices


def _update_from_arrow_table(digest: hashlib._Hash, dataset: Any) -> None:
    rows = dataset.with_format("arrow")
    for start in range(0, len(dataset), _ARROW_ROWS):
        table = rows[start : start + _ARROW_ROWS]
        for name in sorted(table.column_names):
            digest.update(canonical(name))
            _update_from_arrow_array(digest, table[name].combine_chunks())
    indices = _spread(len(dataset), _MOST_SAMPLES_OF_CODE)
    update_from_files(digest, files_of(dataset, indices))


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
        array = named_by_size(array)
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
