"""Which layer makes a network's logits, and whether a tuned one has it still."""

import copy
import logging

import pytest
import torch
import transformers
from torch import nn

from flowdata.drift import Drift, DriftMeter, OutputAnchor, choose
from tests import reference
from tests.models import token_samples
from tests.test_drift import SIZES, encoder, moved

ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(10, 12, 5, generator=torch.Generator().manual_seed(1))
TEXTS = [{"input_ids": s["input_ids"], "label": i % 3} for i, s in enumerate(token_samples(12))]


class Net(nn.Module):
    """A body, a linear head, and what comes behind it."""

    def __init__(self, features=6, behind=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(features, 8), nn.Linear(8, 4)
        self.behind = behind or (lambda logits: logits)

    def forward(self, x):
        return self.behind(self.head(self.body(x).tanh()))


def log_softmax(logits):
    return logits.log_softmax(-1)


def log_of_softmax(logits):
    return logits.softmax(-1).log()


def kl_of(base, tuned, samples):
    """The mean over all targets, and how many a sample has."""
    with torch.no_grad():
        pairs = [(base(x[None]).double(), tuned(x[None]).double()) for x in samples]
    parts = [reference.divergences(*(each.flatten(0, -2) for each in pair)) for pair in pairs]
    return torch.cat([part["kl"] for part in parts]).mean()


@pytest.mark.parametrize("behind", [log_softmax, log_of_softmax])
def test_a_softmaxs_logarithm_leaves_features_and_predictions_as_they_are(behind):
    base, plain = Net(behind=behind), Net()
    tuned = moved(base)
    plain_tuned = copy.deepcopy(plain)
    plain_tuned.load_state_dict(tuned.state_dict())
    drift, expected = DriftMeter(base, ROWS)(tuned), DriftMeter(plain, ROWS)(plain_tuned)
    assert drift.kl == pytest.approx(expected.kl, rel=1e-5)
    assert drift.kept == pytest.approx(expected.kept)
    tuned.head = nn.Linear(8, 7)
    assert DriftMeter(base, ROWS)(tuned).head == "frozen"


@pytest.mark.parametrize("behind", [None, log_softmax, lambda logits: 2 * logits])
def test_a_linear_layer_puts_the_classes_of_series_last(behind):
    base = Net(5, behind)
    tuned = moved(base)
    drift = DriftMeter(base, SERIES, dtype="float32")(tuned)
    assert drift.kl == pytest.approx(float(kl_of(base, tuned, SERIES)), rel=1e-4)
    assert drift.per_sample["targets"].unique().tolist() == [12]
    with pytest.raises(ValueError, match="as many classes as places, so that either axis"):
        DriftMeter(Net(5, lambda logits: 2 * logits), SERIES[:, :4])


def of_text(classes):
    torch.manual_seed(0)
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "pad_token_id": 0, "bos_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=199, eos_token_id=1, num_labels=classes, initializer_range=0.2, **config
    )
    return transformers.GPT2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("classes", [3, 4])
def test_a_new_layer_whose_last_tokens_logits_count_is_known_for_one(classes, caplog):
    base, tuned = of_text(3), of_text(classes)
    tuned.transformer.load_state_dict(base.transformer.state_dict())
    nn.init.normal_(tuned.score.weight)
    meter = DriftMeter(base, TEXTS, dtype="float32")
    with caplog.at_level(logging.INFO, "flowdata"):
        drift = meter(tuned)
    assert (drift.head, drift.kl, drift.cosine) == ("frozen", 0, pytest.approx(1))
    own = moved(base)
    with torch.no_grad():
        logits = [
            [each(input_ids=text["input_ids"][None]).logits.double() for each in (base, own)]
            for text in TEXTS
        ]
    kl = torch.cat([reference.divergences(*pair)["kl"] for pair in logits]).mean()
    assert meter(own).kl == pytest.approx(float(kl), rel=1e-3)
    penalty = OutputAnchor(meter, 1e-3, batch_size=len(TEXTS))(own)
    assert 1e3 * penalty.item() == pytest.approx(float(kl), rel=0.1)


def weight_norm(bias):
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3, bias=bias))
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), layer)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_with_a_parametrization_is_known_by_the_weight_it_makes(bias):
    base = weight_norm(bias)
    meter = DriftMeter(base, ROWS)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned[2].parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    drift = meter(tuned)
    assert drift.head == "own"
    assert drift.kl == pytest.approx(float(kl_of(base, tuned, ROWS)), rel=1e-4)
    tuned[0], tuned[2] = base[0], nn.Linear(8, 3)
    assert meter(tuned).head == "frozen"
    assert meter(tuned).kl == 0


def test_the_user_says_which_layer_counts_where_weights_can_not_tell():
    base = Net()
    far = copy.deepcopy(base)
    with torch.no_grad():
        far.head.weight.neg_()
    assert DriftMeter(base, ROWS)(far).head == "frozen"
    drift = DriftMeter(base, ROWS, head="own")(far)
    assert drift.kl == pytest.approx(float(kl_of(base, far, ROWS)), rel=1e-4)
    near = moved(base)
    assert DriftMeter(base, ROWS)(near).head == "own"
    through_frozen = copy.deepcopy(near)
    through_frozen.head = base.head
    drift = DriftMeter(base, ROWS, head="frozen")(near)
    assert drift.head == "frozen"
    assert drift.kl == pytest.approx(float(kl_of(base, through_frozen, ROWS)), rel=1e-4)
    near.head = nn.Linear(8, 7)
    with pytest.raises(ValueError, match=r"head='own' .* \(7, 8\), the frozen model's \(4, 8\)"):
        DriftMeter(base, ROWS, head="own")(near)
    with pytest.raises(ValueError, match="head='frozen' would have no effect: no linear layer"):
        DriftMeter(Net(behind=lambda logits: 2 * logits), ROWS, head="frozen")
    with pytest.raises(ValueError, match="head must be 'auto', 'own' or 'frozen', got 'new'"):
        DriftMeter(base, ROWS, head="new")


def test_runs_that_were_measured_through_different_layers_are_not_compared():
    def drift(kl, head):
        return Drift(kl, kl, 0.9, 0.9, samples=9, head=head, of="samples")

    runs = [("a", 0.5, drift(0.1, "own")), ("b", 0.6, drift(0.2, "frozen"))]
    with pytest.raises(ValueError, match=r"'a' is that of its own .* 'b' was measured through"):
        choose(runs, validation="loss")
    assert choose(runs, validation="accuracy") == "b"  # goes by features, whatever the layer
    for kl in (0.0, float("inf"), float("nan")):  # the model itself, and one that diverged
        runs[0] = ("other", 0.5, drift(kl, "own"))
        assert choose(runs, validation="loss") in ("other", "b")


def test_layers_of_a_head_that_were_made_anew_are_warned_of(caplog):
    base = encoder("RobertaForSequenceClassification", num_labels=3)
    tuned = copy.deepcopy(base)
    nn.init.normal_(tuned.classifier.dense.weight)
    meter = DriftMeter(base, [{"input_ids": text["input_ids"]} for text in TEXTS])
    with caplog.at_level(logging.WARNING, "flowdata"):
        meter(moved(base))
        assert "in common" not in caplog.text
        meter(tuned)
    assert "classifier.dense.weight have nothing in common with the model before" in caplog.text


def test_tokens_without_a_label_are_no_targets():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=5)
    base = transformers.BertForTokenClassification(config).eval()
    tuned = moved(base)
    samples = [{**s, "labels": s["labels"] % 5} for s in token_samples(9)]
    for sample in samples:
        sample["labels"][::3] = -100
    kl = []
    for sample in samples:
        with torch.no_grad():
            pair = [m(sample["input_ids"][None]).logits[0].double() for m in (base, tuned)]
        kl.append(reference.divergences(*pair)["kl"][sample["labels"] != -100])
    drift = DriftMeter(base, samples, dtype="float32")(tuned)
    assert drift.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert drift.per_sample["targets"].tolist() == list(map(len, kl))
