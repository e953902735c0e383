"""A weighted training step against an unweighted one, in a plain loop and in Trainer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec

from benchmarks.gpu.parts import Row, Setting
from benchmarks.training import routes

NEEDED = {"loop": "transformers", "trainer": "accelerate"}


def measure(setting: Setting) -> Iterator[Row]:
    """Yield seconds of a step and peak memory, with weights and without."""
    options = argparse.Namespace(
        tiny=setting.is_tiny,
        steps=4 if setting.is_tiny else 12,
        repeats=3,
        device=setting.device,
        model_width=2048,
        model_layers=16,
        model_dtype="float32" if setting.is_tiny else "bfloat16",
    )
    for route, package in NEEDED.items():
        if find_spec(package) is None:
            yield {"what": route, "left_out": f"{package} is not installed"}
        elif setting.seconds_left() < 0:
            yield {"what": route, "error": "not measured: no time left"}
        else:
            try:
                yield from routes.measure(route, options)
            except ImportError as error:  # the adapter refuses this release
                yield {"what": route, "left_out": str(error)}
