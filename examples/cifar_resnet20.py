"""CIFAR-10's ResNet-20 learns Fashion-MNIST: what is learned, and what is forgotten?

The recipe for a task with a head of its own: probe a new head on the frozen body, score, then
fine-tune three ways: as usual, with FlowWeightedDataset, with FlowSampler. CIFAR-10 is measured
afterwards with its own head and BatchNorm parameters and statistics put back.

    python examples/cifar_resnet20.py [--quick] [--assets FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flowdata
from flowdata.companions.batch_norm import batch_norm_state

ASSETS = Path(__file__).resolve().parents[1].parent / "shared" / "assets"
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al., 2016, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
        )
        return F.relu(out + shortcut)


class Body(nn.Module):
    """ResNet-20 without its head: images (B, 3, 32, 32) to features (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return x.mean((2, 3))


def pretrained(path: Path) -> nn.Sequential:
    """Body and head as they were trained on CIFAR-10."""
    weights, body, head = load_file(path), Body(), nn.Linear(64, 10)
    head.load_state_dict({name: weights.pop(f"linear.{name}") for name in ("weight", "bias")})
    body.load_state_dict(weights)
    return nn.Sequential(body, head)


def images(path: Path, count: int | None = None) -> TensorDataset:
    """Images as the network takes them: 32×32, three channels, its own normalisation."""
    file = np.load(path)
    pixels = torch.from_numpy(file["images"][:count]).float() / 255
    if pixels.dim() == 3:  # 28×28 grey: a black border, and the same value in each channel
        pixels = F.pad(pixels, (2, 2, 2, 2))[..., None].expand(-1, -1, -1, 3)
    normalised = (pixels.movedim(-1, 1) - MEAN) / STD
    return TensorDataset(normalised, torch.from_numpy(file["labels"][:count]).long())


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
    folder = options.assets / "vision"
    if not (folder / "cifar10_resnet20.safetensors").is_file():
        sys.exit(f"{folder} holds no cifar10_resnet20.safetensors: pass its parent as --assets")

    torch.manual_seed(0)
    few = 500 if options.quick else None
    fashion = images(folder / "fashion_mnist_train.npz", options.images)
    fashion_test = images(folder / "fashion_mnist_test_dev.npz", few)
    cifar_test = images(folder / "cifar10_test_dev.npz", few)

    old = pretrained(folder / "cifar10_resnet20.safetensors")
    old_head, old_norms = old[1], batch_norm_state(old[0])
    body, head = copy.deepcopy(old[0]), nn.Linear(64, 10)
    kept = accuracy(old, cifar_test)
    flowdata.linear_probe(body, head, fashion)
    probed = nn.Sequential(body, head)
    table = {
        "pre-trained": (float("nan"), kept),
        "linear probe": (accuracy(probed, fashion_test), kept),
    }

    scores = flowdata.LossScorer(probed).score(fashion)
    weighted = flowdata.FlowWeightedDataset(fashion, scores, layout="triple")
    sampler = flowdata.FlowSampler(scores, seed=0)
    loaders = {
        "standard fine-tuning": DataLoader(fashion, batch_size=128, shuffle=True),
        "FLOW, FlowWeightedDataset": DataLoader(weighted, batch_size=128, shuffle=True),
        "FLOW, FlowSampler": DataLoader(fashion, batch_size=128, sampler=sampler),
    }
    for name, loader in loaders.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        body, head = tuned = copy.deepcopy(probed)
        resampled = loader.sampler is sampler  # Σwℓ / Σw, where weighting is Σwℓ / N
        rate = options.rate * (sampler.summary()["mean_weight"] if resampled else 1)
        train(tuned, loader, options.epochs, rate)
        if name.startswith("FLOW"):  # the recipe's second round: the head alone, no weights
            flowdata.linear_probe(body, head, fashion)
        learned = accuracy(tuned, fashion_test)
        body.load_state_dict(old_norms, strict=False)
        table[name] = learned, accuracy(nn.Sequential(body, old_head), cifar_test)

    temperature = scores.summary()["temperature"]
    print(
        f"ResNet-20 of CIFAR-10, fine-tuned on {options.images:,} images of Fashion-MNIST for "
        f"{options.epochs} epochs,\nlearning rate {options.rate:g}, temperature the median loss, "
        f"{temperature:.3f} nats; accuracy in %, one seed:\n"
    )
    print(f"{'':28}{'Fashion-MNIST':>14}{'CIFAR-10':>10}{'average':>9}")
    for name, (new, kept) in table.items():
        print(f"{name:28}{new:14.1f}{kept:10.1f}{(new + kept) / 2:9.1f}".replace("nan", "  -"))
    return table


if __name__ == "__main__":
    main()
