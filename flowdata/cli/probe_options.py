"""The probe of the commands that measure drift: its options, and how it is made."""

from __future__ import annotations

import argparse
from typing import Any

from flowdata._common.notices import say
from flowdata.cli.options import OWN_DTYPE, add_dtype
from flowdata.cli.text_samples import add_text_options, text_samples
from flowdata.drift import own_text
from flowdata.text.models import load_tokenizer
from flowdata.text.tokens import TokenSamples

_OWN = "own"
_OF_MODEL = ("tokenizer", "trust_remote_code")  # of the options of text
_OF_OWN = {
    "samples": (64, "texts that it writes"),
    "length": (128, "tokens of each"),
    "seed": (0, "of what it writes"),
}


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
    for name, (default, text) in _OF_OWN.items():
        add(f"--{name}", type=int, help=f"{text} (default: {default})")
    add_dtype(parser, OWN_DTYPE)
    add("--device", help="default: where the models load")
    add_text_options(parser)


def check_text_is_read(options: argparse.Namespace) -> None:
    """Raise ValueError for options of reading text where the probe is all that could be read.

    Args:
        options: those of `add_probe_options`.
    """
    if not is_own(options):
        return
    parser = argparse.ArgumentParser()
    add_text_options(parser)
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(options, name)
        if name not in _OF_MODEL and value != default:
            flag = f"no-{name}" if value is False else name.replace("_", "-")
            raise ValueError(
                f"--{flag} has no effect: the base model writes the text itself; --probe DATA "
                "reads one"
            )


def read_probe(options: argparse.Namespace) -> TokenSamples | None:
    """Return the probe's samples, before a model is loaded; None where the base model writes them.

    Args:
        options: those of `add_probe_options`, and `base`, the base model's name.
    """
    if is_own(options):
        return None
    for name in _OF_OWN:
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} has no effect on --probe {options.probe}: it is of what the base model "
                "writes itself; --limit takes the first rows of a file"
            )
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
    given = ((getattr(options, name), default) for name, (default, _) in _OF_OWN.items())
    number, length, seed = (default if value is None else value for value, default in given)
    say(f"{options.base} writes {number:,} texts of {length:,} tokens", shown=not options.quiet)
    return own_text(base, tokenizer, number, length, seed, progress=not options.quiet)


def describe_probe(options: argparse.Namespace, samples: int) -> str:
    """Return what models were compared on, for a sentence."""
    of_file = f"{samples} samples of {options.probe}"
    return f"{samples} texts that the base wrote itself" if is_own(options) else of_file


def is_own(options: argparse.Namespace) -> bool:
    """Return whether the probe is what the base model writes."""
    return bool(options.probe == _OWN)
