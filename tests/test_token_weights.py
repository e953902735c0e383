"""Token weights: current-model rules, and reference weights laid along labels."""

import itertools
import math

import pytest
import torch

from flowdata.losses import causal_lm_loss
from flowdata.scores import Scores
from flowdata.token_weights import (
    align_token_weights,
    dft_weights,
    dro_weights,
    rule_weights,
    selective_token_weights,
    talr_weights,
    token_weight_column,
)
from flowdata.weights import resolve_temperature
from tests import reference

RULES = ("talr", "dft", "dro")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 6, 7])
def test_rules_are_the_slow_ones_over_the_tokens_that_take_part(rule, n):
    losses = torch.rand(n + 3, generator=torch.Generator().manual_seed(n)) * 4
    takes_part = torch.ones(n + 3, dtype=torch.bool)
    takes_part[[0, 2, 3]] = False
    losses[0] = torch.inf
    weights = rule_weights(rule, losses.requires_grad_(), takes_part)
    assert not weights.requires_grad
    expected = reference.token_rule_weights(rule, losses.detach()[takes_part])
    assert weights[takes_part].tolist() == pytest.approx(expected, rel=1e-5)
    assert weights[~takes_part].tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [talr_weights, dro_weights])
def test_a_temperature_of_their_own_can_be_given(make):
    losses = torch.tensor([0.5, 1.0, 2.0])
    name = make.__name__.removesuffix("_weights")
    expected = reference.token_rule_weights(name, losses, temperature=0.7)
    weights = make(losses, torch.ones(3, dtype=torch.bool), temperature=0.7)
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_dro_is_talr_upside_down_and_never_overflows():
    losses = torch.tensor([0.0, 50.0, 400.0])
    everyone = torch.ones(3, dtype=torch.bool)
    dro = dro_weights(losses, everyone, temperature=1.0)
    assert dro.isfinite().all()
    assert dro.argmax() == dft_weights(losses, everyone).argmin() == 2


def test_a_batch_that_is_half_certain_keeps_its_certain_tokens():
    weights = talr_weights(torch.tensor([0.0, 0.0, 3.0]), torch.ones(3, dtype=torch.bool))
    assert weights.tolist() == [1, 1, 0]


def test_nothing_waits_for_the_device_in_a_rule():
    losses = torch.rand(5, device="meta")
    takes_part = torch.ones(5, dtype=torch.bool, device="meta")
    for rule in RULES:
        assert rule_weights(rule, losses, takes_part).is_meta
    assert rule_weights("eaft", torch.rand(5, 20, device="meta"), takes_part).is_meta


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("normalize", ["count", "weights"])
def test_a_rule_in_the_loss_multiplies_the_weights_given(rule, normalize):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5, 9, generator=generator)
    labels = torch.randint(9, (3, 5), generator=generator)
    labels[0, :3] = -100
    weights = torch.tensor([0.5, 0.0, 1.0])
    logits[1] = torch.nan  # weight 0: out of the median, too
    rows = [(b, t) for b in (0, 2) for t in range(1, 5) if labels[b, t] != -100]
    log_probs = logits.log_softmax(-1)
    losses = [-log_probs[b, t - 1, labels[b, t]].item() for b, t in rows]
    ruled = reference.token_rule_weights(rule, losses)
    combined = [r * weights[b].item() for r, (b, _) in zip(ruled, rows, strict=True)]
    items = 10 if normalize == "count" else None
    expected = reference.weighted_mean(losses, combined, normalize, items)
    value = causal_lm_loss(logits, labels, weights, normalize=normalize, token_rule=rule)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_a_rules_weights_are_constants_for_the_gradient():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(1, 4, 6, generator=generator, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 3]])
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
    expected = torch.autograd.grad((losses.detach().neg().exp() * losses).sum() / 3, logits)
    value = causal_lm_loss(logits, labels, token_rule="dft")
    torch.testing.assert_close(torch.autograd.grad(value, logits), expected)


def test_a_rule_compiles_without_graph_breaks():
    torch.compiler.reset()
    logits, labels = torch.randn(2, 4, 6), torch.randint(6, (2, 4))
    compiled = torch.compile(causal_lm_loss, fullgraph=True, backend="aot_eager")
    for rule in RULES:
        torch.testing.assert_close(
            compiled(logits, labels, token_rule=rule),
            causal_lm_loss(logits, labels, token_rule=rule),
        )


def test_selective_masking_drops_tokens_above_the_perplexity():
    losses = torch.tensor([[0.0, math.log(2.49)], [math.log(2.51), 5.0]])
    assert selective_token_weights(losses).tolist() == [[1, 1], [0, 0]]
    assert selective_token_weights(losses, max_perplexity=2).tolist() == [[1, 0], [0, 0]]
    with pytest.raises(ValueError, match="max_perplexity must be > 1, got 0"):
        selective_token_weights(losses, max_perplexity=0.5)


def test_weights_are_laid_along_labels_whatever_was_cut():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    labels = torch.tensor([9, -100, 5, 6, -100, 7, 8])  # the first is never a target
    whole = align_token_weights(weights, labels)
    expected = torch.tensor([0, 0, 0.1, 0.2, 0, 0.3, 0.4])
    assert whole.tolist() == expected.tolist()
    assert (
        align_token_weights(weights, labels[:6], truncated="right").tolist() == whole[:6].tolist()
    )
    end = align_token_weights(weights, labels[3:], truncated="left")
    assert end.tolist() == pytest.approx([0, 0, 0.3, 0.4])
    assert align_token_weights(weights[:0], labels[:1]).tolist() == [0]


def ragged_scores():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.rand(7, generator=generator) * 3
    losses = torch.stack([part.mean() for part in tokens.split([1, 4, 2])])
    labels = [[1, 2], [-100, 3, 4, -100, 5, 6], [7, 8, 9]]
    return Scores(losses, torch.tensor([1, 4, 2]), token_losses=tokens), tokens, labels


@pytest.mark.parametrize("mode", ["token", "both"])
def test_a_column_holds_the_weight_of_every_target(mode):
    scores, tokens, labels = ragged_scores()
    expected = reference.flow_weights(tokens, reference.median(tokens))
    if mode == "both":
        samples = reference.flow_weights(scores.losses, reference.median(scores.losses))
        expected = [w * samples[i] for w, i in zip(expected, [0, 1, 1, 1, 1, 2, 2], strict=True)]
    column = token_weight_column(scores, labels, mode=mode)
    assert [len(row) for row in column] == [2, 6, 3]
    assert [w for row in column for w in row if w] == pytest.approx(expected, rel=1e-5)
    assert [[w > 0 for w in row] for row in column] == [
        [t > 0 and label != -100 for t, label in enumerate(row)] for row in labels
    ]


@pytest.mark.parametrize("mode", ["token", "both"])
@pytest.mark.parametrize("loss", [torch.nan, torch.inf])
def test_a_sample_without_a_finite_loss_is_named_or_weighs_nothing(mode, loss):
    scores, tokens, labels = ragged_scores()
    losses, broken = scores.losses.clone(), tokens.clone()
    losses[1], broken[2] = loss, loss
    unfinite = Scores(losses, scores.counts, token_losses=broken)
    with pytest.raises(ValueError, match=r"1 of 3 samples have no finite loss, .* sample 1; pass"):
        token_weight_column(unfinite, labels, mode=mode)
    column = token_weight_column(unfinite, labels, mode=mode, missing="zero")
    first, last = token_weight_column(scores[[0, 2]], [labels[0], labels[2]], mode=mode)
    assert column == [first, [0.0] * 6, last]
    with pytest.raises(ValueError, match="missing must be 'raise' or 'zero', got 'drop'"):
        token_weight_column(unfinite, labels, missing="drop")
    nothing = Scores(torch.tensor([loss]), torch.tensor([1]), token_losses=torch.tensor([loss]))
    with pytest.raises(ValueError, match="none of the 1 samples has a target with a finite loss"):
        token_weight_column(nothing, [[1, 2]], missing="zero")


def test_a_sample_without_a_target_has_no_token_to_weigh():
    scores = Scores(
        torch.tensor([1.0, torch.nan, 2.0]),
        torch.tensor([1, 0, 1]),
        token_losses=torch.tensor([1.0, 2.0]),
    )
    column = token_weight_column(scores, [[0, 1], [0, -100], [0, 1]])
    assert column[1] == [0.0, 0.0]
    assert column[0][1] > column[2][1] > 0


def test_a_column_says_which_sample_does_not_fit():
    scores, _, labels = ragged_scores()
    with pytest.raises(ValueError, match="sample 2: labels have 1 targets, but the sample was"):
        token_weight_column(scores, [*labels[:2], [7, 8]])
    cut = token_weight_column(scores, [*labels[:2], [7, 8]], truncated="right")
    assert cut[2] == token_weight_column(scores, labels)[2][:2]
    with pytest.raises(ValueError, match="2 label sequences for the scores of 3 samples"):
        token_weight_column(scores, labels[:2])
    with pytest.raises(ValueError, match="mode must be 'token' or 'both'"):
        token_weight_column(scores, labels, mode="sequence")
    with pytest.raises(ValueError, match="these scores hold no token losses"):
        token_weight_column(Scores(torch.ones(3)), labels)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "labels have 2 targets, but the sample was scored with 3",
            lambda: align_token_weights(torch.ones(3), torch.tensor([1, 2, 3])),
        ),
        (
            "labels have 2 targets, but the sample was scored with 1",
            lambda: align_token_weights(torch.ones(1), torch.tensor([1, 2, 3]), truncated="right"),
        ),
        ("truncated must be", lambda: align_token_weights(V, V, truncated="both")),
        ("token_rule must be one of 'talr'", lambda: rule_weights("flow", V, V.bool())),
        (
            r"token_rule must return weights of shape \(1,\)",
            lambda: rule_weights(lambda losses, part: torch.ones(2), V, V.bool()),
        ),
    ],
)
def test_what_cannot_be_right_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


V = torch.ones(1)


def test_a_column_of_ess_weights_is_relative_to_the_smallest_loss():
    scores, tokens, labels = ragged_scores()
    tokens = 7 + tokens / 100
    scores = Scores(scores.losses, scores.counts, token_losses=tokens)
    column = token_weight_column(scores, labels, temperature="ess0.5")
    weights = [w for row in column for w in row if w]
    temperature = resolve_temperature(tokens, "ess0.5")
    assert weights == pytest.approx(reference.relative_flow_weights(tokens, temperature), rel=1e-5)
    assert max(weights) == 1


def test_token_weights_that_vanish_are_warned_of_once(caplog):
    scores, _, labels = ragged_scores()
    scores = Scores(scores.losses, scores.counts, token_losses=7 + torch.arange(7) / 100)
    token_weight_column(scores, labels, temperature=0.01)
    (record,) = caplog.records
    assert "of the 7 tokens have a mean of 0, so that" in record.message
    assert "pass temperature='ess0.5', whose weights do not vanish" in record.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_subnormal_temperature_of_a_token_rule_makes_no_nan(dtype):
    losses, takes_part = torch.tensor([0.0, 1.0], dtype=dtype), torch.tensor([True, True])
    for temperature in (5e-324, 1e-40):
        assert talr_weights(losses, takes_part, temperature=temperature).tolist() == [1, 0]
        assert dro_weights(losses, takes_part, temperature=temperature).tolist() == [0, 1]
    for rule, wrong in itertools.product((talr_weights, dro_weights), (0.0, -1.0, math.nan)):
        with pytest.raises(ValueError, match="temperature must be finite and > 0"):
            rule(losses, takes_part, temperature=wrong)
