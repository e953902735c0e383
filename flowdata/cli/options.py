"""The options of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from flowdata._version import __version__
from flowdata.cli.commands import bench, demo, report, score, verify


def parser() -> argparse.ArgumentParser:
    """Return the parser; `options.run` of what it parses is the command."""
    parser = argparse.ArgumentParser(
        prog="flowdata", description="Fine-tuning without forgetting, in the data layer."
    )
    parser.add_argument("--version", action="version", version=__version__)
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


def _temperature(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
