"""What lies between a layer's products on a CPU, each alone: python -m benchmarks passes

Norms, rotations, SwiGLU and the head's exponentials, in bfloat16, of as many tokens as a pack has
and with SmolLM2's sizes: as transformers, or the library, writes them; in fewer passes, where
PyTorch has such; and compiled. Their error is relative, against the same in float32. The last rows
give SwiGLU's whole module, products included, all tokens at once or slice by slice. The C library
keeps freed memory, as it does where a model runs: new pages can cost several times a norm.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from flowdata.head.tiled import odds_of_tile
from flowdata.head.tiles import ROWS_OF_A_CORE

TOKENS = 4096
WIDTH, HEADS, GROUPS, HIDDEN = 576, 9, 3, 1536
HEAD_WIDTH = WIDTH // HEADS
SLICE = 1024
WRITTEN, FEWER, COMPILED = "as written", "in fewer passes", "compiled"

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers for them, in malloc.h
Ways = dict[str, Callable[[], Any]]


def main(argv: Sequence[str]) -> None:
    """Measure every part, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks passes", description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args(argv)
    results = []
    keep_freed_memory()
    with torch.no_grad():
        for part in (norms, rotations, swiglu, exponentials, feed_forward):
            for row in compare(part, options.tokens, options.repeats):
                print(rows.line(row), flush=True)
                results.append(row)
    print(rows.write("passes", results, " ".join(["python -m benchmarks passes", *argv])))


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, where it is glibc."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**30)
        mallopt(_MMAP_THRESHOLD, 2**25)


def compare(
    part: Callable[[int, torch.dtype], Ways], tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to make a part: milliseconds, and its error."""
    exact = flat(next(iter(part(tokens, torch.float32).values()))())
    ways = part(tokens, torch.bfloat16)
    errors = {way: float((flat(run()) - exact).norm() / exact.norm()) for way, run in ways.items()}
    if max(errors.values()) > 0.05:
        raise SystemExit(f"a way is wrong: {part.__name__}, {errors}")
    seconds = rows.timed_in_turn(ways, repeats, warmup=1)
    for way, times in seconds.items():
        what = f"{part.__name__}: {way}"
        yield rows.row(what, [1e3 * each for each in times], "ms", error=errors[way])


def flat(result: Tensor | Sequence[Tensor]) -> Tensor:
    """All values of a result in float32, as one."""
    parts = [result] if isinstance(result, Tensor) else result
    return torch.cat([part.float().flatten() for part in parts])


def norms(tokens: int, dtype: torch.dtype) -> Ways:
    """A layer's root-mean-square norm."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    hidden = random(tokens, WIDTH).to(dtype)
    norm = LlamaRMSNorm(WIDTH).to(dtype)
    return {
        WRITTEN: partial(norm, hidden),
        FEWER: partial(F.rms_norm, hidden, (WIDTH,), norm.weight, norm.variance_epsilon),
        COMPILED: partial(torch.compile(norm.forward), hidden),
    }


def rotations(tokens: int, dtype: torch.dtype) -> Ways:
    """The rotation of a layer's queries and keys."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    queries_and_keys = [
        random(1, tokens, heads, HEAD_WIDTH).to(dtype).transpose(1, 2) for heads in (HEADS, GROUPS)
    ]
    angles = torch.outer(torch.arange(tokens), 10000 ** -torch.linspace(0, 1, HEAD_WIDTH // 2))
    tables = [
        table(torch.cat([angles, angles], 1)).to(dtype)[None] for table in (torch.cos, torch.sin)
    ]
    compiled = torch.compile(apply_rotary_pos_emb)
    return {
        WRITTEN: lambda: apply_rotary_pos_emb(*queries_and_keys, *tables),
        FEWER: lambda: [rotated(values, *tables) for values in queries_and_keys],
        COMPILED: lambda: compiled(*queries_and_keys, *tables),
    }


def rotated(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (1, H, T, d) values half by half, in place of a copy with its halves swapped."""
    output = values * cos[:, None]
    low, high = values.chunk(2, -1)
    half = values.shape[-1] // 2
    output[..., :half].addcmul_(high, sin[:, None, :, :half], value=-1)
    output[..., half:].addcmul_(low, sin[:, None, :, half:])
    return output


def swiglu(tokens: int, dtype: torch.dtype) -> Ways:
    """SwiGLU of the gate's and the up product; each way first gets a copy of the gate to spoil."""
    gate, up = (random(tokens, HIDDEN).to(dtype) for _ in range(2))
    fresh = torch.empty_like(gate)
    compiled = torch.compile(multiplied)
    return {
        WRITTEN: lambda: multiplied(fresh.copy_(gate), up),
        FEWER: lambda: F.silu(fresh.copy_(gate), inplace=True).mul_(up),
        COMPILED: lambda: compiled(fresh.copy_(gate), up),
    }


def multiplied(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU, as transformers writes it."""
    return F.silu(gate) * up


def exponentials(tokens: int, dtype: torch.dtype) -> Ways:
    """The sums of exponentials of one slice of the head's products, a quarter of the tokens."""
    products = (4 * random(tokens // 4, 2048)).bfloat16().to(dtype)
    targets = products.float().amax(1)
    step = ROWS_OF_A_CORE * torch.get_num_threads()  # the rows of an eager tile
    buffer = torch.empty(step * products.shape[1])
    tiles = list(zip(products.split(step), targets.split(step), strict=True))
    compiled = torch.compile(odds_of_tile)
    return {
        WRITTEN: lambda: [odds_of_tile(tile, buffer, None, 1.0, None, few) for tile, few in tiles],
        "in bfloat16": lambda: [
            tile.sub(few.to(dtype)[:, None]).exp_().sum(1, dtype=torch.float) for tile, few in tiles
        ],
        COMPILED: lambda: compiled(products, None, None, 1.0, None, targets),
    }


def feed_forward(tokens: int, dtype: torch.dtype) -> Ways:
    """A layer's whole feed-forward module, its three products included."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    module = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=HIDDEN)).to(dtype)
    hidden = random(1, tokens, WIDTH).to(dtype)
    compiled = torch.compile(module.forward, dynamic=True)
    return {
        WRITTEN: partial(module, hidden),
        COMPILED: partial(compiled, hidden),
        f"slices of {SLICE}": lambda: [module(part) for part in hidden.split(SLICE, 1)],
        f"slices of {SLICE}, compiled": lambda: [compiled(part) for part in hidden.split(SLICE, 1)],
    }


def random(*shape: int) -> Tensor:
    """Random values, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
