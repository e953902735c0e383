"""FlowTrainer's optimiser steps under overridden methods and streams, against a loop by hand."""

import re

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, SequentialSampler, WeightedRandomSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from flowdata.integrations.transformers import FlowTrainer, FlowTrainerMixin
from tests.integrations import tiny
from tests.integrations.test_transformers import flow_trainer

SETTINGS = {"gradient_accumulation_steps": 3, "learning_rate": 0.0, "max_grad_norm": 0.0}
PASS_ON = "compute_loss was called without num_items_in_batch"
IGNORES = "loss that ignores the weights"
NO_COUNT = "get_batch_samples is overridden by a class that doesn't ask super()"


class Steps(TrainerCallback):
    """Records the samples and the gradient of each step."""

    def __init__(self, trainer: Trainer) -> None:
        self.batch: list[int] = []
        self.steps: list[tuple[list[int], Tensor]] = []
        numbers = {tuple(s["input_ids"].tolist()): i for i, s in enumerate(tiny.make_samples())}

        def note(module, args, fields):
            if module.training and torch.is_grad_enabled() and fields.get("labels") is None:
                rows = [tuple(row[row != 0].tolist()) for row in fields["input_ids"]]
                self.batch += [numbers[row] for row in rows]

        trainer.model.register_forward_pre_hook(note, with_kwargs=True)
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append((self.batch, tiny.flat_gradient(model)))
        self.batch = []


def gradients_by_hand():
    """Each sample's gradient of the sum of its losses, alone, and its number of targets."""
    gradients, counts = [], []
    for sample in tiny.make_samples():
        model = tiny.make_model()
        batch = tiny.collate([sample])
        count = int((batch["labels"][:, 1:] != -100).sum())
        (model(**batch).loss * count).backward()
        gradients.append(tiny.flat_gradient(model))
        counts.append(count)
    return torch.stack(gradients), torch.tensor(counts)


def assert_steps_by_hand(steps, weights):
    gradients, counts = gradients_by_hand()
    for rows, gradient in steps:
        expected = (weights[rows][:, None] * gradients[rows]).sum(0) / counts[rows].sum()
        tiny.assert_same_gradient(gradient, expected)


def run(folder, cls=FlowTrainer, **options):
    options = {"scores": tiny.make_weights(), "settings": SETTINGS} | options
    trainer = flow_trainer(folder, cls, **options)
    steps = Steps(trainer)
    trainer.train()
    return trainer, steps.steps


class StepsItself(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class Before(FlowTrainerMixin, StepsItself):
    pass


class After(FlowTrainer):
    training_step = StepsItself.training_step


class Twice(FlowTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        once = super().compute_loss(model, inputs, False, num_items_in_batch)
        again = super().compute_loss(model, inputs, False, num_items_in_batch)
        return (once + again) / 2


@pytest.mark.parametrize("cls", [Before, After])
def test_a_training_step_of_ones_own_may_pass_the_denominator_on(tmp_path, cls):
    _, steps = run(tmp_path, cls)
    assert len(steps) == 6
    assert_steps_by_hand(steps, tiny.make_weights())


def test_a_loss_may_be_computed_more_than_once_for_a_batch(tmp_path):
    _, steps = run(tmp_path, Twice)
    _, once = run(tmp_path)
    for (_, gradient), (_, expected) in zip(steps, once, strict=True):
        tiny.assert_same_gradient(gradient, expected)


class DropsTheDenominator(FlowTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class DividesBySteps(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
        return loss.detach()


class Divides(FlowTrainerMixin, DividesBySteps):
    pass


class OwnLoss(FlowTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return model(**{k: v for k, v in inputs.items() if k != "weight"}).loss


class OwnStep(FlowTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**{k: v for k, v in inputs.items() if k != "weight"}).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Evaluates(FlowTrainer):
    """Leaves the model in eval(), in which the loss is the Trainer's own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.eval()
        inputs = {k: v for k, v in inputs.items() if k != "weight"}
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class SomeOwnLosses(FlowTrainer):
    number = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.number += 1
        if self.number % 2:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return OwnLoss.compute_loss(self, model, inputs)


class OwnBatches(FlowTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)


class NoCount(FlowTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


REFUSED = {
    DropsTheDenominator: PASS_ON,
    Divides: PASS_ON,
    OwnLoss: IGNORES,
    OwnStep: IGNORES,
    SomeOwnLosses: IGNORES,
    Evaluates: IGNORES,
    OwnBatches: NO_COUNT,
    NoCount: NO_COUNT,
}


@pytest.mark.parametrize("cls", REFUSED)
def test_a_step_with_another_loss_or_denominator_is_refused(tmp_path, cls):
    before = tiny.make_model().state_dict()
    trainer = flow_trainer(tmp_path, cls, scores=tiny.make_weights(), settings=SETTINGS)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(REFUSED[cls])):
        trainer.train()
    # Refused before the first step, not after it.
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_of_one_batch_is_its_own_denominator(tmp_path):
    settings = {**SETTINGS, "gradient_accumulation_steps": 1}
    _, steps = run(tmp_path, DropsTheDenominator, settings=settings)
    assert_steps_by_hand(steps, tiny.make_weights())


def test_a_collator_put_in_later_is_refused(tmp_path):
    trainer = flow_trainer(tmp_path, scores=tiny.make_weights())
    trainer.data_collator = lambda samples: tiny.collate(samples)
    with pytest.raises(ValueError, match="a training batch has no 'weight'"):
        trainer.train()


def stream(weights, rows=tiny.N):
    dataset = tiny.as_hf_dataset(tiny.make_samples(), weight=weights.tolist())
    return dataset.select(range(rows)).to_iterable_dataset()


def collate(rows):
    return tiny.collate([{k: torch.tensor(v) for k, v in row.items()} for row in rows])


@pytest.mark.parametrize("size", [3, 4, 5])
def test_what_a_stream_leaves_of_a_step_goes_into_the_next_one(tmp_path, size):
    """Each pass over the stream has 11, 8 or 7 batches, and a step has 3."""
    weights = tiny.make_weights()
    settings = {**SETTINGS, "per_device_train_batch_size": size, "max_steps": 8}
    data = {"train_dataset": stream(weights), "scores": None, "data_collator": collate}
    _, steps = run(tmp_path, settings=settings, **data)
    assert len(steps) == 8
    rows = [row for step, _ in steps for row in step]
    assert rows == [index % tiny.N for index in range(len(rows))]
    assert len(rows) > 2 * tiny.N
    assert_steps_by_hand(steps, weights)


def test_a_stream_that_is_too_short_for_a_step_is_refused(tmp_path):
    data = {"train_dataset": stream(tiny.make_weights(), 8), "scores": None}
    with pytest.raises(ValueError, match=r"ended after 2 batches, before its first step of .*=3"):
        run(tmp_path, data_collator=collate, **data)


def rows_of_steps(folder, checkpoint=None, train_dataset=None):
    """Passes have 11 batches and steps 3: the third step leaves 2 batches, and a fourth none."""
    dataset = train_dataset or stream(tiny.make_weights())
    data = {"train_dataset": dataset, "data_collator": collate}
    settings = {**SETTINGS, "per_device_train_batch_size": 3, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    trainer = flow_trainer(folder, settings=settings, **data)
    steps = Steps(trainer)
    trainer.train(resume_from_checkpoint=checkpoint and str(folder / f"checkpoint-{checkpoint}"))
    return [rows for rows, _ in steps.steps]


def test_a_stream_goes_on_where_a_checkpoint_left_less_than_a_step_of_it(tmp_path):
    whole = rows_of_steps(tmp_path)
    assert whole[3][:5] == [27, 28, 29, 30, 31]
    for checkpoint in (2, 3):
        assert rows_of_steps(tmp_path, checkpoint) == whole[checkpoint:]
    with pytest.raises(ValueError, match=r"ended after 2 batches, before its first step of .*=3"):
        rows_of_steps(tmp_path, 3, stream(tiny.make_weights(), 5))


def test_a_stream_resumed_in_a_later_pass_begins_anew_with_a_warning(tmp_path, caplog):
    def warnings():
        return [record.getMessage() for record in caplog.records if record.name == "flowdata"]

    whole = rows_of_steps(tmp_path)
    rows_of_steps(tmp_path, 3)
    assert not warnings()
    assert rows_of_steps(tmp_path, 4) == whole[:2]
    (message,) = warnings()
    assert "saved after 12 batches, and a pass over the training stream has no more" in message

    repeated = stream(tiny.make_weights()).repeat(None)  # as the warning says
    whole = rows_of_steps(tmp_path, train_dataset=repeated)
    assert rows_of_steps(tmp_path, 4, repeated) == whole[4:]
    assert len(warnings()) == 1


def test_a_run_broken_off_leaves_no_step_behind(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = flow_trainer(tmp_path, scores=tiny.make_weights(), settings=SETTINGS)
    trainer.add_callback(Stop())
    trainer.train()
    trainer.model.train()
    batch = {**tiny.collate(tiny.make_samples()[:2]), "weight": torch.ones(2)}
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_samples_are_not_drawn_from_other_data_than_was_weighed(tmp_path):
    trainer = flow_trainer(tmp_path, scores=tiny.make_weights(), resample=True)
    trainer.train_dataset = tiny.make_samples()[::-1]
    with pytest.raises(ValueError, match="by the weights of the train_dataset of 32 samples"):
        trainer.train()

    class Shorter(FlowTrainer):
        def get_train_dataloader(self):
            dataset = tiny.make_samples()[:20]
            options = {"sampler": self._get_train_sampler(), "collate_fn": tiny.collate}
            return torch.utils.data.DataLoader(dataset, 4, **options)

    with pytest.raises(ValueError, match="and training would draw from another"):
        flow_trainer(tmp_path, Shorter, scores=tiny.make_weights(), resample=True).train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compute_loss_func", lambda outputs, *_, **__: outputs.loss),
        ("label_smoother", LabelSmoother()),
    ],
)
def test_a_loss_that_is_set_after_construction_is_refused(tmp_path, name, value):
    trainer = flow_trainer(tmp_path, scores=tiny.make_weights(), settings=SETTINGS)
    setattr(trainer, name, value)
    with pytest.raises(ValueError, match=r"ignores the weights|never sees the weights"):
        trainer.train()


def test_a_trainer_told_to_divide_once_more_does_not(tmp_path):
    trainer = flow_trainer(tmp_path, scores=tiny.make_weights(), settings=SETTINGS)
    trainer.loss_is_scaled_for_ga = False
    steps = Steps(trainer)
    trainer.train()
    assert_steps_by_hand(steps.steps, tiny.make_weights())


class AnotherSampler(TrainerCallback):
    """Puts a sampler in at the first step; the loader begins to use it in the next epoch."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.batch_sampler.sampler = self.sampler


def test_a_sampler_that_a_callback_takes_away_is_missed(tmp_path):
    callbacks = [AnotherSampler(SequentialSampler(range(tiny.N)))]
    with pytest.raises(ValueError, match="the training loader doesn't use it"):
        run(tmp_path, resample=True, callbacks=callbacks)


def test_weights_that_a_callback_lets_act_twice_are_refused(tmp_path):
    weights = tiny.make_weights()
    callbacks = [AnotherSampler(WeightedRandomSampler(3 * weights.double(), tiny.N))]
    with pytest.raises(ValueError, match="act twice: a WeightedRandomSampler draws"):
        run(tmp_path, callbacks=callbacks)


class Drawn(FlowTrainer):
    draws = None

    def _get_train_sampler(self, *args, **kwargs):
        return WeightedRandomSampler(self.draws, tiny.N)


def test_classes_may_be_balanced_beside_the_weights(tmp_path):
    weights = tiny.make_weights()

    class Balanced(Drawn):
        draws = 1.0 + torch.arange(tiny.N) % 2

    _, steps = run(tmp_path, Balanced)
    assert_steps_by_hand(steps, weights)

    class Twice(Drawn):
        draws = weights

    with pytest.raises(ValueError, match="act twice: a WeightedRandomSampler draws"):
        run(tmp_path, Twice)


class StopsWithin(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = True


class AccumulatesFewer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps = 2


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (StopsWithin, "set within an optimiser step"),
        (AccumulatesFewer, "args.gradient_accumulation_steps was changed within the run"),
    ],
)
def test_a_step_that_is_cut_short_is_refused(tmp_path, callback, message):
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, callbacks=[callback()])


class RunsOutOfMemory(FlowTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_a_smaller_batch_size_is_found_and_trained_on_exactly(tmp_path):
    settings = {**SETTINGS, "auto_find_batch_size": True, "num_train_epochs": 1, "max_steps": -1}
    _, steps = run(tmp_path, RunsOutOfMemory, settings=settings)
    assert len(steps) == 6  # 16 batches of 2
    assert_steps_by_hand(steps[1:], tiny.make_weights())  # the first has rows of the try before


def test_a_collator_that_sorts_is_refused(tmp_path):
    def by_length(samples):
        return tiny.collate(sorted(samples, key=lambda sample: -len(sample["input_ids"])))

    with pytest.raises(ValueError, match="puts the samples of a batch in another order"):
        run(tmp_path, data_collator=by_length)


@pytest.mark.parametrize("bad", [float("nan"), -0.5, None])
def test_a_column_of_weights_that_are_none_is_refused(tmp_path, bad):
    weights = [bad, *tiny.make_weights().tolist()[1:]]
    dataset = tiny.as_hf_dataset(tiny.make_samples(), weight=weights)
    for data, words in (
        (dataset, "1 of the 32 rows of train_dataset have no usable 'weight'"),
        (dataset.to_iterable_dataset(), "of the batch has the weight"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, train_dataset=data, scores=None, data_collator=collate)


def test_a_stream_with_a_length_has_no_scores(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(tiny.make_samples())

        def __len__(self):
            return tiny.N

    with pytest.raises(ValueError, match="scores= needs a data set with a length and an order"):
        run(tmp_path, train_dataset=Stream())
