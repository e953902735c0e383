import pytest
import torch
from torch import nn

from flowdata import FlowSampler, FlowWeightedDataset, LossScorer, ScoreMismatchError, Scores
from flowdata.head.output_layer import Head
from flowdata.head.tiled import target_values
from flowdata.scoring.collate import pad_collate
from flowdata.scoring.language.ways import plain_way, ways_of
from flowdata.targets.columns import COLUMNS, check_columns, columns_of_logits
from flowdata.targets.predictions import prediction_way
from flowdata.targets.target_losses import joined
from tests import reference
from tests.models import (
    VOCABULARY,
    TinyResNet,
    images,
    scale_logits,
    tiny_llama,
    token_samples,
)

HEADS = [(False, 1.0, None), (True, 0.3, None), (True, 0.7, 5.0)]


def head_case(bias, scale, softcap, *, rows=40, width=24, vocabulary=5000):
    """Rows of which a third are predicted rightly, a few of these with great confidence."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width) * 0.4
    targets = torch.randint(0, vocabulary, (rows,))
    offset = torch.randn(vocabulary) if bias else None
    head = Head(weight, offset, scale, softcap)
    logits = reference.head_logits(hidden, lambda h: h @ weight.T + (offset if bias else 0))
    targets[: rows // 3] = logits[: rows // 3].argmax(1)
    hidden[: rows // 8] *= 3
    return hidden, head, targets


def expected_columns(hidden, head, targets):
    values = reference.target_columns(
        hidden, head.weight, targets, head.bias, head.scale, head.softcap
    )
    return dict(zip(COLUMNS, values, strict=True))


@pytest.mark.parametrize("case", HEADS)
def test_the_tiled_heads_columns_are_those_of_autograd(case):
    hidden, head, targets = head_case(*case)
    losses, found = target_values(hidden, head, targets, COLUMNS)
    torch.testing.assert_close(losses, target_values(hidden, head, targets)[0])
    for name, expected in expected_columns(hidden, head, targets).items():
        torch.testing.assert_close(found[name].double(), expected.double(), rtol=2e-5, atol=1e-6)
    assert 0 < found["correct"].mean() < 1


@pytest.mark.parametrize("case", HEADS)
def test_columns_of_full_logits_are_those_of_autograd(case):
    hidden, head, targets = head_case(*case)
    logits = reference.head_logits(
        hidden,
        lambda h: h @ head.weight.T + (0 if head.bias is None else head.bias),
        head.softcap,
        head.scale,
    )
    found = columns_of_logits(
        logits, targets, COLUMNS, hidden, scale=head.scale, softcap=head.softcap
    )
    for name, expected in expected_columns(hidden, head, targets).items():
        torch.testing.assert_close(found[name].double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_confident_predictions_keep_their_small_loss_and_gradient():
    hidden, head = torch.eye(3) * 4, Head(torch.eye(3) * 4)
    losses, found = target_values(hidden, head, torch.arange(3), COLUMNS)
    exact = torch.log1p(2 * torch.exp(torch.tensor(-16.0, dtype=torch.float64)))
    torch.testing.assert_close(losses.double(), exact.expand(3), rtol=1e-6, atol=0)
    for name, expected in expected_columns(hidden, head, torch.arange(3)).items():
        torch.testing.assert_close(found[name].double(), expected.double(), rtol=1e-5, atol=0)


def test_classes_that_a_bias_rules_out_change_nothing():
    hidden, head, targets = head_case(True, 1.0, None)
    ruled_out = torch.ones(5000, dtype=torch.bool).scatter_(0, targets, False)
    ruled_out[:4000] = False
    head.bias[ruled_out] = -torch.inf
    losses, found = target_values(hidden, head, targets, COLUMNS)
    left = Head(head.weight[~ruled_out], head.bias[~ruled_out])
    places = (~ruled_out).cumsum(0) - 1
    expected_losses, expected = target_values(hidden, left, places[targets], COLUMNS)
    torch.testing.assert_close(losses, expected_losses)
    for name in COLUMNS:
        torch.testing.assert_close(found[name], expected[name])


def test_a_class_as_likely_as_the_target_makes_it_no_correct_one():
    weight = torch.tensor([[1.0], [1.0], [0.0]])
    found = target_values(torch.ones(2, 1), Head(weight), torch.tensor([0, 1]), ("correct",))[1]
    assert found["correct"].tolist() == [0, 0]
    logits = torch.tensor([[1.0, 1.0, 0.0]])
    assert columns_of_logits(logits, torch.tensor([0]), ("correct",))["correct"].item() == 0


# --- classifiers -----------------------------------------------------------------------------


def test_a_classifiers_columns_are_those_of_its_last_layers_gradient():
    model, data = TinyResNet().eval(), images(6)
    inputs, targets = data.tensors
    columns = prediction_way("cross_entropy", COLUMNS)(model, [inputs, targets]).columns(
        token_losses=False
    )
    for row, (image, target) in enumerate(data):
        logits = model(image[None])
        loss = nn.functional.cross_entropy(logits, target[None])
        (gradient,) = torch.autograd.grad(loss, model.head.weight, retain_graph=True)
        p = logits.softmax(1)
        assert columns["gradient_norm"][row].item() == pytest.approx(
            gradient.norm().item(), rel=1e-5
        )
        assert columns["entropy"][row].item() == pytest.approx(
            -(p * p.log()).sum().item(), rel=1e-5
        )
        assert columns["correct"][row].item() == float(logits.argmax() == target)
        assert columns["loss"][row].item() == pytest.approx(loss.item(), rel=1e-5)


def test_targets_given_as_probabilities():
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(4, 3), torch.randn(5, 4), torch.rand(5, 3).softmax(1)
    columns = prediction_way("cross_entropy", COLUMNS)(model, [inputs, targets]).further
    for row in range(5):
        logits = model(inputs[row : row + 1])
        loss = nn.functional.cross_entropy(logits, targets[row : row + 1])
        (gradient,) = torch.autograd.grad(loss, model.weight)
        assert columns["gradient_norm"][row].item() == pytest.approx(
            gradient.norm().item(), rel=1e-5
        )
        assert columns["correct"][row].item() == float(logits.argmax() == targets[row].argmax())


def test_a_sample_of_several_targets_has_their_mean():
    """As in token classification: logits (B, T, C), targets (B, T), −100 ignored."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), torch.randn(2, 5, 4)
    targets = torch.tensor([[0, 2, -100, 1, -100], [-100] * 5])
    columns = prediction_way("cross_entropy", COLUMNS)(model, [inputs, targets]).columns(
        token_losses=False
    )
    is_target = targets[0] != -100
    values = reference.target_columns(
        inputs[0][is_target], model.weight, targets[0][is_target], model.bias
    )
    for name, expected in zip(COLUMNS, values, strict=True):
        assert columns[name][0].item() == pytest.approx(expected.double().mean().item(), rel=1e-5)
        assert columns[name][1].isnan()


def test_logits_that_no_linear_layer_gives_have_no_gradient_norm():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softplus())
    batch = [torch.randn(2, 4), torch.tensor([0, 1])]
    assert set(prediction_way("cross_entropy", COLUMNS[:2])(model, batch).further) == {
        "entropy",
        "correct",
    }
    with pytest.raises(ValueError, match="'gradient_norm' needs what the model's last linear"):
        prediction_way("cross_entropy", COLUMNS)(model, batch)
    assert not any(module._forward_hooks for module in model.modules())


# --- language models -------------------------------------------------------------------------


def gemma(**options):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=199, **sizes, **heads, **options)
    return Gemma2ForCausalLM(config).eval()


LANGUAGE_MODELS = {
    "llama": lambda: tiny_llama(initializer_range=0.2).eval(),
    "softcapped": lambda: gemma(final_logit_softcapping=0.5, initializer_range=0.2),
}


def expected_of(model, samples, name):
    """The mean over a sample's targets, through autograd with respect to the head's weight."""
    means = []
    for sample in samples:
        hidden = model.model(input_ids=sample["input_ids"][None]).last_hidden_state[0, :-1]
        is_target = sample["labels"][1:] != -100
        values = reference.target_columns(
            hidden[is_target].detach(),
            model.lm_head.weight,
            sample["labels"][1:][is_target],
            softcap=getattr(model.config, "final_logit_softcapping", None),
        )
        means.append(values[COLUMNS.index(name)].double().mean())
    return torch.stack(means)


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_way_to_score_a_language_model_gives_the_same_columns(name, way):
    model, samples = LANGUAGE_MODELS[name](), token_samples(5, longest=20)
    plain = plain_way(model, "causal_lm", COLUMNS)

    def one_by_one(model, batch):
        return joined([plain(model, pad_collate([sample])) for sample in samples])

    with torch.no_grad():
        ways = [*ways_of(model, "causal_lm", columns=COLUMNS), ("one by one", one_by_one)]
        way_name, score = ways[way]
        columns = score(model, pad_collate(samples)).columns(token_losses=False)
    for column in COLUMNS:
        expected = expected_of(model, samples, column).float()
        torch.testing.assert_close(columns[column], expected, rtol=1e-3, atol=1e-4, msg=way_name)
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_a_head_that_configurations_do_not_tell_of_has_no_gradient_norm():
    model, samples = tiny_llama(initializer_range=0.2), token_samples(6)
    scale_logits(model, 7)
    options = {"dtype": "float32", "progress": False}
    scores = LossScorer(model, columns=["entropy"], **options).score(samples)
    assert scores.columns["entropy"].isfinite().all()
    with pytest.raises(ValueError, match="its configuration doesn't tell; leave it out of columns"):
        LossScorer(model, columns=["gradient_norm"], **options).score(samples)


class Flat(nn.Module):
    """A model that makes rows of its hidden states before its head, as some do."""

    def __init__(self, *, keeps_all):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.keeps_all = keeps_all

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        rows = self.embedding(input_ids).cumsum(1).reshape(-1, 16)
        logits = self.head(rows if self.keeps_all else torch.cat([rows, rows]))
        return logits[: len(rows)].view(*input_ids.shape, -1)


def test_rows_that_a_model_makes_before_its_head_have_their_gradients_norm():
    model, samples = Flat(keeps_all=True), token_samples(4)
    options = {"columns": ["gradient_norm"], "dtype": "float32", "progress": False}
    scores = LossScorer(model, "causal_lm", **options).score(samples)
    for sample, norm in zip(samples, scores.columns["gradient_norm"], strict=True):
        logits, targets = model(sample["input_ids"][None])[0, :-1], sample["labels"][1:]
        norms = []
        for row, target in zip(logits, targets, strict=True):
            if target != -100:
                loss = nn.functional.cross_entropy(row[None], target[None])
                (gradient,) = torch.autograd.grad(loss, model.head.weight, retain_graph=True)
                norms.append(gradient.norm())
        torch.testing.assert_close(norm, torch.stack(norms).mean(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="leave it out of columns"):
        LossScorer(Flat(keeps_all=False), "causal_lm", **options).score(samples)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_keep_columns_and_make_weights_of_them(dtype):
    model, samples = LANGUAGE_MODELS["llama"](), token_samples(9)
    scorer = LossScorer(model, columns=COLUMNS, dtype=dtype, max_tokens=100, progress=False)
    scores = scorer.score(samples)
    # In bfloat16 nine samples may be rounded so that another way is nearer to the truth.
    assert ("tiled head" if dtype == "float32" else "target positions") in scorer.explain()
    for name, margin in (("entropy", 3e-2), ("gradient_norm", 3e-2)):
        expected = expected_of(model, samples, name).float()
        margin = margin if dtype == "bfloat16" else 1e-3
        torch.testing.assert_close(scores.columns[name], expected, rtol=margin, atol=1e-4)
    weights = scores.weights(column="gradient_norm")
    norms = scores.columns["gradient_norm"]
    torch.testing.assert_close(weights, torch.exp(-norms / norms.quantile(0.5)))
    assert FlowWeightedDataset(samples, weights)[3][1] == weights[3]
    assert len(list(FlowSampler(weights, seed=0))) == 9


def test_columns_are_part_of_a_stores_identity(tmp_path):
    model, data = TinyResNet(), images(8)
    options = {"dtype": "float32", "progress": False, "batch_size": 3}
    scores = LossScorer(model, columns=COLUMNS, **options).score(data, store=tmp_path)
    again = LossScorer(model, columns=COLUMNS[::-1], **options)
    loaded = again.score(data, store=tmp_path)
    assert "found in" in again.explain()
    assert set(Scores.load(tmp_path).columns) == set(COLUMNS)
    for name in COLUMNS:
        assert torch.equal(loaded.columns[name], scores.columns[name])
    with pytest.raises(ScoreMismatchError, match="made with another set of columns"):
        LossScorer(model, **options).score(data, store=tmp_path)


def test_losses_that_have_no_columns_are_refused_at_construction():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="which loss='mse' doesn't have"):
        LossScorer(model, "mse", columns=["entropy"])
    with pytest.raises(ValueError, match="which loss=a callable doesn't have"):
        LossScorer(model, lambda model, batch: batch, columns=["entropy"])


# --- names -----------------------------------------------------------------------------------


def test_columns_are_put_in_order_and_wrong_ones_refused():
    assert check_columns(["gradient_norm", "entropy", "entropy"], "auto") == (
        "entropy",
        "gradient_norm",
    )
    assert check_columns((), len) == ()
    with pytest.raises(TypeError, match=r"such as \('entropy',\), got a string"):
        check_columns("entropy", "auto")
    with pytest.raises(ValueError, match=r"among 'entropy', .*, got 'margin'"):
        check_columns(["margin"], "auto")
    for loss, named in ((len, "a callable"), ("mse", "'mse'")):
        with pytest.raises(ValueError, match=f"logits of classes, which loss={named} doesn't have"):
            check_columns(["entropy"], loss)
