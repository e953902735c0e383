"""The command line: flowdata demo | score | report | verify | bench.

`torchrun --nproc-per-node=4 -m flowdata score …` shares the work among processes.

Exit codes: 0 done; 1 `verify` found damage or an unfinished store; 2 bad input, nothing lost;
130 interrupted or 143 terminated, what was scored is kept.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowdata._common.notices import logger
from flowdata.cli.process_group import process_group
from flowdata.errors import RankError
from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer

MISTAKES = (ValueError, TypeError, OSError, ImportError, RankError)  # a user's, told in one line


def demo(options: argparse.Namespace) -> int:
    """Standard fine-tuning against FLOW on a small real task."""
    from flowdata.cli.demo import run_demo

    result = run_demo(options.output, seeds=options.seeds, progress=not options.quiet)
    _tell(options, result.as_dict(), str(result))
    return 0


def score(options: argparse.Namespace) -> int:
    """Score a causal language model's fine-tuning set into a store."""
    with process_group() as device:
        options.device = options.device or device
        return _score(options)


def _score(options: argparse.Namespace) -> int:
    from flowdata.store.fingerprint import fingerprint_tokenizer
    from flowdata.text.chats import Columns, find_columns
    from flowdata.text.models import hide_progress, load_model, load_tokenizer
    from flowdata.text.read import read_rows
    from flowdata.text.tokens import tokenize_rows
    from flowdata.weights import check_temperature

    if options.quiet:
        hide_progress()
    check_temperature(options.temperature)  # now, not after hours of scoring
    rows = read_rows(options.data, split=options.split, limit=options.limit)
    wanted = Columns(options.messages_column, options.prompt_column, options.completion_column)
    columns = find_columns(rows[0], wanted)
    remote = options.trust_remote_code
    tokenizer = load_tokenizer(options.tokenizer or options.model, trust_remote_code=remote)
    template = tokenizer.chat_template is not None and columns.prompt is not None
    if options.template is not None:
        template = options.template
    samples = tokenize_rows(
        rows, tokenizer, columns, template=template, max_length=options.max_length
    )
    if samples.num_cut:
        logger.warning(
            "%d of %d samples were longer than %d tokens and were cut",
            samples.num_cut,
            len(samples),
            options.max_length,
        )
    scorer = LossScorer(
        load_model(options.model, trust_remote_code=remote),
        "causal_lm",
        dtype=options.dtype,
        device=options.device,
        max_tokens=options.max_tokens,
        token_losses=options.token_losses,
        columns=options.columns,
        progress=not options.quiet,
    )
    details = {
        "model": options.model,
        "data": {"source": options.data, "split": options.split, **vars(columns)},
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "chat_template": template or columns.messages is not None,
        "max_length": options.max_length,
        "num_cut": samples.num_cut,
    }
    scores = scorer.score(
        samples,
        store=options.store,
        dataset_id=f"tokens:{samples.digest()}",
        lengths=samples.lengths,
        details=details,
    )
    if os.environ.get("RANK", "0") != "0":
        return 0
    summary = {"store": options.store, "num_cut": samples.num_cut, **_summary(scores, options)}
    told = [
        f"{len(scores):,} samples scored into {options.store} ({scorer.explain()})",
        _figures(summary),
        f"next: flowdata report {options.store}",
    ]
    _tell(options, summary, "\n".join(told))
    return 0


def report(options: argparse.Namespace) -> int:
    """Write a store's report: summary, histogram, easiest and hardest samples."""
    from flowdata.report.write import write_report

    scores = Scores.load(options.store)
    folder = Path(options.output or Path(options.store) / "report")
    written = write_report(
        scores,
        folder,
        temperature=options.temperature,
        samples=_sample_texts(scores),
        top=options.top,
    )
    summary = _summary(scores, options)
    _tell(
        options,
        {**summary, "page": str(written.page), "picture": str(written.picture)},
        f"{_figures(summary)}\n{written.page}\n{written.picture}",
    )
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check every file of a store."""
    from flowdata.store.verify import verify_store

    findings = verify_store(Path(options.store))
    whole = all(state == "whole" for state in findings.values())
    lines = [f"{name}: {state}" for name, state in findings.items()]
    _tell(options, {"whole": whole, "files": findings}, "\n".join(lines))
    return 0 if whole else 1


def bench(options: argparse.Namespace) -> int:
    """Measure scoring on this machine against the usual loop."""
    from flowdata.cli.bench import run_bench

    measured = run_bench(dtype=options.dtype, device=options.device, samples=options.samples)
    _tell(options, measured.as_dict(), str(measured))
    return 0


def _summary(scores: Scores, options: argparse.Namespace) -> dict[str, Any]:
    return scores.summary(temperature=options.temperature)


def _figures(summary: dict[str, Any]) -> str:
    plain = {k: v for k, v in summary.items() if not isinstance(v, dict | list) and k != "store"}
    return "\n".join(
        f"  {name.replace('_', ' ')}: {f'{value:,.4g}' if isinstance(value, float) else value}"
        for name, value in plain.items()
    )


def _sample_texts(scores: Scores) -> Callable[[int], str] | None:
    """The text of a sample, if the store says where the data is and it is still there."""
    from flowdata.text.read import read_rows

    data = scores.metadata.get("details", {}).get("data")
    if not isinstance(data, dict):
        return None
    try:
        rows = read_rows(data["source"], split=data["split"], limit=len(scores))
    except MISTAKES as error:
        logger.warning("samples are shown without their text: %s", error)
        return None
    names = [data[name] for name in ("messages", "prompt", "completion") if data.get(name)]

    def text(index: int) -> str:
        return "\n".join(
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in (rows[index][name] for name in names)
        )

    return text


def _tell(options: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    print(json.dumps(facts) if options.json else text)
