"""Guessing: whether losses are no better than those of a model that knows nothing.

Who gives each of K classes, or tokens, the same probability has a loss of ln(K) nats on every
target, whatever the labels are. A pre-trained model that does no better on half of the samples was
loaded or fed wrongly, and how its losses differ says nothing of how hard a sample is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from flowdata.targets.which_loss import LANGUAGE_LOSSES

_ROUNDING = 1e-4  # nats that ln(K) is off by where a head of zeros gives it in float32
_OF_TOKENS = (
    "that the tokenizer is the model's own, that the checkpoint is the trained one with no part "
    "newly made, and that the labels are not shifted"
)
_OF_CLASSES = (
    "that inputs are what the model was trained on (of images the same mean and deviation, and no "
    "pixels from 0 to 255 where it knew 0 to 1), that the checkpoint is the trained one, that its "
    "head is not newly made, and that the labels number the classes as the model does"
)


def guessing_remark(losses: Tensor, metadata: Mapping[str, Any]) -> str:
    """Return a sentence where the median loss is no better than a guess's, else ``""``.

    Args:
        losses: (N,) floating, nats; NaN where there is none.
        metadata: the scores'; `checked` tells how many classes the model's logits told apart, if
            that is known and the losses are cross-entropies.

    Example:
        >>> import torch
        >>> metadata = {"identity": {"loss": "cross_entropy"}, "checked": {"num_classes": 10}}
        >>> guessing_remark(torch.tensor([2.6, 3.4, 0.1]), metadata)[:63]
        'the median loss is 2.6 nats, and guessing among 10 classes cost'
        >>> guessing_remark(torch.tensor([0.6, 3.4, 0.1]), metadata)
        ''
    """
    num_classes = (metadata.get("checked") or {}).get("num_classes", 0)
    if num_classes < 2 or losses.isnan().all():
        return ""
    median, guess = float(np.nanmedian(losses.numpy())), math.log(num_classes)
    if median < guess - _ROUNDING:
        return ""
    is_of_tokens = metadata.get("identity", {}).get("loss") in LANGUAGE_LOSSES
    return (
        f"the median loss is {median:.3g} nats, and guessing among {num_classes:,} "
        f"{'tokens' if is_of_tokens else 'classes'} costs ln({num_classes:,}) = {guess:.3g}: the "
        "model does no better than a guess, so its losses say nothing of how hard a sample is. "
        f"Check {_OF_TOKENS if is_of_tokens else _OF_CLASSES}"
    )
