"""token_rule="eaft" and the divergence to a reference, against autograd on full logits."""

import re

import pytest
import torch
from torch import nn

from flowdata.head import gradients as tile_gradients
from flowdata.head import kl
from flowdata.head import tiles as head_tiles
from flowdata.head.kl_logits import kl_of_logits
from flowdata.losses import causal_lm_loss, count_items, fused_causal_lm_loss
from flowdata.token_weights import eaft_weights
from tests import reference

B, T, D, V = 3, 8, 6, 53
LOGITS = [{}, {"softcap": 2.0}, {"logit_scale": 0.3}, {"softcap": 1.5, "logit_scale": 1.7}]
RULES = [None, "dft", "eaft"]


@pytest.fixture(autouse=True)
def _many_small_tiles(monkeypatch):
    """No tile's size divides the vocabulary, and slices are smaller than 20 classes."""
    monkeypatch.setattr(tile_gradients, "_LOGITS_OF_A_TILE", 4 * V)
    monkeypatch.setattr(tile_gradients, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(head_tiles, "ROWS_OF_A_CORE", 3)
    monkeypatch.setattr(head_tiles, "tile_size", lambda hidden: (7, 12))
    monkeypatch.setattr("flowdata.head.largest.tile_size", lambda hidden: (7, 12))
    monkeypatch.setitem(kl._TILE, "cpu", (5, 31))


class CalledHead(nn.Linear):
    """No plain linear layer, so it must be called."""


def make(vocabulary=V, dtype=torch.float32, bias=True, kind=nn.Linear):
    """Hidden states, head, labels and weights; and the same of a reference."""
    generator = torch.Generator().manual_seed(0)

    def states_and_head(kind):
        head = kind(D, vocabulary, bias=bias)
        for parameter in head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        hidden = torch.randn(B, T, D, generator=generator).to(dtype)
        return hidden, head

    hidden, head = states_and_head(kind)
    base, base_head = states_and_head(nn.Linear)
    labels = torch.randint(vocabulary, (B, T), generator=generator)
    labels[0, :3] = -100
    labels[1, 6:] = -100
    weights = {
        "none": None,
        "sequence": torch.tensor([0.3, 1.0, 0.6]),
        "token": torch.rand(B, T, generator=generator),
    }
    weights["token"][2, 3] = 0
    return hidden.requires_grad_(), head, labels, weights, base, base_head.requires_grad_(False)


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)


def assert_same(ours, slow, hidden, head, rtol=1e-5):
    torch.testing.assert_close(ours.double(), slow.double(), rtol=rtol, atol=rtol)
    pairs = zip(gradients(ours, hidden, head), gradients(slow, hidden, head), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", [nn.Linear, CalledHead])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weighted", ["none", "sequence", "token"])
@pytest.mark.parametrize("logits", LOGITS)
def test_both_losses_and_their_gradients_are_the_slow_ones(kind, rule, weighted, logits):
    hidden, head, labels, weights, base, base_head = make(kind=kind)
    full = reference.head_logits(hidden, head, **logits)
    of_base = reference.head_logits(base, base_head, **logits)
    slow = reference.anchored_loss(full, labels, weights[weighted], rule, 0.3, of_base)
    options = {"token_rule": rule, "kl_to_reference": 0.3}
    ours = causal_lm_loss(full, labels, weights[weighted], reference=of_base, **options)
    assert_same(ours, slow, hidden, head)
    full = reference.head_logits(hidden, head, **logits)
    slow = reference.anchored_loss(full, labels, weights[weighted], rule, 0.3, of_base)
    pair = base, base_head
    ours = fused_causal_lm_loss(
        hidden, head, labels, weights[weighted], reference=pair, **logits, **options
    )
    assert_same(ours, slow, hidden, head)


@pytest.mark.parametrize("kind", [nn.Linear, CalledHead])
@pytest.mark.parametrize("vocabulary", [1, 2, 12, 19, 20, 21])
def test_a_vocabulary_smaller_than_what_eaft_looks_at(kind, vocabulary):
    hidden, head, labels, weights, base, base_head = make(vocabulary, kind=kind)
    for fused in (False, True):
        full, of_base = head(hidden), base_head(base)
        slow = reference.anchored_loss(full, labels, weights["token"], "eaft", 0.1, of_base)
        options = {"token_rule": "eaft", "kl_to_reference": 0.1}
        if fused:
            options["reference"] = base, base_head
            ours = fused_causal_lm_loss(hidden, head, labels, weights["token"], **options)
        else:
            ours = causal_lm_loss(full, labels, weights["token"], reference=of_base, **options)
        assert_same(ours, slow, hidden, head)


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_is_no_worse_than_autograd_on_bfloat16_logits(fused):
    low_hidden, low_head, labels, weights, base, base_head = make(dtype=torch.bfloat16)
    hidden = low_hidden.detach().double().requires_grad_()
    head, exact_base = nn.Linear(D, V).double(), nn.Linear(D, V).double()
    head.load_state_dict(low_head.state_dict())
    exact_base.load_state_dict(base_head.state_dict())
    given = labels, weights["token"], "eaft", 0.3
    exact = reference.anchored_loss(head(hidden), *given, exact_base(base.double()))
    peer = reference.anchored_loss(low_head(low_hidden), *given, base_head(base))
    options = {"token_rule": "eaft", "kl_to_reference": 0.3}
    if fused:
        options["reference"] = base, base_head
        loss = fused_causal_lm_loss(low_hidden, low_head, *given[:2], **options)
    else:
        logits = low_head(low_hidden)
        loss = causal_lm_loss(logits, *given[:2], reference=base_head(base), **options)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= abs(peer - exact) + 2e-3 * exact
    true = gradients(exact, hidden, head)
    peers = gradients(peer, low_hidden, low_head)
    for ours, theirs, one in zip(gradients(loss, low_hidden, low_head), peers, true, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - one).norm() <= 1.1 * (theirs - one).norm() + 2e-3 * one.norm()


def test_autocast_leaves_the_divergence_in_float32():
    hidden, head, labels, _, base, base_head = make()
    options = {"token_rule": "dft", "kl_to_reference": 1.0}
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_causal_lm_loss(hidden, head, labels, reference=(base, base_head), **options)
    full, of_base = head(hidden), base_head(base)
    slow = reference.anchored_loss(full, labels, None, "dft", 1.0, of_base)
    torch.testing.assert_close(loss, slow.float(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("normalize", ["count", "weights"])
@pytest.mark.parametrize("rule", RULES)
def test_accumulated_parts_have_the_loss_of_the_whole(normalize, rule):
    hidden, head, labels, weights, base, base_head = make()
    options = {"normalize": normalize, "token_rule": rule, "kl_to_reference": 0.3}
    total = sum(
        count_items(row, w, normalize=normalize)
        for row, w in zip(labels.split(1), weights["sequence"].split(1), strict=True)
    )
    for fused in (False, True):
        parts = []
        for i in range(B):
            rows, given = slice(i, i + 1), {"num_items": total, **options}
            inputs = labels[rows], weights["sequence"][rows]
            if fused:
                given["reference"] = base[rows], base_head
                parts.append(fused_causal_lm_loss(hidden[rows], head, *inputs, **given))
            else:
                given["reference"] = base_head(base[rows])
                parts.append(causal_lm_loss(head(hidden[rows]), *inputs, **given))
        slow = reference.anchored_loss(
            head(hidden), labels, weights["sequence"], rule, 0.3, base_head(base)
        )
        slow = slow * count_items(labels) / total
        assert_same(sum(parts), slow, hidden, head)


def test_of_one_batch_by_weights_each_part_has_its_own_denominator():
    hidden, head, labels, weights, base, base_head = make()
    full, of_base, given = head(hidden), base_head(base), weights["sequence"]
    alone = causal_lm_loss(full, labels, given, normalize="weights", token_rule="eaft")
    divergences = kl_of_logits(of_base.flatten(0, 1), full.flatten(0, 1)).view(B, T)
    each = (labels[:, 1:] != -100) * given[:, None]
    expected = alone + 0.3 * (divergences[:, :-1] * each).sum() / each.sum()
    options = {"normalize": "weights", "token_rule": "eaft", "kl_to_reference": 0.3}
    ours = causal_lm_loss(full, labels, given, reference=of_base, **options)
    torch.testing.assert_close(ours, expected)
    pair = base, base_head
    fused = fused_causal_lm_loss(hidden, head, labels, given, reference=pair, **options)
    torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_padding_and_weights_of_zero_take_no_part_whatever_they_hold(fused):
    hidden, head, labels, weights, base, base_head = make()
    given = weights["sequence"].clone()
    given[1] = 0
    with torch.no_grad():
        hidden[1] = torch.nan
        base[0, 0], base[1], base[:, -1] = torch.nan, torch.inf, torch.nan
    options = {"token_rule": "eaft", "kl_to_reference": 0.3}
    if fused:
        options["reference"] = base, base_head
        loss = fused_causal_lm_loss(hidden, head, labels, given, **options)
    else:
        full = head(hidden)
        loss = causal_lm_loss(full, labels, given, reference=base_head(base), **options)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient[[0, 2]].isfinite().all()
    assert gradient[0, :2].eq(0).all()  # their labels are no targets


def test_the_model_itself_is_at_no_distance():
    hidden, head, labels, weights, *_ = make()
    head.requires_grad_(False)
    alone = fused_causal_lm_loss(hidden, head, labels, weights["token"])
    states = hidden.detach().clone()
    options = {"kl_to_reference": 10.0}
    loss = fused_causal_lm_loss(hidden, head, labels, weights["token"], reference=states, **options)
    assert loss == alone
    logits = head(hidden)
    loss = causal_lm_loss(logits, labels, weights["token"], reference=logits, **options)
    assert loss == causal_lm_loss(logits, labels, weights["token"])


@pytest.mark.parametrize("kind", [nn.Linear, CalledHead])
def test_a_reference_may_come_from_inference_mode(kind):
    hidden, head, labels, weights, base, base_head = make(kind=kind)
    options = {"token_rule": "dft", "kl_to_reference": 0.3}
    full, of_base = head(hidden), base_head(base)
    slow = reference.anchored_loss(full, labels, weights["token"], "dft", 0.3, of_base)
    with torch.inference_mode():
        states, of_base = base.clone(), base_head(base)
    ours = causal_lm_loss(full, labels, weights["token"], reference=of_base, **options)
    assert_same(ours, slow, hidden, head)
    pair = states, base_head
    ours = fused_causal_lm_loss(hidden, head, labels, weights["token"], reference=pair, **options)
    assert_same(ours, slow, hidden, head)


def test_tied_heads_have_both_gradients():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    head.weight = embedding.weight
    _, _, labels, weights, base, base_head = make(bias=False)
    ids = torch.randint(V, (B, T))
    options = {"token_rule": "eaft", "kl_to_reference": 0.3}

    def states():
        return torch.tanh(embedding(ids))

    slow = reference.anchored_loss(
        head(states()), labels, weights["token"], "eaft", 0.3, base_head(base)
    )
    pair = base, base_head
    ours = fused_causal_lm_loss(states(), head, labels, weights["token"], reference=pair, **options)
    (one,) = torch.autograd.grad(ours, embedding.weight)
    (other,) = torch.autograd.grad(slow, embedding.weight)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_weights_of_eaft_are_constants_and_lie_between_0_and_1():
    logits = torch.tensor([[5.0] * 20, [40.0] + [0.0] * 19, [9.0, 9.0] + [-100.0] * 18])
    weights = eaft_weights(logits, torch.ones(3, dtype=torch.bool))
    expected = [reference.top_entropy(row) for row in logits]
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)
    assert weights.tolist() == pytest.approx([1, 0, 0.6931 / 2.9957], abs=1e-4)
    assert eaft_weights(torch.zeros(2, 1), torch.ones(2, dtype=torch.bool)).tolist() == [0, 0]


def test_a_confident_conflict_counts_less_than_an_unsure_token():
    logits = torch.zeros(1, 3, V)
    logits[0, 0, 5] = 30.0  # sure of 5, told 4
    labels = torch.tensor([[0, 4, 4]])
    plain = causal_lm_loss(logits, labels)
    ruled = causal_lm_loss(logits, labels, token_rule="eaft")
    unsure = torch.tensor(float(V)).log()
    assert plain > 15
    torch.testing.assert_close(ruled, unsure / 2)


def test_classes_that_both_rule_out_do_not_differ():
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]], requires_grad=True)
    base = torch.tensor([[1.0, 0.0, -torch.inf], [0.0, -torch.inf, 2.0]])
    values = kl_of_logits(base, logits)
    p, q = base.softmax(1), logits.softmax(1)
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="none").nan_to_num(0.0).sum(1)
    torch.testing.assert_close(values, expected)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(gradient, (q - p).detach())
    assert kl_of_logits(logits, base).isinf().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(2, 3), (3, 4)])
def test_predictions_of_other_rows_or_classes_are_refused_by_their_shapes(shape):
    with pytest.raises(ValueError, match=rf"got \(2, 4\) and {re.escape(str(shape))}"):
        kl_of_logits(torch.zeros(2, 4), torch.zeros(shape))


def test_gradients_of_the_divergence_can_be_differentiated_again():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    base = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: kl_of_logits(base, z), logits)
    assert torch.autograd.gradgradcheck(lambda z: kl_of_logits(base, z), logits)


def test_the_loss_compiles_without_graph_breaks():
    torch.compiler.reset()
    logits, base, labels = torch.randn(2, 4, V), torch.randn(2, 4, V), torch.randint(V, (2, 4))
    options = {"token_rule": "eaft", "kl_to_reference": 0.1, "reference": base}
    compiled = torch.compile(causal_lm_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(logits, labels, **options), causal_lm_loss(logits, labels, **options)
    )


def test_a_strength_of_zero_is_no_divergence():
    hidden, head, labels, _, base, base_head = make()
    alone = fused_causal_lm_loss(hidden, head, labels)
    pair = base, base_head
    loss = fused_causal_lm_loss(hidden, head, labels, kl_to_reference=0, reference=pair)
    assert loss == alone


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kl_to_reference": 0.1}, ValueError, r"needs reference=, the reference model's logits"),
        ({"reference": torch.zeros(B, T, V)}, ValueError, "reference would be ignored without kl"),
        ({"kl_to_reference": -1, "reference": torch.zeros(B, T, V)}, ValueError, "and >= 0, got"),
        ({"kl_to_reference": "0.1", "reference": torch.zeros(B, T, V)}, ValueError, "got '0.1'"),
        ({"kl_to_reference": 0.1, "reference": "base"}, TypeError, "logits .*got 'base'"),
        ({"kl_to_reference": 0.1, "reference": torch.zeros(B, 2, V)}, ValueError, "same positions"),
        ({"kl_to_reference": 0.1, "reference": torch.zeros(B, T, 9)}, ValueError, r"24, 9\) and"),
        ({"token_rule": "Eaft"}, ValueError, "must be one of 'talr', 'dft', 'dro', 'eaft' or"),
    ],
)
def test_what_cannot_be_right_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        causal_lm_loss(torch.zeros(B, T, V), torch.zeros(B, T, dtype=torch.long), **options)


def test_a_reference_that_cannot_be_right_is_refused_by_the_fused_loss():
    hidden, head, labels, _, base, base_head = make()
    call = {"kl_to_reference": 0.1}
    with pytest.raises(
        ValueError, match=r"head is trained.*pass reference=\(hidden_states, head\)"
    ):
        fused_causal_lm_loss(hidden, head, labels, reference=base, **call)
    with pytest.raises(ValueError, match="head is trained"):  # the copy is the layer itself
        fused_causal_lm_loss(hidden, head, labels, reference=(base, head), **call)
    with pytest.raises(ValueError, match="of 9 and of 53 classes"):
        fused_causal_lm_loss(hidden, head, labels, reference=(base, nn.Linear(D, 9)), **call)
    with pytest.raises(ValueError, match="of the same positions"):
        fused_causal_lm_loss(hidden, head, labels, reference=(base[:1], base_head), **call)
    with pytest.raises(TypeError, match="head must be a module"):
        fused_causal_lm_loss(hidden, head, labels, reference=(base, base_head.weight), **call)
    with pytest.raises(ValueError, match="needs reference=, the reference model's hidden states"):
        fused_causal_lm_loss(hidden, head, labels, **call)
