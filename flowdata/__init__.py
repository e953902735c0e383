"""Fine-tuning without forgetting, in the data layer."""

__version__ = "0.1.0"
