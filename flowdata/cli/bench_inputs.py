"""The model and the samples that scoring is timed on: random, of the sizes that are common."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowdata._common.notices import logger
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.text.models import load_transformers

Samples = list[dict[str, Tensor]]


def random_llama(*, layers: int, width: int = 576, vocabulary: int = 49152) -> Any:
    """Return a Llama of random weights; by default its layers have the shape of SmolLM2-135M's."""
    transformers = load_transformers()
    heads = width // 64
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // (3 if heads % 3 == 0 else 4),
            tie_word_embeddings=True,
        )
    ).eval()


def random_samples(
    lengths: Sequence[Sequence[int]],
    *,
    generator: torch.Generator,
    vocabulary: int = 49152,
    template: int = 0,
) -> Samples:
    """Return samples of random tokens with the given (prompt, completion) lengths.

    All of them begin with the same tokens, as many as `template` says.
    """
    template_tokens = torch.randint(0, vocabulary, (template,), generator=generator)
    samples = []
    for prompt, completion in lengths:
        tokens = torch.randint(0, vocabulary, (prompt + completion,), generator=generator)
        ids = torch.cat([template_tokens, tokens])
        labels = ids.clone()
        labels[: template + prompt] = IGNORE_INDEX
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def lognormal_lengths(count: int, generator: torch.Generator) -> list[list[int]]:
    """Return (prompt, completion) lengths, about 80 and 120 tokens on average."""
    logarithms = torch.randn(count, 2, generator=generator) * 0.5 + torch.tensor([4.25, 4.65])
    lengths: list[list[int]] = logarithms.exp().long().clamp_min(1).tolist()
    return lengths


@contextmanager
def guesses_expected() -> Iterator[None]:
    """Keep back the warning that the model does no better than a guess: a random one never does."""

    def is_of_more(record: logging.LogRecord) -> bool:
        return "does no better than a guess" not in record.getMessage()

    logger.addFilter(is_of_more)
    try:
        yield
    finally:
        logger.removeFilter(is_of_more)
