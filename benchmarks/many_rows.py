"""Millions of rows through `flowdata score`: python -m benchmarks many_rows [--rows N]

Short rows are written to a file of JSON lines, and the command itself scores them by a tiny random
model, streaming: a process of its own for a tenth of the rows, and one for all. What the memory of
the one is above that of the other, a row, is the memory that grows with the data. Linux tells it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.rows import line, row, timed, write
from flowdata import Scores

_DIGITS = "0123456789abcdef"
_SPECIAL = ("<pad>", "<end>")
_LOOK_EVERY = 0.05  # seconds, at a process's memory


class Cost(NamedTuple):
    """What a process took.

    Attributes:
        wall: seconds.
        cpu: seconds of all its cores.
        own: MiB of memory of its own at the peak, which the system can't take back.
        peak: MiB at the peak with the files that it has mapped, which the system can take back.
    """

    wall: float
    cpu: float
    own: float
    peak: float


def make_model(folder: Path) -> None:
    """Write a tiny random Llama, and a tokenizer with a token for each hexadecimal digit."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*_SPECIAL, *_DIGITS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(file: Path, count: int) -> None:
    """Write rows of eight tokens and an end, no two of them alike, one after another."""
    with file.open("w") as lines:
        for number in range(count):
            # A bijection of the numbers below 2^24, so that neighbours are not alike.
            scattered = number * 0x9E3779 & 0xFFFFFF
            completion = f"{number * 7 & 0xFF:02x}"
            lines.write(json.dumps({"prompt": f"{scattered:06x}", "completion": completion}) + "\n")


def run_score(model: Path, data: Path, store: Path, count: int) -> Cost:
    """Score the first rows by the command, in a process of its own."""
    command = [sys.executable, "-m", "flowdata", "score", str(model), str(data), "--streaming"]
    command += ["--limit", str(count), "--store", str(store), "--json"]
    start, own, ended = time.perf_counter(), 0.0, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not ended:
            own = max(own, _own_memory(process.pid))
            time.sleep(_LOOK_EVERY)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)  # of this process alone
        process.returncode = os.waitstatus_to_exitcode(status)
        facts: dict[str, Any] = json.loads(process.stdout.read() or "{}")
    wall = time.perf_counter() - start
    if process.returncode or facts["samples"] != count:
        sys.exit(f"flowdata score ended with {process.returncode} and {facts}: nothing reported")
    return Cost(wall, usage.ru_utime + usage.ru_stime, own, usage.ru_maxrss / 2**10)


def _own_memory(process: int) -> float:
    """The MiB that a process holds beside the files that it has mapped, 0 where it has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    fields = dict(each.split(":", 1) for each in status.splitlines())
    return int(fields.get("RssAnon", "0").split()[0]) / 2**10


def measure(count: int) -> list[dict[str, Any]]:
    """Return the rows of a tenth of the rows and of all."""
    results: list[dict[str, Any]] = []

    def add(what: str, values: list[float], unit: str, **more: float) -> None:
        results.append(row(what, values, unit, **more))
        print(line(results[-1]), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = folder / "model", folder / "rows.jsonl"
        make_model(model)
        write_rows(data, count)
        costs = {}
        for part in (count // 10, count):
            store = folder / f"scores of {part}"
            costs[part] = cost = run_score(model, data, store, part)
            add(f"scoring {part:,} rows", [cost.wall], "s", us_each=cost.wall / part * 1e6)
            add(f"its CPU time, {part:,} rows", [cost.cpu], "s", us_each=cost.cpu / part * 1e6)
            add(f"its memory, {part:,} rows", [cost.own], "MiB", with_mapped_files=cost.peak)
        growth = (costs[count].own - costs[count // 10].own) * 2**20 / (count - count // 10)
        add("memory that grows with the rows", [growth], "bytes/row")
        size = sum(file.stat().st_size for file in store.iterdir())
        add(f"store, {count:,} rows", [size / count], "bytes/row", MiB=size / 2**20)
        seconds = timed(lambda: Scores.load(store).weights(), repeats=3)
        add(f"load and weights, {count:,} rows", seconds, "s")
    return results


def main(argv: Sequence[str]) -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks many_rows", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="from 10 up to 2^24")
    options = parser.parse_args(argv)
    if not 10 <= options.rows <= 2**24:
        parser.error(f"--rows must be from 10 to {2**24:,}, got {options.rows:,}")
    command = f"python -m benchmarks many_rows --rows {options.rows}"
    print(write("many_rows", measure(options.rows), command))
