"""The speed of scoring on this machine, against the loop that people write.

The repository's benchmarks measure more; they share the inputs and the yardsticks.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from flowdata.cli.bench_inputs import (
    guesses_expected,
    lognormal_lengths,
    random_llama,
    random_samples,
)
from flowdata.cli.bench_yardsticks import flops, matmul_rate, seconds_of, usual_loop
from flowdata.models.placement import usable_device
from flowdata.models.precision import name_of, resolve_dtype
from flowdata.scoring.scorer import LossScorer


@dataclass(frozen=True)
class Measurement:
    """The speed of scoring with a small model on a machine.

    Attributes:
        device: the GPU's name, or `cpu`.
        dtype: the model's.
        matmul_tflops: the rate of large matrix products, TFLOP/s.
        usual_loop: the speed of the loop that people write, tokens a second without padding.
        flowdata: the speed of `LossScorer`, likewise.
        ratio: `flowdata` over `usual_loop`.
        share_of_matmul: the share of the matrix products' rate that `LossScorer` reaches.
        largest_difference: the largest difference between the losses of the two, nats.
    """

    device: str
    dtype: str
    matmul_tflops: float
    usual_loop: float
    flowdata: float
    ratio: float
    share_of_matmul: float
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"{self.dtype} on {self.device}: {self.matmul_tflops:,.2f} TFLOP/s in large matrix "
            f"products\nthe usual loop: {self.usual_loop:,.0f} tokens/s\n"
            f"flowdata: {self.flowdata:,.0f} tokens/s ({self.ratio:.1f} times as many, "
            f"{self.share_of_matmul:.0%} of the matrix products' rate; losses within "
            f"{self.largest_difference:.1g} of each other)"
        )


def run_bench(
    *, dtype: str = "auto", device: str | torch.device | None = None, samples: int = 64
) -> Measurement:
    """Time the usual loop and `LossScorer` on a small random Llama, three runs of each in turn.

    Args:
        dtype: the model's; ``"auto"`` chooses the one that scoring would.
        device: by default a GPU if there is one.
        samples: number of random samples.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is no such dtype, or `samples` is less than 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be a positive number, got {samples}")
    place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = random_llama(layers=4).to(place)
    compute_dtype = resolve_dtype(dtype, model, place)
    model = model.to(compute_dtype)
    generator = torch.Generator().manual_seed(0)
    data = random_samples(lognormal_lengths(samples, generator), generator=generator)
    scorer = LossScorer(model, "causal_lm", dtype=compute_dtype, progress=False)
    usual_losses = usual_loop(model, data)
    seconds: dict[str, list[float]] = {"usual": [], "flowdata": []}
    with guesses_expected():
        our_losses = scorer.score(data, dataset_id="bench").losses
        for _ in range(3):
            seconds["usual"].append(seconds_of(lambda: usual_loop(model, data)))
            seconds["flowdata"].append(seconds_of(lambda: scorer.score(data, dataset_id="bench")))
    usual_seconds, our_seconds = (statistics.median(seconds[n]) for n in ("usual", "flowdata"))
    tokens = sum(len(sample["input_ids"]) for sample in data)
    rate = matmul_rate(compute_dtype, place)
    return Measurement(
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        dtype=name_of(compute_dtype),
        matmul_tflops=rate / 1e12,
        usual_loop=tokens / usual_seconds,
        flowdata=tokens / our_seconds,
        ratio=usual_seconds / our_seconds,
        share_of_matmul=flops(model, data) / our_seconds / rate,
        largest_difference=(usual_losses - our_losses).abs().max().item(),
    )
