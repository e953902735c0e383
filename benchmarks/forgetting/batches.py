"""Batches of token samples with a weight for each target, and their loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from flowdata import Scores
from flowdata.losses import fused_causal_lm_loss
from flowdata.scoring.collate import pad_collate
from flowdata.study import Method, sample_weights
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.text import TokenSamples
from flowdata.token_weights import align_token_weights

WINDOW = 8  # number of batches whose samples are sorted by length together
MULTIPLE = 16  # of the tokens in a row of a batch: a CPU's bfloat16 attention is slow at others


def target_weights(method: Method, scores: Scores) -> list[Tensor]:
    """Return the weights of each sample's targets; a sample weight is repeated for all of them."""
    weights = sample_weights(method, scores)
    if len(weights) != int(scores.counts.sum()):
        weights = weights.repeat_interleave(scores.counts)
    return list(weights.split(scores.counts.tolist()))


class Weighted(Dataset[dict[str, Tensor]]):
    """Token samples with a weight for each label."""

    def __init__(self, samples: TokenSamples, weights: list[Tensor]) -> None:
        self.samples, self.weights = samples, weights

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        return sample | {"weight": align_token_weights(self.weights[index], sample["labels"])}


class LengthBatches(Sampler[list[int]]):
    """Batches of samples of similar length, in random order, so that there is little padding.

    Args:
        sampler: gives the indices, in random order.
        lengths: number of tokens of each sample.
        size: samples in a batch; the last samples are dropped if they fill no batch.
    """

    def __init__(self, sampler: Sampler[int], lengths: list[int], size: int) -> None:
        self.sampler, self.lengths, self.size = sampler, lengths, size

    def __len__(self) -> int:
        return len(self.sampler) // self.size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        # Samples are sorted within one window at a time, so that chance decides which of them meet
        # in a batch. Sorting all of them would make the same batches in every epoch.
        indices = list(self.sampler)[: len(self) * self.size]
        window, batches = WINDOW * self.size, []
        for start in range(0, len(indices), window):
            by_length = sorted(indices[start : start + window], key=self.lengths.__getitem__)
            batches += [by_length[i : i + self.size] for i in range(0, len(by_length), self.size)]
        for index in torch.randperm(len(batches)).tolist():
            yield batches[index]


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch padded on the right to a multiple of 16 tokens; padding is no target."""
    batch = pad_collate(samples)
    width = -batch["input_ids"].shape[1] % MULTIPLE
    fill = {"labels": IGNORE_INDEX}
    return {name: F.pad(v, (0, width), value=fill.get(name, 0)) for name, v in batch.items()}


def batch_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    rule: Any = None,
    hold: float = 0.0,
    reference: nn.Module | None = None,
) -> Tensor:
    """Return Σ weight · loss over the batch's target tokens, divided by their number.

    The padding is on the right, where no token of a causal model attends to it, so that no
    attention mask is needed.

    Args:
        model: the model that is trained.
        batch: as `collate` makes it.
        rule: weights from the model's own losses, see `flowdata.losses`.
        hold: strength of the KL to the reference's predictions of the batch's targets.
        reference: the frozen model; needed where `hold` is not 0.
    """
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        hidden, head = _hidden_states(model, batch)
        held: dict[str, Any] = {}
        if hold:
            assert reference is not None
            with torch.no_grad():
                held = {"kl_to_reference": hold, "reference": _hidden_states(reference, batch)}
        weight = batch["weight"]
        return fused_causal_lm_loss(hidden, head, batch["labels"], weight, token_rule=rule, **held)


def _hidden_states(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, nn.Module]:
    """What a model's output layer is given, (B, T, d), and the layer."""
    decoder: Any = model.get_decoder()
    hidden = decoder(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return hidden, model.get_output_embeddings()
