"""A dozen samples of unlike lengths for a kind of model, and the collate function of a user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from benchmarks.sweep.building import CLASSES, special_tokens, vocabulary_of
from benchmarks.sweep.truth import IGNORE_INDEX, Collate

LENGTHS = (31, 4, 6, 9, 9, 13, 17, 21, 21, 26, 38, 3)


@dataclass(frozen=True)
class Data:
    """Samples, how they become a batch, and a note on them for the row."""

    samples: list[dict[str, Any]]
    collate: Collate
    note: str = ""


class Words:
    """Random texts of a model's vocabulary, free of its special tokens."""

    def __init__(self, config: Any, seed: int) -> None:
        special = special_tokens(config)
        tokens = [token for token in range(3, vocabulary_of(config)) if token not in special]
        self.tokens = torch.tensor(tokens)
        self.generator = torch.Generator().manual_seed(seed)

    def text(self, length: int) -> Tensor:
        """Ids, (length,) int64."""
        draws = torch.randint(len(self.tokens), (length,), generator=self.generator)
        return self.tokens[draws]

    def texts(self) -> list[Tensor]:
        """A text for each of the sweep's lengths."""
        return [self.text(length) for length in LENGTHS]


def padder(config: Any) -> Collate:
    """A collate function as users write it: each field padded to its longest, and a mask."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    paddings = {"input_ids": pad if isinstance(pad, int) and pad >= 0 else 0}

    def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = stacked(samples, paddings)
        if "input_ids" in batch and "attention_mask" not in batch:
            batch["attention_mask"] = padded([torch.ones_like(s["input_ids"]) for s in samples])
        return batch

    return collate


def stacked(samples: Sequence[Mapping[str, Any]], paddings: Mapping[str, int]) -> dict[str, Any]:
    """The fields of samples as tensors, padded with 0 where `paddings` names nothing else."""
    paddings = {"labels": IGNORE_INDEX, **paddings}
    batch = {}
    for name in samples[0]:
        values = [torch.as_tensor(sample[name]) for sample in samples]
        ragged = values[0].dim() > 0
        batch[name] = padded(values, paddings.get(name, 0)) if ragged else torch.stack(values)
    return batch


def padded(values: list[Tensor], padding: float = 0) -> Tensor:
    """Tensors of unlike lengths as one, padded on the right."""
    return pad_sequence(values, batch_first=True, padding_value=padding)


def _causal_texts(config: Any) -> Data:
    samples = []
    for ids in Words(config, 1).texts():
        labels = ids.clone()
        labels[: len(ids) // 3] = IGNORE_INDEX
        samples.append({"input_ids": ids, "labels": labels})
    return Data(samples, padder(config))


def _masked_texts(config: Any) -> Data:
    generator = torch.Generator().manual_seed(2)
    mask = getattr(config, "mask_token_id", None)
    samples = []
    for ids in Words(config, 1).texts():
        is_target = torch.rand(len(ids), generator=generator) < 0.3
        is_target[0] = True
        labels = torch.where(is_target, ids, IGNORE_INDEX)
        inputs = torch.where(is_target, mask if isinstance(mask, int) else 2, ids)
        samples.append({"input_ids": inputs, "labels": labels})
    return Data(samples, padder(config))


def _classified_texts(config: Any) -> Data:
    texts = enumerate(Words(config, 1).texts())
    end = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int):
        # Such a model classifies by what stands at the text's end token.
        texts = ((index, torch.cat([ids, torch.tensor([end])])) for index, ids in texts)
    samples = [{"input_ids": ids, "labels": index % CLASSES} for index, ids in texts]
    return Data(samples, padder(config))


def _tagged_texts(config: Any) -> Data:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for ids in Words(config, 1).texts():
        labels = torch.randint(CLASSES, (len(ids),), generator=generator)
        labels[torch.rand(len(ids), generator=generator) < 0.2] = IGNORE_INDEX
        labels[1] = 0
        samples.append({"input_ids": ids, "labels": labels})
    return Data(samples, padder(config))


def _pairs_of_texts(config: Any) -> Data:
    words = Words(config, 4)
    samples = [
        {"input_ids": ids, "labels": words.text(length)}
        for ids, length in zip(words.texts(), reversed(LENGTHS), strict=True)
    ]
    return Data(samples, padder(config))


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images that a configuration asks for, in pixels."""
    names = ("vision_config", "backbone_config", "encoder")
    for part in (config, *(getattr(config, name, None) for name in names)):
        size = getattr(part, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple):
            return size[0], size[1]
    return 32, 32


def _images(config: Any) -> Data:
    generator = torch.Generator().manual_seed(5)
    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    shape = (channels if isinstance(channels, int) else 3, *image_size(config))
    samples = [
        {"pixel_values": torch.randn(shape, generator=generator), "labels": index % CLASSES}
        for index in range(len(LENGTHS))
    ]
    return Data(samples, default_collate)


# The kinds whose samples don't depend on more of a model than its configuration.
SIMPLE: dict[str, Callable[[Any], Data]] = {
    "causal_lm": _causal_texts,
    "masked_lm": _masked_texts,
    "sequence_classification": _classified_texts,
    "token_classification": _tagged_texts,
    "seq2seq_lm": _pairs_of_texts,
    "image_classification": _images,
}
