"""The roofline: counted work against the formula of scoring, and against a model run for real."""

import pytest
import torch

from benchmarks.gpu.shapes import SHAPES, make_model
from benchmarks.roofline import ATTENTION, HEAD, PASSES, PRODUCTS, Chip, Stage, count, fused_bytes
from flowdata.cli.bench_inputs import random_samples
from flowdata.cli.bench_yardsticks import flops

LENGTHS = [(5, 11), (9, 4), (1, 30)]  # prompt and completion


@pytest.mark.parametrize("name", ["llama-1b", "gemma-2b"])
def test_counted_operations_are_those_that_scoring_can_not_do_without(name):
    shape = SHAPES[name].tiny()
    samples = random_samples(LENGTHS, generator=torch.Generator(), vocabulary=512)
    targets = sum(completion for _, completion in LENGTHS)
    stages = count(shape, 512, [sum(pair) for pair in LENGTHS], targets)
    assert sum(stage.flops for stage in stages.values()) == flops(
        make_model(shape, 512, "cpu"), samples
    )
    assert len(stages[ATTENTION].work) == shape.layers
    assert len(stages[HEAD].work) == 1
    assert len(stages[PRODUCTS].work) == 7 * shape.layers  # q, k, v, o, gate, up, down
    assert stages[PASSES].flops == 0
    assert stages[PASSES].bytes > fused_bytes(shape, sum(map(sum, LENGTHS)))


def test_an_operation_takes_the_longer_of_its_two_times():
    chip = Chip("slow", flops=10.0, bandwidth=2.0)
    assert Stage([(100.0, 2.0), (10.0, 8.0)]).seconds(chip) == 10 + 4
