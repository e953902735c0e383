"""What fine-tuning forgets, without the old data, and weights by the pre-trained model's loss.

`DriftMeter` measures how far a model has moved from what it was. Where rows may be wrong, score
every sample once with the frozen pre-trained model, then weight or resample by
w = exp(−loss / temperature), so that easy samples count more (FLOW: Sanyal et al., ICML 2025,
arXiv:2502.02797).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from flowdata._version import __version__ as __version__
from flowdata.collator import WeightedCollator
from flowdata.companions.anchor import ParameterAnchor
from flowdata.companions.averaging import wise_ft
from flowdata.dataset import FlowWeightedDataset, joint_temperature
from flowdata.drift import DriftMeter, OutputAnchor
from flowdata.errors import ScoreMismatchError
from flowdata.losses import causal_lm_loss, weighted_mean
from flowdata.probe.linear_probe import linear_probe
from flowdata.sampler import FlowSampler
from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer
from flowdata.streaming import FlowWeightedIterable
from flowdata.weights import effective_sample_size, flow_weights, resolve_temperature

if TYPE_CHECKING:
    from flowdata import accumulation as accumulation
    from flowdata import integrations as integrations
    from flowdata import study as study
    from flowdata import text as text
    from flowdata import views as views

__all__ = [
    "DriftMeter",
    "FlowSampler",
    "FlowWeightedDataset",
    "FlowWeightedIterable",
    "LossScorer",
    "OutputAnchor",
    "ParameterAnchor",
    "ScoreMismatchError",
    "Scores",
    "WeightedCollator",
    "causal_lm_loss",
    "effective_sample_size",
    "flow_weights",
    "joint_temperature",
    "linear_probe",
    "resolve_temperature",
    "weighted_mean",
    "wise_ft",
]

# Modules that few programs need: each is imported when it is first asked for, as `flowdata.study`.
_LAZY = ("accumulation", "integrations", "study", "text", "views")

if not TYPE_CHECKING:  # a type checker would take it for any name at all

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            return import_module(f"flowdata.{name}")
        raise AttributeError(f"module 'flowdata' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
