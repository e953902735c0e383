"""Cases: the models and samples on which loops over language models are timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.forgetting.images import ASSETS as ALL_ASSETS
from flowdata.cli.bench_inputs import Samples, lognormal_lengths, random_llama, random_samples
from flowdata.targets.labels import IGNORE_INDEX

ASSETS = ALL_ASSETS / "language"
GSM8K = "gsm8k_train.jsonl"
CHARACTERS_PER_TOKEN = 3.4  # of GSM8K under SmolLM2's tokenizer
EXACT = 12  # samples whose losses are compared, and that the float32 loops are timed on


STRONG, OURS = "sorted, logits of targets only", "flowdata"


@dataclass(frozen=True)
class Case:
    """A model, its data and the loops to run on them.

    Attributes:
        width, layers, vocabulary: the random model's; `width` None means SmolLM2 itself.
        kind: ``"llama"``, ``"mixtral"`` (two experts of eight) or ``"8-bit"`` (a Llama whose
            weights torchao keeps in 8 bits).
        lengths: where the samples' lengths come from, ``"gsm8k"`` or ``"lognormal"``, or the
            (prompt, completion) length of all.
        samples: number of samples, as a share of ``--samples``.
        compared: samples whose losses are compared, and that the float32 loops are timed on.
        template: whether all samples begin with one template, a third of all tokens.
        answers: number of samples that share a prompt.
        loops: names among `benchmarks.scoring.language.LOOPS`.
    """

    width: int | None = 576
    layers: int = 12
    vocabulary: int = 49152
    kind: str = "llama"
    lengths: str | tuple[int, int] = "gsm8k"
    samples: float = 1.0
    compared: int = EXACT
    template: bool = False
    answers: int = 1
    loops: tuple[str, ...] = ("usual loop", STRONG, OURS)

    def count(self, samples: int) -> int:
        """Return the number of samples where the largest cases have so many."""
        return max(self.compared, round(samples * self.samples))


_ALL_LOOPS = (
    *("usual loop, float32", "flowdata, float32", "usual loop", "one sample at a time"),
    *("lm-eval", "TRL", STRONG, OURS, "flowdata, compiled"),
)
CASES = {
    "gsm8k": Case(loops=_ALL_LOOPS),
    "template": Case(template=True, samples=0.5),
    "answers": Case(answers=4, samples=0.5, loops=(STRONG, "flowdata, prompts apart", OURS)),
    "lognormal": Case(lengths="lognormal", samples=0.5),
    "long-4k": Case(layers=4, lengths=(2048, 2048), samples=0.33, compared=2, loops=(STRONG, OURS)),
    "long-16k": Case(
        layers=2, lengths=(14336, 2048), samples=0.19, compared=2, loops=(STRONG, OURS)
    ),
    "experts": Case(kind="mixtral", layers=4, samples=0.5),
    "8-bit": Case(kind="8-bit", samples=0.5),
    "vocabulary-32k": Case(vocabulary=32000, samples=0.33),
    "vocabulary-128k": Case(vocabulary=128256, samples=0.33),
    "wide-32k": Case(width=2048, layers=3, vocabulary=32000, samples=0.33),
    "wide-128k": Case(width=2048, layers=3, vocabulary=128256, samples=0.33),
    "smollm2": Case(width=None, samples=0.33),
    "billion": Case(width=2048, layers=20, vocabulary=128256),  # for GPUs: 1.2 billion weights
}


def make(case: Case, count: int, smollm2: str) -> tuple[Any, Samples]:
    """Return a case's model in float32, and its samples."""
    if case.width is None:
        return smollm2_itself(count, smollm2)
    generator = torch.Generator().manual_seed(0)
    lengths = lengths_of(case, count, generator)
    mean_length = sum(map(sum, lengths)) / count
    model = random_model(case)
    samples = random_samples(
        lengths,
        generator=generator,
        vocabulary=case.vocabulary,
        template=round(mean_length / 2) if case.template else 0,
    )
    firsts = range(0, count, case.answers)
    return model, [s for first in firsts for s in answers(samples[first : first + case.answers])]


def lengths_of(case: Case, count: int, generator: torch.Generator) -> list[list[int]]:
    """Return the (prompt, completion) lengths of a case's samples."""
    if isinstance(case.lengths, tuple):
        return [list(case.lengths)] * count
    lengths = gsm8k_lengths(count) if case.lengths == "gsm8k" else None
    return lengths or lognormal_lengths(count, generator)


def random_model(case: Case) -> Any:
    """Return a case's model, of random weights, in float32."""
    sizes = {"layers": case.layers, "width": case.width, "vocabulary": case.vocabulary}
    if case.kind == "mixtral":
        return random_mixtral(**sizes)
    model = random_llama(**sizes)
    if case.kind == "8-bit":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    return model


def random_mixtral(*, layers: int, width: int, vocabulary: int) -> Any:
    """Return a Mixtral of random weights, whose tokens take two of eight experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 4 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 192,
            head_dim=64,
            tie_word_embeddings=True,
        )
    ).eval()


def answers(samples: Samples) -> Samples:
    """Return the samples with the first one's prompt in place of their own."""
    prompt_lengths = [sample["labels"].eq(IGNORE_INDEX).sum() for sample in samples]
    prompt = {name: values[: prompt_lengths[0]] for name, values in samples[0].items()}
    return [
        {name: torch.cat([prompt[name], values[length:]]) for name, values in sample.items()}
        for sample, length in zip(samples, prompt_lengths, strict=True)
    ]


def has_gsm8k(folder: Path = ASSETS) -> bool:
    """Return whether GSM8K's rows are there; else lognormal lengths stand in for theirs."""
    return (folder / GSM8K).exists()


def gsm8k_lengths(count: int, folder: Path = ASSETS) -> list[list[int]]:
    """Return the tokens of GSM8K's questions and answers; empty if the data is missing."""
    file = folder / GSM8K
    if not has_gsm8k(folder):
        print(f"{file} is missing: lognormal lengths stand in for it")
        return []
    from flowdata.text import read_rows

    texts = [(row["question"], row["answer"]) for row in read_rows(str(file), limit=count)]
    return [[int(len(text) / CHARACTERS_PER_TOKEN) for text in pair] for pair in texts]


def smollm2_itself(count: int, file: str) -> tuple[Any, Samples]:
    """Return SmolLM2-135M-Instruct, and GSM8K's questions and answers by its tokenizer."""
    from flowdata.text import (
        Fields,
        find_fields,
        load_model,
        load_tokenizer,
        read_rows,
        tokenize_rows,
    )

    questions = read_rows(str(ASSETS / "gsm8k_train.jsonl"), limit=count)
    fields = find_fields(questions[0], Fields(None, "question", "answer"))
    samples = tokenize_rows(questions, load_tokenizer(file), fields, template=False)
    tensors = [
        {name: torch.as_tensor(sample[name]) for name in ("input_ids", "labels")}
        for sample in (samples[index] for index in range(len(samples)))
    ]
    return load_model(file).eval(), tensors
