"""The head's losses against its matrix product alone: python -m benchmarks head [--widths 576].

The floor is the product of hidden states and vocabulary alone, in the tiles that the head uses, all
written into one buffer. A peer that is not installed, or does not run on this device, is left out
with a line that says so: cut-cross-entropy needs Triton, on a CPU as well, and Liger needs a GPU.
Losses are compared with float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from flowdata.head.output_layer import Head
from flowdata.head.tiled import target_values
from flowdata.head.tiles import tile_size
from flowdata.targets.columns import COLUMNS

Inputs = tuple[Tensor, Tensor, Tensor]  # hidden states, weight, targets
Peer = Callable[[Tensor, Tensor, Tensor], Tensor]
FLOOR = "the matrix product alone"


def main(argv: list[str]) -> None:
    """Measure every way for every width and vocabulary, in turn, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="target positions")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2048])
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[32000, 49152, 128256, 256000]
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    results = []
    for width, vocabulary in itertools.product(options.widths, options.vocabularies):
        for row in measure(options.rows, width, vocabulary, options.repeats, options.device):
            print(rows.line(row), flush=True)
            results.append(row)
    print(rows.write("head", results, " ".join(["python -m benchmarks head", *argv])))


def measure(
    count: int,
    width: int,
    vocabulary: int,
    repeats: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each way at one size: milliseconds, ratio to the floor, error, memory."""
    inputs = draw_inputs(count, width, vocabulary, device, dtype)
    ways = {name: way for name, way in peers(device).items() if runs(name, way, inputs)}
    errors = errors_of(ways, inputs)
    ways[FLOOR] = floor
    calls = {name: partial(synced, way, *inputs) for name, way in ways.items()}
    seconds = rows.timed_in_turn(calls, repeats, warmup=1)
    floor_ms = 1000 * rows.row("", seconds[FLOOR], "s")["median"]
    for name in ways:
        row = rows.row(
            f"{name}, {count} x {width} x {vocabulary}",
            [1000 * second for second in seconds[name]],
            "ms",
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            memory_mib=rows.peak_memory(calls[name], device),
        )
        row["ratio_to_floor"] = row["median"] / floor_ms
        if name in errors:
            row["largest_error"] = errors[name].max().item()
            row["mean_error"] = errors[name].mean().item()
        yield row


def draw_inputs(
    count: int, width: int, vocabulary: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Inputs:
    """Draw hidden states, weight and targets; the logits have a standard deviation of 1."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(count, width, **options).to(dtype)
    weight = (torch.randn(vocabulary, width, **options) / width**0.5).to(dtype)
    return hidden, weight, torch.randint(0, vocabulary, (count,), **options)


def errors_of(ways: Mapping[str, Peer], inputs: Inputs) -> dict[str, Tensor]:
    """Return how far each way's losses lie from the exact ones; exit if one's lie too far."""
    exact = torch.cat([exact_losses(*part) for part in parts(*inputs)])
    errors = {name: (way(*inputs) - exact).abs() for name, way in ways.items()}
    for name, error in errors.items():
        if error.max() > 0.1:
            raise SystemExit(f"{name} gives other losses, by up to {error.max():.2g}")
    return errors


def peers(device: str) -> dict[str, Peer]:
    """Return the ways to a loss for every row, by name."""
    ways: dict[str, Peer] = {
        "flowdata, eager": lambda h, w, t: target_values(h, Head(w), t)[0],
        "flowdata, compiled": lambda h, w, t: target_values(h, Head(w, kernel="compiled"), t)[0],
        "flowdata, compiled, all columns": lambda h, w, t: target_values(
            h, Head(w, kernel="compiled"), t, COLUMNS
        )[0],
        "flowdata, Triton": lambda h, w, t: target_values(h, Head(w, kernel="triton"), t)[0],
        "full logits, float32 cross-entropy": lambda h, w, t: F.cross_entropy(
            (h @ w.t()).float(), t, reduction="none"
        ),
        "cut-cross-entropy": cut_cross_entropy,
        "Liger": liger,
    }
    if device == "cpu":
        del ways["flowdata, Triton"]
    return ways


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the losses by cut-cross-entropy: by its kernel on a GPU, else compiled."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if hidden.is_cuda else "torch_compile"
    return linear_cross_entropy(hidden, weight, targets, reduction="none", impl=implementation)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the losses by Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def runs(name: str, way: Peer, inputs: Inputs) -> bool:
    """Return whether a way runs on such inputs; where it does not, say why."""
    hidden, weight, targets = inputs
    try:
        way(hidden[:4], weight[:512], targets[:4].clamp_max(511))
    except Exception as error:
        print(f"{name} is left out: {type(error).__name__}: {error}".splitlines()[0])
        return False
    return True


def floor(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Write all products into one buffer, tile by tile, and do nothing else."""
    tile_rows, tile_classes = tile_size(hidden)
    buffer = hidden.new_empty(min(tile_rows, len(hidden)) * tile_classes)
    for rows_ in hidden.split(tile_rows):
        for classes in weight.split(tile_classes):
            out = buffer[: len(rows_) * len(classes)].view(len(rows_), len(classes))
            torch.mm(rows_, classes.t(), out=out)
    return buffer


def synced(way: Peer, *tensors: Tensor) -> None:
    """Run a way until the device has finished."""
    way(*tensors)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()


def parts(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the inputs a few rows at a time, as float64 takes twice the memory."""
    return [(h, weight, t) for h, t in zip(hidden.split(256), targets.split(256), strict=True)]


def exact_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropies of float32 products, summed up in float64."""
    logits = (hidden.float() @ weight.float().t()).double()
    return F.cross_entropy(logits, targets, reduction="none")
