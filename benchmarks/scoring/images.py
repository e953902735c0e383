"""Classifiers: images a second of the plain evaluation loop and of the library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import rows
from flowdata.scoring.scorer import LossScorer

BATCH = 64


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, as in CIFAR's ResNet-20."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in and out."""
        return F.relu(self.body(x) + self.short(x))


def resnet20() -> nn.Module:
    """CIFAR's ResNet-20: three stages of three blocks, 16 to 64 channels."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet50() -> nn.Module:
    """ImageNet's ResNet-50, as transformers builds it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def vit() -> nn.Module:
    """ViT-S/16: 12 layers, 384 wide."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    return ViTForImageClassification(ViTConfig(**sizes, num_labels=1000))


CASES: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {  # model, size, classes, images
    "resnet-20": (resnet20, 32, 10, 1024),
    "resnet-50": (resnet50, 224, 1000, 64),
    "vit": (vit, 224, 1000, 64),
}


def measure(name: str, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to score a case's images, equality checked first."""
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
    allowed = {"float32": 1e-3, "bfloat16": 1.5 * errors["plain loop, autocast"] + 0.05}
    for dtype, most in allowed.items():
        if not (error := errors[f"flowdata, {dtype}"]) <= most:
            raise SystemExit(f"{name}: flowdata's {dtype} losses are off by up to {error:.2g}")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            seconds[way] += rows.timed(run, repeats=1, warmup=0)
    for way, times in seconds.items():
        speeds = [count / s for s in times]
        yield rows.row(f"{name}: {way}", speeds, "images/s", largest_error=errors[way])


def plain(model: nn.Module, data: TensorDataset, *, autocast: bool = False) -> Tensor:
    """The loop people write."""
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
    """The library, fingerprint of the model included."""
    scorer = LossScorer(model, "cross_entropy", dtype=dtype, batch_size=BATCH, progress=False)
    return scorer.score(data, dataset_id="benchmark").losses
