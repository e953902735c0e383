"""The cross-entropies of logits: PyTorch's values and gradients, and what sets them apart."""

import pytest
import torch
import torch.nn.functional as F

from flowdata.head.cross_entropy import cross_entropies


def rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=dtype).requires_grad_()
    return logits, torch.randint(7, (5,), generator=generator), torch.rand(5, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_pytorchs(dtype):
    logits, targets, weights = rows(dtype)
    exact = logits.detach().double().requires_grad_()
    losses = cross_entropies(logits, targets)
    expected = F.cross_entropy(exact, targets, reduction="none")
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    (slow,) = torch.autograd.grad((expected * weights).sum(), exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, slow.to(dtype))


def test_a_row_whose_loss_is_not_used_has_a_gradient_of_zero():
    logits, targets, _ = rows()
    with torch.no_grad():
        logits[2] = torch.nan
    (gradient,) = torch.autograd.grad(cross_entropies(logits, targets)[[0, 1, 3, 4]].sum(), logits)
    assert gradient[2].eq(0).all()
    assert gradient.isfinite().all()


def test_gradients_can_be_differentiated_again():
    logits, targets, _ = rows()
    assert torch.autograd.gradgradcheck(lambda x: cross_entropies(x, targets), (logits,))
