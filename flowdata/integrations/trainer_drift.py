"""Drift among the metrics of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flowdata.drift import Drift, DriftMeter

_PREFIX, _LOSS = "eval", "_loss"


class DriftCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the drift at every evaluation and puts it among the evaluation's metrics.

    The metrics are ``eval_drift_kl``, ``eval_drift_cosine``, ``eval_drift_agreement``, and
    ``eval_loss_and_drift``, the sum of loss and KL in nats, for every loss of the evaluation. So
    ``metric_for_best_model="eval_loss_and_drift"`` keeps, and early stopping waits for, the model
    that learned most for what it forgot.

    Args:
        meter: made from the model before training.
        exchange: what a nat of drift counts beside a nat of loss; see `flowdata.drift.choose`.

    Attributes:
        drifts: the drift of every evaluation, by the number of steps before it.

    Example:
        >>> from flowdata.drift import DriftMeter
        >>> trainer = Trainer(
        ...     model, args, callbacks=[DriftCallback(DriftMeter(model, probe))]
        ... )  # doctest: +SKIP
    """

    def __init__(self, meter: DriftMeter, *, exchange: float = 1.0) -> None:
        if not isinstance(meter, DriftMeter):
            raise TypeError(f"meter must be a DriftMeter, got {type(meter).__name__}")
        if not 0 <= exchange < float("inf"):
            raise ValueError(f"exchange must be finite and >= 0, got {exchange!r}")
        self.meter, self.exchange = meter, exchange
        self.drifts: dict[int, Drift] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the drift to an evaluation's metrics, which are logged before anybody reads them."""
        losses = [name for name in logs or {} if name.startswith(_PREFIX) and name.endswith(_LOSS)]
        if not losses or logs is None:
            return
        # Several data sets are evaluated one after another at the same step.
        if state.global_step not in self.drifts:
            self.drifts[state.global_step] = self.meter(model)
        drift = self.drifts[state.global_step]
        measures = {
            f"{_PREFIX}_drift_kl": drift.kl,
            f"{_PREFIX}_drift_cosine": drift.cosine,
            f"{_PREFIX}_drift_agreement": drift.agreement,
        }
        for name in losses:
            measures[f"{name}_and_drift"] = logs[name] + self.exchange * drift.kl
        # The Trainer chooses the best model by this very mapping, and has a copy in its history.
        logs.update(measures)
        if state.log_history:
            state.log_history[-1].update(measures)
