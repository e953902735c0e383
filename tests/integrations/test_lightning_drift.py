"""Drift among the metrics of a real Lightning Trainer."""

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from flowdata.drift import DriftMeter
from flowdata.integrations.lightning import DriftCallback
from tests.models import TinyResNet, images


class Module(lightning.LightningModule):
    def __init__(self, model, rate):
        super().__init__()
        self.model, self.rate = model, rate

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def fit(tmp_path, callbacks, epochs=3, rate=0.1):
    torch.manual_seed(0)
    module = Module(TinyResNet(), rate)
    base = copy.deepcopy(module.model)
    meter = DriftMeter(module.model, images(12, seed=5))
    drift = callbacks[0](meter)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[drift, *callbacks[1:]],
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    trainer.fit(module, DataLoader(images(20), 5), DataLoader(images(10, seed=1), 5))
    return trainer, module, base, drift


def test_every_validation_has_the_drift_among_its_metrics(tmp_path):
    trainer, module, base, callback = fit(tmp_path, [DriftCallback])
    assert list(callback.drifts) == [4, 8, 12]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    last = DriftMeter(base, images(12, seed=5))(module.model)
    assert metrics["val_drift_kl"] == pytest.approx(last.kl) == callback.drifts[12].kl
    expected = metrics["val_loss"] + metrics["val_drift_kl"]
    assert metrics["val_loss_and_drift"] == pytest.approx(expected)


def test_checkpoints_and_early_stopping_go_by_loss_and_drift(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss_and_drift")
    stop = EarlyStopping("val_loss_and_drift", patience=1)
    callbacks = [lambda meter: DriftCallback(meter, exchange=1e6), keep, stop]
    trainer, _, _, callback = fit(tmp_path, callbacks, epochs=20)
    assert trainer.current_epoch < 19  # any drift costs more than the loss can gain
    assert "step=4" in keep.best_model_path
    assert callback.drifts[4].kl == min(drift.kl for drift in callback.drifts.values())


def test_the_model_can_be_named(tmp_path):
    named = fit(tmp_path, [lambda m: DriftCallback(m, model=lambda module: module.model)])[-1]
    found = fit(tmp_path, [DriftCallback])[-1]
    assert named.drifts == found.drifts


def test_what_is_no_meter_is_refused():
    with pytest.raises(TypeError, match="meter must be a DriftMeter, got TinyResNet"):
        DriftCallback(TinyResNet())
