"""Containers: the same samples in a list, a Subset, a TensorDataset, or given by other code.

A fingerprint rests on what holds the samples: a TensorDataset goes in tensor by tensor, anything
else sample by sample, after the name of its class. What a list, a Subset or a TensorDataset held
is known again all the same, by reading every sample of what is in hand.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import Readable, Unreadable
from flowdata.errors import SampleError
from flowdata.store.fingerprint.values import NoContentError, canonical, update_digest

_TENSORS, _SUBSET = (f"{each.__module__}.{each.__qualname__}" for each in (TensorDataset, Subset))


def is_of_same_samples(fingerprint: str, dataset: Any, *, skip_unreadable: bool = False) -> bool:
    """Return whether a fingerprint is that of a data set's samples, all of them, in their order.

    All samples are read, so that a yes is certain. A no may mean that a class of the user's, or a
    table, held them when the fingerprint was taken.

    Args:
        fingerprint: as `fingerprint_dataset` returns it.
        dataset: map-style, whatever class it is of.
        skip_unreadable: let a mark stand for a sample on which the data set raises.

    Example:
        >>> from flowdata.store.fingerprint import fingerprint_dataset
        >>> rows = TensorDataset(torch.arange(6).reshape(3, 2))
        >>> is_of_same_samples(fingerprint_dataset(rows), [rows[0], rows[1], rows[2]])
        True
    """
    kinds = ("sequence", _SUBSET)
    digests = [hashlib.sha256(canonical([kind, len(dataset)])) for kind in kinds]
    rows: list[tuple[Tensor, ...]] = []
    readable = Readable(dataset, skip=skip_unreadable)
    try:
        with preserved_rng(seed=0):
            for index in range(len(dataset)):
                sample = readable[index]
                for digest in digests:
                    update_digest(digest, None if isinstance(sample, Unreadable) else sample)
                if len(rows) == index and _is_row(sample, rows):
                    rows.append(sample)
    except (NoContentError, SampleError):  # which the samples with this fingerprint were not
        return False
    if fingerprint in [digest.hexdigest() for digest in digests]:
        return True
    return len(rows) == len(dataset) and _digest_of_tensors(rows) == fingerprint


def _is_row(sample: Any, rows: list[tuple[Tensor, ...]]) -> bool:
    """Whether a sample can be a TensorDataset's row, after those before it."""
    if not isinstance(sample, tuple) or not all(isinstance(each, Tensor) for each in sample):
        return False
    return not rows or _kinds(sample) == _kinds(rows[0])


def _kinds(row: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    return [(tensor.dtype, tensor.shape) for tensor in row]


def _digest_of_tensors(rows: list[tuple[Tensor, ...]]) -> str:
    """The fingerprint of a TensorDataset with these rows, one or more."""
    digest = hashlib.sha256(canonical([_TENSORS, len(rows)]))
    for column in zip(*rows, strict=True):
        update_digest(digest, torch.stack(column))
    return digest.hexdigest()
