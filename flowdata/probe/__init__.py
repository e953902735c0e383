"""A new head on a frozen body: features once, then a convex fit."""

from flowdata.probe.features import compute_features
from flowdata.probe.fit import fit_head
from flowdata.probe.linear_probe import linear_probe

__all__ = ["compute_features", "fit_head", "linear_probe"]
