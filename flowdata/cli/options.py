"""Options that several commands take."""

from __future__ import annotations

import argparse

OWN_DTYPE = "the model's own"
FAST_DTYPE = "bfloat16 for language models where the device is fast at it, else the model's own"


def add_dtype(parser: argparse.ArgumentParser, auto: str) -> None:
    """Add `--dtype`, the precision that the model runs in; `auto` says which one "auto" takes."""
    names = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", default="auto", choices=names, help=f"the precision to run in (auto: {auto})"
    )


def add_temperature(parser: argparse.ArgumentParser, of_what: str) -> None:
    """Add `--temperature`, a number or the name of a rule."""
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default="median",
        help=f"{of_what}: a number, median, mean, a quantile such as q0.25, or an effective sample "
        "size such as ess0.5 (default: %(default)s)",
    )


def _temperature(text: str) -> float | str:
    """A number where the text is one; else a rule, which `check_temperature` will judge."""
    try:
        return float(text)
    except ValueError:
        return text
