"""Anchors in real trainers and loops, against the gradients of a step by hand."""

import copy

import accelerate
import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from flowdata import DriftMeter, OutputAnchor, ParameterAnchor
from flowdata.integrations.transformers import FlowTrainer, add_anchor
from flowdata.integrations.trl import FlowSFTTrainer
from flowdata.losses import causal_lm_loss, count_items, weighted_mean
from tests.integrations.tiny import collate, make_model, make_samples, make_weights
from tests.models import TinyResNet, images

BATCH = 4
PROBE = make_samples(8)[4:]


def anchors_of(model):
    """One anchor of each kind, and the model a little away from where both hold it."""
    output = OutputAnchor(DriftMeter(model, PROBE, collate, dtype="float32"), 3.0, batch_size=4)
    weights = ParameterAnchor(model, "l2", 0.5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return {"output": output, "weights": weights}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values = gradients_of(model)


def gradients_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def penalty_of(anchor, model, steps):
    """The mean over the batches of a step; every call of an output anchor has another probe."""
    if isinstance(anchor, ParameterAnchor):
        return anchor()
    return torch.stack([anchor(model) for _ in range(steps)]).mean()


def by_hand(model, anchor, batch, weights, steps):
    model = model.train()
    model.zero_grad()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    items = count_items(batch["labels"])
    loss = causal_lm_loss(logits, batch["labels"], weights, num_items=items)
    (loss + penalty_of(anchor, model, steps)).backward()
    return gradients_of(model)


def trainer_of(kind, model, folder, steps):
    samples = make_samples(BATCH * steps)
    options = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": steps,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    if issubclass(kind, SFTTrainer):
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast

        lists = [{k: v.tolist() for k, v in sample.items()} for sample in samples]
        data = Dataset.from_list(lists)
        tokenizer = _tokenizer(PreTrainedTokenizerFast)
        arguments = SFTConfig(**options, max_length=None, bf16=False, gradient_checkpointing=False)
        options = {"processing_class": tokenizer}
    else:
        data, arguments, options = samples, TrainingArguments(**options), {}
    weights = make_weights()[: BATCH * steps]
    if kind in (FlowTrainer, FlowSFTTrainer):
        options["scores"] = weights
    else:
        weights = torch.ones(BATCH * steps)
    trainer = kind(
        model,
        arguments,
        train_dataset=data,
        data_collator=collate if not issubclass(kind, SFTTrainer) else None,
        callbacks=[gradients := Gradients()],
        **options,
    )
    return trainer, gradients, collate(samples), weights


def _tokenizer(kind):
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(40)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return kind(tokenizer_object=inner, pad_token="w0", eos_token="w2", unk_token="w1")


@pytest.mark.parametrize("name", ["output", "weights"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [Trainer, FlowTrainer, SFTTrainer, FlowSFTTrainer])
def test_every_step_of_a_trainer_has_the_penalty_once(kind, steps, name, tmp_path):
    model = make_model()
    anchor = anchors_of(model)[name]
    twin = copy.deepcopy(model)
    twin_anchor = copy.copy(anchor) if name == "output" else None
    trainer, gradients, batch, weights = trainer_of(kind, model, tmp_path, steps)
    add_anchor(trainer, anchor)
    trainer.train()
    if name == "output":
        expected = by_hand(twin, twin_anchor, batch, weights, steps)
    else:
        expected = by_hand(model, anchor, batch, weights, steps)  # the rate was 0
    torch.testing.assert_close(gradients.values, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_and_the_logged_loss_stay_without_the_penalty(tmp_path):
    values = []
    for is_held in (False, True):
        model = make_model()
        anchor = anchors_of(model)["weights"]
        trainer, *_ = trainer_of(Trainer, model, tmp_path, 1)
        if is_held:
            add_anchor(trainer, anchor)
        loss = trainer.train().training_loss
        values.append((loss, trainer.evaluate(make_samples(4))["eval_loss"]))
    assert values[0] == pytest.approx(values[1])


def test_an_anchor_counts_once(tmp_path):
    model = make_model()
    anchors = anchors_of(model)
    trainer, *_ = trainer_of(Trainer, model, tmp_path, 1)
    add_anchor(trainer, anchors["output"])
    add_anchor(trainer, anchors["weights"])
    with pytest.raises(ValueError, match="has this anchor already"):
        add_anchor(trainer, anchors["output"])
    with pytest.raises(TypeError, match="anchor must be an OutputAnchor or a ParameterAnchor"):
        add_anchor(trainer, 0.1)
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer, got LlamaFor"):
        add_anchor(model, ParameterAnchor(model))


class AnchorOnBegin(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        add_anchor(self.trainer, ParameterAnchor(model, "l2", 0.5))


def trainer_of_new_models(folder):
    trainer, *_ = trainer_of(Trainer, make_model(), folder, 1)
    trainer.args.max_steps, trainer.args.learning_rate = 3, 0.1
    return Trainer(
        args=trainer.args,
        model_init=lambda: make_model(),
        train_dataset=trainer.train_dataset,
        data_collator=collate,
    )


def test_an_anchor_of_another_model_than_is_trained_is_refused(tmp_path):
    trainer = trainer_of_new_models(tmp_path)
    add_anchor(trainer, ParameterAnchor(trainer.model))
    with pytest.raises(ValueError, match="make it from the model being trained: pass the Trainer"):
        trainer.train()


def test_new_models_are_held_by_the_way_that_the_refusal_names(tmp_path):
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    moved = []
    for kind in (None, "weights", "output"):
        trainer = trainer_of_new_models(tmp_path)
        if kind == "weights":
            callback = AnchorOnBegin()
            callback.trainer = trainer
            trainer.add_callback(callback)
        elif kind == "output":  # which takes the model that is trained
            meter = DriftMeter(trainer.model, PROBE, collate, dtype="float32")
            add_anchor(trainer, OutputAnchor(meter, 3.0))
        trainer.train()
        end = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        moved.append(float((end - start).norm()))
    assert len(set(moved)) == 3
    assert moved[1] < moved[0]


@pytest.mark.parametrize("of", ["part", "compiled", "whole"])
def test_an_anchor_of_a_part_or_a_wrapper_is_of_the_model(tmp_path, of):
    model = make_model()
    held = {"part": model.model, "compiled": torch.compile(model), "whole": nn.Sequential(model)}[
        of
    ]
    trainer, *_ = trainer_of(Trainer, model, tmp_path, 1)
    add_anchor(trainer, ParameterAnchor(held))
    trainer.train()


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()


def test_a_trainer_whose_step_would_miss_the_penalty_is_refused(tmp_path):
    model = make_model()
    anchor = anchors_of(model)["output"]
    trainer, *_ = trainer_of(OwnStep, model, tmp_path, 1)
    add_anchor(trainer, anchor)
    with pytest.raises(ValueError, match="0 times in a training step"):
        trainer.train()


class Module(lightning.LightningModule):
    def __init__(self, model, anchor):
        super().__init__()
        self.model, self.anchor, self.gradients = model, anchor, None

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        return loss + (
            self.anchor() if isinstance(self.anchor, ParameterAnchor) else self.anchor(self.model)
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_before_optimizer_step(self, optimizer):
        self.gradients = gradients_of(self.model)


def image_anchors(model):
    output = OutputAnchor(DriftMeter(model, images(12, seed=5)), 3.0, batch_size=4)
    weights = ParameterAnchor(model, "l2", 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02)
    return {"output": output, "weights": weights}


def images_by_hand(model, anchor, steps):
    model.train().zero_grad()
    for inputs, targets in DataLoader(images(4 * steps), 4):
        (nn.functional.cross_entropy(model(inputs), targets) / steps).backward()
    penalty_of(anchor, model, steps).backward()
    return gradients_of(model)


@pytest.mark.parametrize("name", ["output", "weights"])
@pytest.mark.parametrize("loop", ["lightning", "accelerate", "accumulated"])
def test_every_step_of_a_loop_has_the_penalty_once(loop, name, tmp_path):
    torch.manual_seed(0)
    steps, model = 2, TinyResNet()
    model.block[3].p = 0.0  # dropout draws another mask in each of the two
    anchor = image_anchors(model)[name]
    twin = model if name == "weights" else copy.deepcopy(model)
    hand_anchor = copy.copy(anchor)
    loader = DataLoader(images(4 * steps), 4)
    run = {"lightning": in_lightning, "accelerate": in_accelerate, "accumulated": accumulated}
    gradients = run[loop](model, anchor, loader, steps, tmp_path)
    expected = images_by_hand(twin, hand_anchor, steps)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def in_lightning(model, anchor, loader, steps, folder):
    module = Module(model, anchor)
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    ).fit(module, loader)
    return module.gradients


def in_accelerate(model, anchor, loader, steps, folder):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model, loader = accelerator.prepare(model.train(), loader)
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            held = anchor() if isinstance(anchor, ParameterAnchor) else anchor(model)
            accelerator.backward(loss + held)
    return gradients_of(model)


def accumulated(model, anchor, loader, steps, folder):
    from flowdata.accumulation import AccumulatedBatches

    model.train()
    for (inputs, targets), num_items in AccumulatedBatches(loader, steps, lambda b: len(b[1])):
        losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
        loss = weighted_mean(losses, torch.ones(len(losses)), num_items=num_items)
        held = anchor() if isinstance(anchor, ParameterAnchor) else anchor(model)
        (loss + held / steps).backward()
    return gradients_of(model)
