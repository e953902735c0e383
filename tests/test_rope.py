"""Models whose rotary frequencies depend on the length of a call: each sample as if run alone."""

import copy

import pytest
import torch

from flowdata import LossScorer
from flowdata.models.rope import loaded_frequencies, longest_as_loaded
from tests import reference, zoo
from tests.models import token_samples

LONGEST = 24
FACTORS = {"long_factor": [2.0, 5.0, 9.0, 20.0], "short_factor": [1.0, 1.0, 1.5, 2.0]}
SCALED = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": LONGEST,
        "factor": 4.0,
        **FACTORS,
    },
}


def scaled(kind, family="llama"):
    """A wild decoder whose frequencies change beyond `LONGEST` tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parameters = {"rope_theta": 10000.0, **SCALED[kind]}
    options = {}
    if family == "gemma3_text":  # whose kinds of layers have parameters of their own
        layers = ["sliding_attention", "full_attention"]
        options = {"layer_types": layers, "sliding_window": 16, "query_pre_attn_scalar": 8}
        default = {"rope_theta": 10000.0, "rope_type": "default"}
        parameters = {"full_attention": parameters, "sliding_attention": default}
    sizes = zoo.SIZES | {"max_position_embeddings": LONGEST} | options
    config = AutoConfig.for_model(family, **sizes, rope_parameters=parameters)
    return zoo.wild(AutoModelForCausalLM.from_config(config)).eval()


def rotary(model):
    return [module for module in model.modules() if hasattr(module, "original_max_seq_len")]


def buffers(model):
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("batch_size", [1, None])
def test_each_sample_is_scored_as_if_the_model_had_just_been_loaded(kind, family, batch_size):
    samples = token_samples(30)
    loaded = scaled(kind, family)
    expected = torch.tensor(
        [reference.causal_lm_sample_loss(copy.deepcopy(loaded), sample)[0] for sample in samples]
    )
    used = copy.deepcopy(loaded)
    with torch.no_grad():
        used(input_ids=torch.arange(3 * LONGEST)[None])  # the longest so far
    before, lengths = buffers(used), {m.max_seq_len_cached for m in rotary(used)}
    for model in (loaded, used):
        scorer = LossScorer(model, dtype="float32", progress=False, batch_size=batch_size)
        assert (scorer.score(samples).losses - expected).abs().max() < 1e-4
        assert f"samples of over {LONGEST} tokens one at a time" in scorer.explain()
        assert "samples packed" in scorer.explain()
    after = buffers(used)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {m.max_seq_len_cached for m in rotary(used)} == lengths


@pytest.mark.parametrize("kind", SCALED)
def test_a_long_sample_would_change_a_short_one(kind):
    """The trap itself: without it the tests above could not fail."""
    model, samples = scaled(kind), token_samples(30)
    short = min(samples, key=lambda sample: len(sample["input_ids"]))
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(2, longest, dtype=torch.long)
    ids[0, : len(short["input_ids"])] = short["input_ids"]
    together = model(input_ids=ids).logits[0, : len(short["input_ids"])]
    with loaded_frequencies(model):
        alone = model(input_ids=short["input_ids"][None]).logits[0]
    assert (together - alone).abs().max() > 0.01


def test_other_models_have_no_such_length():
    assert longest_as_loaded(zoo.decoder("llama")) is None
    assert longest_as_loaded(zoo.decoder("gemma 3")) is None
    assert longest_as_loaded(torch.nn.Linear(2, 2)) is None
    assert longest_as_loaded(scaled("longrope", "gemma3_text")) == LONGEST
