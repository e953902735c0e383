"""Every score against the truth: one sample, collated alone, through the model's own forward."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import LossScorer
from flowdata.errors import DisagreementError
from flowdata.scoring.collate import pad_collate
from flowdata.scoring.kinds import LONGEST_CHECKED
from flowdata.scoring.language.inputs import last_tokens
from tests.models import TinyResNet, images, tiny_llama, token_samples

VOCABULARY, CLASSES = 199, 5


def scored(model, data, loss="auto", dtype="float32", **options):
    scorer = LossScorer(model, loss, dtype=dtype, progress=False)
    return scorer.score(data, dataset_id="truth", **options), scorer.explain()


def own_losses(model, samples, collate=pad_collate):
    """The loss that the model makes of each sample alone."""
    with torch.no_grad():
        return torch.stack([model(**collate([sample])).loss for sample in samples])


def labelled(samples, classes=CLASSES, seed=1):
    """The same samples with a class in the place of their labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": each["input_ids"], "labels": torch.randint(classes, (), generator=generator)}
        for each in samples
    ]


def tagged(samples, classes=CLASSES, seed=1):
    """The same samples with a class for each token."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": each["input_ids"],
            "labels": torch.randint(classes, each["input_ids"].shape, generator=generator),
        }
        for each in samples
    ]


# --- padding that leaks ----------------------------------------------------------------------


class Pooled(nn.Module):
    """Embeddings, their mean over all positions, a head: `forward` knows no mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, CLASSES)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).mean(1))


class LastState(nn.Module):
    """The last state of an LSTM, which reads padding as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lstm = nn.Embedding(VOCABULARY, 16), nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input_ids):
        return self.head(self.lstm(self.embed(input_ids))[0][:, -1])


@pytest.mark.parametrize("make", [Pooled, LastState])
@pytest.mark.parametrize("loss", ["auto", "cross_entropy"])
def test_padding_that_leaks_into_a_model_without_a_mask(make, loss, caplog):
    model, samples = make().eval(), labelled(token_samples(24))
    with torch.no_grad():
        expected = torch.stack(
            [F.cross_entropy(model(s["input_ids"][None]), s["labels"][None]) for s in samples]
        )
    scores, how = scored(model, samples, loss)
    torch.testing.assert_close(scores.losses, expected)
    assert "samples of one length at a time" in how
    assert "not by whole batches: a sample's loss differs by" in caplog.text


def test_three_short_samples_among_many_are_enough():
    """At most two samples in a hundred are short; exactly those are wrong beside long ones."""
    long = [{"input_ids": torch.randint(2, VOCABULARY, (40,))} for _ in range(197)]
    short = [{"input_ids": torch.randint(2, VOCABULARY, (9,))} for _ in range(3)]
    samples = labelled([*long[:60], *short, *long[60:]])
    model = Pooled().eval()
    with torch.no_grad():
        expected = torch.stack(
            [F.cross_entropy(model(s["input_ids"][None]), s["labels"][None]) for s in samples]
        )
    torch.testing.assert_close(scored(model, samples)[0].losses, expected)


def test_a_callable_whose_losses_depend_on_the_batch_is_given_samples_alone():
    model, data = TinyResNet().eval(), images(12)

    def centred(model, batch):
        logits = model(batch[0])
        return F.cross_entropy(logits - logits.mean(0), batch[1], reduction="none")

    scores, how = scored(model, data, centred)
    with torch.no_grad():
        expected = torch.cat([centred(model, (x[None], y[None])) for x, y in data])
    torch.testing.assert_close(scores.losses, expected)
    assert "one sample at a time" in how


# --- what labels mean ------------------------------------------------------------------------


class Tagger(nn.Module):
    """(B, T, C) logits, and no loss of its own."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, classes)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_a_tagger_of_the_users_own_is_not_shifted(wrap):
    model, samples = Tagger().eval(), tagged(token_samples(12))
    with torch.no_grad():
        expected = torch.stack(
            [F.cross_entropy(model(s["input_ids"][None])[0], s["labels"]) for s in samples]
        )
    scores, how = scored(wrap(model), samples)
    torch.testing.assert_close(scores.losses, expected)
    assert how.startswith("cross_entropy")


def test_labels_of_tokens_that_could_be_two_things_are_refused():
    model, samples = Tagger(VOCABULARY), tagged(token_samples(12), VOCABULARY)
    with pytest.raises(ValueError, match=r"loss='causal_lm' .*'cross_entropy' .*or a callable"):
        scored(model, samples)
    scored(model, samples, "cross_entropy")


def bert(**options):
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(
        vocab_size=VOCABULARY, intermediate_size=48, max_position_embeddings=64, **sizes, **options
    )


class Wrapper(nn.Module):
    """A module round another, which passes everything on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


@pytest.mark.parametrize("wrap", [nn.DataParallel, Wrapper, torch.compile])
def test_a_wrapped_masked_model_is_not_shifted(wrap):
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    model, samples = BertForMaskedLM(bert()).eval(), token_samples(12)
    scores, how = scored(wrap(model), samples)
    torch.testing.assert_close(scores.losses, own_losses(model, samples), rtol=1e-4, atol=1e-4)
    # Round a module that nobody knows it is a class for each token, which is the same.
    assert how.startswith("cross_entropy" if wrap is Wrapper else "masked_lm")


@pytest.fixture
def long_texts():
    """Texts of a prompt without targets and a longer reply."""
    texts = [torch.randint(2, 50, (length,)) for length in (2500, 2600)]
    labels = [ids.clone().index_fill(0, torch.arange(300), -100) for ids in texts]
    return [{"input_ids": ids, "labels": each} for ids, each in zip(texts, labels, strict=True)]


def llama_for_long_texts():
    return tiny_llama(max_position_embeddings=4096).eval()


@pytest.mark.parametrize(
    ("loss", "dtype"), [("auto", "float32"), ("causal_lm", "float32"), ("causal_lm", "bfloat16")]
)
def test_transformers_own_loss_of_long_texts_is_asked_of_their_ends(
    loss, dtype, long_texts, monkeypatch
):
    from transformers.loss import loss_utils

    lengths, loss_function = [], loss_utils.LOSS_MAPPING["ForCausalLM"]

    def noting(logits, labels, **options):
        lengths.append(labels.shape[1])
        return loss_function(logits, labels, **options)

    model = llama_for_long_texts()
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", noting)
    scores, how = scored(model, long_texts, loss, dtype)
    assert how.startswith("causal_lm")
    assert set(lengths) == {LONGEST_CHECKED}  # no more have all logits in float32
    error = 1e-4 if dtype == "float32" else 2e-2
    own = own_losses(model, long_texts)
    torch.testing.assert_close(scores.losses, own, rtol=error, atol=error)


def mean_over_prompts_too(logits, labels, **_):
    logits, targets = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, reduction="none").mean()


def with_replaced_loss(model):
    model.loss_function = mean_over_prompts_too
    return model


def with_replaced_forward(model):
    forward = model.forward

    def replaced(*args, labels=None, **fields):
        output = forward(*args, **fields)
        output.loss = None if labels is None else mean_over_prompts_too(output.logits, labels)
        return output

    model.forward = replaced
    return model


class WithOwnLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = self.inner(input_ids, attention_mask)
        output.loss = None if labels is None else mean_over_prompts_too(output.logits, labels)
        return output


@pytest.mark.parametrize("change", [with_replaced_loss, with_replaced_forward, WithOwnLoss])
def test_another_loss_of_long_texts_is_asked_of_whole_ones(change, long_texts):
    """Their ends would not tell: the prompts that this loss counts lie before them."""
    model = change(llama_for_long_texts())
    scores, how = scored(model, long_texts)
    assert how.startswith("own")
    torch.testing.assert_close(scores.losses, own_losses(model, long_texts))
    with pytest.raises(ValueError, match="the model's own loss is"):
        scored(model, long_texts, "causal_lm")


def test_a_callable_is_given_whole_texts(long_texts):
    lengths = []

    def loss(model, batch):
        lengths.append(batch["input_ids"].shape[1])
        return model(**batch).loss.expand(len(batch["labels"]))

    scored(llama_for_long_texts(), long_texts, loss)
    assert set(lengths) == {2500, 2600}


def test_too_few_positions_are_told_of_a_whole_text(long_texts):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    )
    with pytest.raises(ValueError, match="a sample has 2,500 tokens and the model 64 positions"):
        scored(model, long_texts)


def test_only_texts_with_targets_at_their_end_are_cut():
    ids = torch.arange(2, 12)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    end = last_tokens(batch, 4)
    assert {name: values.tolist() for name, values in end.items()} == {
        "input_ids": [[8, 9, 10, 11]],
        "attention_mask": [[1, 1, 1, 1]],
        "labels": [[8, 9, 10, 11]],
    }
    no_targets = torch.full_like(ids, -100).index_fill(1, torch.tensor([0, 6]), 5)  # 6 has no past
    whole = [
        batch | {"labels": no_targets},
        batch | {"pixel_values": torch.ones(1, 3, 4, 4)},
        batch | {"labels": torch.tensor([1])},
        {"input_ids": ids, "attention_mask": (ids < 8).long()},
        {"inputs": ids},
        [ids],
    ]
    assert all(last_tokens(each, 4) is each for each in whole)
    assert last_tokens(batch, 10) is batch


def test_a_loss_by_name_that_is_not_the_models_own_is_refused():
    from transformers import BertForMaskedLM, BertForTokenClassification

    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"loss='causal_lm' gives a sample .*own loss is .*'own'"
    ) as caught:
        scored(BertForMaskedLM(bert()), token_samples(8), "causal_lm")
    assert "'auto'" not in str(caught.value)  # which may have chosen it
    tagger = BertForTokenClassification(bert(num_labels=CLASSES))
    with pytest.raises(ValueError, match="its labels mean something else"):
        scored(tagger, tagged(token_samples(8)), "causal_lm")


class Weighted(nn.Module):
    """A classifier with class weights and smoothing in its own loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, CLASSES)
        self.weight = torch.linspace(0.5, 2.0, CLASSES)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        if labels is None:
            return {"logits": logits}
        each = F.cross_entropy(
            logits, labels, weight=self.weight, label_smoothing=0.1, reduction="none"
        )
        return {"loss": each.mean(), "logits": logits}


@pytest.mark.parametrize("loss", ["auto", "own"])
def test_a_loss_that_has_no_name_is_taken_as_it_is(loss, caplog):
    model = Weighted()
    rows = [{"x": torch.randn(4), "labels": torch.tensor(i % CLASSES)} for i in range(9)]
    scores, how = scored(model, rows, loss)
    with torch.no_grad():
        expected = torch.stack([model(r["x"][None], r["labels"][None])["loss"] for r in rows])
    torch.testing.assert_close(scores.losses, expected)
    assert how.startswith("own in float32 on cpu; the model's own loss, one sample at a time")
    assert ("is none that has a name" in caplog.text or "has no name here" in caplog.text) == (
        loss == "auto"
    )
    with pytest.raises(ValueError, match="the model's own loss is"):
        scored(model, rows, "cross_entropy")


def test_a_replaced_loss_function_is_the_models_own():
    def smoothed(logits, labels, vocab_size, **_):
        flat = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), flat, label_smoothing=0.2)

    model, samples = tiny_llama().eval(), token_samples(8)
    model.loss_function = smoothed
    with pytest.raises(ValueError, match="the model's own loss is"):
        scored(model, samples, "causal_lm")
    scores, _ = scored(model, samples)
    torch.testing.assert_close(scores.losses, own_losses(model, samples))


def test_named_terms_are_taken_off_first():
    from tests import zoo

    model, samples = zoo.decoder("olmoe"), token_samples(8)
    _, how = scored(model, samples)
    assert how.startswith("causal_lm")


def test_soft_labels_are_no_regression():
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES)
    inputs, soft = torch.randn(12, 4), torch.rand(12, CLASSES).softmax(1)
    scores, how = scored(model, TensorDataset(inputs, soft))
    expected = F.cross_entropy(model(inputs), soft, reduction="none").detach()
    torch.testing.assert_close(scores.losses, expected)
    assert how.startswith("cross_entropy")
    one_hot = F.one_hot(torch.arange(12) % CLASSES, CLASSES).float()
    with pytest.raises(ValueError, match="loss='cross_entropy' or 'binary_cross_entropy'"):
        scored(model, TensorDataset(inputs, one_hot))


class Frames(nn.Module):
    """(B, T, C) logits of (B, T, 3) frames."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, CLASSES)

    def forward(self, frames):
        return self.layer(frames)


@pytest.mark.parametrize("lengths", [[CLASSES] * 6, [4, CLASSES, 7, 3, 6, 9]])
def test_as_many_classes_as_frames(lengths):
    model = Frames()
    rows = [(torch.randn(n, 3), torch.randint(CLASSES, (n,))) for n in lengths]

    def collate(samples):
        pad = nn.utils.rnn.pad_sequence
        frames, labels = zip(*samples, strict=True)
        return pad(frames, batch_first=True), pad(labels, batch_first=True, padding_value=-100)

    if len(set(lengths)) == 1:
        with pytest.raises(ValueError, match="either axis could be the classes'"):
            scored(model, rows, collate_fn=collate)
        return
    scores, _ = scored(model, rows, collate_fn=collate)
    expected = torch.stack([F.cross_entropy(model(x), y) for x, y in rows]).detach()
    torch.testing.assert_close(scores.losses, expected)


class ClassesSecond(Tagger):
    """PyTorch's (B, C, T) logits."""

    def forward(self, input_ids):
        return super().forward(input_ids).movedim(-1, 1)


@pytest.mark.parametrize("loss", ["auto", "cross_entropy"])
@pytest.mark.parametrize(
    "lengths",
    [
        [2, CLASSES, 7, 3, CLASSES, 4] * 3,  # all are checked
        [4, *[CLASSES] * 40, 9, *[CLASSES] * 8],
        [*[CLASSES] * 41, 7, *[CLASSES] * 60],  # none of those that are checked tells
    ],
)
@pytest.mark.parametrize("make", [Tagger, ClassesSecond])
def test_shapes_tell_the_axis_of_classes_wherever_they_can(make, lengths, loss):
    model = make().eval()
    if loss == "auto":
        model.config = {"a": "model of the user's own"}
    samples = tagged([{"input_ids": torch.randint(VOCABULARY, (n,))} for n in lengths])
    logits = [model(s["input_ids"][None]) for s in samples]
    logits = logits if make is ClassesSecond else [each.movedim(-1, 1) for each in logits]
    expected = [F.cross_entropy(z, s["labels"][None]) for z, s in zip(logits, samples, strict=True)]
    scores, _ = scored(model, samples, loss)
    torch.testing.assert_close(scores.losses, torch.stack(expected).detach())


@pytest.mark.parametrize("make", [Tagger, ClassesSecond])
def test_an_axis_of_classes_that_nothing_tells_is_refused(make):
    from transformers import BertForTokenClassification

    samples = tagged([{"input_ids": torch.randint(VOCABULARY, (CLASSES,))} for _ in range(20)])
    with pytest.raises(ValueError, match="either axis could be the classes'"):
        scored(make(), samples, "cross_entropy")
    torch.manual_seed(0)
    known = BertForTokenClassification(bert(num_labels=CLASSES)).eval()
    scores, _ = scored(known, samples, "cross_entropy")
    torch.testing.assert_close(scores.losses, own_losses(known, samples), rtol=1e-4, atol=1e-4)


def test_a_model_that_returns_features_beside_its_logits_is_asked_which():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            features = self.body(x)
            return features, self.head(features)

    data = TensorDataset(torch.randn(6, 4), torch.arange(6) % CLASSES)
    with pytest.raises(ValueError, match=r"2 tensors, item 0 of shape \(1, 6\), item 1 of"):
        scored(Both(), data)


# --- low precision ---------------------------------------------------------------------------


def test_an_encoder_that_is_no_decoder_is_noticed_in_bfloat16():
    from transformers import RobertaConfig, RobertaForCausalLM

    from tests.zoo import wild

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = wild(
        RobertaForCausalLM(
            RobertaConfig(vocab_size=VOCABULARY, intermediate_size=48, pad_token_id=1, **sizes)
        )
    )
    samples = token_samples(24)
    exact, rounded = (
        own_losses(model, samples),
        own_losses(copy.deepcopy(model).bfloat16(), samples),
    )
    allowed = 2 * (rounded - exact).abs().max() + 1e-3
    scores, _ = scored(model, samples, dtype="bfloat16")
    assert (scores.losses - exact).abs().max() <= allowed


# --- what is checked -------------------------------------------------------------------------


def test_scores_say_how_many_samples_were_checked(tmp_path):
    model, samples = tiny_llama(), token_samples(2000, longest=10)
    scores, how = scored(model, samples, store=tmp_path / "scores")
    checked = scores.metadata["checked"]
    before = int(re.search(r"(\d+) samples checked alone, off by", how)[1])
    # Two in a thousand, and four of the largest pack.
    assert before + 3 + 2 <= checked["samples"] <= before + 6 + 2
    assert checked["largest_difference"] < 1e-4
    again, _ = scored(model, samples, store=tmp_path / "scores")
    assert again.metadata["checked"] == checked


class Trap(nn.Module):
    """Right for every batch but those that hold a sample of its own kind beside others."""

    def __init__(self, token):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, CLASSES)
        self.token = token

    def forward(self, input_ids):
        logits = self.head(self.embed(input_ids).mean(1))
        is_trap = (input_ids == self.token).any(1)
        return logits + is_trap[:, None] * is_trap.new_tensor(len(input_ids) > 1) * logits.roll(
            1, 1
        )


def test_a_fault_found_during_the_run_stops_it_and_the_same_call_goes_on(tmp_path, caplog):
    from flowdata.scoring.batches import is_drawn

    generator = torch.Generator().manual_seed(3)
    samples = [
        {
            "input_ids": torch.randint(2, 150, (8,), generator=generator),
            "labels": torch.randint(CLASSES, (), generator=generator),
        }
        for _ in range(1500)
    ]
    late = next(index for index in range(1400, 200, -1) if is_drawn(index))
    samples[late]["input_ids"][3] = 180
    model = Trap(180).eval()
    with torch.no_grad():
        expected = torch.stack(
            [F.cross_entropy(model(s["input_ids"][None]), s["labels"][None]) for s in samples]
        )
    store = tmp_path / "scores"
    with pytest.raises(DisagreementError, match=rf"sample {late}, scored alone, .*differs by"):
        scored(model, samples, "cross_entropy", store=store)
    scores, how = scored(model, samples, "cross_entropy", store=store)
    torch.testing.assert_close(scores.losses, expected)
    assert "one sample at a time" in how
    assert "scored again" in caplog.text
