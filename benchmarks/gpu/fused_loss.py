"""The training loss from hidden states, with its gradients: time and memory of each way."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.gpu.parts import Row, Setting
from benchmarks.training import head_loss


def measure(setting: Setting) -> Iterator[Row]:
    """Yield time and peak memory of one batch's loss at several vocabularies."""
    options = argparse.Namespace(
        tokens=64 if setting.is_tiny else 8192,
        width=64 if setting.is_tiny else 2048,
        dtype="float32" if setting.is_tiny else "bfloat16",
        device=setting.device,
        steps=20,
    )
    for size in (512,) if setting.is_tiny else (32000, 128256, 256000):
        if setting.seconds_left() < 0:
            yield {"what": f"vocabulary {size}", "error": "not measured: no time left"}
            continue
        losses = head_loss.losses_on(setting.device)
        head_loss.check_equal(64, 512, setting.device, losses)
        for loss in losses:
            yield from head_loss.measure(loss, size, options)
