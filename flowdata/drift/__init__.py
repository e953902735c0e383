"""What a fine-tuning forgets, measured without the old data: `DriftMeter`, probes and choices."""

from flowdata.drift.drift import Drift
from flowdata.drift.meter import DriftMeter
from flowdata.drift.probes import own_text, smooth_images

__all__ = ["Drift", "DriftMeter", "own_text", "smooth_images"]
