"""Packing: batches without padding, cut after the last target, a common prefix run once.

A padded batch becomes one flat sequence of blocks (attention.py), each of samples of like length;
their tokens keep the positions that they had. A prefix that all samples share is run alone, once
for a model, and only its keys and values are kept: causality makes them equal for every sample.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata.models.calling import call_with, innermost
from flowdata.models.tensors import CPU
from flowdata.scoring.language.attention import Block, KeysAndValues, Pass, attending
from flowdata.scoring.language.inputs import Prepare, Work, inputs_and_targets, make_work
from flowdata.targets.labels import IGNORE_INDEX

_LIKE = 1 / 16  # samples in a block are at most this much shorter than its longest
_SAFE_LAYERS = {"full_attention", "sliding_attention"}
_LEAST_PREFIX = 8  # tokens; below, nothing is gained


def why_not_packed(model: nn.Module, loss: str) -> str:
    """Return "" if a model's layers can be trusted with packed samples, else the reason.

    It has to take positions from `position_ids` and attention from Hugging Face's
    `AttentionInterface`, and nothing else in it may mix tokens.
    """
    inner = innermost(model)
    if loss != "causal_lm":
        return f"{loss} is not causal"
    own = next(
        c for c in type(inner).__mro__ if not c.__module__.startswith("torch.")
    )  # not FSDP's
    if not own.__module__.startswith("transformers."):
        return f"{type(inner).__name__} is not one of transformers' own models"
    if not getattr(inner, "_supports_attention_backend", False):
        return f"{type(inner).__name__} has an attention of its own"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} takes no position_ids"
    config = inner.config.get_text_config()
    if inner.config.is_encoder_decoder or getattr(inner, "_is_stateful", False):
        return f"{type(inner).__name__} is more than a decoder of attention layers"
    kinds = set(getattr(config, "layer_types", None) or ()) - _SAFE_LAYERS
    if kinds:
        return f"{type(inner).__name__} has layers of kind {', '.join(sorted(kinds))}"
    return ""


def why_batch_not_packed(model: nn.Module, batch: Any) -> str:
    """Return "" if a batch of samples can become one flat sequence, else the reason."""
    inputs, _ = inputs_and_targets(model, batch, "causal_lm")
    taken = inspect.signature(innermost(model).forward).parameters
    fields = [name for name in inputs if name in taken and name != "input_ids"]
    return f"samples have {', '.join(fields)}" if fields else ""


def common_prefix(batch: Any, loss: str) -> Tensor:
    """Return the tokens with which all samples of a batch begin, (P,) int64.

    It ends before the first position whose hidden state a target needs, and is empty where there
    is little to gain.
    """
    if loss != "causal_lm" or not isinstance(batch, Mapping) or "input_ids" not in batch:
        return torch.empty(0, dtype=torch.long)
    inputs, targets = inputs_and_targets(nn.Identity(), batch, loss)
    ids: Tensor = inputs["input_ids"]
    alike = (ids == ids[:1]).all(0) & (targets == IGNORE_INDEX).all(0)
    if "attention_mask" in batch:
        alike &= (batch["attention_mask"] != 0).all(0)
    length = int(alike.long().cumprod(0).sum())
    return ids[0, : length if length >= _LEAST_PREFIX else 0].clone()


class Packing:
    """Prepares a batch as one flat sequence, or as `otherwise` does where it can't.

    Args:
        otherwise: what prepares batches with padding on the left, or with inputs beside tokens.
        prefix: (P,) int64; what all samples of a batch share of it is not run again.
        max_tokens: a batch that was planned with the prefix, but does not share it, can be far
            larger; then it is left to `otherwise`.
        device: where the model takes its inputs.
    """

    def __init__(
        self,
        otherwise: Prepare,
        prefix: Tensor | None = None,
        max_tokens: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.otherwise, self.device = otherwise, device
        self.most_tokens = math.inf if max_tokens is None else 2 * max_tokens
        self.prefix = torch.empty(0, dtype=torch.long) if prefix is None else prefix
        self._of_prefix: KeysAndValues = []

    def __call__(self, model: nn.Module, batch: Any) -> list[Work]:  # noqa: D102
        works = self._packed(model, batch)
        return self.otherwise(model, batch) if works is None else works

    def _packed(self, model: nn.Module, batch: Any) -> list[Work] | None:
        if why_batch_not_packed(model, batch):
            return None
        inputs, targets = inputs_and_targets(model, batch, "causal_lm")
        ids, is_target = inputs["input_ids"], targets != IGNORE_INDEX
        skipped = self._shared(ids, is_target)
        positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        ends = (is_target * positions).amax(1).clamp_min_(skipped + 1).tolist()
        pieces = _pieces(ends, skipped, _prompts(ids, is_target, skipped), self.device)
        blocks = [piece.block for piece in pieces]
        if sum(block.samples * block.length for block in blocks) > self.most_tokens:
            return None
        flat = functools.partial(_flat, pieces=pieces)
        packed = {
            "input_ids": flat(ids),
            "position_ids": flat((positions - 1).expand_as(ids)),
        }
        before = [
            (keys[:, :, :skipped], values[:, :, :skipped])
            for keys, values in (self._keys_and_values(model) if skipped else [])
        ]
        around = functools.partial(_all_layers_attending, model, Pass(blocks, before))
        return [make_work(packed, flat(targets), is_target.sum(1), around)]

    def _shared(self, ids: Tensor, is_target: Tensor) -> int:
        """How many tokens of the prefix all samples of a batch begin with, none of them needed."""
        most = min(len(self.prefix), ids.shape[1] - 1)
        alike = (ids[:, :most] == self.prefix[:most].to(ids.device)).all(0)
        alike &= ~is_target[:, :most].any(0)
        length = int(alike.long().cumprod(0).sum())
        return length if length >= _LEAST_PREFIX else 0

    def _keys_and_values(self, model: nn.Module) -> KeysAndValues:
        if not self._of_prefix:
            length = len(self.prefix)
            inputs = {
                "input_ids": self.prefix[None].to(self.device),
                "position_ids": torch.arange(length, device=self.device)[None],
            }
            alone = Pass([Block(1, length)], seen=[])
            with _all_layers_attending(model, alone):
                call_with(model, inputs, use_cache=False, logits_to_keep=1)
            self._of_prefix = alone.seen or []
        return self._of_prefix


@contextmanager
def _all_layers_attending(model: nn.Module, run: Pass) -> Iterator[None]:
    """Attention over blocks for a call; raises where a layer did not take part."""
    run.layers = 0
    with attending(model, run):
        yield
    wanted = innermost(model).config.get_text_config().num_hidden_layers
    if run.layers != wanted:
        raise RuntimeError(f"{run.layers} layers of {wanted} have attention that can be replaced")


class _Piece(NamedTuple):
    """What of a padded batch becomes a block."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    after: int | None = None

    @property
    def block(self) -> Block:
        rows, columns = self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]
        return Block(rows, columns, self.after)


def _prompts(ids: Tensor, is_target: Tensor, skipped: int) -> list[tuple[int, int]]:
    """Cut a batch into (samples, end of their prompt) where neighbours share one, else (1, 0)."""
    firsts = is_target.long().argmax(1)
    columns = torch.arange(ids.shape[1], device=ids.device)
    same = ((ids[1:] == ids[:-1]) | (columns >= firsts[1:, None])).all(1)
    same &= (firsts[1:] == firsts[:-1]) & (firsts[1:] - skipped >= _LEAST_PREFIX)
    groups: list[tuple[int, int]] = []
    for first, joins in zip(firsts.tolist(), [False, *same.tolist()], strict=True):
        if joins:
            groups[-1] = (groups[-1][0] + 1, first)
        else:
            groups.append((1, 0))
    return groups


def _pieces(
    ends: Sequence[int], skipped: int, prompts: Sequence[tuple[int, int]], device: torch.device
) -> list[_Piece]:
    """Lay out a batch: runs of samples of like length, each shared prompt before its answers."""
    like = _LIKE if device.type == "cpu" else 0
    pieces: list[_Piece] = []
    row = 0
    for end_of_prompt, run in itertools.groupby(_with_rows(prompts), key=lambda each: each[1:]):
        count = sum(samples for samples, *_ in run)
        start, after = skipped, None
        if end_of_prompt[0]:
            after, start = len(pieces), end_of_prompt[0]
            pieces.append(_Piece((row, row + 1), (skipped, start)))
        for samples, length in _blocks([end - start for end in ends[row : row + count]], like):
            pieces.append(_Piece((row, row + samples), (start, start + length), after))
            row += samples
    return pieces


def _with_rows(prompts: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(samples, end, row): samples without a shared prompt are all of row −1, to be one run."""
    row = 0
    for count, end in prompts:
        yield count, end, row if end else -1
        row += count


def _blocks(lengths: Sequence[int], like: float) -> list[tuple[int, int]]:
    """Cut samples into runs of like length: (samples, longest) of each."""
    blocks: list[tuple[int, int]] = []
    count, longest, shortest = 0, 0, 0
    for length in lengths:
        low, high = min(length, shortest or length), max(length, longest)
        if count and low < high * (1 - like):
            blocks.append((count, longest))
            count, low, high = 0, length, length
        count, longest, shortest = count + 1, high, low
    return [*blocks, (count, longest)]


def _flat(values: Tensor, pieces: Sequence[_Piece]) -> Tensor:
    """(B, T) values to the (1, tokens) of the pieces."""
    parts = [values[slice(*piece.rows), slice(*piece.columns)].reshape(-1) for piece in pieces]
    return torch.cat(parts)[None]
