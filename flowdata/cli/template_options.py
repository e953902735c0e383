"""The chat template on the command line: which one is used, and the values of its variables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flowdata.text.models import load_tokenizer


def add_template_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how text becomes tokens."""
    add = parser.add_argument
    add(
        "--template",
        action=argparse.BooleanOptionalAction,
        help="put pairs through the chat template (default: if the tokenizer has one)",
    )
    add("--chat-template", type=Path, metavar="FILE", help="a template in the tokenizer's place")
    add(
        "--template-option",
        action="append",
        default=[],
        type=_key_and_value,
        metavar="KEY=VALUE",
        help="set a variable of the chat template, such as enable_thinking=false; may be repeated",
    )
    add("--max-length", type=int, help="cut samples to so many tokens")
    add(
        "--truncation",
        choices=("keep_start", "keep_end"),
        default="keep_start",
        help="which tokens a cut sample keeps; keep_end cuts the prompt (default: %(default)s)",
    )
    add("--tokenizer", help="hub id, folder or GGUF file (default: the model's)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def load_tokenizer_with_template(options: argparse.Namespace, model: str) -> Any:
    """Return the tokenizer that the options name, with the chat template that they name.

    Args:
        options: those of `add_template_options`.
        model: whose tokenizer it is, if none was named.

    Raises:
        ValueError: there is no tokenizer, or no text in the template's file; or an option has no
            effect.
    """
    if options.truncation != "keep_start" and options.max_length is None:
        raise ValueError("--truncation needs --max-length: without it nothing is cut")
    tokenizer = load_tokenizer(
        options.tokenizer or model, trust_remote_code=options.trust_remote_code
    )
    if options.chat_template is not None:
        source = options.chat_template.read_text(encoding="utf-8")
        if not source.strip():
            raise ValueError(f"--chat-template {options.chat_template} is an empty file")
        tokenizer.chat_template = source
    return tokenizer


def _key_and_value(text: str) -> tuple[str, Any]:
    """A variable and its value, which is read as JSON where it is any, and is text elsewhere."""
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"should be KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, {"True": True, "False": False, "None": None}.get(value, value)
