"""The command line: flowdata demo | score | report | verify | bench.

`torchrun --nproc-per-node=4 -m flowdata score …` shares the work among processes.

Exit codes: 0 done; 1 `verify` found damage or an unfinished store; 2 bad input, nothing lost;
130 interrupted or 143 terminated, what was scored is kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flowdata
from flowdata.scoring.ranks import RankError, of_this_attempt

MISTAKES = (ValueError, TypeError, OSError, ImportError, RankError)
_TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        with _logging_to_stderr(), _terminable():
            code: int = options.run(options)
    except MISTAKES as error:
        print(f"flowdata {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flowdata {options.command}: interrupted", file=sys.stderr)
        return 130
    return code


def demo(options: argparse.Namespace) -> int:
    """Standard fine-tuning against FLOW on a small real task."""
    from flowdata.cli.demo import run_demo

    result = run_demo(options.output, seeds=options.seeds, progress=not options.quiet)
    _tell(options, result.as_dict(), str(result))
    return 0


def score(options: argparse.Namespace) -> int:
    """Score a causal language model's fine-tuning set into a store."""
    with _process_group() as device:
        options.device = options.device or device
        return _score(options)


def _score(options: argparse.Namespace) -> int:
    from flowdata.store.fingerprint import fingerprint_tokenizer
    from flowdata.text.read import hide_progress, load_model, load_tokenizer, read_rows
    from flowdata.text.tokens import Columns, find_columns, tokenize_rows
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
        logging.getLogger("flowdata").warning(
            "%d of %d samples were longer than %d tokens and were cut",
            samples.num_cut,
            len(samples),
            options.max_length,
        )
    scorer = flowdata.LossScorer(
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

    scores = flowdata.Scores.load(options.store)
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
    from flowdata.store.folder import verify_store

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowdata", description="Fine-tuning without forgetting, in the data layer."
    )
    parser.add_argument("--version", action="version", version=flowdata.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        doc = (run.__doc__ or "").splitlines()[0]
        added = commands.add_parser(run.__name__, help=doc, description=doc)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print one JSON object")
        added.add_argument("--quiet", action="store_true", help="no progress display")
        return added

    add = command(demo).add_argument
    add("--output", default="flowdata-demo.png", help="the picture (default: %(default)s)")
    add("--seeds", type=int, default=5, help="repetitions (default: %(default)s)")

    add = command(score).add_argument
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
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
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
    add("--temperature", type=_temperature, default="median", help="for the summary")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")

    add = command(report).add_argument
    add("store", help="folder with finished scores")
    add("--output", help="folder for the report (default: STORE/report)")
    add("--temperature", type=_temperature, default="median", help="number or rule")
    add("--top", type=int, default=10, help="easiest and hardest samples shown")

    command(verify).add_argument("store", help="folder to check")

    add = command(bench).add_argument
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--device", help="default: a GPU if there is one")
    add("--samples", type=int, default=64, help="random samples (default: %(default)s)")
    return parser


@contextmanager
def _process_group() -> Iterator[str | None]:
    """Join the process group that torchrun began, if it did; gives this rank's device."""
    if not os.environ.keys() >= _TORCHRUN:
        yield None
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    device = None
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl",
        store=of_this_attempt(store),
        rank=rank,
        world_size=size,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the program as an error would, so that what is done is kept."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("flowdata"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _temperature(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _summary(scores: flowdata.Scores, options: argparse.Namespace) -> dict[str, Any]:
    return scores.summary(temperature=options.temperature)


def _figures(summary: dict[str, Any]) -> str:
    plain = {k: v for k, v in summary.items() if not isinstance(v, dict | list) and k != "store"}
    return "\n".join(
        f"  {name.replace('_', ' ')}: {f'{value:,.4g}' if isinstance(value, float) else value}"
        for name, value in plain.items()
    )


def _sample_texts(scores: flowdata.Scores) -> Callable[[int], str] | None:
    """The text of a sample, if the store says where the data is and it is still there."""
    from flowdata.text.read import read_rows

    data = scores.metadata.get("details", {}).get("data")
    if not isinstance(data, dict):
        return None
    try:
        rows = read_rows(data["source"], split=data["split"], limit=len(scores))
    except MISTAKES as error:
        logging.getLogger("flowdata").warning("samples are shown without their text: %s", error)
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
