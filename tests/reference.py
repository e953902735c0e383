"""The slow, obvious version of everything numeric; the library is compared with it."""

from __future__ import annotations

import math
import statistics


def flow_weights(losses, temperature):
    """exp(-loss / temperature), one sample at a time."""
    return [math.exp(-float(loss) / temperature) for loss in losses]


def median(losses):
    """The mean of the two middle values when their number is even."""
    return statistics.median(float(loss) for loss in losses)


def effective_sample_size(weights):
    """(Σw)² / Σw²."""
    weights = [float(weight) for weight in weights]
    return sum(weights) ** 2 / sum(weight * weight for weight in weights)
