"""The weighted loss of a Trainer's batch, without a Trainer."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flowdata.integrations.trainer_loss import RunLoss, count_batch, weighted_loss
from flowdata.losses import causal_lm_loss
from tests.integrations import tiny

WEIGHTS = torch.tensor([0.5, 0.0, 2.0])
TOKENS = torch.tensor([[5, 6, 7], [-100, 8, -100], [-100, 9, 4]])


def mean_of_outputs(outputs, batch):
    return outputs.logits.mean(1)


@pytest.mark.parametrize(
    ("loss", "labels", "counts"),
    [
        ("causal_lm", TOKENS, [2, 1, 2]),
        ("seq2seq_lm", TOKENS, [3, 1, 2]),
        ("cross_entropy", torch.tensor([0, 1, -100]), [1, 1, 0]),
        ("cross_entropy", torch.rand(3, 4), [1, 1, 1]),
        ("binary_cross_entropy", torch.ones(3, 4), [4, 4, 4]),
        ("binary_cross_entropy", torch.tensor([[1.0, 0], [torch.nan, 1], [-100, 0]]), [2, 1, 1]),
        ("mse", torch.ones(3, 2, 2), [4, 4, 4]),
        (mean_of_outputs, torch.ones(3, 2), [1, 1, 1]),
    ],
)
def test_the_denominator_counts_the_losses_or_their_weights(loss, labels, counts):
    batch, loss = {"labels": labels}, RunLoss(loss)
    if loss.loss == "binary_cross_entropy":  # each weight has its losses
        options = {"normalize": "count", "num_items": None}
        logits = torch.zeros_like(labels)
        value = weighted_loss(loss, {"logits": logits}, batch, torch.ones(3), **options)
        torch.testing.assert_close(value, torch.tensor(2.0).log())
    for weights in (None, WEIGHTS):
        assert count_batch(loss, batch, weights, normalize="count") == sum(counts)
    assert count_batch(loss, batch, None, normalize="weights") == sum(counts)
    expected = (torch.tensor(counts) * WEIGHTS).sum()
    assert count_batch(loss, batch, WEIGHTS, normalize="weights") == expected


def test_the_loss_is_the_weighted_sum_over_the_denominator():
    generator = torch.Generator().manual_seed(0)
    options = {"normalize": "count", "num_items": 10}
    outputs = SimpleNamespace(logits=torch.randn(3, 4, generator=generator))
    labels = torch.tensor([0, 3, 1])
    losses = F.cross_entropy(outputs.logits, labels, reduction="none")
    run = RunLoss("cross_entropy")
    value = weighted_loss(run, outputs, {"labels": labels}, WEIGHTS, **options)
    torch.testing.assert_close(value, (losses * WEIGHTS).sum() / 10)
    run = RunLoss(mean_of_outputs)
    value = weighted_loss(run, outputs, {"labels": labels}, WEIGHTS, **options)
    torch.testing.assert_close(value, (outputs.logits.mean(1) * WEIGHTS).sum() / 10)
    outputs = SimpleNamespace(logits=torch.randn(3, 3, 10, generator=generator))
    for rule in (None, "dft"):
        run = RunLoss("causal_lm")
        value = weighted_loss(run, outputs, {"labels": TOKENS}, WEIGHTS, token_rule=rule, **options)
        expected = causal_lm_loss(outputs.logits, TOKENS, WEIGHTS, num_items=10, token_rule=rule)
        assert value == expected


@pytest.mark.parametrize("loss", ["causal_lm", "masked_lm"])
def test_token_weights_belong_to_their_labels(loss):
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(logits=torch.randn(3, 3, 10, generator=generator))
    weights = torch.rand(3, 3, generator=generator)
    logits, labels, each = outputs.logits, TOKENS, weights
    if loss == "causal_lm":
        logits, labels, each = logits[:, :-1], labels[:, 1:], each[:, 1:]
    losses = F.cross_entropy(logits.mT, labels, reduction="none")
    is_target = labels != -100
    for normalize, count in (("count", is_target.sum()), ("weights", each[is_target].sum())):
        batch, run = {"labels": TOKENS}, RunLoss(loss)
        assert count_batch(run, batch, weights, normalize=normalize) == count
        value = weighted_loss(run, outputs, batch, weights, normalize=normalize, num_items=None)
        torch.testing.assert_close(value, (losses * each)[is_target].sum() / count)


def test_virtual_tokens_come_first_and_have_no_label():
    outputs = SimpleNamespace(logits=torch.randn(3, 5, 10))
    batch, padded = {"labels": TOKENS}, {"labels": F.pad(TOKENS, (2, 0), value=-100)}
    options = {"normalize": "weights", "num_items": None}
    value = weighted_loss(
        RunLoss("causal_lm", virtual_tokens=2), outputs, batch, WEIGHTS, **options
    )
    assert value == weighted_loss(RunLoss("causal_lm"), outputs, padded, WEIGHTS, **options)
    count = count_batch(RunLoss("causal_lm", virtual_tokens=2), batch, WEIGHTS, normalize="count")
    assert count == (TOKENS != -100).sum()


def test_weights_of_another_shape_are_refused():
    batch = {"labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=r"weights have shape \(2,\) and labels \(3,\)"):
        count_batch(RunLoss("cross_entropy"), batch, WEIGHTS[:2], normalize="count")
    with pytest.raises(ValueError, match=r"one loss for each sample, \(3,\), got \(3, 4\)"):
        weighted_loss(
            RunLoss(lambda outputs, batch: torch.ones(3, 4)),
            None,
            batch,
            WEIGHTS,
            normalize="count",
            num_items=None,
        )


def test_a_batch_without_labels_is_refused():
    batch = {"input_ids": tiny.make_samples()[0]["input_ids"]}
    with pytest.raises(ValueError, match=r"a batch has no tensor 'labels' \(it has 'input_ids'\)"):
        count_batch(RunLoss("mse"), batch, None, normalize="count")
