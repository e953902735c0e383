"""Rows of text to token samples: prompts with completions, and chats. Completions are targets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from flowdata._common.offsets import offsets_of
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.text.chats import Segment, conversation_segments
from flowdata.text.conversation import Row
from flowdata.text.formats import Fields, read_conversation

_ROWS_AT_ONCE = 4096  # given to the tokenizer in one call, which runs them on all cores


class TokenSamples(Dataset[dict[str, Tensor]]):
    """Tokenised samples in flat arrays; item i is `{"input_ids": (T,), "labels": (T,)}`, int64.

    Attributes:
        input_ids: (Σ T,) int32, the tokens of all samples one after another.
        is_target: (Σ T,) bool; labels are −100 where it is false.
        offsets: (N + 1,) int64, where each sample begins and the last one ends.
        num_cut: samples shortened to the maximum length.
    """

    # The arrays are flat because a million small tensors would take more memory for themselves
    # than for their tokens, in every worker of a DataLoader again:
    #
    #   input_ids   5 6 7 8 | 5 9 | 5 6 4
    #   is_target   0 0 1 1 | 0 1 | 0 1 1
    #   offsets     0         4     6       9

    def __init__(
        self, samples: Iterable[tuple[list[int], list[bool]]], max_length: int | None
    ) -> None:
        ids: list[NDArray[np.int32]] = []
        targets: list[NDArray[np.bool_]] = []
        self.num_cut = 0
        for tokens, is_target in samples:
            self.num_cut += max_length is not None and len(tokens) > max_length
            ids.append(np.asarray(tokens[:max_length], dtype=np.int32))
            targets.append(np.asarray(is_target[:max_length], dtype=np.bool_))
        self.input_ids = np.concatenate(ids)
        self.is_target = np.concatenate(targets)
        self.offsets = offsets_of(torch.tensor([len(sample) for sample in ids])).numpy()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        tokens = slice(self.offsets[index % len(self)], self.offsets[index % len(self) + 1])
        ids = torch.from_numpy(self.input_ids[tokens].astype(np.int64))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(torch.from_numpy(~self.is_target[tokens]), IGNORE_INDEX),
        }

    @property
    def lengths(self) -> Tensor:
        """Tokens in each sample, (N,) int64."""
        return torch.from_numpy(np.diff(self.offsets))

    def digest(self) -> str:
        """Return the hex SHA-256 of all tokens, targets and offsets."""
        content = (self.input_ids, self.is_target, self.offsets)
        return hashlib.sha256(b"".join(array.tobytes() for array in content)).hexdigest()


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    fields: Fields,
    *,
    template: bool,
    max_length: int | None = None,
) -> TokenSamples:
    """Return rows as token samples whose targets are the completions.

    Prompt and completion are tokenised apart, as they meet when a model answers; in a chat
    every reply of the assistant is a target, its end of turn included.

    Args:
        rows: mappings with the text; indexable.
        tokenizer: a Hugging Face tokenizer.
        fields: the fields that hold the text, as `find_fields` returns them.
        template: whether pairs go through the tokenizer's chat template; chats always do.
        max_length: longer samples are cut at their end to so many tokens; None cuts none.

    Raises:
        ValueError: a row lacks a field or has something else than text in it, a chat has no
            reply, or its template can't be cut into replies; the row is named. Or there is no
            template, or `max_length` is below 1.
    """
    if template and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; pass template=False")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return TokenSamples(_tokens(rows, tokenizer, fields, template), max_length)


def _tokens(
    rows: Sequence[Row], tokenizer: Any, fields: Fields, template: bool
) -> Iterable[tuple[list[int], list[bool]]]:
    """The tokens of each row, and which of them are targets."""
    start, end = _special_ends(tokenizer)
    in_template = template or fields.messages is not None
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        numbers = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
        segments_of_rows = [_segments(rows[n], n, tokenizer, fields, template) for n in numbers]
        # All segments of all rows go to the tokenizer as one list, and come back in this order.
        texts = [text for segments in segments_of_rows for text, _ in segments]
        ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for segments in segments_of_rows:
            pieces = [(next(ids), is_target) for _, is_target in segments]
            if not in_template:  # a template writes the special tokens itself
                pieces = [(start, False), *pieces, (end, True)]
            tokens = [token for piece, _ in pieces for token in piece]
            yield tokens, [is_target for piece, is_target in pieces for _ in piece]


def _segments(
    row: Row, number: int, tokenizer: Any, fields: Fields, template: bool
) -> list[Segment]:
    """The pieces of one row's text; errors name the row."""
    try:
        return conversation_segments(read_conversation(row, fields), tokenizer, template)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"row {number}: {error}") from None


def _special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens before and after a plain text: those that the tokenizer's own rules add."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return ([bos] if adds_bos else []), ([] if eos is None else [eos])
