"""What real training loops see of a FlowSampler on two ranks, counted sample by sample.

Run by torchrun, the file is its own script: every rank calls the loops that are named.
"""

import importlib.util
import json
import os
import pickle
import sys
from itertools import islice

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flowdata.sampler import FlowSampler
from tests.launched import TORCHRUN, launch, run_cases

COUNT, EPOCHS, BATCH = 96, 2, 4
WEIGHTS = torch.rand(60, generator=torch.Generator().manual_seed(0)) ** 2


class Numbers(Dataset):
    """Samples that carry their index, so that a loop can tell what it was given."""

    def __len__(self):
        return len(WEIGHTS)

    def __getitem__(self, index):
        return {"x": torch.ones(3) * index, "labels": torch.tensor(1.0), "index": index}


class Recorder(nn.Module):
    """A linear model that writes down which samples it was trained on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.batches_seen = []

    def forward(self, x, labels, index):
        if self.training:
            self.batches_seen.append(index.tolist())
        return {"loss": nn.functional.mse_loss(self.linear(x / 60)[:, 0], labels)}


def expected(epochs=EPOCHS, count=COUNT):
    sampler = FlowSampler(WEIGHTS, count, num_replicas=1, rank=0)
    orders = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    return orders


def interleaved(ranks):
    """The global order again, where rank r holds every R-th index."""
    return [index for column in zip(*ranks, strict=True) for index in column]


def dealt_in_batches(ranks):
    """The global order again, where rank r holds every R-th batch."""
    return [index for column in zip(*ranks, strict=True) for batch in column for index in batch]


def flat(batches):
    return [index for batch in batches for index in batch]


LOOPS = ["ddp", "early", "nodes", "stateful", "accelerate", "trainer", "trainer_resumed"]
LOOPS += ["lightning", *(["ignite"] if importlib.util.find_spec("ignite") else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two ranks have left what they recorded in each loop."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(__name__, folder, LOOPS)
    return folder


def recorded(loop, folder, processes=2):
    return [json.loads((folder / f"{loop}-{r}.json").read_text()) for r in range(processes)]


def run_ddp(folder):
    """Plain PyTorch: DistributedDataParallel, one sampler on each rank."""
    dist.init_process_group("gloo")
    model = Recorder()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    sampler = FlowSampler(WEIGHTS, COUNT + 1, drop_last=True)
    assert (sampler.num_replicas, sampler.rank) == (2, dist.get_rank())
    loader = DataLoader(Numbers(), batch_size=BATCH, sampler=sampler, num_workers=1)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            wrapped(**batch)["loss"].backward()
            optimizer.step()
    return model.batches_seen


def run_early(folder):
    """Plain PyTorch with a sampler that was made, and asked for its length, before the group."""
    sampler = FlowSampler(WEIGHTS, COUNT)
    lengths = [len(sampler)]
    loader = DataLoader(Numbers(), batch_size=BATCH, sampler=sampler, num_workers=1)
    dist.init_process_group("gloo")
    lengths.append(len(sampler))
    batches_seen = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        batches_seen += [batch["index"].tolist() for batch in loader]
    state, copy = sampler.state_dict(), pickle.loads(pickle.dumps(sampler))
    dist.barrier()
    dist.destroy_process_group()
    lengths += [len(sampler), len(copy)]
    assert sampler.state_dict() == state
    assert (copy.num_replicas, state["position"]) == (2, COUNT)
    return batches_seen, lengths


def run_nodes(folder):
    """torchdata.nodes, its sampler made before the group."""
    from torchdata.nodes import Batcher, Loader, SamplerWrapper

    loader = Loader(Batcher(SamplerWrapper(FlowSampler(WEIGHTS, COUNT)), BATCH))
    dist.init_process_group("gloo")
    return [batch for _ in range(EPOCHS) for batch in loader]


def run_ignite(folder):
    """pytorch-ignite leaves a DistributedSampler as it is, and divides the batch size."""
    import ignite.distributed as idist

    sampler = FlowSampler(WEIGHTS, COUNT)
    with idist.Parallel(backend="gloo"):
        loader = idist.auto_dataloader(Numbers(), batch_size=2 * BATCH, sampler=sampler)
        batches_seen = []
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            batches_seen += [batch["index"].tolist() for batch in loader]
        return batches_seen


def run_stateful(folder):
    """StatefulDataLoader with workers: the first call stops mid-epoch, the next goes on."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    dist.init_process_group("gloo")
    sampler = FlowSampler(WEIGHTS, COUNT)
    sampler.set_epoch(1)
    loader = StatefulDataLoader(Numbers(), batch_size=BATCH, sampler=sampler, num_workers=2)
    checkpoint, batches = folder / "loader.pt", 5
    if checkpoint.exists():
        loader.load_state_dict(torch.load(checkpoint))
        batches = None
    batches_seen = [batch["index"].tolist() for batch in islice(iter(loader), batches)]
    if dist.get_rank() == 0:
        torch.save(loader.state_dict(), checkpoint)
    return batches_seen


ALIVE = []  # what would free gloo's threads, which waits for them for ever now and then


def run_accelerate(folder):
    """Accelerate shards the batches of one global sampler."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    sampler = FlowSampler(WEIGHTS, COUNT, num_replicas=1, rank=0)
    model = Recorder()
    wrapped, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        DataLoader(Numbers(), batch_size=BATCH, sampler=sampler),
    )
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(wrapped(**batch)["loss"])
            optimizer.step()
    ALIVE.append(wrapped)
    accelerator.end_training()
    return model.batches_seen


def run_trainer(folder):
    """Hugging Face Trainer, straight through."""
    trainer = build_trainer(folder / "trainer")
    trainer.train()
    return trainer.model.batches_seen


def run_trainer_resumed(folder):
    """Hugging Face Trainer, stopped within the second epoch and resumed."""
    from transformers import TrainerCallback

    class SetEpoch(TrainerCallback):
        """Resumed on several ranks, the Trainer does not reach the sampler by itself."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            trainer.sampler.set_epoch(int(state.epoch))

    build_trainer(folder / "resumed", max_steps=17, save_steps=17).train()
    trainer = build_trainer(folder / "resumed")
    trainer.add_callback(SetEpoch())
    trainer.train(resume_from_checkpoint=True)
    return trainer.model.batches_seen


def build_trainer(folder, **options):
    from transformers import Trainer, TrainingArguments

    class Sampling(Trainer):
        sampler = FlowSampler(WEIGHTS, COUNT, num_replicas=1, rank=0)

        def _get_train_sampler(self, train_dataset=None):
            return self.sampler

    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="steps",
        disable_tqdm=True,
        **options,
    )
    return Sampling(Recorder(), arguments, train_dataset=Numbers())


def run_lightning(folder):
    """Lightning leaves a DistributedSampler alone and sets its epoch."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Recorder()

        def train_dataloader(self):
            sampler = FlowSampler(WEIGHTS, COUNT, drop_last=True)
            return DataLoader(Numbers(), batch_size=BATCH, sampler=sampler)

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Module()
    lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module)
    return module.model.batches_seen


def test_ddp_ranks_share_the_order(folder):
    ranks = recorded("ddp", folder)
    whole = [order[:COUNT] for order in expected(count=COUNT + 1)]
    assert interleaved([flat(rank) for rank in ranks]) == flat(whole)
    assert flat(whole) != flat(expected())


def test_a_sampler_made_before_the_group_takes_its_share(folder):
    ranks = recorded("early", folder)
    assert interleaved([flat(batches) for batches, _ in ranks]) == flat(expected())
    for _, lengths in ranks:
        assert lengths == [COUNT, COUNT // 2, COUNT // 2, COUNT // 2]


def test_nodes_share_the_order(folder):
    assert interleaved([flat(rank) for rank in recorded("nodes", folder)]) == flat(expected())


def test_ignite_shares_the_order(folder):
    pytest.importorskip("ignite")
    ranks = recorded("ignite", folder)
    assert interleaved([flat(rank) for rank in ranks]) == flat(expected())


def test_a_stateful_loader_on_two_ranks_goes_on_with_one(folder):
    first = recorded("stateful", folder)
    launch(__name__, folder, ["stateful"], (*TORCHRUN[:2], "--nproc-per-node=1"))
    second = recorded("stateful", folder, processes=1)
    assert [len(flat(rank)) for rank in first] == [20, 20]
    assert interleaved([flat(rank) for rank in first]) + flat(second[0]) == expected()[1]


def test_accelerate_deals_out_the_batches_of_the_order(folder):
    assert dealt_in_batches(recorded("accelerate", folder)) == flat(expected())


def test_the_hugging_face_trainer_sees_the_order(folder):
    assert dealt_in_batches(recorded("trainer", folder)) == flat(expected())


def test_a_resumed_hugging_face_trainer_sees_the_rest_of_the_order(folder):
    whole = flat(expected())
    assert dealt_in_batches(recorded("trainer_resumed", folder)) == whole[17 * 2 * BATCH :]


def test_lightning_ranks_share_the_order(folder):
    ranks = recorded("lightning", folder)
    assert interleaved([flat(rank) for rank in ranks]) == flat(expected())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_plain_loader_sees_the_order(num_workers):
    sampler = FlowSampler(WEIGHTS, COUNT)
    loader = DataLoader(Numbers(), batch_size=BATCH, sampler=sampler, num_workers=num_workers)
    for epoch, order in enumerate(expected()):
        sampler.set_epoch(epoch)
        assert flat(batch["index"].tolist() for batch in loader) == order


def run(loop, folder):
    """Record what one rank's loop sees."""
    batches_seen = globals()[f"run_{loop}"](folder)
    (folder / f"{loop}-{os.environ['RANK']}.json").write_text(json.dumps(batches_seen))


def main():
    if sys.argv[3:] == LOOPS:  # which would import these each for itself
        for module in ("accelerate", "lightning", "transformers.trainer"):
            importlib.import_module(module)
    run_cases(run, *sys.argv[1:])


if __name__ == "__main__":
    main()
