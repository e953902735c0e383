"""What a fine-tuning forgets, measured without the old data: `DriftMeter`, probes and choices."""

from flowdata.drift.anchor import OutputAnchor, output_penalty
from flowdata.drift.choosing import Candidate, choose, rank
from flowdata.drift.comparing import Comparison, compare
from flowdata.drift.drift import Drift
from flowdata.drift.inversion import inverted_images
from flowdata.drift.meter import DriftMeter
from flowdata.drift.picture import draw_front
from flowdata.drift.probes import own_text, smooth_images

__all__ = [
    "Candidate",
    "Comparison",
    "Drift",
    "DriftMeter",
    "OutputAnchor",
    "choose",
    "compare",
    "draw_front",
    "inverted_images",
    "output_penalty",
    "own_text",
    "rank",
    "smooth_images",
]
