"""What is done to a training set before a study, by the words before the target's name.

    noisy_          every third label, and only these, shuffled
    wrong20_        so many per cent of the labels replaced by another class at random
    pairs20_        … by the next class
    rare_           all but a tenth of class 0 left out: hard rows that are right
    misjudged20_    wrong labels in the training and in the validation set

The test set stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from benchmarks.forgetting.images import Arrays

Change: TypeAlias = Callable[[Arrays, int], Arrays]  # images and labels, seed → the same, changed
_NAME = re.compile(r"(noisy|wrong|pairs|rare|misjudged)(\d*)_(.+)")
_RARE = 0.1  # of a class's rows


class Corrupted(NamedTuple):
    """A target, and what is done to it.

    Attributes:
        target: its name without the words before it.
        train: changes the training set.
        validation: changes the validation set.
    """

    target: str
    train: Change
    validation: Change


def corrupted(name: str) -> Corrupted:
    """Return the target that a name stands for, and what is done to it.

    Raises:
        ValueError: the name asks for noise without saying how much, or for too much.

    Example:
        >>> corrupted("wrong20_digits").target
        'digits'
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return Corrupted(name, _unchanged, _unchanged)
    kind, percent, target = match.groups()
    if kind in ("noisy", "rare"):
        if percent:
            raise ValueError(f"{name!r}: {kind}_ takes no number")
        return Corrupted(target, shuffled if kind == "noisy" else rare, _unchanged)
    if not percent or not 0 < int(percent) < 100:
        raise ValueError(f"{name!r}: say how many per cent, as in {kind}20_{target}")
    change = partial(wrong, share=int(percent) / 100, by_pairs=kind == "pairs")
    return Corrupted(target, change, change if kind == "misjudged" else _unchanged)


def shuffled(arrays: Arrays, seed: int) -> Arrays:
    """Return the same images with every third label, and only these, shuffled."""
    images, labels = arrays[0], arrays[1].copy()
    labels[::3] = np.random.default_rng(seed).permutation(labels[::3])
    return images, labels


def wrong(arrays: Arrays, seed: int, *, share: float, by_pairs: bool = False) -> Arrays:
    """Return the same images with a share of the labels wrong.

    Args:
        arrays: images and labels, whole numbers from 0 to the largest.
        seed: of the rows, and of the classes that take the place of theirs.
        share: of the labels.
        by_pairs: whether a wrong label is the next class, and not any other.
    """
    images, labels = arrays[0], arrays[1].copy()
    generator, classes = np.random.default_rng(seed), int(labels.max()) + 1
    rows = generator.permutation(len(labels))[: round(share * len(labels))]
    steps = 1 if by_pairs else generator.integers(1, classes, len(rows))
    labels[rows] = (labels[rows] + steps) % classes
    return images, labels


def rare(arrays: Arrays, seed: int) -> Arrays:
    """Return images and labels without nine tenths of class 0."""
    images, labels = arrays
    rows = np.flatnonzero(labels == 0)
    left_out = np.random.default_rng(seed).permutation(rows)[round(_RARE * len(rows)) :]
    return np.delete(images, left_out, axis=0), np.delete(labels, left_out)


def _unchanged(arrays: Arrays, seed: int) -> Arrays:
    return arrays
