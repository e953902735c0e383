"""Train one step by an adapter and record its gradient.

Run in this process by the single-rank tests, and by torchrun for test_two_ranks.py.
"""

import importlib
import importlib.util
import os
import sys
import tempfile

import torch
from torch.utils.data import DataLoader, DistributedSampler

from flowdata.accumulation import AccumulatedBatches
from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset
from flowdata.losses import causal_lm_loss, count_items
from tests.integrations import order_worker, tiny
from tests.launched import run_cases


def hf_arguments(cls, batch_size, steps, **options):
    return cls(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        max_steps=options.pop("max_steps", 1),
        optim="sgd",
        learning_rate=0.0,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )


def record_gradients(gradients):
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(tiny.flat_gradient(model))

    return Recorder()


def trainer(batch_size, steps, normalize="count", **options):
    from transformers import TrainingArguments

    from flowdata.integrations.transformers import FlowTrainer

    gradients = []
    FlowTrainer(
        options.pop("model", None) or tiny.make_model(),
        hf_arguments(TrainingArguments, batch_size, steps),
        train_dataset=tiny.make_samples(),
        scores=tiny.make_weights(),
        data_collator=tiny.collate,
        normalize=normalize,
        callbacks=[record_gradients(gradients)],
        **options,
    ).train()
    return gradients[0]


def sft(batch_size, steps, normalize="count", token_weights=False, config=(), **options):
    from trl import SFTConfig

    from flowdata.integrations.trl import FlowSFTTrainer

    gradients, samples = [], tiny.make_samples()
    if token_weights:
        weights = [w.tolist() for w in tiny.make_token_weights(samples)]
        data = {"train_dataset": tiny.as_hf_dataset(samples, weight=weights)}
    else:
        data = {"train_dataset": tiny.as_hf_dataset(samples), "scores": tiny.make_weights()}
    FlowSFTTrainer(
        options.pop("model", None) or tiny.make_model(),
        hf_arguments(SFTConfig, batch_size, steps, bf16=False, **dict(config)),
        processing_class=tiny.make_tokenizer(),
        normalize=normalize,
        callbacks=[record_gradients(gradients)],
        **data,
        **options,
    ).train()
    return gradients[0]


def own_scores(batch_size, steps, normalize):
    """The losses that a trainer makes of what it feeds, on every rank, and its gradient."""
    from trl import SFTConfig

    from flowdata.integrations.trl import FlowSFTTrainer

    gradients, folder = [], [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    trainer = FlowSFTTrainer(
        tiny.make_model(),
        hf_arguments(SFTConfig, batch_size, steps, bf16=False),
        train_dataset=tiny.as_hf_dataset(tiny.make_samples()),
        scores="auto",
        store=folder[0] + "/scores",
        normalize=normalize,
        processing_class=tiny.make_tokenizer(),
        callbacks=[record_gradients(gradients)],
    )
    trainer.train()
    return trainer.scores.losses, gradients[0]


def lightning(batch_size, steps, normalize="count"):
    import lightning.pytorch as pl

    from flowdata.integrations.lightning import FlowDataModule

    gradients = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny.make_model()

        def training_step(self, item, index):
            (batch, weights), num_items = item
            logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
            options = {"normalize": normalize, "num_items": num_items}
            return causal_lm_loss(logits, batch["labels"], weights, **options)

        def on_before_optimizer_step(self, optimizer):
            gradients.append(tiny.flat_gradient(self.model))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(
        Module(),
        FlowDataModule(
            tiny.make_samples(),
            tiny.make_weights(),
            batch_size=batch_size,
            collate_fn=tiny.collate,
            normalize=normalize,
        ),
    )
    return gradients[0]


def loop(batch_size, steps, normalize, prepare):
    """A plain loop; `prepare` wraps the model and says how this rank's batches are loaded."""
    samples = FlowWeightedDataset(tiny.make_samples(), tiny.make_weights())
    model, loader = prepare(tiny.make_model(), samples, batch_size)
    batches = AccumulatedBatches(
        loader, steps, lambda item: count_items(item[0]["labels"], item[1], normalize=normalize)
    )
    for (batch, weights), num_items in batches:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        options = {"normalize": normalize, "num_items": num_items}
        causal_lm_loss(logits, batch["labels"], weights, **options).backward()
    gradients = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients])


def collated(samples, batch_size, sampler=None):
    collate = WeightedCollator(tiny.collate)
    return DataLoader(samples, batch_size, sampler=sampler, collate_fn=collate)


def plain(batch_size, steps, normalize="count"):
    return loop(batch_size, steps, normalize, lambda m, s, b: (m, collated(s, b)))


def ddp(batch_size, steps, normalize="count"):
    def prepare(model, samples, size):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        return wrapped, collated(samples, size, DistributedSampler(samples))

    return loop(batch_size, steps, normalize, prepare)


def fsdp2(batch_size, steps, normalize="count"):
    def prepare(model, samples, size):
        mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in model.model.layers:
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        return model, collated(samples, size, DistributedSampler(samples))

    return loop(batch_size, steps, normalize, prepare)


def accelerate(batch_size, steps, normalize="count"):
    from accelerate import Accelerator

    def prepare(model, samples, size):
        return Accelerator(cpu=True).prepare(model, collated(samples, size))

    return loop(batch_size, steps, normalize, prepare)


def own(batch_size, steps, normalize="count"):
    """The Trainer with the model's own loss, one sample at a time."""
    return trainer(batch_size, steps, normalize, loss="own")


def lora():
    """A model whose adapters have moved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(tiny.make_model(), config)


HELD = {"kl_to_reference": 0.4, "reference": "base"}


def held_trainer(batch_size, steps, normalize="count"):
    """The Trainer on adapters that are held to their base."""
    return trainer(batch_size, steps, normalize, model=lora(), **HELD)


def held_sft(batch_size, steps, normalize="count"):
    """The same of SFTTrainer."""
    config = {"gradient_checkpointing": False}
    return sft(batch_size, steps, normalize, config=config, model=lora(), **HELD)


ADAPTERS = {
    "held_trainer": held_trainer,
    "held_sft": held_sft,
    "trainer": trainer,
    "own": own,
    "sft": sft,
    "own_scores": own_scores,
    "lightning": lightning,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "accelerate": accelerate,
}


def resumed(batch_size, steps, normalize):
    """Parameters after two epochs at once, and after one that went on from its checkpoint."""
    from transformers import TrainingArguments

    from flowdata.integrations.transformers import FlowTrainer

    def run(folder, resample, resume=None):
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="steps",
            save_steps=6,  # of 8: in the middle of the second epoch
            dataloader_pin_memory=False,
        )
        trainer = FlowTrainer(
            tiny.make_model(),
            arguments,
            train_dataset=tiny.make_samples(),
            scores=tiny.make_weights(),
            data_collator=tiny.collate,
            resample=resample,
            normalize="count" if resample else normalize,
        )
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    parameters = {}
    for resample in (False, True):
        folder = [tempfile.mkdtemp()]
        torch.distributed.broadcast_object_list(folder)
        whole = run(folder[0], resample)
        torch.distributed.barrier()
        checkpoint = f"{folder[0]}/checkpoint-6"
        parameters[resample] = whole, run(folder[0], resample, checkpoint)
    return parameters


ADAPTERS["resumed"] = resumed


SIZES = {"held_trainer": (16, 4), "held_sft": (16, 4), "own_scores": (4,), "resumed": (2,)}


def cases():
    """Adapters, and "order", that can run here."""
    has_trl = importlib.util.find_spec("trl") is not None
    needing = ("sft", "held_sft", "own_scores")
    return [*(name for name in ADAPTERS if has_trl or name not in needing), "order"]


def run(case, folder):
    torch.distributed.init_process_group("gloo")
    if case == "order":
        results = order_worker.orders()
    else:
        results = {
            (size, normalize): ADAPTERS[case](size, tiny.N // 2 // size, normalize)
            for size in SIZES.get(case, (16, 4, 1))
            for normalize in tiny.NORMALIZE
        }
    torch.save(results, folder / f"{case}.{torch.distributed.get_rank()}")


def main():
    modules = ["peft", "flowdata.integrations.transformers", "flowdata.integrations.lightning"]
    for module in modules + ["flowdata.integrations.trl"] * ("sft" in cases()):
        importlib.import_module(module)
    run_cases(run, *sys.argv[1:])


if __name__ == "__main__":
    main()
