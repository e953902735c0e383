"""Weighted losses against their slow versions, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from flowdata.losses import causal_lm_loss, count_items, target_weights, weighted_mean
from tests import reference

B, T, V = 3, 6, 11
NORMALIZE = ("count", "weights")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, :2] = -100
    labels[1, 4:] = -100
    weights = torch.rand(B, generator=generator)
    token_weights = torch.rand(B, T, generator=generator)
    return logits, labels, {"none": None, "sequence": weights, "token": token_weights}


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_weighted_mean_is_the_slow_sum(normalize, shape):
    generator = torch.Generator().manual_seed(1)
    losses, weights = torch.rand(2, *shape, generator=generator)
    weights.flatten()[2] = 0
    value = weighted_mean(losses, weights, normalize=normalize)
    flat = losses.flatten().tolist(), weights.flatten().tolist()
    assert value.item() == pytest.approx(reference.weighted_mean(*flat, normalize), rel=1e-6)
    value = weighted_mean(losses, weights, normalize=normalize, num_items=3.5)
    assert value.item() == pytest.approx(reference.weighted_mean(*flat, num_items=3.5), rel=1e-6)


@pytest.mark.parametrize("kind", ["none", "sequence", "token"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_causal_lm_loss_is_the_slow_sum(batch, kind, normalize):
    logits, labels, weights = batch
    for num_items in (None, 4.0, torch.tensor(4)):
        value = causal_lm_loss(
            logits, labels, weights[kind], normalize=normalize, num_items=num_items
        )
        slow = reference.causal_lm_loss(logits, labels, weights[kind], normalize, num_items)
        assert value.item() == pytest.approx(slow, rel=1e-5)


def test_causal_lm_loss_without_weights_is_cross_entropy(batch):
    logits, labels, _ = batch
    plain = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(causal_lm_loss(logits, labels), plain)
    torch.testing.assert_close(causal_lm_loss(logits, labels, torch.ones(B)), plain)


def test_another_ignore_index_marks_the_positions_without_target(batch):
    logits, labels, weights = batch
    other = torch.where(labels == -100, V + 5, labels)
    assert causal_lm_loss(logits, other, weights["token"], ignore_index=V + 5) == causal_lm_loss(
        logits, labels, weights["token"]
    )
    assert count_items(other, ignore_index=V + 5) == count_items(labels)


@pytest.mark.parametrize("kind", ["none", "sequence", "token"])
def test_gradients_pass_gradcheck_in_float64(batch, kind):
    logits, labels, weights = batch
    logits = logits.double().requires_grad_()
    weights = None if weights[kind] is None else weights[kind].double().requires_grad_()
    assert causal_lm_loss(logits, labels, weights).dtype == torch.float64
    inputs = (logits,) if weights is None else (logits, weights)
    assert torch.autograd.gradcheck(lambda x, *w: causal_lm_loss(x, labels, *w), inputs)
    losses = torch.rand(4, dtype=torch.float64, requires_grad=True)
    scales = torch.rand(4, dtype=torch.float64, requires_grad=True)
    for normalize in NORMALIZE:
        assert torch.autograd.gradcheck(
            lambda x, w, n=normalize: weighted_mean(x, w, normalize=n), (losses, scales)
        )


def test_weight_zero_takes_no_part_even_if_the_loss_is_not_finite():
    losses = torch.tensor([2.0, torch.nan, torch.inf], requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 0.0])
    for normalize, expected in (("count", 1 / 3), ("weights", 2.0)):
        value = weighted_mean(losses, weights, normalize=normalize)
        (gradient,) = torch.autograd.grad(value, losses)
        assert value.item() == pytest.approx(expected)
        assert gradient[1:].eq(0).all()
        assert gradient[0] > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_causal_lm_loss_leaves_out_rows_of_weight_zero_with_bad_logits(batch, bad):
    logits, labels, _ = batch
    logits[1] = bad
    logits.requires_grad_()
    value = causal_lm_loss(logits, labels, torch.tensor([1.0, 0.0, 0.5]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient[1].eq(0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_all_zero_weights_and_no_targets_give_zero(batch, normalize):
    logits, labels, _ = batch
    logits.requires_grad_()
    for labels_now, weights in (
        (labels, torch.zeros(B)),
        (torch.full_like(labels, -100), torch.ones(B)),
        (labels[:, :1], torch.ones(B)),
    ):
        value = causal_lm_loss(
            logits[:, : labels_now.shape[1]], labels_now, weights, normalize=normalize
        )
        (gradient,) = torch.autograd.grad(value, logits)
        assert value == 0
        assert gradient.eq(0).all()
    assert weighted_mean(torch.ones(3), torch.zeros(3), normalize=normalize) == 0


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("kind", ["none", "sequence", "token"])
@pytest.mark.parametrize("parts", [1, 3])
def test_num_items_makes_accumulated_gradients_those_of_the_full_batch(
    batch, normalize, kind, parts
):
    logits, labels, weights = batch
    logits.requires_grad_()
    weights = weights[kind]
    (full,) = torch.autograd.grad(
        causal_lm_loss(logits, labels, weights, normalize=normalize), logits
    )
    pieces = [slice(i, B, parts) for i in range(parts)]
    split = [(piece, None if weights is None else weights[piece]) for piece in pieces]
    items = sum(count_items(labels[piece], w, normalize=normalize) for piece, w in split)
    summed = torch.zeros_like(logits)
    for piece, w in split:
        loss = causal_lm_loss(logits[piece], labels[piece], w, normalize=normalize, num_items=items)
        summed += torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(summed, full, rtol=1e-5, atol=1e-7)


def test_low_precision_losses_are_reduced_in_float32(batch):
    logits, labels, weights = batch
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = causal_lm_loss(low, labels, weights["sequence"].bfloat16())
        mean = weighted_mean(torch.full((1000,), 1.01).bfloat16(), torch.ones(1000))
    slow = reference.causal_lm_loss(low, labels, weights["sequence"].bfloat16())
    assert value.dtype == mean.dtype == torch.float32
    assert value.item() == pytest.approx(slow, rel=1e-5)
    assert mean.item() == pytest.approx(torch.tensor(1.01).bfloat16().item(), rel=1e-6)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_compiles_without_graph_breaks(batch, normalize):
    torch.compiler.reset()
    logits, labels, weights = batch
    compiled_mean = torch.compile(weighted_mean, fullgraph=True, backend="aot_eager")
    compiled_loss = torch.compile(causal_lm_loss, fullgraph=True, backend="aot_eager")
    losses = torch.rand(B, requires_grad=True)
    value = compiled_mean(losses, weights["sequence"], normalize=normalize)
    torch.testing.assert_close(
        value, weighted_mean(losses, weights["sequence"], normalize=normalize)
    )
    for kind in weights.values():
        for num_items in (None, torch.tensor(5)):
            options = {"normalize": normalize, "num_items": num_items}
            inputs = logits.clone().requires_grad_()
            value = compiled_loss(inputs, labels, kind, **options)
            eager = causal_lm_loss(inputs, labels, kind, **options)
            torch.testing.assert_close(value, eager)
            torch.testing.assert_close(
                torch.autograd.grad(value, inputs), torch.autograd.grad(eager, inputs)
            )


def test_nothing_waits_for_the_device(batch):
    """On the meta device a value can't be read: any host synchronisation would raise."""
    logits, labels, weights = (
        part.to("meta") if isinstance(part, torch.Tensor) else part for part in batch
    )
    for normalize in NORMALIZE:
        assert causal_lm_loss(logits, labels, normalize=normalize).is_meta
        moved = {k: None if w is None else w.to("meta") for k, w in weights.items()}
        for kind in moved.values():
            assert causal_lm_loss(logits, labels, kind, normalize=normalize).is_meta
        assert weighted_mean(logits[0, 0], logits[1, 0], normalize=normalize).is_meta


def test_per_label_weights_belong_to_the_label_and_not_to_the_position_before(batch):
    logits, labels, _ = batch
    weights = torch.zeros(B, T)
    weights[2, 3] = 1.0
    expected = F.cross_entropy(logits[2, 2], labels[2, 3])
    value = causal_lm_loss(logits, labels, weights, normalize="weights")
    torch.testing.assert_close(value, expected)
    assert target_weights(labels, weights).nonzero().tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "a model's own `.loss`", lambda: weighted_mean(torch.tensor(1.0), V)),
        (
            ValueError,
            r"shape of losses, \(3,\), got \(3, 1\)",
            lambda: weighted_mean(torch.ones(3), torch.ones(3, 1)),
        ),
        (TypeError, "losses must be a tensor, got list", lambda: weighted_mean([1.0, 2.0], V)),
        (TypeError, "weights must be a tensor, got int", lambda: weighted_mean(torch.ones(2), 1)),
        (
            ValueError,
            r"shape of losses, \(2, 3\), got \(2,\).* Make one loss of each sample first",
            lambda: weighted_mean(torch.ones(2, 3), torch.ones(2)),
        ),
        (
            ValueError,
            r"labels must lie in \[0, 4\) or be ignore_index, got 4",
            lambda: causal_lm_loss(torch.ones(1, 3, 4), torch.tensor([[0, 4, -100]])),
        ),
        (TypeError, "losses must be floating", lambda: weighted_mean(torch.ones(2).long(), V)),
        (
            ValueError,
            "normalize must be 'count'",
            lambda: weighted_mean(torch.ones(2), torch.ones(2), normalize="mean"),
        ),
        (
            ValueError,
            r"\(B,\) = \(2,\).*got \(3,\)",
            lambda: causal_lm_loss(torch.ones(2, 3, 4), torch.ones(2, 3).long(), torch.ones(3)),
        ),
        (
            ValueError,
            r"unshifted; got \(2, 2\)",
            lambda: causal_lm_loss(torch.ones(2, 3, 4), torch.ones(2, 2).long()),
        ),
        (
            TypeError,
            "labels must be int64",
            lambda: causal_lm_loss(torch.ones(2, 3, 4), torch.ones(2, 3)),
        ),
        (
            TypeError,
            "must be floating",
            lambda: causal_lm_loss(torch.ones(2, 3, 4).long(), torch.ones(2, 3).long()),
        ),
    ],
)
def test_what_cannot_be_right_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_weights_and_items_below_0_are_refused():
    losses = torch.ones(3)
    with pytest.raises(ValueError, match=r"weights must be >= 0, got -1\.0"):
        weighted_mean(losses, torch.tensor([-1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="num_items must be at least 0, got -2"):
        weighted_mean(losses, losses, num_items=-2)
    with pytest.raises(ValueError, match=r"num_items must be one number, got shape \(3,\)"):
        weighted_mean(losses, losses, num_items=losses)
