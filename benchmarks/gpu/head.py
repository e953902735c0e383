"""The head alone, and its Triton kernel in several shapes of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch

from benchmarks import head, rows
from benchmarks.gpu.parts import Row, Setting

# Vocabularies by widths: of a small Llama, of Llama 3 at 1 and 8 billion, of Gemma.
SIZES = ((2048, 128256), (4096, 128256), (2048, 256000), (1024, 32000))


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the losses' times against the product's, and those of other tiles."""
    sizes = ((64, 512),) if setting.is_tiny else SIZES
    count = 128 if setting.is_tiny else 8192
    for number, (width, vocabulary) in enumerate(sizes):
        if setting.seconds_left() < 0:
            yield {"what": f"{width} x {vocabulary}", "error": "not measured: no time left"}
            continue
        yield from head.measure(count, width, vocabulary, 5, setting.device)
        if number == 0:
            small = count // 8, width, vocabulary, 3, setting.device
            yield from head.measure(*small, torch.float32)
        if number == 0 and setting.device == "cuda" and find_spec("triton") is not None:
            yield from measure_tiles(head.draw_inputs(count, width, vocabulary, "cuda"))


def measure_tiles(inputs: head.Inputs) -> Iterator[Row]:
    """Yield the kernel's time for each shape of tile, losses only and with the columns' sums."""
    from flowdata.head import triton

    shapes = [
        triton.HOPPER,
        triton.HOPPER_COLUMNS,
        triton.BLACKWELL,
        triton.OTHERS,
        triton.Shape(128, 256, 64, 8, 4, descriptors=True),
        triton.Shape(128, 128, 64, 4, 3, descriptors=True),
        triton.Shape(256, 128, 64, 8, 3, descriptors=True),
    ]
    hidden, weight, targets = inputs
    flops = 2 * hidden.numel() * len(weight)
    expected = None
    for shape in shapes:
        for columns in (False, True):

            def run(shape: triton.Shape = shape, columns: bool = columns) -> torch.Tensor:
                sums = triton.partial_sums(
                    hidden, weight, None, targets, 1.0, None, columns=columns, shape=shape
                )
                torch.cuda.synchronize()
                return sums

            what = f"tiles of {'x'.join(map(str, shape))}{', all columns' if columns else ''}"
            try:
                top, total = run()[:2]
            except Exception as error:  # more than this chip has
                yield {"what": what, "error": f"{type(error).__name__}: {error}"[:300]}
                continue
            log_sums = (top + total.log()).logsumexp(0)
            expected = log_sums if expected is None else expected
            row = rows.row(what, [1000 * s for s in rows.timed(run)], "ms")
            row["tflops"] = flops / row["median"] / 1e9
            row["largest_error"] = (log_sums - expected).abs().max().item()
            yield row
