"""Forwards of the user's own: what they return, and how they take their labels."""

import logging
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from transformers.utils import ModelOutput

from flowdata import LossScorer
from flowdata.errors import DisagreementError
from flowdata.scoring.collate import pad_collate
from flowdata.targets.predictions import logits_of

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(12) % 3
NUMBERS = torch.randn(12, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 20, (12, 7), generator=torch.Generator().manual_seed(2))


def scored(model, data, loss="auto"):
    scorer = LossScorer(model.eval(), loss, dtype="float32", progress=False)
    return scorer.score(data).losses, scorer.explain()


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


class Regressor(nn.Module):
    """Returns its prediction first, as many numbers as samples; it takes no labels."""

    def __init__(self, give):
        super().__init__()
        self.body, self.head, self.give = nn.Linear(4, 8), nn.Linear(8, 1), give

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.give(self.head(hidden), hidden)


@pytest.mark.parametrize(
    "give",
    [
        lambda prediction, hidden: (prediction,),
        lambda prediction, hidden: [prediction.squeeze(1)],
        lambda prediction, hidden: (prediction, hidden.sum()),
        lambda prediction, hidden: {"price": prediction, "last_hidden_state": hidden},
    ],
)
@pytest.mark.parametrize("layout", ["pairs", "fields"])
def test_a_prediction_of_one_number_is_no_loss(give, layout):
    model = seeded(lambda: Regressor(give))
    data = TensorDataset(X, NUMBERS)
    if layout == "fields":
        data = [{"x": x, "labels": y} for x, y in data]
    losses, how = scored(model, data)
    output = model(X)
    prediction = output["price"] if isinstance(output, dict) else output[0]
    expected = (prediction.flatten() - NUMBERS).square()
    torch.testing.assert_close(losses, expected.detach())
    assert how.startswith("mse")


@dataclass
class Judgement:
    classes: torch.Tensor
    evidence: torch.Tensor | None = None


def test_the_one_tensor_that_logits_can_be_is_taken_under_any_name():
    logits, many = torch.zeros(2, 3), torch.zeros(2, 8)
    found = [
        {"out": logits, "place": torch.arange(2), "aux_loss": torch.zeros(2), "cache": (many,)},
        OrderedDict(logits=logits, out=many),
        ModelOutput(out=logits, hidden_states=many),
        Judgement(logits),
        namedtuple("Judged", ["classes", "sure"])(logits, True),
    ]
    assert all(logits_of(output) is logits for output in found)
    with pytest.raises(ValueError, match=r"2 tensors, classes of shape \(2, 3\), evidence of"):
        logits_of(Judgement(logits, many))
    with pytest.raises(ValueError, match="dict of last_hidden_state, in which no logits"):
        logits_of({"last_hidden_state": many})


def test_a_prediction_beside_features_is_asked_for():
    model = seeded(lambda: Regressor(lambda prediction, hidden: (prediction, hidden)))
    with pytest.raises(ValueError, match="does not say which are its logits"):
        scored(model, TensorDataset(X, NUMBERS))
    with pytest.raises(ValueError, match="it made none of"):
        scored(model, TensorDataset(X, NUMBERS), "own")


class Smoothed(nn.Module):
    """A classifier that smooths its own loss; labels under a name of their own."""

    def __init__(self, make):
        super().__init__()
        self.head = nn.Linear(4, 3)
        make(self)

    def loss(self, logits, labels):
        return None if labels is None else F.cross_entropy(logits, labels, label_smoothing=0.4)


def takes_labels(self):
    def forward(x, labels=None):
        logits = self.head(x)
        return {"logits": logits, "loss": self.loss(logits, labels)}

    self.forward = forward


def takes_target(self):
    def forward(x, target=None):
        logits = self.head(x)
        return logits if target is None else (logits, self.loss(logits, target))

    self.forward = forward


def returns_a_loss_alone(self):
    def forward(x, targets=None):
        logits = self.head(x)
        return logits if targets is None else self.loss(logits, targets)

    self.forward = forward


def needs_labels(self):
    def forward(x, labels):
        logits = self.head(x)
        return self.loss(logits, labels), logits

    self.forward = forward


@pytest.mark.parametrize("make", [takes_labels, takes_target, returns_a_loss_alone, needs_labels])
@pytest.mark.parametrize("field", ["labels", "label", "targets", None])
def test_labels_reach_a_models_own_loss_whatever_their_name(make, field):
    model = seeded(lambda: Smoothed(make))
    data = TensorDataset(X, CLASSES)
    if field is not None:
        data = [{"x": x, field: y} for x, y in data]
    expected = F.cross_entropy(model.head(X), CLASSES, reduction="none", label_smoothing=0.4)
    losses, how = scored(model, data)
    torch.testing.assert_close(losses, expected.detach())
    assert how.startswith("own")
    with pytest.raises((ValueError, TypeError), match="loss='own'"):
        scored(model, data, "cross_entropy")


class LastLogits(nn.Module):
    """A language model that without targets gives the logits of the last position alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, idx, targets=None):
        hidden = self.embed(idx).cumsum(1)
        if targets is None:
            return self.head(hidden[:, [-1]]), None
        logits = self.head(hidden)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("names", [("idx", "targets"), ("input_ids", "labels"), None])
def test_a_model_with_other_logits_without_targets_is_scored_with_them(names, caplog):
    model, targets = seeded(LastLogits), TOKENS.flip(0)
    data = TensorDataset(TOKENS, targets)
    if names is not None:
        data = [dict(zip(names, pair, strict=True)) for pair in data]
    expected = [model(x[None], y[None])[1] for x, y in zip(TOKENS, targets, strict=True)]
    with caplog.at_level(logging.WARNING, "flowdata"):
        losses, _ = scored(model, data)
    torch.testing.assert_close(losses, torch.stack(expected).detach())
    assert "needs the labels in its forward" in caplog.text


class Margin(nn.Module):
    """A classifier by angles that takes a margin off the logit of the label, as ArcFace does."""

    def __init__(self):
        super().__init__()
        self.body, self.prototypes = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8))

    def forward(self, x, labels=None):
        cosines = F.linear(F.normalize(self.body(x)), F.normalize(self.prototypes))
        if labels is None:
            return {"logits": 8 * cosines}
        logits = 8 * (cosines - 0.3 * F.one_hot(labels, 3))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


@pytest.mark.parametrize("config", [None, SimpleNamespace(vocab_size=20)])
def test_a_model_that_changes_its_logits_by_its_labels_is_scored_with_them(config, caplog):
    pairs, tokens = TensorDataset(X, CLASSES), TensorDataset(TOKENS, TOKENS.flip(0))
    for make, data in ((Margin, pairs), (LastLogits, tokens)):
        model = seeded(make)
        if config is not None:
            model.config = config
        own = [model(x[None], y[None]) for x, y in data]
        expected = torch.stack([each[1] if make is LastLogits else each["loss"] for each in own])
        losses, how = scored(model, data)
        torch.testing.assert_close(losses, expected.detach())
        assert how.startswith("own")


@pytest.mark.parametrize("config", [SimpleNamespace(hidden=16), {"hidden": 16}])
@pytest.mark.parametrize("ending", ["ForSequenceClassification", "ForConditionalGeneration"])
def test_a_class_named_like_one_of_hugging_face_has_a_configuration_of_its_own(ending, config):
    model = type(f"Net{ending}", (nn.Linear,), {})(4, 3)
    model.config = config
    losses, how = scored(model, TensorDataset(X, CLASSES))
    expected = F.cross_entropy(model(X), CLASSES, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    assert how.startswith("cross_entropy")


class Counting(nn.Module):
    """Counts its calls, and replaces a buffer at each, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.head(x)


def test_what_forwards_write_into_buffers_is_put_back():
    model = seeded(Counting)
    mean = model.mean
    scored(model, TensorDataset(X, CLASSES))
    assert model.calls == 0
    assert model.mean is mean
    assert not model.mean.any()


def test_models_compiled_by_torch_jit():
    model = seeded(lambda: nn.Linear(4, 3))
    expected = F.cross_entropy(model(X), CLASSES, reduction="none").detach()
    data = TensorDataset(X, CLASSES)
    fields = [{"input": x, "labels": y} for x, y in data]
    for compiled in (torch.jit.script(model), torch.jit.trace(model, X[:1])):
        torch.testing.assert_close(scored(compiled, data)[0], expected)
    torch.testing.assert_close(scored(torch.jit.script(model), fields)[0], expected)


def test_targets_are_looked_at_all_over_a_data_set():
    # A table sorted by its target begins with what could be a yes or no.
    targets = torch.cat([torch.zeros(70), torch.linspace(0, 1, 130)])
    data = TensorDataset(torch.randn(200, 4), targets)
    model = seeded(lambda: nn.Linear(4, 1))
    losses, how = scored(model, data)
    expected = (model(data.tensors[0]).flatten() - targets).square().detach()
    torch.testing.assert_close(losses, expected)
    assert how.startswith("mse")


def test_a_scorer_decides_anew_for_another_data_set():
    scorer = LossScorer(nn.Linear(4, 3), dtype="float32", progress=False)
    for targets, name in [
        (torch.randn(12, 3).softmax(1), "cross_entropy"),
        (torch.randn(12, 3), "mse"),
        (CLASSES, "cross_entropy"),
    ]:
        scorer.score(TensorDataset(X, targets))
        assert scorer.explain().startswith(name)


class Crowded(nn.Module):
    """Mixes samples only where more than 16 share a batch, as experts that overflow do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x - x.mean(0) * (len(x) > 16))


def test_samples_that_only_a_full_batch_mixes_are_noticed_and_then_scored_alone(tmp_path):
    model = seeded(Crowded)
    x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(4)), torch.arange(60) % 3
    data = TensorDataset(x, y)
    expected = F.cross_entropy(model.head(x), y, reduction="none").detach()
    scorer = LossScorer(model, dtype="float32", progress=False)
    for store in (None, tmp_path / "scores"):
        scorer = LossScorer(model, dtype="float32", progress=False)
        with pytest.raises(DisagreementError, match="scored alone, does not have the loss"):
            scorer.score(data, store=store)
        torch.testing.assert_close(scorer.score(data, store=store).losses, expected)
    assert LossScorer(model, batch_size=16, progress=False).score(data).summary()


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="tensors without values, on the device 'meta'"):
        LossScorer(model)


# --- samples of one shape --------------------------------------------------------------------


class Mixing(nn.Module):
    """Pools over padding, and takes off what the samples of a batch have in common."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids):
        pooled = self.embed(input_ids).mean(1)
        return self.head(pooled - 0.5 * pooled.mean(0))


@pytest.mark.parametrize("count", [6, 40])
@pytest.mark.parametrize("fault", ["model", "collate_fn"])
def test_samples_of_one_length_are_checked_beside_each_other(fault, count):
    # Lengths in pairs: the samples that are checked before a run hardly hold both of a pair.
    data = [
        {"input_ids": TOKENS[i % 12, : 2 + i // 2 % 6], "labels": torch.tensor(i % 3)}
        for i in range(count)
    ]
    if fault == "model":
        model, collate = seeded(Mixing), None
    else:
        model, collate = seeded(lambda: nn.EmbeddingBag(20, 3)), reversed_batch
    alone = [s["input_ids"][None] for s in data]
    expected = [
        F.cross_entropy(model(ids), s["labels"][None]) for s, ids in zip(data, alone, strict=True)
    ]
    scorer = LossScorer(model, "cross_entropy", dtype="float32", progress=False)
    scores = scorer.score(data, collate_fn=collate)
    torch.testing.assert_close(scores.losses, torch.stack(expected).detach())
    assert "one sample at a time" in scorer.explain()


def reversed_batch(samples):
    """A collate function that gives samples back in another order."""
    batch = pad_collate(samples[::-1])
    return batch["input_ids"], batch["labels"]


# --- outputs that are no logits --------------------------------------------------------------


class Headed(nn.Module):
    def __init__(self, classes, give):
        super().__init__()
        self.head, self.give = nn.Linear(4, classes), give

    def forward(self, x):
        return self.give(self.head(x))


def test_probabilities_are_not_taken_for_logits():
    data = TensorDataset(X, CLASSES)
    model = seeded(lambda: Headed(3, lambda logits: logits.softmax(-1)))
    with pytest.raises(ValueError, match=r"returns probabilities .*a softmax .*loss=callable"):
        scored(model, data)
    maps = seeded(lambda: Headed(3, lambda logits: logits.softmax(-1)[..., None].expand(-1, 3, 2)))
    with pytest.raises(ValueError, match=r"returns probabilities .*a softmax .*loss=callable"):
        scored(maps, TensorDataset(X, CLASSES[:, None].expand(-1, 2)))

    def loss(model, batch):
        return F.nll_loss(model(batch[0]).log(), batch[1], reduction="none")

    expected = F.cross_entropy(model.head(X), CLASSES, reduction="none").detach()
    torch.testing.assert_close(scored(model, data, loss)[0], expected)
    yes = seeded(lambda: Headed(1, lambda logits: logits.sigmoid()[:, 0]))
    with pytest.raises(ValueError, match=r"returns probabilities .*a sigmoid .*loss=callable"):
        scored(yes, TensorDataset(X, (CLASSES % 2).float()))
    # The logarithms of probabilities are logits; and whoever names the loss has said what it is of.
    logs = seeded(lambda: Headed(3, lambda logits: logits.log_softmax(-1)))
    torch.testing.assert_close(scored(logs, data)[0], expected)
    assert scored(model, data, "cross_entropy")[1].startswith("cross_entropy")


@pytest.mark.parametrize(
    ("classes", "targets"),
    [(1, NUMBERS), (1, CLASSES % 2), (1, (CLASSES % 2).float()), (3, CLASSES)],
)
def test_a_model_that_squeezes_the_batch_away_is_told_of_it(classes, targets):
    model = seeded(lambda: Headed(classes, torch.squeeze))
    with pytest.raises(ValueError, match=r"one sample alone has no batch axis.*squeeze\(-1\)"):
        scored(model, TensorDataset(X, targets))


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss, nn.CrossEntropyLoss()])
def test_a_loss_of_predictions_and_targets_is_refused(loss):
    with pytest.raises(ValueError, match=r"takes predictions and targets; leave loss at 'auto'"):
        scored(nn.Linear(4, 3), TensorDataset(X, CLASSES), loss)


def several_numbers(order):
    """A `forward` that returns numbers without names beside its loss, in an order."""

    def make(self):
        def forward(x, labels=None):
            logits = self.head(x)
            if labels is None:
                return logits
            numbers = {
                "logits": logits,
                "accuracy": (logits.argmax(1) == labels).float().mean(),
                "penalty": logits.logsumexp(1).square().mean(),
                "loss": self.loss(logits, labels),
            }
            return tuple(numbers[name] for name in order)

        self.forward = forward

    return make


class Plain(Smoothed):
    """The same with a loss that has a name."""

    def loss(self, logits, labels):
        return None if labels is None else F.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    "order", [("logits", "accuracy", "loss"), ("logits", "penalty", "loss"), ("accuracy", "loss")]
)
def test_several_numbers_without_names_are_no_loss(order):
    data = TensorDataset(X, CLASSES)
    refusal = r"returns 2 numbers without names .* return a dict with `loss`"
    for kind, loss in ((Plain, "own"), (Smoothed, "own"), (Smoothed, "auto")):
        model = seeded(lambda kind=kind: kind(several_numbers(order)))
        with pytest.raises(ValueError, match=refusal):
            scored(model, data, loss)
    with pytest.raises(ValueError, match=r"the model's own loss is \S+ or \S+: its labels"):
        scored(model, data, "cross_entropy")


@pytest.mark.parametrize("loss", ["auto", "cross_entropy"])
@pytest.mark.parametrize("other", ["accuracy", "penalty"])
def test_the_one_of_several_numbers_that_is_a_loss_by_name_is_the_loss(other, loss):
    model = seeded(lambda: Plain(several_numbers(("logits", other, "loss"))))
    losses, how = scored(model, TensorDataset(X, CLASSES), loss)
    expected = F.cross_entropy(model.head(X), CLASSES, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    assert how.startswith("cross_entropy")


def answers(name):
    """Floating targets of 40 samples and 5 classes that could be numbers."""
    generator = torch.Generator().manual_seed(3)
    yes = torch.randint(0, 2, (40, 5), generator=generator).float()
    is_unknown = torch.rand(40, 5, generator=generator) < 0.3
    return {
        "with NaN": yes.masked_fill(is_unknown, torch.nan),
        "with -100": yes.masked_fill(is_unknown, -100),
        "smoothed": yes * 0.9 + 0.05,
        "shares": torch.rand(40, 5, generator=generator),
        "smoothed, with NaN": (yes * 0.9 + 0.05).masked_fill(is_unknown, torch.nan),
        "unsure": torch.randint(-1, 2, (40, 5), generator=generator).float(),
        "signs": 2 * yes - 1,
    }[name]


def mean_of_known(each, targets):
    return torch.stack(
        [losses[known].mean() for losses, known in zip(each, targets >= 0, strict=True)]
    )


@pytest.mark.parametrize("name", ["with NaN", "with -100"])
def test_answers_that_are_not_known_are_no_targets(name):
    model, targets = seeded(lambda: nn.Linear(4, 5)), answers(name)
    targets[7] = torch.nan
    data = TensorDataset(torch.randn(40, 4), targets)
    losses, how = scored(model, data)
    logits = model(data.tensors[0]).detach()
    each = F.binary_cross_entropy_with_logits(logits, targets.clamp(0, 1), reduction="none")
    torch.testing.assert_close(losses, mean_of_known(each, targets), equal_nan=True)
    assert how.startswith("binary_cross_entropy")
    assert losses.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize(
    ("name", "outputs"),
    [(name, n) for name in ("smoothed", "smoothed, with NaN", "unsure", "signs") for n in (1, 5)]
    + [("shares", 5)],
)
def test_numbers_that_can_be_answers_are_asked_for(name, outputs):
    targets = answers(name)[:, :outputs]
    model = seeded(lambda: nn.Linear(4, targets.shape[1]))
    data = TensorDataset(torch.randn(40, 4), targets)
    with pytest.raises(ValueError, match=r"can be answers.* or any numbers; .*'mse'"):
        scored(model, data)
    losses, _ = scored(model, data, "mse")
    expected = (model(data.tensors[0]) - targets).square().mean(1).detach()
    torch.testing.assert_close(losses, expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_many_numbers_from_0_to_1_of_one_output_are_those_of_a_regression(shape):
    model, shares = seeded(lambda: nn.Linear(4, 1)), answers("shares")[:, 0]
    data = TensorDataset(torch.randn(40, 4), shares.view(shape))
    losses, how = scored(model, data)
    expected = (model(data.tensors[0])[:, 0] - shares).square().detach()
    torch.testing.assert_close(losses, expected)
    assert how.startswith("mse")


def test_whole_numbers_of_one_output_may_be_those_of_a_regression():
    model, ages = seeded(lambda: nn.Linear(4, 1)), torch.randint(18, 80, (12,))
    with pytest.raises(ValueError, match=r"for one number 'mse'"):
        scored(model, TensorDataset(X, ages))
    losses, _ = scored(model, TensorDataset(X, ages), "mse")
    torch.testing.assert_close(losses, (model(X)[:, 0] - ages).square().detach())


class Boxes(nn.Module):
    """A detector of one box, whose labels are a list of dicts."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x, labels=None):
        boxes = self.head(x)
        if labels is None:
            return {"pred_boxes": boxes}
        pairs = zip(boxes, labels, strict=True)
        loss = sum((box - each["boxes"]).abs().mean() for box, each in pairs) / len(labels)
        return {"loss": loss, "pred_boxes": boxes}


def of_each(model, batch):
    pairs = zip(batch["x"], batch["labels"], strict=True)
    return torch.stack([model(x[None], [each])["loss"] for x, each in pairs])


def of_outputs(outputs, batch):
    pairs = zip(outputs["pred_boxes"], batch["labels"], strict=True)
    return torch.stack([(box - each["boxes"]).abs().mean() for box, each in pairs])


@pytest.mark.parametrize("loss", ["auto", "own", of_each, of_outputs])
def test_labels_that_only_the_model_reads_are_passed_on(loss):
    model = seeded(Boxes)
    samples = [{"x": x, "labels": {"boxes": torch.rand(2, 4)}} for x in X]
    expected = torch.cat(
        [of_each(model, {"x": s["x"][None], "labels": [s["labels"]]}) for s in samples]
    )

    def collate(samples):
        fields = {"x": torch.stack([sample["x"] for sample in samples])}
        return {**fields, "labels": [sample["labels"] for sample in samples]}

    scorer = LossScorer(model, loss, progress=False)
    losses = scorer.score(samples, collate_fn=collate).losses
    torch.testing.assert_close(losses, expected.detach())
    with pytest.raises(ValueError, match="'labels' must be numbers"):
        LossScorer(model, "mse", progress=False).score(samples, collate_fn=collate)


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, lambda soft: soft.requires_grad_()])
def test_labels_of_any_tensor_are_counted(change):
    soft = change(torch.rand(12, 3, generator=torch.Generator().manual_seed(4)).softmax(1))
    model = seeded(lambda: nn.Linear(4, 3))
    expected, _ = scored(model, TensorDataset(X, soft))
    losses, how = scored(model, [{"x": x, "labels": y} for x, y in zip(X, soft, strict=True)])
    assert how.startswith("cross_entropy")
    assert torch.equal(losses, expected)
    by_hand = F.cross_entropy(model(X), soft.float(), reduction="none").detach()
    torch.testing.assert_close(losses, by_hand)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_forward_that_changes_its_input_is_right(dtype):
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, pixels):
            return self.layer(pixels.sub_(0.5).div_(0.25))

    model = seeded(Segmenter)
    pixels, labels = torch.rand(40, 3, 8, 8), torch.arange(40 * 64).view(40, 8, 8) % 4
    before = pixels.clone()
    losses = LossScorer(model, dtype=dtype, progress=False).score(TensorDataset(pixels, labels))
    assert torch.equal(pixels, before)
    expected = F.cross_entropy(model(before), labels, reduction="none").mean((1, 2)).detach()
    near = 1e-5 if dtype == "auto" else 1e-2
    torch.testing.assert_close(losses.losses, expected, rtol=near, atol=near)


def test_a_mask_that_is_added_hides_what_lies_far_below_zero():
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids) * attention_mask.exp()[..., None]
            return self.head(hidden)

    model = seeded(Embeds)
    masks = torch.zeros(12, 7)
    masks[::3, :2] = -1e4
    rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(TOKENS, masks, strict=True)]
    scores = LossScorer(model, "causal_lm", dtype="float32", progress=False).score(rows)
    assert scores.counts.tolist() == [4, 6, 6] * 4
    with torch.no_grad():
        logits = model(TOKENS, masks)[:, :-1]
    each = F.cross_entropy(logits.transpose(1, 2), TOKENS[:, 1:], reduction="none")
    expected = torch.stack([e[-n:].mean() for e, n in zip(each, scores.counts, strict=True)])
    torch.testing.assert_close(scores.losses, expected)


@pytest.mark.parametrize("kind", [torch.empty, np.empty])
def test_a_data_set_that_reads_into_one_buffer_is_refused(kind):
    class Buffered(torch.utils.data.Dataset):
        def __init__(self):
            self.buffer = kind(4)

        def __len__(self):
            return len(X)

        def __getitem__(self, index):
            self.buffer[:] = X[index] if kind is torch.empty else X[index].numpy()
            return {"x": self.buffer, "labels": CLASSES[index]}

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x)

    with pytest.raises(ValueError, match="every sample in the same memory"):
        LossScorer(seeded(Classifier), progress=False).score(Buffered())
