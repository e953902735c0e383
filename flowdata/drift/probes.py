"""Probes that need no data: text that a model writes itself, and smooth noise for images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata._common.notices import is_first_rank
from flowdata._common.progress import progress_bar
from flowdata._common.resumable import check_natural
from flowdata._common.rng import preserved_rng
from flowdata.models.calling import unwrapped
from flowdata.models.copies import frozen_model
from flowdata.models.hooks import told_of_calls
from flowdata.models.placement import home
from flowdata.models.precision import resolve_dtype
from flowdata.store.fingerprint import fingerprint_model
from flowdata.store.kept import keep
from flowdata.targets.labels import IGNORE_INDEX

_AT_ONCE = 64  # texts that are written at a time
_SCALE = 1.3  # of enlarged noise, whose standard deviation interpolation has made smaller
_USER_WORDS = "\x00"  # stands for a user's words in a chat template, and in none of its own


def own_text(
    model: Any,
    tokenizer: Any,
    samples: int = 64,
    length: int = 128,
    seed: int = 0,
    *,
    template: bool = True,
    store: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """Return texts that a language model writes itself, as samples for a `DriftMeter`.

    A text begins where a user's words would begin in the tokenizer's chat template, or else with
    the token that begins a text, and goes on token after token, each sampled from the model's own
    distribution (temperature 1, no token ruled out). On such text KL(base ‖ tuned) is the rise of
    the loss of the tuned model.

    Args:
        model: a Hugging Face model with `generate`, before training; it comes back as it was.
        tokenizer: its tokenizer.
        samples: how many texts.
        length: tokens of each that count; a text that the model ends earlier is shorter.
        seed: of the draws. The same seed gives the same texts on machines of one kind.
        template: False lets all texts begin with the token that begins any text. Of a chat model
            that was tuned on problems these told a little better what it forgot of other text
            (benchmarks/results/drift/forgetting_drift_language.md).
        store: a file, ``*.safetensors``, or its URL, that keeps the texts.
        progress: show it, on the first rank, where writing takes more than a few seconds.

    Returns:
        `input_ids`, (T,) int64, and `labels`, −100 where the text's beginning was given.

    Raises:
        TypeError: `model` can't generate.
        ValueError: `samples` or `length` is no positive integer, texts would be longer than the
            model's positions, or it gives no numbers.
        ScoreMismatchError: `store` has texts of another model, or others of this one.
    """
    check_natural("samples", samples, least=1)
    check_natural("length", length, least=1)
    model = unwrapped(model)
    if not callable(getattr(model, "generate", None)):
        raise TypeError(
            f"own_text needs a model with `generate`, as Hugging Face's have, got "
            f"{type(model).__name__}; pass other samples as the probe"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"own_text needs a model that goes on with a text, and {type(model).__name__} answers "
            "one; pass other samples as the probe, such as the new task's"
        )
    beginning = torch.tensor(_beginning(tokenizer, model, template), dtype=torch.long)
    _check_positions(model, len(beginning), length)

    def write() -> dict[str, Tensor]:
        return {"token": _write_texts(model, beginning, samples, length, seed, progress)}

    if store is None:
        return _cut(write()["token"], beginning, model)
    identity = {
        "kind": "own text",
        "model": fingerprint_model(model),
        "beginning": beginning.tolist(),
        "samples": samples,
        "length": length,
        "seed": seed,
    }
    return _cut(keep(store, identity, write)["token"], beginning, model)


def _beginning(tokenizer: Any, model: Any, template: bool) -> list[int]:
    """The tokens with which all texts begin, at least one."""
    if template and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": _USER_WORDS}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        before, words, _ = text.partition(_USER_WORDS)
        if words and before:
            ids: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
            return ids
    config = getattr(model, "generation_config", None)
    ids_of_ends = (
        getattr(tokenizer, "bos_token_id", None),
        getattr(config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    first = next((each for each in ids_of_ends if isinstance(each, int)), None)
    if first is None:
        raise ValueError(
            f"the tokenizer has {'neither a chat template nor a' if template else 'no'} token that "
            "begins or ends a text, so that the model has nothing to begin with; pass other "
            "samples as the probe"
        )
    return [first]


def _check_positions(model: Any, beginning: int, length: int) -> None:
    """Raise ValueError for texts that are longer than a model can read."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < beginning + length:
        raise ValueError(
            f"length must leave texts within the model's {most} positions, got {length} after "
            f"{beginning} tokens with which they begin"
        )


def _write_texts(
    model: Any, beginning: Tensor, samples: int, length: int, seed: int, progress: bool
) -> Tensor:
    """Sample texts, (samples, beginning + length) int64."""
    device = home(model)
    dtype = resolve_dtype("auto", model, device)
    parts, is_shown = [], progress and is_first_rank()
    total, name = samples * length, "own text: writing"
    with (
        preserved_rng(seed),
        frozen_model(model, dtype, device) as frozen,
        progress_bar(total, name, "tokens", shown=is_shown, patient=True) as bar,
    ):
        for start in range(0, samples, _AT_ONCE):
            rows = min(_AT_ONCE, samples - start)
            ids = beginning.to(device).expand(rows, -1)
            with _counted(frozen, length, partial(bar, rows)):
                parts.append(_sample(frozen, ids, length))
    return torch.cat(parts)


@contextmanager
def _counted(model: nn.Module, most: int, count: Callable[[], None]) -> Iterator[None]:
    """Count a model's calls in a block, one for each token of a text, as `most` of them."""
    calls = 0

    def tell() -> None:
        nonlocal calls
        calls += 1
        if calls <= most:
            count()

    with told_of_calls(model, tell):
        yield
    for _ in range(calls, most):  # all texts have ended before
        count()


def _sample(model: Any, ids: Tensor, length: int) -> Tensor:
    """Go on with texts by sampling, (rows, T) to (rows, T + length); padded behind an end."""
    from transformers import GenerationConfig

    ends = _ends_of(model)
    # Everything that a model's own configuration could say otherwise is said here.
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=None,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        bad_words_ids=None,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        num_beams=1,
        max_new_tokens=length,
        max_length=None,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    # A PEFT model hands its own to the model inside, and shows that of the model inside as its own.
    before = [(each, vars(each).get("generation_config")) for each in model.modules()]
    try:
        model.generation_config = config  # `generate` fills gaps of what it is given from this one
        tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids))
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ValueError(
            "the model gives no numbers (its probabilities hold inf or NaN) and can't write "
            "a text; take it as it was before it diverged"
        ) from error
    finally:
        for module, own in before:
            vars(module).pop("generation_config", None)
            if own is not None:
                module.generation_config = own
    return F.pad(tokens, (0, ids.shape[1] + length - tokens.shape[1]), value=config.pad_token_id)


def _ends_of(model: Any) -> list[int]:
    """The tokens that end a text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return []
    return [int(end) for end in ends] if isinstance(ends, list) else [int(ends)]


def _cut(tokens: Tensor, beginning: Tensor, model: Any) -> list[dict[str, Tensor]]:
    """Texts as samples, each cut behind the token that ends it."""
    first, ends = len(beginning), torch.tensor(_ends_of(model), dtype=torch.long)
    samples = []
    for ids in tokens.cpu():
        is_end = torch.isin(ids[first:], ends)
        stop = first + int(is_end.long().argmax()) + 1 if is_end.any() else len(ids)
        labels = ids[:stop].clone()
        labels[:first] = IGNORE_INDEX
        samples.append({"input_ids": ids[:stop].clone(), "labels": labels})
    return samples


def smooth_images(
    shape: tuple[int, int, int], samples: int = 512, seed: int = 0, *, cells: int = 6
) -> Tensor:
    """Return smooth noise as images for a `DriftMeter`: no data, and yet something to see.

    Independent Gaussian numbers on a coarse grid are enlarged by bicubic interpolation, and scaled
    to a standard deviation of about 1, that of normalised images.

    Args:
        shape: of one image as the model takes it, (channels, height, width).
        samples: how many images.
        seed: of the draws.
        cells: of the coarse grid, along each side.

    Returns:
        (samples, channels, height, width) float32.

    Raises:
        ValueError: a number is no positive integer, or `shape` has not three of them.

    Example:
        >>> smooth_images((3, 32, 32), samples=4).shape
        torch.Size([4, 3, 32, 32])
    """
    check_natural("samples", samples, least=1)
    check_natural("cells", cells, least=1)
    if len(shape) != 3:
        raise ValueError(f"shape must be (channels, height, width), got {tuple(shape)}")
    for name, size in zip(("channels", "height", "width"), shape, strict=True):
        check_natural(name, size, least=1)
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(samples, channels, cells, cells, generator=generator, dtype=torch.float32)
    images = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return _SCALE * images
