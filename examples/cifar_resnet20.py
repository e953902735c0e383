"""CIFAR-10's ResNet-20 learns Fashion-MNIST: what is learned, and what is forgotten?

The recipe for a task with a head of its own (`flowdata.study.recipe`): probe a new head on the
frozen body, score, then fine-tune three ways: as usual, with FlowWeightedDataset, with FlowSampler.
CIFAR-10 is measured afterwards with its own head and BatchNorm put back.

    python -m examples.cifar_resnet20 [--quick] [--assets FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flowdata
from benchmarks.forgetting.images import ASSETS, as_dataset, load_resnet20, read_arrays
from flowdata.study.recipe import as_old_network, begin, fit_new_head

PROBE_STRENGTH = 1e-3


def load(path: Path, count: int | None = None) -> TensorDataset:
    """Return the first images of a file as the network takes them, with their labels."""
    images, labels = read_arrays(path)
    return as_dataset(images[:count], labels[:count])


def train(model: nn.Module, loader: DataLoader, epochs: int, rate: float) -> None:
    """SGD with momentum, weight decay and a cosine schedule; batches may carry weights."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        if isinstance(loader.sampler, flowdata.FlowSampler):
            loader.sampler.set_epoch(epoch)
        for x, y, *weight in loader:
            losses = F.cross_entropy(model(x), y, reduction="none")
            loss = flowdata.weighted_mean(losses, *weight) if weight else losses.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Accuracy in %."""
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(data, batch_size=500))
    return 100 * hits / len(data)


def compare(
    old: nn.Sequential,
    fashion: TensorDataset,
    tests: tuple[TensorDataset, TensorDataset],
    epochs: int,
    rate: float,
) -> tuple[dict[str, tuple[float, float]], flowdata.Scores]:
    """Return the accuracies of each way on Fashion-MNIST and CIFAR-10, and the scores."""
    fashion_test, cifar_test = tests
    before = accuracy(old, cifar_test)
    probed, scores = begin(
        copy.deepcopy(old[0]), nn.Linear(64, 10), fashion, strength=PROBE_STRENGTH
    )
    table = {
        "pre-trained": (float("nan"), before),
        "linear probe": (accuracy(probed, fashion_test), before),
    }
    weighted = flowdata.FlowWeightedDataset(fashion, scores, layout="triple")
    sampler = flowdata.FlowSampler(scores, seed=0)
    loaders = {
        "standard fine-tuning": DataLoader(fashion, batch_size=128, shuffle=True),
        "FLOW, FlowWeightedDataset": DataLoader(weighted, batch_size=128, shuffle=True),
        "FLOW, FlowSampler": DataLoader(fashion, batch_size=128, sampler=sampler),
    }
    for name, loader in loaders.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        network = copy.deepcopy(probed)
        # Resampling follows Σwℓ / Σw, weighting Σwℓ / N: smaller steps by the mean weight.
        is_resampled = loader.sampler is sampler
        train(network, loader, epochs, rate * (scores.weights().mean() if is_resampled else 1))
        if name.startswith("FLOW"):  # the recipe's second round: the head alone, no weights
            fit_new_head(network, fashion, strength=PROBE_STRENGTH)
        learned = accuracy(network, fashion_test)
        table[name] = learned, accuracy(as_old_network(network, old), cifar_test)
    return table, scores


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Run the comparison, print its table and return it: Fashion-MNIST and CIFAR-10 accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder that holds vision/")
    parser.add_argument("--quick", action="store_true", help="1,000 images, 1 epoch")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.01)
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.epochs = 1000, 1
    torch.manual_seed(0)
    old, folder = load_resnet20(options.assets), options.assets / "vision"
    few = 500 if options.quick else None
    fashion = load(folder / "fashion_mnist_train.npz", options.images)
    tests = (
        load(folder / "fashion_mnist_test_dev.npz", few),
        load(folder / "cifar10_test_dev.npz", few),
    )
    table, scores = compare(old, fashion, tests, options.epochs, options.rate)
    print(
        f"ResNet-20 of CIFAR-10, fine-tuned on {options.images:,} images of Fashion-MNIST for "
        f"{options.epochs} epochs,\nlearning rate {options.rate:g}, temperature the median loss, "
        f"{scores.summary()['temperature']:.3f} nats; accuracy in %, one seed:\n"
    )
    print(f"{'':28}{'Fashion-MNIST':>14}{'CIFAR-10':>10}{'average':>9}")
    for name, (new, kept) in table.items():
        print(f"{name:28}{new:14.1f}{kept:10.1f}{(new + kept) / 2:9.1f}".replace("nan", "  -"))
    return table


if __name__ == "__main__":
    main()
