"""Which samples of a batch a body is run on together: those that leave each other's features alone.

samples that differ ──┬─ each alone ─────────────────────────────┐
                      └─ together; of one shape; each alone ─────┴→ the same? taken, else next
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowdata._common.notices import logger
from flowdata._common.unreadable import Readable, some_readable
from flowdata.scoring.grouping import Grouping, alike, alone, shapes_of, together
from flowdata.scoring.kinds import is_short

_MOST_CHECKED = 12  # samples
_ROUNDING, _ROUNDING_OF_FEW_BITS = 5e-3, 5e-2  # shares of features that runs may differ by
_OF_LARGEST = 0.1  # as much of the largest feature: rounding spreads from it to the others


def right_grouping(
    run: Callable[[list[Any]], Tensor], dataset: Any, dtype: torch.dtype, batch_size: int
) -> Grouping:
    """Return the fastest grouping that gives samples the features that they have alone.

    What fails here is left for the run to meet, which says what it is.

    Args:
        run: samples -> their features, (B, D), of one batch.
        dataset: map-style.
        dtype: in which the body runs.
        batch_size: samples at most in one call.
    """
    if min(batch_size, len(dataset)) < 2:
        return together
    try:
        samples = some_readable(Readable(dataset, skip=True), min(batch_size, _MOST_CHECKED))
        samples = sorted(filter(is_short, samples), key=lambda sample: str(shapes_of(sample)))
        features = _features_beside_others(run, samples)
    except Exception:
        return together
    try:
        true = torch.cat([run([sample]) for sample in samples])
    except Exception as error:
        logger.warning(
            "the model fails on a sample alone (%s), so that nothing tells whether features depend "
            "on which samples share a batch",
            str(error).partition("\n")[0],
        )
        return together
    difference = _difference(features, true, dtype)
    if not difference:
        return together
    grouping, words = alone, "each sample is run alone"
    groups = alike(samples)
    if max(map(len, groups)) > 1 and not _difference(_features(run, groups), true, dtype):
        grouping, words = alike, "neighbours of one shape are run together"
    logger.warning(
        "samples of a batch change each other's features (by %.2g, of %.2g at most), so %s",
        difference,
        float(true.abs().max()),
        words,
    )
    return grouping


def _features_beside_others(run: Callable[[list[Any]], Tensor], samples: list[Any]) -> Tensor:
    """Features of samples in one batch; of those of one shape, where the others can't be in it."""
    try:
        return run(samples)
    except Exception:
        return _features(run, alike(samples))


def _features(run: Callable[[list[Any]], Tensor], groups: list[list[Any]]) -> Tensor:
    return torch.cat([run(group) for group in groups])


def _difference(features: Tensor, true: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of (B, D) features from the true ones, 0 where all is rounding."""
    share = _ROUNDING if dtype.itemsize >= 4 else _ROUNDING_OF_FEW_BITS
    sizes = true.abs().where(true.isfinite(), 0).amax(0)  # of each feature, over the samples
    allowed = share * (sizes + _OF_LARGEST * sizes.max())
    is_same = features.isclose(true, rtol=0, atol=0, equal_nan=True)
    off = (features - true).abs().masked_fill(is_same, 0)
    return float(off.max()) if bool((~(off <= allowed) & ~is_same).any()) else 0.0
