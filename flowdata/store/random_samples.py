"""Samples that differ from reading to reading, as augmentation makes them: what is said of them."""

from __future__ import annotations

from typing import Any

from flowdata._common.notices import logger
from flowdata.store.fingerprint.dataset import random_sample
from flowdata.store.fingerprint.values import class_name

_OF_ONE_DRAW = (  # what becomes of samples that differ, and what to do
    "each loss is that of one draw. Score with the transform of evaluation, or take the mean over "
    "draws with flowdata.views.score_views"
)
_remarks: set[str] = set()  # that were made in this program: once is enough


def remark_on_random_samples(
    dataset: Any,
    dataset_id: str | None,
    *,
    skip_unreadable: bool = False,
    advice: str = _OF_ONE_DRAW,
) -> None:
    """Say, once, that a sample differs from reading to reading: its loss is that of one draw.

    Args:
        dataset: map-style; a few of its samples are read a few times.
        dataset_id: the user's name for its content, which then need not be recognised.
        skip_unreadable: pass over samples on which the data set raises.
        advice: what comes of it and what to do, where it is not losses that are computed.
    """
    sample = random_sample(dataset, skip_unreadable=skip_unreadable)
    if sample is None:
        return
    index, is_seeded = sample
    remark = (
        f"dataset[{index}] of {class_name(dataset)} differs from reading to reading, as random "
        f"augmentation makes it: {advice}"
    )
    if not is_seeded and dataset_id is None:
        remark += (
            ". No seed fixes it, so its content can't be recognised: pass dataset_id='a name that "
            "changes when the data does'"
        )
    if remark not in _remarks:
        _remarks.add(remark)
        logger.warning(remark)
