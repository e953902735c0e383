import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from flowdata import LossScorer, ScoreMismatchError, Scores
from flowdata.errors import OutOfRangeError, SampleError
from tests import reference
from tests.models import (
    VOCABULARY,
    TinyResNet,
    images,
    scale_logits,
    tiny_gpt2,
    tiny_llama,
    token_samples,
)

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def per_sample(model, batch):
    """A user's callable."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none")


def quiet(model, loss="auto", **options):
    return LossScorer(model, loss, progress=False, **{"dtype": "float32", **options})


def expected_losses(model, samples):
    model = model.eval()
    return torch.tensor([reference.causal_lm_sample_loss(model, s)[0] for s in samples])


# --- losses equal one sample at a time in float32 --------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_language_models(name, dtype):
    model, samples = MODELS[name](), token_samples()
    expected = expected_losses(model, samples)
    scores = quiet(model, dtype=dtype, max_tokens=200).score(samples)
    assert (scores.losses - expected).abs().max() < TOLERANCE[dtype]
    assert scores.counts.tolist() == [int((s["labels"][1:] != -100).sum()) for s in samples]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("loss", ["auto", per_sample])
def test_a_classifier_and_a_users_callable(loss, dtype):
    model, data = TinyResNet(), images()
    model.eval()
    with torch.no_grad():
        expected = torch.cat([per_sample(model, (x[None], y[None])) for x, y in data])
    scores = quiet(model.train(), loss, dtype=dtype, batch_size=6).score(data)
    assert (scores.losses - expected).abs().max() < TOLERANCE[dtype]
    assert scores.counts.tolist() == [1] * len(data)


@pytest.mark.parametrize("way", range(4))
def test_every_way_to_score_a_language_model_gives_the_same(way):
    from flowdata.scoring.collate import pad_collate
    from flowdata.scoring.language.ways import plain_way, ways_of
    from flowdata.targets.target_losses import joined

    model, samples = tiny_llama().eval(), token_samples(8)
    plain = plain_way(model, "causal_lm")

    def one_by_one(model, batch):
        return joined([plain(model, pad_collate([sample])) for sample in samples])

    with torch.no_grad():
        name, method = [*ways_of(model, "causal_lm"), ("one by one", one_by_one)][way]
        columns = method(model, pad_collate(samples)).columns(token_losses=True)
    torch.testing.assert_close(columns["loss"], expected_losses(model, samples), msg=name)
    assert len(columns["token_loss"]) == int(columns["count"].sum())


def test_token_losses_are_kept_sample_by_sample():
    model, samples = tiny_llama(), token_samples(9)
    scores = quiet(model, token_losses=True, max_tokens=100).score(samples)
    for index, sample in enumerate(samples):
        assert len(scores.token_losses(index)) == scores.counts[index]
        assert scores.token_losses(index).mean().item() == pytest.approx(
            reference.causal_lm_sample_loss(model.eval(), sample)[0], abs=1e-4
        )


def test_left_padding_and_a_collate_function_of_the_users_own():
    model, samples = tiny_gpt2(), token_samples(8)

    def pad_left(batch):
        longest = max(len(s["input_ids"]) for s in batch)
        pads = [longest - len(s["input_ids"]) for s in batch]
        pairs = list(zip(batch, pads, strict=True))
        return {
            "input_ids": torch.stack([F.pad(s["input_ids"], (p, 0)) for s, p in pairs]),
            "labels": torch.stack([F.pad(s["labels"], (p, 0), value=-100) for s, p in pairs]),
            "attention_mask": torch.stack(
                [F.pad(torch.ones_like(s["labels"]), (p, 0)) for s, p in pairs]
            ),
        }

    scores = quiet(model).score(samples, collate_fn=pad_left)
    assert (scores.losses - expected_losses(model, samples)).abs().max() < 1e-4


def test_softcaps_and_logit_scales_of_a_configuration_are_honoured():
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "vocab_size": 199,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.5))
    cohere = CohereForCausalLM(CohereConfig(**sizes, logit_scale=3.0))
    for model in (gemma, cohere):
        samples = token_samples(6)
        scorer = quiet(model)
        error = (scorer.score(samples).losses - expected_losses(model, samples)).abs().max()
        assert error < 1e-4
        assert "tiled head" in scorer.explain()


def test_a_head_that_configurations_do_not_tell_of_is_noticed(caplog):
    model = tiny_llama()
    scale_logits(model, 7)
    samples = token_samples(6)
    scorer = quiet(model)
    assert (scorer.score(samples).losses - expected_losses(model, samples)).abs().max() < 1e-4
    assert "the model's head" in scorer.explain()
    assert "not by target positions through a tiled head" in caplog.text


def test_encoder_decoders_and_masked_models():
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=199,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=199,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    pairs = [
        {"input_ids": s["input_ids"], "labels": s["input_ids"].flip(0)[: 1 + i % 4]}
        for i, s in enumerate(token_samples(8))
    ]
    for model, samples in ((t5, pairs), (bert, token_samples(8))):
        model.eval()
        with torch.no_grad():
            expected = torch.stack(
                [
                    model(input_ids=s["input_ids"][None], labels=s["labels"][None]).loss
                    for s in samples
                ]
            )
        scorer = quiet(model)
        assert (scorer.score(samples).losses - expected).abs().max() < 1e-4, scorer.explain()


@pytest.mark.parametrize(
    ("loss", "targets", "plain"),
    [
        (
            "binary_cross_entropy",
            torch.tensor([[0.0, 1.0, 1.0]]),
            F.binary_cross_entropy_with_logits,
        ),
        ("mse", torch.tensor([[0.3, -1.0, 2.0]]), F.mse_loss),
        ("cross_entropy", torch.tensor([2]), F.cross_entropy),
        ("cross_entropy", torch.tensor([[0.2, 0.3, 0.5]]), F.cross_entropy),
    ],
)
def test_named_losses_are_torchs_own(loss, targets, plain):
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    data = TensorDataset(inputs, targets.expand(5, *targets.shape[1:]))
    expected = [plain(model(x[None]), y[None]).item() for x, y in data]
    assert quiet(model, loss).score(data).losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_auto_names_what_it_chose():
    def chosen(target):
        scorer = quiet(nn.Linear(4, 3))
        scorer.score(TensorDataset(torch.randn(5, 4), target))
        return scorer.explain().split()[0]

    assert chosen(torch.tensor([0, 1, 2, 0, 1])) == "cross_entropy"
    assert chosen(torch.eye(5)[:, :3]) == "binary_cross_entropy"
    assert chosen(torch.randn(5, 3)) == "mse"


def test_auto_is_low_precision_for_language_models_alone():
    from flowdata.models.precision import is_fast_at_bfloat16

    fast = is_fast_at_bfloat16(torch.device("cpu"))
    scorer = quiet(tiny_llama(), dtype="auto")
    scorer.score(token_samples(3))
    assert f"causal_lm in {'bfloat16' if fast else 'float32'}" in scorer.explain()
    for model, loss in ((TinyResNet(), "auto"), (TinyResNet(), per_sample)):
        scorer = quiet(model, loss, dtype="auto")
        scorer.score(images())
        assert "in float32" in scorer.explain()


def test_base_reference_scores_without_adapters():
    from peft import LoraConfig, get_peft_model

    base, samples = tiny_llama(), token_samples(6)
    expected = expected_losses(base, samples)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad = "lora_" in name and number % 4 == 1
    flags = [parameter.requires_grad for parameter in model.parameters()]
    scored = {r: quiet(model, reference=r).score(samples).losses for r in ("base", "model")}
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert (scored["base"] - expected).abs().max() < 1e-4
    assert (scored["model"] - expected).abs().max() > 2e-4
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters


def test_adapters_that_took_a_part_of_the_base_have_no_base_to_score():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="moved a part of the base model's weights into them"):
        quiet(model, reference="base")


def test_tokens_bound_no_samples_without_a_length():
    with pytest.raises(ValueError, match="max_tokens has no effect on samples without a length"):
        quiet(TinyResNet(), "cross_entropy", max_tokens=99).score(images())


def test_a_collate_function_may_take_fields_out_of_its_samples():
    def taking(samples):
        labels = torch.stack([sample.pop("labels") for sample in samples])
        return {"x": torch.stack([sample["x"] for sample in samples]), "labels": labels}

    samples = [{"x": image, "labels": label} for image, label in images()]
    expected = quiet(TinyResNet(), "cross_entropy").score(images()).losses
    scores = quiet(Named(TinyResNet()), "cross_entropy").score(samples, collate_fn=taking)
    assert torch.equal(scores.losses, expected)
    assert samples[0].keys() == {"x", "labels"}


class Named(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_hugging_face_data_sets_and_workers():
    model, samples = tiny_llama(), token_samples(12)
    rows = [{name: value.tolist() for name, value in s.items()} for s in samples]
    data = datasets.Dataset.from_list(rows)
    expected = expected_losses(model, samples)
    for workers in (0, 2):
        scores = quiet(model, max_tokens=128).score(data, num_workers=workers)
        assert (scores.losses - expected).abs().max() < 1e-4


def test_raw_text_with_a_tokenising_collate_function():
    model = tiny_llama()

    def encode(text):
        return torch.tensor([2 + ord(c) % 90 for c in text])

    def collate(texts):
        from flowdata.scoring.collate import pad_collate

        return pad_collate([{"input_ids": encode(t), "labels": encode(t)} for t in texts])

    texts = ["short", "a much longer piece of text", "middling text", "x" * 50]
    samples = [{"input_ids": encode(t), "labels": encode(t)} for t in texts]
    scores = quiet(model, max_tokens=24).score(texts, collate_fn=collate)
    assert (scores.losses - expected_losses(model, samples)).abs().max() < 1e-4


# --- the model comes back as it went in --------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nothing_about_the_model_or_the_generators_changes(dtype):
    model = tiny_llama().train()
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    calls = []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))

    def state():
        return (
            [module.training for module in model.modules()],
            [(p.data_ptr(), p.dtype, p.device, p.requires_grad) for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            [p.grad is None for p in model.parameters()],
            {name: value.clone() for name, value in model.state_dict().items()},
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
        )

    torch.manual_seed(3)
    before = state()
    quiet(model, dtype=dtype).score(token_samples(6))
    after = state()
    assert before[:4] == after[:4]
    assert all(torch.equal(value, after[4][name]) for name, value in before[4].items())
    assert before[5:] == after[5:]
    loss = model(input_ids=torch.arange(5)[None]).logits.sum()
    loss.backward()  # nothing made while scoring is in the way of training


def test_a_failure_half_way_gives_the_model_back_too():
    model = TinyResNet().train()

    def fails(model, batch):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        quiet(model, fails).score(images())
    assert model.training


# --- the store -------------------------------------------------------------------------------


def counting(model):
    model.calls = 0

    def count(*_):
        model.calls += 1

    model.register_forward_hook(count)
    return model


def test_a_second_score_returns_without_running_the_model(tmp_path):
    samples = token_samples()
    first = quiet(tiny_llama(), token_losses=True).score(samples, store=tmp_path / "s")
    model = counting(tiny_llama())
    again = quiet(model, token_losses=True).score(samples, store=tmp_path / "s")
    assert model.calls == 0
    assert torch.equal(first.losses, again.losses)
    assert torch.equal(first.token_losses(3), again.token_losses(3))
    assert Scores.load(tmp_path / "s").metadata == again.metadata
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "manifest.json",
        "scores.safetensors",
    ]


def test_anything_that_changes_losses_is_refused_by_name(tmp_path):
    model, samples = tiny_llama(), token_samples()
    quiet(model).score(samples, store=tmp_path)

    def refused(named, scorer, data, **options):
        with pytest.raises(ScoreMismatchError, match=f"made with another {named}"):
            scorer.score(data, store=tmp_path, **options)

    refused("dtype", quiet(model, dtype="bfloat16"), samples)
    refused("choice of token_losses", quiet(model, token_losses=True), samples)
    refused("data set", quiet(model), token_samples(seed=1))
    refused("data set and number of samples", quiet(model), samples[:-1])
    refused("data set", quiet(model), samples, dataset_id="mine")
    refused("collate_fn", quiet(model), samples, collate_fn=lambda batch: batch)
    refused("loss", quiet(model, lambda model, batch: torch.ones(1)), samples)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    refused("model", quiet(model), samples)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_goes_on_and_gives_the_same_bits(tmp_path, workers, capsys):
    samples = token_samples(40)
    undisturbed = counting(tiny_llama())
    whole = quiet(undisturbed, max_tokens=90).score(samples)

    class Fails(list):
        failing = True

        def __getitem__(self, index):
            if self.failing and index == 17:
                raise OSError("disk gone")
            return super().__getitem__(index)

    broken = Fails(samples)
    scorer = quiet(tiny_llama(), max_tokens=90)
    with pytest.raises(SampleError, match=r"dataset\[17\] raised OSError: disk gone"):
        scorer.score(broken, store=tmp_path, dataset_id="d", lengths=lengths(samples))
    assert list(tmp_path.glob("parts/*"))
    with pytest.raises(ValueError, match="is not finished"):
        Scores.load(tmp_path)
    Fails.failing = False
    model = counting(tiny_llama())
    scores = quiet(model).score(  # by the budget that the store was begun with
        broken, store=tmp_path, dataset_id="d", lengths=lengths(samples), num_workers=workers
    )
    assert torch.equal(scores.losses, whole.losses)
    assert 0 < model.calls < undisturbed.calls


def lengths(samples):
    return [len(sample["input_ids"]) for sample in samples]


def test_a_run_goes_on_with_the_threads_that_it_was_begun_with(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what the user sets is not measured
    seen, packs = [], []

    class Stopping:
        def __call__(self, model, batch):
            seen.append(torch.get_num_threads())
            is_pack = len(batch[0]) == 5  # the others are of the check
            packs.extend([None] * is_pack)
            if is_pack and len(packs) == 3:
                raise KeyboardInterrupt
            return per_sample(model, batch)

    scorer, before = quiet(TinyResNet(), Stopping(), batch_size=5), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            scorer.score(images(), store=tmp_path)
        torch.set_num_threads(1)
        scorer.score(images(), store=tmp_path)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}
    assert (
        "threads: 2 instead of 1, as when the store was begun, since the last bits of its losses "
        "depend on the number; to compute with 1, score into another store"
    ) in scorer.explain()
    assert Scores.load(tmp_path).metadata["plan"]["threads"] == 2


def test_a_damaged_part_is_scored_again(tmp_path, caplog):
    samples = token_samples(40)
    whole = quiet(tiny_llama(), max_tokens=90).score(samples)

    # The shortest but for those that are looked at before the run.
    late = min((i for i in range(40) if i % 3), key=lambda i: len(samples[i]["labels"]))

    class Stops(list):
        stopping = True

        def __getitem__(self, index):
            if self.stopping and index == late:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    data = Stops(samples)
    options = {"store": tmp_path, "dataset_id": "d", "lengths": lengths(samples)}
    with pytest.raises(KeyboardInterrupt):
        quiet(tiny_llama(), max_tokens=90).score(data, **options)
    part = sorted(tmp_path.glob("parts/*"))[0]
    part.write_bytes(part.read_bytes()[:-1])
    Stops.stopping = False
    scores = quiet(tiny_llama(), max_tokens=90).score(data, **options)
    assert torch.equal(scores.losses, whole.losses)
    assert "what it held is scored again" in caplog.text


# --- bad input -------------------------------------------------------------------------------


def test_samples_without_targets_and_non_finite_losses_are_nan(caplog):
    samples = token_samples(6)
    samples[2]["labels"][:] = -100
    model = tiny_llama()
    scores = quiet(model, token_losses=True).score(samples)
    assert scores.losses.isnan().tolist() == [False, False, True, False, False, False]
    assert scores.counts[2] == 0
    assert scores.token_losses(2).tolist() == []
    assert "1 of 6 samples have no loss: 1 without a target" in caplog.text
    assert (scores.losses - expected_losses(model, samples)).nan_to_num().abs().max() < 1e-4

    def odd(model, batch):
        return torch.where(batch[1] == 0, torch.nan, model(batch[0])[:, 0].square())

    data = TensorDataset(torch.randn(4, 4), torch.tensor([1, 0, 1, 1]))
    scores = quiet(nn.Linear(4, 3), odd).score(data)
    assert scores.losses.isnan().tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="indices 1; drop them"):
        scores.weights()


@pytest.mark.parametrize("at", range(17))
def test_labels_that_are_no_tokens_are_refused_wherever_they_are(at):
    samples = token_samples(17)
    samples[at]["labels"][-1] = -1
    with pytest.raises(ValueError, match=r"labels must be token ids, or -100 .*, got -1"):
        quiet(tiny_gpt2()).score(samples)


def test_a_label_that_is_no_token_is_located_within_its_pack():
    samples = token_samples(17)
    samples[11]["labels"][-1] = -2
    with pytest.raises(ValueError, match=r"got -2 \(sample 11, the only one among \d+ looked at"):
        quiet(tiny_gpt2(), batch_size=2).score(samples)


class Yes(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze(-1)


@pytest.mark.parametrize("loss", ["auto", "cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("at", [0, 17])
def test_a_target_that_the_model_does_not_have_is_located(loss, at):
    values = torch.arange(120) % (2 if loss == "binary_cross_entropy" else 10)
    values[at] = 10
    values[99] = -3
    rows = torch.randn(120, 4)
    model = Yes(4, 1) if loss == "binary_cross_entropy" else nn.Linear(4, 10)
    targets = values.float() if loss == "binary_cross_entropy" else values
    message = rf"got (10|-3) \(sample {at}, the (first of 2|only one) among .* from 0\)"
    with pytest.raises(OutOfRangeError, match=message):
        quiet(model, loss, batch_size=120).score(TensorDataset(rows, targets))


@pytest.mark.parametrize("loss", ["auto", "cross_entropy"])
def test_images_of_bytes_are_refused_with_what_to_do(loss):
    data = [((image * 40 + 99).byte(), label) for image, label in images(8)]
    remedy = r"a sample of the data set \(.*\); give samples of .* pixels of uint8: convert them to"
    with pytest.raises(ValueError, match=remedy + r" floating numbers, as by \.float\(\) / 255"):
        quiet(TinyResNet(), loss).score(data)
    with pytest.raises(ValueError, match=r"fails on a sample .* shape and dtype that it takes$"):
        quiet(TinyResNet(), loss).score([(image[:1], label) for image, label in images(8)])


@pytest.mark.parametrize(("field", "place"), [("input_ids", 0), ("labels", -1)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_tokens_that_the_model_does_not_have_are_refused(make, field, place):
    samples = token_samples(17)
    samples[3] = samples[3] | {field: samples[3][field].clone()}
    samples[3][field][place] = VOCABULARY
    expected = rf"{field} must be tokens of the model, from 0 to {VOCABULARY - 1}, got {VOCABULARY}"
    with pytest.raises(ValueError, match=expected):
        quiet(make()).score(samples)


def test_a_loss_that_depends_on_the_batch_is_told(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    data = TensorDataset(torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]))
    with pytest.raises(ValueError, match=r"running statistics \(1\): a sample's loss depends on"):
        quiet(model).score(data)
    images = TensorDataset(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]))
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
    scorer = quiet(model)
    with torch.no_grad():
        expected = [F.cross_entropy(model(x[None]), y[None]) for x, y in images]
    torch.testing.assert_close(scorer.score(images).losses, torch.stack(expected))
    assert "BatchNorm without running statistics (1): a sample's loss depends on" in caplog.text
    assert "samples of one length" not in scorer.explain()
    assert "one sample at a time" in scorer.explain()


def test_lists_that_would_be_taken_apart_are_refused():
    rows = datasets.Dataset.from_dict({"x": [[0.0, 1.0], [2.0, 3.0]], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"hold 'x' as a list, .*with_format\('torch'\)"):
        quiet(nn.Linear(2, 2)).score(rows)
    assert quiet(nn.Linear(2, 2)).score(rows.with_format("torch")).losses.isfinite().all()


def test_merged_adapters_are_not_taken_out_unasked():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call model.unmerge_adapter\(\) first"):
        quiet(model, reference="base")
    model.unmerge_adapter()
    assert quiet(model, reference="base").score(token_samples(3)).losses.isfinite().all()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_samples_without_tokens_have_no_loss(make):
    none = torch.empty(0, dtype=torch.long)
    samples = [{"input_ids": none, "labels": none}] * 5 + token_samples(3)
    found = quiet(make(), batch_size=2).score(samples)
    assert found.losses.isnan().tolist() == [True] * 5 + [False] * 3
    lists = [{"input_ids": []} for _ in range(3)]
    assert quiet(make()).score(lists).losses.isnan().all()


def test_classes_that_the_model_does_not_have_are_refused():
    for strange in (3, -1):
        targets = torch.tensor([0, 2, -100, strange])
        with pytest.raises(ValueError, match=f"classes from 0 to 2, .*, got {strange}"):
            quiet(nn.Linear(4, 3)).score(TensorDataset(torch.randn(4, 4), targets))


@pytest.mark.parametrize("cut", [slice(0, -1), slice(1, None)])
@pytest.mark.parametrize("loss", ["auto", "causal_lm"])
def test_labels_must_be_as_many_as_tokens(loss, cut):
    samples = token_samples(17)
    samples[5] = {"input_ids": samples[5]["input_ids"], "labels": samples[5]["labels"][cut]}
    with pytest.raises(ValueError, match="a label for each of its input_ids"):
        quiet(tiny_llama(), loss).score(samples)


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_masks_of_targets_stand_in_for_labels(name):
    samples = token_samples(12)
    masked = [{"input_ids": s["input_ids"], name: (s["labels"] != -100).long()} for s in samples]
    scores, expected = quiet(tiny_llama()).score(masked), quiet(tiny_llama()).score(samples)
    assert torch.equal(scores.counts, expected.counts)
    assert torch.equal(scores.losses, expected.losses)
    assert (expected.counts < torch.tensor([len(s["input_ids"]) - 1 for s in samples])).any()


@pytest.mark.parametrize("loss", ["auto", "binary_cross_entropy"])
def test_binary_targets_may_be_ignored_and_no_others_are_taken(loss):
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(4, 3), torch.randn(5, 4), torch.ones(5, 3)
    targets[1, 1] = -100
    targets[2] = -100
    scores = quiet(model, loss).score(TensorDataset(inputs, targets))
    expected = F.binary_cross_entropy_with_logits(model(inputs[1, None])[0, [0, 2]], torch.ones(2))
    assert scores.losses[1].item() == pytest.approx(expected.item(), rel=1e-6)
    assert scores.counts.tolist() == [3, 2, 0, 3, 3]
    assert scores.losses.isnan().tolist() == [False, False, True, False, False]
    targets[3, 0] = 7
    with pytest.raises(ValueError, match=r"targets between 0 and 1, or −100 .*, got 7"):
        quiet(model, "binary_cross_entropy").score(TensorDataset(inputs, targets))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(token_samples(3))


class FocalLoss(nn.Module):
    """A criterion of the user's own."""

    def forward(self, logits, y):
        losses = F.cross_entropy(logits, y, reduction="none")
        return (1 - (-losses).exp()).square() * losses


class OfAModel(FocalLoss):
    """The same of a model and a batch."""

    def forward(self, model, batch):
        return super().forward(model(batch[0]), batch[1])


def test_a_module_may_be_a_loss_of_a_model_and_a_batch():
    model, data = TinyResNet().eval(), images(8)
    losses = quiet(model, OfAModel()).score(data).losses
    expected = [FocalLoss()(model(x[None]), torch.tensor([y])) for x, y in data]
    torch.testing.assert_close(losses, torch.cat(expected).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "gpt2"}, TypeError, r"model must be a torch.nn.Module, got str"),
        ({"loss": "nll"}, ValueError, r"loss must be 'auto', one of 'causal_lm'"),
        ({"loss": nn.CrossEntropyLoss()}, ValueError, "CrossEntropyLoss takes predictions and"),
        ({"loss": FocalLoss()}, ValueError, "FocalLoss takes predictions and targets"),
        ({"loss": FocalLoss().forward}, ValueError, "forward takes predictions and targets"),
        ({"loss": lambda outputs, labels: 0}, ValueError, "takes predictions and targets"),
        ({"loss": lambda logits, targets: 0}, ValueError, "takes predictions and targets"),
        ({"loss": lambda logits, mask: 0}, ValueError, "takes predictions and targets"),
        ({"loss": nn.L1Loss(reduction="none")}, ValueError, "leave loss at 'auto', or pass a func"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be a positive integer or None, got 0"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be a positive integer"),
        ({"reference": "adapter"}, ValueError, "reference must be 'model' or 'base'"),
        ({"reference": "base"}, ValueError, "needs a PEFT model"),
        ({"compile": "yes"}, ValueError, "compile must be 'auto', True or False"),
        ({"dtype": "int4"}, ValueError, "dtype must be 'auto'"),
        ({"device": "foo"}, ValueError, "device='foo' can't be used here: .*foo"),
        ({"token_losses": "yes"}, TypeError, "token_losses must be True or False, got 'yes'"),
        pytest.param(
            {"device": "cuda"},
            ValueError,
            "device='cuda' can't be used here: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        LossScorer(**{"model": nn.Linear(2, 2), **arguments})


@pytest.mark.parametrize(
    "sample",
    [
        "a text",
        {"text": "a text"},
        {"prompt": "2 + 2?", "completion": "4", "label": 1},
        {"messages": [{"role": "user", "content": "2 + 2?"}]},
    ],
)
def test_text_is_to_be_tokenised_first(sample):
    with pytest.raises(ValueError, match=r"samples hold text .* takes tokens: tokenise the data"):
        quiet(tiny_llama()).score([sample] * 3)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ValueError, "dataset is empty"),
        (Stream(), {}, TypeError, "use FlowWeightedIterable"),
        (images(), {"lengths": [1, 2]}, ValueError, r"lengths must have shape \(20,\)"),
        (images(), {"lengths": [-1] * 20}, ValueError, "lengths must be non-negative"),
        (torch.randn(5, 3, 8, 8), {}, ValueError, "found no targets in the batch"),
        (images(), {"collate_fn": "stack"}, TypeError, "collate_fn must be callable or None"),
        ({"train": images()}, {}, TypeError, "got dict of 'train'; pass one of them"),
        (images(classes=9), {}, ValueError, "classes from 0 to 4, .*, got 7"),
        ([("a", "b")] * 3, {}, ValueError, "the targets are strings, such as 'b'"),
        (
            [(torch.randn(3, 8, 8), float(index)) for index in range(5)],
            {},
            ValueError,
            "if they are classes, give them as integers",
        ),
    ],
)
def test_bad_data_is_refused(data, options, error, message):
    with pytest.raises(error, match=message):
        quiet(TinyResNet()).score(data, **options)


def test_losses_that_can_not_be_matched_to_samples_are_refused():
    def mean(model, batch):
        return per_sample(model, batch).mean()

    with pytest.raises(ValueError, match=r"must return a tensor of shape \(B,\).*reduction='none'"):
        quiet(TinyResNet(), mean).score(images())
    with pytest.raises(ValueError, match="a batch of 1 samples gave 0 losses"):
        quiet(TinyResNet(), lambda m, b: per_sample(m, b)[1:]).score(images())
    uneven = [*token_samples(3), {"input_ids": torch.ones(5).long()}]
    with pytest.raises(ValueError, match="only some samples have a field 'labels'"):
        quiet(tiny_llama()).score(uneven)
    noted = [token_samples(3)[0] | {"source": "a book"}, *token_samples(3)[1:]]
    assert torch.equal(
        quiet(tiny_llama()).score(noted).losses, quiet(tiny_llama()).score(token_samples(3)).losses
    )
    with pytest.raises(ValueError, match="must be one-dimensional, got shape"):
        quiet(tiny_llama()).score([{"input_ids": torch.ones(1, 5).long()}])
    with pytest.raises(ValueError, match="needs logits of at least two classes"):
        quiet(nn.Linear(4, 1)).score(TensorDataset(torch.randn(5, 4), torch.ones(5).long()))


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ValueError, match=r"is not a flowdata store.*thesis.tex"):
        quiet(TinyResNet()).score(images(), store=tmp_path)
    with pytest.raises(ValueError, match=r"is a file; a store is a folder|File exists"):
        quiet(TinyResNet()).score(images(), store=tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert Path(tmp_path / "thesis.tex").read_text() == "words"


def test_a_data_set_without_stable_content_needs_an_id():
    class Objects(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return object()

    def collate(batch):
        return torch.ones(len(batch), 4), torch.zeros(len(batch)).long()

    with pytest.raises(TypeError, match="pass dataset_id="):
        quiet(nn.Linear(4, 3)).score(Objects(), collate_fn=collate)
    scores = quiet(nn.Linear(4, 3)).score(Objects(), collate_fn=collate, dataset_id="objects-1")
    assert len(scores) == 3
