"""Text rows to token samples: prompt–completion pairs and chats, completions as targets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from flowdata.targets.predictions import IGNORE_INDEX

PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
CHATS = ("messages", "conversations", "conversation")
_ROWS_AT_ONCE = 4096

Row = Mapping[str, Any]
Segment = tuple[str, bool]  # a piece of text, and whether its tokens are targets


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text: a chat, or a completion with or without a prompt."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None


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


def find_columns(row: Row, wanted: Columns) -> Columns:
    """Return the columns to read: those asked for, else the first known names that are there.

    Raises:
        ValueError: a column asked for is missing, or no known name is there.
    """
    asked = [name for name in (wanted.messages, wanted.prompt, wanted.completion) if name]
    missing = [name for name in asked if name not in row]
    if missing:
        raise ValueError(f"column {missing[0]!r} is missing; there are {_listed(row)}")
    if asked:
        if wanted.prompt and not wanted.completion:
            raise ValueError("a prompt column needs a completion column beside it")
        return wanted
    for messages in CHATS:
        if messages in row:
            return Columns(messages=messages)
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            return Columns(prompt=prompt, completion=completion)
    if "text" in row:
        return Columns(completion="text")
    raise ValueError(
        f"no known text columns among {_listed(row)}; name them (prompt and completion, "
        "messages, or completion alone)"
    )


def _tokens(
    rows: Sequence[Row], tokenizer: Any, columns: Columns, template: bool
) -> Iterable[tuple[list[int], list[bool]]]:
    start, end = _special_ends(tokenizer)
    in_template = template or columns.messages is not None
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        numbers = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
        parts = [_row_segments(rows[n], n, tokenizer, columns, template) for n in numbers]
        texts = [text for segments in parts for text, _ in segments]
        ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for segments in parts:
            pieces = [(next(ids), is_target) for _, is_target in segments]
            if not in_template:
                pieces = [(start, False), *pieces, (end, True)]
            tokens = [token for piece, _ in pieces for token in piece]
            yield tokens, [is_target for piece, is_target in pieces for _ in piece]


def _row_segments(
    row: Row, number: int, tokenizer: Any, columns: Columns, template: bool
) -> list[Segment]:
    try:
        if columns.messages is not None:
            return _chat_segments(row[columns.messages], tokenizer)
        completion = _text(row, columns.completion or "")
        prompt = _text(row, columns.prompt) if columns.prompt else ""
        if template:
            chat = [{"role": "user", "content": prompt}] if columns.prompt else []
            return _chat_segments([*chat, {"role": "assistant", "content": completion}], tokenizer)
        return [(prompt, False), (completion, True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"row {number}: {error}") from None


def _chat_segments(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Segment]:
    """Cut a rendered chat at the beginning and end of every reply of the assistant."""
    messages = list(messages)
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    segments: list[Segment] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = (
            tokenizer.apply_chat_template(
                messages[:index], tokenize=False, add_generation_prompt=True
            )
            if index
            else "",
            tokenizer.apply_chat_template(messages[: index + 1], tokenize=False),
        )
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                "the chat template writes earlier turns differently once later ones follow, so "
                "its replies can't be told apart; give each reply a row of its own"
            )
        reply_end = len(after.rstrip())  # a line break after the end of turn is nobody's reply
        segments += [(whole[position : len(before)], False), (whole[len(before) : reply_end], True)]
        position = reply_end
    if not segments:
        raise ValueError("the chat has no message with role 'assistant', so it has no target")
    return [*segments, (whole[position:], False)]


def _special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a plain text gets before and after it: the tokens the tokenizer's own rules add."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return ([bos] if adds_bos else []), ([] if eos is None else [eos])


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = f"a {type(value).__name__}" if column in row else "nothing"
        raise ValueError(f"column {column!r} should hold text, it holds {found}")
    return value


def _listed(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"
