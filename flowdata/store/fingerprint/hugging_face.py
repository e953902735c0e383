"""The content of Hugging Face's tokenizers, configurations and data sets of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

from flowdata.store.fingerprint.code import is_of_library, names_read_by
from flowdata.store.fingerprint.values import canonical, class_name

_VOLATILE_CONFIG = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
# What decides on a tokenizer's output beside its rules, vocabulary, template and special tokens.
_SETTINGS = (
    *("model_max_length", "truncation_side", "padding_side", "split_special_tokens"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "pad_token_type_id", "src_lang"),
    *("tgt_lang", "model_input_names", "special_tokens_pattern", "token_type_ids_pattern"),
    *("token_type_ids_include_special_tokens", "clean_up_tokenization_spaces"),
)
# Attributes of a tokenizer that say where it came from, or that its rules and vocabulary hold.
_BESIDE_SETTINGS = (
    *("init_inputs", "init_kwargs", "name_or_path", "verbose", "deprecation_warnings", "backend"),
    *("files_loaded", "tokens_trie", "chat_template", "_tokenizer", "_in_target_context_manager"),
)


def is_tokenizer(value: Any) -> bool:
    """Return whether a value is a Hugging Face tokenizer, or has what a fingerprint reads of it."""
    return hasattr(value, "chat_template") and hasattr(value, "get_vocab")


def fingerprint_tokenizer(tokenizer: Any, left_out: Set[str] = frozenset()) -> str:
    """Return the digest of a Hugging Face tokenizer: its rules, vocabulary and chat template.

    Args:
        tokenizer: fast or not.
        left_out: names of special tokens, or of the template, that don't count.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    rules = _rules(tokenizer) if tokenizer.is_fast else None
    special = tokenizer.special_tokens_map.items()
    tokens = {name: str(token) for name, token in special if name not in left_out}
    template = None if "chat_template" in left_out else tokenizer.chat_template
    content = [class_name(tokenizer), vocabulary, rules, template, tokens]
    return hashlib.sha256(canonical(content)).hexdigest()


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Return the settings of a tokenizer that `fingerprint_tokenizer` leaves out, JSON-like.

    They are what a collate function's calls go by: where texts are cut, for one.
    """
    settings = {name: getattr(tokenizer, name, None) for name in _SETTINGS}
    return {name: value for name, value in settings.items() if value is not None}


def own_attributes(tokenizer: Any) -> dict[str, Any]:
    """Return the attributes that the user's own subclass of a tokenizer of transformers may read.

    There are none where the class is of a known package, or is no subclass of one of transformers.
    """
    kind = type(tokenizer)
    homes = [base.__module__ for base in kind.__mro__]
    if is_of_library(homes[0]) or not any(home.startswith("transformers.") for home in homes):
        return {}
    read = names_read_by(kind)
    return {
        name: value
        for name, value in vars(tokenizer).items()
        if name not in _BESIDE_SETTINGS and (not name.startswith("_") or name in read)
    }


def is_configuration(value: Any) -> bool:
    """Return whether `to_dict` tells all of a value, as of configurations and image processors.

    A known package's class says so. A processor's leaves out the tokenizer inside it.
    """
    homes = [base.__module__ for base in type(value).__mro__ if "to_dict" in vars(base)]
    return any(map(is_of_library, homes)) and "transformers.processing_utils" not in homes


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
