"""A step's denominator under whatever a Lightning trainer does, against a loop by hand."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from flowdata import FlowSampler, FlowWeightedDataset
from flowdata.accumulation import AccumulatedBatches
from flowdata.integrations.lightning import FlowDataModule, FlowGuard
from flowdata.losses import weighted_mean
from tests.integrations import lightning_runs
from tests.integrations.lightning_runs import (
    WEIGHTS,
    Classifier,
    N,
    assert_steps_by_hand,
    by_hand,
    data,
    make_trainer,
    numbers,
)
from tests.launched import launch

TRAINERS = {
    "plain": {},
    "limit": {"limit_train_batches": 3},
    "share": {"limit_train_batches": 0.7},
    "overfit": {"overfit_batches": 3},
    "overfit share": {"overfit_batches": 0.5},
    "fast": {"fast_dev_run": 5},
    "one batch": {"fast_dev_run": True},
    "max_steps": {"max_steps": 3, "max_epochs": -1},
    "validated": {"val_check_interval": 3},
}


def run(module, batches=None, **options):
    make_trainer(**options).fit(module, batches or flow_data())
    return module


def flow_data(cls=FlowDataModule, **options):
    return cls(data(), WEIGHTS, **{"batch_size": 3} | options)


@pytest.mark.parametrize("normalize", ["count", "weights"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_step_is_that_of_its_batches_by_hand(name, steps, normalize):
    batches = flow_data(normalize=normalize, val_dataloaders=DataLoader(data(), 8))
    options = TRAINERS[name] | {"accumulate_grad_batches": steps}
    module = run(Classifier(), batches, **options)
    assert_steps_by_hand(module.gradients, module.steps, normalize)
    assert module.validated > 0


def test_a_schedule_of_accumulation_is_followed():
    schedule = GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})
    module = run(Classifier(), max_epochs=4, callbacks=[schedule])
    assert [len(step) for step in module.steps if step] == [1] * 8 + [3, 3, 2] + [2] * 8
    assert_steps_by_hand(module.gradients, module.steps)


def test_a_change_of_accumulation_within_a_step_is_refused():
    class Change(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            trainer.accumulate_grad_batches = 4

    with pytest.raises(ValueError, match="Change it between epochs alone"):
        run(Classifier(), accumulate_grad_batches=2, callbacks=[Change()])


def test_a_second_fit_and_loaders_made_anew_step_exactly():
    module, batches = Classifier(), flow_data(batch_size=4, drop_last=True)
    trainer = make_trainer(
        max_epochs=1, accumulate_grad_batches=3, reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(module, batches)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, batches)
    assert [len(step) for step in module.steps if step] == [3, 2] * 3
    assert_steps_by_hand(module.gradients, module.steps)


class Combined(FlowDataModule):
    """Beside the weighted batches comes another loader."""

    other, mode = None, "max_size_cycle"

    def train_dataloader(self):
        return CombinedLoader({"flow": super().train_dataloader(), "other": self.other}, self.mode)


def combined(mode, other):
    batches = flow_data(Combined)
    batches.mode, batches.other = mode, other
    return batches


def pick_flow(item):
    return item["flow"]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("size", [5, N, 60])
@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_beside_another_loader_each_step_is_exact(mode, size, steps):
    batches = combined(mode, DataLoader(data(size), 3))
    module = run(Classifier(pick=pick_flow), batches, accumulate_grad_batches=steps)
    assert_steps_by_hand(module.gradients, module.steps)
    shortest = mode == "min_size" and size < N
    assert len(module.epochs) == 2 * (
        2 if shortest else max(8, -(-size // 3) * (mode != "min_size"))
    )


def test_a_loader_that_is_exhausted_first_ends_its_step():
    class Pair(Classifier):
        def training_step(self, item, index):
            if item["flow"] is None:  # the other loader still has batches
                return 0 * self.layer.weight.sum() + 0 * self.layer.bias.sum()
            return self.loss(item["flow"])

    module = run(Pair(), combined("max_size", DataLoader(data(30), 3)), accumulate_grad_batches=3)
    steps = [step for step in module.steps if step]
    assert [len(step) for step in steps] == [3, 3, 2] * 2  # the steps end after 3, 6, 9, 10 batches
    filled = [g for g in module.gradients if g.any()]
    assert_steps_by_hand(filled, steps)


def test_two_weighted_loaders_have_each_their_own_denominator():
    class Two(FlowDataModule):
        def train_dataloader(self):
            second = FlowDataModule(data(10), WEIGHTS[:10], batch_size=2)
            second.trainer = self.trainer
            return {"first": super().train_dataloader(), "second": second.train_dataloader()}

    class Sum(Classifier):
        def training_step(self, item, index):
            return self.loss(item["first"]) + self.loss(item["second"])

    module = run(Sum(), flow_data(Two), accumulate_grad_batches=3)
    # The batches of the two loaders alternate; the second begins again after 5 batches.
    first = [step[::2] for step in module.steps if step]
    second = [step[1::2] for step in module.steps if step]
    for gradient, one, other in zip(module.gradients, first, second, strict=True):
        torch.testing.assert_close(gradient, by_hand(one) + by_hand(other), rtol=1e-5, atol=1e-7)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(9))


@pytest.mark.parametrize(
    ("mode", "steps", "limit"),
    [("min_size", 2, 1.0), ("max_size_cycle", 1, 1.0), ("max_size_cycle", 2, 1.0)],
)
def test_a_loader_without_length_beside_it_is_refused(mode, steps, limit):
    batches = combined(mode, DataLoader(Endless(), 3))
    with pytest.raises(ValueError, match="has no length"):
        run(Classifier(pick=pick_flow), batches, accumulate_grad_batches=steps)


def test_a_limit_gives_a_loader_without_length_one():
    batches = combined("max_size_cycle", DataLoader(Endless(), 3))
    options = {"limit_train_batches": 5, "accumulate_grad_batches": 2}
    module = run(Classifier(pick=pick_flow), batches, **options)
    assert [len(step) for step in module.steps if step] == [2, 2, 1] * 2
    assert_steps_by_hand(module.gradients, module.steps)


class Manual(Classifier):
    """Steps by hand after every `every` batches and at an epoch's end, or where `steps_at` says."""

    def __init__(self, every=1, steps_at=None):
        super().__init__()
        self.automatic_optimization, self.every = False, every
        self.steps_at = steps_at or self.ends_window

    def ends_window(self, index):
        return (index + 1) % self.every == 0 or self.trainer.is_last_batch

    def training_step(self, item, index):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(item))
        if self.steps_at(index):
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("limit", [1.0, 5])
@pytest.mark.parametrize("every", [None, 1, 3])
def test_manual_optimisation_is_exact_once_it_says_how_it_steps(every, limit):
    batches = flow_data(accumulate_grad_batches=every)
    module = run(Manual(every or 1), batches, limit_train_batches=limit)
    assert_steps_by_hand(module.gradients, module.steps)


def test_manual_accumulation_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="made no optimiser step after batch 0"):
        run(Manual(every=2))
    with pytest.raises(ValueError, match="is for manual optimisation"):
        run(Classifier(), flow_data(accumulate_grad_batches=2))


ELSEWHERE = {
    "once": (None, lambda index: index == 0, "no optimiser step after batch 1 of", 1),
    "every batch": (3, lambda index: True, "an optimiser step after batch 0 of", 0),
    "at a start": (3, lambda index: index % 3 == 0, "an optimiser step after batch 0 of", 0),
    "more often": (3, lambda index: index % 2 == 1, "an optimiser step after batch 1 of", 0),
    "less often": (3, lambda index: (index + 1) % 6 == 0, "no optimiser step after batch 2 of", 0),
    "but at the end": (3, lambda index: (index + 1) % 3 == 0, "no optimiser step after batch 7", 2),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_manual_optimisation_that_steps_elsewhere_than_was_counted_is_refused(name):
    said, steps_at, message, num_right = ELSEWHERE[name]
    module = Manual(steps_at=steps_at)
    with pytest.raises(ValueError, match=message):
        run(module, flow_data(accumulate_grad_batches=said))
    gradients, steps = module.gradients, module.steps
    if num_right:
        assert_steps_by_hand(gradients[:num_right], steps[:num_right])
    assert len(gradients) - num_right <= 1  # one wrong step is taken before it can be seen
    for gradient, step in zip(gradients[num_right:], steps[num_right:], strict=False):
        assert (gradient / by_hand(step)).median() == pytest.approx(len(step) / 3, abs=0.01)


def test_a_run_that_ends_without_its_last_step_says_so(caplog):
    steps_at = ELSEWHERE["but at the end"][1]
    module = run(Manual(steps_at=steps_at), flow_data(accumulate_grad_batches=3), max_epochs=1)
    assert "made no optimiser step after batch 7" in caplog.text
    assert_steps_by_hand(module.gradients, module.steps[:2])
    caplog.clear()
    run(Manual(3), flow_data(accumulate_grad_batches=3), max_steps=1)  # stops within no step
    assert "optimiser step" not in caplog.text


class Pair(Manual):
    """Two optimisers, each of which steps as often as a critic does."""

    def training_step(self, item, index):
        self.manual_backward(self.loss(item))
        if self.steps_at(index):
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.step()
            self.zero_grad()

    def on_before_optimizer_step(self, optimizer):
        if self.steps[-1]:
            super().on_before_optimizer_step(optimizer)

    def configure_optimizers(self):
        parameters = self.layer.weight, self.layer.bias
        return [torch.optim.SGD([each], lr=0.0) for each in parameters]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", TRAINERS)
def test_several_steps_of_several_optimisers_are_exact(name, every, caplog):
    options = {"accumulate_grad_batches": every, "val_dataloaders": DataLoader(data(), 8)}
    module = run(Pair(every), flow_data(**options), **TRAINERS[name])
    assert_steps_by_hand(module.gradients, module.steps)
    assert "optimiser step" not in caplog.text


def test_manual_optimisation_may_leave_out_a_batch_and_the_rest_of_an_epoch(caplog):
    class Leaves(Manual):
        def training_step(self, item, index):
            if index == 1:
                self.zero_grad()
                self.optimizers().step()
            else:
                super().training_step(item, index)

        def on_before_optimizer_step(self, optimizer):
            if self.steps[-1]:
                super().on_before_optimizer_step(optimizer)

        def on_train_batch_start(self, batch, index):
            return -1 if index == 4 else None

    module = run(Leaves())
    assert [len(step) for step in module.steps if step] == [1] * 6  # batches 0, 2 and 3, twice
    assert_steps_by_hand(module.gradients, module.steps)
    assert "optimiser step" not in caplog.text


def test_a_training_step_that_fetches_by_itself_is_refused():
    class Fetching(Classifier):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(ValueError, match="let it take a batch"):
        run(Fetching())


def test_a_strategy_that_accumulates_by_itself_is_refused():
    class Accumulating(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    options = {"strategy": Accumulating("cpu"), "accelerator": "auto"}
    with pytest.raises(ValueError, match="Accumulating accumulates gradients by itself"):
        run(Classifier(), accumulate_grad_batches=2, **options)
    module = run(Classifier(), **options)
    assert_steps_by_hand(module.gradients, module.steps)


@pytest.mark.parametrize("resample", [False, True])
def test_whoever_overfits_sees_the_same_batches_in_each_epoch(resample):
    module = Classifier("plain" if resample else "weighted")
    run(module, flow_data(resample=resample), overfit_batches=3)
    rows = [row for _, row in module.epochs]
    assert rows[:3] == rows[3:]
    if resample:
        assert [n for row in rows[:3] for n in row] == list(FlowSampler(WEIGHTS))[:9]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_weights_and_counts_stay_exact_in_another_precision(precision):
    exact = []

    class Recording(Classifier):
        def loss(self, item):
            (_, weights), num_items = item
            exact.append((weights, num_items))
            return super().loss(item)

    count = 1001 / 3  # of bfloat16 neither this nor its sum has room for the digits
    batches = flow_data(count=lambda batch, weights: count)
    run(Recording(), batches, precision=precision, accumulate_grad_batches=3, max_epochs=1)
    weights = torch.cat([weights for weights, _ in exact])
    order = list(FlowSampler(torch.ones(N), replacement=False))
    assert weights.dtype == torch.float32
    assert type(weights) is type(exact[0][0]) is torch.Tensor
    assert torch.equal(weights, WEIGHTS[order])
    assert [num_items.item() for _, num_items in exact[:3]] == pytest.approx([1001 / 3] * 3)


def test_a_compiled_module_has_the_same_gradients():
    module = Classifier()

    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            self.compute = torch.compile(self.compute, backend="eager", fullgraph=True)

        def compute(self, inputs, targets, weights, num_items):
            losses = F.cross_entropy(self.layer(inputs), targets, reduction="none")
            return weighted_mean(losses, weights, num_items=num_items)

        def loss(self, item):
            ((inputs, targets), weights), num_items = item
            self.steps[-1].append((inputs, targets, weights))
            return self.compute(inputs, targets, weights, num_items)

    inside = run(Compiled(), accumulate_grad_batches=3)
    assert_steps_by_hand(inside.gradients, inside.steps)
    make_trainer(accumulate_grad_batches=3).fit(
        torch.compile(module, backend="eager"), datamodule=flow_data()
    )
    assert_steps_by_hand(module.gradients, module.steps)


def test_the_batch_size_can_be_tuned(tmp_path):
    batches = flow_data(batch_size=1, val_dataloaders=DataLoader(data(), 8))
    trainer = make_trainer(max_steps=2, max_epochs=-1, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(
        Classifier(), datamodule=batches, mode="power", init_val=2, max_trials=2, steps_per_trial=1
    )
    assert batches.batch_size == 4


def test_validation_loaders_have_a_place_and_their_loss_is_logged():
    class Logged(Classifier):
        def validation_step(self, batch, index):
            inputs, targets = batch
            self.log("val", F.cross_entropy(self.layer(inputs), targets))

    trainer = make_trainer()
    batches = flow_data(val_dataloaders=DataLoader(data(), 8))
    trainer.fit(Logged(), batches)
    assert trainer.callback_metrics["val"] > 0
    assert trainer.validate(Logged(), datamodule=batches)[0]["val"] > 0


def test_a_validation_loader_of_the_module_is_not_dropped_in_silence(caplog):
    class Own(Classifier):
        def val_dataloader(self):
            return DataLoader(data(), 8)

    run(Own())
    assert "own val_dataloader() is not used" in caplog.text
    caplog.clear()
    run(Own(), flow_data(val_dataloaders=DataLoader(data(), 8)))
    assert "val_dataloader() is not used" not in caplog.text


class Checkpoints(ModelCheckpoint):
    """Notes how many batches had been trained on at each checkpoint."""

    def _save_checkpoint(self, trainer, filepath):
        trainer.lightning_module.marks[filepath] = len(trainer.lightning_module.epochs)
        super()._save_checkpoint(trainer, filepath)


RESUMES = {
    "every step": ({"every_n_train_steps": 1}, {}),
    "limit": ({"every_n_train_steps": 1}, {"limit_train_batches": 5}),
    "end of epoch": ({"save_on_train_epoch_end": True}, {"limit_train_batches": 5}),
    "validation": ({"save_on_train_epoch_end": False}, {"val_check_interval": 4}),
    "max_steps": ({"every_n_train_steps": 1}, {"max_steps": 9, "max_epochs": -1}),
    "workers": ({"every_n_train_steps": 4}, {"limit_train_batches": 6}),
}


def resumed(folder, make_module, make_loaders, checkpoints, **options):
    """Yield (batches after the checkpoint, those of the run that was resumed there)."""

    def go(path=None, callbacks=()):
        module, loaders = make_module(), make_loaders()
        module.marks = {}
        trainer = make_trainer(
            **{"max_epochs": 3} | options,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
        )
        trainer.fit(module, **loaders, ckpt_path=path)
        return module

    every = {"dirpath": folder, "filename": "{epoch}-{step}", "save_top_k": -1}
    whole = go(callbacks=[Checkpoints(**every, **checkpoints)])
    assert whole.marks
    for path, mark in whole.marks.items():
        yield whole.epochs[mark:], go(path).epochs


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("name", RESUMES)
def test_a_run_goes_on_where_its_checkpoint_stood(tmp_path, name, resample):
    checkpoints, options = RESUMES[name]
    runs = resumed(
        tmp_path,
        lambda: Classifier("plain" if resample else "weighted"),
        lambda: {
            "datamodule": flow_data(
                resample=resample,
                num_workers=2 if name == "workers" else 0,
                val_dataloaders=DataLoader(data(), 8),
            )
        },
        checkpoints,
        accumulate_grad_batches=1 if name == "validation" else 2,
        **options,
    )
    for expected, rows in runs:
        assert rows == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_of_ones_own_goes_on_where_its_checkpoint_stood(tmp_path, workers):
    def loaders():
        sampler = FlowSampler(WEIGHTS)
        loader = StatefulDataLoader(data(), 3, sampler=sampler, num_workers=workers)
        return {"train_dataloaders": loader, "val_dataloaders": DataLoader(data(), 8)}

    checkpoints, options = RESUMES["validation"]
    runs = resumed(tmp_path, lambda: Classifier("plain"), loaders, checkpoints, **options)
    for expected, rows in runs:
        assert rows == expected


def test_a_step_cut_by_its_checkpoint_is_exact_over_what_is_left(tmp_path):
    options = {"accumulate_grad_batches": 2, "max_epochs": 1}
    batches = flow_data(val_dataloaders=DataLoader(data(), 8))
    saved = ModelCheckpoint(dirpath=tmp_path, save_on_train_epoch_end=False, save_top_k=-1)
    trainer = make_trainer(
        **options, val_check_interval=3, callbacks=[saved], enable_checkpointing=True
    )
    trainer.fit(Classifier(), batches)
    module = Classifier()
    path = tmp_path / "epoch=0-step=1.ckpt"  # after batch 2, which is half of the second step
    make_trainer(**options).fit(module, flow_data(), ckpt_path=path)
    assert [len(step) for step in module.steps if step] == [1, 2, 2]
    assert_steps_by_hand(module.gradients, module.steps)


class Keeping(Manual):
    """Keeps its gradients from one batch to the next, whatever is in between."""

    def on_validation_model_zero_grad(self):
        pass


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_validation_within_a_window_of_manual_optimisation_must_keep_the_gradients(interval):
    options = {"accumulate_grad_batches": 3, "val_dataloaders": DataLoader(data(), 8)}
    for module in (Keeping(3), Manual(3)):
        if interval < 3 and type(module) is Manual:
            with pytest.raises(ValueError, match=f"validation after batch {interval - 1} of"):
                run(module, flow_data(**options), val_check_interval=interval)
        else:
            run(module, flow_data(**options), val_check_interval=interval)
            assert module.validated > 9
            assert_steps_by_hand(module.gradients, module.steps)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_manual_optimisation_goes_on_within_a_step_and_an_epoch(tmp_path, interval):
    saved = ModelCheckpoint(dirpath=tmp_path, save_on_train_epoch_end=False, save_top_k=-1)
    every = {"accumulate_grad_batches": 3, "val_dataloaders": DataLoader(data(), 8)}
    run(
        Keeping(3),
        flow_data(**every),
        val_check_interval=interval,
        callbacks=[saved],
        enable_checkpointing=True,
    )
    paths = sorted(tmp_path.iterdir())
    assert len(paths) > 3
    for path in paths:
        module = Keeping(3)
        make_trainer(max_epochs=3).fit(module, flow_data(**every), ckpt_path=path)
        assert_steps_by_hand(module.gradients, module.steps)


def test_a_checkpoint_of_other_batches_is_refused(tmp_path):
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3)
    options = {"enable_checkpointing": True, "max_steps": 3, "max_epochs": -1}
    make_trainer(callbacks=[saved], **options).fit(Classifier(), flow_data())
    path = saved.best_model_path
    for other, message in (({"batch_size": 4}, "Keep batch_size"), ({"seed": 1}, "has seed=0")):
        with pytest.raises(ValueError, match=message):
            make_trainer(max_epochs=1).fit(Classifier(), flow_data(**other), ckpt_path=path)


def test_each_epoch_has_an_order_of_its_own():
    for resample in (False, True):
        module = Classifier("plain" if resample else "weighted")
        run(module, flow_data(resample=resample), max_epochs=3)
        orders = [[row for epoch, row in module.epochs if epoch == number] for number in range(3)]
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_guard_refuses_a_sampler_that_lightning_replaced():
    loader = DataLoader(data(), 3, sampler=FlowSampler(WEIGHTS))
    with pytest.raises(ValueError, match="put its own sampler in the place of the FlowSampler"):
        run(Classifier("plain"), loader, overfit_batches=2, callbacks=[FlowGuard()])

    class Own(Classifier):
        def train_dataloader(self):
            return {"a": DataLoader(data(), 3, sampler=FlowSampler(WEIGHTS))}

    with pytest.raises(ValueError, match="put its own sampler in the place of the FlowSampler"):
        make_trainer(overfit_batches=2, callbacks=[FlowGuard()]).fit(Own("plain"))


def test_the_guard_refuses_counts_that_lightning_would_divide_again():
    batches = AccumulatedBatches(
        DataLoader(FlowWeightedDataset(data(), WEIGHTS), 3), 2, lambda item: len(item[1])
    )
    with pytest.raises(ValueError, match="use FlowDataModule"):
        run(Classifier(), batches, accumulate_grad_batches=2, callbacks=[FlowGuard()])


def test_the_guard_lets_sound_loaders_pass_twice():
    trainer = make_trainer(callbacks=[FlowGuard()])
    for loader in (flow_data(), flow_data()):
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(Classifier(), loader)
    assert "dataloader" not in vars(trainer.fit_loop._data_source)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What lightning_runs.py recorded on two ranks: name -> its two ranks' results."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(lightning_runs.__name__, folder, ["fits"])
    ranks = [torch.load(folder / f"fits.{rank}", weights_only=False) for rank in range(2)]
    return {(one[0], one[1]): (one, other) for one, other in zip(*ranks, strict=True)}


def draws(ranks):
    """How often each sample was seen on both ranks together, and the batches of both by step."""
    steps = [first + second for first, second in zip(*(rank[3] for rank in ranks), strict=True)]
    return Counter(n for step in steps for batch in step for n in numbers(batch[0])), steps


@pytest.mark.parametrize("normalize", ["count", "weights"])
@pytest.mark.parametrize("limit", [None, "limit_train_batches", "overfit_batches", "fast_dev_run"])
def test_two_ranks_share_the_samples_and_step_exactly(two_ranks, limit, normalize):
    ranks = two_ranks[("module", *([limit] if limit else [])), normalize]
    seen, steps = draws(ranks)
    for rank in ranks:
        assert_steps_by_hand(rank[2], steps, normalize)
    epochs = 1 if limit == "fast_dev_run" else 2
    if limit is None:  # 22 of 23 samples: the remainder of fewer samples than ranks is left out
        assert sum(seen.values()) == 2 * 22
        assert max(seen.values()) == 2
    else:
        assert sum(seen.values()) == epochs * 2 * 9
        assert max(seen.values()) <= (2 if limit == "overfit_batches" else epochs)


def two_epochs():
    """How often one rank alone would draw each sample in two epochs of 22 draws."""
    sampler, expected = FlowSampler(WEIGHTS), Counter()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected.update(list(sampler)[:22])
    return expected


def test_two_ranks_share_the_draws(two_ranks):
    assert draws(two_ranks[("module", "resample"), "count"])[0] == two_epochs()


@pytest.mark.parametrize("replaces", [True, False])
def test_loaders_made_before_fit_are_shared_by_the_ranks(two_ranks, replaces):
    assert draws(two_ranks[("sampler", replaces), "count"])[0] == two_epochs()
    if replaces:  # Lightning would draw uniformly from a batch sampler's data set
        for rank in two_ranks[("batch_sampler", True), "count"]:
            assert "put its own sampler in the place" in rank[4]
        pairs = draws(two_ranks[("pairs", True), "count"])[0]
        assert len(pairs) == N
        assert sum(pairs.values()) == 2 * 24  # the sampler of Lightning repeats one sample
    else:
        assert draws(two_ranks[("batch_sampler", False), "count"])[0] == two_epochs()
