"""Rows of text with their weights beside them, for trainers that read files.

A row stays as it is. What is new are columns, and weights within the messages of a chat, where a
trainer reads them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flowdata.scores import Scores
from flowdata.scores.of_targets import weigh_targets
from flowdata.text.conversation import Row
from flowdata.text.formats import Fields, read_conversation
from flowdata.text.formats.flags import WEIGHTS, weight_of
from flowdata.text.formats.messages import read_turns
from flowdata.weights import Normalize, Temperature

LOSS, TOKEN_WEIGHTS, KEEP, MESSAGES = "loss", "token_weights", "keep", "messages"


@dataclass(frozen=True)
class WeightedColumns:
    """Which columns rows get, and how weights are made.

    Attributes:
        temperature: as in `resolve_temperature`, over the rows that have a loss.
        normalize: ``"mean"`` divides the weights by the mean over those rows.
        max_weight: caps the weights, after normalising.
        name: the weight's column.
        loss: whether there is a column `loss`, nats.
        token_weights: whether there is a column `token_weights`: a list with a weight for each
            target token of the row, in order.
        keep_above: the least weight with which the column `keep` is true; None has no such column.
        message_weight: the name of the weight in each reply of a chat, 0 where the row has no
            loss; None has none there. A row that is no list of messages gets a column `messages`.
    """

    temperature: Temperature = "median"
    normalize: Normalize = "none"
    max_weight: float | None = None
    name: str = "weight"
    loss: bool = False
    token_weights: bool = False
    keep_above: float | None = None
    message_weight: str | None = None

    def names(self) -> list[str]:
        """Return the names of the new columns."""
        names = {
            self.name: True,
            LOSS: self.loss,
            TOKEN_WEIGHTS: self.token_weights,
            KEEP: self.keep_above is not None,
        }
        return [name for name, is_there in names.items() if is_there]


@dataclass(frozen=True)
class RowWeights:
    """What rows get: values by column, one for each row; None where a row has no loss.

    Attributes:
        options: which columns there are.
        columns: their values.
        fields: the columns of a row that hold its chat, for weights in messages.
    """

    options: WeightedColumns
    columns: Mapping[str, list[Any]]
    fields: Fields = field(default_factory=Fields)

    def values_of(self, index: int, row: Row) -> dict[str, Any]:
        """Return what a row gets, by column: new columns, and its chat with weights within.

        Raises:
            ValueError: the row has such a column, or holds no chat that weights could go into.
        """
        double = next((name for name in self.columns if name in row), None)
        if double is not None:
            raise ValueError(
                f"the rows have a column {double!r} already; name the weight's with "
                "--weight-column, or rename it in the data"
            )
        values = {name: column[index] for name, column in self.columns.items()}
        if self.options.message_weight is not None:
            # Trainers take null in a message for no word on it, and train on it in full.
            weight = values[self.options.name]
            try:
                values |= _chat_with_weights(
                    row, self.fields, self.options.message_weight, weight or 0.0
                )
            except (KeyError, TypeError, ValueError):
                if weight is not None:
                    raise
                # A row that can't be read has no loss, and is written as it is.
                is_chat = self.fields.messages and not self.fields.completion
                column = str(self.fields.messages) if is_chat else MESSAGES
                values[column] = row.get(column)
        return values


def weigh_rows(scores: Scores, options: WeightedColumns, fields: Fields) -> RowWeights:
    """Return the new columns of all rows.

    Args:
        scores: of the rows, in their order.
        options: which columns there are.
        fields: the columns of a row that were read.

    Raises:
        ValueError: no row has a loss, weights can't be made of them, there are no token losses, or
            two columns would have one name.

    Example:
        >>> import torch
        >>> options = WeightedColumns(temperature=1.0, keep_above=0.5)
        >>> scores = Scores(torch.tensor([0.0, 1.0, torch.nan]))
        >>> columns = weigh_rows(scores, options, Fields()).columns
        >>> [round(weight, 3) for weight in columns["weight"][:2]], columns["weight"][2]
        ([1.0, 0.368], None)
        >>> columns["keep"]
        [True, False, None]
    """
    if not options.name:
        raise ValueError("the weight's column needs a name, got ''")
    if options.name in (LOSS, TOKEN_WEIGHTS, KEEP):
        raise ValueError(f"the weight's column must not be named {options.name!r}, another is")
    if options.message_weight is not None and options.name == MESSAGES:
        raise ValueError(
            f"the weight's column must not be named {MESSAGES!r}, which is that of the messages "
            "that weights are written into"
        )
    has_loss = ~scores.losses.isnan()
    if not has_loss.any():
        raise ValueError(f"none of the {len(scores)} rows has a loss")
    present = scores[has_loss]
    weights: list[float] = present.weights(
        options.temperature, normalize=options.normalize, max_weight=options.max_weight
    ).tolist()
    columns: dict[str, list[Any]] = {options.name: weights}
    if options.loss:
        columns[LOSS] = present.losses.tolist()
    if options.token_weights:
        of_tokens = weigh_targets(present, temperature=options.temperature)
        columns[TOKEN_WEIGHTS] = [part.tolist() for part in of_tokens]
    if options.keep_above is not None:
        columns[KEEP] = [weight >= options.keep_above for weight in weights]
    places = torch.where(has_loss, has_loss.cumsum(0) - 1, -1).tolist()
    return RowWeights(
        options,
        {
            name: [values[place] if place >= 0 else None for place in places]
            for name, values in columns.items()
        },
        fields,
    )


def _chat_with_weights(
    row: Row, fields: Fields, name: str, weight: float
) -> dict[str, list[dict[str, Any]]]:
    """The chat of a row, with a weight in each reply that is a target; others have 0."""
    if fields.rejected or fields.label:
        raise ValueError(
            "weights can't be written into the messages of a preference set, which trainers take "
            "another loss of; leave --message-weight out"
        )
    chat = row.get(fields.messages) if fields.messages and not fields.completion else None
    if isinstance(chat, list) and all(_is_message(item) for item in chat):
        weighted = [_weighted(item, name, weight) for item in chat]
        return {str(fields.messages): weighted}
    if MESSAGES in row:
        raise ValueError(
            f"column {MESSAGES!r} holds no list of messages, so no weights can be written into it"
        )
    conversation = read_conversation(row, fields)
    messages = []
    turns = zip(conversation.messages, conversation.is_target, conversation.flags, strict=True)
    for message, is_target, flags in turns:
        is_reply = message["role"] == "assistant"
        factor = weight_of(flags, name) if is_target else 0.0
        messages.append(_with_weight(message, name, weight * factor) if is_reply else message)
    return {MESSAGES: messages}


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and ("role" in item or "from" in item)


def _weighted(item: Mapping[str, Any], name: str, weight: float) -> dict[str, Any]:
    """A message with its weight: one that it has already, by whatever name, stays a factor."""
    for message, is_target, flags in read_turns([item]):
        if message["role"] == "assistant":
            return _with_weight(item, name, weight * weight_of(flags, name) * is_target)
    return dict(item)


def _with_weight(message: Mapping[str, Any], name: str, weight: float) -> dict[str, Any]:
    if name not in WEIGHTS and message.get(name) is not None:
        raise ValueError(
            f"messages have a field {name!r} already, which is no weight that is known; name "
            "another (--message-weight)"
        )
    return {**message, name: weight}
