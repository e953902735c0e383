"""CIFAR-10's ResNet-20, and images as it takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
Arrays = tuple[Any, Any]  # images (N, H, W) or (N, H, W, 3) uint8, and labels


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al., 2016, option A).

    Where the block halves the image and doubles the channels, the shortcut takes every other pixel
    and adds channels of zeros on both sides::

        x ──┬── conv ── norm ── relu ── conv ── norm ──(+)── relu ──→
            └── every other pixel, channels of zeros ───┘
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in and out."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
        )
        return F.relu(out + shortcut)


class Body(nn.Module):
    """ResNet-20 without its head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) to features (B, 64)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return x.mean((2, 3))


def resnet20() -> nn.Sequential:
    """Return body and head of random weights."""
    return nn.Sequential(Body(), nn.Linear(64, 10))


def load_resnet20(assets: Path) -> nn.Sequential:
    """Return body and head as they were trained on CIFAR-10; `assets` holds ``vision/``."""
    file = assets / "vision" / "cifar10_resnet20.safetensors"
    if not file.is_file():
        raise SystemExit(f"{file.parent} holds no {file.name}: pass its parent as --assets")
    weights, network = load_file(file), resnet20()
    body, head = network
    head.load_state_dict({name: weights.pop(f"linear.{name}") for name in ("weight", "bias")})
    body.load_state_dict(weights)
    return network


def read_arrays(path: Path) -> Arrays:
    """Return the images and the labels of an npz file: (N, H, W) or (N, H, W, 3) uint8, (N,)."""
    file = np.load(path)
    return file["images"], file["labels"]


def as_dataset(images: Any, labels: Any) -> TensorDataset:
    """Return images as the network takes them: 32 × 32, three channels, normalised as for it."""
    pixels = torch.from_numpy(images).float() / 255
    pixels = pixels[:, None].expand(-1, 3, -1, -1) if pixels.dim() == 3 else pixels.movedim(-1, 1)
    if pixels.shape[-1] != 32:
        pixels = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    return TensorDataset((pixels - MEAN) / STD, torch.from_numpy(labels).long())
