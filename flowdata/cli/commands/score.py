"""`flowdata score`: the losses of a causal language model's fine-tuning set, into a store.

`torchrun --nproc-per-node=4 -m flowdata score …` shares the work among processes.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from flowdata._common.notices import logger
from flowdata.cli.exit_codes import DONE
from flowdata.cli.options import add_dtype, add_temperature
from flowdata.cli.output import list_figures, print_result
from flowdata.cli.process_group import process_group
from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer
from flowdata.store.fingerprint import fingerprint_tokenizer
from flowdata.text.chats import Fields, find_fields
from flowdata.text.models import hide_progress, load_model, load_tokenizer, load_transformers
from flowdata.text.read import read_rows
from flowdata.text.tokens import TokenSamples, tokenize_rows
from flowdata.weights import check_temperature


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("model", help="hub id, folder, or GGUF file or folder")
    add("data", help="JSONL or Parquet file, saved data set, or hub id")
    add("--store", default="scores", help="folder for the losses (default: %(default)s)")
    add("--split", default="train", help="of a hub data set (default: %(default)s)")
    add("--limit", type=int, help="score the first rows only")
    add("--prompt-column", help="default: prompt, question, query or instruction")
    add("--completion-column", help="default: the completion that goes with it")
    add("--messages-column", help="column of chats (default: messages or conversations)")
    add(
        "--template",
        action=argparse.BooleanOptionalAction,
        help="put pairs through the chat template (default: if the tokenizer has one)",
    )
    add("--max-length", type=int, help="cut samples to so many tokens")
    add("--tokenizer", help="hub id or folder (default: the model's)")
    add_dtype(parser)
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
    add_temperature(parser, "for the summary")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(options: argparse.Namespace) -> int:
    """Score a causal language model's fine-tuning set into a store."""
    load_transformers()  # a missing one is told before the data is read, or fetched from the hub
    if options.quiet:
        hide_progress()
    with process_group() as device:
        check_temperature(options.temperature)  # now, not after hours of scoring
        samples, details = _token_samples(options)
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
        scores = scorer.score(
            samples,
            store=options.store,
            dataset_id=f"tokens:{samples.digest()}",
            lengths=samples.lengths,
            details=details,
        )
        if os.environ.get("RANK", "0") == "0":  # all ranks have all scores; one tells of them
            _print_scores(options, scores, scorer.explain(), samples.num_cut)
    return DONE


def _token_samples(options: argparse.Namespace) -> tuple[TokenSamples, dict[str, Any]]:
    """The samples to score, and how they were made: details that the store keeps."""
    rows = read_rows(options.data, split=options.split, limit=options.limit)
    fields = find_fields(
        rows[0],
        Fields(options.messages_column, options.prompt_column, options.completion_column),
    )
    tokenizer = load_tokenizer(
        options.tokenizer or options.model, trust_remote_code=options.trust_remote_code
    )
    template = options.template
    if template is None:
        template = tokenizer.chat_template is not None and fields.prompt is not None
    samples = tokenize_rows(
        rows, tokenizer, fields, template=template, max_length=options.max_length
    )
    if samples.num_cut:
        logger.warning(
            "%d of %d samples were longer than %d tokens and were cut",
            samples.num_cut,
            len(samples),
            options.max_length,
        )
    return samples, {
        "model": options.model,
        "data": {"source": options.data, "split": options.split, **vars(fields)},
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "chat_template": template or fields.messages is not None,
        "max_length": options.max_length,
        "num_cut": samples.num_cut,
    }


def _print_scores(
    options: argparse.Namespace, scores: Scores, explanation: str, num_cut: int
) -> None:
    figures = {"num_cut": num_cut, **scores.summary(temperature=options.temperature)}
    lines = [
        f"{len(scores):,} samples scored into {options.store} ({explanation})",
        list_figures(figures),
        f"next: flowdata report {options.store}",
    ]
    print_result(options, {"store": options.store, **figures}, "\n".join(lines))
