"""What a model is given of a batch, and which model is inside which wrapper."""

import pytest
import torch
from torch import nn

from flowdata.models.calling import (
    call_with,
    innermost,
    output_layer_of,
    takes_field,
    unwrapped,
)
from tests.models import tiny_llama


class Named(nn.Module):
    def forward(self, x, scale=1):
        return {"x": x, "scale": scale}


class TakesAny(nn.Module):
    def forward(self, **kwargs):
        return kwargs


class OwnName(nn.Module):
    def forward(self, tokens):
        return tokens


class Adapted(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, inner):
        super().__init__()
        self.peft_config = {}
        self.inner = inner

    def get_base_model(self):
        return self.inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


BATCH = {"text": "a", "x": torch.ones(2), "input_ids": torch.zeros(2)}


def test_a_model_is_given_the_fields_and_options_that_it_names():
    assert call_with(Named(), BATCH, scale=3, use_cache=False) == {"x": BATCH["x"], "scale": 3}
    assert call_with(Adapted(Named()), BATCH, scale=3) == {"x": BATCH["x"], "scale": 3}


def test_a_model_that_takes_anything_is_given_the_tensors_and_all_options():
    taken = call_with(TakesAny(), BATCH, use_cache=False)
    expected = {"x": BATCH["x"], "input_ids": BATCH["input_ids"], "use_cache": False}
    assert taken == expected


def test_a_model_with_a_name_of_its_own_is_given_the_only_field_that_can_be_meant():
    assert call_with(OwnName(), BATCH, use_cache=False) is BATCH["input_ids"]
    assert call_with(OwnName(), {"x": BATCH["x"]}) is BATCH["x"]
    rows = torch.ones(3, 2)
    assert call_with(OwnName(), {"index": torch.arange(3), "rows": rows, "note": ["a"]}) is rows
    with pytest.raises(TypeError, match=r"takes .*, and the batch has 'x', 'y': any of 'x', 'y'"):
        call_with(OwnName(), {"x": rows, "y": rows})


class Masked(nn.Module):
    def forward(self, tokens, attention_mask=None):
        return tokens, attention_mask


def test_a_first_argument_without_a_field_of_its_name_is_given_by_place():
    fields = {"attention_mask": torch.ones(1, 2), "input_ids": torch.zeros(1, 2)}
    tokens, mask = call_with(Masked(), fields)
    assert (tokens, mask) == (fields["input_ids"], fields["attention_mask"])
    with pytest.raises(TypeError, match=r"missing 1 required .* the batch has 'attention_mask'"):
        call_with(Masked(), {"attention_mask": torch.ones(1, 2)})


class OfBatch(nn.Module):
    def forward(self, batch):
        return batch["x"]


def test_a_forward_of_whole_batches_says_what_it_was_given():
    with pytest.raises(TypeError, match=r"takes 'batch'; the batch has 'x', and 'x' was given"):
        call_with(OfBatch(), {"x": torch.ones(1)})


def test_a_model_compiled_by_torch_jit_has_arguments_too():
    scripted = torch.jit.script(nn.Linear(2, 2))
    assert call_with(scripted, {"input": torch.ones(1, 2)}).shape == (1, 2)
    assert takes_field(scripted, "input")
    assert not takes_field(scripted, "labels")


def test_wrappers_are_taken_off_and_adapters_stay_on():
    model = Adapted(nn.Linear(2, 2))
    assert unwrapped(torch.compile(model)) is model
    assert unwrapped(model) is model
    assert innermost(model) is model.inner
    assert innermost(model.inner) is model.inner


def test_a_language_model_names_its_output_layer():
    model = tiny_llama()
    assert output_layer_of(model) is model.lm_head
    assert output_layer_of(Adapted(model)) is model.lm_head
    assert output_layer_of(model.model) is None
    assert output_layer_of(nn.Linear(2, 2)) is None


def test_what_forward_needs_and_the_batch_lacks_is_named():
    class Embedder(nn.Module):
        def forward(self, input, **options):
            return input["input_ids"]

    batch = {"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 3)}
    with pytest.raises(TypeError, match=r"forward takes 'input', .*the batch has 'input_ids'"):
        call_with(Embedder(), batch)
