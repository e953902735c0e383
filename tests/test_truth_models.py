"""Kinds of models that people have, each against itself on one sample at a time."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import LossScorer
from flowdata.errors import SampleError
from flowdata.scoring.collate import pad_collate
from flowdata.targets.predictions import logits_of
from tests.models import TinyResNet, images, tiny_gpt2, tiny_llama, token_samples
from tests.test_truth import bert, own_losses, scored
from tests.zoo import IMAGE_TOKEN, llava, wild

VOCABULARY = 199


def pairs(count=12, seed=5):
    """Ragged sources and targets of an encoder-decoder."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 190, (length,), generator=generator)

    return [{"input_ids": tokens(4, 20), "labels": tokens(2, 12)} for _ in range(count)]


def in_bfloat16(batch):
    """A batch with its floating inputs as a bfloat16 model takes them."""
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}


def check(model, samples, dtype="float32", collate_fn=None, loss="auto"):
    """Scores against the model's own loss alone; by twice the plain error in low precision."""
    collate = collate_fn or pad_collate
    model.eval()
    exact = own_losses(model, samples, collate)
    allowed = 1e-4 * exact.abs().clamp_min(1).max()
    if dtype == "bfloat16":
        low = copy.deepcopy(model).bfloat16()
        rounded = own_losses(low, samples, lambda each: in_bfloat16(collate(each))).float()
        allowed = 2 * (rounded - exact).abs().max() + 1e-3
    scores, how = scored(model, samples, loss, dtype, collate_fn=collate_fn)
    assert (scores.losses - exact).abs().max() <= allowed, how
    return how


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["Marian", "M2M100", "Blenderbot", "Pegasus", "Bart", "MBart", "T5", "ProphetNet"]
)
def test_encoder_decoders_under_auto(name, dtype):
    import transformers

    layers = {f"{half}_{size}": 2 for half in ("encoder", "decoder") for size in ("layers",)}
    heads = {f"{half}_attention_heads": 4 for half in ("encoder", "decoder")}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    special = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **special}
    if name == "T5":
        options = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        sizes = {"vocab_size": VOCABULARY, **special}
    elif name == "ProphetNet":
        options = {f"num_{half}": 2 for half in ("encoder_layers", "decoder_layers")}
        options |= {f"num_{half}": 4 for half in heads}
        options |= {"hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        sizes |= {"pad_token_id": 0}
    else:
        options = {**layers, **heads, **widths}
    kind = "MarianMTModel" if name == "Marian" else f"{name}ForConditionalGeneration"
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**sizes, **options))
    how = check(wild(model), pairs(), dtype)
    # ProphetNet smooths its labels in a way of its own.
    assert how.startswith("own" if name == "ProphetNet" else "seq2seq_lm")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speech_to_text(dtype):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {f"{half}_layers": 2 for half in ("encoder", "decoder")}
    sizes |= {f"{half}_attention_heads": 4 for half in ("encoder", "decoder")}
    sizes |= {f"{half}_ffn_dim": 48 for half in ("encoder", "decoder")}
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=64,
        **sizes,
        **special,
    )
    torch.manual_seed(0)
    rows = [{"input_features": torch.randn(8, 100), "labels": s["labels"]} for s in pairs()]

    def collate(samples):
        labels = [sample["labels"] for sample in samples]
        return {
            "input_features": torch.stack([sample["input_features"] for sample in samples]),
            "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    check(wild(WhisperForConditionalGeneration(config)), rows, dtype, collate)


def test_speech_with_alignments_is_the_models_own_loss():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    rows = [
        {"input_values": torch.randn(int(n)), "labels": torch.randint(1, 30, (5,))}
        for n in torch.randint(400, 800, (8,))
    ]

    def collate(samples):
        waves = [sample["input_values"] for sample in samples]
        return {
            "input_values": nn.utils.rnn.pad_sequence(waves, batch_first=True),
            "labels": torch.stack([sample["labels"] for sample in samples]),
        }

    how = check(wild(Wav2Vec2ForCTC(config)), rows, collate_fn=collate)
    assert how.startswith("own")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["PrefixTuning", "PromptTuning", "PromptEncoder"])
def test_virtual_tokens(kind, dtype):
    import peft

    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(0)
    check(peft.get_peft_model(tiny_llama(), config), token_samples(12), dtype)


def test_logits_of_virtual_tokens_are_nobodys():
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, samples = peft.get_peft_model(tiny_llama(), config).eval(), token_samples(6)
    scores = LossScorer(model, "causal_lm", dtype="float32", progress=False).score(samples)
    torch.testing.assert_close(scores.losses, own_losses(model, samples), rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_base_is_chosen_with_its_adapters_off():
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, samples = peft.get_peft_model(tiny_llama(), config), token_samples(6)
    scorer = LossScorer(model, reference="base", dtype="float32", progress=False)
    own = own_losses(tiny_llama().eval(), samples)
    torch.testing.assert_close(scorer.score(samples).losses, own, rtol=1e-4, atol=1e-4)
    assert scorer.explain().startswith("causal_lm")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["ConvBert", "FNet", "Canine"])
def test_encoders_whose_padding_leaks(family, dtype):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_labels": 3}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    sizes |= {"embedding_size": 32} if family == "ConvBert" else {}
    sizes |= {} if family == "Canine" else {"vocab_size": VOCABULARY}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = wild(getattr(transformers, f"{family}ForSequenceClassification")(config))
    rows = [s | {"labels": torch.tensor(i % 3)} for i, s in enumerate(token_samples(16))]
    if (family, dtype) == ("FNet", "bfloat16"):  # its Fourier transform knows no bfloat16
        with pytest.raises(ValueError, match=r"does not run in bfloat16 \(.*pass dtype='float32'"):
            LossScorer(model, dtype=dtype, progress=False).score(rows)
        return
    check(model, rows, dtype)


# --- models in other numbers -----------------------------------------------------------------


def test_parts_in_several_dtypes_are_run_as_they_are():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(4, 8).bfloat16(), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.body(x.bfloat16()).float())

    model, data = Mixed(), TensorDataset(torch.randn(9, 4), torch.arange(9) % 5)
    expected = torch.stack([F.cross_entropy(model(x[None]), y[None]) for x, y in data]).detach()
    scores = LossScorer(model, progress=False).score(data)
    torch.testing.assert_close(scores.losses, expected)


def test_dynamic_int8():
    model = tiny_llama(hidden_size=64).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    exact = own_losses(model, samples := token_samples(12))
    scores = LossScorer(model, progress=False).score(samples)
    # Activations are quantised by the range of their batch: a sample's loss depends on it a little.
    assert (scores.losses - exact).abs().max() <= 1e-3


def test_weights_in_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny_llama(hidden_size=64).eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    exact = own_losses(model, samples := token_samples(12))
    scores = LossScorer(model, progress=False).score(samples)
    assert (scores.losses - exact).abs().max() <= 1e-4


def test_weights_in_int4():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    int4 = pytest.importorskip("torchao.prototype.quantization.int4", reason="not for CPUs here")
    model = tiny_llama(hidden_size=128, intermediate_size=256).eval()
    quantization.quantize_(model.model, int4.PrototypeInt4WeightOnlyConfig(group_size=32))
    with torch.no_grad():
        exact = own_losses(model, samples := token_samples(12))
    scores = LossScorer(model, progress=False).score(samples)
    assert (scores.losses - exact).abs().max() <= 1e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_of_bitsandbytes(bits):
    layers = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    model = tiny_llama(hidden_size=64, intermediate_size=128).eval()
    for path, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features
            if bits == 8:
                quantised = layers.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                weight = layers.Int8Params(layer.weight.data, requires_grad=False)
            else:
                quantised = layers.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32)
                weight = layers.Params4bit(layer.weight.data, requires_grad=False)
            quantised.weight = weight
            model.model.set_submodule(path, quantised.to("cpu"))
    exact = own_losses(model, samples := token_samples(12))
    scores = LossScorer(model, progress=False).score(samples)
    assert (scores.losses - exact).abs().max() <= 1e-3  # it has other kernels for gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_made_in_inference_mode(dtype):
    samples = token_samples(12)
    with torch.inference_mode():
        model = tiny_llama().eval()
    exact = own_losses(tiny_llama().eval(), samples)
    scores, _ = scored(model, samples, dtype=dtype)
    assert (scores.losses - exact).abs().max() <= (1e-4 if dtype == "float32" else 0.02)


def test_unsigned_tokens():
    samples = token_samples(8)
    unsigned = [
        {**sample, "input_ids": sample["input_ids"].numpy().astype(np.uint16)} for sample in samples
    ]
    scores, _ = scored(tiny_llama(), unsigned)
    torch.testing.assert_close(scores.losses, own_losses(tiny_llama().eval(), samples))


# --- one line that says what to do -----------------------------------------------------------


def classified(label):
    return [{"input_ids": sample["input_ids"], "labels": label} for sample in token_samples(4)]


@pytest.mark.parametrize("loss", ["auto", "cross_entropy", "own"])
@pytest.mark.parametrize("label", ["positive", None])
def test_labels_that_are_no_numbers(label, loss):
    from transformers import BertForSequenceClassification

    with pytest.raises(
        ValueError, match=rf"'labels' must be numbers, got {re.escape(repr(label))}"
    ):
        scored(BertForSequenceClassification(bert(num_labels=3)), classified(label), loss)


def test_no_labels_under_their_name():
    with pytest.raises(ValueError, match="'labels' of a sample is None; leave the field out"):
        scored(tiny_llama(), classified(None))


def test_more_tokens_than_positions():
    model = tiny_gpt2()
    model.config.max_position_embeddings = 32
    model.transformer.wpe = nn.Embedding(32, 32)
    with pytest.raises(ValueError, match=r"a sample has \d+ tokens and the model 32 positions"):
        scored(model, token_samples(8))


def test_batches_of_another_layout():
    for batch, name in (({"x": 1}, "a mapping with 'x'"), ([1, 2], "a list of 2")):
        with pytest.raises(ValueError, match=f"needs batches that are mappings .* got {name}"):
            scored(tiny_llama(), token_samples(4), "causal_lm", collate_fn=lambda _, b=batch: b)


def test_a_mean_where_losses_should_be():
    def mean(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(
        ValueError, match=r"tensor of shape \(B,\).* got \(\); use reduction='none'"
    ):
        scored(TinyResNet(), images(), mean)


@pytest.mark.parametrize("options", [{"token_losses": True}, {"columns": ["entropy"]}])
@pytest.mark.parametrize("loss", ["own", "auto"])
def test_what_a_models_own_loss_does_not_have_is_refused(loss, options):
    from transformers import BertForQuestionAnswering

    rows = [
        {
            "input_ids": s["input_ids"],
            "start_positions": torch.tensor(1),
            "end_positions": torch.tensor(2),
        }
        for s in token_samples(6)
    ]
    with pytest.raises(ValueError, match=r"loss='own'"):
        LossScorer(BertForQuestionAnswering(bert()), loss, progress=False, **options).score(rows)


def test_a_model_of_two_towers_has_no_loss_of_samples():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 4
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **sizes}
    vision = {"image_size": 32, "patch_size": 8, **sizes}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    rows = [
        {"input_ids": torch.randint(3, 190, (9,)), "pixel_values": torch.randn(3, 32, 32)}
        for _ in range(6)
    ]
    with pytest.raises(ValueError, match=r"4 tensors, logits_per_image .*loss=callable"):
        scored(model, rows)


@pytest.mark.parametrize("loss", ["auto", "own"])
def test_autocast_around_a_call_does_not_round_its_losses(loss):
    model, samples = tiny_llama().eval(), token_samples(12)
    exact = own_losses(model, samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = scored(model, samples, loss)
    torch.testing.assert_close(scores.losses, exact)
    layer, data = nn.Linear(4, 3), TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)
    exact = F.cross_entropy(layer(data.tensors[0]), data.tensors[1], reduction="none").detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = scored(layer, data)
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(scores.losses, exact)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_parts_in_several_dtypes_that_do_not_run_together(dtype):
    model = tiny_llama()
    model.lm_head.bfloat16()
    classifier = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 3))
    data = TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)
    for each, samples in ((model, token_samples(8)), (classifier, data)):
        with pytest.raises(ValueError, match=r"parts in bfloat16 and float32, .*model\.float\(\)"):
            scored(each, samples, dtype=dtype)


def test_images_in_a_layout_that_the_model_does_not_take():
    model, tokens = llava(), torch.cat([torch.full((4,), IMAGE_TOKEN), torch.arange(8, 17)])
    rows = [{"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8)} for _ in range(6)]
    with pytest.raises(ValueError, match=r"given 'pixel_values' of shape \(1, 1, 3, 8, 8\)\). If"):
        scored(model, rows)

    def listed(samples):
        batch = pad_collate([{"input_ids": sample["input_ids"]} for sample in samples])
        return {**batch, "pixel_values": [sample["pixel_values"] for sample in samples]}

    with pytest.raises(AttributeError, match=r"given 'pixel_values' as a list of 1.*collate_fn"):
        scored(model, rows, collate_fn=listed)


def labelled_batch(samples):
    """Padded tokens with labels."""
    batch = pad_collate([{"input_ids": sample["input_ids"]} for sample in samples])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def of_narrow_integers(samples):
    return {name: value.int() for name, value in labelled_batch(samples).items()}


def with_causal_mask(samples):
    """A mask of which tokens see which, as people make them for packed documents."""
    batch = labelled_batch(samples)
    places = torch.arange(batch["input_ids"].shape[1])
    sees = (places[:, None] >= places) & (places[:, None] - places < 5)
    sees = sees & (batch["attention_mask"][:, None, None] != 0)
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    return {**batch, "attention_mask": mask}


def test_tokens_and_labels_of_narrow_integers():
    samples = token_samples(8)
    model, exact = tiny_llama(), own_losses(tiny_llama().eval(), samples)
    for dtype in (torch.int16, torch.int32):
        narrow = [{name: value.to(dtype) for name, value in s.items()} for s in samples]
        torch.testing.assert_close(scored(model, narrow)[0].losses, exact)
    exact = own_losses(tiny_llama().eval(), samples, labelled_batch)
    scores, _ = scored(model, samples, collate_fn=of_narrow_integers)
    torch.testing.assert_close(scores.losses, exact)


def test_masks_of_which_tokens_see_which():
    model, samples = tiny_llama().eval(), token_samples(12)
    exact = own_losses(model, samples, with_causal_mask)
    scores, _ = scored(model, samples, collate_fn=with_causal_mask)
    torch.testing.assert_close(scores.losses, exact)

    def unlabelled(samples):
        batch = with_causal_mask(samples)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    with pytest.raises(ValueError, match=r"'attention_mask' says which tokens count.*'labels'"):
        scored(model, samples, collate_fn=unlabelled)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_are_none(workers):
    samples = token_samples(12)
    exact = own_losses(tiny_llama().eval(), samples)
    samples[0] = samples[7] = None
    with pytest.raises(SampleError, match=r"dataset\[[07]\] .*is None; .*on_error='skip'"):
        scored(tiny_llama(), samples, num_workers=workers)
    scores, _ = scored(tiny_llama(), samples, num_workers=workers, on_error="skip")
    exact[[0, 7]] = float("nan")
    torch.testing.assert_close(scores.losses, exact, equal_nan=True)


# --- terms beside the loss ---------------------------------------------------------------------


class Smoothed(nn.Module):
    """A classifier whose loss smooths labels, and that names a further term."""

    def __init__(self, term, config=None):
        super().__init__()
        self.layer, self.term = nn.Linear(4, 3), term
        if config is not None:
            self.config = config

    def forward(self, x, labels):
        logits = self.layer(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.3)
        factor = getattr(getattr(self, "config", None), "router_aux_loss_coef", 0.0)
        return {"loss": loss + factor * self.term, "aux_loss": self.term, "logits": logits}


def smoothed_samples():
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 3)} for i in range(6)
    ]


@pytest.mark.parametrize("loss", ["own", "auto"])
def test_a_term_of_unknown_factor_is_not_taken_off_the_models_own_loss(loss):
    model = Smoothed(torch.tensor(5.0)).eval()
    with pytest.raises(ValueError, match=r"names aux_loss \(5\) beside its loss"):
        LossScorer(model, loss, progress=False).score(smoothed_samples())


@pytest.mark.parametrize(("term", "factor"), [(0.0, None), (5.0, 0.5), (5.0, 0.0)])
def test_a_term_that_is_nothing_or_of_known_factor_is_taken_off(term, factor):
    config = None if factor is None else SimpleNamespace(router_aux_loss_coef=factor)
    model, samples = Smoothed(torch.tensor(term), config).eval(), smoothed_samples()
    scores = LossScorer(model, "own", progress=False).score(samples)
    smoothed = [
        F.cross_entropy(model.layer(s["x"]), s["labels"], label_smoothing=0.3) for s in samples
    ]
    torch.testing.assert_close(scores.losses, torch.stack(smoothed).detach(), atol=1e-5, rtol=1e-5)


def test_logits_that_are_no_tensor_are_refused():
    parts = {"logits": [torch.zeros(2, 3)] * 2, "embedding": torch.ones(2, 8)}
    with pytest.raises(ValueError, match="returned list under the name `logits`"):
        logits_of(parts)


def test_a_sample_of_one_token_leaves_the_loss_what_it_is():
    rows = [{"input_ids": torch.tensor([3]), "labels": torch.tensor([3])}]
    rows += [{"input_ids": s["input_ids"], "labels": s["input_ids"]} for s in token_samples(5)]
    scores, how = scored(tiny_llama(), rows)
    assert "causal_lm" in how
    assert scores.losses.isnan().tolist() == [True] + 5 * [False]
    assert scores.counts.tolist() == [len(row["input_ids"]) - 1 for row in rows]
