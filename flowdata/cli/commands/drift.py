"""`flowdata drift`: how far fine-tuned language models have moved from their base."""

from __future__ import annotations

import argparse
import gc

from flowdata.cli.begin import begin
from flowdata.cli.exit_codes import DONE
from flowdata.cli.output import print_result
from flowdata.cli.probe_options import (
    add_probe_options,
    check_text_is_read,
    describe_probe,
    is_own,
    make_probe,
    read_probe,
)
from flowdata.drift import Drift, DriftMeter
from flowdata.text.models import load_model, load_tuned_model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("base", help="hub id, folder or GGUF file of the model before fine-tuning")
    parser.add_argument(
        "tuned",
        nargs="+",
        help="hub ids, folders or GGUF files of models after it, PEFT adapters too",
    )
    add_probe_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure how far fine-tuned models have moved from their base, without the old data."""
    check_text_is_read(options)
    begin(options, options.base, *options.tuned)
    how = {"trust_remote_code": options.trust_remote_code, "device": options.device}
    samples = read_probe(options)
    base = load_model(options.base, **how)
    probe, is_shown = make_probe(options, base, samples), not options.quiet
    meter = DriftMeter(base, probe, dtype=options.dtype, progress=is_shown)
    del base
    drifts = {}
    for source in options.tuned:
        gc.collect()  # one model in memory at a time
        drifts[source] = meter(load_tuned_model(options.base, source, **how))
    facts = {
        "base": options.base,
        "probe": options.probe,
        "drift": {source: drift.to_dict() for source, drift in drifts.items()},
    }
    print_result(options, facts, _text(options, drifts))
    return DONE


def _text(options: argparse.Namespace, drifts: dict[str, Drift]) -> str:
    """A line for each model, and what the figures mean."""
    samples = next(iter(drifts.values())).samples
    width = max(map(len, drifts))
    lines = [
        f"drift from {options.base} on {describe_probe(options, samples)}",
        f"{'':{width}}  {'KL':>9}  {'cosine':>7}  agreement",
        *(
            f"{source:{width}}  {drift.kl:9.4f}  {drift.cosine:7.4f}  {drift.agreement:9.1%}"
            for source, drift in drifts.items()
        ),
        "KL(base ‖ tuned) in nats a token"
        + (": by so much the loss has risen on what the base model writes" * is_own(options)),
        "cosine: of its hidden states with the base's; agreement: tokens that both find likeliest",
    ]
    return "\n".join(lines)
