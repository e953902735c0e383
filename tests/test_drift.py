"""The drift meter against full logits in float64, on models of every kind."""

import copy
import gc
import logging
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from flowdata.drift import DriftMeter, OutputAnchor
from flowdata.errors import ScoreMismatchError
from tests import reference
from tests.models import TinyResNet, images, tiny_gpt2, tiny_llama, token_samples

SIZES = {
    "vocab_size": 199,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TOKENS = token_samples(18, longest=30)
PIXELS = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def moved(model, distance=0.02):
    tuned = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(distance * torch.randn_like(parameter))
    return tuned


def of_causal(model, sample):
    is_target = sample["labels"][1:] != -100
    return model(sample["input_ids"][None]).logits[0, :-1][is_target]


def of_labels(model, sample):
    labels = sample.get("labels", sample["input_ids"])
    return model(sample["input_ids"][None]).logits[0][labels != -100]


def of_text(model, sample):
    return model(sample["input_ids"][None]).logits


def of_pairs(model, sample):
    return model(input_ids=sample["input_ids"][None], labels=sample["labels"][None]).logits[0]


def of_pixels(model, sample):
    return model(sample["pixel_values"][None]).logits


def of_tensor(model, sample):
    return model(sample[None])


def of_places(model, sample):
    return model(sample[None])[0].flatten(1).t()


def classified(count):
    return [{"input_ids": s["input_ids"], "labels": 1} for s in TOKENS[:count]]


def masked():
    return [s | {"labels": s["labels"].index_fill(0, torch.tensor([1]), 5)} for s in TOKENS]


def text_to_text():
    return [{"input_ids": s["input_ids"], "labels": s["input_ids"].flip(0)[:5]} for s in TOKENS[:9]]


def softcapped():
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0
    )
    return transformers.Gemma2ForCausalLM(config)


def scaled():
    config = transformers.CohereConfig(
        **SIZES, num_key_value_heads=2, logit_scale=0.3, bos_token_id=0, eos_token_id=1
    )
    return transformers.CohereForCausalLM(config)


def encoder(kind, **options):
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES, **options))


def leaking():
    sizes = {name: SIZES[name] for name in SIZES if name != "num_attention_heads"}
    return transformers.FNetForSequenceClassification(
        transformers.FNetConfig(**sizes, num_labels=5)
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=199,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **{name: SIZES[name] for name in SIZES if name != "vocab_size"},
            image_size=16,
            patch_size=4,
            num_labels=5,
        )
    )


class Halved(nn.Module):
    """A model whose logits are not what a linear layer returns."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(768, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu()) / 2


class Recurrent(nn.Module):
    """A language model of a user's own."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(199, 16), nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 199)

    def forward(self, input_ids):
        return self.head(self.layer(self.embed(input_ids))[0])


KINDS = {
    "llama": (tiny_llama, TOKENS, of_causal),
    "gpt2": (tiny_gpt2, TOKENS, of_causal),
    "softcap": (softcapped, TOKENS, of_causal),
    "scale": (scaled, TOKENS, of_causal),
    "masked": (lambda: encoder("BertForMaskedLM"), masked(), of_labels),
    "masked, no labels": (
        lambda: encoder("BertForMaskedLM"),
        [{"input_ids": s["input_ids"]} for s in TOKENS],
        of_labels,
    ),
    "text classifier": (
        lambda: encoder("BertForSequenceClassification", num_labels=5),
        classified(12),
        of_text,
    ),
    "padding leaks": (leaking, classified(12), of_text),
    "tagger": (
        lambda: encoder("BertForTokenClassification", num_labels=5),
        [s | {"labels": s["input_ids"] % 5} for s in TOKENS],
        of_labels,
    ),
    "t5": (t5, text_to_text(), of_pairs),
    "image classifier": (vit, [{"pixel_values": p, "labels": 1} for p in PIXELS], of_pixels),
    "residual network": (TinyResNet, PIXELS, of_tensor),
    "halved logits": (Halved, PIXELS, of_tensor),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)),
        PIXELS,
        of_places,
    ),
    "linear": (lambda: nn.Linear(16, 3), torch.randn(9, 16), of_tensor),
    "recurrent": (
        Recurrent,
        [{"input_ids": s["input_ids"]} for s in TOKENS],
        lambda model, s: model(s["input_ids"][None])[0],
    ),
}


def truth(base, tuned, samples, logits_of):
    """KL and agreement of every target, each sample alone, in float64."""
    base, tuned = (copy.deepcopy(model).double().eval() for model in (base, tuned))
    parts = []
    for sample in samples:
        with torch.no_grad():
            sample = (
                sample.double()
                if isinstance(sample, torch.Tensor)
                else {
                    name: value.double() if name == "pixel_values" else value
                    for name, value in sample.items()
                }
            )
            parts.append(reference.divergences(logits_of(base, sample), logits_of(tuned, sample)))
    return {name: torch.cat([part[name] for part in parts]).mean() for name in parts[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_drift_is_that_of_each_sample_alone(kind):
    make, samples, logits_of = KINDS[kind]
    torch.manual_seed(0)
    base = make()
    tuned = moved(base)
    meter = DriftMeter(base, samples, dtype="float32", batch_norm="own")
    nothing, drift = meter(base), meter(tuned)
    assert (nothing.kl, nothing.reverse_kl, nothing.agreement) == (0, 0, 1)
    assert nothing.cosine == pytest.approx(1, abs=1e-12)
    expected = truth(base, tuned, samples, logits_of)
    assert drift.kl == pytest.approx(float(expected["kl"]), rel=1e-3)
    assert drift.reverse_kl == pytest.approx(float(expected["reverse_kl"]), rel=1e-3)
    assert drift.agreement == pytest.approx(float(expected["agreement"]), abs=1e-2)
    assert drift.samples == len(samples)


def test_bfloat16_is_no_worse_than_its_plain_forward():
    base, samples = tiny_llama(), TOKENS
    tuned = moved(base)
    expected = truth(base, tuned, samples, of_causal)["kl"]
    low = [copy.deepcopy(model).bfloat16().eval() for model in (base, tuned)]
    with torch.no_grad():
        plain = torch.cat(
            [
                reference.divergences(of_causal(low[0], s), of_causal(low[1], s))["kl"]
                for s in samples
            ]
        ).mean()
    drift = DriftMeter(base, samples, dtype="bfloat16")(tuned)
    assert abs(drift.kl - expected) <= abs(plain - expected) + 1e-4


def test_a_model_is_read_in_its_own_dtype_unless_another_is_named(monkeypatch):
    monkeypatch.setattr("flowdata.models.precision.is_fast_at_bfloat16", lambda device: True)
    base = tiny_llama()
    meter = DriftMeter(base, TOKENS)
    assert meter.reader.dtype == torch.float32
    tuned = moved(base, 1e-4)  # so near that rounding in bfloat16 would be most of the KL
    expected = float(truth(base, tuned, TOKENS, of_causal)["kl"])
    assert meter(tuned).kl == pytest.approx(expected, rel=0.02)
    assert DriftMeter(copy.deepcopy(base).bfloat16(), TOKENS).reader.dtype == torch.bfloat16


def test_rounding_in_bfloat16_is_judged_by_its_own_size(caplog):
    base = tiny_llama()
    with torch.no_grad():
        base.lm_head.weight.mul_(40)  # predictions as sharp as those of a trained model
    with caplog.at_level(logging.WARNING, "flowdata"):
        meter = DriftMeter(base, TOKENS, dtype="bfloat16")
    assert "not reading" not in caplog.text
    tuned = moved(base, 0.005)
    expected = truth(base, tuned, TOKENS, of_causal)["kl"]
    assert meter(base).kl == 0
    assert meter(tuned).kl == pytest.approx(float(expected), rel=0.05)


class Rounding(nn.Module):
    """Rounds in bfloat16 by a fiftieth beside others; alone it rounds the first sample alone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        rounds = self.head.weight.dtype == torch.bfloat16 and (len(x) > 1 or x[0, 0] == 0)
        return self.head(x * (1.02 if rounds else 1.0))


def test_a_sample_without_rounding_by_luck_is_no_cause_of_alarm(caplog):
    model, generator = Rounding(), torch.Generator().manual_seed(0)
    probe = torch.randint(-4, 5, (40, 4), generator=generator) / 2  # sums are exact in bfloat16
    probe[:, 0] = torch.tensor([0.0] + 39 * [1.0])
    with torch.no_grad():
        model.head.weight.copy_(torch.randint(-4, 5, (3, 4), generator=generator) / 4)
        model.head.bias.zero_()
    with caplog.at_level(logging.WARNING, "flowdata"):
        assert DriftMeter(model, probe, dtype="bfloat16")(model).kl == 0
    assert not caplog.text


class Scaled(nn.Module):
    """Multiplies by a factor in bfloat16."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor if x.dtype == torch.bfloat16 else x


class Compensating(transformers.LlamaForCausalLM):
    """In bfloat16 its hidden states are off by a factor, and its logits are not, as by chance."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.logits.dtype == torch.bfloat16:
            output.logits = output.logits / self.model.norm[1].factor
        return output


@pytest.mark.parametrize(("factor", "is_rounding"), [(1.012, True), (1.06, False)])
def test_rounding_that_is_larger_by_chance_than_the_known_one_refuses_no_model(factor, is_rounding):
    model = tiny_llama()
    model.__class__ = Compensating
    model.model.norm = nn.Sequential(model.model.norm, Scaled(factor))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    if is_rounding:
        assert DriftMeter(model, TOKENS, dtype="bfloat16")(model).kl == 0
    else:
        with pytest.raises(ValueError, match="not what its output layer makes of a row"):
            DriftMeter(model, TOKENS, dtype="bfloat16")


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_adapters_are_measured_as_they_are_merged_or_not(targets):
    base = tiny_llama()
    meter = DriftMeter(base, TOKENS, dtype="float32")
    config = LoraConfig(target_modules=targets, init_lora_weights=False, lora_alpha=32)
    tuned = get_peft_model(copy.deepcopy(base), config)
    expected = truth(base, tuned, TOKENS, lambda model, s: of_causal(model, s))["kl"]
    assert meter(tuned).kl == pytest.approx(float(expected), rel=1e-3)
    merged = copy.deepcopy(tuned).merge_and_unload()
    assert meter(merged).kl == pytest.approx(float(expected), rel=1e-3)
    with tuned.disable_adapter():
        assert meter(tuned).kl < 1e-6


def test_a_meter_may_be_made_before_or_after_new_adapters_and_its_file_not(tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model, store = tiny_llama(), tmp_path / "meter.safetensors"
    before = DriftMeter(model, TOKENS, store=store)
    tuned = get_peft_model(model, config)
    after = DriftMeter(tuned, TOKENS)
    with pytest.raises(ScoreMismatchError, match="another body"):
        DriftMeter(tuned, TOKENS, store=store)
    assert before(tuned).to_dict() == after(tuned).to_dict()
    assert before(tuned).kl == 0
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert before(tuned).kl > 1e-4
    assert before(tuned).to_dict() == after(tuned).to_dict()
    trained = DriftMeter(tuned, TOKENS)  # takes the adapters for a part of the model as it was
    assert trained(tuned).kl == 0
    assert DriftMeter(tiny_llama(), TOKENS, store=store)(tuned).kl == before(tuned).kl


class Dropping(nn.Linear):
    """A linear layer with dropout of its own, which has to be called."""

    def forward(self, rows):
        return super().forward(F.dropout(rows, 0.5, self.training))


@pytest.mark.parametrize("kind", ["adapters", "saved", "classes", "answers", "store"])
def test_dropout_in_the_output_layer_is_off_whatever_the_models_mode(kind, tmp_path):
    base, samples, store = tiny_llama(), TOKENS, tmp_path / "drift.safetensors"
    if kind in ("classes", "answers"):
        base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Dropping(8, 3))
        samples = PIXELS[:, 0, 0, :4]
        if kind == "answers":
            samples = [(x, torch.tensor([1.0, 1.0, 0.0])) for x in samples]
        tuned = moved(base, 0.2)
    else:
        layers = {"target_modules": ["q_proj", "lm_head"]}
        if kind == "saved":
            layers = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
            base.lm_head = Dropping(base.lm_head.in_features, base.lm_head.out_features, bias=False)
        config = LoraConfig(**layers, lora_dropout=0.5, init_lora_weights=False)
        tuned = get_peft_model(copy.deepcopy(base), config)
    state = torch.get_rng_state()
    meters = [DriftMeter(base.train(mode), samples) for mode in (False, True)]
    if kind == "store":
        meters = [DriftMeter(base.train(mode), samples, store=store) for mode in (False, True)]
    expected = meters[0](tuned.eval()).kl
    assert expected > 1e-6
    assert [meter(tuned.train()).kl for meter in meters] == [expected] * 2
    assert all(module.training for module in (*base.modules(), *tuned.modules()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("last", [nn.Linear, Dropping])
@pytest.mark.parametrize("kind", ["classes", "answers"])
def test_a_loops_autocast_does_not_reach_into_a_measurement(kind, last):
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), last(8, 3))
    samples = PIXELS[:, 0, 0, :4]
    if kind == "answers":
        samples = [(x, torch.tensor([1.0, 1.0, 0.0])) for x in samples]
    tuned, meter = moved(base), DriftMeter(base, samples)
    expected = meter(tuned)
    with torch.autocast("cpu", torch.bfloat16):
        within, meter_within = meter(tuned), DriftMeter(base, samples)
    assert (within.kl, within.cosine) == (expected.kl, expected.cosine)
    assert meter_within(tuned).kl == expected.kl
    if kind == "classes":
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(meter_within.outputs(), meter.outputs())
        expected_outputs = base.eval()(samples)
        torch.testing.assert_close(meter.outputs(), expected_outputs, rtol=0, atol=1e-6)


def test_another_head_is_measured_through_the_frozen_one():
    base = TinyResNet()
    meter = DriftMeter(base, images(12))
    tuned = moved(base)
    own = meter(tuned)
    assert own.head == "own"
    tuned.head = nn.Linear(16, 5)  # of a new task with as many classes
    frozen_head = copy.deepcopy(tuned)
    frozen_head.head = copy.deepcopy(base.head)
    assert meter(tuned).head == "frozen"
    assert meter(tuned).kl == meter(frozen_head).kl
    tuned.head = nn.Linear(16, 7)
    assert meter(tuned).head == "frozen"
    assert meter(tuned).cosine == own.cosine


def test_a_new_output_layer_is_told_once_for_a_meter_and_as_no_alarm(caplog):
    base = TinyResNet()
    meter = DriftMeter(base, images(12))
    tuned = copy.deepcopy(base)
    tuned.head = nn.Linear(16, 5)
    with caplog.at_level(logging.INFO, "flowdata"):
        meter(tuned)
        meter(tuned)  # another line of the same program
    (record,) = [record for record in caplog.records if "output layer" in record.message]
    assert record.message == (
        "new output layer: drift is read through the old one, which the old task would still use; "
        "if it is the old one, and training took it so far, make the meter with head='own'"
    )
    assert record.levelno == logging.INFO


@pytest.mark.parametrize("tokens", [205, 197])
@pytest.mark.parametrize("bias", [False, True])
def test_a_language_model_with_other_tokens_is_measured_by_those_that_both_have(tokens, bias):
    base = tiny_llama()
    if bias:
        base.lm_head = nn.Linear(base.lm_head.in_features, base.lm_head.out_features)
    samples = [{name: ids.clamp_max(190) for name, ids in each.items()} for each in TOKENS]
    meter = DriftMeter(base, samples, dtype="float32")
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(tokens, mean_resizing=False)
    drift = meter(tuned)
    assert (drift.head, drift.kl < 1e-9) == ("own", True)
    with torch.no_grad():
        tuned.lm_head.weight[:190].add_(0.1 * torch.randn(190, 32))
    shared, kl = min(199, tokens), []
    for sample in samples:
        one, other = (
            of_causal(each, sample)[:, :shared].double().log_softmax(1) for each in (base, tuned)
        )
        kl.append((one.exp() * (one - other)).sum(1))
    drift = meter(tuned)
    assert drift.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    penalty = OutputAnchor(meter, 1e-3, batch_size=len(samples))(tuned)
    assert 1e3 * penalty.item() == pytest.approx(drift.kl, rel=0.1)
    (gradient,) = torch.autograd.grad(penalty, tuned.lm_head.weight)
    assert gradient[:shared].any()
    assert not gradient[shared:].any()


def test_batch_norm_is_the_frozen_models_unless_asked_otherwise():
    base = TinyResNet()
    tuned = copy.deepcopy(base)
    tuned.train()
    for _ in range(20):
        tuned(torch.randn(8, 3, 8, 8) * 3 + 1)  # its statistics move, its weights don't
    norms = [m for m in tuned.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean, m.weight, m.running_mean.clone()) for m in norms]
    meter = DriftMeter(base, images(12))
    assert meter(tuned).kl < 1e-9
    assert meter(tuned, batch_norm="own").kl > 1e-4
    assert DriftMeter(base, images(12), batch_norm="own")(tuned).kl > 1e-4
    for module, (mean, weight, values) in zip(norms, before, strict=True):
        assert module.running_mean is mean
        assert module.weight is weight
        assert torch.equal(module.running_mean, values)
    others = copy.deepcopy(base)
    others.stem[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"1 BatchNorm layers, the frozen model had 2.*'own'"):
        meter(others)
    with pytest.raises(ValueError, match="batch_norm must be 'reference' or 'own', got 'none'"):
        meter(tuned, batch_norm="none")


def test_training_the_model_itself_does_not_move_what_the_meter_keeps():
    model = TinyResNet()
    meter, tuned = DriftMeter(model, images(12)), moved(model)
    expected = meter(tuned)
    with torch.no_grad():
        for each in (*model.parameters(), *model.buffers()):
            each.zero_()
    assert meter(tuned) == expected


def test_the_model_comes_back_as_it_was():
    model = tiny_llama().train()
    model.model.layers[0].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    values = [(p, p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    state = torch.get_rng_state()
    DriftMeter(model, TOKENS)(model)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    for parameter, (same, place, version, value) in zip(model.parameters(), values, strict=True):
        assert parameter is same
        assert (parameter.data_ptr(), parameter._version) == (place, version)
        assert torch.equal(parameter, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_diverged_is_infinitely_far_away(value):
    for base, samples in ((TinyResNet(), images(12)), (tiny_llama(), TOKENS)):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            next(tuned.parameters()).fill_(value)
        drift = DriftMeter(base, samples)(tuned)
        assert (drift.kl, drift.agreement, drift.cosine) == (torch.inf, 0, 0)


def test_every_sample_has_its_own_drift():
    base = tiny_llama()
    drift = DriftMeter(base, TOKENS, dtype="float32")(moved(base))
    counts = torch.tensor([int((s["labels"][1:] != -100).sum()) for s in TOKENS])
    assert set(drift.per_sample) == {"kl", "reverse_kl", "cosine", "agreement", "targets"}
    assert torch.equal(drift.per_sample["targets"], counts)
    for name in ("kl", "reverse_kl", "cosine", "agreement"):
        values = drift.per_sample[name]
        assert float((values * counts).sum() / counts.sum()) == pytest.approx(getattr(drift, name))


def test_wrappers_are_looked_through():
    base = tiny_llama()
    meter, tuned = DriftMeter(base, TOKENS), moved(base)
    expected = meter(tuned)
    assert meter(torch.compile(tuned)) == expected
    assert meter(nn.DataParallel(tuned)) == expected


def test_a_file_keeps_what_the_frozen_model_makes_of_the_probe(tmp_path, monkeypatch):
    base, file = tiny_llama(), tmp_path / "drift.safetensors"
    tuned = moved(base)
    expected = DriftMeter(base, TOKENS, store=file)(tuned)
    meter = DriftMeter(base, TOKENS, store=file)
    assert meter(tuned) == expected
    with pytest.raises(ScoreMismatchError, match="another body"):
        DriftMeter(tuned, TOKENS, store=file)
    with pytest.raises(ScoreMismatchError, match="another data set"):
        DriftMeter(base, TOKENS[1:], store=file)
    with pytest.raises(ScoreMismatchError, match="another dtype"):
        DriftMeter(base, TOKENS, store=file, dtype="float16")
    with pytest.raises(ValueError, match=r"store must name a file \*.safetensors"):
        DriftMeter(base, TOKENS, store=tmp_path)


def test_what_can_not_be_measured_is_refused_in_one_line():
    base = tiny_llama()
    meter = DriftMeter(base, TOKENS)
    with pytest.raises(ValueError, match=r"given \(\d+, 48\) values .* another body"):
        meter(tiny_llama(hidden_size=48))
    with pytest.raises(ValueError, match="probe is empty"):
        DriftMeter(base, [])
    silent = [s | {"labels": torch.full_like(s["labels"], -100)} for s in TOKENS]
    with pytest.raises(ValueError, match="probe has no target"):
        DriftMeter(base, silent)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        DriftMeter("gpt2", TOKENS)


def test_a_model_of_one_output_has_no_drift():
    with pytest.raises(ValueError, match="one output, which is no distribution"):
        DriftMeter(nn.Linear(4, 1), torch.randn(5, 4))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        DriftMeter(nn.Linear(4, 3), torch.randn(5, 4))("tuned")


def test_logits_that_no_configuration_tells_of_are_refused():
    class Warmed(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    with pytest.raises(ValueError, match="logits are not what its output layer makes"):
        DriftMeter(Warmed(tiny_llama().config), TOKENS)


def test_padding_that_leaks_is_not_read_together(caplog):
    with caplog.at_level(logging.WARNING, "flowdata"):
        torch.manual_seed(0)
        DriftMeter(leaking(), classified(12))
    assert "not reading samples together" in caplog.text
    assert re.search("a sample's (prediction|class) differs by", caplog.text)
    assert "; a slower way is right" in caplog.text


def test_a_meter_keeps_no_model_in_memory():
    for make, samples in ((tiny_llama, TOKENS), (TinyResNet, images(12))):
        base = make()
        tuned = moved(base)
        meter = DriftMeter(base, samples)
        meter(tuned)
        models = [weakref.ref(base), weakref.ref(tuned)]
        del base, tuned
        gc.collect()
        assert [model() for model in models] == [None, None]


def test_the_benchmark_of_its_cost_runs(capsys):
    from benchmarks import drift

    drift.main(["--tiny", "--repeats", "1"])
    out = capsys.readouterr().out
    for task in ("language model", "resnet-20"):
        assert f"{task}: drift at one evaluation in 100 steps" in out
