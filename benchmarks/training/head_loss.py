"""Head and loss of one batch: by hand, by `causal_lm_loss` on full logits, and fused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.training.clock import now, peak_memory
from flowdata.losses import causal_lm_loss, fused_causal_lm_loss

LOSSES = ("by hand", "full", "fused")


def check_equal(width: int, size: int) -> None:
    """Check that loss and gradients of all three agree."""
    results = []
    for loss in LOSSES:
        step, head, hidden = _step(loss, size, 64, width, torch.float32, "cpu")
        results.append((step(), hidden.grad, head.weight.grad))
    for values in zip(*results, strict=True):
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-4, atol=1e-6)


def measure(loss: str, size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return time and peak memory of the loss of one batch, its gradients included."""
    dtype = getattr(torch, options.dtype)
    step, head, hidden = _step(loss, size, options.tokens, options.width, dtype, options.device)
    memory = peak_memory(step, options.device)
    seconds = []
    for _ in range(max(3, options.steps // 4)):
        head.weight.grad = hidden.grad = None
        start = now(options.device)
        step()
        seconds.append(now(options.device) - start)
    more = {"vocabulary": size, "tokens": options.tokens, "width": options.width}
    more |= {"dtype": options.dtype, "device": options.device}
    return [
        rows.row(f"{size}: {loss} time", seconds, "s", **more),
        rows.row(f"{size}: {loss} memory", [memory], "MiB", **more),
    ]


def _step(
    loss: str, size: int, tokens: int, width: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[], Tensor], nn.Linear, Tensor]:
    """Return a function that makes loss and gradients, and the two that get these gradients."""
    torch.manual_seed(0)
    head = nn.Linear(width, size, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(4, tokens // 4, width, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(size, (4, tokens // 4), device=device)
    weights = torch.rand(4, device=device)

    def step() -> Tensor:
        if loss == "fused":
            value = fused_causal_lm_loss(hidden, head, labels, weights)
        elif loss == "full":
            value = causal_lm_loss(head(hidden), labels, weights)
        else:
            logits, targets = head(hidden)[:, :-1].float(), labels[:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            value = (losses * weights[:, None]).sum() / targets.numel()
        value.backward()
        return value.detach()

    return step, head, hidden
