"""Renderings to tokens and targets, as TRL's SFTTrainer makes them of the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flowdata.text.renderings import Rendering, common_length

Encoded = tuple[list[int], NDArray[np.bool_]]  # tokens, and which of them are targets
Truncation = Literal["keep_start", "keep_end"]  # TRL's words


def encode(renderings: Sequence[Rendering], tokenizer: Any) -> list[Encoded]:
    """Return the tokens of texts, and which of them are targets.

    Args:
        renderings: the texts.
        tokenizer: a Hugging Face tokenizer; it gets the texts in as few calls as can be, as it
            runs the texts of a call on all cores.
    """
    encoded: dict[int, Encoded] = {}
    for is_plain in (False, True):
        numbers = [
            i for i, rendering in enumerate(renderings) if (rendering.num_messages == 0) == is_plain
        ]
        if numbers:
            part = [renderings[i] for i in numbers]
            encoded.update(zip(numbers, _encode(part, tokenizer, is_plain), strict=True))
    return [encoded[i] for i in range(len(renderings))]


def _encode(renderings: Sequence[Rendering], tokenizer: Any, is_plain: bool) -> Iterator[Encoded]:
    """The tokens and targets of texts that all go with or all without special tokens."""
    texts = [rendering.text for rendering in renderings]
    batch = tokenizer(texts, add_special_tokens=is_plain)
    prompts = [rendering.prompt for rendering in renderings if rendering.prompt is not None]
    prompt_ids = iter(
        tokenizer(prompts, add_special_tokens=is_plain)["input_ids"] if prompts else ()
    )
    for number, (rendering, tokens) in enumerate(zip(renderings, batch["input_ids"], strict=True)):
        is_target = np.zeros(len(tokens), dtype=np.bool_)
        if rendering.prompt is not None:
            # Prompt and completion are one text, as they are in training, and a token may reach
            # over the seam: the targets begin where the tokens part, and not where the text does.
            is_target[common_length(next(prompt_ids), tokens) :] = True
        for start, end in rendering.targets:
            if tokenizer.is_fast:
                first, last = _tokens_between(batch, number, rendering.text, start, end)
            else:  # it does not say where its tokens lie
                first, last = (
                    common_length(tokenizer(text, add_special_tokens=is_plain)["input_ids"], tokens)
                    for text in (rendering.text[:start], rendering.text[:end])
                )
            is_target[first:last] = True
        yield tokens, is_target


def _tokens_between(batch: Any, number: int, text: str, start: int, end: int) -> tuple[int, int]:
    """The tokens that characters of a text are in: the first one, and one after the last.

    Some characters are in no token: a special token may swallow the spaces beside it. Others are in
    several, one for each of their bytes, of which `char_to_token` gives the first.
    """
    token_of = partial(batch.char_to_token, number)
    first = next((t for c in range(start, end) if (t := token_of(c)) is not None), 0)
    last = next((c for c in range(end - 1, start - 1, -1) if token_of(c) is not None), None)
    if last is None:
        return first, first
    stop = token_of(last) + 1
    if text[last].isascii():  # one byte: what lies there, too, is a space of the tokenizer's own
        return first, stop
    while (span := batch.token_to_chars(number, stop)) and span.start <= last < span.end:
        stop += 1
    return first, stop


def kept_part(length: int, max_length: int | None, truncation: Truncation) -> slice:
    """Return which tokens of a sample are kept where it may have at most `max_length`.

    Example:
        >>> kept_part(5, 3, "keep_end")
        slice(2, None, None)
    """
    if max_length is None or length <= max_length:
        return slice(None)
    return slice(max_length) if truncation == "keep_start" else slice(length - max_length, None)
