"""FLOW's vision recipe on a torchvision ResNet: probe, score, weighted fine-tuning, head again.

    pip install torchvision; python examples/torchvision_resnet.py --pretrained

Source: Sanyal et al., ICML 2025, section 5. The lines marked FLOW are the difference to plain
fine-tuning, whose own lines stand beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flowdata import FlowWeightedDataset, LossScorer, linear_probe, weighted_mean
from flowdata.companions import batch_norm_state

try:
    import torchvision
except RuntimeError:  # built for another torch: the operators it wants must at least be declared
    for name in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(name, "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    import torchvision

DATA = Path(__file__).parent.parent.parent / "shared/assets/vision/fashion_mnist_train.npz"


def load(path: Path, samples: int, size: int) -> TensorDataset:
    """Return images and labels of an npz file, or noise with ten labels if there is none."""
    if path.exists():
        arrays = np.load(path)
        images = torch.tensor(arrays["images"][:samples]).float()[:, None] / 255
        labels = torch.tensor(arrays["labels"][:samples]).long()
    else:
        print(f"{path} is missing: random images stand in for it, so figures mean nothing")
        images, labels = torch.rand(samples, 1, 28, 28), torch.arange(samples) % 10
    images = F.interpolate(images, (size, size)).expand(-1, 3, -1, -1)
    return TensorDataset((images - 0.45) / 0.225, labels)


def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """Return the share of right answers."""
    right: list[Tensor] = []
    with torch.no_grad():
        for inputs, targets in DataLoader(dataset, batch_size=64):
            right.append(model.eval()(inputs).argmax(1) == targets)
    return torch.cat(right).float().mean().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print and return accuracy on the new task after each step of the recipe."""
    parser = argparse.ArgumentParser(description="FLOW's vision recipe on a torchvision ResNet")
    parser.add_argument("--pretrained", action="store_true", help="download ImageNet weights")
    parser.add_argument("--data", type=Path, default=DATA, help="npz with images and labels")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    dataset = load(options.data, options.samples, options.size)
    body = torchvision.models.resnet18(weights="DEFAULT" if options.pretrained else None)
    old_head, old_norms = body.fc, batch_norm_state(body)  # to measure the old task afterwards
    body.fc = nn.Identity()

    head = linear_probe(body, nn.Linear(512, 10), dataset, strength=1e-3)
    model = nn.Sequential(body, head)
    results = {"probe": accuracy(model, dataset)}

    scorer = LossScorer(model, "cross_entropy")
    # plain: train = dataset
    train = FlowWeightedDataset(dataset, scorer.score(dataset), layout="triple")  # FLOW
    loader = DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    model.train()
    for _ in range(options.epochs):
        for inputs, targets, weight in loader:  # FLOW  plain: for inputs, targets in loader:
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            loss = weighted_mean(losses, weight)  # FLOW  plain: loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    results["FLOW"] = accuracy(model, dataset)
    linear_probe(body, head, dataset, strength=1e-3)
    results["head again"] = accuracy(model, dataset)
    for step, share in results.items():
        print(f"{step:12}{share:.3f}")
    body.fc = old_head
    body.load_state_dict(old_norms, strict=False)  # ready for the old task
    return results


if __name__ == "__main__":
    main()
