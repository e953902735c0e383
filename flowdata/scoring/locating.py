"""Whose a target, or a token, is that the model does not have: the sample, for the message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowdata._common.unreadable import Unreadable
from flowdata.errors import OutOfRangeError, SampleError
from flowdata.scoring.job import FEW, Job
from flowdata.scoring.plan.packs import Plan
from flowdata.targets.labels import IGNORE_INDEX, split_batch


def located(error: OutOfRangeError, job: Job, indices: Iterable[int]) -> OutOfRangeError:
    """Return an error that names the first sample it is about; the same where none is found.

    Args:
        error: that of a batch.
        job: whose data set and collate function.
        indices: the samples that may be meant.
    """
    ordered = sorted(set(indices))
    bad = [index for index in ordered if _is_bad(error, job, index)]
    if not bad:
        return error
    which = "the only one" if len(bad) == 1 else f"the first of {len(bad):,}"
    place = f" (sample {bad[0]:,}, {which} among {len(ordered):,} looked at; samples count from 0)"
    return OutOfRangeError(f"{error}{place}", field=error.field, low=error.low, high=error.high)


def checked_indices(job: Job, plan: Plan) -> list[int]:
    """Return the samples that are looked at before a run: some from all over, and the suspects."""
    size = len(job.dataset)
    ends = plan.order[[0, len(plan.order) // 2, -1]].tolist()
    return [*range(0, size, -(-size // FEW)), *ends, *job.suspects]


def _is_bad(error: OutOfRangeError, job: Job, index: int) -> bool:
    """Whether a sample, collated alone, holds a value out of the error's range."""
    with contextlib.suppress(SampleError):
        sample = job.dataset[index]
        if isinstance(sample, Unreadable):
            return False
        values = _values_of(job.collate([sample]), error.field)
        if isinstance(values, Tensor):
            outside = (values < error.low) | (values > error.high)
            return bool((outside & (values != IGNORE_INDEX)).any())
    return False


def _values_of(batch: Any, field: str) -> Any:
    if field == "labels":
        return split_batch(batch)[1]
    values = batch.get(field) if isinstance(batch, Mapping) else None
    return None if values is None else torch.as_tensor(values)
