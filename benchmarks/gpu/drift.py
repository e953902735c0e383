"""What measuring drift costs beside the steps of a training, and whether it is right there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks import drift
from benchmarks.gpu.parts import Row, Setting


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the seconds of a step and of a measurement, and its share of a hundred steps."""
    options = argparse.Namespace(
        tiny=setting.is_tiny,
        repeats=2 if setting.is_tiny else 5,
        layers=30,
        device=setting.device,
    )
    for name in drift.TASKS:
        if setting.seconds_left() < 0:
            yield {"what": name, "error": "not measured: no time left"}
        else:
            yield from drift.measure(name, options)
