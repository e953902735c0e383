"""Lightning trainers that record batches and gradients, and the same by hand.

Run in the tests' own process, or by torchrun, where each rank runs all of `on_two_ranks`.
"""

import sys

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from flowdata import FlowSampler, FlowWeightedDataset
from flowdata.integrations.lightning import FlowDataModule, FlowGuard
from flowdata.losses import weighted_mean
from tests.launched import run_cases

N = 23
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(5))


def data(n=N):
    """Inputs (n, 3), of which the first feature is the sample's number, and two classes."""
    inputs = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = torch.arange(n) / 10
    return TensorDataset(inputs, torch.arange(n) % 2)


def numbers(inputs):
    return (inputs[:, 0].float() * 10).round().int().tolist()


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


class Classifier(pl.LightningModule):
    """Records the batches and the gradient of each optimiser step; the parameters stay."""

    def __init__(self, batches="weighted", pick=lambda item: item):
        super().__init__()
        self.layer, self.batches, self.pick = layer(), batches, pick
        self.steps, self.gradients, self.epochs, self.validated = [[]], [], [], 0

    def training_step(self, item, index):
        return self.loss(self.pick(item))

    def loss(self, item):
        num_items = None
        if self.batches == "weighted":
            ((inputs, targets), weights), num_items = item
        elif self.batches == "pairs":
            (inputs, targets), weights = item
        else:
            (inputs, targets), weights = item, torch.ones(len(item[0]))
        self.epochs.append((self.current_epoch, numbers(inputs)))
        self.steps[-1].append((inputs, targets, weights))
        losses = F.cross_entropy(self.layer(inputs), targets, reduction="none")
        return weighted_mean(losses, weights, num_items=num_items)

    def validation_step(self, batch, index):
        self.validated += 1

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.parameters()]))
        self.steps.append([])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def make_trainer(**options):
    options = {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False} | options
    return pl.Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )


def by_hand(batches, normalize="count"):
    """The gradient of the batches of a step as one batch, by a plain loop."""
    inputs, targets, weights = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = layer()
    losses = F.cross_entropy(model(inputs.float()), targets, reduction="none")
    total = weights.sum() if normalize == "weights" else len(weights)
    ((losses * weights).sum() / total).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_steps_by_hand(gradients, steps, normalize="count"):
    steps = [step for step in steps if step]
    assert len(gradients) == len(steps) > 0
    for gradient, step in zip(gradients, steps, strict=True):
        expected = by_hand(step, normalize)
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


def on_two_ranks():
    """Yield (name, normalize, module) after each fit of this rank."""

    def fit(name, module, data, normalize="count", **options):
        options = {"devices": 2, "strategy": "ddp", "max_epochs": 2} | options
        trainer = make_trainer(**options)
        try:
            trainer.fit(module, data)
        except ValueError as error:
            module.error = str(error)
        return name, normalize, module

    def sampler():
        return FlowSampler(WEIGHTS, drop_last=True)

    # A user's loaders are made before the first `fit`, when no process group exists yet.
    loaders = {
        (name, replaces): make()
        for replaces in (True, False)
        for name, make in {
            "sampler": lambda: DataLoader(data(), 3, sampler=sampler()),
            "batch_sampler": lambda: DataLoader(
                data(), batch_sampler=BatchSampler(sampler(), 3, drop_last=False)
            ),
            "pairs": lambda: DataLoader(FlowWeightedDataset(data(), WEIGHTS), 3, shuffle=True),
        }.items()
    }
    for (name, replaces), loader in loaders.items():
        module = Classifier("pairs" if name == "pairs" else "plain")
        options = {"use_distributed_sampler": replaces, "callbacks": [FlowGuard()]}
        yield fit((name, replaces), module, loader, **options)
    for limits in ({}, {"limit_train_batches": 3}, {"overfit_batches": 3}, {"fast_dev_run": 3}):
        for normalize in ("count", "weights"):
            batches = FlowDataModule(data(), WEIGHTS, batch_size=3, normalize=normalize)
            options = limits | {"accumulate_grad_batches": 2}
            yield fit(("module", *limits), Classifier(), batches, normalize, **options)
    drawn = FlowDataModule(data(), WEIGHTS, batch_size=3, resample=True)
    yield fit(("module", "resample"), Classifier("plain"), drawn)


def main(case, folder):
    results = [
        (name, normalize, module.gradients, module.steps, getattr(module, "error", None))
        for name, normalize, module in on_two_ranks()
    ]
    torch.save(results, folder / f"{case}.{torch.distributed.get_rank()}")


if __name__ == "__main__":
    run_cases(main, *sys.argv[1:])
