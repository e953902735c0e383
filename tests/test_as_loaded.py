"""What a call changes in a model: BigBird's attention becomes another one for good."""

import pytest
import torch

from flowdata import LossScorer
from flowdata.models.as_loaded import as_loaded, putting_back
from flowdata.models.evaluation import in_evaluation
from tests.models import tiny_llama

SPARSE = 5 * 16  # tokens up to which all are attended to, as a short text makes it for good


def big_bird():
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    torch.manual_seed(0)
    config = BigBirdConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=512,
        block_size=16,
        num_random_blocks=1,
        use_cache=False,
    )
    return BigBirdForMaskedLM(config).eval()


def texts(*lengths):
    ids = [torch.randint(5, 50, (length,)) for length in lengths]
    return [{"input_ids": each, "labels": each} for each in ids]


def is_sparse(model):
    kinds = {type(layer.attention.self).__name__ for layer in model.bert.encoder.layer}
    return model.bert.attention_type == "block_sparse" and kinds == {"BigBirdBlockSparseAttention"}


def test_each_text_has_the_loss_of_the_model_as_it_was_loaded():
    samples = texts(300, 40, 320, 60, 256, 400)
    scores = LossScorer(big_bird(), dtype="float32", progress=False).score(samples)
    for sample, loss in zip(samples, scores.losses, strict=True):
        batch = {name: values[None] for name, values in sample.items()}
        torch.testing.assert_close(big_bird()(**batch).loss, loss, rtol=1e-4, atol=1e-4)


def test_a_short_text_would_change_the_loss_of_a_long_one():
    """The trap itself: without it the test above could not fail."""
    model, (long, short) = big_bird(), texts(400, 40)
    before = model(input_ids=long["input_ids"][None]).logits
    model(input_ids=short["input_ids"][None])
    assert not is_sparse(model)
    assert (model(input_ids=long["input_ids"][None]).logits - before).abs().max() > 1e-4


@pytest.mark.parametrize("block", [as_loaded, in_evaluation])
def test_the_model_comes_back_with_its_parts(block):
    model, (short,) = big_bird(), texts(40)
    parts = dict(model.named_modules())
    with block(model):
        model(input_ids=short["input_ids"][None])
        assert not is_sparse(model)
    assert is_sparse(model)
    assert all(parts[name] is module for name, module in model.named_modules())


class TakesAnotherHead(torch.nn.Module):
    """Takes its other head for good once it has met a large input."""

    def __init__(self):
        super().__init__()
        self.small, self.large = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        self.head, self.kind = self.small, "small"

    def forward(self, inputs):
        if inputs.abs().max() > 1.5:
            self.head, self.kind = self.large, "large"
        return self.head(inputs)


def quiet_losses(model, data):
    scorer = LossScorer(model, "cross_entropy", dtype="float32", progress=False)
    return scorer.score(data, dataset_id="rows").losses


def rows(count=40):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, generator=generator), index % 3) for index in range(count)]


def test_a_model_of_somebodys_own_that_swaps_its_head_is_scored_as_it_was_loaded():
    model, data = TakesAnotherHead(), rows()
    losses = quiet_losses(model, data)
    assert model.head is model.small
    assert model.kind == "small"
    for (inputs, target), loss in zip(data, losses, strict=True):
        head = model.large if inputs.abs().max() > 1.5 else model.small
        expected = torch.nn.functional.cross_entropy(head(inputs[None]), torch.tensor([target]))
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)


def test_torchscript_has_no_parts_to_put_back():
    model, data = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)), rows()
    losses = quiet_losses(torch.jit.script(model), data)
    torch.testing.assert_close(losses, quiet_losses(model, data))


def test_numbers_that_a_model_counts_are_left_to_it():
    model = tiny_llama()
    model.calls, model.kind = 0, "whole"
    put_back = putting_back(model)
    model.calls, model.kind = 3, "part"
    put_back()
    assert (model.calls, model.kind) == (3, "whole")
