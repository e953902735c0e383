"""Samples that are few among many, and other than those that are checked before a run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowdata import LossScorer
from flowdata.errors import DisagreementError
from flowdata.scoring.kinds import LONGEST_CHECKED, kind_of


class Mean(nn.Module):
    """Classifies texts by the mean of their tokens, those that pad them too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 4)
        nn.init.constant_(self.embed.weight[0], 5.0)  # of padding

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids).mean(1))


class MeanLanguageModel(Mean):
    """Predicts tokens, each by the mean of all of its batch's row."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 50)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        rows = self.embed(input_ids)
        return {"logits": self.head(rows + rows.mean(1, keepdim=True))}


def long_texts(count, short, *, labels):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count + short):
        length = 8 if number >= count else LONGEST_CHECKED + 1 + 150 * (number % 5)
        ids = torch.randint(1, 50, (length,), generator=generator)
        samples.append({"input_ids": ids, "labels": number % 4 if labels else ids})
    return samples


@pytest.mark.parametrize("short", [0, 100])
def test_long_samples_of_classifiers_are_checked_beside_each_other(short):
    model, samples = Mean().eval(), long_texts(12, short, labels=True)
    scorer = LossScorer(model, "cross_entropy", max_tokens=16384, progress=False)
    try:
        scores = scorer.score(samples)
    except DisagreementError:  # found during the run: the same call goes another way
        scores = scorer.score(samples)
    with torch.no_grad():
        expected = [
            F.cross_entropy(model(each["input_ids"][None])[0], torch.tensor(each["labels"]))
            for each in samples
        ]
    torch.testing.assert_close(scores.losses, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_long_samples_of_language_models_are_compared_with_the_same_alone():
    samples = long_texts(12, 100, labels=False)
    options = {"max_tokens": 16384, "dtype": "float32", "progress": False}
    scorer = LossScorer(MeanLanguageModel().eval(), "masked_lm", **options)
    with pytest.raises(DisagreementError, match="scored alone, does not have the loss"):
        scorer.score(samples)


class Scaling(nn.Module):
    """Takes images of bytes, or scaled ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(48, 3)

    def forward(self, x):
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return self.head(x.flatten(1))


def test_few_images_of_bytes_among_scaled_ones_are_seen():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 3, 4, 4), generator=generator)
    samples = [
        (each.byte() if number % 50 == 7 else each / 255, number % 3)
        for number, each in enumerate(images)
    ]
    assert kind_of(samples[7]) != kind_of(samples[8])
    scorer = LossScorer(Scaling(), progress=False)
    with pytest.raises(DisagreementError, match="does not have the loss that it has among others"):
        scorer.score(samples)
    scores = scorer.score(samples)
    with torch.no_grad():
        losses = F.cross_entropy(Scaling()(images / 255), torch.arange(400) % 3, reduction="none")
    torch.testing.assert_close(scores.losses, losses, rtol=1e-4, atol=1e-5)


class Weighing(nn.Module):
    """Makes a loss of its own, which weighs the rare class."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 1)

    def forward(self, x, labels=None):
        logits = self.head(x).squeeze(-1)
        weight = torch.tensor(20.0)
        loss = None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
        return {"logits": logits, "loss": loss}


@pytest.mark.parametrize("name", ["auto", "binary_cross_entropy"])
def test_a_loss_is_asked_about_the_rare_class_as_well(name):
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"x": torch.randn(4, generator=generator), "labels": torch.tensor(float(i % 250 == 13))}
        for i in range(1000)
    ]
    scorer = LossScorer(Weighing(), name, progress=False)
    if name != "auto":
        with pytest.raises(ValueError, match="and the model's own loss is"):
            scorer.score(samples)
        return
    losses = scorer.score(samples).losses
    with torch.no_grad():
        expected = float(Weighing()(samples[13]["x"][None], samples[13]["labels"][None])["loss"])
    assert losses[13].item() == pytest.approx(expected, rel=1e-4)
