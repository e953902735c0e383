"""Vision: CIFAR-10's ResNet-20 learns another set of images; CIFAR-10 shows what it forgets.

Words before a target's name change its training set, such as ``noisy_``; see `corruptions`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.forgetting.corruptions import corrupted
from benchmarks.forgetting.images import ASSETS, Arrays, as_dataset, load_resnet20, read_arrays
from benchmarks.forgetting.made_images import letters, textures
from benchmarks.forgetting.methods import ABLATIONS
from benchmarks.forgetting.readouts import Measure, readouts_of_drift
from flowdata.drift import smooth_images
from flowdata.study import METHODS, HeadTask, Sizes, Split, grids, run_study

MAIN, EXTRA = METHODS, ABLATIONS
ALL = {**MAIN, **EXTRA}
RATES, TARGETS = (0.003, 0.01, 0.03, 0.1), ("fashion_mnist", "digits", "letters", "textures")
MADE = {"letters": letters, "textures": textures}
OLD_TRAIN = 1000  # old samples that other readouts of the old task may take
QUICK_METHODS = MAIN
SIZES = Sizes(images=1500)
QUICK = Sizes(images=600, epochs=1, validation=300, test=500)


def task(
    assets: Path,
    target: str,
    sizes: Sizes,
    measures: Callable[[nn.Sequential, Any, Any, str], Measure] = readouts_of_drift,
) -> HeadTask:
    """Return the task of learning one set of images.

    Args:
        assets: the folder that holds ``vision/``.
        target: ``fashion_mnist``, ``digits``, ``letters``, ``textures``, or ``NAME=FILE.npz`` with
            `images` and `labels`; before it the words of `corruptions`.
        sizes: see `Sizes`.
        measures: makes what is measured beside accuracy and drift, see `readouts`.
    """
    old, folder = _old_network(assets), assets / "vision"
    old_images = read_arrays(folder / "cifar10_test_dev.npz")
    old_test = as_dataset(*(part[: sizes.test] for part in old_images))
    old_train = as_dataset(*(part[-OLD_TRAIN:] for part in old_images))
    name, change_train, change_validation = corrupted(target)
    pool, test = _arrays(folder, name)

    def split(seed: int) -> Split:
        train, validation, rest = _cut(pool, sizes, seed, gives_test=test is None)
        training_set = as_dataset(*change_train(train, seed))
        validation_set = as_dataset(*change_validation(validation, seed))
        test_set = as_dataset(*(part[: sizes.test] for part in test or rest))
        return Split(training_set, training_set, validation_set, test_set)

    classes = int(pool[1].max()) + 1
    return HeadTask(
        old,
        old_test,
        "CIFAR-10",
        classes,
        split,
        sizes,
        methods=ALL,
        columns=("gradient_norm",),  # one of the ablations weighs by it
        probes={"noise": smooth_images((3, 32, 32))},
        # A quick look does without what takes longer than its runs.
        more=None if sizes == QUICK else measures(old, old_test, old_train, sizes.dtype),
    )


@cache
def _old_network(assets: Path) -> nn.Sequential:
    """The network that all targets begin with, one object, so that what is made of it is kept."""
    return load_resnet20(assets)


def _cut(pool: Arrays, sizes: Sizes, seed: int, *, gives_test: bool) -> tuple[Arrays, ...]:
    """Draw training, validation and test set from the pool, by the seed.

    If the pool has to give the test set as well, at least a fifth of it is left for that.
    """
    images, labels = pool
    order = np.random.default_rng(seed).permutation(len(labels))
    ends = np.cumsum([sizes.images, sizes.validation])
    if gives_test:
        ends = np.minimum(ends, [len(order) * 3 // 5, len(order) * 4 // 5])
    return tuple(
        (images[part], labels[part]) for part in np.split(order[: ends[1] + sizes.test], ends)
    )


def _arrays(folder: Path, target: str) -> tuple[Arrays, Arrays | None]:
    """The images to draw from, and a test set if the target has a separate one."""
    if target == "fashion_mnist":
        test = read_arrays(folder / "fashion_mnist_test_dev.npz")
        return read_arrays(folder / "fashion_mnist_train.npz"), test
    if target == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return ((digits.images * (255 / 16)).astype(np.uint8), digits.target), None
    if target in MADE:
        return MADE[target](), None
    path = Path(target.partition("=")[2])
    if not path.is_file():
        raise SystemExit(f"target {target!r}: give {', '.join(TARGETS)} or NAME=FILE.npz")
    return read_arrays(path), None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a study of vision."""
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder that holds vision/")
    parser.add_argument(
        "--targets",
        nargs="+",
        help=f"{', '.join(TARGETS)} (all by default), or NAME=FILE.npz with images and labels; "
        "before the name noisy_, wrong20_, pairs20_, rare_ or misjudged20_: see corruptions.py",
    )
    parser.add_argument("--epochs", type=int, help=f"default: {SIZES.epochs}")


def study(options: argparse.Namespace) -> None:
    """Run what the results files lack of the study of every target."""
    sizes = QUICK if options.quick else SIZES
    sizes = replace(sizes, epochs=options.epochs or sizes.epochs)
    rates = options.rates or (RATES[1:2] if options.quick else RATES)
    for target in options.targets or (TARGETS[:1] if options.quick else TARGETS):
        name = target.partition("=")[0]
        run_study(
            options.results / f"forgetting_{name}.jsonl",
            {"study": "vision", "target": name, **asdict(sizes)},
            task(options.assets, target, sizes).run,
            methods=grids(options.methods, rates, ALL),
            seeds=options.seeds or range(2 if options.quick else 5),
        )
