"""What weights cost in training: python -m benchmarks training [--tiny] [--routes …] …

Each measurement is a process of its own, so that peak memory is its own too. Weighted and
unweighted runs of a route take turns in one process. The fused loss is compared with the same
loss of full logits, by hand (PyTorch's cross-entropy, weighted) and by `causal_lm_loss`, at each
vocabulary, head and loss alone: forward, backward, and the gradients of the head. Equality is
checked before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import rows
from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset
from flowdata.losses import causal_lm_loss, fused_causal_lm_loss
from flowdata.scoring.collate import pad_collate

ROUTES = ("loop", "trainer", "sft", "lightning")
LOSSES = ("by hand", "full", "fused")


def main(argv: list[str]) -> None:
    """Measure every route and every vocabulary, print ratios, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training")
    parser.add_argument("--routes", nargs="*", default=ROUTES, choices=ROUTES)
    parser.add_argument("--vocabulary", nargs="*", type=int, default=[32768, 65536, 131072, 262144])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each kind")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, for correctness")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tiny:
        options.vocabulary, options.tokens, options.width, options.steps = [512], 64, 32, 2
    if options.one:
        print(json.dumps(_one(options.one, options)))
        return
    measured = []
    for route in options.routes:
        measured += (pair := _in_a_process(f"route:{route}", argv))
        print(f"{route:10} weighted / unweighted step {_ratio(pair, 'weighted', 'plain'):.3f}")
    for size in options.vocabulary:
        check_equal(options.width, min(size, 4096))
        both = [_in_a_process(f"loss:{loss}:{size}", argv) for loss in LOSSES]
        measured += (found := [row for part in both for row in part])
        for kind in ("time", "memory"):
            for other in LOSSES[:-1]:
                ratio = _ratio(found, f"fused {kind}", f"{other} {kind}")
                print(f"{size:7} fused / {other} {kind} {ratio:.3f}", flush=True)
    if not options.tiny:
        print(rows.write("training", measured, "python -m benchmarks training " + " ".join(argv)))


def check_equal(width: int, size: int) -> None:
    """Loss and gradients of all three agree."""
    found = []
    for loss in LOSSES:
        step, head, hidden = _loss_step(loss, size, 64, width, torch.float32, "cpu")
        found.append((step(), hidden.grad, head.weight.grad))
    for values in zip(*found, strict=True):
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-4, atol=1e-6)


def _in_a_process(what: str, argv: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks", "training", *argv, "--one", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ratio(found: list[dict[str, Any]], over: str, under: str) -> float:
    medians = {row["what"].partition(": ")[2]: row["median"] for row in found}
    return float(medians[over] / medians[under])


def _one(what: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    kind, *rest = what.split(":")
    return _route(rest[0], options) if kind == "route" else _loss(rest[0], int(rest[1]), options)


def _loss(loss: str, size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and peak memory of the loss of one batch, its gradients included."""
    dtype = getattr(torch, options.dtype)
    step, head, hidden = _loss_step(
        loss, size, options.tokens, options.width, dtype, options.device
    )
    held = _reset_peak(options.device)
    step()
    memory = (_peak(options.device) - held) / 2**20
    seconds = []
    for _ in range(max(3, options.steps // 4)):
        head.weight.grad = hidden.grad = None
        _wait(options.device)
        start = perf_counter()
        step()
        _wait(options.device)
        seconds.append(perf_counter() - start)
    more = {"vocabulary": size, "tokens": options.tokens, "width": options.width}
    more |= {"dtype": options.dtype, "device": options.device}
    return [
        rows.row(f"{size}: {loss} time", seconds, "s", **more),
        rows.row(f"{size}: {loss} memory", [memory], "MiB", **more),
    ]


def _loss_step(
    loss: str, size: int, tokens: int, width: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[], Tensor], nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(width, size, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(4, tokens // 4, width, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(size, (4, tokens // 4), device=device)
    weights = torch.rand(4, device=device)

    def step() -> Tensor:
        if loss == "fused":
            value = fused_causal_lm_loss(hidden, head, labels, weights)
        elif loss == "full":
            value = causal_lm_loss(head(hidden), labels, weights)
        else:
            logits, targets = head(hidden)[:, :-1].float(), labels[:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            value = (losses * weights[:, None]).sum() / targets.numel()
        value.backward()
        return value.detach()

    return step, head, hidden


def _route(route: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of each step; runs of the two kinds take turns, their first two steps left out."""
    seconds: dict[str, list[float]] = {"plain": [], "weighted": []}
    memory: dict[str, list[float]] = {"plain": [], "weighted": []}
    for _ in range(1 if options.tiny else 5):
        for kind, found in seconds.items():
            held = _reset_peak(options.device)
            moments = _RUNS[route](kind == "weighted", options)
            found += [after - before for before, after in pairwise(moments[1:])]
            memory[kind].append((_peak(options.device) - held) / 2**20)
    times = [rows.row(f"{route}: {kind}", values, "s") for kind, values in seconds.items()]
    return times + [
        rows.row(f"{route}: {kind} memory", values, "MiB") for kind, values in memory.items()
    ]


def _language_model(options: argparse.Namespace) -> tuple[Any, list[dict[str, Tensor]], Tensor]:
    """A small Llama, samples of unequal lengths and their weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512 if options.tiny else 32768,
        hidden_size=32 if options.tiny else 256,
        intermediate_size=64 if options.tiny else 768,
        num_hidden_layers=2 if options.tiny else 4,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    longest = 16 if options.tiny else 160
    samples = []
    for index in range((options.steps + 2) * 8):
        ids = torch.randint(1, config.vocab_size, (longest // 2 + 7 * index % (longest // 2),))
        labels = ids.clone()
        labels[: len(ids) // 4] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return LlamaForCausalLM(config), samples, torch.rand(len(samples))


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
        moments.append(_now(options.device))
    return moments


def _run_trainer(weighted: bool, options: argparse.Namespace, sft: bool = False) -> list[float]:
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from flowdata.integrations.transformers import FlowTrainer

    plain, flow, config, more = Trainer, FlowTrainer, TrainingArguments, {}
    model, samples, weights = _language_model(options)
    data: Any = samples
    if sft:
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
            moments.append(_now(options.device))

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
            moments.append(_now(options.device))

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


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w1"
    )


def _now(device: str) -> float:
    _wait(device)
    return perf_counter()


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> float:
    """Forget the peak, and return what is held now, in bytes."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is held now
    return _status("VmRSS")


def _peak(device: str) -> float:
    return float(torch.cuda.max_memory_allocated()) if device != "cpu" else _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
