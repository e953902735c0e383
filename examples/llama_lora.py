"""FLOW with LoRA: the adapters are trained, the base model under them gives the losses.

    python examples/llama_lora.py --model meta-llama/Llama-3.2-1B

The lines marked FLOW are the difference to the plain loop, whose own lines stand beside them.
"""

from __future__ import annotations

import small
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from flowdata import FlowWeightedDataset, LossScorer, causal_lm_loss
from flowdata.collator import WeightedCollator
from flowdata.scoring.collate import pad_collate


def main(argv: list[str] | None = None) -> list[float]:
    """Fine-tune the adapters, and return the loss of every step."""
    options = small.parser(__doc__).parse_args(argv)
    model, _, dataset = small.load(options)
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    scorer = LossScorer(model, reference="base")  # FLOW
    dataset = FlowWeightedDataset(dataset, scorer.score(dataset), layout="dict")  # FLOW
    loader = DataLoader(dataset, 8, shuffle=True, collate_fn=WeightedCollator(pad_collate))
    losses: list[float] = []
    while len(losses) < options.steps:
        for batch in loader:
            logits = model(batch["input_ids"], batch["attention_mask"]).logits
            # plain: loss = causal_lm_loss(logits, batch["labels"])
            loss = causal_lm_loss(logits, batch["labels"], batch["weight"])  # FLOW
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
