"""What a fine-tuning forgets, measured without the old data.

    probe = own_text(model, tokenizer)         # before training; of images smooth_images, or
    meter = DriftMeter(model, probe)           # inverted_images; or any samples
    drift = meter(model)                       # a Drift, any time later
    hold = OutputAnchor(meter, strength=0.1)   # loss + hold(model) keeps it small
    best = choose([(name, validation, drift), …])             # among runs; rank orders them all
    picture = draw_front(rank([(name, validation, drift), …]))                  # PNG, as bytes
    page = compare(scores_before, scores_after).write("folder")     # sample by sample, as HTML

`output_penalty` holds the training batch itself in the probe's place. On the command line it is
``flowdata drift``, ``flowdata front`` and ``flowdata report STORE --after STORE``.
"""

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
