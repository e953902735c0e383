"""Vision: CIFAR-10's ResNet-20 learns another set of images; CIFAR-10 shows what is forgotten.

The recipe is the paper's for a task with a head of its own: a new head is probed on the frozen
body, its losses make the weights, head and body are fine-tuned, and the head is fitted once more
on the fine-tuned body: for every method here, so that none has an advantage by it. CIFAR-10 is
measured with its own head and BatchNorm put back.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import flowdata
from benchmarks.forgetting.classify import accuracy, fine_tune, sample_weights
from benchmarks.forgetting.methods import ABLATIONS, METHODS, VISION_ONLY
from benchmarks.forgetting.study import Record, run_study
from examples.cifar_resnet20 import ASSETS, MEAN, STD, pretrained
from flowdata.companions import batch_norm_state
from flowdata.probe import compute_features, fit_head

RATES, TARGETS = (0.01, 0.03, 0.1), ("fashion_mnist", "digits")
MAIN, EXTRA = METHODS, {**ABLATIONS, **VISION_ONLY}
ALL = {**MAIN, **EXTRA}
_PROBE_STRENGTH = 1e-3


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured in a run."""

    images: int = 3000
    epochs: int = 5
    batch: int = 64
    validation: int = 1000
    test: int = 2000
    dtype: str = "bfloat16"


QUICK = Sizes(images=600, epochs=1, validation=300, test=500)


@dataclass(frozen=True)
class Start:
    """What all methods begin with under one seed: the probed network and what it scores."""

    body: nn.Module
    head: nn.Linear
    old_head: nn.Linear
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    scores: flowdata.Scores


class Vision:
    """Runs a method on one set of images.

    Args:
        assets: the folder that holds ``vision/``.
        target: ``fashion_mnist``, ``digits``, or ``NAME=FILE.npz`` with `images` and `labels`.
        sizes: see there.
    """

    def __init__(self, assets: Path, target: str, sizes: Sizes) -> None:
        self.folder, self.target, self.sizes = assets / "vision", target, sizes
        if not (self.folder / "cifar10_resnet20.safetensors").is_file():
            raise SystemExit(f"{self.folder} holds no cifar10_resnet20.safetensors: see --assets")
        old = np.load(self.folder / "cifar10_test_dev.npz")
        self.old_test = _dataset(old["images"][: sizes.test], old["labels"][: sizes.test])
        self.start = lru_cache(maxsize=8)(self._start)

    def _start(self, seed: int) -> Start:
        body, old_head = pretrained(self.folder / "cifar10_resnet20.safetensors")
        parts = self._split(seed)
        classes = max(int(part.tensors[1].max()) for part in parts) + 1
        head = nn.Linear(old_head.in_features, classes)
        features = self._probe(body, head, parts[0])
        scorer = flowdata.LossScorer(nn.Sequential(body, head), "cross_entropy", progress=False)
        norms = gradient_norms(head, features, parts[0].tensors[1])
        losses = scorer.score(parts[0]).losses
        scores = flowdata.Scores(losses, columns={"gradient_norm": norms})
        return Start(body, head, old_head, *parts, scores)

    def run(self, name: str, rate: float, seed: int) -> Record:
        """Fine-tune by a method and measure accuracy, in %, on both tasks."""
        start, method = self.start(seed), ALL[name]
        model = nn.Sequential(copy.deepcopy(start.body), copy.deepcopy(start.head))
        model.to(memory_format=torch.channels_last)
        weights, sizes = sample_weights(method, start.scores), self.sizes
        if method.trains:
            fine_tune(
                model,
                start.train,
                weights,
                method,
                rate=rate,
                seed=seed,
                epochs=sizes.epochs,
                batch=sizes.batch,
                dtype=sizes.dtype,
            )
            self._probe(*model, start.train)
        measure = partial(accuracy, model, dtype=sizes.dtype)
        validation, target = measure(start.validation), measure(start.test)
        model[0].load_state_dict(batch_norm_state(start.body), strict=False)
        model[1] = start.old_head
        return {
            "validation": validation,
            "target": {"accuracy": target},
            "retained": {"CIFAR-10 accuracy": measure(self.old_test)},
            "median_loss": start.scores.losses.median().item(),
            "mean_weight": weights.mean().item(),
            "effective_share": flowdata.effective_sample_size(weights) / len(weights),
        }

    def _probe(self, body: nn.Module, head: nn.Linear, data: TensorDataset) -> Tensor:
        """Fit the head on the body's features, and return them."""
        features, targets = compute_features(body, data, dtype=self.sizes.dtype, progress=False)
        fit_head(head, features, targets, strength=_PROBE_STRENGTH)
        return features

    def _split(self, seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
        """Images to train on, to choose the rate by, and to test with."""
        sizes = self.sizes
        if self.target == "fashion_mnist":
            file = np.load(self.folder / "fashion_mnist_train.npz")
            test = np.load(self.folder / "fashion_mnist_test_dev.npz")
            wanted = (sizes.images, sizes.images + sizes.validation)
            order = np.random.default_rng(seed).permutation(len(file["labels"]))
            kept = np.split(order[: wanted[1]], wanted[:1])
            train, validation = (_dataset(file["images"][k], file["labels"][k]) for k in kept)
            return train, validation, _dataset(*(test[n][: sizes.test] for n in file.files))
        images, labels = _arrays(self.target)
        order = np.random.default_rng(seed).permutation(len(labels))
        cuts = (int(0.6 * len(order)), int(0.8 * len(order)))
        most = (sizes.images, sizes.validation, sizes.test)
        parts = [part[:m] for part, m in zip(np.split(order, cuts), most, strict=True)]
        return tuple(_dataset(images[part], labels[part]) for part in parts)


def _arrays(target: str) -> tuple[Any, Any]:
    """(N, H, W) or (N, H, W, 3) uint8 images and their labels."""
    if target == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images * (255 / 16)).astype(np.uint8), digits.target
    path = target.partition("=")[2]
    if not Path(path).is_file():
        raise SystemExit(f"target {target!r}: give fashion_mnist, digits or NAME=FILE.npz")
    file = np.load(path)
    return file["images"], file["labels"]


def _dataset(images: Any, labels: Any) -> TensorDataset:
    """Images as the network takes them: 32×32, three channels, its own normalisation."""
    pixels = torch.from_numpy(images).float() / 255
    pixels = pixels[:, None].expand(-1, 3, -1, -1) if pixels.dim() == 3 else pixels.movedim(-1, 1)
    if pixels.shape[-1] != 32:
        pixels = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    return TensorDataset((pixels - MEAN) / STD, torch.from_numpy(labels).long())


@torch.no_grad()
def gradient_norms(head: nn.Linear, features: Tensor, labels: Tensor) -> Tensor:
    """Return (N,) norms of each sample's gradient of the cross-entropy in the head."""
    logits = head(features)
    errors = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    return errors.norm(dim=1) * (features.square().sum(1) + 1).sqrt()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what a study of vision can be told."""
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder that holds vision/")
    parser.add_argument(
        "--targets",
        nargs="+",
        help="fashion_mnist, digits (both by default), or NAME=FILE.npz with images and labels",
    )


def study(options: argparse.Namespace) -> None:
    """Run what is missing of the study of every target."""
    sizes = QUICK if options.quick else Sizes()
    rates = options.rates or (RATES[1:2] if options.quick else RATES)
    for target in options.targets or (["fashion_mnist"] if options.quick else TARGETS):
        task = Vision(options.assets, target, sizes)
        name = target.partition("=")[0]
        run_study(
            options.results / f"forgetting_{name}.jsonl",
            {"study": "vision", "target": name, **asdict(sizes)},
            task.run,
            methods={name: rates if ALL[name].trains else (0.0,) for name in options.methods},
            seeds=options.seeds or (2 if options.quick else 5),
        )
