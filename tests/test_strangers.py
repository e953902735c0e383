"""Inputs and models with habits of their own: each sample as the model itself would lose on it."""

from contextlib import suppress

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import LossScorer
from flowdata.errors import DisagreementError
from tests import reference
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama, token_samples

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def score(model, data, loss="auto", collate_fn=None, **options):
    scorer = LossScorer(model.eval(), loss, dtype="float32", progress=False, **options)
    return scorer.score(data, collate_fn=collate_fn)


def ids(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("token", [0, 2])
def test_a_decoder_that_classifies_reads_its_last_real_token(token):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=token, num_labels=3))
    nn.init.normal_(model.score.weight, std=2)
    samples = [
        {"input_ids": tokens, "labels": number % 3}
        for number, tokens in enumerate(ids(5, 9, 3, 7, 1))
    ]
    expected = [
        model.eval()(
            input_ids=sample["input_ids"][None], labels=torch.tensor([sample["labels"]])
        ).loss
        for sample in samples
    ]
    torch.testing.assert_close(score(model, samples).losses, torch.stack(expected).detach())


@pytest.mark.parametrize("classes", [5, 7])
def test_classes_of_tokens_come_last_even_where_lengths_agree_with_them(classes):
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**SMALL, num_labels=classes)).eval()
    nn.init.normal_(model.classifier.weight, std=2)
    samples = [
        {"input_ids": tokens, "labels": torch.arange(len(tokens)) % classes}
        for tokens in ids(5, 5, 4, 5)
    ]
    expected = [model(**{k: v[None] for k, v in sample.items()}).loss for sample in samples]
    torch.testing.assert_close(score(model, samples).losses, torch.stack(expected).detach())
    # A model of the user's own may return (B, C, T): another length has to tell.
    own = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6))
    tokens = torch.randint(0, 6, (4, 6))
    with pytest.raises(ValueError, match="either axis could be the classes'"):
        score(own, TensorDataset(tokens, tokens), "cross_entropy")
    expected = F.cross_entropy(own(tokens[:, :5]).mT, tokens[:, :5], reduction="none").mean(1)
    fives = TensorDataset(tokens[:, :5], tokens[:, :5])
    torch.testing.assert_close(score(own, fives, "cross_entropy").losses, expected.detach())


def left(samples):
    width = max(len(tokens) for tokens in samples)
    padded = [torch.cat([torch.zeros(width - len(t), dtype=torch.long), t]) for t in samples]
    mask = [torch.arange(width) >= width - len(t) for t in samples]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(mask).long()}


@pytest.mark.parametrize("labelled", [False, True])
def test_padding_on_the_left_predicts_nothing(labelled):
    def collate(samples):
        batch = left(samples)
        if labelled:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    model, samples = tiny_llama(), ids(3, 5, 9)
    expected = [
        reference.causal_lm_sample_loss(model.eval(), {"input_ids": t, "labels": t})[0]
        for t in samples
    ]
    for size in (1, 3):
        found = score(model, samples, collate_fn=collate, batch_size=size)
        assert found.counts.tolist() == [2, 4, 8]
        torch.testing.assert_close(found.losses, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_positions_of_packed_sequences_are_read_as_the_model_reads_them(masked):
    (tokens,) = ids(9)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    sample = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
    sample |= {"attention_mask": torch.ones(9, dtype=torch.long)} if masked else {}
    model = tiny_llama(initializer_range=0.5).eval()
    expected = model(**{name: value[None] for name, value in sample.items()}, use_cache=False).loss
    (short,) = ids(4)
    other = {"input_ids": short, "labels": short, "position_ids": torch.arange(4)}
    other |= {"attention_mask": torch.ones(4, dtype=torch.long)} if masked else {}
    found = score(model, [sample, other]).losses[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "labels", "loss"),
    [
        ({"num_labels": 1}, [0.0, 1.0, 1.0], "mse"),
        ({"num_labels": 1}, [3, 5, 4], "mse"),
        ({"num_labels": 3}, [0, 2, 1], "cross_entropy"),
        ({"num_labels": 3}, [[0.2, 0.9, 0.5]] * 3, "binary_cross_entropy"),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [[0.0, 1.0, 1.0]] * 3,
            "binary_cross_entropy",
        ),
        ({"num_labels": 3, "problem_type": "regression"}, [[0.0, 1.0, 1.0]] * 3, "mse"),
    ],
)
def test_a_classifier_loses_as_its_own_problem_says(options, labels, loss):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, **options)).eval()
    tokens = [t.tolist() for t in ids(5, 3, 4)]
    rows = datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels})
    scorer = LossScorer(model, dtype="float32", progress=False)
    found = scorer.score(rows).losses
    assert scorer.explain().startswith(loss)
    for row, value in zip(rows, found, strict=True):
        target = torch.tensor([row["labels"]])
        target = target.float() if loss == "mse" else target
        own = model(input_ids=torch.tensor([row["input_ids"]]), labels=target).loss
        assert value.item() == pytest.approx(own.item(), rel=1e-4)
    for data in (rows.with_format("torch"), [dict(row) for row in rows.with_format("torch")]):
        torch.testing.assert_close(scorer.score(data).losses, found)


def test_several_yes_or_no_targets():
    data = TensorDataset(torch.randn(4, 2), torch.eye(4, 3).bool())
    model = nn.Linear(2, 3)
    expected = F.binary_cross_entropy_with_logits(
        model(data.tensors[0]), data.tensors[1].float(), reduction="none"
    ).mean(1)
    torch.testing.assert_close(score(model, data).losses, expected.detach())
    with pytest.raises(ValueError, match="for a yes or no of each class pass"):
        score(model, TensorDataset(data.tensors[0], data.tensors[1].long()))


class NeedsMask(nn.Module):
    """A language model of one's own that does not run without a mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, attention_mask):
        return self.head((self.embed(input_ids) * attention_mask[..., None]).cumsum(1))


def test_a_mask_that_a_model_asks_for_is_given():
    model, samples = NeedsMask(), token_samples(5)
    for sample, loss in zip(samples, score(model, samples, "causal_lm").losses, strict=True):
        tokens = sample["input_ids"][None]
        logits = model(tokens, torch.ones_like(tokens))
        expected = F.cross_entropy(logits[0, :-1], sample["labels"][1:])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_language_model_in_float64():
    model, samples = tiny_llama().double(), token_samples(5)
    found = LossScorer(model, progress=False).score(samples).losses
    torch.testing.assert_close(found, score(tiny_llama(), samples).losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hole", [1, 2, -2])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_what_a_mask_hides_inside_a_sample_keeps_its_position(make, hole):
    model, samples = make().eval(), []
    for tokens in ids(5, 9, 4, 7):
        mask = torch.ones_like(tokens)
        mask[hole] = 0
        samples.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens})
    expected = [
        model(**{name: value[None] for name, value in sample.items()}, use_cache=False).loss
        for sample in samples
    ]
    found = score(model, samples).losses
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)


def test_samples_that_can_not_be_made_a_batch_say_why():
    tokens = ids(3, 5)
    masks = [torch.ones(len(t), len(t)).tril() for t in tokens]
    squares = [
        {"input_ids": t, "labels": t, "attention_mask": m}
        for t, m in zip(tokens, masks, strict=True)
    ]
    with pytest.raises(ValueError, match=r"'attention_mask' can be padded along its first axis"):
        score(tiny_llama(), squares)
    with pytest.raises(ValueError, match="input_ids must be integers"):
        score(tiny_llama(), [{"input_ids": t.float()} for t in tokens])
    images = [(torch.ones(3, size, 4), 0) for size in (4, 5)]
    with pytest.raises(ValueError, match=r"samples can't be stacked .* pass a collate_fn"):
        score(nn.Flatten(), images, "cross_entropy")


def test_soft_labels_of_a_classifier_whose_own_loss_takes_classes_alone():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()
    model.config.problem_type = "single_label_classification"
    soft = torch.tensor([0.2, 0.3, 0.5])
    samples = [{"input_ids": tokens, "labels": soft} for tokens in ids(5, 3)]
    expected = [
        F.cross_entropy(model(sample["input_ids"][None]).logits[0], soft) for sample in samples
    ]
    torch.testing.assert_close(score(model, samples).losses, torch.stack(expected).detach())


def test_labels_that_were_shifted_already_are_refused():
    samples = [s | {"shift_labels": s["labels"].roll(-1)} for s in token_samples(6)]
    with pytest.raises(ValueError, match=r"a batch has 'shift_labels'.*give 'labels' alone"):
        LossScorer(tiny_llama(), progress=False).score(samples)


def rows_of_one_length(side, *, every=50, count=400, width=24):
    """Rows as `padding="max_length"` makes them, most of them full."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        length = 9 if index % every == 7 else width
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        padding = [0] * (width - length)
        rows.append(
            {
                "input_ids": tokens + padding if side == "right" else padding + tokens,
                "attention_mask": (
                    [1] * length + padding if side == "right" else padding + [1] * length
                ),
            }
        )
    return rows


def losses_as_trained(model, rows, **options):
    """Each row's loss by the model's own forward, given all its fields."""
    with torch.no_grad():
        losses = [
            model(**{name: torch.tensor([value]) for name, value in row.items()}, **options).loss
            for row in rows
        ]
    return torch.stack(losses)


@pytest.mark.parametrize("make", [lambda: tiny_llama(initializer_range=0.5), tiny_gpt2])
@pytest.mark.parametrize("max_tokens", [None, 60])
def test_padding_with_labels_is_read_as_the_model_reads_it(make, max_tokens):
    model = make().eval()
    rows = [row | {"labels": list(row["input_ids"])} for row in rows_of_one_length("right")]
    found = score(model, rows, max_tokens=max_tokens).losses
    expected = losses_as_trained(model, rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_with_labels_is_kept_in_slices():
    from flowdata.scoring.language.inputs import rows_of

    batch = {
        "input_ids": torch.ones(2, 5),
        "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[1, 1, 1, 1, -100], [1, 1, 1, 1, 1]]),
    }
    assert rows_of(batch, 0, 1)["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("make", [lambda: tiny_llama(initializer_range=0.5), tiny_gpt2])
@pytest.mark.parametrize("labels_everywhere", [False, True])
def test_what_padding_on_the_left_predicts_counts_as_in_training(make, labels_everywhere):
    model = make().eval()
    rows = rows_of_one_length("left")
    for row in rows:
        pairs = zip(row["input_ids"], row["attention_mask"], strict=True)
        row["labels"] = [t if is_real or labels_everywhere else -100 for t, is_real in pairs]
    expected = losses_as_trained(model, rows)
    scorer = LossScorer(model, dtype="float32", progress=False)
    with suppress(DisagreementError):  # where the check before the run saw full rows alone
        scorer.score(rows)
    found = scorer.score(rows).losses
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "through a tiled head, masks as they are" in scorer.explain()


def test_a_rare_row_with_padding_on_the_left_is_noticed():
    model = tiny_llama(initializer_range=0.5).eval()
    rows = rows_of_one_length("left", every=1000)
    for row in rows:
        pairs = zip(row["input_ids"], row["attention_mask"], strict=True)
        row["labels"] = [t if is_real else -100 for t, is_real in pairs]
    scorer = LossScorer(model, dtype="float32", progress=False)
    with pytest.raises(DisagreementError, match="it counts 8 targets, not 9"):
        scorer.score(rows)
    found = scorer.score(rows).losses  # the sample is a suspect now
    torch.testing.assert_close(found, losses_as_trained(model, rows), rtol=1e-4, atol=1e-5)


def test_rows_without_labels_that_are_padded_on_the_left():
    model = tiny_llama(initializer_range=0.5).eval()
    rows = rows_of_one_length("left", every=10, count=60)
    for loss in ("auto", "causal_lm", "own"):
        found = score(model, rows, loss).losses
        for row, value in zip(rows, found, strict=True):
            real = row["input_ids"][row["attention_mask"].index(1) :]
            tokens = torch.tensor([real])
            expected = model(input_ids=tokens, labels=tokens).loss.item()
            assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_positions_that_a_model_takes_from_its_mask_are_left_to_it(max_tokens):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    config = OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, init_std=0.5)
    model, rows = OPTForCausalLM(config).eval(), []
    for index, tokens in enumerate(ids(*torch.arange(8, 24).repeat(10).tolist())):
        row = {"input_ids": tokens.tolist(), "attention_mask": [1] * len(tokens)}
        row["labels"] = list(row["input_ids"])
        if index % 30 == 11:
            row["attention_mask"][2:4], row["labels"][2:4] = [0, 0], [-100, -100]
        rows.append(row)
    found = score(model, rows, max_tokens=max_tokens).losses
    expected = losses_as_trained(model, rows, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def packed_rows(count=60):
    rows = []
    for index, tokens in enumerate(ids(*torch.arange(8, 24).repeat(4)[:count].tolist())):
        half = len(tokens) // 2 if index % 20 == 7 else 0
        positions = [*range(half), *range(len(tokens) - half)]
        tokens = tokens.tolist()
        rows.append({"input_ids": tokens, "labels": tokens, "position_ids": positions})
    return rows


def test_packed_documents_are_apart_whatever_the_loss():
    model, rows = tiny_llama(initializer_range=0.5).eval(), packed_rows()
    expected = losses_as_trained(model, rows, use_cache=False)
    together = losses_as_trained(
        model, [row | {"attention_mask": [1] * len(row["labels"])} for row in rows]
    )
    assert (expected - together).abs()[7] > 1e-3

    def by_hand(model, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.mT, targets, reduction="none")
        return losses.sum(1) / (targets != -100).sum(1)

    for loss in ("auto", "causal_lm", "own", by_hand):
        found = score(model, rows, loss).losses
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_packed_documents_are_apart_as_a_trainer_trains_on_them(tmp_path):
    from transformers import Trainer, TrainingArguments, default_data_collator

    model, rows = tiny_llama(initializer_range=0.5).eval(), packed_rows()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, data_collator=default_data_collator)
    found = score(model, rows).losses
    with torch.no_grad():
        for index in (7, 27, 8):
            loss = trainer.compute_loss(model, default_data_collator([rows[index]]))
            assert found[index].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("backwards", [False, True])
def test_samples_without_a_target_do_not_say_what_labels_mean(backwards):
    rows = [{"input_ids": list(range(5, 14 + n))} for n in range(40)]
    for index, row in enumerate(rows):
        count = len(row["input_ids"])
        row["labels"] = [-100] * count if index % 5 else [-100] * 4 + row["input_ids"][4:]
    rows[0]["labels"] = [-100] * 9  # as are those in the places that are looked at first
    for index in [place * 39 // 7 for place in range(8)]:
        rows[index]["labels"] = [-100] * len(rows[index]["input_ids"])
    scorer = LossScorer(tiny_llama().eval(), dtype="float32", progress=False)
    scorer.score(rows[::-1] if backwards else rows)
    assert scorer.explain().startswith("causal_lm")
