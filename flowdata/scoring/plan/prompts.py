"""Prompts: which samples begin with the same one, so that they can be packed together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata.targets.labels import IGNORE_INDEX

_TRIED = 256  # samples among which at least two must share a prompt, or none is looked for
_Integers = np.ndarray[Any, np.dtype[np.int64]]


def shared_prompts(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Return the group and the prompt's length of every sample, (N,) int64 each.

    Samples of a group begin with the same tokens up to the last one before their first target.
    None where the first samples have each a prompt of their own, or have no tokens to compare.
    """
    first_prompts = [_prompt(dataset[index]) for index in range(min(_TRIED, len(dataset)))]
    contents = [prompt.tobytes() for prompt in first_prompts if len(prompt)]
    if len(set(contents)) == len(contents):
        return None
    # Prompts are compared by 63 bits of a hash, 8 bytes a sample, instead of all being held. Two
    # prompts that collide cost speed alone: a pack compares its samples' tokens itself.
    hashes = np.empty(len(dataset), dtype=np.int64)
    lengths = np.zeros(len(dataset), dtype=np.int64)
    for index in range(len(dataset)):
        prompt = _prompt(dataset[index])
        content = prompt.tobytes() if len(prompt) else b"alone %d" % index
        digest = hashlib.blake2b(content, digest_size=8).digest()
        hashes[index] = int.from_bytes(digest, "big") >> 1  # int64 has a sign
        lengths[index] = len(prompt)
    groups = np.unique(hashes, return_inverse=True)[1]
    return torch.from_numpy(groups), torch.from_numpy(lengths)


def _prompt(sample: Any) -> _Integers:
    """The tokens before the last one that precedes a sample's first target.

    That last one is left out, since its hidden state predicts the first target.

        input_ids   a     b     c     d     e
        labels      −100  −100  −100  d     e        prompt: a b
    """
    if not isinstance(sample, Mapping) or not {"input_ids", "labels"} <= set(sample):
        return np.empty(0, dtype=np.int64)
    is_target = np.asarray(sample["labels"])[1:] != IGNORE_INDEX
    length = int(is_target.argmax()) if is_target.any() else 0
    return np.asarray(sample["input_ids"][:length], dtype=np.int64)
