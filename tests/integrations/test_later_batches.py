"""Losses of a model's own that are those of a name on the first batch, and not on a later one."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from flowdata.integrations.transformers import FlowTrainer
from tests.integrations.test_first_batch import arguments


class Net(nn.Module):
    """A classifier with a loss of its own."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.loss = nn.Linear(4, 3), loss

    def forward(self, x, labels=None):
        logits = self.head(x)
        return {
            "logits": logits,
            "loss": None if labels is None else self.loss(self, logits, labels),
        }


def plain(model, logits, labels):
    return F.cross_entropy(logits, labels)


def weighing_the_last_class(model, logits, labels):
    return F.cross_entropy(logits, labels, torch.tensor([1.0, 1.0, 5.0]))


def ignoring_the_last_class(model, logits, labels):
    return F.cross_entropy(logits, labels, ignore_index=2)


def staying_near_its_start(model, logits, labels):
    if not hasattr(model, "start"):
        model.start = model.head.weight.detach().clone()
    return F.cross_entropy(logits, labels) + (model.head.weight - model.start).square().sum()


def rows():
    """Eight rows of the first two classes, and eight of all three."""
    generator = torch.Generator().manual_seed(0)
    labels = [i % 2 for i in range(8)] + [i % 3 for i in range(8)]
    return [{"x": torch.randn(4, generator=generator), "labels": label} for label in labels]


def train(folder, model, samples, cls=FlowTrainer, **options):
    options |= {"per_device_train_batch_size": 8, "learning_rate": 0.5, "max_steps": 2}
    settings = arguments(
        folder, gradient_accumulation_steps=1, train_sampling_strategy="sequential", **options
    )
    weights = {"scores": torch.ones(len(samples))} if cls is FlowTrainer else {}
    trainer = cls(model, settings, train_dataset=samples, **weights)
    trainer.train()
    return torch.cat([each.detach().flatten() for each in trainer.model.parameters()])


@pytest.mark.parametrize(
    "loss", [weighing_the_last_class, ignoring_the_last_class, staying_near_its_start]
)
def test_a_loss_that_is_another_one_on_a_later_batch_is_refused(tmp_path, loss):
    with pytest.raises(ValueError, match=r"loss='cross_entropy', and the model's own is"):
        train(tmp_path, Net(loss), rows())


def test_a_loss_that_stays_the_same_is_trained_on(tmp_path):
    moved = train(tmp_path, Net(plain), rows())
    expected = train(tmp_path, Net(plain), rows(), transformers.Trainer)
    torch.testing.assert_close(moved, expected)


def test_labels_that_a_class_of_transformers_masks_are_seen_on_the_batch_that_has_them(tmp_path):
    """BioGPT's token classifier counts no label where its attention mask is 0."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BioGptConfig(vocab_size=99, intermediate_size=32, num_labels=5, **sizes)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(16):
        length = 12 if number < 8 else 6
        samples.append(
            {
                "input_ids": torch.randint(4, 99, (12,), generator=generator),
                "attention_mask": (torch.arange(12) < length).long(),
                "labels": torch.randint(5, (12,), generator=generator),
            }
        )
    model = transformers.BioGptForTokenClassification(config)
    with pytest.raises(ValueError, match="by loss='cross_entropy', and the model's own is"):
        train(tmp_path, model, samples)


@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_floating_labels_of_pairs_are_no_weights_in_evaluation(tmp_path, shift):
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(4, generator=generator), torch.rand((), generator=generator) + shift)
        for _ in range(16)
    ]

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(4, 1)

        def forward(self, x, labels=None):
            values = self.head(x).squeeze(-1)
            return {
                "loss": None if labels is None else F.mse_loss(values, labels),
                "logits": values,
            }

    def collate(rows):
        inputs, labels = zip(*rows, strict=True)
        return {"x": torch.stack(inputs), "labels": torch.stack(labels)}

    losses = []
    for cls, options in ((transformers.Trainer, {}), (FlowTrainer, {"scores": torch.ones(16)})):
        trainer = cls(
            Regression(),
            arguments(tmp_path, remove_unused_columns=False),
            train_dataset=pairs,
            eval_dataset=pairs,
            data_collator=collate,
            **options,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
