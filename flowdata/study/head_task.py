"""A task with a head of its own, as the runs of a study: the recipe, by any method.

The recipe's last step fits the head once more on the fine-tuned body (`flowdata.study.recipe`).
Every method that trains gets this step, so that none has an advantage by it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from flowdata.drift import Drift, DriftMeter
from flowdata.study.classify import fine_tune, sample_weights
from flowdata.study.hits import answers, packed
from flowdata.study.methods import METHODS
from flowdata.study.parts import output_anchor
from flowdata.study.recipe import Beginning, as_old_network, begin, fit_new_head
from flowdata.study.records import Record
from flowdata.study.training import Method
from flowdata.weights import effective_sample_size, resolve_temperature

_PROBE_STRENGTH = 1e-3
_OWN_PROBE = "new task"
_PROBE_SAMPLES = 512  # of the new task, on which the drift is measured


@dataclass(frozen=True)
class Sizes:
    """How a run trains, and the numbers of images that its data is to be cut to.

    A `HeadTask` takes `epochs`, `batch` and `dtype` from here. It takes all the data that it is
    given: the numbers of images are for the function that makes the `Split`.

    Attributes:
        images: number of the new task's images to train on, for the maker of the split.
        epochs: number of passes over the training images.
        batch: number of images in a batch.
        validation: number of the new task's images that the learning rate is chosen by, for the
            maker of the split.
        test: number of each task's test images, for the maker of the split.
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
        train: the samples to fine-tune on.
        scored: the same samples without augmentation, for losses and heads.
        validation: the samples that the learning rate is chosen by.
        test: the samples that accuracy is measured on.
    """

    train: Any
    scored: Any
    validation: Any
    test: Any


class Outcome(NamedTuple):
    """What a run came to, for measures of one's own.

    Attributes:
        network: body and new head, fine-tuned, in eval mode.
        beginning: the network as it was before, and its scores.
        split: the new task's data.
        meters: the drift meters by the names of their probes.
        drifts: what the meters measured.
        hits: (N,) bool, the right answers on the new task's test samples.
    """

    network: nn.Sequential
    beginning: Beginning
    split: Split
    meters: dict[str, DriftMeter]
    drifts: dict[str, Drift]
    hits: Tensor


class HeadTask:
    """Runs a method on one task; `run` is what `run_study` takes.

    Args:
        old: body, (B, …) → (B, D), and the head it was trained with, an `nn.Linear`.
        old_test: samples (input, class) of the old task.
        old_name: the old task's name, for the records.
        classes: number of the new task's classes.
        split: seed → the new task's data, all of which is used.
        sizes: see `Sizes`; of its numbers of images nothing is cut here.
        strength: of the ℓ2 penalty of the heads that are fitted, see `fit_head`.
        workers: number of processes that load samples; 0 suits data in memory.
        methods: methods by the names that `run` takes.
        columns: columns of the scores that methods need beside the losses, see `LossScorer`.
        probes: samples by name, on which the drift of every run is measured beside the new task's
            own, which are ``"new task"``; see `flowdata.drift`.
        more: outcome → further entries of the run's record; it must leave the network as it is.

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
        strength: float = _PROBE_STRENGTH,
        workers: int = 0,
        methods: Mapping[str, Method] = METHODS,
        columns: Sequence[str] = (),
        probes: Mapping[str, Any] = MappingProxyType({}),
        more: Callable[[Outcome], Record] | None = None,
    ) -> None:
        head = old[1]
        if not isinstance(head, nn.Linear):
            raise TypeError(f"old must end in an nn.Linear, got {type(head).__name__}")
        self.new_head = partial(nn.Linear, head.in_features, classes, device=head.weight.device)
        self.old, self.old_test, self.old_name = old, old_test, old_name
        self.split, self.sizes, self.strength, self.workers = split, sizes, strength, workers
        self.methods, self.columns, self.probes, self.more = methods, columns, probes, more
        self.begin = lru_cache(maxsize=8)(self._begin)  # all methods of a seed share one beginning

    def _begin(self, seed: int) -> tuple[Split, Beginning, dict[str, DriftMeter]]:
        split = self.split(seed)
        few = Subset(split.scored, range(min(_PROBE_SAMPLES, len(split.scored))))
        probes = {_OWN_PROBE: few, **self.probes}
        meters = {name: DriftMeter(self.old, probe) for name, probe in probes.items()}
        beginning = begin(
            self.old[0],
            self.new_head(),
            split.scored,
            strength=self.strength,
            dtype=self.sizes.dtype,
            columns=self.columns,
            workers=self.workers,
        )
        return split, beginning, meters

    def run(self, name: str, rate: float, seed: int) -> Record:
        """Fine-tune by a method; measure accuracy, in %, on both tasks, and the drift.

        Accuracies of a network that diverged are NaN, see `flowdata.study.accuracy`.
        """
        (split, beginning, meters), method = self.begin(seed), self.methods[name]
        network = copy.deepcopy(beginning.network)
        # Convolutions are fastest in this memory layout. It changes how they round, so a method
        # that doesn't train is measured in it as well.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = sample_weights(method, beginning.scores)
        if method.trains:
            self._fine_tune(network, split, weights, _held(method, meters), rate, seed)
        measure = partial(answers, dtype=self.sizes.dtype, workers=self.workers)
        validation, target = measure(network, split.validation), measure(network, split.test)
        drifts = {probe: meter(network) for probe, meter in meters.items()}
        outcome = Outcome(network, beginning, split, meters, drifts, target.hits)
        more = {} if self.more is None else self.more(outcome)
        retained = measure(as_old_network(network, self.old), self.old_test)
        return {
            "validation": validation.accuracy,
            "target": {"accuracy": target.accuracy},
            "retained": {f"{self.old_name} accuracy": retained.accuracy},
            "drift": {probe: drift.to_dict() for probe, drift in drifts.items()},
            "hits": {"target": packed(target.hits), "retained": packed(retained.hits)},
            "items": {"target": len(target.hits), "retained": len(retained.hits)},
            **more,
            "median_loss": resolve_temperature(beginning.scores.losses, "median"),
            "mean_weight": weights.mean().item(),
            "effective_share": effective_sample_size(weights) / len(weights),
        }

    def _fine_tune(
        self,
        network: nn.Sequential,
        split: Split,
        weights: Tensor,
        method: Method,
        rate: float,
        seed: int,
    ) -> None:
        """Train head and body in place, and fit the head once more."""
        sizes = self.sizes
        fine_tune(
            network,
            split.train,
            weights,
            method,
            rate=rate,
            seed=seed,
            epochs=sizes.epochs,
            batch=sizes.batch,
            dtype=sizes.dtype,
            workers=self.workers,
        )
        if _is_finite(network):  # a body that diverged has no features to fit a head to
            fit_new_head(
                network,
                split.scored,
                strength=self.strength,
                dtype=sizes.dtype,
                workers=self.workers,
            )


def _held(method: Method, meters: Mapping[str, DriftMeter]) -> Method:
    """A method whose hold on the outputs is a part, on the new task's own images."""
    if not method.hold:
        return method
    part = output_anchor(meters[_OWN_PROBE], method.hold)
    return replace(method, parts=(*method.parts, part), hold=0.0)


def _is_finite(model: nn.Module) -> bool:
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())
