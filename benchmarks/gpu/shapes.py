"""Random models in the shapes of those that people fine-tune, and samples of GSM8K's lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.parts import Setting
from benchmarks.scoring.cases import gsm8k_lengths
from flowdata.cli.bench_inputs import Samples, lognormal_lengths, random_samples


@dataclass(frozen=True)
class Shape:
    """A model of the family that transformers calls `family`; sizes as its configuration's."""

    family: str
    width: int
    layers: int
    intermediate: int
    heads: int
    key_heads: int
    head_width: int

    def tiny(self) -> Shape:
        """Return the same family at a size for a CPU."""
        return replace(self, width=64, layers=2, intermediate=128, heads=4, head_width=16)


SHAPES = {
    "llama-0.5b": Shape("Llama", 1024, 31, 4096, 16, 4, 64),
    "llama-1b": Shape("Llama", 2048, 16, 8192, 32, 8, 64),
    "llama-3b": Shape("Llama", 3072, 28, 8192, 24, 8, 128),
    "gemma-2b": Shape("Gemma", 2048, 18, 16384, 8, 1, 256),
    "gemma2-2b": Shape("Gemma2", 2304, 26, 9216, 8, 4, 256),
}


def configuration(shape: Shape, vocabulary: int) -> Any:
    """Return the configuration of transformers for a shape."""
    import transformers

    return getattr(transformers, f"{shape.family}Config")(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=min(shape.key_heads, shape.heads),
        head_dim=shape.head_width,
        tie_word_embeddings=True,
    )


def make_model(shape: Shape, vocabulary: int, device: str) -> Any:
    """Return a random model in float32, made on the device."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{shape.family}ForCausalLM")
        return model(configuration(shape, vocabulary)).eval()


def make_samples(setting: Setting, count: int, vocabulary: int, share: float) -> Samples:
    """Return samples as long as GSM8K's, of which completions make up a share."""
    generator = torch.Generator().manual_seed(0)
    lengths = gsm8k_lengths(count, setting.assets) or lognormal_lengths(count, generator)
    totals = [sum(pair) for pair in lengths]
    prompts = [max(1, round(total * (1 - share))) for total in totals]
    pairs = [(prompt, total - prompt) for prompt, total in zip(prompts, totals, strict=True)]
    return random_samples(pairs, generator=generator, vocabulary=vocabulary)
