"""Attention and the products of a layer on a CPU, by several ways: python -m benchmarks attention

Attention in bfloat16 of samples of one length, about 4,096 tokens in all, with SmolLM2's heads:
PyTorch's kernel; the library's products; and products whose scores are rounded to bfloat16, which
the library does without. Their error is that of the output, relative, against the kernel in
float32; queries are six times as large as random ones, so that scores are as large as trained
models have them. And the products of one layer, each alone and joined into one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from flowdata.scoring.language.masks import Masks
from flowdata.scoring.language.products import attend_by_products

TOKENS = 4096
HEADS, GROUPS, WIDTH = 9, 3, 64
LENGTHS = (16, 32, 96, 176, 320, 1024, 4096)
LARGE = 6.0
KERNEL = "PyTorch's kernel"
# Outputs of the products of a layer of SmolLM2, each from 576 values.
JOINED = {"q, k and v": (576, 192, 192), "gate and up": (1536, 1536)}


def main(argv: Sequence[str]) -> None:
    """Measure every length, and the products, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(argv)
    results = []
    for length in options.lengths:
        results += list(attentions(length, options.repeats))
    results += list(products(options.repeats))
    print(rows.write("attention", results, " ".join(["python -m benchmarks attention", *argv])))


def attentions(length: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to attend: milliseconds, times the kernel's, and its error."""
    generator = torch.Generator().manual_seed(0)
    samples = TOKENS // length
    query, key, value = (
        torch.randn(samples, heads, length, WIDTH, generator=generator)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    inputs = [(LARGE * query).bfloat16(), key.bfloat16(), value.bfloat16()]
    exact = by_kernel(*(each.float() for each in inputs))
    ways = {KERNEL: by_kernel, "products": by_products, "products, rounded scores": by_rounded}
    runs = {name: lambda way=way: way(*inputs) for name, way in ways.items()}  # type: ignore[misc]
    errors = {
        name: float((run().float() - exact).norm() / exact.norm()) for name, run in runs.items()
    }
    if max(errors.values()) > 0.05:
        raise SystemExit(f"a way of attention is wrong: {errors}")
    seconds = rows.timed_in_turn(runs, repeats, warmup=1)
    kernel = statistics.median(seconds[KERNEL])
    for name, times in seconds.items():
        row = rows.row(f"{length} tokens x {samples}: {name}", [1e3 * s for s in times], "ms")
        row |= {"kernel_by_this": kernel / statistics.median(times), "error": errors[name]}
        print(rows.line(row), flush=True)
        yield row


def by_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by PyTorch's kernel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend as the library does where products gain."""
    output = torch.empty_like(query)
    attend_by_products(query, key, value, WIDTH**-0.5, None, Masks(), output)
    return output


def by_rounded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by products whose scores are bfloat16, a sample's rows at once."""
    samples, _, length, _ = query.shape
    rows_of_groups = query.reshape(samples * GROUPS, -1, WIDTH)
    keys, values = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    unseen = torch.full((length, length), -torch.inf, dtype=query.dtype).triu_(1)
    mask = unseen.repeat(HEADS // GROUPS, 1)
    shares = torch.baddbmm(mask, rows_of_groups, keys, alpha=WIDTH**-0.5).softmax(-1)
    return (shares @ values).view_as(query)


def products(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for the products of a layer that could be one: alone, and joined."""
    inputs = torch.randn(TOKENS, HEADS * WIDTH).bfloat16()
    for name, widths in JOINED.items():
        weights = [torch.randn(width, HEADS * WIDTH).bfloat16() for width in widths]
        runs = {"alone": partial(by_each, inputs, weights)}
        runs["joined"] = partial(by_each, inputs, [torch.cat(weights)])
        for way, times in rows.timed_in_turn(runs, repeats, warmup=1).items():
            row = rows.row(f"{name}, {way}", [1e3 * s for s in times], "ms")
            print(rows.line(row), flush=True)
            yield row


def by_each(inputs: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the product with each of some weights."""
    return [F.linear(inputs, weight) for weight in weights]
