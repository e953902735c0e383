"""Packing: batches without padding, cut after the last target, a common prefix run once.

A padded batch becomes one flat sequence of blocks (layout.py), whose tokens keep the positions
that they had. A prefix that all samples share is run alone, once for a model, and only its keys
and values are kept: since no token sees a later one, they are the same before every sample.

    run once     P P P                               its keys and values are kept, layer by layer
    every batch  a a a a a a q q q q b b b c c .     each block sees P, then itself
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.calling import call_with, innermost
from flowdata.models.tensors import CPU
from flowdata.scoring.language.attention import Pass, attending
from flowdata.scoring.language.blocks import Block, KeysAndValues
from flowdata.scoring.language.inputs import inputs_and_targets
from flowdata.scoring.language.layout import Piece, flatten, lay_out
from flowdata.scoring.language.packable import shared_length, why_batch_not_packed
from flowdata.scoring.language.work import Prepare, Work, make_work
from flowdata.targets.labels import IGNORE_INDEX

# The share of a block's longest sample by which the CPU pads others. Without padding there are
# more and smaller calls of the kernel: 40 samples of up to 300 tokens took 0.29 s in 34 blocks,
# 0.27 s in 15 blocks with a sixteenth, 0.34 s in 8 blocks with a quarter (a Llama of 4 layers of
# width 256 in bfloat16, on one core of an AMD EPYC).
_MOST_PADDING = 1 / 16


class Packing:
    """Prepares a batch as one flat sequence, or as `otherwise` does where it can't.

    Args:
        otherwise: prepares batches with padding on the left, or with inputs beside tokens.
        prefix: (P,) int64; what all samples of a batch share of it is not run again.
        max_tokens: a batch that was planned with the prefix, but does not share it, can be far
            larger; beyond twice as many tokens it is left to `otherwise`.
        device: where the model takes its inputs.
        by_products: whether a CPU makes plain attention by products (products.py).
    """

    def __init__(
        self,
        otherwise: Prepare,
        prefix: Tensor | None = None,
        max_tokens: int | None = None,
        device: torch.device = CPU,
        *,
        by_products: bool = False,
    ) -> None:
        self.otherwise, self.device, self.by_products = otherwise, device, by_products
        self.most_tokens = math.inf if max_tokens is None else 2 * max_tokens
        self.prefix = torch.empty(0, dtype=torch.long) if prefix is None else prefix
        self._prefix_keys_and_values: list[KeysAndValues] = []

    def __call__(self, model: nn.Module, batch: Any) -> list[Work]:
        """Return the batch's work: one flat sequence where possible."""
        if why_batch_not_packed(model, batch):
            return self.otherwise(model, batch)
        inputs, targets = inputs_and_targets(model, batch, "causal_lm")
        ids, is_target = inputs["input_ids"], targets != IGNORE_INDEX
        skipped = self._shared(ids, is_target)
        # A GPU's kernel takes samples of any lengths in one call, so that none needs padding.
        most_padding = _MOST_PADDING if self.device.type == "cpu" else 0
        pieces = lay_out(ids, is_target, skipped, most_padding)
        if sum(block.samples * block.length for block in _blocks(pieces)) > self.most_tokens:
            return self.otherwise(model, batch)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        packed = {"input_ids": flatten(ids, pieces), "position_ids": flatten(positions, pieces)}
        prefix = self._prefix_part(model, skipped)
        run = Pass(_blocks(pieces), prefix, by_products=self.by_products)
        around = functools.partial(_all_layers_attending, model, run)
        return [make_work(packed, flatten(targets, pieces), is_target.sum(1), around)]

    def _shared(self, ids: Tensor, is_target: Tensor) -> int:
        """How many tokens of the prefix all samples of a batch have, before any target needs one.

        The batch's last position never counts: something must be left of it to run.
        """
        most = min(len(self.prefix), ids.shape[1] - 1)
        is_shared = (ids[:, :most] == self.prefix[:most].to(ids.device)).all(0)
        is_shared &= ~is_target[:, :most].any(0)
        return shared_length(is_shared)

    def _prefix_part(self, model: nn.Module, length: int) -> list[KeysAndValues]:
        """Keys and values of the prefix's first tokens, layer by layer; none for no tokens."""
        if not length:
            return []
        if not self._prefix_keys_and_values:
            self._prefix_keys_and_values = self._run_prefix(model)
        return [
            (keys[:, :, :length], values[:, :, :length])
            for keys, values in self._prefix_keys_and_values
        ]

    def _run_prefix(self, model: nn.Module) -> list[KeysAndValues]:
        length = len(self.prefix)
        inputs = {
            "input_ids": self.prefix[None].to(self.device),
            "position_ids": torch.arange(length, device=self.device)[None],
        }
        alone = Pass([Block(1, length)], record=[], by_products=self.by_products)
        with _all_layers_attending(model, alone):
            call_with(model, inputs, use_cache=False, logits_to_keep=1)
        return alone.record or []


def _blocks(pieces: list[Piece]) -> list[Block]:
    return [piece.block for piece in pieces]


@contextmanager
def _all_layers_attending(model: nn.Module, run: Pass) -> Iterator[None]:
    """Attention over blocks for a call; raises where a layer did not take part.

    A layer with an attention of its own would let samples see each other.
    """
    run.layers = 0
    with attending(model, run):
        yield
    expected = innermost(model).config.get_text_config().num_hidden_layers
    if run.layers != expected:
        raise RuntimeError(f"{run.layers} layers of {expected} have attention that can be replaced")
