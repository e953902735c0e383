"""What scoring is measured against: the loop that people write, and what the hardware can do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.cli.bench_inputs import Samples
from flowdata.scoring.collate import pad_collate
from flowdata.targets.labels import IGNORE_INDEX


def usual_loop(model: Any, samples: Samples, batch_size: int = 8) -> Tensor:
    """Return the (N,) losses of samples by the loop that most people write.

    Its batches are random and padded, it makes all logits, and it computes in the model's dtype.
    """
    device = next(model.parameters()).device
    order = random.Random(0).sample(range(len(samples)), len(samples))
    losses = torch.empty(len(samples))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = pad_collate([samples[index] for index in indices])
            batch = {name: value.to(device) for name, value in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").float()
            losses[indices] = (each.sum(1) / (labels != IGNORE_INDEX).sum(1)).cpu()
    return losses


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Return the FLOP/s of large square matrix products, the best of ten."""
    product, flops_of_it = square_product(dtype, device, size)
    product()
    return flops_of_it / min(seconds_of(product) for _ in range(10))


def square_product(
    dtype: torch.dtype, device: torch.device, size: int | None = None
) -> tuple[Callable[[], object], float]:
    """Return a call that multiplies two large square matrices, and its FLOPs."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left = torch.randn(size, size, device=device).to(dtype)
    right, out = torch.randn(size, size, device=device).to(dtype), torch.empty_like(left)
    return partial(torch.mm, left, right, out=out), 2.0 * size**3


def flops(model: Any, samples: Samples) -> float:
    """Return the floating point operations that scoring can't do without.

    These are one pass of every token through the layers, causal attention within each sample, and
    the head at target positions only. Norms and the like are not counted.
    """
    config = model.config
    body: float = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head
    )
    body += sum(parameter.numel() * _share_run(config) for parameter in _experts(model))
    attention = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    total = 0.0
    for sample in samples:
        length = len(sample["input_ids"])
        targets = int((sample["labels"][1:] != IGNORE_INDEX).sum())
        total += 2 * body * length + 2 * attention * length**2
        total += 2 * model.lm_head.weight.numel() * targets
    return total


def _experts(model: torch.nn.Module) -> Iterator[Tensor]:
    """The weights of experts, which transformers keeps in one tensor for all of a layer."""
    return (parameter for parameter in model.parameters() if parameter.ndim == 3)


def _share_run(config: Any) -> float:
    """The share of a layer's experts that one token runs through."""
    share: float = config.num_experts_per_tok / config.num_local_experts
    return share


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds of a call, until the GPU has finished its work as well."""
    start = perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start
