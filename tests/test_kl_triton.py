"""The Triton kernel of divergences against full logits, on a GPU or in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/test_kl_triton.py, as test_kl.py runs it.
"""

import os

import pytest
import torch

from flowdata.head.kl import Predictions, divergences
from flowdata.head.output_layer import Head
from tests import reference

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; run this file with TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
LOW = torch.float16 if INTERPRETED else torch.bfloat16  # which the interpreter can't multiply


def full_logits(predictions):
    layer = predictions.layer
    z = predictions.rows.double() @ layer.weight.double().t()
    z = (z if layer.bias is None else z + layer.bias.double()) * layer.scale
    return z if layer.softcap is None else layer.softcap * torch.tanh(z / layer.softcap)


def pair(rows, width, classes, dtype, *, bias=False, scale=1.0, softcap=None):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=DEVICE)
    weight = torch.randn(classes, width, device=DEVICE) * 0.5
    offset = torch.randn(classes, device=DEVICE, dtype=dtype) if bias else None
    moved = weight + 0.05 * torch.randn_like(weight)
    return [
        Predictions(h.to(dtype), Head(w.to(dtype), offset, scale, softcap, "triton"))
        for h, w in ((hidden, weight), (hidden + 0.1 * torch.randn_like(hidden), moved))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("case", [(False, 1.0, None), (True, 0.3, None), (True, 0.7, 5.0)])
@pytest.mark.parametrize(("rows", "width", "classes"), [(70, 70, 300), (3, 64, 129)])
def test_the_kernel_gives_the_divergences_of_full_logits(rows, width, classes, case, dtype):
    bias, scale, softcap = case
    base, tuned = pair(rows, width, classes, dtype, bias=bias, scale=scale, softcap=softcap)
    values = divergences(base, tuned)
    expected = reference.divergences(full_logits(base), full_logits(tuned))
    torch.testing.assert_close(values.kl, expected["kl"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(values.reverse_kl, expected["reverse_kl"], rtol=1e-3, atol=1e-5)
    assert torch.equal(values.agreement, expected["agreement"])
    itself = divergences(base, base)
    assert not itself.kl.any()
    assert itself.agreement.all()


def test_rows_that_hardly_differ_are_told_by_what_they_differ():
    base, _ = pair(9, 64, 300, torch.float32)
    rows = base.rows + 1e-4 * torch.randn_like(base.rows)
    tuned = Predictions(rows, base.layer)
    values = divergences(base, tuned)
    expected = reference.divergences(full_logits(base), full_logits(tuned))
    for name in ("kl", "reverse_kl"):
        ours, theirs = getattr(values, name), expected[name]
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
        torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=2e-3, atol=0)


def test_classes_that_a_bias_rules_out_count_for_nothing():
    base, tuned = pair(5, 16, 300, torch.float32)
    ruled_out = torch.arange(128, 300, device=DEVICE)
    bias = torch.zeros(300, device=DEVICE).index_fill_(0, ruled_out, -torch.inf)
    masked = [
        Predictions(e.rows, Head(e.layer.weight, bias, kernel="triton")) for e in (base, tuned)
    ]
    cut = [Predictions(e.rows, Head(e.layer.weight[:128])) for e in (base, tuned)]
    torch.testing.assert_close(divergences(*masked).kl, divergences(*cut).kl, rtol=1e-4, atol=1e-6)


def test_a_row_that_is_no_number_is_infinitely_far_away():
    base, tuned = pair(5, 16, 300, torch.float32)
    rows = tuned.rows.clone()
    rows[2, 0] = torch.nan
    values = divergences(base, Predictions(rows, tuned.layer))
    assert values.kl.isinf().tolist() == [False, False, True, False, False]
