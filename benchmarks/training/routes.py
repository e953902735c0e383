"""Training steps with weights and without, in a plain loop and in each of the frameworks."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import rows
from benchmarks.rows import now, peak_memory
from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset
from flowdata.losses import causal_lm_loss
from flowdata.scoring.collate import pad_collate
from flowdata.targets.labels import IGNORE_INDEX


def measure(route: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows of a route's seconds a step and its memory, weighted and plain, run in turn."""
    seconds: dict[str, list[float]] = {"plain": [], "weighted": []}
    memory: dict[str, list[float]] = {"plain": [], "weighted": []}
    for _ in range(1 if options.tiny else options.repeats):
        for kind in seconds:
            moments, mebibytes = _run(route, kind == "weighted", options)
            # A moment is the end of a step. The first two steps are a warm-up and left out: the
            # pairs begin at the second moment.
            seconds[kind] += [after - before for before, after in pairwise(moments[1:])]
            memory[kind].append(mebibytes)
    times = [rows.row(f"{route}: {kind}", values, "s") for kind, values in seconds.items()]
    return times + [
        rows.row(f"{route}: {kind} memory", values, "MiB") for kind, values in memory.items()
    ]


def _run(route: str, weighted: bool, options: argparse.Namespace) -> tuple[list[float], float]:
    """Train by one route, and return the moment at which each step ended and the peak memory."""
    moments: list[float] = []
    memory = peak_memory(lambda: moments.extend(_RUNS[route](weighted, options)), options.device)
    return moments, memory


def _language_model(options: argparse.Namespace) -> tuple[Any, list[dict[str, Tensor]], Tensor]:
    """A small Llama, samples of unequal lengths and their weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = 32 if options.tiny else options.model_width
    config = LlamaConfig(
        vocab_size=512 if options.tiny else 32768,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2 if options.tiny else options.model_layers,
        num_attention_heads=max(4, width // 64),
        num_key_value_heads=max(4, width // 64),
        pad_token_id=0,
    )
    longest = 16 if options.tiny else 160
    samples = []
    for index in range((options.steps + 2) * 8):
        ids = torch.randint(1, config.vocab_size, (longest // 2 + 7 * index % (longest // 2),))
        labels = ids.clone()
        labels[: len(ids) // 4] = IGNORE_INDEX
        samples.append({"input_ids": ids, "labels": labels})
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(getattr(torch, options.model_dtype))
    return model, samples, torch.rand(len(samples))


def _run_loop(weighted: bool, options: argparse.Namespace) -> list[float]:
    model, samples, weights = _language_model(options)
    data = FlowWeightedDataset(samples, weights) if weighted else samples
    collate = WeightedCollator(pad_collate) if weighted else pad_collate
    optimizer = torch.optim.SGD(model.to(options.device).parameters(), lr=1e-3)
    moments = []
    for item in DataLoader(data, batch_size=8, collate_fn=collate):
        batch, weight = item if weighted else (item, None)
        batch = {name: value.to(options.device) for name, value in batch.items()}
        if weight is None:
            loss = model(**batch).loss
        else:
            logits = model(batch["input_ids"], batch["attention_mask"]).logits
            loss = causal_lm_loss(logits, batch["labels"], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moments.append(now(options.device))
    return moments


def _run_trainer(weighted: bool, options: argparse.Namespace, sft: bool = False) -> list[float]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from flowdata.integrations.transformers import FlowTrainer

    plain, flow, config, more = Trainer, FlowTrainer, TrainingArguments, {}
    model, samples, weights = _language_model(options)
    data: Any = samples
    if sft:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from flowdata.integrations.trl import FlowSFTTrainer

        plain, flow, config = SFTTrainer, FlowSFTTrainer, SFTConfig
        data = Dataset.from_list([{k: v.tolist() for k, v in s.items()} for s in samples])
        more = {"processing_class": _tokenizer(model.config.vocab_size)}
    else:
        more = {"data_collator": pad_collate}
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            moments.append(now(options.device))

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": 8,
            "max_steps": options.steps + 2,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "use_cpu": options.device == "cpu",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": [],
        }
        arguments = config(**settings, **({"bf16": False} if sft else {}))
        more |= {"callbacks": [Clock()], "train_dataset": data}
        trainer = (
            flow(model, arguments, scores=weights, **more)
            if weighted
            else plain(model, arguments, **more)
        )
        trainer.train()
    return moments


def _run_lightning(weighted: bool, options: argparse.Namespace) -> list[float]:
    import lightning.pytorch as pl

    from flowdata.integrations.lightning import FlowDataModule

    model, samples, weights = _language_model(options)
    moments: list[float] = []

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, item: Any, index: int) -> Any:
            if not weighted:
                return self.model(**item).loss
            (batch, weight), num_items = item
            logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
            return causal_lm_loss(logits, batch["labels"], weight, num_items=num_items)

        def on_train_batch_end(self, *args: Any) -> None:
            moments.append(now(options.device))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    data = (
        FlowDataModule(samples, weights, batch_size=8, collate_fn=pad_collate)
        if weighted
        else DataLoader(samples, batch_size=8, shuffle=True, collate_fn=pad_collate)
    )
    trainer = pl.Trainer(
        accelerator="cpu" if options.device == "cpu" else "gpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data)
    return moments


_RUNS: dict[str, Callable[[bool, argparse.Namespace], list[float]]] = {
    "loop": _run_loop,
    "trainer": _run_trainer,
    "sft": lambda weighted, options: _run_trainer(weighted, options, sft=True),
    "lightning": _run_lightning,
}

ROUTES = tuple(_RUNS)


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w1"
    )
