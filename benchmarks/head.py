"""The head's losses against its matrix product alone: python -m benchmarks head [--widths 576].

The floor is the product of hidden states and vocabulary, tile by tile into a given buffer, in
the tiles that the head uses. Peers that are not installed, or don't run on this device, are named
and left out: cut-cross-entropy runs on a CPU where Triton is installed, Liger needs a GPU. Losses
are compared with float64 before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from flowdata.head.output_layer import Head
from flowdata.head.tiled import target_values, tile_size
from flowdata.targets.columns import COLUMNS

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    results = [
        row
        for width in options.widths
        for vocabulary in options.vocabularies
        for row in measure(options.rows, width, vocabulary, options.repeats, options.device)
    ]
    print(rows.write("head", results, " ".join(["python -m benchmarks head", *argv])))


def measure(
    count: int, width: int, vocabulary: int, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Rows of one width and vocabulary: milliseconds, ratio to the floor, error, memory."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator).bfloat16().to(device)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).bfloat16()
    weight, targets = weight.to(device), torch.randint(0, vocabulary, (count,)).to(device)
    exact = torch.cat([exact_losses(*part) for part in parts(hidden, weight, targets)])
    ways = {name: way for name, way in peers(device).items() if runs(name, way, device)}
    errors = {n: (way(hidden, weight, targets) - exact).abs() for n, way in ways.items()}
    for name, error in errors.items():
        if error.max() > 0.1:
            raise SystemExit(f"{name} gives other losses, by up to {error.max():.2g}")
    ways["the matrix product alone"] = floor
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # in turn, so that a slow moment slows them alike
        for name, way in ways.items():
            times = rows.timed(lambda way=way: synced(way, hidden, weight, targets), 1, warmup=0)
            seconds[name] += times if turn else []
    results = []
    least = rows.row("", seconds["the matrix product alone"], "s")["median"]
    for name, way in ways.items():
        row = rows.row(
            f"{name}, {count} x {width} x {vocabulary}",
            [1000 * second for second in seconds[name]],
            "ms",
            dtype="bfloat16",
            device=device,
            memory_mib=rows.peak_memory(lambda way=way: way(hidden, weight, targets)),
        )
        row["ratio_to_floor"] = row["median"] / (1000 * least)
        if name in errors:
            row["largest_error"], row["mean_error"] = (
                errors[name].max().item(),
                errors[name].mean().item(),
            )
        results.append(row)
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:7.0f} MiB"
        print(
            f"{row['what']:58}{row['median']:8.1f} ms {row['ratio_to_floor']:6.2f}x{memory}  "
            f"error {row.get('largest_error', 0):.0e}",
            flush=True,
        )
    return results


def peers(device: str) -> dict[str, Peer]:
    """The ways to a loss for every row, by name."""
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
    """Its kernel on a GPU, its compiled version elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if hidden.is_cuda else "torch_compile"
    return linear_cross_entropy(hidden, weight, targets, reduction="none", impl=implementation)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Its fused linear cross-entropy, losses of rows."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def runs(name: str, way: Peer, device: str) -> bool:
    """Whether a way runs here; says why where it doesn't."""
    few = torch.randn(4, 64, device=device).bfloat16(), torch.randn(512, 64, device=device)
    try:
        way(few[0], few[1].bfloat16(), torch.zeros(4, dtype=torch.long, device=device))
    except Exception as error:
        print(f"{name} is left out: {type(error).__name__}: {error}".splitlines()[0])
        return False
    return True


def floor(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Products into one buffer, and nothing else."""
    tile_rows, tile_columns = tile_size(hidden)
    buffer = hidden.new_empty(min(tile_rows, len(hidden)) * tile_columns)
    for rows_ in hidden.split(tile_rows):
        for columns in weight.split(tile_columns):
            out = buffer[: len(rows_) * len(columns)].view(len(rows_), len(columns))
            torch.mm(rows_, columns.t(), out=out)
    return buffer


def synced(way: Peer, *tensors: Tensor) -> None:
    """Run a way to its end."""
    way(*tensors)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()


def parts(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A few rows at a time, for float64."""
    return [(h, weight, t) for h, t in zip(hidden.split(256), targets.split(256), strict=True)]


def exact_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies over float32 products, summed up in float64."""
    logits = (hidden.float() @ weight.float().t()).double()
    return F.cross_entropy(logits, targets, reduction="none")
