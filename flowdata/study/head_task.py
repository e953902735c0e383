"""A task with a head of its own, as the runs of a study: the recipe, by any method.

All methods get the recipe's last step, the head fitted once more on the fine-tuned body, so that
none has an advantage by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata.scores import Scores
from flowdata.study.classify import accuracy, fine_tune, sample_weights
from flowdata.study.methods import METHODS
from flowdata.study.recipe import HeadRecipe
from flowdata.study.runs import Record
from flowdata.study.training import Method
from flowdata.weights import effective_sample_size, resolve_temperature


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured in a run, and in which precision.

    Attributes:
        images: of the new task that are trained on.
        epochs: passes over them.
        batch: images in one.
        validation: images of the new task that the learning rate is chosen by.
        test: images of each task that are measured.
        dtype: ``"float32"`` or ``"bfloat16"``.
    """

    images: int = 2500
    epochs: int = 4
    batch: int = 64
    validation: int = 1000
    test: int = 2000
    dtype: str = "bfloat16"


class Split(NamedTuple):
    """A task's data sets, map-style, with samples (input, class).

    Attributes:
        train: what is trained on.
        scored: the same samples without augmentation, for losses and heads.
        validation: what the learning rate is chosen by.
        test: what is measured.
    """

    train: Any
    scored: Any
    validation: Any
    test: Any


class Start(NamedTuple):
    """What all methods begin with under one seed: the probed model, the data and the losses."""

    model: nn.Sequential
    split: Split
    scores: Scores


class HeadTask:
    """Runs a method on one task; `run` is what `run_study` takes.

    Args:
        old: body, (B, …) → (B, D), and the head it was trained with, an `nn.Linear`.
        old_test: samples (input, class) of the old task.
        old_name: the old task's, for the records.
        classes: of the new task.
        split: seed → the new task's data.
        sizes: see there.
        workers: processes that load samples; 0 for data in memory.
        methods: by the names that `run` takes.
        columns: what methods need of the scores beside the losses, see `LossScorer`.

    Raises:
        TypeError: the old head is no `nn.Linear`.
    """

    def __init__(
        self,
        old: nn.Sequential,
        old_test: Any,
        old_name: str,
        classes: int,
        split: Callable[[int], Split],
        sizes: Sizes,
        *,
        workers: int = 0,
        methods: Mapping[str, Method] = METHODS,
        columns: Sequence[str] = (),
    ) -> None:
        body, head = old
        if not isinstance(head, nn.Linear):
            raise TypeError(f"old must end with an nn.Linear, got {type(head).__name__}")
        self.new_head = partial(nn.Linear, head.in_features, classes, device=head.weight.device)
        self.recipe = HeadRecipe(body, head, dtype=sizes.dtype, workers=workers)
        self.old_test, self.old_name = old_test, old_name
        self.split, self.sizes, self.methods, self.columns = split, sizes, methods, columns
        self.start = lru_cache(maxsize=8)(self._start)  # all methods of a seed share it

    def _start(self, seed: int) -> Start:
        split = self.split(seed)
        model = self.recipe.probe(self.new_head(), split.scored)
        return Start(model, split, self.recipe.score(model, split.scored, columns=self.columns))

    def run(self, name: str, rate: float, seed: int) -> Record:
        """Fine-tune by a method and measure accuracy, in %, on both tasks."""
        start, method = self.start(seed), self.methods[name]
        weights = sample_weights(method, start.scores)
        train = partial(
            self._train, start=start, weights=weights, method=method, rate=rate, seed=seed
        )
        model = self.recipe.fine_tune(
            start.model, start.split.scored, train, head_again=method.trains
        )
        measure = partial(accuracy, dtype=self.sizes.dtype, workers=self.recipe.workers)
        validation, target = (measure(model, d) for d in (start.split.validation, start.split.test))
        retained = measure(self.recipe.old_model(model), self.old_test)
        return {
            "validation": validation,
            "target": {"accuracy": target},
            "retained": {f"{self.old_name} accuracy": retained},
            "median_loss": resolve_temperature(start.scores.losses, "median"),
            "mean_weight": weights.mean().item(),
            "effective_share": effective_sample_size(weights) / len(weights),
        }

    def _train(
        self,
        model: nn.Sequential,
        *,
        start: Start,
        weights: Tensor,
        method: Method,
        rate: float,
        seed: int,
    ) -> None:
        # The memory layout that convolutions are fastest in; a method that doesn't train is
        # measured in it as well, so that all round alike.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not method.trains:
            return
        fine_tune(
            model,
            start.split.train,
            weights,
            method,
            rate=rate,
            seed=seed,
            epochs=self.sizes.epochs,
            batch=self.sizes.batch,
            dtype=self.sizes.dtype,
            workers=self.recipe.workers,
        )
