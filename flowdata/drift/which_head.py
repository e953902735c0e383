"""Which head: a tuned model's predictions are those of its own output layer or of the frozen one.

    own       it is a later state of the frozen layer, however far
    frozen    another layer is in its place, such as a new task's, which the old one wouldn't use

The two can't always be told by their weights, so the user may say it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from flowdata._common.notices import say_once
from flowdata.drift.drift import Drift
from flowdata.head.kl import Predictions, count_classes
from flowdata.head.output_layer import Head, weight_of

HeadChoice = Literal["auto", "own", "frozen"]
# The cosine between two layers' weights above which one is taken for a later state of the other.
# A layer that was made anew has a cosine of about 0, one in training of nearly 1.
SAME_LAYER = 0.5


def check_head(head: object) -> None:
    """Raise ValueError unless it is a way to choose the output layer."""
    if head not in ("auto", "own", "frozen"):
        raise ValueError(f"head must be 'auto', 'own' or 'frozen', got {head!r}")


class WhichHead:
    """Tells a later state of a frozen output layer from another one in its place.

    Args:
        frozen: the layer before training.
        choice: ``"own"`` and ``"frozen"`` are the user's word; ``"auto"`` goes by the weights.
        is_of_language: an output layer of a language model is a later state, whatever its weights,
            and may have got further tokens.

    Raises:
        ValueError: `choice` is ``"frozen"``, and there is no such layer.
    """

    def __init__(
        self, frozen: Head | nn.Module, choice: HeadChoice, *, is_of_language: bool
    ) -> None:
        if choice == "frozen" and weight_of(frozen) is None:
            raise ValueError(
                "head='frozen' would have no effect: no linear layer makes the model's logits, so "
                "that models are compared by their own; leave it out"
            )
        self.frozen, self.choice, self.is_of_language = frozen, choice, is_of_language
        self._has_told = False

    def is_own(self, layer: Head | nn.Module) -> bool:
        """Return whether a model's own layer makes the predictions that count.

        Raises:
            ValueError: the user said so, and it makes others.
        """
        if self.choice == "frozen" or self.is_of_language:
            return self.choice != "frozen"
        one, other = weight_of(self.frozen), weight_of(layer)
        if one is None or other is None:
            is_own = one is None and other is None  # the rows are logits
        else:
            is_own = one.shape == other.shape and self._is_later_state(one, other)
        if self.choice == "own" and not is_own:
            raise ValueError(
                f"head='own' was passed, and the model's output layer is another one: its weight "
                f"is {_shape(other)}, the frozen model's {_shape(one)}; pass head='frozen'"
            )
        return is_own

    def _is_later_state(self, one: Tensor, other: Tensor) -> bool:
        if self.choice == "own" or not one.any():  # of zeros any layer may have come
            return True
        other = other.detach().to(one.device)
        cosine = F.cosine_similarity(one.flatten().float(), other.flatten().float(), 0)
        if not bool(cosine <= SAME_LAYER):  # a layer that diverged is no number
            return True
        if not self._has_told:
            self._has_told = True
            say_once(
                "new output layer: drift is read through the old one, which the old task would "
                "still use; if it is the old one, and training took it so far, make the meter with "
                "head='own'"
            )
        return False


def check_same_head(drifts: Iterable[tuple[str, Drift]]) -> None:
    """Refuse to compare the KL of models of which some were measured through another layer.

    Args:
        drifts: the names of runs, each with its drift.

    Raises:
        ValueError: two runs were measured through different layers.
    """
    # At 0 it is the base itself, and what diverged has no weights that would tell.
    heads = {drift.head: name for name, drift in drifts if 0 < drift.kl < math.inf}
    if len(heads) > 1:
        raise ValueError(
            f"the drift of {heads['own']!r} is that of its own output layer and that of "
            f"{heads['frozen']!r} was measured through the frozen one, so that their KL can't be "
            "compared; make the meter with head='own' if all have the old layer in a later state, "
            "or with head='frozen'"
        )


def _shape(weight: Tensor | None) -> str:
    return "none" if weight is None else str(tuple(weight.shape))


def of_shared_classes(frozen: Predictions, tuned: Predictions) -> tuple[Predictions, Predictions]:
    """Return both predictions without the tokens that only one of two vocabularies has, its last.

    Args:
        frozen: of the model before training.
        tuned: of a later one, whose vocabulary may have been extended, or cut.
    """
    counts = [count_classes(each) for each in (frozen, tuned)]
    if counts[0] == counts[1]:
        return frozen, tuned
    count = min(counts)
    say_once(
        f"the model has {counts[1]} tokens, the one before training {counts[0]}: drift is that of "
        f"the first {count}"
    )
    one, other = (
        Predictions(each.rows, _first_classes(each.layer, count)) for each in (frozen, tuned)
    )
    return one, other


def _first_classes(layer: Head | nn.Module, count: int) -> Head | nn.Module:
    """An output layer's first classes alone."""
    if isinstance(layer, Head):
        bias = None if layer.bias is None else layer.bias[:count]
        return replace(layer, weight=layer.weight[:count], bias=bias)
    return _FirstClasses(layer, count)


class _FirstClasses(nn.Module):
    """The first classes of an output layer that has to be called."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        self.layer, self.count = layer, count

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.layer(rows)
        return logits[:, : self.count]
