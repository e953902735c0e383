"""The fingerprints of functions and of tokenizers."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Set
from typing import Any

from torch import nn

from flowdata.store.fingerprint.model import fingerprint_model
from flowdata.store.fingerprint.values import NoContentError, canonical, class_name, update_digest


def fingerprint_callable(function: Callable[..., Any] | None) -> str:
    """Return the digest of what a function does: its code, defaults and captured values."""
    digest = hashlib.sha256()
    _update_from_callable(digest, function)
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Return the digest of a Hugging Face tokenizer: its rules, vocabulary and chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [class_name(tokenizer), vocabulary, rules, tokenizer.chat_template, special]
    return hashlib.sha256(canonical(content)).hexdigest()


def _update_from_callable(digest: hashlib._Hash, function: Any) -> None:
    if isinstance(function, functools.partial):
        for part in (function.func, *function.args, *sorted(function.keywords.items())):
            _update_from_captured(digest, part)
    elif isinstance(function, types.MethodType):
        _update_from_captured(digest, function.__self__)
        _update_from_callable(digest, function.__func__)
    elif isinstance(function, types.FunctionType):
        digest.update(canonical(function.__qualname__))
        _update_from_code(digest, function.__code__)
        captured_values = [cell.cell_contents for cell in function.__closure__ or ()]
        for value in (*(function.__defaults__ or ()), *captured_values):
            _update_from_captured(digest, value)
    else:  # an object with `__call__`, a built-in function, or None
        _update_from_captured(digest, function)


def _update_from_code(digest: hashlib._Hash, code: types.CodeType) -> None:
    """Feed compiled code into a digest.

    The file and the line numbers stay out, so that a function may move within its source; the
    bytecode depends on the version of Python, which therefore changes the digest.
    """
    digest.update(code.co_code)
    digest.update(canonical([code.co_names, code.co_varnames]))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # of a function defined inside this one
            _update_from_code(digest, constant)
        else:  # a frozenset's order changes from process to process
            text = sorted(map(repr, constant)) if isinstance(constant, Set) else repr(constant)
            digest.update(canonical(text))


def _update_from_captured(digest: hashlib._Hash, value: Any) -> None:
    """Feed a value that a function captures into a digest.

    Content is taken where a rule knows it. Of any other object its class and its plain attributes
    are taken: those that hold text, a number, a truth value, None or a tokenizer.
    """
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        _update_from_callable(digest, value)
    elif isinstance(value, nn.Module):
        digest.update(fingerprint_model(value).encode())
    elif hasattr(value, "chat_template") and hasattr(value, "get_vocab"):
        update_digest(digest, fingerprint_tokenizer(value))
    else:
        try:
            update_digest(digest, value)
        except NoContentError as error:
            digest.update(canonical(str(error)))
            for name, attribute in sorted(getattr(value, "__dict__", {}).items()):
                is_plain = isinstance(attribute, str | int | float | bool | None)
                if is_plain or hasattr(attribute, "get_vocab"):
                    digest.update(canonical(name))
                    _update_from_captured(digest, attribute)
