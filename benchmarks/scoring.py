"""Scoring speed against the loops people write: python -m benchmarks scoring [--samples N].

Every loop gives the same losses first (the error against float32 is in its row), then is timed.
The model has SmolLM2-135M's width and head and fewer layers, with random weights; the lengths
are GSM8K's own where the data is there, else lognormal. Tokens are real ones, without padding.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flowdata
from benchmarks import rows
from flowdata.scoring.batches import pad_collate
from flowdata.scoring.plan import plan_padded

GSM8K = Path(__file__).parent.parent.parent / "shared/assets/language/gsm8k_train.jsonl"
CHARACTERS_PER_TOKEN = 3.4  # of GSM8K under SmolLM2's tokenizer
Samples = list[dict[str, Tensor]]


def main(argv: list[str]) -> None:
    """Measure all loops in turn, several times over, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    model, samples = smollm_shaped(options.layers), gsm8k_shaped(options.samples)
    low = copy.deepcopy(model).bfloat16()
    tokens = sum(len(sample["input_ids"]) for sample in samples)

    loops: dict[str, Callable[[], Tensor]] = {
        "usual loop, float32": lambda: usual(model, samples),
        "usual loop, bfloat16": lambda: usual(low, samples),
        "one sample at a time, bfloat16": lambda: one_at_a_time(low, samples),
        "sorted, logits of targets only, bfloat16": lambda: sorted_targets(low, samples),
        "flowdata, float32": lambda: scored(model, samples, "float32"),
        "flowdata, bfloat16": lambda: scored(model, samples, "bfloat16"),
    }
    exact = one_at_a_time(model, samples)
    errors = {name: (run() - exact).abs().max().item() for name, run in loops.items()}
    for name, error in errors.items():
        if error > (1e-4 if name.endswith("float32") else 0.1):
            raise SystemExit(f"{name} gives other losses, by up to {error:.2g}: nothing timed")
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.repeats):  # in turn, so that a slow moment slows them alike
        for name, run in loops.items():
            seconds[name] += rows.timed(run, repeats=1, warmup=0)
    measured = [
        rows.row(name, [tokens / s for s in seconds[name]], "tokens/s", largest_error=errors[name])
        for name in loops
    ]
    ours = measured[-1]["median"]
    for one in measured:
        one["ratio_of_flowdata"] = ours / one["median"]
        print(
            f"{one['what']:44}{one['median']:8,.0f} tokens/s  {one['ratio_of_flowdata']:5.2f}x  "
            f"largest error {one['largest_error']:.1e}"
        )
    print(rows.write("scoring", measured, " ".join(["python -m benchmarks scoring", *argv])))


def scored(model: Any, samples: Samples, dtype: str) -> Tensor:
    """The library, model conversion, fingerprint and self-check included."""
    scorer = flowdata.LossScorer(model, dtype=dtype, progress=False)
    return scorer.score(samples, dataset_id="benchmark").losses


def usual(model: Any, samples: Samples, batch_size: int = 8) -> Tensor:
    """Random batches, padded, full logits, cross-entropy in the model's dtype."""
    order = random.Random(0).sample(range(len(samples)), len(samples))
    losses = torch.empty(len(samples))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = pad_collate([samples[index] for index in indices])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").float()
            losses[indices] = each.sum(1) / (labels != -100).sum(1)
    return losses


def one_at_a_time(model: Any, samples: Samples) -> Tensor:
    """No padding, full logits in float32."""
    losses = []
    with torch.no_grad():
        for sample in samples:
            logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1]
            losses.append(F.cross_entropy(logits.float(), sample["labels"][1:]))
    return torch.stack(losses)


def sorted_targets(model: Any, samples: Samples, max_tokens: int = 4096) -> Tensor:
    """A strong loop of one's own: sorted by length, logits of target positions, in float32."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    plan = plan_padded(lengths, max_tokens=max_tokens)
    losses = torch.empty(len(samples))
    with torch.no_grad():
        for pack in range(len(plan)):
            indices = plan.pack(pack)
            batch = pad_collate([samples[index] for index in indices.tolist()])
            labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
            kept = labels != -100
            hidden = model.model(**batch, use_cache=False).last_hidden_state[kept]
            each = F.cross_entropy(model.lm_head(hidden).float(), labels[kept], reduction="none")
            counts = kept.sum(1)
            losses[indices] = torch.stack([part.mean() for part in each.split(counts.tolist())])
    return losses


def smollm_shaped(layers: int) -> Any:
    """A random Llama of SmolLM2-135M's width and vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ).eval()


def gsm8k_shaped(count: int) -> Samples:
    """Random tokens with the lengths of GSM8K's questions and answers."""
    generator = torch.Generator().manual_seed(0)
    if GSM8K.exists():
        from flowdata.loading import read_rows

        texts = [(row["question"], row["answer"]) for row in read_rows(str(GSM8K), limit=count)]
        pairs = [[int(len(text) / CHARACTERS_PER_TOKEN) for text in pair] for pair in texts]
    else:
        print(f"{GSM8K} is missing: lognormal lengths stand in for it")
        pairs = torch.empty(count, 2).log_normal_(4.3, 0.5, generator=generator).int().tolist()
    samples = []
    for prompt, completion in pairs:
        ids = torch.randint(0, 49152, (prompt + completion,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples
