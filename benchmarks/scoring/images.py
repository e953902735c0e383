"""Classifiers: images a second of the plain evaluation loop and of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import rows
from benchmarks.forgetting.images import resnet20
from flowdata.scoring.scorer import LossScorer

BATCH = 64


def resnet50() -> nn.Module:
    """Return ImageNet's ResNet-50 of random weights, as transformers builds it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def vit() -> nn.Module:
    """Return a ViT-S/16 of random weights: 12 layers, 384 wide."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    return ViTForImageClassification(ViTConfig(**sizes, num_labels=1000))


CASES: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {  # model, size, classes, images
    "resnet-20": (resnet20, 32, 10, 1024),
    "resnet-50": (resnet50, 224, 1000, 256),
    "vit": (vit, 224, 1000, 256),
}


def measure(name: str, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to score a case's images; their losses are compared first."""
    build, size, classes, count = CASES[name]
    torch.manual_seed(0)
    model = build().eval().to(device)
    images = torch.randn(count, 3, size, size)
    data = TensorDataset(images, torch.randint(0, classes, (count,)))
    ways: dict[str, Callable[[], Tensor]] = {
        "plain loop, float32": lambda: plain(model, data),
        "flowdata, float32": lambda: scored(model, data, "float32"),
        "plain loop, autocast": lambda: plain(model, data, autocast=True),
        "flowdata, bfloat16": lambda: scored(model, data, "bfloat16"),
    }
    exact, errors = plain(model, data), {}
    for way, run in ways.items():
        errors[way] = (run() - exact).abs().max().item()
    limits = {"float32": 1e-3, "bfloat16": 1.5 * errors["plain loop, autocast"] + 0.05}
    for dtype, limit in limits.items():
        if not (error := errors[f"flowdata, {dtype}"]) <= limit:
            raise SystemExit(f"{name}: flowdata's {dtype} losses are off by up to {error:.2g}")
    for way, times in rows.timed_in_turn(ways, repeats).items():
        speeds = [count / s for s in times]
        yield rows.row(f"{name}: {way}", speeds, "images/s", largest_error=errors[way])


def plain(model: nn.Module, data: TensorDataset, *, autocast: bool = False) -> Tensor:
    """Return the losses by the loop that people write."""
    losses = []
    device = next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for images, targets in DataLoader(data, batch_size=BATCH):
            output = model(images.to(device))
            logits = output if isinstance(output, Tensor) else output.logits
            each = F.cross_entropy(logits.float(), targets.to(device), reduction="none")
            losses.append(each.cpu())
    return torch.cat(losses)


def scored(model: nn.Module, data: TensorDataset, dtype: str) -> Tensor:
    """Return the losses by the library, which takes the model's fingerprint as well."""
    scorer = LossScorer(model, "cross_entropy", dtype=dtype, batch_size=BATCH, progress=False)
    return scorer.score(data, dataset_id="benchmark").losses
