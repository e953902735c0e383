"""FLOW in the Hugging Face Trainer.

    python examples/hf_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The lines marked FLOW are the difference to a plain Trainer, whose own lines stand beside them.
"""

from __future__ import annotations

import small
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from flowdata import LossScorer
from flowdata.integrations.transformers import FlowTrainer


def main(argv: list[str] | None = None) -> list[float]:
    """Fine-tune, and return the losses that the Trainer logged."""
    options = small.parser(__doc__).parse_args(argv)
    model, tokenizer, dataset = small.load(options)
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    scores = LossScorer(model).score(dataset, store=f"{options.output}/scores")  # FLOW
    trainer = FlowTrainer(  # FLOW  plain: trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        scores=scores,  # FLOW
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
