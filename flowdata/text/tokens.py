"""Text rows to token samples: prompt–completion pairs and chats, completions as targets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from flowdata.targets.labels import IGNORE_INDEX
from flowdata.text.chats import Columns, Row, row_segments

_ROWS_AT_ONCE = 4096


class TokenSamples(Dataset[dict[str, Tensor]]):
    """Tokenised samples in three flat arrays; item i is `{"input_ids": (T,), "labels": (T,)}`.

    Attributes:
        input_ids: (Σ T,) int32.
        is_target: (Σ T,) bool; labels are −100 elsewhere.
        offsets: (N + 1,) int64, where each sample begins.
        num_cut: samples shortened to the maximum length.
    """

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
        self.offsets = np.cumsum([0, *map(len, ids)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        piece = slice(self.offsets[index % len(self)], self.offsets[index % len(self) + 1])
        ids = torch.from_numpy(self.input_ids[piece].astype(np.int64))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(torch.from_numpy(~self.is_target[piece]), IGNORE_INDEX),
        }

    @property
    def lengths(self) -> Tensor:
        """Tokens in each sample, (N,) int64."""
        return torch.from_numpy(np.diff(self.offsets))

    def digest(self) -> str:
        """Hex SHA-256 of all tokens, targets and cuts."""
        content = (self.input_ids, self.is_target, self.offsets)
        return hashlib.sha256(b"".join(array.tobytes() for array in content)).hexdigest()


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    columns: Columns,
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
        columns: which columns hold the text.
        template: put pairs through the tokenizer's chat template; chats always are.
        max_length: samples are cut to so many tokens, at their end.

    Raises:
        ValueError: a row without the column, text that isn't text, a chat without a reply, or
            a template that can't be cut into replies; the row is named.
    """
    if template and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; pass template=False")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return TokenSamples(_tokens(rows, tokenizer, columns, template), max_length)


def _tokens(
    rows: Sequence[Row], tokenizer: Any, columns: Columns, template: bool
) -> Iterable[tuple[list[int], list[bool]]]:
    start, end = _special_ends(tokenizer)
    in_template = template or columns.messages is not None
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        numbers = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
        parts = [row_segments(rows[n], n, tokenizer, columns, template) for n in numbers]
        texts = [text for segments in parts for text, _ in segments]
        ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for segments in parts:
            pieces = [(next(ids), is_target) for _, is_target in segments]
            if not in_template:
                pieces = [(start, False), *pieces, (end, True)]
            tokens = [token for piece, _ in pieces for token in piece]
            yield tokens, [is_target for piece, is_target in pieces for _ in piece]


def _special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a plain text gets before and after it: the tokens the tokenizer's own rules add."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return ([bos] if adds_bos else []), ([] if eos is None else [eos])
