"""The probe of the commands that measure drift: its options, and how it is made."""

from __future__ import annotations

import argparse
from typing import Any

from flowdata._common.notices import say
from flowdata.cli.options import add_dtype
from flowdata.cli.text_samples import add_text_options, text_samples
from flowdata.drift import own_text
from flowdata.text.models import load_tokenizer
from flowdata.text.tokens import TokenSamples

_OWN = "own"


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what models are compared on, and in which dtype."""
    add = parser.add_argument
    add(
        "--probe",
        default=_OWN,
        metavar="own|DATA",
        help="text to compare models on: what the base model writes itself (default), or a file, "
        "saved data set or hub id",
    )
    add("--samples", type=int, default=64, help="texts that it writes (default: %(default)s)")
    add("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what it writes (default: %(default)s)")
    add_dtype(parser)
    add("--device", help="default: where the models load")
    add_text_options(parser)


def read_probe(options: argparse.Namespace) -> TokenSamples | None:
    """Return the probe's samples, before a model is loaded; None where the base model writes them.

    Args:
        options: those of `add_probe_options`, and `base`, the base model's name.
    """
    if is_own(options):
        return None
    return text_samples(options, options.probe, options.base)[0].readable()


def make_probe(options: argparse.Namespace, base: Any, samples: TokenSamples | None) -> Any:
    """Return the probe that options describe.

    Args:
        options: those of `add_probe_options`, and `base`, the base model's name.
        base: the base model.
        samples: as `read_probe` returns them.
    """
    if samples is not None:
        return samples
    tokenizer = load_tokenizer(
        options.tokenizer or options.base, trust_remote_code=options.trust_remote_code
    )
    say(
        f"{options.base} writes {options.samples:,} texts of {options.length:,} tokens",
        shown=not options.quiet,
    )
    return own_text(base, tokenizer, options.samples, options.length, options.seed)


def describe_probe(options: argparse.Namespace, samples: int) -> str:
    """Return what models were compared on, for a sentence."""
    of_file = f"{samples} samples of {options.probe}"
    return f"{samples} texts that it wrote itself" if is_own(options) else of_file


def is_own(options: argparse.Namespace) -> bool:
    """Return whether the probe is what the base model writes."""
    return bool(options.probe == _OWN)
