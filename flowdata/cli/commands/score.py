"""`flowdata score`: the losses of a causal language model's fine-tuning set, into a store.

`torchrun --nproc-per-node=4 -m flowdata score …` shares the work among processes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from flowdata._common.notices import is_first_rank, say
from flowdata.cli.begin import begin
from flowdata.cli.cached import LOADED, cached_scores, loaded_with
from flowdata.cli.exit_codes import DONE
from flowdata.cli.growing import remove_store, score_growing
from flowdata.cli.options import FAST_DTYPE, add_dtype, add_temperature
from flowdata.cli.output import list_figures, print_result
from flowdata.cli.process_group import process_group
from flowdata.cli.refusal import explained_refusal
from flowdata.cli.text_samples import add_text_options, cuts_of, preview_text, text_samples
from flowdata.report.markdown import count
from flowdata.scores import Scores
from flowdata.scoring.arguments import check_counts
from flowdata.scoring.scorer import LossScorer
from flowdata.store.folder import SCORES, update_details
from flowdata.store.format import write_file
from flowdata.store.places import place_of
from flowdata.targets.columns import check_columns
from flowdata.text.joining import REPLIES, check_can_join, join_replies
from flowdata.text.models import load_model
from flowdata.text.tokens import TokenSamples
from flowdata.weights import check_temperature

_PREVIEW_ROWS = 1024  # checked by a preview: what the first row lacks, a later one may have


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("model", help="hub id, folder, or GGUF file or folder")
    add("data", help="file, folder or pattern of files, saved data set, or hub id")
    add("--store", default="scores", help="folder or URL for the losses (default: %(default)s)")
    add("--overwrite", action="store_true", help="remove the losses that the folder keeps, first")
    add(
        "--preview",
        action="store_true",
        help="print what is recognised in the data, and stop",
    )
    add_text_options(parser)
    add_dtype(parser, FAST_DTYPE)
    add("--device", help="default: where the model loads")
    add("--max-tokens", type=int, help="tokens in one pack")
    add("--token-losses", action="store_true", help="keep every target's loss too")
    add(
        "--columns",
        nargs="+",
        default=(),
        metavar="NAME",
        help="keep of every sample too: entropy, correct, gradient_norm",
    )
    add_temperature(parser, "of the summary")


def run(options: argparse.Namespace) -> int:
    """Score a causal language model's fine-tuning set into a store."""
    begin(options, options.model)
    with process_group() as device:
        _check_options(options)
        if options.preview:
            _print_preview(options)
            return DONE
        samples, details = text_samples(options, options.data, options.model)
        _say_size(options, samples)
        if (loaded := loaded_with(options)) is not None:
            details[LOADED] = loaded
        scores, remark = _scores(options, samples, details, device)
        if is_first_rank():  # all ranks have all scores; one tells of them
            if samples.is_split:
                scores = join_replies(scores, samples.rows)
                write_file(place_of(options.store) / SCORES, scores.to_tensors(), scores.manifest())
            # Losses that were there may be of another file with the same rows.
            update_details(place_of(options.store), details)
            _print_scores(options, scores, remark, cuts_of(samples))
    return DONE


def _check_options(options: argparse.Namespace) -> None:
    """Refuse now what would be refused after the data is read, or after hours of scoring."""
    check_counts(max_tokens=options.max_tokens)
    check_columns(options.columns, "causal_lm")
    check_temperature(options.temperature)


def _scores(
    options: argparse.Namespace, samples: TokenSamples, details: dict[str, Any], device: str | None
) -> tuple[Scores, str]:
    """The samples' scores, and what to say of a run that made none."""
    store = place_of(options.store)
    if options.overwrite:
        remove_store(store)
        remove_store(store / REPLIES)
    check_can_join(samples, options.columns, store)
    folder = store / REPLIES if samples.is_split else store
    cached = cached_scores(samples, folder, details.get(LOADED), shown=not options.quiet)
    if cached is not None:
        return cached, " (all were there)"
    scorer = LossScorer(
        load_model(options.model, trust_remote_code=options.trust_remote_code),
        "causal_lm",
        dtype=options.dtype,
        device=options.device or device,
        max_tokens=options.max_tokens,
        token_losses=options.token_losses,
        columns=options.columns,
        progress=not options.quiet,
    )
    with explained_refusal(folder, details):
        scores = score_growing(scorer, samples, folder, on_error=options.on_error, details=details)
    return scores, ""  # how, the run has said


def _say_size(options: argparse.Namespace, samples: TokenSamples) -> None:
    """Say how much data there is; how long it takes is told once the first packs are run."""
    say(
        f"in all: samples {len(samples):,}, tokens {len(samples.input_ids):,}, "
        f"targets {samples.num_targets:,}",
        shown=is_first_rank() and not options.quiet,
    )


def _print_preview(options: argparse.Namespace) -> None:
    """Print what is recognised; the first rows are checked."""
    options.limit = _PREVIEW_ROWS if options.limit is None else min(options.limit, _PREVIEW_ROWS)
    options.streaming = True
    recognised, num_rows = preview_text(options, options.data, options.model)
    options.quiet = False  # a preview is asked for to be read
    checked = f"checked: the first {num_rows:,} rows" if num_rows > 1 else "checked: the first row"
    facts = {**asdict(recognised), "checked_rows": num_rows}
    print_result(options, facts, f"{recognised.text(whole=True)}\n{checked}")


def _print_scores(
    options: argparse.Namespace, scores: Scores, remark: str, cuts: dict[str, int]
) -> None:
    summary = scores.summary(temperature=options.temperature)
    samples, missing = count(len(scores), "sample"), summary["missing"]
    scored = f"{len(scores) - missing:,} of {samples}" if missing else samples
    lines = [
        f"{scored} scored into {options.store}{remark}",
        list_figures(summary),  # of samples that were cut, a warning tells
        f"next: flowdata report {options.store}",
    ]
    print_result(options, {"store": options.store, **cuts, **summary}, "\n".join(lines))
