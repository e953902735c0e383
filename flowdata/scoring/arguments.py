"""What `LossScorer` and its `score` are given, refused where it can't be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flowdata._common.data_sets import check_map_style
from flowdata.models.adapters import why_no_base
from flowdata.models.placement import is_placed
from flowdata.models.precision import name_of
from flowdata.targets.labels import LABEL_FIELDS
from flowdata.targets.which_loss import LOSSES, OWN, argument_names

# Names of arguments by which a criterion, (predictions, targets), is told from a loss of a model.
_PREDICTIONS = ("logits", "predictions", "preds", "y_pred")
_TARGETS = (*LABEL_FIELDS, "y_true", "y")
_MODELS = ("model", "outputs", "output")


def check_loss(loss: object) -> None:
    """Raise ValueError unless a loss is "auto", a loss's name or a callable of model and batch."""
    if callable(loss) and _takes_predictions(loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(
            f"loss must be a name or a callable (model, batch) -> (B,) tensor, and "
            f"{name} takes predictions and targets; leave loss at 'auto', or pass a "
            "function that runs the model and gives each sample's loss (reduction='none')"
        )
    if not callable(loss) and loss not in ("auto", *LOSSES):
        raise ValueError(
            f"loss must be 'auto', one of {', '.join(map(repr, LOSSES))}, or a callable "
            f"(model, batch) -> (B,) tensor; got {loss!r}"
        )


def _takes_predictions(loss: Callable[..., Any]) -> bool:
    """Whether a callable takes predictions and targets, as far as its arguments' names tell."""
    first, second = (*argument_names(loss), "", "")[:2]
    if getattr(loss, "__module__", None) == "torch.nn.functional" or second in _TARGETS:
        return True
    # Modules that are losses are criteria, if they don't say otherwise.
    return first not in _MODELS if isinstance(loss, nn.Module) else first in _PREDICTIONS


def check_counts(**counts: object) -> None:
    """Raise ValueError, with its name, of a value that is neither None nor a positive integer."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {value!r}")


def check_reference(reference: str, model: nn.Module) -> None:
    """Raise ValueError unless the model can be scored as this reference."""
    if reference not in ("model", "base"):
        raise ValueError(f"reference must be 'model' or 'base', got {reference!r}")
    if reference == "model":
        return
    if reason := why_no_base(model):
        raise ValueError(
            f"reference='base' needs a PEFT model whose adapters can be turned off: {reason}. "
            "What is not trained yet scores the same with reference='model'"
        )


def check_switches(compile: object, token_losses: object) -> None:
    """Raise ValueError or TypeError unless both are what they can be."""
    if compile not in ("auto", True, False):
        raise ValueError(f"compile must be 'auto', True or False, got {compile!r}")
    if not isinstance(token_losses, bool):
        raise TypeError(f"token_losses must be True or False, got {token_losses!r}")


def check_token_losses(token_losses: bool, loss: object) -> None:
    """Raise ValueError if losses of single targets are asked of a loss that has none."""
    if token_losses and loss == OWN:
        raise ValueError(
            "token_losses=True needs a loss by name, because loss='own' is one number for each "
            "sample; pass token_losses=False"
        )


def check_placed(model: nn.Module, dtype: str | torch.dtype, device: object) -> None:
    """Raise ValueError if a model that others have placed would have to move or be converted.

    A tensor without values is refused, unless whoever has placed the model fetches them.
    """
    if not is_placed(model):
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise ValueError(
                "model has tensors without values, on the device 'meta'; load its weights first, "
                "as by load_state_dict(..., assign=True)"
            )
        return
    own_names = {name_of(p.dtype) for p in model.parameters() if p.is_floating_point()}
    name = dtype if isinstance(dtype, str) else name_of(dtype)
    if device is not None or name not in ("auto", *own_names):
        raise ValueError(
            "a model that is sharded, or spread over devices, is scored as and where it is: leave "
            f"device=None, got {device!r}, and dtype='auto' (its own, "
            f"{', '.join(sorted(own_names))}), got {name!r}; to score in another dtype, load it "
            "in that"
        )


def check_call(dataset: Any, collate_fn: object, on_error: str) -> None:
    """Raise ValueError or TypeError unless `LossScorer.score` can begin with these arguments."""
    check_map_style(dataset)
    if len(dataset) == 0:
        raise ValueError("dataset is empty: there is nothing to score")
    if not (collate_fn is None or callable(collate_fn)):
        raise TypeError(f"collate_fn must be callable or None, got {collate_fn!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
