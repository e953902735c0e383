"""flowdata bench: what scoring reaches on this machine, against the loop people write.

The benchmarks of the repository measure more; they take their loops and sizes from here.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.models.placement import usable_device
from flowdata.models.precision import name_of, resolve_dtype
from flowdata.scoring.collate import pad_collate
from flowdata.scoring.scorer import LossScorer
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.text.models import load_transformers

Samples = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Measurement:
    """What a small model reaches on a machine.

    Attributes:
        device: the GPU's name, or `cpu`.
        dtype: that the model ran in.
        matmul_tflops: of large matrix products.
        usual_loop: real tokens a second of the loop that people write.
        flowdata: real tokens a second of `LossScorer`.
        ratio: of the two.
        share_of_matmul: of the matrix products' rate that `LossScorer` reaches.
        largest_difference: between the losses of the two, nats.
    """

    device: str
    dtype: str
    matmul_tflops: float
    usual_loop: float
    flowdata: float
    ratio: float
    share_of_matmul: float
    largest_difference: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)

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
    """Return what a small random Llama reaches, three runs of each loop in turn.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a wrong dtype, or fewer than one sample.
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
    usual, ours = usual_loop(model, data), scorer.score(data, dataset_id="bench").losses
    seconds: dict[str, list[float]] = {"usual": [], "flowdata": []}
    for _ in range(3):
        seconds["usual"].append(_seconds(lambda: usual_loop(model, data)))
        seconds["flowdata"].append(_seconds(lambda: scorer.score(data, dataset_id="bench")))
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
        largest_difference=(usual - ours).abs().max().item(),
    )


def usual_loop(model: Any, samples: Samples, batch_size: int = 8) -> Tensor:
    """Return the losses as most code takes them, (N,).

    Batches are random and padded, all logits are made, and everything is in the model's dtype.
    """
    device = next(model.parameters()).device
    order = random.Random(0).sample(range(len(samples)), len(samples))
    losses = torch.empty(len(samples))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = pad_collate([samples[index] for index in indices])
            batch = {name: value.to(device) for name, value in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").float()
            losses[indices] = (each.sum(1) / (labels != IGNORE_INDEX).sum(1)).cpu()
    return losses


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Return the FLOP/s of large square matrix products into a given output."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left = torch.randn(size, size, device=device).to(dtype)
    right, out = torch.randn(size, size, device=device).to(dtype), torch.empty_like(left)

    def product() -> None:
        torch.mm(left, right, out=out)

    product()
    return 2 * size**3 / min(_seconds(product) for _ in range(10))


def flops(model: Any, samples: Samples) -> float:
    """Return the floating point operations that scoring can't do without.

    Every token through the layers once, causal attention over its own sample, the head for
    targets only; norms and the like are left out.
    """
    config = model.config
    body = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head
    )
    attention = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    total = 0.0
    for sample in samples:
        length = len(sample["input_ids"])
        targets = int((sample["labels"][1:] != IGNORE_INDEX).sum())
        total += 2 * body * length + 2 * attention * length**2
        total += 2 * model.lm_head.weight.numel() * targets
    return total


def random_llama(*, layers: int, width: int = 576, vocabulary: int = 49152) -> Any:
    """Return a Llama of random weights, at the usual size SmolLM2-135M's in shape."""
    transformers = load_transformers()
    heads = width // 64
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // (3 if heads % 3 == 0 else 4),
            tie_word_embeddings=True,
        )
    ).eval()


def random_samples(
    lengths: Sequence[Sequence[int]],
    *,
    generator: torch.Generator,
    vocabulary: int = 49152,
    template: int = 0,
) -> Samples:
    """Return samples of random tokens for (prompt, completion) lengths.

    All of them begin with the same `template` tokens.
    """
    shared = torch.randint(0, vocabulary, (template,), generator=generator)
    samples = []
    for prompt, completion in lengths:
        tokens = torch.randint(0, vocabulary, (prompt + completion,), generator=generator)
        ids = torch.cat([shared, tokens])
        labels = ids.clone()
        labels[: template + prompt] = IGNORE_INDEX
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def lognormal_lengths(count: int, generator: torch.Generator) -> list[list[int]]:
    """Return (prompt, completion) lengths, about 80 and 120 tokens on average."""
    logarithms = torch.randn(count, 2, generator=generator) * 0.5 + torch.tensor([4.25, 4.65])
    lengths: list[list[int]] = logarithms.exp().long().clamp_min(1).tolist()
    return lengths


def _seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start
