"""What loops of Accelerate compute and see, on one rank and on two, against loops by hand.

Run by torchrun, the file is its own script: each rank runs the cases that are named.
"""

import os
import sys
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from flowdata.accumulation import AccumulatedBatches
from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.checks import check_loader
from flowdata.losses import weighted_mean
from flowdata.sampler import FlowSampler
from tests.launched import launch, run_cases

accelerate = pytest.importorskip("accelerate")
PreparedBatches = pytest.importorskip("flowdata.integrations.accelerate").PreparedBatches

COUNT, BATCH = 56, 4  # 14 batches: 7 on each of two ranks
INPUTS = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(COUNT, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(COUNT, generator=torch.Generator().manual_seed(2)) ** 2
LAYOUTS = {
    "plain": {},
    "stateful": {"use_stateful_dataloader": True},
    "split": {"split_batches": True},
    "dispatch": {"dispatch_batches": True},
    "uneven": {"even_batches": False},
    "dispatch and split": {"dispatch_batches": True, "split_batches": True},
    "stateful and dispatch": {"use_stateful_dataloader": True, "dispatch_batches": True},
}
STEPS = (1, 2, 3)


@pytest.fixture(autouse=True)
def no_loader_is_left():
    """Forget the loaders of other tests: all of Accelerate's objects share one state of them."""
    accelerate.state.GradientState._reset_state()


def make_accelerator(steps=1, **layout):
    from accelerate.utils import DataLoaderConfiguration

    return accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=steps,
        dataloader_config=DataLoaderConfiguration(**layout),
    )


def samples_of_step(steps, ranks, split):
    """How many samples an optimiser step has, over all ranks."""
    return steps * BATCH * (1 if split else ranks)


# The usual loop, with PreparedBatches in it.


def train(steps, normalize="count", lr=0.0, **layout):
    """Two epochs of Accelerate's usual loop; return each step's gradient and the samples seen."""
    accelerator = make_accelerator(steps, **layout)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    gradients, batches_seen = [], []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(gradient_of(model)))
    samples = TensorDataset(INPUTS, TARGETS, torch.arange(COUNT))
    loader = DataLoader(FlowWeightedDataset(samples, WEIGHTS), BATCH)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = PreparedBatches(
        accelerator, loader, lambda item: item[1].sum() if normalize == "weights" else len(item[1])
    )
    for _ in range(2):
        for ((inputs, targets, indices), weights), num_items in batches:
            batches_seen.append(indices.tolist())
            with accelerator.accumulate(wrapped):
                losses = (wrapped(inputs)[:, 0] - targets) ** 2
                loss = weighted_mean(losses, weights, normalize=normalize, num_items=num_items)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return gradients, batches_seen


def gradient_of(model):
    return torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])


def gradients_by_hand(samples_in_step, normalize):
    """The gradient of each step of one epoch, its samples in one batch, no Accelerate."""
    torch.manual_seed(0)
    model, gradients = nn.Linear(3, 1), []
    for indices in torch.arange(COUNT).split(samples_in_step):
        model.zero_grad()
        losses = WEIGHTS[indices] * (model(INPUTS[indices])[:, 0] - TARGETS[indices]) ** 2
        items = WEIGHTS[indices].sum() if normalize == "weights" else len(indices)
        (losses.sum() / items).backward()
        gradients.append(gradient_of(model))
    return gradients


def check_gradients(gradients, samples_in_step, normalize):
    expected = 2 * gradients_by_hand(samples_in_step, normalize)  # the two epochs are alike
    assert len(gradients) == len(expected) == 2 * -(-COUNT // samples_in_step)
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("normalize", ["count", "weights"])
@pytest.mark.parametrize("steps", [*STEPS, 20])
@pytest.mark.parametrize("layout", ["plain", "stateful", "split", "dispatch"])
def test_one_rank_takes_the_steps_that_are_due(layout, steps, normalize):
    gradients, batches_seen = train(steps, normalize, **LAYOUTS[layout])
    check_gradients(gradients, samples_of_step(steps, 1, True), normalize)
    assert [index for batch in batches_seen for index in batch] == 2 * list(range(COUNT))


def run_steps():
    return {
        (layout, steps, normalize): train(steps, normalize, **LAYOUTS[layout])
        for layout, steps, normalize in product(LAYOUTS, STEPS, ("count", "weights"))
    }


def test_two_ranks_take_the_steps_that_are_due(folder):
    ranks = returned("steps", folder)
    assert len(ranks[0]) == len(LAYOUTS) * len(STEPS) * 2
    for layout, steps, normalize in ranks[0]:
        results = [rank[layout, steps, normalize] for rank in ranks]
        for gradients, _ in results:
            check_gradients(gradients, samples_of_step(steps, 2, "split" in layout), normalize)
        seen = [index for _, batches in results for batch in batches for index in batch]
        assert sorted(seen) == sorted(2 * list(range(COUNT))), layout


# What is refused.


def test_a_loader_that_accelerate_prepared_to_accumulate_names_the_adapter():
    accelerator = make_accelerator(2)
    loader = accelerator.prepare(DataLoader(TensorDataset(INPUTS), BATCH))
    for prepared in (loader, accelerate.skip_first_batches(loader, 2)):
        with pytest.raises(ValueError, match=r"accelerate\.PreparedBatches\(accelerator, loader"):
            AccumulatedBatches(prepared, 2, len)
    # Without accumulation Accelerate divides by 1, and the loop steps when it likes.
    batches = AccumulatedBatches(make_accelerator().prepare(loader), 2, len)
    make_accelerator(4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4"):
        next(iter(batches))


def test_a_loader_that_was_not_prepared_is_refused():
    plain = DataLoader(TensorDataset(INPUTS), BATCH)
    for loader in (plain, AccumulatedBatches(plain, 2, len), [1, 2]):
        with pytest.raises(TypeError, match=r"must be what accelerator.prepare returned, got \w+"):
            PreparedBatches(make_accelerator(2), loader, len)


def test_steps_that_span_two_epochs_are_refused():
    plugin = accelerate.utils.GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    loader = accelerator.prepare(DataLoader(TensorDataset(INPUTS), BATCH))
    with pytest.raises(ValueError, match="sync_with_dataloader=False lets a step begin in one"):
        PreparedBatches(accelerator, loader, len)


def make_batches(steps):
    accelerator = make_accelerator(steps)
    loader = accelerator.prepare(DataLoader(TensorDataset(INPUTS), BATCH))
    return accelerator, PreparedBatches(accelerator, loader, lambda batch: len(batch[0]))


def test_a_pass_left_within_a_step_is_refused_at_the_next_one():
    accelerator, batches = make_batches(3)
    for _ in batches:
        with accelerator.accumulate():
            break
    assert not accelerator.gradient_state.in_dataloader
    with pytest.raises(ValueError, match="stands at batch 1 of a step of 3: the last pass was"):
        next(iter(batches))
    accelerator.step = 0
    for number, _ in enumerate(batches, start=1):
        with accelerator.accumulate():
            assert accelerator.sync_gradients == (number % 3 == 0)
        if number == 6:  # at the end of a step a pass may be left
            break
    assert len(list(batches)) == 14


def test_accumulate_twice_for_a_batch_is_refused():
    accelerator, batches = make_batches(2)
    batches = iter(batches)
    next(batches)
    for _ in range(2):
        with accelerator.accumulate():
            pass
    with pytest.raises(ValueError, match=r"accelerator\.step went from 0 to 2 at one batch"):
        next(batches)


def test_a_loop_that_steps_by_itself_needs_no_accumulate():
    accelerator, batches = make_batches(3)
    steps, model = 0, nn.Linear(3, 1)
    for number, ((inputs,), num_items) in enumerate(batches, start=1):
        assert num_items * 3 == (12 if number <= 12 else 8)
        accelerator.backward(model(inputs).sum() / num_items)
        steps += number % 3 == 0 or accelerator.gradient_state.end_of_dataloader
    assert steps == 5


def test_another_loader_within_a_pass_changes_nothing():
    accelerator, batches = make_batches(2)
    other = accelerator.prepare(DataLoader(TensorDataset(INPUTS[:8]), BATCH))
    steps = []
    for _ in batches:
        with accelerator.accumulate():
            steps.append(accelerator.sync_gradients)
        assert len(list(other)) == 2  # as in an evaluation
    assert steps == 7 * [False, True]


# What a FlowSampler gives to loaders that Accelerate prepares.


def test_a_sampler_finds_its_share_wherever_it_was_made(folder):
    ranks = returned("sampler", folder)
    orders = []
    for epoch in range(2):
        sampler = FlowSampler(WEIGHTS, num_replicas=1, rank=0)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    for case in ranks[0]:
        results = [rank[case] for rank in ranks]
        lengths = {length for length, _ in results}
        assert lengths == {14 if "split" in case[1] else 7}, case
        for epoch, order in enumerate(orders):
            batches = [rank[1][epoch] for rank in results]
            assert len({len(rank) for rank in batches} | lengths) == 1
            dealt = [i for column in zip(*batches, strict=True) for part in column for i in part]
            assert dealt == order, case


def run_sampler():
    early, results = FlowSampler(WEIGHTS), {}
    assert (early.num_replicas, len(early)) == (1, COUNT)
    for layout, options in LAYOUTS.items():
        accelerator = make_accelerator(**options)
        assert accelerator.num_processes == 2
        late, explicit = FlowSampler(WEIGHTS), FlowSampler(WEIGHTS, num_replicas=1, rank=0)
        for made, sampler in {"early": early, "late": late, "explicit": explicit}.items():
            for loader_class in (DataLoader, StatefulDataLoader):
                loader = accelerator.prepare(loader_class(range(COUNT), BATCH, sampler=sampler))
                length, epochs = len(loader), []
                for epoch in range(2):
                    loader.set_epoch(epoch)
                    epochs.append([batch.tolist() for batch in loader])
                results[made, layout, loader_class.__name__] = length, epochs
    return results


def test_a_sampler_shared_twice_or_never_is_refused(folder):
    for messages in returned("refusals", folder):
        assert len(messages) == 10 - torch.cuda.is_available()
        for layout, message in messages.items():
            expected = "outside of one: give the loader to accelerator.prepare"
            if layout in LAYOUTS:
                expected = "num_replicas=2 shares of the order, which the loader prepared by Accel"
            if layout == "lengths":
                expected = "same number of batches on every rank, got [7, 6]: let its sampler drop"
            if layout == "lonely":
                expected = "one process, but 2 were launched, each of which would train alone"
            # Rank 0 alone draws where batches are dispatched; the others learn it from its end.
            assert expected in message or (message == "" and "dispatch" in layout), (
                layout,
                message,
            )


def test_the_launcher_of_accelerate_takes_the_steps_that_are_due(tmp_path):
    launcher = ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch(__name__, tmp_path, ["launcher"], launcher)
    for gradients, _ in returned("launcher", tmp_path):
        check_gradients(gradients, samples_of_step(2, 2, False), "count")


def run_launcher():
    return train(2)


def run_refusals():
    def message_of(draw):
        try:
            draw()
        except ValueError as error:
            return str(error)
        return ""

    messages = {}
    for layout, options in LAYOUTS.items():
        accelerator = make_accelerator(**options)
        rank = accelerator.process_index
        sampler = FlowSampler(WEIGHTS, num_replicas=2, rank=rank)
        loader = accelerator.prepare(DataLoader(range(COUNT), BATCH, sampler=sampler))
        messages[layout] = message_of(lambda loader=loader: check_loader(loader))
        if "dispatch" not in layout:
            assert messages[layout] == message_of(lambda loader=loader: next(iter(loader)))
    messages["plain loader"] = message_of(lambda: list(FlowSampler(WEIGHTS)))
    accelerator = make_accelerator(2, even_batches=False)
    uneven = accelerator.prepare(DataLoader(TensorDataset(INPUTS[:52]), BATCH))
    messages["lengths"] = message_of(lambda: list(PreparedBatches(accelerator, uneven, len)))
    accelerator.state._reset_state(reset_partial_state=True)
    if not torch.cuda.is_available():
        lonely = accelerate.Accelerator()  # as launched ranks are on CPUs without cpu=True
        loader = lonely.prepare(DataLoader(TensorDataset(INPUTS), BATCH))
        messages["lonely"] = message_of(lambda: PreparedBatches(lonely, loader, len))
    return messages


@pytest.mark.parametrize("layout", ["stateful", "stateful and dispatch"])
def test_a_stateful_loader_goes_on_at_the_end_of_a_step(layout):
    def build():
        accelerator = make_accelerator(2, **LAYOUTS[layout])
        sampler = FlowSampler(WEIGHTS, seed=3)
        loader = accelerator.prepare(StatefulDataLoader(range(COUNT), BATCH, sampler=sampler))
        return loader, PreparedBatches(accelerator, loader, len)

    loader, batches = build()
    loader.set_epoch(1)
    whole = [batch.tolist() for batch, _ in batches]
    loader, batches = build()
    loader.set_epoch(1)
    for number, _ in enumerate(batches, start=1):
        if number == 6:
            state = loader.state_dict()
            break
    loader, batches = build()
    loader.load_state_dict(state)
    loader.set_epoch(1)
    assert len(loader) == 14
    rest = list(batches)
    assert [batch.tolist() for batch, _ in rest] == whole[6:]
    assert [items.item() for _, items in rest] == 8 * [2 * BATCH / 2]


def test_the_schedule_and_the_first_batches_that_are_skipped_keep_to_the_steps():
    accelerator = make_accelerator(3)
    optimizer = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(TensorDataset(INPUTS), BATCH)
    optimizer, schedule, loader = accelerator.prepare(optimizer, schedule, loader)
    skipped = accelerate.skip_first_batches(loader, 6)
    batches = PreparedBatches(accelerator, skipped, lambda batch: len(batch[0]))
    items = []
    for _, num_items in batches:
        with accelerator.accumulate():
            items.append(3 * num_items.item())
            optimizer.step()
            schedule.step()
    assert items == pytest.approx(6 * [12] + 2 * [8])
    assert schedule.get_last_lr() == [1 / 4]


# Ranks.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two ranks have left what each case returned."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(__name__, folder, ["steps", "sampler", "refusals"])
    return folder


def returned(case, folder):
    return [torch.load(folder / f"{case}.{rank}") for rank in range(2)]


def run(case, folder):
    """Run a case on one rank, and save what it returns."""
    torch.save(globals()[f"run_{case}"](), folder / f"{case}.{os.environ['RANK']}")


if __name__ == "__main__":
    run_cases(run, *sys.argv[1:])
