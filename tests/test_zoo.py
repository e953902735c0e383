"""Every architecture against one sample at a time in float32, by the path that it should take."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from flowdata import LossScorer
from tests import reference, zoo
from tests.models import images, tiny_llama, token_samples

TEMPLATE = torch.arange(20, 32)


def with_template(samples):
    return [
        {
            "input_ids": torch.cat([TEMPLATE, sample["input_ids"]]),
            "labels": torch.cat([torch.full_like(TEMPLATE, -100), sample["labels"]]),
        }
        for sample in samples
    ]


def scored(model, samples, dtype, max_tokens=150, **options):
    """Losses, and the sentence that says how they were made; packs of a few samples each."""
    scorer = LossScorer(model, dtype=dtype, max_tokens=max_tokens, progress=False, **options)
    return scorer.score(samples, dataset_id="zoo").losses, scorer.explain()


def plain_losses(model, samples):
    """(float32 losses, the plain bfloat16 path's errors) one sample at a time."""
    low = copy.deepcopy(model).bfloat16()
    exact, rounded = (
        torch.tensor([reference.causal_lm_sample_loss(m, sample)[0] for sample in samples])
        for m in (model, low)
    )
    return exact, rounded - exact


def rms(errors):
    """The root of their mean square."""
    return errors.square().mean().sqrt()


@pytest.mark.parametrize("template", [False, True], ids=["", "template"])
@pytest.mark.parametrize("name", zoo.DECODERS)
def test_decoders(name, template):
    model, samples = zoo.decoder(name), token_samples(30)
    samples = with_template(samples) if template else samples
    expected, errors_of_bfloat16 = plain_losses(model, samples)

    losses, how = scored(model, samples, "float32")
    assert (losses - expected).abs().max() < 1e-4
    assert ("samples packed" in how) == (name in zoo.PACKED), how
    assert ("a prefix of 12 tokens run once" in how) == (template and name in zoo.PACKED), how

    losses, how = scored(model, samples, "bfloat16")
    assert (losses - expected).abs().max() < 1.5 * errors_of_bfloat16.abs().max() + 5e-3, how
    assert rms(losses - expected) < 1.25 * rms(errors_of_bfloat16) + 1e-3, how


@pytest.mark.parametrize("make", [zoo.t5, zoo.bart, zoo.bert, zoo.modernbert])
def test_encoders_and_encoder_decoders(make):
    model, samples = make(), token_samples(12)
    if model.config.is_encoder_decoder:
        samples = [
            {"input_ids": s["input_ids"], "labels": s["input_ids"].flip(0)[: 2 + i % 5]}
            for i, s in enumerate(samples)
        ]
    with torch.no_grad():
        outputs = [model(input_ids=s["input_ids"][None], labels=s["labels"][None]) for s in samples]
    losses, how = scored(model, samples, "float32")
    torch.testing.assert_close(losses, torch.stack([output.loss for output in outputs]), msg=how)
    assert "packed" not in how


def test_vision_language_models_on_text_and_on_images():
    model, samples = zoo.llava(), token_samples(8)
    for sample in samples:
        sample["input_ids"][sample["input_ids"] == zoo.IMAGE_TOKEN] = 8
        sample["labels"][sample["labels"] == zoo.IMAGE_TOKEN] = 8
    expected, _ = plain_losses(model, samples)
    losses, how = scored(model, samples, "float32")
    assert (losses - expected).abs().max() < 1e-4
    assert "samples packed" in how

    image_tokens = torch.full((4,), zoo.IMAGE_TOKEN)
    pixels = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for sample, image in zip(samples, pixels, strict=True):
        sample["input_ids"] = torch.cat([image_tokens, sample["input_ids"]])
        sample["labels"] = torch.cat([torch.full((4,), -100), sample["labels"]])
        sample["pixel_values"] = image
    with torch.no_grad():
        expected = [
            model(**{key: value[None] for key, value in sample.items()}).loss for sample in samples
        ]
    losses, how = scored(model, samples, "float32", None)
    torch.testing.assert_close(losses, torch.stack(expected), msg=how)
    assert "samples padded (samples have pixel_values)" in how


@pytest.mark.parametrize("make", [zoo.vit, zoo.resnet])
def test_image_classifiers(make):
    model, data = make(), images(12)
    with torch.no_grad():
        expected = [F.cross_entropy(model(x[None]).logits, y[None]) for x, y in data]
    losses, _ = scored(model, data, "float32", None, batch_size=5)
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_adapters_on_and_off(targets):
    from peft import LoraConfig, get_peft_model

    base, samples = zoo.decoder("llama"), with_template(token_samples(8))
    off, _ = plain_losses(base, samples)
    model = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    on, _ = plain_losses(model, samples)
    assert (on - off).abs().max() > 1e-2
    for which, expected in (("base", off), ("model", on)):
        losses, how = scored(model, samples, "float32", reference=which)
        assert (losses - expected).abs().max() < 1e-4
        assert re.search("samples packed, a prefix of 1. tokens run once", how)
        assert ("the model's head" in how) == ("lm_head" in targets)


def test_wrapped_models():
    model, samples = tiny_llama().eval(), token_samples(8)
    expected, _ = plain_losses(model, samples)
    losses, how = scored(torch.compile(model), samples, "float32")
    assert (losses - expected).abs().max() < 1e-4
    assert "samples packed" in how


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, fully_shard])
def test_data_parallel_models(wrap, tmp_path):
    model, samples = tiny_llama().eval(), token_samples(8)
    expected, _ = plain_losses(model, samples)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        losses, how = scored(wrap(model), samples, "float32")
    finally:
        torch.distributed.destroy_process_group()
    assert (losses - expected).abs().max() < 1e-4
    assert "samples packed" in how
    assert ("the model's head" in how) == (wrap is fully_shard)  # a sharded weight isn't read
