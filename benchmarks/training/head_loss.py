"""Head and loss of one batch: by hand, by `causal_lm_loss` on full logits, and fused.

Liger's fused loss, on a GPU, takes no weights, so its row is of the unweighted mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.rows import now, peak_memory
from flowdata.losses import causal_lm_loss, fused_causal_lm_loss

LOSSES = ("by hand", "full", "fused")


def losses_on(device: str) -> list[str]:
    """Return the names of the losses that run on a device."""
    has_liger = device != "cpu" and find_spec("liger_kernel") is not None
    return [*LOSSES, *(["Liger, without weights"] if has_liger else [])]


def check_equal(width: int, size: int, device: str = "cpu", losses: Sequence[str] = LOSSES) -> None:
    """Check that all give the same loss and gradients; weights are 1 if one of them takes none."""
    weighted = set(losses) <= set(LOSSES)
    results = []
    for loss in losses:
        step, head, hidden = _step(loss, size, 64, width, torch.float32, device, weighted=weighted)
        results.append((step(), hidden.grad, head.weight.grad))
    for values in zip(*results, strict=True):
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-3, atol=1e-5)


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
    loss: str,
    size: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    *,
    weighted: bool = True,
) -> tuple[Callable[[], Tensor], nn.Linear, Tensor]:
    """Return a function that makes loss and gradients, and the two that get these gradients."""
    torch.manual_seed(0)
    head = nn.Linear(width, size, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(4, tokens // 4, width, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(size, (4, tokens // 4), device=device)
    weights = torch.rand(4, device=device) if weighted else torch.ones(4, device=device)

    def step() -> Tensor:
        if loss.startswith("Liger"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            flat, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            value = LigerFusedLinearCrossEntropyLoss()(head.weight, flat, targets)
        elif loss == "fused":
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
