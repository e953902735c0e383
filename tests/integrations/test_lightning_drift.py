"""Drift among the metrics of a real Lightning Trainer."""

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
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


def fit(tmp_path, callbacks, epochs=3, rate=0.1, kind=Module, valid=None, bar=False):
    torch.manual_seed(0)
    module = kind(TinyResNet(), rate)
    base = copy.deepcopy(module.model)
    meter = DriftMeter(module.model, images(12, seed=5))
    drift = callbacks[0](meter)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[drift, *callbacks[1:]],
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=bar,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    valid = DataLoader(images(10, seed=1), 5) if valid is None else valid
    trainer.fit(module, DataLoader(images(20), 5), valid)
    return trainer, module, base, drift


def test_a_new_run_forgets_the_drifts_of_the_one_before(tmp_path):
    module = fit(tmp_path, [DriftCallback])[1]
    callback = DriftCallback(DriftMeter(module.model, images(12, seed=5)))
    assert list(fit(tmp_path, [lambda meter: callback])[-1].drifts) == [4, 8, 12]
    assert list(fit(tmp_path, [lambda meter: callback], epochs=1)[-1].drifts) == [4]


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


def test_the_best_checkpoint_is_that_of_the_least_sum(tmp_path):
    class Sums(lightning.Callback):
        def __init__(self):
            self.values = {}

        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                value = trainer.callback_metrics["val_loss_and_drift"]
                self.values[trainer.global_step] = float(value)

    keep, sums = ModelCheckpoint(tmp_path, monitor="val_loss_and_drift"), Sums()
    trainer, module, base, _ = fit(tmp_path, [DriftCallback, keep, sums], epochs=6, rate=0.3)
    best = min(sums.values, key=sums.values.get)
    assert len(set(sums.values.values())) == 6
    assert f"step={best}." in keep.best_model_path
    assert float(keep.best_model_score) == sums.values[best]
    module.load_state_dict(torch.load(keep.best_model_path)["state_dict"])
    drift = DriftMeter(base, images(12, seed=5))(module.model)
    loss = trainer.validate(module, DataLoader(images(10, seed=1), 5), verbose=False)[0]["val_loss"]
    assert loss + drift.kl == pytest.approx(sums.values[best], rel=1e-5)


def test_the_progress_bar_shows_the_drift(tmp_path, capsys):
    trainer, *_ = fit(tmp_path, [DriftCallback], epochs=1, bar=True)
    assert {"val_drift_kl", "val_loss_and_drift"} <= set(trainer.progress_bar_metrics)
    out = "".join(capsys.readouterr())
    assert "val_drift_kl" in out
    assert "val_loss_and" in out  # a narrow terminal cuts names


def test_every_data_set_that_is_validated_has_its_sum(tmp_path):
    class Two(Module):
        def validation_step(self, batch, _, dataloader_idx=0):
            super().validation_step(batch, _)

    valid = [DataLoader(images(10, seed=seed), 5) for seed in (1, 2)]
    trainer, _, _, callback = fit(tmp_path, [DriftCallback], kind=Two, valid=valid)
    metrics, drift = trainer.callback_metrics, callback.drifts[12]
    for number in range(2):
        loss = float(metrics[f"val_loss/dataloader_idx_{number}"])
        both = float(metrics[f"val_loss_and_drift/{number}"])
        assert both == pytest.approx(loss + drift.kl)


def test_a_loss_of_the_validation_before_is_not_taken_for_this_ones(tmp_path, caplog):
    class Late(Module):
        def validation_step(self, batch, _):
            self.loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def on_validation_epoch_end(self):
            self.log("val_loss", self.loss)

    with caplog.at_level("WARNING", "flowdata"):
        trainer, *_ = fit(tmp_path, [DriftCallback], kind=Late)
    assert "val_loss_and_drift" not in trainer.callback_metrics
    assert "log it in validation_step" in caplog.text


def test_the_model_can_be_named(tmp_path):
    named = fit(tmp_path, [lambda m: DriftCallback(m, model=lambda module: module.model)])[-1]
    found = fit(tmp_path, [DriftCallback])[-1]
    assert named.drifts == found.drifts


def test_what_is_no_meter_is_refused():
    with pytest.raises(TypeError, match="meter must be a DriftMeter, got TinyResNet"):
        DriftCallback(TinyResNet())


@pytest.mark.parametrize("exchange", [-1, float("nan"), float("inf"), "1"])
def test_what_is_no_exchange_is_refused(exchange):
    meter = DriftMeter(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match="exchange must be finite and >= 0"):
        DriftCallback(meter, exchange=exchange)


class Keeping(Module):
    """Keeps the model that it validates."""

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.validated = copy.deepcopy(self.model)


@pytest.mark.parametrize("first", [0, 1])
def test_the_drift_is_that_of_the_averaged_model_that_is_validated(tmp_path, first):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    module = Keeping(network, 0.5)
    meter = DriftMeter(network, images(12, seed=5))
    callbacks = [DriftCallback(meter), EMAWeightAveraging(decay=0.9, update_every_n_steps=1)]
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=callbacks if first == 0 else callbacks[::-1],
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(images(20), 5), DataLoader(images(10, seed=1), 5))
    (drift,) = callbacks[0].drifts.values()
    assert drift.kl == pytest.approx(meter(module.validated).kl, rel=1e-5) != 0
