"""Drift among the metrics of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flowdata._common.notices import logger
from flowdata._common.real_numbers import check_factor
from flowdata.drift import Drift, DriftMeter
from flowdata.store.fingerprint.model import state_of

_PREFIX, _LOSS = "eval_", "_loss"
_LESS_IS_BETTER = ("_and_drift", "drift_kl")


class DriftCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the drift at every evaluation and puts it among the evaluation's metrics.

    The metrics are ``eval_drift_kl``, ``eval_drift_cosine``, ``eval_drift_agreement``, and
    ``eval_loss_and_drift``, the sum of loss and KL in nats, for every loss of the evaluation. So
    ``metric_for_best_model="eval_loss_and_drift"`` keeps, and early stopping waits for, the model
    that learned most for what it forgot. The Trainer's history, its progress bar and callbacks
    behind this one have them too. Those that it makes itself for ``report_to`` are called before
    callbacks of yours; `put_first` lets them wait.

    Args:
        meter: made from the model before training.
        exchange: what a nat of drift counts beside a nat of loss; see `flowdata.drift.choose`.

    Attributes:
        drifts: the drift of every evaluation, by the number of steps before it. A run that begins
            forgets those of an earlier one beyond the step at which it begins.

    Raises:
        TypeError: `meter` is none.
        ValueError: `exchange` is no finite number ≥ 0.

    Example:
        >>> from flowdata.drift import DriftMeter
        >>> drift = DriftCallback(DriftMeter(model, probe))  # doctest: +SKIP
        >>> trainer = Trainer(model, args, callbacks=[drift])  # doctest: +SKIP
        >>> drift.put_first(trainer)  # where report_to names any  # doctest: +SKIP
    """

    def __init__(self, meter: DriftMeter, *, exchange: float = 1.0) -> None:
        if not isinstance(meter, DriftMeter):
            raise TypeError(f"meter must be a DriftMeter, got {type(meter).__name__}")
        self.meter, self.exchange = meter, check_factor("exchange", exchange)
        self.drifts: dict[int, Drift] = {}
        self._state: object = None  # the step and the fingerprint that were measured last

    def put_first(self, trainer: Trainer) -> None:
        """Let a Trainer call this callback before all others, those that report metrics included.

        Args:
            trainer: that has this callback, or is to have it.
        """
        handler = trainer.callback_handler
        others = [callback for callback in handler.callbacks if callback is not self]
        handler.callbacks = [self, *others]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let less of what is measured here be better, where the best model is chosen by it.

        The Trainer takes more of any metric for better whose name does not end with "loss".
        """
        self._state = None
        self.drifts = {step: d for step, d in self.drifts.items() if step <= state.global_step}
        name = args.metric_for_best_model or ""
        if name.endswith(_LESS_IS_BETTER) and args.greater_is_better:
            args.greater_is_better = False
            logger.info("the best model is that of the least %s: greater_is_better=False", name)

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
        names = [name for name in logs or {} if name.startswith(_PREFIX)]
        if not names or logs is None:
            return
        drift = self._drift_of(model, state.global_step)
        measures = {
            f"{_PREFIX}drift_kl": drift.kl,
            f"{_PREFIX}drift_cosine": drift.cosine,
            f"{_PREFIX}drift_agreement": drift.agreement,
        }
        losses = [name for name in names if name.endswith(_LOSS)]
        measures |= {f"{name}_and_drift": logs[name] + self.exchange * drift.kl for name in losses}
        # The Trainer chooses the best model by this very mapping, and has a copy in its history.
        logs.update(measures)
        if state.log_history:
            state.log_history[-1].update(measures)

    def _drift_of(self, model: Any, step: int) -> Drift:
        """The drift of a model, measured once where several data sets are evaluated.

        Nothing tells that their evaluations belong together but the model, which is what it was.
        """
        state = step, state_of(model)
        if state != self._state:
            self.drifts[step] = self.meter(model)
            self._state = state
        return self.drifts[step]
