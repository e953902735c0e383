"""The fused loss against the loss of full logits, and that it never holds them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from flowdata.head import gradients as tile_gradients
from flowdata.losses import causal_lm_loss, count_items, fused_causal_lm_loss
from tests import reference

B, T, D, V = 3, 8, 6, 50
LOGITS = [{}, {"softcap": 2.0}, {"logit_scale": 0.3}, {"softcap": 1.5, "logit_scale": 1.7}]


@pytest.fixture(autouse=True)
def _many_small_tiles(monkeypatch):
    monkeypatch.setattr(tile_gradients, "_LOGITS_OF_A_TILE", 4 * V)
    monkeypatch.setattr(tile_gradients, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(tile_gradients, "_CLASSES_AT_ONCE", 16)


class CalledHead(nn.Linear):
    """No plain linear layer, so it must be called."""


def make(dtype=torch.float32, bias=False, kind=nn.Linear, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = kind(D, V, bias=bias)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(B, T, D, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, :3] = -100
    labels[1, 6:] = -100
    weights = {
        "none": None,
        "sequence": torch.tensor([0.3, 1.0, 0.6]),
        "token": torch.rand(B, T, generator=generator),
    }
    weights["token"][2, 3] = 0
    return hidden.to(dtype).requires_grad_(), head.to(dtype), labels, weights


def full(hidden, head, labels, weights, softcap=None, logit_scale=1.0, **options):
    logits = reference.head_logits(hidden, head, softcap, logit_scale)
    return causal_lm_loss(logits, labels, weights, **options)


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


@pytest.mark.parametrize("kind", [nn.Linear, CalledHead])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", ["none", "sequence", "token"])
@pytest.mark.parametrize("logits", LOGITS)
def test_loss_and_gradients_are_those_of_full_logits(kind, bias, weighted, logits):
    hidden, head, labels, weights = make(bias=bias, kind=kind)
    for options in ({}, {"normalize": "weights"}, {"num_items": torch.tensor(7)}):
        options |= logits
        loss = fused_causal_lm_loss(hidden, head, labels, weights[weighted], **options)
        expected = full(hidden, head, labels, weights[weighted], **options)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradients(3 * loss, hidden, head),
            gradients(3 * expected, hidden, head),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("kind", [nn.Linear, CalledHead])
@pytest.mark.parametrize("rule", ["talr", "dft", "dro"])
def test_token_rules_are_those_of_full_logits(kind, rule):
    hidden, head, labels, weights = make(kind=kind)
    for normalize in ("count", "weights"):
        options = {"token_rule": rule, "normalize": normalize, "softcap": 3.0}
        loss = fused_causal_lm_loss(hidden, head, labels, weights["token"], **options)
        expected = full(hidden, head, labels, weights["token"], **options)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradients(loss, hidden, head), gradients(expected, hidden, head), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", [nn.Linear, CalledHead])
@pytest.mark.parametrize("logits", LOGITS)
def test_gradients_pass_gradcheck_in_float64(kind, logits):
    hidden, head, labels, weights = make(torch.float64, bias=True, kind=kind)
    token_weights = weights["token"].double().clamp_min(0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda hidden, token_weights, *parameters: fused_causal_lm_loss(
            hidden, head, labels, token_weights, num_items=5.0, **logits
        ),
        (hidden, token_weights, head.weight, head.bias),
    )


def test_a_second_backward_pass_and_accumulation_add_the_same_again():
    hidden, head, labels, weights = make(bias=True)
    loss = fused_causal_lm_loss(hidden, head, labels, weights["token"])
    (2 * loss).backward(retain_graph=True)
    once = [p.grad.clone() for p in (hidden, *head.parameters())]
    (2 * loss).backward()
    for parameter, gradient in zip((hidden, *head.parameters()), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_a_frozen_head_and_no_gradient_at_all():
    hidden, head, labels, weights = make(bias=True)
    expected = full(hidden, head, labels, weights["token"])
    (slope,) = torch.autograd.grad(expected, hidden)
    head.requires_grad_(False)
    loss = fused_causal_lm_loss(hidden, head, labels, weights["token"])
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], slope)
    with torch.no_grad():
        loss = fused_causal_lm_loss(hidden, head, labels, weights["token"])
    torch.testing.assert_close(loss, expected)


def test_weights_of_zero_and_ignored_positions_never_reach_the_head():
    hidden, _, labels, weights = make()
    seen = []
    head = CalledHead(D, V)
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    token_weights = weights["token"].clone()
    token_weights[0] = 0
    with torch.no_grad():
        hidden[0] = torch.nan
    loss = fused_causal_lm_loss(hidden, head, labels, token_weights)
    in_part = (labels[1:, 1:] != -100) & (token_weights[1:, 1:] != 0)
    assert sum(seen) == in_part.sum()
    gradient, *rest = gradients(loss, hidden, head)
    assert gradient[0].eq(0).all()
    assert all(part.isfinite().all() for part in (gradient, *rest))


def hardest(losses, takes_part):
    """A rule of a user's own, which can't do without a loss."""
    return losses / losses.max()


@pytest.mark.parametrize("rule", [None, "talr", "dft", "dro", "eaft", hardest])
@pytest.mark.parametrize("kind", [nn.Linear, CalledHead])
def test_nothing_to_learn_gives_zero(kind, rule):
    hidden, head, labels, _ = make(kind=kind)
    for now, weights in (
        (labels, torch.zeros(B)),
        (torch.full_like(labels, -100), torch.ones(B)),
        (labels[:, :1], None),
    ):
        loss = fused_causal_lm_loss(hidden[:, : now.shape[1]], head, now, weights, token_rule=rule)
        assert loss == 0
        if loss.requires_grad:
            for part in torch.autograd.grad(loss, [hidden, head.weight], allow_unused=True):
                assert part is None or part.eq(0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_no_worse_than_low_precision_logits(autocast):
    hidden, head, labels, weights = make(torch.float64, bias=True)
    exact = full(hidden, head, labels, weights["token"].double())
    exact_gradients = gradients(exact, hidden, head)
    dtype = torch.float32 if autocast else torch.bfloat16
    low_head = nn.Linear(D, V).to(dtype)
    low_head.load_state_dict(head.state_dict())
    low_hidden = hidden.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = low_head(low_hidden)
        peer = causal_lm_loss(logits, labels, weights["token"])
        loss = fused_causal_lm_loss(low_hidden, low_head, labels, weights["token"])
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= abs(peer - exact) + 2e-3 * exact
    peers = gradients(peer, low_hidden, low_head)
    for ours, theirs, true in zip(
        gradients(loss, low_hidden, low_head), peers, exact_gradients, strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert (ours - true).norm() <= 1.1 * (theirs - true).norm() + 2e-3 * true.norm()


def test_accumulated_batches_have_the_gradients_of_the_full_one():
    hidden, head, labels, weights = make()
    expected = gradients(full(hidden, head, labels, weights["sequence"]), hidden, head)
    items = sum(count_items(row) for row in labels.split(1))
    losses = [
        fused_causal_lm_loss(h, head, row, weight, num_items=items)
        for h, row, weight in zip(
            hidden.split(1), labels.split(1), weights["sequence"].split(1), strict=True
        )
    ]
    torch.testing.assert_close(gradients(sum(losses), hidden, head), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("held", [False, True], ids=["plain", "eaft and a reference"])
def test_the_logits_of_all_tokens_are_never_held(held):
    """Peak memory in a process of its own, against the size of the full logits alone."""
    code = f"""
import resource, torch
from flowdata.losses import fused_causal_lm_loss
torch.set_num_threads(1)
head = torch.nn.Linear(16, 65536, bias=False)
hidden = torch.randn(1, 2048, 16, requires_grad=True)
labels = torch.randint(65536, (1, 2048))
base = torch.randn(1, 2048, 16), torch.nn.Linear(16, 65536, bias=False)
def loss(n):
    reference = base[0][:, :n], base[1]
    options = dict(token_rule="eaft", kl_to_reference=1, reference=reference) if {held} else dict()
    return fused_causal_lm_loss(hidden[:, :n], head, labels[:, :n], **options)
loss(4).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(2048).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    full_logits = 2048 * 65536 * 4 // 1024  # KiB
    assert int(run.stdout) < 0.5 * full_logits


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "head must be a module", {"head": torch.ones(V, D)}),
        (ValueError, r"labels must lie in \[0, 50\) or be ignore_index, got 51", {"labels": 51}),
        (ValueError, r"labels must be \(B, T\)", {"labels": torch.ones(B, T + 1).long()}),
        (ValueError, "normalize must be", {"normalize": "mean"}),
        (ValueError, r"weights must be \(B,\) = \(3,\)", {"weights": torch.ones(4)}),
    ],
)
def test_what_cannot_be_right_is_refused(error, message, change):
    hidden, head, labels, weights = make()
    inputs = {"head": head, "labels": labels, "weights": weights["token"]} | change
    if isinstance(inputs["labels"], int):
        inputs["labels"] = labels.clone().index_fill_(1, torch.tensor(4), inputs["labels"])
    with pytest.raises(error, match=message):
        fused_causal_lm_loss(hidden, **inputs)
