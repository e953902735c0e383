"""Prompts: which samples answer the same one, so that they can be packed together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata.targets.labels import IGNORE_INDEX

_TRIED = 256  # samples among which at least two must share a prompt, or none is looked for


def shared_prompts(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Return the group and the prompt's length of every sample, (N,) int64 each.

    Samples of a group begin with the same tokens up to the last one before their first target.
    None where the first samples have each a prompt of their own, or have no tokens to compare.
    """
    first = [_prompt(dataset[index]) for index in range(min(_TRIED, len(dataset)))]
    asked = [prompt.tobytes() for prompt in first if len(prompt)]
    if len(set(asked)) == len(asked):
        return None
    groups = np.empty(len(dataset), dtype=np.int64)
    sizes = np.zeros(len(dataset), dtype=np.int64)
    for index in range(len(dataset)):
        prompt = _prompt(dataset[index])
        key = prompt.tobytes() if len(prompt) else b"alone %d" % index
        groups[index] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        sizes[index] = len(prompt)
    return torch.from_numpy(np.unique(groups, return_inverse=True)[1]), torch.from_numpy(sizes)


def _prompt(sample: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The tokens before the last one that precedes a sample's first target."""
    if not isinstance(sample, Mapping) or not {"input_ids", "labels"} <= set(sample):
        return np.empty(0, dtype=np.int64)
    is_target = np.asarray(sample["labels"])[1:] != IGNORE_INDEX
    length = int(is_target.argmax()) if is_target.any() else 0
    return np.asarray(sample["input_ids"][:length], dtype=np.int64)
