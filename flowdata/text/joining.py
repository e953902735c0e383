"""Rows that are scored reply by reply: their samples' scores joined to one score a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowdata.errors import ScoreMismatchError
from flowdata.scores import Scores
from flowdata.store.folder import read_manifest
from flowdata.store.places import Place
from flowdata.text.tokens import TokenSamples

REPLIES = "replies"  # the folder within a store that has the samples' own store


def check_can_join(samples: TokenSamples, columns: Sequence[str], store: Place) -> None:
    """Check, before hours of scoring, that rows can have one score each in the end.

    Raises:
        ValueError: rows are several samples, and one of `columns` can't be joined.
        ScoreMismatchError: they are, and `store` has scores of other rows.
    """
    if not samples.is_split:
        return
    if "gradient_norm" in columns:
        raise ValueError(
            "columns must not have 'gradient_norm' where rows are scored reply by reply: the norm "
            "of a row's gradient can't be made of those of its replies"
        )
    if read_manifest(store) is not None and not (store / REPLIES).exists():
        raise ScoreMismatchError(
            f"{store} holds scores of rows that were not scored reply by reply; name another "
            "folder with --store, or let --overwrite remove them"
        )


def join_replies(scores: Scores, rows: NDArray[np.int64]) -> Scores:
    """Return the scores of rows, made of those of their replies.

    A row's loss is the mean over the targets of all of its replies, as if they were in one sample.

    Args:
        scores: of N samples.
        rows: (N,) the row that each sample is of, ascending from 0.

    Example:
        >>> import numpy as np, torch
        >>> scores = Scores(torch.tensor([1.0, 4.0, 2.0]), torch.tensor([2, 1, 5]))
        >>> join_replies(scores, np.array([0, 0, 1])).losses
        tensor([2., 2.])
    """
    row_of = torch.from_numpy(rows)
    num_rows = int(row_of[-1]) + 1
    counts = _sum(scores.counts, row_of, num_rows)
    has_targets = scores.counts > 0

    def mean(values: Tensor) -> Tensor:
        # A reply that lost all its targets has no loss, and takes no part in its row's; a row
        # without any target has 0/0, which is NaN.
        totals = torch.where(has_targets, values.double() * scores.counts, 0.0)
        return _sum(totals, row_of, num_rows) / counts

    reasons = scores.metadata.get("skipped", {})  # of rows that can't be read, one sample each
    metadata: dict[str, Any] = {
        **scores.metadata,
        "identity": {**scores.metadata.get("identity", {}), "num_samples": num_rows},
        "plan": {},
        "skipped": {str(row_of[int(index)].item()): why for index, why in reasons.items()},
    }
    return Scores(
        mean(scores.losses),
        counts,
        metadata=metadata,
        token_losses=scores.flat_token_losses,  # a row's replies lie one after another
        columns={name: mean(values) for name, values in scores.columns.items()},
    )


def _sum(values: Tensor, row_of: Tensor, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows).index_add_(0, row_of, values)
