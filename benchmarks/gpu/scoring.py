"""Scoring at billions of parameters: real tokens a second of every loop on the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.gpu.parts import Row, Setting
from benchmarks.gpu.shapes import SHAPES, make_model, make_samples
from benchmarks.scoring import peers
from benchmarks.scoring.cases import EXACT, has_gsm8k
from benchmarks.scoring.language import compare, is_installed

OURS = ("flowdata", "flowdata, compiled")
PEERS = ("sorted, logits of targets only", "usual loop", "sorted, flash-attn", "TRL", "lm-eval")


class Case(NamedTuple):
    """A model's shape, its vocabulary, the share of completions, samples, and the loops."""

    shape: str
    vocabulary: int
    share: float
    samples: int
    loops: tuple[str, ...] = ("flowdata", *PEERS[:2])


FIRST = ("llama-1b", 128256, 0.5, 1024)
BESIDE_TWO_LOOPS = (
    ("gemma-2b", 256000, 0.5, 512),
    ("llama-3b", 128256, 0.9, 512),
    ("llama-0.5b", 32000, 0.5, 2048),
)
BESIDE_ONE_LOOP = (
    ("llama-1b", 128256, 0.9, 1024),
    ("llama-0.5b", 32000, 0.9, 2048),
    ("gemma-2b", 256000, 0.9, 512),
)
# The most telling first: a limit cuts the list.
CASES = (
    Case(*FIRST, ("flowdata", *PEERS)),
    *(Case(*sizes) for sizes in BESIDE_TWO_LOOPS),
    Case("gemma2-2b", 256000, 0.5, 512, ("flowdata", PEERS[0])),
    *(Case(*sizes, ("flowdata", PEERS[0])) for sizes in BESIDE_ONE_LOOP),
    # The loops that are left. vLLM comes last, since it loads for long, and only at some sizes,
    # since it computes prompts' losses too.
    *(Case(*sizes, PEERS[2:]) for sizes in BESIDE_TWO_LOOPS),
    *(Case(*sizes, PEERS[1:]) for sizes in BESIDE_ONE_LOOP),
    *(Case(*sizes, ("vLLM",)) for sizes in (FIRST, *BESIDE_ONE_LOOP)),
)


def measure(setting: Setting) -> Iterator[Row]:
    """Yield a row for each loop of each case that there is time for."""
    costs = [0.0]  # seconds of the cases so far: the next is begun if the dearest would fit
    for case in CASES[:2] if setting.is_tiny else CASES:
        if setting.seconds_left() < max(costs):
            what = f"{name_of(case)}: {', '.join(case.loops)}"
            yield {"what": what, "error": "not measured: no time left"}
            continue
        before = setting.seconds_left()
        yield from measure_case(case, setting)
        costs.append(before - setting.seconds_left())


def measure_compiled(setting: Setting) -> Iterator[Row]:
    """Yield the first case's rows with compiled layers and without."""
    yield from measure_case(CASES[0]._replace(loops=OURS), setting)


def measure_case(case: Case, setting: Setting) -> Iterator[Row]:
    """Yield a row for each installed loop: equality is checked first, and each is timed alone."""
    loops = list(filter(is_installed, case.loops))
    if not loops:
        return
    shape, vocabulary, count = SHAPES[case.shape], case.vocabulary, case.samples
    if setting.is_tiny:
        shape, vocabulary, count = shape.tiny(), 512, EXACT
    model = make_model(shape, vocabulary, setting.device)
    samples = make_samples(setting, count, vocabulary, case.share)
    lengths = "GSM8K" if has_gsm8k(setting.assets) else "lognormal"
    exact = peers.one_at_a_time(model, samples[:EXACT])
    model = model.bfloat16()
    device, repeats = torch.device(setting.device), 1 if setting.is_tiny else 3
    for loop in loops:
        # Not in turn: a GPU has no slow moments, and a limit loses no loop.
        for row in compare(name_of(case), {loop: (model, samples)}, exact, repeats, device):
            yield row | {"lengths": lengths}


def name_of(case: Case) -> str:
    """A case as a row names it."""
    return f"{case.shape}, {case.vocabulary // 1000}k, {case.share:.0%} completions"
