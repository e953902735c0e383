"""The first batch: what the labels of a run mean, and the proof that its loss is the model's own.

Before the first step the model is called once more, with its labels (first_outputs.py):

    the model's own loss of the batch  ─┐  the same number, and the same gradient
    the loss by name, all weights 1    ─┘  with respect to the logits?  taken : refused

Numbers alone would not tell: with a new head that predicts all classes alike, smoothing, class
weights and a shift leave the loss at log C. Where no gradient can be had (the logits are copies, or
too large to be held twice more), logits that differ among classes are waited for: the next step's
batch is looked at as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.rng import preserved_rng
from flowdata.integrations.first_outputs import FirstOutputs, outputs_of, with_bare_logits
from flowdata.integrations.sample_by_sample import own_run, tells_unit
from flowdata.integrations.trainer_loss import (
    RunLoss,
    SampleLoss,
    count_batch,
    takes_labels,
    weighted_loss,
)
from flowdata.models.as_loaded import as_loaded
from flowdata.models.calling import output_layer_of, unwrapped
from flowdata.models.compiled import as_written
from flowdata.models.copies import same_buffers
from flowdata.targets.labels import describe_batch, split_batch
from flowdata.targets.meaning import agreed_name, check_are_logits, name_by_labels
from flowdata.targets.own_loss import term_factors
from flowdata.targets.predictions import are_known_last, logits_of
from flowdata.targets.which_loss import OWN, loss_of_model

_MOST_LOGITS = 2**26  # of which a gradient is held twice: 256 MiB each in float32
_BY_SHAPE = ("causal_lm", "cross_entropy", "binary_cross_entropy", "mse")
_REMEDY = (
    "pass loss= another name, a callable (outputs, batch) -> (B,) losses, or loss='own', which "
    "takes the model's own loss, one sample at a time"
)


@dataclass(frozen=True)
class Decision:
    """What a run is trained on, as far as one batch tells.

    Attributes:
        run: the loss.
        is_settled: whether the batch proved it; else another has to be looked at.
        is_known: whether the batch had a target at all.
    """

    run: RunLoss
    is_settled: bool = True
    is_known: bool = True


def decide(
    model: nn.Module,
    inputs: Mapping[str, Any],
    loss: str | SampleLoss,
    size: int,
    before: Decision | None = None,
) -> Decision:
    """Return what a run is trained on.

    Args:
        model: the model in training mode; its random generators and its buffers stay as they are.
        inputs: the first batch, without weights, on the model's device.
        loss: ``"auto"``, the name of a loss, ``"own"``, or a user's (outputs, batch) -> (B,), which
            is taken as it is.
        size: samples in the batch.
        before: what an earlier batch told, if it settled nothing.

    Raises:
        ValueError: the loss is not the model's own, or nothing tells which it is; the message has
            both numbers and the remedy.
    """
    if not isinstance(loss, str):
        # A user's function may read from the outputs what the model made of its labels.
        run = RunLoss(loss, term_factors(model), passes_labels=takes_labels(model, inputs))
        return Decision(run)
    tells = loss != OWN or tells_unit(inputs, size)
    if before is not None and not tells:
        return before
    with preserved_rng(), same_buffers(model), as_written(model), as_loaded(model):
        if loss == OWN:
            return Decision(own_run(model, inputs, size), is_settled=tells, is_known=tells)
        with torch.set_grad_enabled(_logits_are_small(model, inputs)):
            return _by_name(model, inputs, size, () if loss == "auto" else (loss,))


def _by_name(
    model: nn.Module, inputs: Mapping[str, Any], size: int, names: tuple[str, ...]
) -> Decision:
    """The loss by name that is the model's own, or that labels call for where it makes none."""
    first = outputs_of(model, inputs)
    comparison = _Comparison(model, inputs, size, first)
    if not first.readings:
        return comparison.by_labels(names)
    if first.logits is None or comparison.labels is None:
        raise ValueError(
            f"the model's own loss of the first batch is {first.readings[0].value:.6g}, and no "
            f"loss by name can be made of its outputs, {describe_batch(first.outputs)}, and "
            f"the batch, {describe_batch(inputs)}: {_REMEDY}"
        )
    decision = comparison.agreed(names)
    if decision is None and (again := with_bare_logits(first, model, inputs)):
        # A loss may write its gradient over the logits, as Liger's cross entropy does.
        decision = _Comparison(model, inputs, size, again).agreed(names)
    if decision is None:
        raise ValueError(comparison.disagreement(names))
    return decision


class _Comparison:
    """The losses by name of a batch, all weights 1, beside the model's own."""

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], size: int, first: FirstOutputs
    ) -> None:
        self.model, self.inputs, self.first = model, inputs, first
        self.labels = split_batch(inputs)[1]
        self.weights = torch.ones(size, dtype=torch.float32)
        self.by_class = loss_of_model(model)

    def agreed(self, names: tuple[str, ...]) -> Decision | None:
        """Return the loss that is the model's own, of those named or of all; None if none is.

        A batch without any target decides for now.
        """
        runs: dict[str, RunLoss] = {}

        def values_of(name: str) -> list[float | None]:
            for run, value in self._values([name]):
                reading = self.first.reading_of(value)
                if reading is not None:
                    runs[name] = replace(run, factors=reading.factors)
                    return [value.item()]
            return [None]

        own_values = [[reading.value for reading in self.first.readings]]
        if names:
            name = names[0] if values_of(names[0]) != [None] else None
        else:
            name = agreed_name(self.model, own_values, values_of, self.first.dtype)
        if name is None:
            return self._without_target(names)
        return Decision(runs[name], is_settled=name == "mse" or self.first.is_telling())

    def disagreement(self, names: tuple[str, ...]) -> str:
        """Return a message with the model's own loss and the nearest by name."""
        own = self.first.readings[0].value
        candidates = names or tuple(filter(None, (self.by_class, *_BY_SHAPE)))
        fitting = list(self._values(candidates))
        if not fitting:
            return (
                f"the model's own loss of the first batch is {own:.6g}, and its outputs "
                f"({describe_batch(self.first.outputs)}) don't fit its labels by any of the losses "
                f"{', '.join(map(repr, dict.fromkeys(candidates)))}: {_REMEDY}"
            )
        run, value = min(
            fitting, key=lambda each: (each[0].loss != self.by_class, abs(each[1].item() - own))
        )
        difference = self.first.difference(value, {})
        gradients = f" (their gradients differ by {difference:.1%})" if difference else ""
        return (
            f"the unweighted loss of the first batch is {value.item():.6g} by loss={run.loss!r}, "
            f"and the model's own is {own:.6g}{gradients}: the model trains on something else "
            "(class weights, smoothing, a shift, a replaced loss_function, a further term …), "
            f"which the weights would drop; {_REMEDY}"
        )

    def by_labels(self, names: tuple[str, ...]) -> Decision:
        """Return the loss that labels call for, of a model that makes none."""
        logits, by_class = logits_of(self.first.outputs), self.by_class
        name = (*names, by_class)[0] or name_by_labels(
            [self.inputs], lambda: self.inputs, lambda: logits
        )
        if not names:
            check_are_logits(name, [logits])
        is_open = name == "binary_cross_entropy" and not (names or by_class)
        if is_open and self.labels is not None and self.labels.is_floating_point():
            raise ValueError(
                "the model makes no loss of its own, and the labels of the first batch are all 0 "
                "or 1: they can be answers, yes or no, or numbers; pass "
                "loss='binary_cross_entropy' or loss='mse'"
            )
        runs = list(self._variants(name))
        if len(runs) > 1 and not are_known_last(self.model, self.labels):  # type: ignore[arg-type]
            raise ValueError(
                f"loss='cross_entropy': logits of shape {tuple(logits.shape)} have as many classes "
                "as places, so that either axis could be the classes'; pass loss=(outputs, batch) "
                "-> (B,) losses"
            )
        run = runs[0] if runs else RunLoss(name, passes_labels=self.first.passes_labels)
        self._loss(run)  # what doesn't fit is told here, by the loss itself
        return Decision(replace(run, factors=term_factors(self.model)))

    def _variants(self, name: str) -> Iterator[RunLoss]:
        """A loss by name, with classes on each axis that they can be on."""
        logits, labels = logits_of(self.first.outputs), self.labels
        virtual = _virtual_tokens(self.model, logits, labels)
        run = RunLoss(name, passes_labels=self.first.passes_labels, virtual_tokens=virtual)
        if name != "cross_entropy" or labels is None or labels.is_floating_point():
            yield run
            return
        tokens = labels.shape[1] + run.virtual_tokens if labels.dim() == 2 else None
        shape = labels.shape if tokens is None else torch.Size((len(labels), tokens))
        if shape == logits.shape[:-1]:
            yield replace(run, classes_last=True)
        if shape == logits.shape[:1] + logits.shape[2:]:
            yield replace(run, classes_last=False)

    def _values(self, names: Sequence[str]) -> Iterator[tuple[RunLoss, Tensor]]:
        """The losses that fit outputs and labels, with their values; NaN without a target."""
        for name in dict.fromkeys(names):
            for run in self._variants(name):
                try:
                    value = self._loss(run)
                    count = count_batch(run, self.inputs, self.weights, normalize="count")
                except (ValueError, RuntimeError, IndexError, TypeError):
                    continue
                yield run, value if count else torch.full_like(value, torch.nan)

    def _loss(self, run: RunLoss) -> Tensor:
        outputs, inputs, weights = self.first.outputs, self.inputs, self.weights
        return weighted_loss(run, outputs, inputs, weights, normalize="count", num_items=None)

    def _without_target(self, names: tuple[str, ...]) -> Decision | None:
        """A decision for now, of a batch in which nothing is a target."""
        if self.first.readings[0].value == self.first.readings[0].value:
            return None
        candidates = filter(None, (*names, self.by_class, "causal_lm", "cross_entropy"))
        for run, value in self._values([*candidates]):
            if value.isnan():
                run = replace(run, factors=term_factors(self.model))
                return Decision(run, is_settled=False, is_known=False)
        return None


def merged(decisions: Sequence[Decision]) -> Decision:
    """Return what all ranks train on.

    Args:
        decisions: each rank's.

    Raises:
        ValueError: two ranks decided differently.
    """
    known = [decision for decision in decisions if decision.is_known] or list(decisions)
    different = next((each.run for each in known if each.run != known[0].run), None)
    if different is not None:
        raise ValueError(
            f"the first batches of two ranks call for different losses, {known[0].run.loss!r} and "
            f"{different.loss!r}: say which it is by loss="
        )
    return replace(known[0], is_settled=all(decision.is_settled for decision in decisions))


def _logits_are_small(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether gradients by the logits fit beside a training step."""
    layer, labels = output_layer_of(unwrapped(model)), split_batch(inputs)[1]
    classes = getattr(layer, "out_features", 1)
    return labels is None or labels.numel() * classes <= _MOST_LOGITS


def _virtual_tokens(model: nn.Module, logits: Tensor, labels: Tensor | None) -> int:
    """How many positions of the logits are PEFT's virtual tokens."""
    config: Any = getattr(unwrapped(model), "active_peft_config", None)
    number = getattr(config, "num_virtual_tokens", None) or 0
    if labels is None or logits.dim() != 3 or labels.dim() != 2:
        return 0
    return number if logits.shape[1] == labels.shape[1] + number else 0
