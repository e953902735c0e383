"""Methods on the parameters that go beside the weights: staying near the pre-trained model."""

from flowdata.companions.anchor import ParameterAnchor
from flowdata.companions.averaging import sweep_wise_ft, wise_ft
from flowdata.companions.batch_norm import batch_norm_state

__all__ = ["ParameterAnchor", "batch_norm_state", "sweep_wise_ft", "wise_ft"]
