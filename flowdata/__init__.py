"""Fine-tuning without forgetting, in the data layer.

Score every sample once with the frozen pre-trained model, then weight or resample by
w = exp(−loss / temperature), so that easy samples count more and the model drifts less
(FLOW: Sanyal et al., ICML 2025, arXiv:2502.02797).
"""

__version__ = "0.1.0"

from flowdata.scores import ScoreMismatchError, Scores
from flowdata.scoring.scorer import LossScorer
from flowdata.weights import effective_sample_size, flow_weights, resolve_temperature

__all__ = [
    "LossScorer",
    "ScoreMismatchError",
    "Scores",
    "effective_sample_size",
    "flow_weights",
    "resolve_temperature",
]
