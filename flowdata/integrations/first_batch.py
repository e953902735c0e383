"""The first batch: what the labels of a run mean, and the proof that its loss is the model's own.

Before the first step the model is called once more, with its labels, as the Trainer would call it:

    the model's own loss of the batch  ─┐  the same number, and the same gradient
    the loss by name, all weights 1    ─┘  with respect to the logits?  taken : refused

Numbers alone would not tell: with a new head that predicts all classes alike, smoothing, class
weights and a shift leave the loss at log C. Where no gradient can be had (the logits are copies, or
too large to be held twice more), logits that differ among classes are waited for: the next step's
batch is looked at as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.rng import preserved_rng
from flowdata.integrations.sample_by_sample import own_run, tells_unit
from flowdata.integrations.trainer_loss import (
    RunLoss,
    SampleLoss,
    count_batch,
    needs_labels,
    takes_labels,
    weighted_loss,
    without_labels,
)
from flowdata.models.calling import innermost, output_layer_of, unwrapped
from flowdata.models.compiled import as_written
from flowdata.models.copies import same_buffers
from flowdata.models.rope import loaded_frequencies
from flowdata.targets.labels import describe_batch, split_batch
from flowdata.targets.meaning import agreed_name, name_by_labels
from flowdata.targets.own_loss import (
    Reading,
    agrees,
    named_terms,
    own_loss_of,
    readings,
    term_factors,
)
from flowdata.targets.predictions import is_of_tokens, logits_of
from flowdata.targets.which_loss import OWN, loss_of_model

_MOST_LOGITS = 2**26  # of which a gradient is held twice: 256 MiB each in float32
_SPREAD = 0.1  # nats between logits, from which losses of other meanings differ
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
    with preserved_rng(), same_buffers(model), as_written(model), loaded_frequencies(model):
        if loss == OWN:
            return Decision(own_run(model, inputs, size), is_settled=tells, is_known=tells)
        with torch.set_grad_enabled(_logits_are_small(model, inputs)):
            return _Look(model, inputs, size).decide(loss)


class _Look:
    """A batch's outputs, the model's own loss of them, and the losses by name."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], size: int) -> None:
        self.model, self.inputs = model, inputs
        takes = takes_labels(model, inputs)
        outputs = model(**inputs) if takes else model(**without_labels(inputs))
        self.readings = readings(model, outputs, is_labelled=takes)
        self.own = own_loss_of(outputs, is_labelled=takes)
        self.passes_labels = needs_labels(model, inputs)
        if self.own is not None and takes and not _has_logits(outputs):
            # A fused loss, such as Liger's, makes no logits where it is given labels.
            bare = _without_error(lambda: model(**without_labels(inputs)))
            if _has_logits(bare):
                outputs, self.passes_labels = bare, False
        self.outputs = outputs
        self.labels = split_batch(inputs)[1]
        self.weights = torch.ones(size)

    def decide(self, loss: str) -> Decision:
        names = () if loss == "auto" else (loss,)
        if not self.readings:
            return self._by_labels(names)
        if self.labels is None or not _has_logits(self.outputs):
            raise ValueError(
                f"the model's own loss of the first batch is {self.readings[0].value:.6g}, and no "
                f"loss by name can be made of its outputs, {describe_batch(self.outputs)}, and "
                f"the batch, {describe_batch(self.inputs)}: {_REMEDY}"
            )
        runs: dict[str, RunLoss] = {}

        def values_of(name: str) -> list[float | None]:
            for run in self._variants(name):
                value = self._value(run)
                reading = None if value is None else self._reading(value)
                if value is not None and reading and not self._difference(value, reading.factors):
                    runs[name] = replace(run, factors=reading.factors)
                    return [value.item()]
            return [None]

        own_values = [[reading.value for reading in self.readings]]
        if names:
            name = names[0] if values_of(names[0]) != [None] else None
        else:
            name = agreed_name(self.model, own_values, values_of, self._dtype())
        if name is None:
            return self._without_target(names) or self._refuse(names)
        return Decision(runs[name], is_settled=self._is_telling(name))

    def _variants(self, name: str) -> Iterator[RunLoss]:
        """A loss by name, with classes on each axis that they can be on."""
        logits, labels = logits_of(self.outputs), self.labels
        virtual = _virtual_tokens(self.model, logits, labels)
        run = RunLoss(name, passes_labels=self.passes_labels, virtual_tokens=virtual)
        if name != "cross_entropy" or labels is None or labels.is_floating_point():
            yield run
            return
        tokens = labels.shape[1] + run.virtual_tokens if labels.dim() == 2 else None
        shape = labels.shape if tokens is None else torch.Size((len(labels), tokens))
        if shape == logits.shape[:-1]:
            yield replace(run, classes_last=True)
        if shape == logits.shape[:1] + logits.shape[2:]:
            yield replace(run, classes_last=False)

    def _value(self, run: RunLoss) -> Tensor | None:
        """The batch's loss with all weights 1; NaN without a target; None where nothing fits."""
        options: Any = {"normalize": "count"}
        try:
            value = weighted_loss(
                run, self.outputs, self.inputs, self.weights, num_items=None, **options
            )
            count = count_batch(run, self.inputs, self.weights, **options)
        except (ValueError, RuntimeError, IndexError, TypeError):
            return None
        return value if count else torch.full_like(value, torch.nan)

    def _reading(self, value: Tensor) -> Reading | None:
        """What the model's own loss means if it is this value."""
        dtype = self._dtype()
        return next((r for r in self.readings if agrees(r.value, value.item(), dtype)), None)

    def _difference(self, value: Tensor, factors: Mapping[str, float]) -> float:
        """How far the gradients by the logits are beyond rounding, relative; 0 where they agree.

        Also 0 where no gradient can be had, see `_is_telling`.
        """
        named = self._gradient(value)
        own = None if self.own is None else self._gradient(self.own)
        if own is None or named is None:
            return 0.0
        terms = named_terms(self.outputs, factors)
        if isinstance(terms, Tensor) and (of_terms := self._gradient(terms)) is not None:
            own = own - of_terms
        scale = torch.maximum(own.abs().max(), named.abs().max()).item()
        error = (own.float() - named.float()).abs().max().item()
        leeway = 1e-4 + 4 * torch.finfo(own.dtype).eps * (own.dtype.itemsize < 4)
        return error / scale if scale and not error <= leeway * scale else 0.0

    def _gradient(self, loss: Tensor) -> Tensor | None:
        """The gradient of a loss by the logits; None where they are none of its inputs."""
        logits = logits_of(self.outputs)
        if not (loss.requires_grad and logits.requires_grad):
            return None
        return torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0]

    def _is_telling(self, name: str) -> bool:
        """Whether the comparison could have failed."""
        has_gradient = self.own is not None and self._gradient(self.own) is not None
        logits = logits_of(self.outputs)
        return has_gradient or name == "mse" or (logits.max() - logits.min()).item() > _SPREAD

    def _dtype(self) -> torch.dtype:
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def _without_target(self, names: tuple[str, ...]) -> Decision | None:
        """A decision for now, of a batch in which nothing is a target."""
        if self.readings[0].value == self.readings[0].value:
            return None
        by_class = loss_of_model(innermost(self.model))
        for name in filter(None, (*names, by_class, "causal_lm", "cross_entropy")):
            for run in self._variants(name):
                value = self._value(run)
                if value is not None and value.isnan():
                    return Decision(run, is_settled=False, is_known=False)
        return None

    def _refuse(self, names: tuple[str, ...]) -> Decision:
        """Raise ValueError with both numbers."""
        by_class = loss_of_model(innermost(self.model))
        by_shape = ("causal_lm", "cross_entropy", "binary_cross_entropy", "mse")
        own = self.readings[0].value
        candidates = names or tuple(filter(None, (by_class, *by_shape)))
        pairs = [(name, self._value(run)) for name in candidates for run in self._variants(name)]
        fitting = [(name, value) for name, value in pairs if value is not None]
        if not fitting:
            raise ValueError(
                f"the model's own loss of the first batch is {own:.6g}, and its outputs "
                f"({describe_batch(self.outputs)}) don't fit its labels by any of the losses "
                f"{', '.join(map(repr, candidates))}: {_REMEDY}"
            )
        name, value = min(
            fitting, key=lambda each: (each[0] != by_class, abs(each[1].item() - own))
        )
        difference = self._difference(value, {})
        gradients = f" (their gradients differ by {difference:.1%})" if difference else ""
        raise ValueError(
            f"the unweighted loss of the first batch is {value.item():.6g} by loss={name!r}, and "
            f"the model's own is {own:.6g}{gradients}: the model trains on something else (class "
            "weights, smoothing, a shift, a replaced loss_function, a further term …), which the "
            f"weights would drop; {_REMEDY}"
        )

    def _by_labels(self, names: tuple[str, ...]) -> Decision:
        """The loss that labels call for, of a model that makes none."""
        logits, by_class = logits_of(self.outputs), loss_of_model(innermost(self.model))
        name = (*names, by_class)[0] or name_by_labels(
            [self.inputs], lambda: self.inputs, lambda: logits
        )
        is_open = name == "binary_cross_entropy" and not (names or by_class)
        if is_open and self.labels is not None and self.labels.is_floating_point():
            raise ValueError(
                "the model makes no loss of its own, and the labels of the first batch are all 0 "
                "or 1: they can be answers, yes or no, or numbers; pass "
                "loss='binary_cross_entropy' or loss='mse'"
            )
        runs = list(self._variants(name))
        if len(runs) > 1 and not is_of_tokens(self.model, self.inputs, self.labels):  # type: ignore[arg-type]
            raise ValueError(
                f"loss='cross_entropy': logits of shape {tuple(logits.shape)} have as many classes "
                "as places, so that either axis could be the classes'; pass loss=(outputs, batch) "
                "-> (B,) losses"
            )
        run = runs[0] if runs else RunLoss(name, passes_labels=self.passes_labels)
        # What doesn't fit is told here, by the loss itself.
        weighted_loss(
            run, self.outputs, self.inputs, self.weights, normalize="count", num_items=None
        )
        return Decision(replace(run, factors=term_factors(self.model)))


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


def _without_error(call: Callable[[], Any]) -> Any:
    """What a call returns, None where it raises: a `forward` may demand its labels."""
    try:
        return call()
    except Exception:  # whatever it is, the outputs with labels are there
        return None


def _has_logits(outputs: Any) -> bool:
    try:
        logits_of(outputs)
    except ValueError:
        return False
    return True
