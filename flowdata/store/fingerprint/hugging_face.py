"""The content of Hugging Face's tokenizers, configurations and data sets of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flowdata.store.fingerprint.values import canonical, class_name

_VOLATILE_CONFIG = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def is_tokenizer(value: Any) -> bool:
    """Return whether a value is a Hugging Face tokenizer, or has what a fingerprint reads of it."""
    return hasattr(value, "chat_template") and hasattr(value, "get_vocab")


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Return the digest of a Hugging Face tokenizer: its rules, vocabulary and chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    rules = _rules(tokenizer) if tokenizer.is_fast else None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [class_name(tokenizer), vocabulary, rules, tokenizer.chat_template, special]
    return hashlib.sha256(canonical(content)).hexdigest()


def _rules(tokenizer: Any) -> str:
    """A fast tokenizer's rules as JSON, without the truncation and padding of its last call."""
    text = str(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):
        before, key, rest = text.partition(f'"{name}":')
        _, end = json.JSONDecoder().raw_decode(rest)
        text = f"{before}{key}null{rest[end:]}"
    return text


def stable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the entries that say where it came from or how it is run."""
    return {
        str(key): stable_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _VOLATILE_CONFIG
    }


def columns_given(dataset: Any, fields: Sequence[str]) -> Any:
    """Return a Hugging Face data set without the columns that a model isn't given.

    Of any other data set nothing is left out.

    Args:
        dataset: map-style.
        fields: the names that the model takes.
    """
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or not hasattr(dataset, "select_columns"):
        return dataset
    given = [name for name in names if name in fields]
    return dataset if given == names else dataset.select_columns(given)
