"""`flowdata front`: what a fine-tuned model learned against what it forgot, at each share of it."""

from __future__ import annotations

import argparse
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowdata._common.notices import is_first_rank
from flowdata._common.progress import progress_bar
from flowdata._common.real_numbers import check_factor
from flowdata.cli.begin import begin
from flowdata.cli.exit_codes import DONE
from flowdata.cli.front_models import check_front, models_of_front, write_model
from flowdata.cli.output import print_result
from flowdata.cli.probe_options import add_probe_options, describe_probe, make_probe, read_probe
from flowdata.cli.text_samples import text_samples
from flowdata.drift import Candidate, Drift, DriftMeter, draw_front, rank
from flowdata.models.precision import resolve_dtype
from flowdata.report.pictures import load_matplotlib
from flowdata.scoring.scorer import LossScorer
from flowdata.text.models import load_model

_ALPHAS = tuple(step / 10 for step in range(11))
_ENDS = {"0": "the model before fine-tuning", "1": "the tuned model"}  # by α


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("base", help="hub id or folder of the model before fine-tuning")
    add("tuned", help="hub id or folder of the model after it, or of LoRA adapters")
    add(
        "--valid",
        required=True,
        metavar="DATA",
        help="validation data of the new task; it is read as the options below say, and so is a "
        "--probe that is data",
    )
    add(
        "--alphas",
        nargs="+",
        type=float,
        default=_ALPHAS,
        help="shares of the fine-tuning (default: 0, 0.1, … 1)",
    )
    add(
        "--exchange",
        type=float,
        default=1.0,
        help="what a nat of drift counts beside a nat of validation loss (default: %(default)s)",
    )
    add("--write", type=Path, metavar="FOLDER", help="write the chosen weights there")
    add(
        "--picture",
        type=Path,
        default=Path("front.png"),
        metavar="FILE",
        help="write the picture of the front there, as PNG (default: %(default)s)",
    )
    add_probe_options(parser)


def run(options: argparse.Namespace) -> int:
    """Weigh what a fine-tuning learned against what it forgot; choose how much to keep."""
    _check(options)
    load_matplotlib()  # what is missing is told before anything is measured
    begin(options, options.base, options.tuned)
    check_front(options.tuned)
    candidates = rank(_runs(options), validation="loss", exchange=options.exchange)
    chosen, trust = float(candidates[0].name), options.trust_remote_code
    named = [replace(candidate, name=f"α = {candidate.name}") for candidate in candidates]
    options.picture.write_bytes(draw_front(named))
    if options.write is not None:
        write_model(options.base, options.tuned, chosen, options.write, trust_remote_code=trust)
    facts = {
        "base": options.base,
        "tuned": options.tuned,
        "chosen": chosen,
        "front": [
            {
                "alpha": float(c.name),
                "validation": c.validation,
                "cost": c.cost,
                **c.drift.to_dict(),
            }
            for c in _by_alpha(candidates)
        ],
    }
    print_result(options, facts, _text(options, candidates))
    return DONE


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for what would only be seen to be wrong at the end."""
    for alpha in options.alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"--alphas must lie between 0 and 1, got {alpha}")
    twice = [alpha for alpha in options.alphas if options.alphas.count(alpha) > 1]
    if twice:
        raise ValueError(f"--alphas must be several numbers, got {twice[0]} twice")
    check_factor("--exchange", options.exchange)
    for source in (options.base, options.tuned):
        if str(source).endswith(".gguf") and Path(source).is_file():
            raise ValueError(
                "front averages the weights of two hub ids or folders, and "
                f"{source} is a GGUF file: write a folder of it first, by "
                "flowdata.text.load_model(FILE).save_pretrained(FOLDER) and "
                "flowdata.text.load_tokenizer(FILE).save_pretrained(FOLDER)"
            )
    if options.write is not None and options.write.exists():
        raise ValueError(f"--write must name a new folder, and {options.write} is there already")
    if options.picture.is_dir():
        raise ValueError(f"--picture must name a file, and {options.picture} is a folder")
    for flag, place in (("--write", options.write), ("--picture", options.picture)):
        above = [path for path in place.absolute().parents if path.exists()] if place else []
        if above and not above[0].is_dir():
            raise ValueError(f"{flag} must lie in a folder, and {above[0]} is a file")


def _runs(options: argparse.Namespace) -> list[tuple[str, float, Drift]]:
    """Each α's name, validation loss and drift; one model is in memory at a time."""
    how = {"trust_remote_code": options.trust_remote_code, "device": options.device}
    samples = text_samples(options, options.valid, options.base)[0].readable()
    probe = read_probe(options)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    base = load_model(options.base, **how)
    probe = make_probe(options, base, probe)
    runs, is_shown = [], is_first_rank() and not options.quiet
    with progress_bar(1 + len(options.alphas), "front", "models", shown=is_shown) as advance:
        meter = DriftMeter(base, probe, dtype=options.dtype, progress=False)
        del base
        gc.collect()
        advance(1)
        for alpha, model in models_of_front(options.base, options.tuned, options.alphas, **how):
            drift = meter(model)
            if alpha == 0:
                _check_start(options, drift, meter.reader.dtype)
            runs.append((_name(alpha), _loss(options, model, samples), drift))
            del model  # before the next one is loaded
            advance(1)
    return runs


def _check_start(options: argparse.Namespace, drift: Drift, dtype: torch.dtype) -> None:
    """Raise ValueError unless nothing of the fine-tuning is the base model."""
    if drift.kl > torch.finfo(dtype).eps:
        raise ValueError(
            f"without its changes to weights {options.tuned} is not {options.base}: its drift is "
            f"{drift.kl:.4g} nats a token at α = 0, so that averages of the weights tell nothing. "
            "Its config.json may differ (positions, scales), or its adapters are of a kind that "
            "changes the base: merge them (merge_and_unload()), save the model, and pass that"
        )


def _by_alpha(candidates: list[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: float(candidate.name))


def _name(alpha: float) -> str:
    """An α in words: as short as it is still the same number."""
    short = f"{alpha:g}"
    return short if float(short) == alpha else repr(alpha)


def _loss(options: argparse.Namespace, model: Any, samples: Any) -> float:
    """The loss of all target tokens of the validation data, nats a token.

    By "auto" it is computed in the model's own dtype, as the drift is: averages that lie close
    together are compared by it.
    """
    device = next(model.parameters()).device
    dtype = resolve_dtype(options.dtype, model, device, one_target=True)
    scorer = LossScorer(model, "causal_lm", dtype=dtype, progress=False, device=options.device)
    scores = scorer.score(samples, dataset_id="validation")
    has_target = scores.counts > 0
    losses, counts = scores.losses[has_target].double(), scores.counts[has_target]
    return float((losses * counts).sum() / counts.sum())


def _text(options: argparse.Namespace, candidates: list[Candidate]) -> str:
    best = candidates[0]
    rows = [
        f"{c.name:>5}  {c.validation:10.4f}  {c.drift.kl:9.4f}  {c.cost:9.4f}"
        + ("  ← chosen" if c is best else "  (can't be told apart)" if c.is_tied else "")
        for c in _by_alpha(candidates)
    ]
    probe = describe_probe(options, best.drift.samples)
    lines = [
        f"from {options.base} (0) to {options.tuned} (1); drift on {probe}",
        f"{'α':>5}  {'validation':>10}  {'drift':>9}  {'sum':>9}",
        *rows,
        f"chosen: α = {best.name}, the smallest validation loss + {options.exchange:g} · drift, "
        "in nats a token",
        f"picture: {options.picture}",
    ]
    if best.name in _ENDS:
        lines.append(
            f"that is {_ENDS[best.name]} as it is: no average has a smaller sum; another "
            "--exchange weighs drift otherwise"
        )
    if options.write is not None:
        lines.append(f"written: {options.write}")
    elif best.name != "1":  # α = 1 is the tuned model as it is
        lines.append("--write FOLDER writes the chosen weights")
    return "\n".join(lines)
