"""Scoring: a plan of packs, a model run over them, a loss for every sample."""
