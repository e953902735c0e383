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

from flowdata.companions.batch_norm import batch_norm_state
from flowdata.probe.features import compute_features
from flowdata.probe.fit import fit_head
from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer
from flowdata.study.classify import accuracy, fine_tune, sample_weights
from flowdata.study.methods import ABLATIONS, METHODS
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


class Start(NamedTuple):
    """What all methods begin with under one seed: the probed network and what it scores."""

    model: nn.Sequential
    parts: Parts
    scores: Scores


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
        self.start = lru_cache(maxsize=8)(self._start)

    def _start(self, seed: int) -> Start:
        parts, (body, old_head) = self.split(seed), self.old
        assert isinstance(old_head, nn.Linear)  # `__init__` says so; mypy can't know
        head = nn.Linear(old_head.in_features, self.classes, device=old_head.weight.device)
        self._probe(body, head, parts.scored)
        model = nn.Sequential(body, head)
        scorer = LossScorer(model, "cross_entropy", columns=("gradient_norm",), progress=False)
        return Start(model, parts, scorer.score(parts.scored, num_workers=self.workers))

    def run(self, name: str, rate: float, seed: int) -> Record:
        """Fine-tune by a method and measure accuracy, in %, on both tasks."""
        start, method, sizes = self.start(seed), ALL[name], self.sizes
        model = copy.deepcopy(start.model)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = sample_weights(method, start.scores)
        if method.trains:
            fine_tune(
                model,
                start.parts.train,
                weights,
                method,
                rate=rate,
                seed=seed,
                epochs=sizes.epochs,
                batch=sizes.batch,
                dtype=sizes.dtype,
                workers=self.workers,
            )
            if _is_finite(model):  # else there is nothing to fit a head to
                self._probe(model[0], model[1], start.parts.scored)
        measure = partial(accuracy, model, dtype=sizes.dtype, workers=self.workers)
        validation, target = measure(start.parts.validation), measure(start.parts.test)
        model[0].load_state_dict(batch_norm_state(self.old[0]), strict=False)
        model[1] = self.old[1]
        return {
            "validation": validation,
            "target": {"accuracy": target},
            "retained": {f"{self.old_name} accuracy": measure(self.old_test)},
            "median_loss": resolve_temperature(start.scores.losses, "median"),
            "mean_weight": weights.mean().item(),
            "effective_share": effective_sample_size(weights) / len(weights),
        }

    def _probe(self, body: nn.Module, head: nn.Module, data: Any) -> None:
        assert isinstance(head, nn.Linear)  # as `__init__` asks for
        features, targets = compute_features(
            body, data, dtype=self.sizes.dtype, num_workers=self.workers, progress=False
        )
        fit_head(head, features, targets, strength=_PROBE_STRENGTH)


def _is_finite(model: nn.Module) -> bool:
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())


def grids(names: list[str], rates: tuple[float, ...]) -> Mapping[str, tuple[float, ...]]:
    """Return the rates to try for each method; one that doesn't train has none."""
    return {name: rates if ALL[name].trains else (0.0,) for name in names}
