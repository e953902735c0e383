"""`flowdata drift`: how far a fine-tuned language model has moved from its base."""

from __future__ import annotations

import argparse
from typing import Any

from flowdata.cli.exit_codes import DONE
from flowdata.cli.options import add_dtype
from flowdata.cli.output import print_result
from flowdata.cli.text_samples import add_text_options, text_samples
from flowdata.drift import Drift, DriftMeter, own_text
from flowdata.text.models import (
    hide_progress,
    load_model,
    load_tokenizer,
    load_transformers,
    load_tuned_model,
)

_OWN = "own"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("base", help="hub id or folder of the model before fine-tuning")
    add("tuned", nargs="+", help="hub ids or folders of models after it, PEFT adapters included")
    add(
        "--probe",
        default=_OWN,
        metavar="own|DATA",
        help="text to compare them on: what the base model writes itself (default), or a file, "
        "saved data set or hub id",
    )
    add("--samples", type=int, default=64, help="texts that it writes (default: %(default)s)")
    add("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what it writes (default: %(default)s)")
    add_dtype(parser)
    add("--device", help="default: where the models load")
    add_text_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure how far fine-tuned models have moved from their base, without the old data."""
    load_transformers()
    if options.quiet:
        hide_progress()
    trust = options.trust_remote_code
    base = _on_device(load_model(options.base, trust_remote_code=trust), options.device)
    meter = DriftMeter(base, _probe(options, base), dtype=options.dtype)
    drifts = {}
    for source in options.tuned:
        tuned = load_tuned_model(base, source, trust_remote_code=trust)
        drifts[source] = meter(_on_device(tuned, options.device))
        if hasattr(tuned, "unload"):
            tuned.unload()  # adapters are put into the base itself
    facts = {source: drift.to_dict() for source, drift in drifts.items()}
    print_result(
        options,
        {"base": options.base, "probe": options.probe, "drift": facts},
        _text(options, drifts),
    )
    return DONE


def _probe(options: argparse.Namespace, base: Any) -> Any:
    if options.probe != _OWN:
        return text_samples(options, options.probe, options.base)[0]
    tokenizer = load_tokenizer(
        options.tokenizer or options.base, trust_remote_code=options.trust_remote_code
    )
    return own_text(base, tokenizer, options.samples, options.length, options.seed)


def _on_device(model: Any, device: str | None) -> Any:
    return model if device is None else model.to(device)


def _text(options: argparse.Namespace, drifts: dict[str, Drift]) -> str:
    """A line for each model, and what the figures mean."""
    probe = "texts that it wrote itself" if options.probe == _OWN else f"samples of {options.probe}"
    number = next(iter(drifts.values())).samples
    width = max(map(len, drifts))
    head = f"{'':{width}}  {'KL':>9}  {'cosine':>7}  agreement"
    lines = [
        f"{source:{width}}  {drift.kl:9.4f}  {drift.cosine:7.4f}  {drift.agreement:9.1%}"
        for source, drift in drifts.items()
    ]
    note = "KL(base ‖ tuned) in nats a token"
    if options.probe == _OWN:
        note += ": by so much the loss has risen on what the base model writes"
    return "\n".join([f"drift from {options.base} on {number} {probe}", head, *lines, note])
