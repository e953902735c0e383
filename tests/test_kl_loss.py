"""The KL divergence with gradients, against autograd on full logits in float64."""

import pytest
import torch

from flowdata.head import kl
from flowdata.head.kl import Predictions
from flowdata.head.kl_loss import kl_to
from flowdata.head.output_layer import Head


@pytest.mark.parametrize("tile", [(512, 1024), (7, 31)])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.4, 3.0)])
def test_gradients_are_those_of_autograd_on_full_logits(bias, scale, softcap, tile, monkeypatch):
    monkeypatch.setitem(kl._TILE, "cpu", tile)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 12), torch.randn(150, 12)
    offset = torch.randn(150) if bias else None
    base = Predictions(torch.randn(20, 12), Head(torch.randn(150, 12), None, scale, softcap))
    coefficients = torch.rand(20)

    def leaves(dtype):
        parts = [hidden, weight] if offset is None else [hidden, weight, offset]
        return [part.detach().to(dtype, copy=True).requires_grad_() for part in parts]

    ours, exact = leaves(torch.float32), leaves(torch.float64)
    values = kl_to(base, *ours, scale=scale, softcap=softcap)
    (values * coefficients).sum().backward()

    def logits(rows, matrix, vector=None):
        z = rows @ matrix.t() if vector is None else rows @ matrix.t() + vector
        return z * scale if softcap is None else softcap * torch.tanh(z * scale / softcap)

    p = logits(base.rows.double(), base.layer.weight.double()).log_softmax(1)
    expected = (p.exp() * (p - logits(*exact).log_softmax(1))).sum(1)
    (expected * coefficients).sum().backward()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_infinitely_far_away_has_no_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(3, 4)
    hidden[1, 0] = torch.nan
    hidden.requires_grad_()
    values = kl_to(
        Predictions(torch.randn(3, 4), Head(torch.randn(9, 4))), hidden, torch.randn(9, 4)
    )
    torch.log1p(values)[values.isfinite()].sum().backward()
    assert values.isinf().tolist() == [False, True, False]
    assert hidden.grad[[0, 2]].isfinite().all()
