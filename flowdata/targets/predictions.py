"""Tasks: what each loss is, for models that give one prediction for each target.

A method takes a model and a batch, on the host, and returns the loss of every single target
(`TargetLosses`); the mean over a sample's targets is the sample's loss. Language models have
methods of their own, in language.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.models.tensors import CPU, to_device
from flowdata.targets.columns import columns_of_logits

IGNORE_INDEX = -100
_PROBLEMS = {  # Hugging Face's names
    "regression": "mse",
    "single_label_classification": "cross_entropy",
    "multi_label_classification": "binary_cross_entropy",
}
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
LANGUAGE_LOSSES = ("causal_lm", "seq2seq_lm", "masked_lm")
PREDICTION_LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")
LOSSES = (*LANGUAGE_LOSSES, *PREDICTION_LOSSES)


@dataclass(frozen=True)
class TargetLosses:
    """The losses of a batch's targets, and whose they are.

    Attributes:
        values: (n,) float32, sample after sample.
        counts: (B,) int64, targets of each sample.
        further: further columns by name (see columns.py), (n,) float32 each.
    """

    values: Tensor
    counts: Tensor
    further: Mapping[str, Tensor] = field(default_factory=dict)

    def columns(self, *, token_losses: bool) -> dict[str, Tensor]:
        """Return what the store keeps of the batch; a sample's value is NaN if not finite."""
        counts = self.counts.cpu()
        values = {"loss": self.values, **self.further}
        columns = {name: _means(each.detach().cpu(), counts) for name, each in values.items()}
        columns["count"] = counts
        if token_losses:
            columns["token_loss"] = self.values.detach().cpu().float()
        return columns


def _means(values: Tensor, counts: Tensor) -> Tensor:
    sums = torch.segment_reduce(values.double(), "sum", lengths=counts, initial=0.0)
    means = (sums / counts).float()  # 0 / 0 is NaN: no target, no value
    return torch.where(means.isfinite(), means, torch.nan)


Method = Callable[[nn.Module, Any], TargetLosses]


def loss_of(model: nn.Module, batch: Any) -> str:
    """Return the name of the loss that a model computes, or that a batch of samples calls for.

    Raises:
        ValueError: see `loss_of_batch`.
    """
    inner = innermost(model)
    said = loss_of_model(inner)
    if said is None and type(inner).__name__.endswith(_CLASSIFIERS):
        targets = split_batch(batch)[1]
        if targets is not None:  # as Hugging Face's classifiers choose
            return "binary_cross_entropy" if targets.is_floating_point() else "cross_entropy"
    return said or loss_of_batch(batch)


def loss_of_model(model: nn.Module) -> str | None:
    """Return the name of the loss that a Hugging Face model's class says, if it says one."""
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    for ending, loss in (
        ("ForCausalLM", "causal_lm"),
        ("LMHeadModel", "causal_lm"),
        ("ForMaskedLM", "masked_lm"),
        ("ForTokenClassification", "cross_entropy"),
    ):
        if name.endswith(ending):
            return loss
    if name.endswith("ForConditionalGeneration") and config is not None:
        return "seq2seq_lm" if config.is_encoder_decoder else "causal_lm"
    if name.endswith(_CLASSIFIERS) and config is not None:
        problem = "regression" if config.num_labels == 1 else None
        return _PROBLEMS.get(config.problem_type or problem or "")
    return None


def loss_of_batch(batch: Any) -> str:
    """Return the name of the loss that a batch of samples calls for.

    Token batches are causal language modelling, integer targets cross-entropy, (B, L) bools and
    floating targets that are all 0 or 1 (or −100) binary cross-entropy, other floating targets
    the mean squared error.

    Raises:
        ValueError: nothing fits; the message says what to pass.
    """
    inputs, targets = split_batch(batch)
    if targets is None or (targets.dim() == 2 and _same_shape(inputs, targets)):
        if isinstance(inputs, Mapping) and "input_ids" in inputs:
            return "causal_lm"
        raise ValueError(
            "loss='auto' found no targets in the batch: samples must be (input, target) pairs or "
            f"dicts with 'labels', got {_describe(batch)}; pass loss=callable(model, batch)"
        )
    if targets.dtype == torch.bool and targets.dim() > 1:
        return "binary_cross_entropy"
    if not targets.is_floating_point():
        return "cross_entropy"
    is_binary = (targets == 0) | (targets == 1) | (targets == IGNORE_INDEX)
    return "binary_cross_entropy" if is_binary.all() else "mse"


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return a batch's inputs and targets: a pair, or a mapping with `labels` (or `label`)."""
    if isinstance(batch, Mapping):
        name = next((n for n in ("labels", "label", "targets", "target") if n in batch), None)
        inputs = {key: value for key, value in batch.items() if key != name}
        return inputs, None if name is None else torch.as_tensor(batch[name])
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    return batch, None


def prediction_method(loss: str, columns: Sequence[str] = (), device: torch.device = CPU) -> Method:
    """Return the method of a loss between a model's predictions and its targets.

    Args:
        loss: one of `PREDICTION_LOSSES`.
        columns: names of further columns, for ``"cross_entropy"`` alone.
        device: where the model takes its inputs.
    """

    def run(model: nn.Module, batch: Any) -> TargetLosses:
        inputs, targets = split_batch(batch)
        if targets is None:
            raise ValueError(
                f"loss={loss!r} needs (input, target) pairs or dicts with 'labels', got "
                f"{_describe(batch)}; pass loss=callable(model, batch) for another layout"
            )
        with _last_linear(model, wanted="gradient_norm" in columns) as calls:
            predictions = predict(model, to_device(inputs, device))
        if loss == "binary_cross_entropy":
            return binary_cross_entropy(predictions.float(), targets)
        if loss == "mse":
            return squared_error(predictions.float(), targets)
        logits = predictions.float()
        hidden = next((h for h, out in calls if torch.equal(out.float(), logits)), None)
        last = classes_come_last(model, inputs, targets)
        return cross_entropy(logits, targets, columns, hidden, classes_last=last)

    return run


def classes_come_last(model: nn.Module, inputs: Any, targets: Tensor) -> bool:
    """Whether logits of (B, T) targets are (B, T, C): of a model of tokens, or Hugging Face's.

    Their shape alone does not tell where T is C.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.shape == targets.shape:
        return targets.dim() == 2
    return targets.dim() == 2 and hasattr(innermost(model), "config")


def callable_method(
    function: Callable[[nn.Module, Any], Tensor], device: torch.device = CPU
) -> Method:
    """Return the method of a user's own `(model, batch) -> (B,)` losses."""

    def run(model: nn.Module, batch: Any) -> TargetLosses:
        values = function(model, to_device(batch, device))
        if not isinstance(values, Tensor) or values.dim() != 1:
            raise ValueError(
                "loss=callable must return a tensor of shape (B,), one loss for each sample, got "
                f"{tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__}; "
                "use reduction='none'"
            )
        return TargetLosses(values.float(), torch.ones(len(values), dtype=torch.long))

    return run


def predict(model: nn.Module, inputs: Any) -> Tensor:
    """Return a model's predictions: its output, or its output's `logits`."""
    if isinstance(inputs, Mapping):
        output = call_with(model, inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    return logits_of(output)


def call_with(model: nn.Module, fields: Mapping[str, Any], **options: Any) -> Any:
    """Call a model with those fields that its `forward` takes by name."""
    parameters = inspect.signature(innermost(model).forward).parameters
    named = {name for name in fields if name in parameters}
    if not named and not _takes_any(parameters):
        first = fields["input_ids"] if "input_ids" in fields else next(iter(fields.values()))
        return model(first)
    if not named:
        named = {name for name, value in fields.items() if isinstance(value, Tensor)}
    taken = {
        name: value
        for name, value in options.items()
        if name in parameters or _takes_any(parameters)
    }
    return model(**{name: fields[name] for name in named}, **taken)


def unwrapped(model: Any) -> Any:
    """Return the model inside torch.compile's and DDP's wrappers."""
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    return model


def innermost(model: Any) -> Any:
    """Return the model inside a PEFT model, else the model itself."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: itself, its `logits`, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__}, in which no logits were found; "
            "pass loss=callable(model, batch)"
        )
    return output


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    columns: Sequence[str] = (),
    hidden: Tensor | None = None,
    *,
    classes_last: bool = False,
) -> TargetLosses:
    """Losses of classes: targets (B, …) int64, −100 ignored, or (B, C) class probabilities.

    Logits are (B, C, …), or (B, …, C) with `classes_last` or where only that fits; `hidden` is
    (B, …, d), what the layer that made them was given. Where targets are on the host, nothing
    waits for the device.
    """
    if targets.is_floating_point():
        targets = to_device(targets, logits.device)
        _check_shapes("cross_entropy", logits, targets, targets.shape)
        losses = F.cross_entropy(logits, targets.float(), reduction="none")
        further = columns_of_logits(logits, targets.float(), columns, hidden)
        return TargetLosses(losses, torch.ones(len(losses), dtype=torch.long), further)
    targets = targets.long()
    if logits.dim() == 1 or logits.shape[1] == 1:
        raise ValueError(
            f"cross_entropy needs logits of at least two classes, got shape {tuple(logits.shape)}; "
            "for one logit a sample pass loss='binary_cross_entropy'"
        )
    classes_last |= targets.shape != logits.shape[:1] + logits.shape[2:]
    if classes_last and logits.shape[:-1] == targets.shape:
        logits = logits.movedim(-1, 1)
    _check_shapes("cross_entropy", logits, targets, logits.shape[:1] + logits.shape[2:])
    kept = targets != IGNORE_INDEX
    strange = targets[kept & ((targets < 0) | (targets >= logits.shape[1]))]
    if len(strange):
        raise ValueError(
            f"loss='cross_entropy' needs classes from 0 to {logits.shape[1] - 1}, as the model has "
            f"them, or {IGNORE_INDEX} where nothing counts, got {int(strange[0])}"
        )
    counts, places = kept[:, None].flatten(1).sum(1), kept.flatten().nonzero().flatten()
    targets, places = to_device([targets, places], logits.device)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    further = {}
    if columns:
        rows = logits.movedim(1, -1).flatten(0, -2)[places]
        seen = None if hidden is None else hidden.reshape(targets.numel(), -1)[places]
        further = columns_of_logits(rows, targets.flatten()[places], columns, seen)
    return TargetLosses(losses.flatten()[places], counts, further)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> TargetLosses:
    """Losses of yes-or-no targets: logits and targets (B,), (B, 1) or (B, L).

    Targets lie between 0 and 1; −100 is ignored, and NaN gives no number.
    """
    if logits.dim() == targets.dim() + 1 and logits.shape[-1] == 1:
        logits = logits.squeeze(-1)
    _check_shapes("binary_cross_entropy", logits, targets, logits.shape)
    kept = targets != IGNORE_INDEX
    strange = targets[kept & ((targets < 0) | (targets > 1))]
    if len(strange):
        raise ValueError(
            "loss='binary_cross_entropy' needs targets between 0 and 1, or −100 where nothing "
            f"counts, got {strange[0].item():g}"
        )
    counts, places = kept.reshape(len(kept), -1).sum(1), kept.flatten().nonzero().flatten()
    wanted, places = to_device([targets.flatten()[places].float(), places], logits.device)
    rows = logits.flatten()[places]
    losses = F.binary_cross_entropy_with_logits(rows, wanted, reduction="none")
    return TargetLosses(losses, counts)


def squared_error(predictions: Tensor, targets: Tensor) -> TargetLosses:
    """Squared errors: predictions and targets of one shape, (B, …)."""
    if predictions.dim() == targets.dim() + 1 and predictions.shape[-1] == 1:
        predictions = predictions.squeeze(-1)
    _check_shapes("mse", predictions, targets, predictions.shape)
    losses = (predictions - to_device(targets, predictions.device).float()).square()
    each = losses.reshape(len(losses), -1)
    return TargetLosses(each.flatten(), torch.full((len(each),), each.shape[1]))


@contextmanager
def _last_linear(model: nn.Module, *, wanted: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record what the linear layer that is called last is given and gives, where wanted."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[:] = [(args[0], output)]

    layers = [module for module in model.modules() if wanted and isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _check_shapes(loss: str, logits: Tensor, targets: Tensor, expected: torch.Size) -> None:
    if targets.shape != expected:
        binary = loss == "cross_entropy" and targets.shape == logits.shape
        hint = "; for a yes or no of each class pass loss='binary_cross_entropy'" if binary else ""
        raise ValueError(
            f"loss={loss!r}: predictions have shape {tuple(logits.shape)}, so targets must have "
            f"shape {tuple(expected)}, got {tuple(targets.shape)}{hint}"
        )


def _same_shape(inputs: Any, targets: Tensor) -> bool:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    return isinstance(ids, Tensor) and ids.shape == targets.shape


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, batch))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
