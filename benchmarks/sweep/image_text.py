"""Samples of images and text, with no, one or two images each, in the layouts models take."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sweep.architectures import Kind
from benchmarks.sweep.samples import LENGTHS, Data, Words, image_size, padder, stacked
from benchmarks.sweep.shrinking import WIDTH
from benchmarks.sweep.trials import first_that_runs
from benchmarks.sweep.truth import IGNORE_INDEX, own_loss

_IMAGES = (1, 0, 2, 1, 0, 1, 2, 0, 1, 2, 2, 1)  # not as many images as samples
_TOKENS_TO_TRY = (0, 2, 3, 4, 5, 8, 9, 16, 17, 32, 64)
_MOST_TOKENS = 1100
_ALIGNED = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Layout:
    """How images are given to a model.

    Attributes:
        name: for the row.
        counts: the numbers of images that samples have.
        joined: whether fields of images are joined over samples; stacked otherwise, where
            samples of fewer images get empty ones.
    """

    name: str
    counts: tuple[int, ...]
    joined: bool = True


_LAYOUTS = (
    Layout("patches", (0, 1, 2)),
    Layout("images", (0, 1, 2)),
    Layout("images with sizes", (0, 1, 2)),
    Layout("tiles", (0, 1, 2)),
    Layout("images of a sample", (0, 1, 2), joined=False),
    Layout("patches", (1, 2)),
    Layout("images", (1, 2)),
    Layout("images of a sample", (1, 2), joined=False),
    Layout("images", (1,)),
    Layout("tiles", (1,)),
)


def image_text_samples(model: nn.Module, kind: Kind) -> Data:
    """Return the first layout of images and texts that a model takes.

    Raises:
        NotBuildable: it takes none of them.
    """
    return first_that_runs(model, kind, _candidates(model, kind))


def _candidates(model: nn.Module, kind: Kind) -> Iterator[Any]:
    for layout in _LAYOUTS:
        for tokens in _tokens_an_image(model, kind, layout):
            yield partial(_make, model, layout, tokens)


def _tokens_an_image(model: nn.Module, kind: Kind, layout: Layout) -> list[int]:
    """The number of image tokens with which a sample of one image runs; none or one of them.

    Many models say in their refusal how many features an image has, or how many numbers those
    hold; the others are asked in turn.
    """
    untried = [1, *_TOKENS_TO_TRY]
    while untried:
        tokens = untried.pop(0)
        try:
            data = _make(model, layout, tokens, most=1)
            own_loss(model, data.collate(data.samples), kind)
        except Exception as error:  # a model says in many ways that it takes other fields
            if "do not match" not in str(error):
                continue
            numbers = [int(number) for number in re.findall(r"\d+", str(error))]
            said = {n // parts for n in numbers for parts in (1, WIDTH) if n % parts == 0}
            if tokens == 1:
                untried = [count for count in sorted(said) if 1 < count < _MOST_TOKENS]
        else:
            return [tokens]
    return []


def _make(model: nn.Module, layout: Layout, tokens: int, most: int | None = None) -> Data:
    generator = torch.Generator().manual_seed(7)
    config = model.config
    words = Words(config, 7)
    samples = []
    for length, images in list(zip(LENGTHS, _IMAGES, strict=True))[:most]:
        count = min(max(images, min(layout.counts)), max(layout.counts))
        text = words.text(length)
        image = torch.full((tokens,), _image_token(config))
        pieces = [text[:1], *[torch.cat([image, text[1:2]])] * count, text[2:]]
        ids = torch.cat(pieces)
        labels = torch.cat([torch.full((len(ids) - len(text[2:]),), IGNORE_INDEX), text[2:]])
        sample = {"input_ids": ids, "labels": labels}
        is_image = (ids == _image_token(config)).long()
        for name in _types(model):
            sample[name] = is_image
        if count:
            sample |= _fields(config, layout, count, generator)
        samples.append(sample)
    counts = ", ".join(map(str, layout.counts))
    note = f"{layout.name}: {counts} images, {tokens} tokens each"
    return Data(samples, partial(_collate, padder(config), layout.joined), note)


def _fields(
    config: Any, layout: Layout, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The fields of `count` images, each a tensor whose first axis is that of images or patches."""
    height, width = image_size(config)
    draw = partial(torch.randn, generator=generator)
    sizes = torch.tensor([[height, width]] * count)
    if layout.name == "patches":
        vision = config.vision_config
        patch, merge = vision.patch_size, getattr(vision, "spatial_merge_size", 2)
        channels = getattr(vision, "in_channels", 3)
        row = channels * getattr(vision, "temporal_patch_size", 1) * patch**2
        grid = torch.tensor([[1, 2 * merge, 2 * merge]] * count)
        return {"pixel_values": draw(count * 4 * merge**2, row), "image_grid_thw": grid}
    if layout.name == "tiles":
        return {"pixel_values": draw(count, 2, 3, height, width), "image_sizes": sizes}
    fields = {"pixel_values": draw(count, 3, height, width)}
    return fields | ({"image_sizes": sizes} if layout.name == "images with sizes" else {})


def _collate(pad: Any, joined: bool, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Text padded; images joined over samples, or stacked; left out where no sample has any."""
    texts = [{name: s[name] for name in s if name in _ALIGNED} for s in samples]
    batch: dict[str, Any] = pad(texts)
    pictured = [sample for sample in samples if "pixel_values" in sample]
    for name in pictured[0] if pictured else ():
        if name in _ALIGNED:
            continue
        if joined:
            batch[name] = torch.cat([sample[name] for sample in pictured])
        else:
            empty = pictured[0][name][:0]
            batch[name] = stacked([{name: s.get(name, empty)} for s in samples], {})[name]
    return batch


def _types(model: nn.Module) -> list[str]:
    """The fields by which a model is told where images are, beside their tokens."""
    parameters = inspect.signature(model.forward).parameters
    names = ["mm_token_type_ids"]
    if model.config.model_type.startswith("gemma3"):  # elsewhere the field says something else
        names.append("token_type_ids")
    return [name for name in names if name in parameters]


def _image_token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index", "media_token_id", "im_patch_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    return 198
