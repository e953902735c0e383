"""Which samples a Trainer of two ranks is given."""

import tempfile

import torch
from torch import nn
from transformers import TrainingArguments

from flowdata import FlowSampler, LossScorer
from flowdata.integrations.transformers import FlowTrainer
from flowdata.streaming import FlowWeightedIterable

N = 16
SAMPLES = [{"x": torch.full((1,), float(i)), "labels": torch.tensor(0.5)} for i in range(N)]
WEIGHTS = torch.linspace(0.1, 1, N)
SHARING = {
    "shards": {},
    "dispatched": {"dispatch_batches": True},
    "split": {"split_batches": True},
}


class Line(nn.Module):
    """Remembers which samples it was given in training."""

    def __init__(self):
        super().__init__()
        self.layer, self.samples = nn.Linear(1, 1), []

    def forward(self, x, labels=None):
        if self.training:
            self.samples += x.flatten().tolist()
        outputs = self.layer(x).squeeze(-1)
        loss = None if labels is None else (outputs - labels).square().mean()
        return {"loss": loss, "logits": outputs}


def train(sharing, dataset, **options):
    model = Line()
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        max_steps=8 if sharing == "split" else 4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        accelerator_config=SHARING[sharing],
    )
    FlowTrainer(model, arguments, train_dataset=dataset, **options).train()
    return model.samples


def stream(num_replicas=1, rank=0):
    return FlowWeightedIterable(
        SAMPLES,
        LossScorer(Line(), progress=False),
        window=8,
        layout="dict",
        num_replicas=num_replicas,
        rank=rank,
    )


def orders():
    rank = torch.distributed.get_rank()
    results = {}
    for sharing in SHARING:
        results["resampled", sharing] = train(sharing, SAMPLES, scores=WEIGHTS, resample=True)
        results["stream", sharing] = train(sharing, stream())
        try:
            train(sharing, stream(2, rank))
        except ValueError as error:
            results["sharded stream", sharing] = str(error)
    results["order"] = [float(i) for i in FlowSampler(WEIGHTS, num_replicas=1, rank=0, seed=42)]
    return results
