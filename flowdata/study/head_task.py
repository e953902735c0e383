"""The recipe for a task with a head of its own, as one run of any method.

It is the paper's: a new head is probed on the frozen body, its losses make the weights, head and
body are fine-tuned, and the head is fitted once more on the fine-tuned body: for every method
here, so that none has an advantage by it. The old task is measured with its own head and
BatchNorm put back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from flowdata.study.classify import accuracy, fine_tune, sample_weights
from flowdata.study.methods import ABLATIONS, METHODS
from flowdata.study.recipe import Beginning, as_old_network, begin, fit_new_head
from flowdata.study.runs import Record
from flowdata.weights import effective_sample_size, resolve_temperature

MAIN, EXTRA = METHODS, ABLATIONS
ALL = {**MAIN, **EXTRA}
_PROBE_STRENGTH = 1e-3


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured in a run, and in which precision."""

    images: int = 2500
    epochs: int = 4
    batch: int = 64
    validation: int = 1000
    test: int = 2000
    dtype: str = "bfloat16"


class Parts(NamedTuple):
    """A task's data: what is trained on, the same without augmentation, and what is measured."""

    train: Any
    scored: Any
    validation: Any
    test: Any


class HeadTask:
    """Runs a method on one task.

    Args:
        old: body, (B, …) → (B, D), and the head it was trained with, an `nn.Linear`.
        old_test: samples (input, class) of the old task.
        old_name: the old task's, for the records.
        classes: of the new task.
        split: seed → `Parts` of the new task.
        sizes: see there.
        workers: that load samples; 0 for data in memory.
    """

    def __init__(
        self,
        old: nn.Sequential,
        old_test: Any,
        old_name: str,
        classes: int,
        split: Callable[[int], Parts],
        sizes: Sizes,
        workers: int = 0,
    ) -> None:
        self.old, self.old_test, self.old_name = old, old_test, old_name
        self.classes, self.split, self.sizes, self.workers = classes, split, sizes, workers
        self.begin = lru_cache(maxsize=8)(self._begin)

    def _begin(self, seed: int) -> tuple[Parts, Beginning]:
        parts, (body, old_head) = self.split(seed), self.old
        assert isinstance(old_head, nn.Linear)  # as the class asks for
        head = nn.Linear(old_head.in_features, self.classes, device=old_head.weight.device)
        beginning = begin(
            body,
            head,
            parts.scored,
            strength=_PROBE_STRENGTH,
            dtype=self.sizes.dtype,
            columns=("gradient_norm",),
            workers=self.workers,
        )
        return parts, beginning

    def run(self, name: str, rate: float, seed: int) -> Record:
        """Fine-tune by a method and measure accuracy, in %, on both tasks."""
        (parts, beginning), method, sizes = self.begin(seed), ALL[name], self.sizes
        network = copy.deepcopy(beginning.network)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = sample_weights(method, beginning.scores)
        if method.trains:
            fine_tune(
                network,
                parts.train,
                weights,
                method,
                rate=rate,
                seed=seed,
                epochs=sizes.epochs,
                batch=sizes.batch,
                dtype=sizes.dtype,
                workers=self.workers,
            )
            if _is_finite(network):  # else there is nothing to fit a head to
                fit_new_head(
                    network,
                    parts.scored,
                    strength=_PROBE_STRENGTH,
                    dtype=sizes.dtype,
                    workers=self.workers,
                )
        measure = partial(accuracy, dtype=sizes.dtype, workers=self.workers)
        validation, target = measure(network, parts.validation), measure(network, parts.test)
        return {
            "validation": validation,
            "target": {"accuracy": target},
            "retained": {
                f"{self.old_name} accuracy": measure(
                    as_old_network(network, self.old), self.old_test
                )
            },
            "median_loss": resolve_temperature(beginning.scores.losses, "median"),
            "mean_weight": weights.mean().item(),
            "effective_share": effective_sample_size(weights) / len(weights),
        }


def _is_finite(model: nn.Module) -> bool:
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())


def grids(names: list[str], rates: tuple[float, ...]) -> Mapping[str, tuple[float, ...]]:
    """Return the rates to try for each method; one that doesn't train has none."""
    return {name: rates if ALL[name].trains else (0.0,) for name in names}
