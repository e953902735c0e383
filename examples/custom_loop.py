"""FLOW in a plain PyTorch loop: digits, then turned digits.

    pip install ".[demo]"; python examples/custom_loop.py

The lines marked FLOW are the difference to the plain loop, whose own lines stand beside them.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flowdata import FlowWeightedDataset, LossScorer, weighted_mean


def fine_tune(model: nn.Module, data: Any, epochs: int, penalty: Any = None) -> None:
    """Train a model in place on Σ weight · loss, plus a penalty if there is one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = FlowWeightedDataset(data, LossScorer(model).score(data), layout="triple")  # FLOW
    loader = DataLoader(data, batch_size=32, shuffle=True)
    for _ in range(epochs):
        for inputs, targets, weight in loader:  # FLOW  plain: for inputs, targets in loader:
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            loss = weighted_mean(losses, weight)  # FLOW  plain: loss = losses.mean()
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def pretrain() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """Return a model that knows the digits, the digits, and turned ones."""
    torch.manual_seed(0)
    digits, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(digits, dtype=torch.float32) / 16, torch.tensor(classes)
    turned = images.view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
    old, new = TensorDataset(images, labels), TensorDataset(turned, labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        for inputs, targets in DataLoader(old, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model, old, new


def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """Return the share of right answers."""
    inputs, targets = dataset.tensors
    with torch.no_grad():
        right: Tensor = model(inputs).argmax(1) == targets
    return right.float().mean().item()


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Print what a model knows before and after; return the last two accuracies."""
    options = argparse.ArgumentParser(description="FLOW in a plain PyTorch loop")
    options.add_argument("--epochs", type=int, default=5)
    epochs = options.parse_args(argv).epochs
    model, old, new = pretrain()
    print(f"pre-trained: upright {accuracy(model, old):.3f}, turned {accuracy(model, new):.3f}")
    fine_tune(model, new, epochs)
    result = accuracy(model, old), accuracy(model, new)
    print(f"fine-tuned:  upright {result[0]:.3f}, turned {result[1]:.3f}")
    return result


if __name__ == "__main__":
    main()
