"""The paper's vision runs: an ImageNet ResNet learns folders of images, one study for each.

    python -m benchmarks.forgetting.folders --network resnet18 --imagenet IMAGENET/val \
        --targets cifar10=PATH cifar100=PATH flowers=PATH caltech=PATH dogs=PATH cars=PATH

A folder holds ``train/`` and ``test/`` with one folder for each class, as torchvision's
`ImageFolder` takes them; ImageNet's validation set has one for each class in the order of their
names. Fine-tuning sees random crops and flips; losses are scored with the evaluation transform.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from benchmarks.rows import RESULTS
from flowdata.study import METHODS, HeadTask, Record, Sizes, Split, grids, run_study

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Images(Dataset[tuple[Tensor, int]]):
    """The images of a folder with one folder for each class.

    Args:
        folder: holds a folder for each class.
        size: side of the square that is cut from each image, in pixels.
        augment: whether to cut the square at random and flip it, instead of cutting the middle.
    """

    def __init__(self, folder: Path, size: int, *, augment: bool = False) -> None:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.samples = [
            (file, label) for label, name in enumerate(names)
            for file in sorted((folder / name).rglob("*.*"))
        ]  # fmt: skip
        if not self.samples:
            raise SystemExit(f"{folder} holds no images: give it one folder for each class")
        self.classes, self.size, self.augment = len(names), size, augment

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        file, label = self.samples[index]
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0).float() / 255
        scale = self.size * 256 / 224 / min(pixels.shape[1:])
        shape = [max(self.size, round(side * scale)) for side in pixels.shape[1:]]
        pixels = F.interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0]
        margins = [side - self.size for side in shape]
        top, left = (int(torch.randint(m + 1, ())) if self.augment else m // 2 for m in margins)
        crop = pixels[:, top : top + self.size, left : left + self.size]
        if self.augment and torch.rand(()) < 0.5:
            crop = crop.flip(-1)
        return (crop - MEAN) / STD, label


def load_network(name: str, weights: str) -> nn.Sequential:
    """Return body and head of a torchvision ResNet."""
    try:
        import torchvision
    except ImportError:
        raise SystemExit("the networks come from torchvision: pip install torchvision") from None
    network = getattr(torchvision.models, name)(weights=weights)
    head, network.fc = network.fc, nn.Identity()
    return nn.Sequential(network, head)


def task(
    network: nn.Sequential, old: Path, folder: Path, sizes: Sizes, *, pixels: int, workers: int
) -> HeadTask:
    """Return the task of learning one folder; a tenth of its training images choose the rate."""
    crops = Images(folder / "train", pixels, augment=True)
    plain, test = Images(folder / "train", pixels), Images(folder / "test", pixels)

    def split(seed: int) -> Split:
        order = np.random.default_rng(seed).permutation(len(plain)).tolist()
        count = min(sizes.validation, len(order) // 10)
        training, validation = order[count:][: sizes.images], order[:count]
        return Split(
            Subset(crops, training),
            Subset(plain, training),
            Subset(plain, validation),
            Subset(test, range(min(sizes.test, len(test)))),
        )

    return HeadTask(
        network, Images(old, pixels), "ImageNet", plain.classes, split, sizes, workers=workers
    )


def main(argv: list[str] | None = None, network: nn.Sequential | None = None) -> list[Record]:
    """Run the study of every folder; `network` stands in for torchvision's."""
    parser = argparse.ArgumentParser(description="The paper's vision runs")
    parser.add_argument("--network", default="resnet18", help="resnet18, resnet50, …")
    parser.add_argument("--weights", default="IMAGENET1K_V1")
    parser.add_argument("--imagenet", type=Path, required=True, help="its validation images")
    parser.add_argument("--targets", nargs="+", required=True, help="NAME=FOLDER")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = (network or load_network(options.network, options.weights)).to(device)
    everything = 1 << 31
    sizes = Sizes(everything, options.epochs, options.batch, 5000, everything)
    records = []
    for name, path in (target.split("=", 1) for target in options.targets):
        head_task = task(
            network,
            options.imagenet,
            Path(path),
            sizes,
            pixels=options.pixels,
            workers=options.workers,
        )
        setting = {"study": "vision", "target": name, "network": options.network}
        records += run_study(
            options.results / f"forgetting_{options.network}_{name}.jsonl",
            setting | {"pixels": options.pixels} | asdict(sizes),
            head_task.run,
            methods=grids(options.methods, options.rates),
            seeds=range(options.seeds),
        )
    return records


if __name__ == "__main__":
    main()
