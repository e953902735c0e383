"""Probes that need no data."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from flowdata import LossScorer
from flowdata._common import progress
from flowdata.drift import DriftMeter, inverted_images, own_text, smooth_images
from flowdata.errors import ScoreMismatchError
from flowdata.store.format import read_file, write_file
from tests.models import TinyResNet, tiny_gpt2, tiny_llama
from tests.test_drift import moved, t5


class Tokenizer:
    """What own_text asks of a tokenizer, with words that are numbers."""

    def __init__(self, template=None, bos=0):
        self.chat_template, self.bos_token_id, self.eos_token_id = template, bos, 1

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return f"11 12 {messages[0]['content']} 13"

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def same(one, other):
    return all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))


def test_texts_are_drawn_from_the_models_own_distribution():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # far from uniform
    # What the model's own configuration says of sampling must not count.
    model.generation_config.update(do_sample=True, top_k=3, temperature=0.1, repetition_penalty=2.0)
    texts = own_text(model, Tokenizer(), samples=3000, length=1)
    counts = torch.bincount(torch.stack([t["input_ids"][1] for t in texts]), minlength=199)
    with torch.no_grad():
        expected = model.eval()(torch.zeros(1, 1, dtype=torch.long)).logits[0, 0].softmax(-1)
    noise = (expected * (1 - expected) / 3000).sqrt().sum() / 2  # of a total variation
    assert (counts / 3000 - expected).abs().sum() / 2 < 1.5 * noise
    assert model.generation_config.top_k == 3


def test_writing_and_measuring_that_take_long_show_their_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress, "monotonic", itertools.count(0, 5).__next__)  # seconds
    model = tiny_llama()
    for options in ({}, {"progress": False}):
        texts = own_text(model, Tokenizer(), samples=70, length=6, **options)
        err = capsys.readouterr().err
        assert ("own text: writing: 420 of 420 tokens (100%)" in err) == (not options)
        assert "writing: 64 of 420 tokens (15%)" in err or options
        meter = DriftMeter(model, texts, **options)
        shown = capsys.readouterr().err, (meter(model), capsys.readouterr().err)[1]
        line = "drift: reading the probe: 70 of 70 samples (100%)"
        assert all((line in err) == (not options) for err in shown)
    monkeypatch.setenv("RANK", "1")
    DriftMeter(model, own_text(model, Tokenizer(), samples=2, length=2))
    assert capsys.readouterr().err == ""


def test_a_check_that_takes_long_says_what_it_looks_at(capsys, monkeypatch):
    monkeypatch.setattr(progress, "monotonic", itertools.count(0, 5).__next__)  # seconds
    samples = [{"input_ids": torch.arange(4 + place)} for place in range(16)]
    DriftMeter(tiny_llama(), samples, dtype="bfloat16")
    LossScorer(tiny_llama(), dtype="float32").score(samples)
    err = capsys.readouterr().err
    for name in ("prediction alone", "prediction alone, in float32", "loss alone"):
        assert f"checking each sample's {name}: 16 of 16 samples (100%)" in err


def test_texts_begin_where_a_users_words_would_and_end_where_the_model_ends_them():
    model = tiny_llama()
    texts = own_text(model, Tokenizer("a template"), samples=40, length=30)
    assert {tuple(t["input_ids"][:2].tolist()) for t in texts} == {(11, 12)}
    for text in texts:
        ids, labels = text["input_ids"], text["labels"]
        assert labels[:2].tolist() == [-100, -100]
        assert torch.equal(labels[2:], ids[2:])
        assert len(ids) == 32 or ids[-1] == 1
        assert not (ids[2:-1] == 1).any()
    assert any(len(t["input_ids"]) < 32 for t in texts)


def test_texts_of_a_chat_model_begin_as_any_text_where_that_is_asked_for(tmp_path):
    model, file = tiny_llama(), tmp_path / "texts.safetensors"
    options = {"samples": 5, "length": 9, "store": file}
    texts = own_text(model, Tokenizer("a template"), template=False, **options)
    assert same(texts, own_text(model, Tokenizer(), samples=5, length=9))
    with pytest.raises(ScoreMismatchError):
        own_text(model, Tokenizer("a template"), **options)


def test_the_same_seed_gives_the_same_texts_and_touches_nothing(tmp_path):
    model = tiny_llama().train()
    state, file = torch.get_rng_state(), tmp_path / "texts.safetensors"
    texts = own_text(model, Tokenizer(), samples=5, length=9, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert same(texts, own_text(model, Tokenizer(), samples=5, length=9, seed=3, store=file))
    assert same(texts, own_text(model, Tokenizer(), samples=5, length=9, seed=3, store=file))
    assert not same(texts, own_text(model, Tokenizer(), samples=5, length=9, seed=4))
    for options in ({"seed": 4}, {"length": 8}):
        with pytest.raises(ScoreMismatchError):
            own_text(
                model, Tokenizer(), **{"samples": 5, "length": 9, "seed": 3, **options}, store=file
            )
    with pytest.raises(ScoreMismatchError):
        own_text(moved(model), Tokenizer(), samples=5, length=9, seed=3, store=file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # one of them is run as it is
def test_settings_of_a_model_with_adapters_come_back(dtype):
    base = tiny_llama()
    base.generation_config.update(do_sample=False, max_new_tokens=7, repetition_penalty=1.3)
    before = base.generation_config
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    own_text(model.to(dtype), Tokenizer(), samples=2, length=5)
    assert base.generation_config is model.generation_config is before
    base.generation_config = copy.deepcopy(before)
    assert model.generation_config is base.generation_config  # shown by the wrapper as ever
    assert model.merge_and_unload().generation_config.max_new_tokens == 7


def test_on_its_own_text_the_drift_is_the_rise_of_the_loss():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    texts = own_text(model, Tokenizer(), samples=1500, length=8)
    tuned = moved(model, 0.05)
    drift = DriftMeter(model, texts, dtype="float32")(tuned)

    def loss(m):
        with torch.no_grad():
            total = count = 0
            for text in texts:
                logits = m.eval()(text["input_ids"][None]).logits[0, :-1]
                targets = text["labels"][1:]
                total += nn.functional.cross_entropy(logits, targets, reduction="sum")
                count += int((targets != -100).sum())
            return float(total / count)

    assert loss(tuned) - loss(model) == pytest.approx(drift.kl, rel=0.1)


def test_models_that_can_not_write_so_much_are_refused():
    model = tiny_gpt2()
    most = model.config.n_positions
    with pytest.raises(
        ValueError, match=rf"within the model's {most} positions, got {most} after 1"
    ):
        own_text(model, Tokenizer(), samples=1, length=most)
    (text,) = own_text(model, Tokenizer(), samples=1, length=most - 1)
    assert len(text["input_ids"]) <= most
    diverged = moved(tiny_llama(), float("nan"))
    with pytest.raises(ValueError, match=r"gives no numbers .* can't write a text"):
        own_text(diverged, Tokenizer(), samples=1, length=4)


def test_smooth_images_measure_a_network_of_images():
    images = smooth_images((3, 8, 8), samples=20, seed=1)
    assert images.shape == (20, 3, 8, 8)
    assert torch.equal(images, smooth_images((3, 8, 8), samples=20, seed=1))
    assert not torch.equal(images, smooth_images((3, 8, 8), samples=20, seed=2))
    assert 0.9 < smooth_images((3, 32, 32)).std() < 1.3
    model = TinyResNet()
    meter = DriftMeter(model, images)
    assert meter(copy.deepcopy(model)).kl == 0 < meter(moved(model, 0.1), batch_norm="own").kl


def test_probes_that_can_not_be_made_are_refused():
    with pytest.raises(TypeError, match="own_text needs a model with `generate`"):
        own_text(TinyResNet(), Tokenizer())
    with pytest.raises(TypeError, match="T5ForConditionalGeneration answers one"):
        own_text(t5(), Tokenizer())
    with pytest.raises(ValueError, match="samples"):
        own_text(tiny_llama(), Tokenizer(), samples=0)
    nameless = Tokenizer(bos=None)
    nameless.eos_token_id = None
    model = tiny_llama()
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="neither a chat template nor a token"):
        own_text(model, nameless)
    with pytest.raises(ValueError, match=r"shape must be \(channels, height, width\)"):
        smooth_images((32, 32))


# --- images that a network remembers ---------------------------------------------------------


def convolutional(seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    model = nn.Sequential(body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    for _ in range(50):  # the statistics of images that are anything but noise around 0
        model(2 + torch.rand(32, 3, 16, 16).cumsum(-1))
    return model


def distance(model, images):
    """How far the statistics of images are from the kept ones, summed over the layers."""
    total, handles = [], []

    def compare(layer, inputs):
        values = inputs[0].transpose(0, 1).flatten(1)
        total.append((values.mean(1) - layer.running_mean).norm().item())
        total.append((values.var(1, correction=0) - layer.running_var).norm().item())

    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            handles.append(layer.register_forward_pre_hook(compare))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return sum(total)


def test_inverted_images_have_the_statistics_that_the_network_keeps(tmp_path):
    model = convolutional().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    file = tmp_path / "images.safetensors"
    images = inverted_images(model, (3, 16, 16), 40, steps=200, store=file)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    start = smooth_images((3, 16, 16), 40)
    assert distance(model.eval(), images) < 0.2 * distance(model, start)
    sure = F.cross_entropy(model(images), torch.arange(40) % 5)
    assert sure < F.cross_entropy(model(start), torch.arange(40) % 5)
    assert torch.equal(images, inverted_images(model, (3, 16, 16), 40, steps=200, store=file))
    with pytest.raises(ScoreMismatchError, match="seed"):
        inverted_images(model, (3, 16, 16), 40, seed=1, steps=200, store=file)


@pytest.mark.parametrize(("samples", "parts"), [(200, 1), (384, 3)])
def test_inverted_images_are_the_same_number_of_each_class(monkeypatch, tmp_path, samples, parts):
    model = nn.Sequential(convolutional(), nn.ReLU(), nn.Linear(5, 150))
    given, cross_entropy, file = [], F.cross_entropy, tmp_path / "images.safetensors"
    monkeypatch.setattr(
        F, "cross_entropy", lambda *args: (given.append(args[1]), cross_entropy(*args))[1]
    )
    images = inverted_images(model, (3, 8, 8), samples, steps=1, store=file)
    assert len(given) == parts
    assert torch.equal(torch.cat(given), torch.arange(samples) % 150)
    tensors, manifest = read_file(file)
    scheme = manifest["identity"].pop("scheme", None)
    assert scheme == (2 if parts > 1 else None)  # the files of one part were right before
    write_file(file, tensors, manifest)
    if parts > 1:
        with pytest.raises(ScoreMismatchError, match=r"another scheme: .* there, 2 here\. Name"):
            inverted_images(model, (3, 8, 8), samples, steps=1, store=file)
    else:
        assert torch.equal(images, inverted_images(model, (3, 8, 8), samples, steps=1, store=file))


def test_inverted_images_that_take_long_show_their_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress, "monotonic", itertools.count(0, 5).__next__)  # seconds
    for options in ({}, {"progress": False}):
        inverted_images(convolutional(), (3, 16, 16), 32, steps=3, **options)
        line = "making inverted images: 3 of 3 steps (100%)"
        assert (line in capsys.readouterr().err) == (not options)


def test_inverted_images_want_statistics_and_logits():
    with pytest.raises(ValueError, match=r"no BatchNorm layer.*smooth_images"):
        inverted_images(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), (3, 4, 4))
    maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match=r"logits \(B, C\)"):
        inverted_images(maps, (3, 8, 8), steps=1)
    for shape in ((1, 8, 8), (4, 8, 8), (3, 2, 2)):
        with pytest.raises(ValueError, match=r"shape must be that of .* got \(\d, \d, \d\)"):
            inverted_images(convolutional(), shape, steps=1)
    with pytest.raises(ValueError, match="samples must be an integer >= 32"):
        inverted_images(convolutional(), (3, 8, 8), samples=8)


def test_a_model_that_fails_without_a_word_is_refused_with_its_errors_class():
    def fail(*_):
        raise RuntimeError

    model = convolutional()
    model.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=r"of which the model says: RuntimeError$"):
        inverted_images(model, (3, 8, 8), steps=1)


def test_inverted_images_are_made_in_inference_mode_too():
    model = convolutional()
    images = inverted_images(model, (3, 8, 8), 32, steps=3)
    with torch.inference_mode():
        assert torch.equal(inverted_images(model, (3, 8, 8), 32, steps=3), images)


@pytest.mark.parametrize("broken", ["weight", "running_var"])
def test_a_network_that_gives_no_numbers_makes_no_images(broken):
    model = convolutional()
    state = model.state_dict()
    next(value for name, value in state.items() if name.endswith(broken)).fill_(torch.nan)
    with pytest.raises(ValueError, match="images became inf or NaN"):
        inverted_images(model, (3, 8, 8), 32, steps=2)


def test_a_changed_statistic_is_seen_on_inverted_images():
    model = convolutional().eval()
    meter = DriftMeter(model, inverted_images(model, (3, 16, 16), 64), batch_norm="own")
    assert meter(model).cosine == pytest.approx(1)
    model[0][1].running_mean += 3
    assert meter(model).cosine < 0.95
    assert meter(model, batch_norm="reference").cosine == pytest.approx(1)
