"""The training texts of the studies of language: GSM8K's problems, code and prose.

A row is a mapping with ``question`` and ``answer``.
"""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forgetting import harness

PIECE, HELD_OUT_PIECE = 600, 1500  # characters of a piece of code or prose
NOISY_EVERY = 3  # of the noisy rows


def mixed(problems: list[Any], rows: int, seed: int) -> list[dict[str, str]]:
    """Return a third each of problems, code and prose, shuffled."""
    random = np.random.default_rng(seed)
    share = -(-rows // 3)
    code = _continuations("Continue this Python code:", _cut(code_files(held_out=False), PIECE))
    prose = _continuations("Continue this text:", _cut(pydoc_data.topics.topics.values(), PIECE))
    parts = [problems[:share]]
    for kind in (code, prose):
        parts.append([kind[index] for index in random.permutation(len(kind))[:share]])
    mixture = [dict(row) for part in parts for row in part]
    return [mixture[index] for index in random.permutation(len(mixture))]


def short(problems: Any) -> list[dict[str, str]]:
    """Return the problems with their final number as the whole answer."""
    return [dict(row) | {"answer": row["answer"].split("####")[-1].strip()} for row in problems]


def noisy(problems: list[Any], seed: int) -> list[dict[str, str]]:
    """Return the problems with the words of every third answer in random order."""
    random = np.random.default_rng(seed)
    rows = [dict(row) for row in problems]
    for row in rows[::NOISY_EVERY]:
        row["answer"] = " ".join(random.permutation(row["answer"].split()))
    return rows


def code_files(*, held_out: bool) -> Iterator[str]:
    """Yield the standard library's modules, of which every other one is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for file in files[int(held_out) :: 2]:
        yield file.read_text(encoding="utf-8")


def held_out_code(count: int) -> list[str]:
    """Return pieces of code that are in no training set."""
    return _cut(code_files(held_out=True), HELD_OUT_PIECE)[:count]


def articles(wikitext: str, count: int) -> list[str]:
    """Return the beginnings of WikiText's first articles."""
    pages = [page["text"] for page in harness.articles(wikitext)]
    return _cut(pages, HELD_OUT_PIECE)[:count]


def whole(wikitext: str) -> list[str]:
    """Return all of WikiText's articles in pieces, an article's last one as long as it is."""
    pages = [page["text"] for page in harness.articles(wikitext)]
    starts = ((page, range(0, len(page), HELD_OUT_PIECE)) for page in pages)
    return [page[i : i + HELD_OUT_PIECE] for page, places in starts for i in places]


def _cut(texts: Iterable[str], size: int) -> list[str]:
    """Pieces of exactly `size` characters: the first one of each text, then all second ones, …."""
    pieces = [[t[i : i + size] for i in range(0, len(t) - size + 1, size)] for t in texts]
    longest = max(map(len, pieces))
    return [part[row] for row in range(longest) for part in pieces if row < len(part)]


def _continuations(request: str, pieces: list[str]) -> list[dict[str, str]]:
    """Rows whose question is a piece's first half and whose answer is its second half."""
    halves = [(piece[: len(piece) // 2], piece[len(piece) // 2 :]) for piece in pieces]
    return [{"question": f"{request}\n\n{first}", "answer": second} for first, second in halves]
