"""A job: one model over one data set, with every choice made but that of the packs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from flowdata._common.unreadable import Unreadable, first_readable
from flowdata.errors import SampleError
from flowdata.models.precision import name_of
from flowdata.scoring.collate import Collate
from flowdata.scoring.language.packable import common_prefix, why_not_packed
from flowdata.scoring.plan.lengths import length_of

FEW = 16  # samples in which a common prefix is looked for and on which ways are checked
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        announce: takes the sentence that says how losses are made, once the way is known.
        suspects: samples that another way gave wrong losses; they are checked before the run.
        other fields: as the arguments of `LossScorer` and `LossScorer.score`.
    """

    model: nn.Module
    loss: str | LossFunction
    dtype: torch.dtype
    device: torch.device
    reference: str
    token_losses: bool
    columns: tuple[str, ...]
    compile: Literal["auto"] | bool
    max_tokens: int | None
    batch_size: int | None
    dataset: Any
    collate: Collate
    lengths: Any
    num_workers: int
    progress: bool
    announce: Callable[[str], None]
    suspects: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The loss and where it is computed, as a user would say it."""
        loss = self.loss if isinstance(self.loss, str) else "the given callable"
        return f"{loss} in {name_of(self.dtype)} on {self.device}"

    @functools.cached_property
    def few_samples(self) -> list[Any]:
        """Some readable samples from all over the data set, shortest first."""
        samples: list[Any] = []
        before: list[bytes] = []
        for index in range(0, len(self.dataset), -(-len(self.dataset) // FEW)):
            with contextlib.suppress(SampleError):  # the run will meet it and say so
                samples.append(self.dataset[index])
                before = before or _contents_of(samples[0])
        _check_memory(samples, before)
        readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
        readable = readable or [first_readable(self.dataset)]
        return sorted(readable, key=lambda sample: length_of(sample) or 0)

    @functools.cached_property
    def prefix(self) -> Tensor:
        """Tokens with which probably all samples begin, (P,) int64; empty if nothing uses them."""
        is_packed = self.loss == "causal_lm" and not why_not_packed(self.model, self.loss)
        if not is_packed or len(self.few_samples) < 2:
            return torch.empty(0, dtype=torch.long)
        return common_prefix(self.collate(self.few_samples), "causal_lm")


def _check_memory(samples: list[Any], before: list[bytes]) -> None:
    """Raise ValueError where the first sample isn't what it was `before` others were read."""
    if samples and _contents_of(samples[0]) != before:
        raise ValueError(
            "the data set gives every sample in the same memory: the first one changed when others "
            "were read, so that a batch would hold one of them several times; return a copy from "
            "its __getitem__, as by tensor.clone() or array.copy()"
        )


def _contents_of(value: Any) -> list[bytes]:
    """The bytes of a sample's tensors and arrays, in order."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        flat = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        return [flat.view(torch.uint8).numpy().tobytes()]
    if isinstance(value, np.ndarray):
        return [value.tobytes()]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list) and not (value and isinstance(value[0], int | float)):
        return [each for item in value for each in _contents_of(item)]
    return []
