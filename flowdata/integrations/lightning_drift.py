"""Drift among the metrics of Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from flowdata._common.notices import logger
from flowdata._common.real_numbers import check_factor
from flowdata.drift import Drift, DriftMeter


class DriftCallback(Callback):  # type: ignore[misc]
    """Measures the drift at every validation and logs it beside the validation loss.

    The metrics are ``val_drift_kl``, ``val_drift_cosine``, ``val_drift_agreement`` and, where the
    module logs a loss in its `validation_step`, ``val_loss_and_drift``, the sum of both in nats; of
    several data sets ``val_loss_and_drift/0`` and so on. So
    ``ModelCheckpoint(monitor="val_loss_and_drift")`` keeps the model that learned most for what it
    forgot, and ``EarlyStopping`` may wait for it. The progress bar shows ``val_drift_kl`` and the
    sums.

    Args:
        meter: made from the model before training.
        model: LightningModule -> the model in it that the meter was made from; None is its
            attribute `model`, or the module itself where it has none.
        loss: the name under which the module logs its validation loss, and with which that of the
            sum begins.
        exchange: what a nat of drift counts beside a nat of loss; see `flowdata.drift.choose`.

    Attributes:
        drifts: the drift of every validation, by the number of steps before it. A run that begins
            forgets those of an earlier one beyond the step at which it begins.

    Raises:
        TypeError: `meter` is none.
        ValueError: `exchange` is no finite number ≥ 0.
    """

    def __init__(
        self,
        meter: DriftMeter,
        *,
        model: Callable[[LightningModule], nn.Module] | None = None,
        loss: str = "val_loss",
        exchange: float = 1.0,
    ) -> None:
        if not isinstance(meter, DriftMeter):
            raise TypeError(f"meter must be a DriftMeter, got {type(meter).__name__}")
        self.meter, self.model, self.loss = meter, model, loss
        self.exchange = check_factor("exchange", exchange)
        self.drifts: dict[int, Drift] = {}
        self._before: dict[str, Tensor] = {}
        self._drift: Drift | None = None  # of the validation that runs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the drifts of an earlier run."""
        begin = trainer.global_step
        self.drifts = {step: drift for step, drift in self.drifts.items() if step <= begin}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the losses of the validation before, which stay among the metrics."""
        self._before, self._drift = self._losses(trainer), None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **named: Any
    ) -> None:
        """Measure the model that is validated, in which averaged weights may be by now."""
        if self._drift is None and not trainer.sanity_checking:
            self._drift = self._measured(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log once the validation's losses are known, and before others read its metrics."""
        if trainer.sanity_checking:
            return
        drift = self._measured(pl_module) if self._drift is None else self._drift
        self.drifts[trainer.global_step] = drift
        pl_module.log("val_drift_kl", drift.kl, prog_bar=True)
        pl_module.log_dict(
            {"val_drift_cosine": drift.cosine, "val_drift_agreement": drift.agreement}
        )
        losses = self._losses(trainer)
        for name, value in losses.items():
            if value is self._before.get(name):
                logger.warning(
                    "the module logged no %s before its validation ended, so that there is no sum "
                    "of it and the drift; log it in validation_step",
                    name,
                )
                continue
            # Lightning adds the words "dataloader_idx" itself, and takes no name that has them.
            both = f"{self.loss}_and_drift" + name[len(self.loss) :].replace("dataloader_idx_", "")
            pl_module.log(both, float(value) + self.exchange * drift.kl, prog_bar=True)

    def _measured(self, module: LightningModule) -> Drift:
        return self.meter(_model_of(module) if self.model is None else self.model(module))

    def _losses(self, trainer: Trainer) -> dict[str, Tensor]:
        """The validation losses among a Trainer's metrics: one for each data set."""
        beginning = f"{self.loss}/dataloader_idx_"
        return {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name == self.loss or name.startswith(beginning)
        }


def _model_of(module: LightningModule) -> nn.Module:
    model = getattr(module, "model", None)
    return model if isinstance(model, nn.Module) else module
