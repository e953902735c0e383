"""Losses in, weights out: w = exp(−loss / temperature), and how the temperature is chosen.

temperature.py picks the temperature, formula.py makes weights at it. flow.py does both for losses
that are all there, missing.py where some are not. sample_size.py says how many samples weights
amount to; notice.py tells the user where they are of no use, or look like losses.

No function reads from disk or modifies its arguments, and the same losses give the same weights on
every machine. Arithmetic is float64 inside.
"""

from flowdata.weights.flow import Normalize, flow_weights, shape_weights
from flowdata.weights.formula import weigh
from flowdata.weights.missing import Missing, check_missing, plural, weigh_present
from flowdata.weights.notice import warn_of_likely_losses, warn_of_useless_weights
from flowdata.weights.sample_size import effective_sample_size
from flowdata.weights.temperature import (
    RelativeTemperature,
    Temperature,
    check_temperature,
    positive_number,
    resolve_temperature,
)

__all__ = [
    "Missing",
    "Normalize",
    "RelativeTemperature",
    "Temperature",
    "check_missing",
    "check_temperature",
    "effective_sample_size",
    "flow_weights",
    "plural",
    "positive_number",
    "resolve_temperature",
    "shape_weights",
    "warn_of_likely_losses",
    "warn_of_useless_weights",
    "weigh",
    "weigh_present",
]
