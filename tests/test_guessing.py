"""A model that is no better than guessing says so, once, wherever its losses are read."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from flowdata import LossScorer, Scores
from flowdata.report.guessing import guessing_remark
from flowdata.report.report import write_report
from tests.models import VOCABULARY, tiny_llama, token_samples

INPUTS = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


def classifier(classes=3, *, scale=3.0):
    """A sure classifier, or one whose head is all zeros."""
    torch.manual_seed(0)
    model = nn.Linear(4, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@torch.no_grad()
def answers(model):
    return model(INPUTS).argmax(1)


def others(model):
    return (answers(model) + 1) % model.out_features


@torch.no_grad()
def yes(model):
    return (model(INPUTS) > 0).float()


def no(model):
    return 1 - yes(model)


@torch.no_grad()
def beside(model):
    return model(INPUTS) + 2


def cosine_like(model, batch):
    return 5 + model(batch[0]).square().mean(1)


CASES = {  # name: loss, model, targets of it, the number of classes that is named
    "labels shifted": ("cross_entropy", classifier(), others, 3),
    "a new head": ("auto", classifier(scale=0.0), answers, 3),
    "probabilities": (
        "cross_entropy",
        classifier(7),
        lambda m: nn.functional.one_hot(others(m), 7).float(),
        7,
    ),
    "no for yes": ("binary_cross_entropy", classifier(5), no, 2),
    "right": ("cross_entropy", classifier(), answers, None),
    "right of many": ("binary_cross_entropy", classifier(5), yes, None),
    "squared errors": ("mse", classifier(), beside, None),
    "a loss of the user's": (cosine_like, classifier(), answers, None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_median_above_the_loss_of_a_guess_is_said_of_cross_entropies_alone(name, caplog):
    loss, model, targets_of, classes = CASES[name]
    scorer = LossScorer(model, loss, progress=False)
    scores = scorer.score(TensorDataset(INPUTS, targets_of(model)))
    said = [message for message in caplog.messages if "guess" in message]
    if classes is None:
        assert said == []
        return
    (message,) = said
    median = float(scores.losses.quantile(0.5))
    assert f"the median loss is {median:.3g} nats" in message
    assert f"among {classes} classes costs ln({classes}) = {math.log(classes):.3g}" in message
    assert "the labels number the classes as the model does" in message
    assert "Check that inputs are what the model was trained on (of images the same mean" in message
    assert "no pixels from 0 to 255 where it knew 0 to 1" in message


@pytest.fixture(scope="module")
def echo():
    """A language model that expects each token once more."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.copy_(30 * model.model.embed_tokens.weight)
    return model


def test_a_language_model_counts_tokens_and_a_store_and_a_report_tell_it_too(
    echo, tmp_path, caplog
):
    samples, store = token_samples(20), tmp_path / "store"
    for _ in range(2):  # scored, and found
        scores = LossScorer(echo, "causal_lm", progress=False).score(samples, store=store)
        (message,) = caplog.messages
        assert f"among {VOCABULARY} tokens costs ln({VOCABULARY}) = 5.29" in message
        assert "that the tokenizer is the model's own" in message
        assert "pixels" not in message
        caplog.clear()
    assert guessing_remark(scores.losses, Scores.load(store).metadata) == message
    page = write_report(scores, tmp_path / "report").page.read_text()
    assert page.count("The model does no better than guessing") == 1
    assert f"<p>The median loss is {float(scores.losses.quantile(0.5)):.3g}" in page


def test_a_language_model_that_is_right_is_not_accused(echo, caplog):
    samples = [{"input_ids": torch.full((9,), token)} for token in range(2, 18)]
    scores = LossScorer(echo, "causal_lm", progress=False).score(samples)
    assert scores.losses.median() < 1
    assert scores.metadata["checked"]["num_classes"] == VOCABULARY
    assert "guess" not in caplog.text


class Choices(nn.Module):
    """Scores as many answers as a question has."""

    def forward(self, answers):
        return answers.mean(-1)


def test_nothing_is_said_where_the_number_of_classes_is_not_certain(caplog):
    questions = [(9 * torch.eye(size)[1:].sum(0)[:, None], torch.tensor(0)) for size in (3, 5) * 9]
    scores = LossScorer(Choices(), "cross_entropy", batch_size=1, progress=False).score(
        questions, collate_fn=default_collate
    )
    assert scores.losses.median() > math.log(5)
    assert scores.metadata["checked"]["num_classes"] == 0
    losses = torch.full((4,), 99.0)
    assert guessing_remark(losses, {}) == guessing_remark(losses * torch.nan, scores.metadata) == ""
    assert "guess" not in caplog.text
