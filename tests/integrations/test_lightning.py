"""FlowDataModule and FlowGuard under real Lightning trainers."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.lightning import FlowDataModule, FlowGuard
from flowdata.losses import weighted_mean
from flowdata.sampler import FlowSampler
from tests.integrations import tiny, train_worker


def data(n=12):
    inputs = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, torch.arange(n) % 2)


class Classifier(pl.LightningModule):
    def __init__(self, weighted=True):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.weighted, self.inputs = torch.nn.Linear(3, 2), weighted, []

    def training_step(self, item, index):
        if self.weighted:
            ((inputs, targets), weights), num_items = item
        else:
            (inputs, targets), weights, num_items = item, torch.ones(len(item[0])), None
        self.inputs.append(inputs)
        losses = F.cross_entropy(self.layer(inputs), targets, reduction="none")
        return weighted_mean(losses, weights, num_items=num_items)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, datamodule=None, loader=None, **options):
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False} | options
    trainer = pl.Trainer(
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, train_dataloaders=loader, datamodule=datamodule)
    return module


@pytest.mark.parametrize("normalize", tiny.NORMALIZE)
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_accumulated_gradients_are_those_of_the_full_batch(steps, normalize):
    expected = tiny.full_batch_gradient(tiny.make_weights(), normalize)
    gradient = train_worker.lightning(tiny.N // steps, steps, normalize)
    tiny.assert_same_gradient(gradient, expected)


def test_weights_of_one_train_as_an_unweighted_module(tmp_path):
    weighted = fit(Classifier(), FlowDataModule(data(), torch.ones(12), batch_size=12))
    plain = fit(Classifier(weighted=False), loader=DataLoader(data(), batch_size=12))
    torch.testing.assert_close(weighted.layer.weight, plain.layer.weight, rtol=1e-5, atol=1e-7)


def test_each_epoch_has_every_sample_once_in_another_order():
    module = fit(Classifier(), FlowDataModule(data(), torch.ones(12), batch_size=5))
    first, second = torch.cat(module.inputs[:3]), torch.cat(module.inputs[3:])
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert epoch.sort(0).values.equal(data().tensors[0].sort(0).values)


def test_weights_of_zero_give_no_gradient():
    module = Classifier()
    before = module.layer.weight.clone()
    fit(module, FlowDataModule(data(), torch.zeros(12), batch_size=4, normalize="weights"))
    assert torch.equal(module.layer.weight, before)


def test_resampled_batches_come_without_weights():
    weights = torch.zeros(12)
    weights[:2] = 1
    datamodule = FlowDataModule(data(), weights, batch_size=4, resample=True)
    module = fit(Classifier(weighted=False), datamodule)
    drawn = {tuple(row.tolist()) for row in torch.cat(module.inputs)}
    assert drawn == {tuple(row.tolist()) for row in data().tensors[0][:2]}


def test_a_count_of_ones_own_is_the_denominator():
    datamodule = FlowDataModule(
        data(), torch.ones(12), batch_size=6, count=lambda batch, weights: 100.0
    )
    counts = []

    class Recorder(Classifier):
        def training_step(self, item, index):
            counts.append(item[1].item())
            return super().training_step(item, index)

    fit(Recorder(), datamodule, max_epochs=1, accumulate_grad_batches=2)
    assert counts == [100.0, 100.0]  # 200 items in the step, Lightning's division by 2 undone


IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
WEIGHTS = torch.tensor([1.0, 0.25])


@pytest.mark.parametrize(
    ("batch", "count", "sum_of_weights"),
    [
        ({"input_ids": IDS, "labels": IDS}, 4, 2.5),  # causal: the first are no targets
        ({"input_ids": IDS, "labels": torch.tensor([[5, 6, 7], [8, 9, -100]])}, 3, 2.25),
        ({"input_ids": torch.zeros(2, 9), "labels": IDS}, 6, 3.75),  # seq2seq
        ({"input_ids": torch.zeros(2, 9), "labels": torch.ones(2, 3).long()}, 6, 3.75),
        ({"input_ids": IDS, "labels": torch.tensor([[4, 2, -100], [3, 3, 2]])}, 5, 2.75),
        ({"input_ids": IDS, "labels": torch.zeros(2, 5)}, 2, 1.25),  # several labels of a sample
        ({"input_ids": IDS, "labels": torch.ones(2, 5).bool()}, 2, 1.25),
        ({"input_ids": IDS, "labels": torch.tensor([3, 4])}, 2, 1.25),
        ({"input_ids": IDS, "labels": torch.tensor([[0], [1]])}, 2, 1.25),
        ({"input_ids": IDS, "target": torch.tensor([3, 4])}, 2, 1.25),
        ((IDS, IDS), 2, 1.25),
    ],
)
def test_items_are_counted_as_what_labels_are(batch, count, sum_of_weights):
    for normalize, expected in (("count", count), ("weights", sum_of_weights)):
        module = FlowDataModule(data(2), WEIGHTS, batch_size=2, normalize=normalize)
        assert float(module._count(batch, WEIGHTS)) == expected


def test_labels_that_can_be_tokens_or_classes_need_a_count():
    batch = {"input_ids": IDS, "labels": torch.tensor([[0, 1], [1, 1]])}
    with pytest.raises(
        ValueError, match=r"labels of shape \(2, 2\), .* pass FlowDataModule\(count="
    ):
        FlowDataModule(data(2), WEIGHTS, batch_size=2)._count(batch, WEIGHTS)
    module = FlowDataModule(data(2), WEIGHTS, batch_size=2, count=lambda batch, weights: 7)
    assert module._count(batch, WEIGHTS) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "wieghts"}, "normalize must be 'count'"),
        ({"normalize": "weights", "resample": True}, "normalize= would be ignored"),
        ({"count": len, "accumulate_grad_batches": 4, "resample": True}, "count= and accumulate_"),
        ({"normalize": "weights", "count": len}, "count= says what num_items counts"),
    ],
)
def test_what_would_be_ignored_of_a_denominator_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlowDataModule(data(), torch.ones(12), batch_size=4, **options)


def test_what_cannot_be_right_is_refused():
    weighted = FlowWeightedDataset(data(), torch.rand(12))
    with pytest.raises(ValueError, match="carries weights already"):
        FlowDataModule(weighted, torch.rand(12), batch_size=4)
    twice = DataLoader(weighted, sampler=FlowSampler(torch.rand(12)), batch_size=4)
    with pytest.raises(ValueError, match="the weights would act twice"):
        fit(Classifier(), loader=twice, callbacks=[FlowGuard()])
    for option in ("sampler", "batch_sampler", "shuffle"):
        with pytest.raises(ValueError, match=f"{option} is not for a FlowDataModule"):
            FlowDataModule(data(), torch.rand(12), batch_size=4, **{option: True})
    with pytest.raises(ValueError, match="batch_size"):
        FlowDataModule(data(), torch.rand(12), batch_size=0)
    with pytest.raises(ValueError, match="depend on the trainer"):
        FlowDataModule(data(), torch.rand(12), batch_size=4).train_dataloader()


def test_the_guard_lets_sound_loaders_pass():
    sound = DataLoader(data(), sampler=FlowSampler(torch.rand(12)), batch_size=4)
    fit(Classifier(weighted=False), loader=sound, callbacks=[FlowGuard()])
