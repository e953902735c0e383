"""What a model is given of a batch, and which model is inside which wrapper."""

import pytest
import torch
from torch import nn

from flowdata.models.calling import call_with, innermost, output_layer_of, unwrapped
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


def test_a_model_with_a_name_of_its_own_is_given_the_input_ids_or_else_the_first_field():
    assert call_with(OwnName(), BATCH, use_cache=False) is BATCH["input_ids"]
    assert call_with(OwnName(), {"x": BATCH["x"], "y": torch.ones(1)}) is BATCH["x"]


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
    with pytest.raises(TypeError, match=r"forward needs 'input', and the batch has 'input_ids'"):
        call_with(Embedder(), batch)
