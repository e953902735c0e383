"""What goes beside the weights: staying near the pre-trained parameters."""

from flowdata.companions.anchor import ParameterAnchor, batch_norm_state, sweep_wise_ft, wise_ft

__all__ = ["ParameterAnchor", "batch_norm_state", "sweep_wise_ft", "wise_ft"]
