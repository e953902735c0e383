"""A dozen samples of unlike lengths for a kind of model, and the collate function of a user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.sweep.architectures import Kind
from benchmarks.sweep.building import CLASSES, special_tokens, vocabulary_of
from benchmarks.sweep.truth import IGNORE_INDEX, Collate

LENGTHS = (31, 4, 6, 9, 9, 13, 17, 21, 21, 26, 38, 3)
_RATE = 16_000  # samples of sound a second


def make_samples(kind: Kind, config: Any) -> tuple[list[dict[str, Any]], Collate]:
    """Return the samples of a kind, and how they become a batch.

    Raises:
        NotImplementedError: the kind has samples that depend on the model.
    """
    makers: dict[str, Callable[[Any], tuple[list[dict[str, Any]], Collate]]] = {
        "causal_lm": _causal_texts,
        "masked_lm": _masked_texts,
        "sequence_classification": _classified_texts,
        "token_classification": _tagged_texts,
        "seq2seq_lm": _pairs_of_texts,
        "image_classification": _images,
    }
    if kind.name not in makers:
        raise NotImplementedError(kind.name)
    return makers[kind.name](config)


def words(config: Any, length: int, generator: torch.Generator) -> torch.Tensor:
    """A text: ids, (length,) int64, none of them special."""
    special = special_tokens(config)
    plain = [token for token in range(3, vocabulary_of(config)) if token not in special]
    draws = torch.randint(len(plain), (length,), generator=generator)
    return torch.tensor(plain)[draws]


def padder(config: Any) -> Collate:
    """A collate function as users write it: each field padded to its longest, and a mask."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    token = pad if isinstance(pad, int) and pad >= 0 else 0

    def collate(samples: list[Any]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        labels = [torch.as_tensor(sample["labels"]) for sample in samples]
        return {
            "input_ids": padded(ids, token),
            "attention_mask": padded([torch.ones_like(each) for each in ids], 0),
            "labels": padded(labels, IGNORE_INDEX) if labels[0].dim() else torch.stack(labels),
        }

    return collate


def padded(values: list[torch.Tensor], padding: float) -> torch.Tensor:
    """Tensors of unlike lengths as one, padded on the right."""
    return pad_sequence(values, batch_first=True, padding_value=padding)


def _texts(config: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [words(config, length, generator) for length in LENGTHS]


def _causal_texts(config: Any) -> tuple[list[dict[str, Any]], Collate]:
    samples = []
    for ids in _texts(config):
        labels = ids.clone()
        labels[: len(ids) // 3] = IGNORE_INDEX
        samples.append({"input_ids": ids, "labels": labels})
    return samples, padder(config)


def _masked_texts(config: Any) -> tuple[list[dict[str, Any]], Collate]:
    generator = torch.Generator().manual_seed(2)
    mask = getattr(config, "mask_token_id", None)
    samples = []
    for ids in _texts(config):
        is_target = torch.rand(len(ids), generator=generator) < 0.3
        is_target[0] = True
        labels = torch.where(is_target, ids, IGNORE_INDEX)
        inputs = torch.where(is_target, mask if isinstance(mask, int) else 2, ids)
        samples.append({"input_ids": inputs, "labels": labels})
    return samples, padder(config)


def _classified_texts(config: Any) -> tuple[list[dict[str, Any]], Collate]:
    texts = enumerate(_texts(config))
    return [{"input_ids": ids, "labels": index % CLASSES} for index, ids in texts], padder(config)


def _tagged_texts(config: Any) -> tuple[list[dict[str, Any]], Collate]:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for ids in _texts(config):
        labels = torch.randint(CLASSES, (len(ids),), generator=generator)
        labels[torch.rand(len(ids), generator=generator) < 0.2] = IGNORE_INDEX
        labels[1] = 0
        samples.append({"input_ids": ids, "labels": labels})
    return samples, padder(config)


def _pairs_of_texts(config: Any) -> tuple[list[dict[str, Any]], Collate]:
    generator = torch.Generator().manual_seed(4)
    samples = [
        {"input_ids": ids, "labels": words(config, length, generator)}
        for ids, length in zip(_texts(config), reversed(LENGTHS), strict=True)
    ]
    return samples, padder(config)


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images that a configuration asks for, in pixels."""
    parts = [config, *(getattr(config, part, None) for part in ("vision_config", "backbone_config"))]
    for part in parts:
        size = getattr(part, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple):
            return size[0], size[1]
    return 32, 32


def _images(config: Any) -> tuple[list[dict[str, Any]], Collate]:
    generator = torch.Generator().manual_seed(5)
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3)
    shape = (channels, *image_size(config))
    samples = [
        {"pixel_values": torch.randn(shape, generator=generator), "labels": index % CLASSES}
        for index in range(len(LENGTHS))
    ]
    return samples, torch.utils.data.default_collate
