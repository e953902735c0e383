"""A tiny random model of an architecture, wild enough that a wrong mask shows in its losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from benchmarks.sweep.architectures import Kind, auto_class, configuration_class
from benchmarks.sweep.shrinking import VOCABULARY, shortened, shrunk

CLASSES = 5
_GAIN = 1.13  # of a matrix: attention is then far from even, and losses stay below 30 nats
_LARGEST_STD = 0.2
_MOST_PARAMETERS = 150_000_000


class NotBuildable(Exception):
    """No tiny model of an architecture can be made; the message says why."""


def candidates(kind: Kind, name: str) -> list[Any]:
    """Configurations of an architecture, the smallest first, the next ones for when it fails.

    Raises:
        NotBuildable: the configuration has no defaults.
    """
    cls = configuration_class(name)
    try:
        settings = cls().to_dict()
    except Exception as error:
        raise NotBuildable(f"no default configuration: {first_line(error)}") from error
    configurations, failures = [], []
    for make in (lambda: shrunk(settings, name), lambda: shortened(settings)):
        try:
            configurations.append(_adapted(cls.from_dict(dict(make())), kind))
        except Exception as error:  # a configuration may refuse sizes; the next one may do
            failures.append(first_line(error))
    if not configurations:
        raise NotBuildable(f"no configuration: {failures[0]}")
    return configurations


def build(kind: Kind, config: Any) -> nn.Module:
    """Make the model of a configuration, random and wild, in float32 and evaluation mode.

    Raises:
        NotBuildable: it is too large to be run.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class(kind).from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise NotBuildable(f"{size / 1e6:,.0f} million parameters")
    torch.manual_seed(0)
    return wild(auto_class(kind).from_config(config, dtype=torch.float32))


def wild(model: nn.Module) -> nn.Module:
    """Give matrices, those of experts included, weights that make every position count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() == 2 or (parameter.dim() == 3 and "expert" in name)
            if is_matrix and not name.endswith("A_log"):
                std = min(_LARGEST_STD, _GAIN / math.sqrt(parameter.shape[-1]))
                parameter.normal_(std=std, generator=generator)
    return model.float().eval()


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _adapted(config: Any, kind: Kind) -> Any:
    """What users set: a padding token, as many classes as their labels have."""
    parts = [config, config.get_text_config()]
    for part in parts:
        if getattr(part, "pad_token_id", None) is None and getattr(part, "vocab_size", None):
            part.pad_token_id = 1
        if kind.name == "causal_lm" and hasattr(part, "use_cache"):
            part.use_cache = False
    if kind.name.endswith("classification"):
        config.num_labels = CLASSES
    config.architectures = []
    if getattr(config, "is_encoder_decoder", False):
        start = getattr(config, "decoder_start_token_id", None)
        config.decoder_start_token_id = start if start is not None else 2
    return config


def special_tokens(config: Any) -> set[int]:
    """The ids that an architecture takes for more than words, so that texts are free of them."""
    ids: set[int] = set()

    def collect(part: dict[str, Any]) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                collect(value)
            elif str(key).endswith(("token_id", "token_ids", "token_index")):
                values = value if isinstance(value, list | tuple) else [value]
                ids.update(each for each in values if isinstance(each, int))

    collect(config.to_dict())
    return ids


def vocabulary_of(config: Any) -> int:
    """How many tokens a model knows, at most the sweep's."""
    size = getattr(config.get_text_config(), "vocab_size", None) or VOCABULARY
    return min(size, VOCABULARY) if isinstance(size, int) else VOCABULARY
