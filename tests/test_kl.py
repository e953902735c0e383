"""Divergences of two output layers, tile by tile, against full logits in float64."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from flowdata.head import kl
from flowdata.head.kl import Predictions, divergences
from flowdata.head.output_layer import Head
from tests import reference
from tests.interpreted import check_in_interpreter


def pair(distance, *, bias=False, scale=1.0, softcap=None, rows=70, width=24, classes=2500):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width), torch.randn(classes, width) * 0.5
    offset = torch.randn(classes) if bias else None
    base = Predictions(hidden, Head(weight, offset, scale, softcap))
    moved = Head(weight + 0.1 * distance * torch.randn_like(weight), offset, scale, softcap)
    return base, Predictions(hidden + distance * torch.randn_like(hidden), moved)


@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("case", [{}, {"bias": True, "scale": 0.3}, {"scale": 2.0, "softcap": 5.0}])
def test_divergences_are_those_of_full_logits_in_float64(distance, case):
    base, tuned = pair(distance, **case)
    values = divergences(base, tuned)
    expected = reference.divergences(*(full_logits(each) for each in (base, tuned)))
    for name in ("kl", "reverse_kl"):
        ours, theirs = getattr(values, name), expected[name]
        assert float((ours - theirs).abs().max()) < 1e-5
        torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=1e-3, atol=0)
    assert torch.equal(values.agreement, expected["agreement"])


@pytest.mark.parametrize("distance", [1e-4, 1e-3])
@pytest.mark.parametrize("case", [{}, {"bias": True}, {"scale": 2.0, "softcap": 5.0}])
def test_rows_that_hardly_differ_are_told_by_what_they_differ(distance, case):
    base, tuned = pair(distance, **case)
    values = divergences(base, tuned)
    expected = reference.divergences(*(full_logits(each) for each in (base, tuned)))
    for name in ("kl", "reverse_kl"):
        ours, theirs = getattr(values, name), expected[name]
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
        torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("level", [-5.0, 5.0, 60.0])
def test_one_rare_class_that_became_likelier_is_seen_among_near_ones(level):
    torch.manual_seed(0)
    logits = torch.randn(4, 300).sub_(torch.arange(300) * 0.3)
    moved = logits.clone()
    moved[:, -1] = logits.logsumexp(1) - 10  # from e-39 or so to 4.5e-5
    moved[1, :-1] += level * 1e-6
    head = Head(torch.eye(300))
    values = divergences(Predictions(logits, head), Predictions(moved, head))
    expected = reference.divergences(logits.double(), moved.double())
    torch.testing.assert_close(values.kl, expected["kl"], rtol=1e-3, atol=0)
    torch.testing.assert_close(values.reverse_kl, expected["reverse_kl"], rtol=1e-3, atol=0)


def full_logits(predictions):
    layer = predictions.layer
    z = predictions.rows.double() @ layer.weight.double().t()
    z = (z if layer.bias is None else z + layer.bias.double()) * layer.scale
    return z if layer.softcap is None else layer.softcap * torch.tanh(z / layer.softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_diverge_from_itself(dtype):
    base, _ = pair(1.0)
    base = Predictions(base.rows.to(dtype), Head(base.layer.weight.to(dtype)))
    values = divergences(base, base)
    assert not values.kl.any()
    assert not values.reverse_kl.any()
    assert values.agreement.all()


def test_the_size_of_tiles_changes_nothing_but_rounding(monkeypatch):
    base, tuned = pair(0.3)
    whole = divergences(base, tuned)
    monkeypatch.setitem(kl._TILE, "cpu", (7, 31))
    parts = divergences(base, tuned)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-5, atol=1e-6)
    assert torch.equal(parts.agreement, whole.agreement)


def test_layers_that_have_to_be_called_give_the_same():
    base, tuned = pair(0.3)
    expected = divergences(base, tuned)
    called = [nn.Linear(24, 2500, bias=False) for _ in range(2)]
    for layer, each in zip(called, (base, tuned), strict=True):
        layer.weight.data = each.layer.weight
    both = divergences(Predictions(base.rows, called[0]), Predictions(tuned.rows, called[1]))
    one = divergences(base, Predictions(tuned.rows, called[1]))
    for values in (both, one):
        torch.testing.assert_close(values.kl, expected.kl, rtol=1e-5, atol=1e-6)


def test_classes_that_a_bias_rules_out_count_for_nothing():
    base, tuned = pair(0.3)
    bias = torch.zeros(2500).index_fill_(0, torch.arange(100, 2500), -torch.inf)
    masked = [Predictions(e.rows, Head(e.layer.weight, bias)) for e in (base, tuned)]
    cut = [Predictions(e.rows, Head(e.layer.weight[:100])) for e in (base, tuned)]
    torch.testing.assert_close(divergences(*masked).kl, divergences(*cut).kl, rtol=1e-5, atol=1e-6)


def test_a_class_that_became_impossible_is_infinitely_far_away():
    base, tuned = pair(0.3)
    bias = torch.zeros(2500).index_fill_(0, torch.tensor([7]), -torch.inf)
    masked = Predictions(tuned.rows, Head(tuned.layer.weight, bias))
    assert divergences(base, masked).kl.isinf().all()
    assert divergences(masked, base).kl.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_infinitely_far_away_in_its_row_alone(value):
    base, tuned = pair(0.3)
    rows = tuned.rows.clone()
    rows[3, 2] = value
    values = divergences(base, Predictions(rows, tuned.layer))
    assert values.kl.isinf().nonzero().flatten().tolist() == [3]
    assert values.agreement[3] == 0


def test_other_numbers_of_classes_are_refused():
    base, _ = pair(0.3)
    with pytest.raises(ValueError, match="2500 and of 3 classes"):
        divergences(base, Predictions(base.rows, Head(torch.randn(3, 24))))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_kl_triton.py runs on the GPU")
def test_the_triton_kernel_holds_in_its_interpreter():
    check_in_interpreter("tests/test_kl_triton.py")
