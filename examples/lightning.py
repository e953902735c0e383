"""FLOW in Lightning.

    python examples/lightning.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The lines marked FLOW are the difference to plain Lightning, whose own lines stand beside them.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import small
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowdata import LossScorer, causal_lm_loss

sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]
import lightning.pytorch as pl  # the library, not this file

from flowdata.integrations.lightning import FlowDataModule
from flowdata.scoring.collate import pad_collate

__all__ = ["DataLoader", "FineTuning", "main"]


class FineTuning(pl.LightningModule):
    """A language model that is fine-tuned."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, item: Any, index: int) -> Tensor:
        """Return the loss of a batch."""
        # plain: batch, weights, num_items = item, None, None
        (batch, weights), num_items = item  # FLOW
        logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
        loss = causal_lm_loss(logits, batch["labels"], weights, num_items=num_items)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(argv: list[str] | None = None) -> list[float]:
    """Fine-tune, and return the loss of every batch."""
    options = small.parser(__doc__).parse_args(argv)
    model, _, dataset = small.load(options)
    data = {"batch_size": 4, "collate_fn": pad_collate}
    scores = LossScorer(model).score(dataset, store=f"{options.output}/scores")  # FLOW
    # plain: batches = DataLoader(dataset, **data)
    batches = FlowDataModule(dataset, scores, **data)  # FLOW
    module = FineTuning(model)
    trainer = pl.Trainer(max_steps=options.steps, max_epochs=-1, accumulate_grad_batches=2)
    trainer.fit(module, batches)
    losses = [loss.item() for loss in module.losses]
    print(f"loss of the first batch {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
