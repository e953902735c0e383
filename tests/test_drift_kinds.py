"""The drift meter on further kinds of models, and on those whose samples depend on each other."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from flowdata.drift import DriftMeter, OutputAnchor
from tests import reference
from tests.models import TinyResNet, images, tiny_llama, token_samples
from tests.test_drift import (
    SIZES,
    TOKENS,
    classified,
    encoder,
    masked,
    moved,
    of_causal,
    of_labels,
    of_pairs,
    of_pixels,
    of_tensor,
    of_text,
    text_to_text,
    truth,
)

PIXELS = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MANY = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PICTURES = [{"pixel_values": each} for each in PIXELS]


def made(kind, config, **options):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**options))


def answers(logits):
    """Yes and no to each class, of a model with several labels."""
    return torch.stack([logits.flatten(), torch.zeros(logits.numel())], 1)


class Body(nn.Module):
    """A small body of a user's own, for heads of several kinds."""

    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(768, 8), head or nn.Linear(8, 3)

    def features(self, x):
        return self.body(x.flatten(1)).relu()

    def forward(self, x):
        return self.head(self.features(x))


class Normalised(Body):
    """A model that returns logarithms of probabilities."""

    def forward(self, x):
        return super().forward(x).log_softmax(1)


class Barred(Body):
    """A model that never means its last class."""

    def forward(self, x):
        return super().forward(x) + torch.tensor([0.0, 0.0, -torch.inf])


class Cosine(Body):
    """A model whose logits are cosines, which no layer makes."""

    def forward(self, x):
        rows = nn.functional.normalize(self.features(x))
        return 10 * rows @ nn.functional.normalize(self.head.weight).t()


WHISPER = {
    "vocab_size": 199,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


def sounds():
    """Samples of one length of sound and several of text."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_features": torch.randn(8, 40, generator=generator), "labels": s["input_ids"][:n]}
        for n, s in zip([3, 4, 5] * 3, TOKENS, strict=False)
    ]


def of_sound(model, sample):
    features = sample["input_features"][None].to(model.dtype)
    return model(input_features=features, labels=sample["labels"][None]).logits[0]


BART = {
    "vocab_size": 199,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
FEW = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
KINDS = {
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), TOKENS, of_causal),
    "softcap, windows": (
        lambda: made(
            "Gemma3ForCausalLM", "Gemma3TextConfig", **SIZES, **GEMMA, final_logit_softcapping=2.0
        ),
        TOKENS,
        of_causal,
    ),
    "divided logits": (
        lambda: made(
            "GraniteForCausalLM",
            "GraniteConfig",
            **SIZES,
            num_key_value_heads=2,
            logits_scaling=0.5,
        ),
        TOKENS,
        of_causal,
    ),
    "bias": (lambda: made("PhiForCausalLM", "PhiConfig", **SIZES), TOKENS, of_causal),
    "masked, a head of layers": (
        lambda: made(
            "RobertaForMaskedLM",
            "RobertaConfig",
            **SIZES,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
        masked(),
        of_labels,
    ),
    "encoder and decoder": (
        lambda: made("BartForConditionalGeneration", "BartConfig", **BART),
        text_to_text(),
        of_pairs,
    ),
    "last token classified": (
        lambda: made(
            "LlamaForSequenceClassification",
            "LlamaConfig",
            **SIZES,
            num_key_value_heads=2,
            num_labels=5,
            pad_token_id=0,
        ),
        classified(12),
        of_text,
    ),
    "no token to pad with": (
        lambda: made(
            "GPT2ForSequenceClassification",
            "GPT2Config",
            vocab_size=199,
            n_embd=32,
            n_layer=2,
            n_head=4,
            num_labels=5,
            bos_token_id=0,
            eos_token_id=1,
        ),
        classified(12),
        of_text,
    ),
    "several labels": (
        lambda: encoder(
            "BertForSequenceClassification",
            num_labels=5,
            problem_type="multi_label_classification",
        ),
        [{"input_ids": s["input_ids"]} for s in TOKENS[:9]],
        lambda model, sample: answers(of_text(model, sample)),
    ),
    "residual network": (
        lambda: made("ResNetForImageClassification", "ResNetConfig", layer_type="basic", **FEW),
        PICTURES,
        of_pixels,
    ),
    "convolutional, LayerNorm": (
        lambda: made(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_stages=2,
            num_labels=5,
        ),
        PICTURES,
        of_pixels,
    ),
    "log-probabilities": (Normalised, MANY, of_tensor),
    "cosines": (Cosine, MANY, of_tensor),
    "normalised weight": (
        lambda: Body(nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))),
        MANY,
        of_tensor,
    ),
}


def check(base, tuned, samples, logits_of, **options):
    """The drift, after a look at whether it is right and the model as it was."""
    meter = DriftMeter(base, samples, dtype="float32", batch_norm="own", **options)
    tensors = [*tuned.parameters(), *tuned.buffers()]
    flags = [module.training for module in tuned.modules()]
    before = [(t.data_ptr(), t._version, t.requires_grad, t.detach().clone()) for t in tensors]
    state = torch.get_rng_state()
    drift = meter(tuned)
    assert [module.training for module in tuned.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    for tensor, (place, version, flag, value) in zip(tensors, before, strict=True):
        assert (tensor.data_ptr(), tensor._version, tensor.requires_grad) == (place, version, flag)
        assert torch.equal(tensor, value)
    expected = truth(base, tuned, samples, logits_of)
    assert drift.kl == pytest.approx(float(expected["kl"]), rel=1e-3)
    assert drift.reverse_kl == pytest.approx(float(expected["reverse_kl"]), rel=1e-3)
    nothing = meter(base)
    assert (nothing.kl, nothing.agreement) == (0, 1)
    return drift


@pytest.mark.parametrize("kind", KINDS)
def test_the_drift_is_that_of_each_sample_alone(kind):
    make, samples, logits_of = KINDS[kind]
    base = make()
    assert check(base, moved(base).train(), samples, logits_of).head == "own"


def test_a_decoder_that_makes_its_inputs_of_labels_is_measured_and_held(caplog):
    base, samples = made("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), sounds()
    tuned = moved(base)

    def collate(samples):
        labels = [sample["labels"] for sample in samples]
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {"input_features": torch.stack([s["input_features"] for s in samples])} | {
            "labels": labels
        }

    with caplog.at_level(logging.WARNING, "flowdata"):
        drift = check(base, tuned, samples, of_sound, collate_fn=collate)
    assert "not reading" not in caplog.text
    meter = DriftMeter(base, samples, collate, dtype="float32")
    penalty = OutputAnchor(meter, 1e-3, batch_size=len(samples))(tuned)
    assert 1e3 * penalty.item() == pytest.approx(drift.kl, rel=0.1)


def test_a_bias_that_the_model_adds_by_itself_is_measured_and_held():
    base = made("BartForConditionalGeneration", "BartConfig", **BART)
    base.final_logits_bias.normal_()
    tuned = moved(base)
    assert tuned.final_logits_bias.any()
    drift = check(base, tuned, text_to_text(), of_pairs)
    anchor = OutputAnchor(DriftMeter(base, text_to_text(), dtype="float32"), strength=1e-3)
    penalty = anchor(tuned) * 1e3  # of a small strength, so that it is KL itself
    assert penalty.item() == pytest.approx(drift.kl, rel=0.1)
    assert anchor(base).item() < 1e-9
    tuned.final_logits_bias.zero_()
    assert DriftMeter(base, text_to_text())(tuned).kl > 10 * drift.kl


def test_experts_are_measured_as_each_sample_alone_calls_them():
    config = {"num_key_value_heads": 2, "num_local_experts": 4}
    base = made("MixtralForCausalLM", "MixtralConfig", **SIZES, **config).eval()
    tuned = moved(base)
    with torch.no_grad():  # experts don't run in float64
        pairs = [(of_causal(base, s).double(), of_causal(tuned, s).double()) for s in TOKENS]
    expected = torch.cat([reference.divergences(*pair)["kl"] for pair in pairs]).mean()
    drift = DriftMeter(base, TOKENS, dtype="float32")(tuned)
    assert drift.kl == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_tuned_model_may_have_another_dtype(dtype):
    base = tiny_llama()
    check(base, moved(base).to(dtype), TOKENS, of_causal)
    network = TinyResNet()
    check(network, moved(network).to(dtype), MANY[:9], of_tensor)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"use_dora": True},
        {"trainable_token_indices": [3, 5, 7]},
    ],
    ids=str,
)
def test_what_adapters_train_beside_is_measured(options):
    base = tiny_llama()
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=32, **options
    )
    tuned = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name or "token_adapter" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    check(base, tuned, TOKENS, of_causal)


def test_virtual_tokens_are_no_targets():
    base = tiny_llama()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.normal_()

    def of_own(model, sample):
        logits = model(input_ids=sample["input_ids"][None]).logits[0, -len(sample["input_ids"]) :]
        return logits[:-1][sample["labels"][1:] != -100]

    assert check(base, tuned, TOKENS, of_own).kl > 1e-6


def test_the_new_head_of_adapters_is_the_models_own():
    base = encoder("BertForSequenceClassification", num_labels=5)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_alpha=32)
    tuned = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            distance = {"modules_to_save": 0.01, "lora_B": 1.0}
            for part in distance.keys() & set(name.split(".")):
                parameter.add_(distance[part] * torch.randn_like(parameter))
    assert check(base, tuned, classified(12), of_text).head == "own"


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(16, 5),
        nn.Linear(16, 9),
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 5)),
        nn.Identity(),
    ],
    ids=["as many classes", "more classes", "several layers", "dropout before", "none"],
)
def test_whatever_took_the_heads_place_the_frozen_one_measures(head):
    base = TinyResNet()
    meter, tuned = DriftMeter(base, MANY[:9]), moved(base)
    tuned.head = copy.deepcopy(base.head)
    expected = meter(tuned)
    tuned.head = head
    drift = meter(tuned)
    assert drift.head == "frozen"
    assert (drift.kl, drift.cosine) == (expected.kl, expected.cosine)


class NoStatistics(nn.Module):
    """A network whose BatchNorm normalises by its batch alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)).relu().mean((2, 3)))


class Capacity(Body):
    """A model that takes so many samples of a batch, as experts take tokens, and drops others."""

    def __init__(self, most=20):
        super().__init__()
        self.register_buffer("most", torch.tensor(most))

    def features(self, x):
        rows = super().features(x)
        return rows * (torch.arange(len(rows)) < self.most)[:, None]


class Centred(nn.Module):
    """A classifier of tokens that takes a part of its batch's mean off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(199, 16), nn.Linear(16, 5)

    def forward(self, input_ids, attention_mask=None):
        rows = self.embed(input_ids).mean(1)
        return self.head(rows - 0.5 * rows.mean(0))


class CentredLanguageModel(nn.Module):
    """The same as a language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(199, 16), nn.Linear(16, 199)
        self.layer = nn.GRU(16, 16, batch_first=True)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, labels=None):
        rows = self.layer(self.embed(input_ids))[0]
        logits = self.head(rows - 0.5 * rows.mean(0, keepdim=True))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def in_pairs():
    """Samples of which always two have one length."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 199, (n,), generator=generator) for n in sorted([*range(5, 25)] * 2)]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


UNLABELLED = [{"input_ids": s["input_ids"]} for s in in_pairs()]
DEPENDENT = {
    "no statistics": (NoStatistics, MANY[:9], of_tensor),
    "no statistics, many": (NoStatistics, MANY, of_tensor),
    "capacity": (Capacity, MANY, of_tensor),
    "classifier": (Centred, UNLABELLED, lambda m, s: m(s["input_ids"][None])),
    "language model": (CentredLanguageModel, TOKENS, of_causal),
    "language model, pairs": (CentredLanguageModel, in_pairs(), of_causal),
    "language model, many": (CentredLanguageModel, token_samples(60, longest=12), of_causal),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_samples_that_depend_on_their_batch_are_read_alone(kind, caplog):
    make, samples, logits_of = DEPENDENT[kind]
    base = make()
    with caplog.at_level(logging.WARNING, "flowdata"):
        check(base, moved(base, 0.2), samples, logits_of)
    assert "not reading" in caplog.text


@pytest.mark.parametrize("kind", DEPENDENT)
def test_samples_that_depend_on_their_batch_are_held_as_they_are_read(kind, tmp_path):
    make, samples, _ = DEPENDENT[kind]
    base, file = make().train(), tmp_path / "rows.safetensors"
    tuned = moved(base, 0.2).train()
    for _ in range(2):  # the second meter finds the rows in its file, and reads nothing
        meter = DriftMeter(base, samples, store=file, dtype="float32")
        together, alone = (OutputAnchor(meter, 1e-3, size) for size in (len(samples), 1))
        assert together(base) < 1e-9
        expected = torch.stack([alone(tuned) for _ in samples])
        if isinstance(samples[0], dict) and "labels" in samples[0]:
            counts = torch.tensor([len(samples[place]["labels"]) - 1 for place in order_of(alone)])
            expected = expected * counts / counts.sum() * len(samples)
        penalty = together(tuned)
        torch.testing.assert_close(penalty, expected.mean(), rtol=1e-3, atol=1e-9)
        gradients = [
            torch.autograd.grad(each, tuned.head.weight)[0] for each in (penalty, expected.mean())
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-8)


def order_of(anchor):
    """The places of the samples that an anchor of batch size 1 saw first."""
    return anchor._order(0).tolist()


class Rounded(nn.Module):
    """Rounds by the largest value of its whole input, as dynamic quantisation does."""

    def forward(self, x):
        step = x.abs().max() / 4
        return (x / step).round() * step


def test_layers_that_round_by_their_whole_batch_are_read_alone(caplog):
    base = tiny_llama()
    low = copy.deepcopy(base)
    low.model.norm = nn.Sequential(low.model.norm, Rounded())
    with caplog.at_level(logging.WARNING, "flowdata"):
        meter = DriftMeter(base, [*TOKENS, *in_pairs()], dtype="float32")
        drift = meter(low)
    expected = truth(base, low, [*TOKENS, *in_pairs()], of_causal)
    # What lies between two steps in float64 may lie beyond one in float32.
    assert drift.kl == pytest.approx(float(expected["kl"]), rel=0.02)
    assert "not reading" in caplog.text


@pytest.mark.parametrize("count", [9, 64])
def test_a_dependence_that_training_brought_about_is_seen(count):
    base = Capacity(most=1000)
    tuned = moved(base)
    tuned.most.fill_(4)
    check(base, tuned, MANY[:count], of_tensor)


def test_a_network_may_return_a_dictionary():
    class Named(nn.Module):
        def __init__(self, more):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            self.more = more

        def forward(self, x):
            return {"out": self.network(x), **self.more}

    probe = torch.randn(9, 4)
    model = Named({"count": torch.tensor(3)})
    tuned = copy.deepcopy(model)
    nn.init.normal_(tuned.network[0].weight)
    drift, plain = DriftMeter(model, probe)(tuned), DriftMeter(model.network, probe)(tuned.network)
    assert drift == plain
    assert drift.kl > 0
    assert drift.head == "own"
    with pytest.raises(ValueError, match=r"2 tensors, out of shape \(1, 3\), aux .* put it into"):
        DriftMeter(Named({"aux": torch.zeros(1, 3)}), probe)


def test_models_that_can_not_be_measured_are_refused_by_name():
    class Random(Body):
        def features(self, x):
            return nn.functional.dropout(super().features(x), 0.5, training=True)

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, **fields):
            return self.inner(**fields)

    with pytest.raises(ValueError, match="has to be deterministic in eval mode"):
        DriftMeter(Random(), MANY)
    with pytest.raises(ValueError, match="BertForQuestionAnswering returns no logits"):
        DriftMeter(encoder("BertForQuestionAnswering"), UNLABELLED)
    with pytest.raises(ValueError, match="Wrapper names no output layer"):
        DriftMeter(tiny_llama(), TOKENS)(Wrapper(tiny_llama()))
    with pytest.raises(ValueError, match=r"no linear layer makes .* 'head', .* another body"):
        DriftMeter(Body(), MANY)(nn.Sequential(nn.Conv2d(3, 3, 16), nn.Flatten()))
    with pytest.raises(ValueError, match=r"BatchNorm without running statistics \(1\)"):
        DriftMeter(
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False)),
            torch.randn(9, 4),
        )


def test_a_base_that_diverged_is_refused():
    base = Body()
    with torch.no_grad():
        base.head.weight[1] = torch.nan
    with pytest.raises(ValueError, match="output layer of the model before training holds inf"):
        DriftMeter(base, MANY)
    with pytest.raises(ValueError, match=r"sample 0 .* returns inf or NaN; leave out a class"):
        DriftMeter(Barred(), MANY)
    samples = MANY.clone()
    samples[5] = torch.inf
    with pytest.raises(ValueError, match="gives no numbers for sample 5 of the probe"):
        DriftMeter(Body(), samples)


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.randn(3, 8, 8), 0


def test_a_probe_that_the_model_does_not_take_or_that_is_random_is_named():
    with pytest.raises(ValueError, match=r"fails on the probe's first sample \(.*channels"):
        DriftMeter(TinyResNet(), torch.randn(6, 1, 8, 8))
    with pytest.raises(ValueError, match=r"first sample .* pixels of uint8: convert"):
        DriftMeter(TinyResNet(), torch.randint(0, 256, (6, 3, 8, 8)).byte())
    with pytest.raises(ValueError, match=r"probe\[0\] differs from reading to reading"):
        DriftMeter(TinyResNet(), Augmented())


def test_a_head_that_is_taken_for_a_new_tasks_is_said(caplog):
    caplog.set_level(logging.INFO, "flowdata")
    base = TinyResNet()
    meter, tuned = DriftMeter(base, images(12)), copy.deepcopy(base)
    assert meter(tuned).head == "own"
    with torch.no_grad():
        tuned.head.weight.neg_()
    assert meter(tuned).head == "frozen"
    assert "new output layer: drift is read through the old one" in caplog.text


class Tagger(nn.Module):
    """A tagger of a user's own: five classes of each token, in either order."""

    def __init__(self, order, is_linear):
        super().__init__()
        torch.manual_seed(0)
        self.order, self.embed = order, nn.Embedding(30, 8)
        self.head = nn.Linear(8, 5) if is_linear else nn.Conv1d(8, 5, 1)

    def forward(self, input_ids):
        rows = self.embed(input_ids)
        is_linear = isinstance(self.head, nn.Linear)
        logits = self.head(rows) if is_linear else self.head(rows.mT).mT
        return logits if self.order == "BTC" else logits.mT


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("order", ["BTC", "BCT"])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [4, 8, 6, 7]])
def test_taggers_may_put_their_classes_first_or_last(order, lengths, is_linear):
    model = Tagger(order, is_linear)
    ids = torch.randint(30, (4, 8), generator=torch.Generator().manual_seed(1))
    probe = [{"input_ids": row[:length]} for row, length in zip(ids, lengths, strict=False)]
    tuned = moved(model)
    axis = -1 if order == "BTC" else 1
    expected = []
    for sample in probe:
        before, after = (
            each(sample["input_ids"][None]).detach().double().log_softmax(axis)
            for each in (model, tuned)
        )
        expected.append((before.exp() * (before - after)).sum(axis).flatten())
    drift = DriftMeter(model, probe, dtype="float32")(tuned)
    assert drift.kl == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)


@pytest.mark.parametrize("order", ["BTC", "BCT"])
def test_as_many_classes_as_tokens_are_refused(order):
    probe = [{"input_ids": torch.arange(5) + shift} for shift in range(3)]
    with pytest.raises(ValueError, match="either axis could be the classes'; measure drift on"):
        DriftMeter(Tagger(order, is_linear=False), probe)


class Scaled(nn.Module):
    """Depends on its batch, so that samples are run alone; a scale stands behind its head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        hidden = self.body(x)
        return self.head(torch.tanh(hidden - hidden.mean(0) / 2)) * self.scale


@pytest.mark.parametrize("number", [40, 300])
def test_a_tuned_model_is_checked_where_samples_are_run_alone(number):
    base, tuned = Scaled(), Scaled()
    probe = torch.randn(number, 6)
    meter = DriftMeter(base, probe, progress=False)
    with torch.no_grad():
        tuned.head.weight.mul_(2)
        ours, theirs = (
            torch.cat([model(x[None]) for x in probe]).log_softmax(1) for model in (base, tuned)
        )
        kl = F.kl_div(theirs, ours, reduction="batchmean", log_target=True)
        assert meter(tuned).kl == pytest.approx(kl.item(), rel=1e-4)
        tuned.scale.fill_(3.0)  # which the head alone doesn't tell
    with pytest.raises(ValueError, match="not what its output layer 'head' makes of a row"):
        meter(tuned)


class Bounded(Body):
    """A model with a bound on its logits."""

    def forward(self, x):
        return super().forward(x).clamp(-2, 2)


def test_logits_that_are_bounded_for_few_samples_are_refused():
    base, tuned, probe = Bounded(), Bounded(), MANY.repeat(20, 1, 1, 1).clone()
    probe[900] *= 20
    meter = DriftMeter(base, probe[:900], progress=False)
    with torch.no_grad():
        assert 0 < int((tuned.head(tuned.features(probe)).abs() > 2).any(1).sum()) < 3
        assert meter(tuned).kl == 0
    with pytest.raises(ValueError, match="not what its output layer 'head' makes of a row"):
        DriftMeter(base, probe, progress=False)
