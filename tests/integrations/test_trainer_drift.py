"""Drift among the metrics of a real Trainer."""

import copy

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from flowdata import LossScorer
from flowdata.drift import DriftMeter
from flowdata.integrations.trainer_drift import DriftCallback
from flowdata.scoring.collate import pad_collate
from tests.models import tiny_llama, token_samples

PROBE = token_samples(8, longest=20, seed=3)


class Reporter(TrainerCallback):
    """What a logger of experiments sees."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def run(tmp_path, callbacks, eval_dataset=None, **options):
    model = tiny_llama()
    callbacks = [callbacks[0](DriftMeter(model, PROBE, dtype="float32")), *callbacks[1:]]
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 6,
        "eval_steps": 2,
        "save_steps": 2,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**defaults | options),
        train_dataset=token_samples(16, longest=20),
        eval_dataset=token_samples(6, longest=20, seed=1) if eval_dataset is None else eval_dataset,
        data_collator=pad_collate,
        callbacks=callbacks,
    )
    return trainer, callbacks[0]


def test_every_evaluation_has_the_drift_among_its_metrics(tmp_path):
    reporter = Reporter()
    trainer, callback = run(tmp_path, [DriftCallback, reporter])
    base = copy.deepcopy(trainer.model)
    trainer.train()
    evaluations = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    assert [logs["step"] for logs in evaluations] == [2, 4, 6] == list(callback.drifts)
    for logs in evaluations:
        assert logs["eval_drift_kl"] == callback.drifts[logs["step"]].kl > 0
        assert logs["eval_loss_and_drift"] == logs["eval_loss"] + logs["eval_drift_kl"]
    assert sum("eval_drift_kl" in logs for logs in reporter.seen) == 3
    last = DriftMeter(base, PROBE, dtype="float32")(trainer.model)
    assert last.kl == evaluations[-1]["eval_drift_kl"]
    assert trainer.evaluate()["eval_drift_kl"] == last.kl


def test_the_mixed_precision_of_training_is_no_drift(tmp_path):
    trainer, callback = run(tmp_path, [DriftCallback], learning_rate=0.0, bf16=True, max_steps=2)
    scorer = LossScorer(trainer.model, dtype="float32", progress=False)
    before = scorer.score(PROBE).losses
    trainer.train()
    assert [drift.kl for drift in callback.drifts.values()] == [0.0]
    forward = vars(trainer.model)["forward"]
    assert torch.equal(scorer.score(PROBE).losses, before)
    assert vars(trainer.model)["forward"] is forward  # training may go on


def test_a_new_run_forgets_the_drifts_of_the_one_before_and_a_resumed_one_keeps_them(tmp_path):
    trainer, callback = run(tmp_path, [DriftCallback])
    trainer.train()
    earlier = dict(callback.drifts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert list(callback.drifts) == [2, 4, 6]
    assert callback.drifts[4] is earlier[4]
    assert callback.drifts[6] is not earlier[6]
    trainer.args.max_steps = 2
    trainer.train()
    assert list(callback.drifts) == [2]


def test_the_best_model_and_early_stopping_go_by_loss_and_drift(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    trainer, callback = run(
        tmp_path,
        [lambda meter: DriftCallback(meter, exchange=1e6), stopping],
        max_steps=40,
        metric_for_best_model="eval_loss_and_drift",
        greater_is_better=False,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.global_step == 4  # any drift costs more than the loss can gain
    assert trainer.state.best_global_step == 2
    assert callback.meter(trainer.model).kl == callback.drifts[2].kl


def test_the_best_checkpoint_is_that_of_the_least_sum_and_is_measured_anew(tmp_path):
    trainer, callback = run(
        tmp_path,
        [DriftCallback],
        max_steps=12,
        learning_rate=3e-2,
        metric_for_best_model="eval_loss_and_drift",
        load_best_model_at_end=True,
    )
    assert trainer.args.greater_is_better  # what the Trainer makes of a name like this
    trainer.train()
    sums = {
        logs["step"]: logs["eval_loss_and_drift"]
        for logs in trainer.state.log_history
        if "eval_loss" in logs
    }
    best = min(sums, key=sums.get)
    assert len(set(sums.values())) == 6
    assert best != 12
    assert trainer.state.best_metric == sums[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    at_best = callback.drifts[best].kl
    assert trainer.evaluate()["eval_drift_kl"] == at_best != sums[12]


def test_reporters_have_the_drift_where_the_callback_is_first(tmp_path):
    early, late = Reporter(), Reporter()
    trainer, callback = run(tmp_path, [DriftCallback, late], max_steps=2)
    trainer.callback_handler.callbacks.insert(0, early)  # as those of report_to are
    callback.put_first(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    for reporter in (early, late):
        assert sum("eval_drift_kl" in logs for logs in reporter.seen) == 1


def test_the_progress_bar_has_a_line_with_the_drift(tmp_path, capsys):
    trainer, callback = run(tmp_path, [DriftCallback], max_steps=2, disable_tqdm=False)
    trainer.train()
    out = "".join(capsys.readouterr())
    assert f"'eval_drift_kl': '{callback.drifts[2].kl:.4g}'" in out
    assert "'eval_loss_and_drift': '" in out


def test_an_evaluation_without_a_loss_has_the_drift_all_the_same(tmp_path):
    unlabelled = [{"input_ids": s["input_ids"]} for s in token_samples(4, longest=20, seed=1)]
    trainer, callback = run(tmp_path, [DriftCallback], eval_dataset=unlabelled, max_steps=2)
    trainer.train()
    (logs,) = [logs for logs in trainer.state.log_history if "eval_runtime" in logs]
    assert logs["eval_drift_kl"] == callback.drifts[2].kl > 0
    assert not {"eval_loss", "eval_loss_and_drift"} & set(logs)
    assert not any("eval_drift_kl" in logs for logs in trainer.state.log_history if "loss" in logs)


def test_a_run_that_goes_on_measures_as_one_that_was_not_stopped(tmp_path):
    measures = []
    for resumed in (None, str(tmp_path / "checkpoint-4")):
        trainer, _ = run(tmp_path, [DriftCallback], save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resumed)
        evaluations = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
        measures.append([(logs["step"], logs["eval_loss_and_drift"]) for logs in evaluations])
    assert measures[0] == measures[1]


def test_an_evaluation_before_training_has_no_drift(tmp_path):
    trainer, callback = run(tmp_path, [DriftCallback], max_steps=2, eval_on_start=True)
    assert trainer.evaluate()["eval_drift_kl"] == 0
    trainer.train()
    assert {step: drift.kl > 0 for step, drift in callback.drifts.items()} == {0: False, 2: True}


def test_several_data_sets_are_measured_once(tmp_path):
    sets = {name: token_samples(4, longest=20, seed=seed) for seed, name in enumerate("ab")}
    trainer, callback = run(tmp_path, [DriftCallback], eval_dataset=sets, max_steps=2)
    calls = []
    callback.meter = lambda model, meter=callback.meter: calls.append(1) or meter(model)
    trainer.train()
    assert len(calls) == 1
    merged = {name: v for logs in trainer.state.log_history for name, v in logs.items()}
    for name in "ab":
        expected = merged[f"eval_{name}_loss"] + merged["eval_drift_kl"]
        assert merged[f"eval_{name}_loss_and_drift"] == expected


def test_a_callback_of_two_trainers_measures_the_model_of_each(tmp_path):
    trainer, callback = run(tmp_path, [DriftCallback], max_steps=2)
    trainer.train()
    first = callback.drifts[2].kl
    again, _ = run(tmp_path, [lambda meter: callback], max_steps=2, learning_rate=1e-1)
    again.train()
    drifts = [logs["eval_drift_kl"] for logs in again.state.log_history if "eval_loss" in logs]
    assert drifts == [callback.meter(again.model).kl] != [first]


@pytest.mark.parametrize("write", ["data", "adapters"])
def test_a_model_that_changed_between_evaluations_is_measured_anew(tmp_path, write):
    """Averages of weights are swapped in by writes that PyTorch does not count."""
    trainer, callback = run(tmp_path, [DriftCallback])
    assert trainer.evaluate()["eval_drift_kl"] == 0
    if write == "data":
        for parameter in trainer.model.parameters():
            parameter.data.copy_(1.5 * parameter.data)
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        trainer.model = peft.get_peft_model(trainer.model, config)
        trainer.callback_handler.model = trainer.model
    drift = callback.meter(trainer.model).kl
    assert trainer.evaluate()["eval_drift_kl"] == drift > 0
    if write == "adapters":
        with trainer.model.disable_adapter():
            assert trainer.evaluate()["eval_drift_kl"] == 0


def test_training_is_the_same_with_the_callback(tmp_path):
    weights = []
    for callbacks in ([DriftCallback], [lambda meter: TrainerCallback()]):
        trainer, _ = run(tmp_path, callbacks)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_what_is_no_meter_is_refused():
    with pytest.raises(TypeError, match="meter must be a DriftMeter, got LlamaForCausalLM"):
        DriftCallback(tiny_llama())


@pytest.mark.parametrize("exchange", [-1, float("nan"), float("inf"), "1"])
def test_what_is_no_exchange_is_refused(exchange):
    meter = DriftMeter(torch.nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match="exchange must be finite and >= 0"):
        DriftCallback(meter, exchange=exchange)
