"""The paper's language runs: a model of 2–3B parameters learns MetaMathQA, sharded by FSDP2.

    torchrun --nproc-per-node 8 -m benchmarks.forgetting.metamath --model google/gemma-2-2b \
        --data meta-math/MetaMathQA --method FLOW --rate 1e-5 --output runs/gemma-flow
    torchrun --nproc-per-node 8 -m benchmarks.forgetting.metamath --model \
        meta-llama/Llama-3.2-3B --data meta-math/MetaMathQA --method FLOW --output runs/llama-flow

The methods are standard, FLOW, "FLOW, sampler", l2, "FLOW + l2" and those with token weights.
``--lora 64`` adds adapters, ``--wise-ft 0.5`` averages with the pre-trained weights. The paper's
rates are 1e-4, 2e-5, 1e-5 and 5e-6. lm-evaluation-harness then measures what the model forgot:

    lm_eval --model hf --model_args pretrained=runs/gemma-flow --tasks mmlu,mbpp,gsm8k
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import flowdata
from benchmarks.forgetting.batches import Weighted, target_weights
from benchmarks.forgetting.language import MAIN
from flowdata.losses import causal_lm_loss, count_items
from flowdata.scoring.collate import pad_collate
from flowdata.study import Method, train
from flowdata.text import Fields, find_fields, load_model, load_tokenizer, read_rows, tokenize_rows

SHARDABLE_METHODS = ("standard", "FLOW", "FLOW, sampler", "l2", "FLOW + l2", "l1", "DRO")
METHODS = {
    n: m for n, m in MAIN.items() if n in SHARDABLE_METHODS or not (m.parts or n == "pre-trained")
}
Batch = list[dict[str, Tensor]]  # the micro-batches of one optimiser step on one rank


def main(argv: list[str] | None = None) -> None:
    """Score, fine-tune and save; every rank runs this."""
    options = parse(argv)
    device = start_ranks()
    model, tokenizer = load_model(options.model).float().to(device), load_tokenizer(options.model)
    rows = read_rows(options.data, limit=options.rows)
    samples = tokenize_rows(
        rows, tokenizer, find_fields(rows[0], Fields()), template=False, max_length=1024
    )
    scorer = flowdata.LossScorer(model, "causal_lm", token_losses=True)
    scores = scorer.score(samples, dataset_id=samples.digest(), store=options.output / "scores")

    method = METHODS[options.method]
    data, sampler = data_and_sampler(method, Weighted(samples, target_weights(method, scores)))
    if options.wise_ft is not None:
        save(model, tokenizer, options.output / "pretrained")
    network = with_adapters(model, options.lora) if options.lora else model
    shard(network, device)
    loader = DataLoader(
        data, batch_size=options.micro, sampler=sampler, collate_fn=pad_collate, drop_last=True
    )
    micro_batches = max(1, options.batch // (options.micro * dist.get_world_size()))
    steps = options.epochs * (len(loader) // micro_batches)
    train(
        network,
        steps_of(loader, sampler, micro_batches, options.epochs, device),
        steps,
        partial(accumulated_loss, network, rule=method.rule),
        partial(torch.optim.AdamW, lr=options.rate, weight_decay=0.0),
        method,
        seed=options.seed,
        warmup=0.03,
    )
    save(network, tokenizer, options.output)
    if options.wise_ft is not None and dist.get_rank() == 0:
        average_files(options.output, options.wise_ft)
    dist.destroy_process_group()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description="The paper's language runs")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="hub data set, JSONL or Parquet")
    parser.add_argument("--method", choices=list(METHODS), default="FLOW")
    parser.add_argument("--rate", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128, help="sequences in a step, all ranks")
    parser.add_argument("--micro", type=int, default=2, help="sequences in a forward pass")
    parser.add_argument("--rows", type=int, help="of the data; all by default")
    parser.add_argument("--lora", type=int, help="rank of adapters")
    parser.add_argument("--wise-ft", type=float, help="α of a second, averaged set of weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(argv)


def start_ranks() -> torch.device:
    """Join the process group that torchrun made, and return this rank's device."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_node_local_rank())
    return torch.device("cuda", dist.get_node_local_rank())


def data_and_sampler(method: Method, data: Weighted) -> tuple[Weighted, DistributedSampler[Any]]:
    """Return the data and the sampler that a method trains with."""
    if not method.resample:
        return data, DistributedSampler(data, drop_last=True)
    sample_weights = torch.stack([part.mean() for part in data.weights])
    even = Weighted(data.samples, [torch.ones_like(part) for part in data.weights])
    return even, flowdata.FlowSampler(sample_weights, drop_last=True)


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with LoRA adapters on all linear layers but the head."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    return peft.get_peft_model(model, config)


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard every decoder layer over the ranks, and then the parameters outside the layers."""
    options: dict[str, Any] = {}
    if device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer, **options)
    fully_shard(model, **options)


def steps_of(
    loader: DataLoader[Any],
    sampler: DistributedSampler[Any],
    micro_batches: int,
    epochs: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield the micro-batches of each optimiser step; an epoch's last ones may fill no step."""
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        step: Batch = []
        for batch in loader:
            step.append({name: value.to(device) for name, value in batch.items()})
            if len(step) == micro_batches:
                yield step
                step = []


def accumulated_loss(model: nn.Module, batch: Batch, rule: Any = None) -> Tensor:
    """Return the last micro-batch's share of a step's loss; `backward` of the others is done here.

    With n targets in the whole step on R ranks, a share is a sum of losses times R / n. The factor
    R is there because FSDP divides the sum of gradients by R.
    """
    items = torch.stack([count_items(part["labels"]) for part in batch]).sum()
    dist.all_reduce(items)

    def share(part: dict[str, Tensor]) -> Tensor:
        logits = model(
            input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False
        ).logits
        num_items = items / dist.get_world_size()
        return causal_lm_loss(
            logits, part["labels"], part["weight"], num_items=num_items, token_rule=rule
        )

    for part in batch[:-1]:
        share(part).backward()
    return share(batch[-1])


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Gather the weights and write them on the first rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    dist.barrier()


def average_files(folder: Path, alpha: float) -> None:
    """Write the WiSE-FT average of `folder` and its ``pretrained``, file by file."""
    for file in folder.glob("*.safetensors"):
        output = folder / f"wise_ft_{alpha:g}" / file.name
        flowdata.wise_ft(folder / "pretrained" / file.name, file, alpha, output)
    for other in (folder / "pretrained").glob("*.json"):
        (output.parent / other.name).write_bytes(other.read_bytes())


if __name__ == "__main__":
    main()
