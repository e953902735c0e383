"""Whether counts may come from given chances."""

import math

import numpy as np


def chi_square_is_plausible(counts, expected):
    """Within 5 standard deviations of its mean; bins are joined until they expect about 50."""
    bins = np.unique((np.cumsum(expected) - expected / 2) // 50, return_inverse=True)[1]
    counts, expected = np.bincount(bins, counts), np.bincount(bins, expected)
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)
