"""FLOW in TRL's SFTTrainer, with samples packed.

    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The lines marked FLOW are the difference to a plain SFTTrainer, whose own lines stand beside them.
"""

from __future__ import annotations

import small
from trl import SFTConfig

from flowdata import LossScorer
from flowdata.integrations.trl import FlowSFTTrainer


def main(argv: list[str] | None = None) -> list[float]:
    """Fine-tune, and return the losses that the trainer logged."""
    options = small.parser(__doc__).parse_args(argv)
    model, tokenizer, dataset = small.load(options)
    config = SFTConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=1,
        packing=True,
        max_length=512,
        learning_rate=1e-4,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    scores = LossScorer(model).score(dataset, store=f"{options.output}/scores")  # FLOW
    trainer = FlowSFTTrainer(  # FLOW  plain: trainer = SFTTrainer(
        model,
        config,
        train_dataset=dataset,
        processing_class=tokenizer,
        scores=scores,  # FLOW
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
