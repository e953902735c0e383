"""Labels: which part of a batch they are, and the mark of positions without a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # PyTorch's and Hugging Face's mark of a position without a target
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # which no layer or loss of PyTorch takes
LABEL_FIELDS = ("labels", "label", "targets", "target")  # the first that a batch has counts
_PARTS_NAMED = 4  # of a batch that is described


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return a batch's inputs and its targets, None where it has none.

    Args:
        batch: an (inputs, targets) pair, or a mapping with a field `labels`, `label`, `targets`
            or `target`; of anything else all is inputs.
    """
    if isinstance(batch, Mapping):
        name = label_field(batch)
        inputs = {key: value for key, value in batch.items() if key != name}
        return inputs, None if name is None else _as_targets(name, batch[name])
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    return batch, None


def split_unread(batch: Any) -> tuple[Any, Any]:
    """Return a batch's inputs and its labels for a model that makes a loss of them itself.

    Labels that are no numbers, such as the boxes of a picture in a list of dicts, stay as they are.

    Raises:
        ValueError: they are strings or None.
    """
    try:
        return split_batch(batch)
    except ValueError:
        name = label_field(batch)
        if any(isinstance(value, str) or value is None for value in batch[name]):
            raise
        return {key: value for key, value in batch.items() if key != name}, batch[name]


def token_ids_of(inputs: Any) -> Tensor | None:
    """Return a batch's token ids, (B, T) integers; None where its inputs are none."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    is_ids = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    return ids if is_ids else None


def label_field(batch: Mapping[str, Any]) -> str | None:
    """Return the name of the field that holds a batch's labels, None where it has none."""
    return next((field for field in LABEL_FIELDS if field in batch), None)


def _as_targets(name: str, values: Any) -> Tensor:
    """A batch's targets as a tensor; unsigned numbers as PyTorch's losses take them."""
    try:
        targets = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        strange = next((v for v in values if isinstance(v, str) or v is None), values)
        raise ValueError(
            f"{name!r} must be numbers, got {strange!r}: {_numbering(strange)}; without targets "
            "leave the field out"
        ) from error
    return targets.long() if targets.dtype in UNSIGNED else targets


def _numbering(label: Any) -> str:
    """How to make a class number of a label that is none."""
    how = f", as by class_names.index({label!r})" if isinstance(label, str) else ""
    return (
        f"give each class its number in the model (int64, from 0 on){how}, and {IGNORE_INDEX} "
        "where nothing counts"
    )


def strings_for_targets(batch: Any) -> str:
    """Return what to do where the targets of an (inputs, targets) pair are strings, else ``""``.

    Example:
        >>> strings_for_targets([torch.ones(2, 3), ("cat", "dog")])[:51]
        "the targets are strings, such as 'cat', and must be"
    """
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    targets = batch[1] if is_pair else None
    if not isinstance(targets, tuple | list) or not targets:
        return ""
    first = targets[0]
    if not isinstance(first, str | bytes):
        return ""
    first = str(first) if isinstance(first, str) else first  # NumPy's strings are spelt otherwise
    return f"the targets are strings, such as {first!r}, and must be numbers: {_numbering(first)}"


def describe_batch(batch: Any) -> str:
    """Return what a batch looks like, for a message.

    Example:
        >>> describe_batch([1, 2, 3])
        'a list of 3 (int, int, int)'
    """
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, batch))}"
    if isinstance(batch, tuple | list):
        kinds = [type(part).__name__ for part in batch[:_PARTS_NAMED]]
        rest = ["…"] if len(batch) > _PARTS_NAMED else []
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(kinds + rest)})"
    return f"a {type(batch).__name__}"


def are_targets(labels: Tensor) -> Tensor:
    """Return where labels are targets: not where they are −100, or NaN, as of assays not made.

    Example:
        >>> are_targets(torch.tensor([1.0, 0.0, -100.0, torch.nan]))
        tensor([ True,  True, False, False])
    """
    return (labels != IGNORE_INDEX) & ~labels.isnan()


def next_tokens(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return what each position of a causal model predicts, (B, T): the label one place further.

    Args:
        labels: (B, T) int64, unshifted, as Hugging Face gives them.
        ignore_index: the target of the last position, which predicts nothing.

    Example:
        >>> next_tokens(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)
