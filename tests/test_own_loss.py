"""Losses of a model's own that are those of a name on most samples, or on none but small ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowdata import LossScorer
from flowdata.targets.which_loss import has_known_loss
from tests.models import tiny_llama


class OwnLoss(nn.Module):
    """Makes a loss of its own of one number for each sample."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 1)
        self.loss = loss

    def forward(self, x, labels=None, weight=None):
        logits = self.head(x).squeeze(-1)
        arguments = (logits, labels) if weight is None else (logits, labels, weight)
        return {"logits": logits, "loss": None if labels is None else self.loss(*arguments)}


class PassingOn(OwnLoss):
    """Passes what it doesn't know on to its loss, as transformers' models do."""

    def forward(self, x, labels=None, **others):
        logits = self.head(x).squeeze(-1)
        loss = None if labels is None else self.loss(logits, labels, **others)
        return {"logits": logits, "loss": loss}


def surer_of_positives(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(5.0))


def by_their_weights(logits, labels, weight):
    return (F.mse_loss(logits, labels, reduction="none") * weight).mean()


def twice_hubers(logits, labels):  # the squared error where that is below 1
    return 2 * F.huber_loss(logits, labels)


def samples(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    model = OwnLoss(None)
    rows = [{"x": torch.randn(4, generator=generator)} for _ in range(200)]
    for row in rows:
        if kind is surer_of_positives:
            row["labels"] = (torch.rand((), generator=generator) < 0.1).float()
        else:
            noise = torch.randn((), generator=generator) * 0.6
            row["labels"] = model.head(row["x"]).squeeze().detach() + noise
        if kind is by_their_weights:
            row["weight"] = 1.0 + 3 * (torch.rand((), generator=generator) < 0.15)
    return rows


def alone(model, rows):
    with torch.no_grad():
        losses = [model(**{name: value[None] for name, value in row.items()}) for row in rows]
    return torch.stack([each["loss"] for each in losses])


OTHERS = [
    (OwnLoss, surer_of_positives),
    (OwnLoss, by_their_weights),
    (OwnLoss, twice_hubers),
    (PassingOn, twice_hubers),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "loss"), OTHERS)
def test_a_loss_that_is_another_one_on_a_few_samples_is_taken_as_it_is(kind, loss, seed):
    model, rows = kind(loss), samples(loss, seed)
    scorer = LossScorer(model, progress=False)
    torch.testing.assert_close(scorer.score(rows).losses, alone(model, rows))
    assert scorer.explain().startswith("own")
    name = "binary_cross_entropy" if loss is surer_of_positives else "mse"
    with pytest.raises(ValueError, match="the model's own loss is"):
        LossScorer(model, loss=name, progress=False).score(rows)


@pytest.mark.parametrize(
    "loss", [F.l1_loss, F.smooth_l1_loss, lambda *pair: F.huber_loss(*pair, delta=1e-3)]
)
def test_small_losses_are_no_squared_errors_because_both_are_small(loss):
    torch.manual_seed(1)
    model, x = OwnLoss(loss), torch.randn(60, 4)
    noise = torch.randn(60) * (2e-5 if loss is F.l1_loss else 3e-3)
    labels = model.head(x).squeeze(-1).detach() + noise
    rows = [{"x": each, "labels": label} for each, label in zip(x, labels, strict=True)]
    losses = LossScorer(model, progress=False).score(rows).losses
    torch.testing.assert_close(losses, alone(model, rows), rtol=2e-2, atol=1e-10)


def test_a_small_squared_error_is_one():
    torch.manual_seed(1)
    model, x = OwnLoss(F.mse_loss), torch.randn(60, 4)
    labels = model.head(x).squeeze(-1).detach() + torch.randn(60) * 3e-3
    rows = [{"x": each, "labels": label} for each, label in zip(x, labels, strict=True)]
    scorer = LossScorer(model, progress=False)
    torch.testing.assert_close(scorer.score(rows).losses, alone(model, rows), rtol=1e-3, atol=0)
    assert scorer.explain().startswith("mse")


def replaced(model):
    """The model with a `forward` of somebody's own, which could make any loss."""
    inner = model.forward
    model.forward = lambda *arguments, **fields: inner(*arguments, **fields)
    return model


def accelerated(model):
    accelerate = pytest.importorskip("accelerate")
    hook = accelerate.hooks.AlignDevicesHook()
    return accelerate.hooks.add_hook_to_module(model, hook)


def with_the_head_of_trl(model):
    utils = pytest.importorskip("trl.trainer.utils", reason="needs Python 3.11")
    utils.add_fused_lm_head(model)
    return model


@pytest.mark.parametrize("around", [accelerated, with_the_head_of_trl])
def test_a_forward_that_calls_the_models_has_its_loss(around):
    assert has_known_loss(tiny_llama())
    assert has_known_loss(around(tiny_llama()))
    assert has_known_loss(around(accelerated(tiny_llama())))
    assert not has_known_loss(replaced(tiny_llama()))
    assert not has_known_loss(around(replaced(tiny_llama())))
    assert not has_known_loss(replaced(around(tiny_llama())))
