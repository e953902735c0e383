"""The weighted loss of a Trainer's batch, without a Trainer."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flowdata.integrations.trainer_loss import count_batch, router_loss, weighted_loss
from flowdata.losses import causal_lm_loss
from tests.integrations import tiny

WEIGHTS = torch.tensor([0.5, 0.0, 2.0])
TOKENS = torch.tensor([[5, 6, 7], [-100, 8, -100], [-100, 9, 4]])


def mean_of_outputs(outputs, labels):
    return outputs.logits.mean(1)


@pytest.mark.parametrize(
    ("loss", "labels", "counts"),
    [
        ("causal_lm", TOKENS, [2, 1, 2]),
        ("seq2seq_lm", TOKENS, [3, 1, 2]),
        ("cross_entropy", torch.tensor([0, 1, -100]), [1, 1, 0]),
        ("cross_entropy", torch.rand(3, 4), [1, 1, 1]),
        ("binary_cross_entropy", torch.ones(3, 4), [4, 4, 4]),
        ("mse", torch.ones(3, 2, 2), [4, 4, 4]),
        (mean_of_outputs, torch.ones(3, 2), [1, 1, 1]),
    ],
)
def test_the_denominator_counts_the_losses_or_their_weights(loss, labels, counts):
    batch = {"labels": labels}
    for weights in (None, WEIGHTS):
        assert count_batch(loss, batch, weights, normalize="count") == sum(counts)
    assert count_batch(loss, batch, None, normalize="weights") == sum(counts)
    expected = (torch.tensor(counts) * WEIGHTS).sum()
    assert count_batch(loss, batch, WEIGHTS, normalize="weights") == expected


def test_the_loss_is_the_weighted_sum_over_the_denominator():
    generator = torch.Generator().manual_seed(0)
    options = {"model": torch.nn.Linear(1, 1), "normalize": "count", "num_items": 10}
    outputs = SimpleNamespace(logits=torch.randn(3, 4, generator=generator))
    labels = torch.tensor([0, 3, 1])
    losses = F.cross_entropy(outputs.logits, labels, reduction="none")
    value = weighted_loss("cross_entropy", outputs, {"labels": labels}, WEIGHTS, **options)
    torch.testing.assert_close(value, (losses * WEIGHTS).sum() / 10)
    value = weighted_loss(mean_of_outputs, outputs, {"labels": labels}, WEIGHTS, **options)
    torch.testing.assert_close(value, (outputs.logits.mean(1) * WEIGHTS).sum() / 10)
    outputs = SimpleNamespace(logits=torch.randn(3, 3, 10, generator=generator))
    for rule in (None, "dft"):
        value = weighted_loss(
            "causal_lm", outputs, {"labels": TOKENS}, WEIGHTS, token_rule=rule, **options
        )
        expected = causal_lm_loss(outputs.logits, TOKENS, WEIGHTS, num_items=10, token_rule=rule)
        assert value == expected


def test_a_router_loss_is_shared_by_the_batches_of_a_step():
    config = SimpleNamespace(router_aux_loss_coef=0.5)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert router_loss(model, SimpleNamespace(aux_loss=torch.tensor(3.0)), steps=2) == 0.75
    assert router_loss(model, SimpleNamespace(logits=torch.ones(1)), steps=2) == 0


def test_a_batch_without_labels_is_refused():
    batch = {"input_ids": tiny.make_samples()[0]["input_ids"]}
    with pytest.raises(ValueError, match=r"a batch has no tensor 'labels' \(it has 'input_ids'\)"):
        count_batch("mse", batch, None, normalize="count")
