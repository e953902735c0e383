"""Drift: how far a model has moved from what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

LOST_PER_COSINE = 2.0  # share of the old accuracy that goes with each unit of features' cosine


@dataclass(frozen=True)
class Drift:
    """How far a tuned model's predictions have moved from the frozen one's, on a probe.

    Attributes:
        kl: KL(base ‖ tuned) in nats a target, the mean over all targets; inf for a model that
            gives no numbers. On text that the base model wrote itself it is the rise of its loss
            there. Of a model with several labels each answer, yes or no, is a target.
        reverse_kl: KL(tuned ‖ base) in nats a target.
        cosine: mean cosine similarity of what both output layers are given, 1 for no drift.
        agreement: share of targets whose likeliest class is the same, 1 for no drift.
        samples: in the probe.
        head: ``"own"``: the tuned model's predictions are those of its own output layer;
            ``"frozen"``: those of the frozen model's, because its own is another.
        of: ``"tokens"`` of a language model, or ``"samples"``.
        per_sample: the four measures of every sample, (N,) float64 each, NaN without a target, and
            ``"targets"``, how many it has, (N,) int64.

    Example:
        >>> drift = Drift(0.0123, 0.0119, 0.98, 0.97, samples=64, head="own", of="samples")
        >>> drift
        Drift(kl=0.0123, cosine=0.98, agreement=0.97, kept=0.96, samples=64)
        >>> round(drift.kept, 2)
        0.96
    """

    kl: float
    reverse_kl: float
    cosine: float
    agreement: float
    samples: int
    head: Literal["own", "frozen"]
    of: Literal["tokens", "samples"]
    per_sample: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kept(self) -> float:
        """About what share of the old task's accuracy is left, from 0 to 1.

        It puts runs in order; do not report it as a percentage. For a classifier it is
        1 − 2 · (1 − cosine), at least 0: a line through what a ResNet-20 lost in five
        fine-tunings, not a law (the page forgetting_drift of the benchmarks). For a language model
        it is the agreement.
        """
        if self.of == "tokens":
            return self.agreement
        return max(0.0, 1 - LOST_PER_COSINE * (1 - self.cosine))

    def __repr__(self) -> str:
        values = f"kl={self.kl:.4g}, cosine={self.cosine:.4g}, agreement={self.agreement:.4g}"
        return f"Drift({values}, kept={self.kept:.4g}, samples={self.samples})"

    def to_dict(self) -> dict[str, Any]:
        """Return the measures by name, JSON-like, without those of single samples.

        They make the same Drift again. `choose` then takes it as exact: what tells how certain it
        is lies in `per_sample`.

        Example:
            >>> import json
            >>> drift = Drift(0.0123, 0.0119, 0.98, 0.97, samples=64, head="own", of="samples")
            >>> saved = json.dumps(drift.to_dict())
            >>> Drift(**json.loads(saved)) == drift
            True
        """
        names = ("kl", "reverse_kl", "cosine", "agreement", "samples", "head", "of")
        return {name: getattr(self, name) for name in names}


def part_of_kept(drift: Drift) -> tuple[str, float]:
    """Return the measure that `Drift.kept` is made of, and the factor on it."""
    return ("agreement", 1.0) if drift.of == "tokens" else ("cosine", LOST_PER_COSINE)
