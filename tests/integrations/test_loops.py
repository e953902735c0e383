"""Plain loops, DDP, FSDP2 and Accelerate: three lines each, as the README shows them."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import flowdata
from flowdata.accumulation import AccumulatedBatches
from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.checks import carries_weights, check_loader, flow_sampler_of
from flowdata.sampler import FlowSampler
from tests.integrations import tiny, train_worker


@pytest.mark.parametrize("normalize", tiny.NORMALIZE)
@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize("adapter", ["plain", "accelerate"])
def test_accumulated_gradients_are_those_of_the_full_batch(adapter, steps, normalize):
    expected = tiny.full_batch_gradient(tiny.make_weights(), normalize)
    gradient = getattr(train_worker, adapter)(tiny.N // steps, steps, normalize)
    tiny.assert_same_gradient(gradient, expected)


def test_the_keras_layout_collates_into_inputs_targets_and_weights():
    data = TensorDataset(torch.arange(4.0), torch.tensor([0, 1, 1, 0]))
    weights = torch.tensor([1.0, 0.5, 0.25, 0.0])
    triples = FlowWeightedDataset(data, weights, layout="triple")
    collate = WeightedCollator(torch.utils.data.default_collate)
    for options in ({}, {"collate_fn": collate}):
        inputs, targets, sample_weight = next(iter(DataLoader(triples, batch_size=4, **options)))
        assert inputs.tolist() == [0, 1, 2, 3]
        assert targets.tolist() == [0, 1, 1, 0]
        assert torch.equal(sample_weight, weights)


def left_padded(samples):
    width = max(len(s["input_ids"]) for s in samples)
    rows = [[0] * (width - len(s["input_ids"])) + s["input_ids"].tolist() for s in samples]
    return {"input_ids": torch.tensor(rows)}


def joined(samples):
    return {"input_ids": torch.cat([s["input_ids"] for s in samples])[None]}


def test_token_weights_go_where_the_collator_put_the_tokens():
    samples = tiny.make_samples(5)
    marked = [s | {"weight": s["input_ids"].float()} for s in samples]
    for collate in (tiny.collate, left_padded, joined):
        batch = WeightedCollator(collate)(marked)
        assert torch.equal(batch["weight"], batch["input_ids"].float())
    with pytest.raises(ValueError, match="changed the tokens of sample 0"):
        WeightedCollator(lambda s: {"input_ids": tiny.collate(s)["input_ids"] + 1})(marked)
    marked[1]["weight"] = marked[1]["weight"][:-1]
    with pytest.raises(ValueError, match=r"sample 1 of the batch has \d+ token weights for \d+"):
        WeightedCollator(tiny.collate)(marked)


@pytest.mark.parametrize("collate", [left_padded, tiny.collate])
@pytest.mark.parametrize("others", [[[7, 8, 9]], [[7, 8, 9], [6]], []])
def test_token_weights_of_a_sample_of_padding_lie_on_its_tokens(collate, others):
    ids = [torch.tensor(each) for each in ([0, 0], *others, [0])]
    samples = [{"input_ids": each, "labels": each} for each in ids]
    weights = tiny.make_token_weights(samples)
    weighted = [s | {"weight": w} for s, w in zip(samples, weights, strict=True)]

    def with_mask(samples):  # by lengths, as tokenizers make it
        ones = [
            {"input_ids": torch.ones_like(s["input_ids"]), "labels": s["labels"]} for s in samples
        ]
        return collate(samples) | {"attention_mask": collate(ones)["input_ids"]}

    for of_batch in [with_mask] + [collate] * any(len(each) == 1 for each in others):
        batch = WeightedCollator(of_batch)(weighted)
        expected = with_mask(samples)["attention_mask"].float()
        expected[expected != 0] = torch.cat(weights)
        torch.testing.assert_close(batch["weight"], expected)


def test_the_collator_is_found_at_its_former_place_too():
    from flowdata.integrations import collator

    assert collator.WeightedCollator is flowdata.WeightedCollator is WeightedCollator


def test_samples_without_weights_pass_and_mixtures_are_refused():
    samples = tiny.make_samples(3)
    assert "weight" not in WeightedCollator(tiny.collate)(samples)
    with pytest.raises(ValueError, match="sample 1 of the batch has no 'weight', others do"):
        WeightedCollator(tiny.collate)([samples[0] | {"weight": 1.0}, samples[1]])
    pairs = [(torch.ones(2), torch.tensor(1)), (torch.zeros(2), torch.tensor(0))]
    inputs, targets = WeightedCollator(torch.utils.data.default_collate)(pairs)
    assert inputs.shape == (2, 2)
    assert targets.tolist() == [1, 0]


PADDED = [(torch.arange(1.0, 2 + n), torch.tensor(0.1 * n)) for n in range(5)]


def test_a_collator_that_sorts_its_samples_is_refused():
    for order in (lambda x: -len(x), lambda x: x.sum()):
        collate = WeightedCollator(
            lambda rows, order=order: pad_sequence(sorted(rows, key=order), batch_first=True)
        )
        with pytest.raises(ValueError, match="puts the samples of a batch in another order"):
            collate(PADDED[1:4] + PADDED[:1])

    def takes_out(samples):
        labels = torch.tensor([sample.pop("label") for sample in samples])
        return {"labels": labels.sort().values}

    samples = [{"label": label, "weight": 1.0} for label in (2, 1, 3)]
    with pytest.raises(ValueError, match="puts the samples of a batch in another order"):
        WeightedCollator(takes_out)(samples)


@pytest.mark.parametrize("before", [1, 31, 32])
def test_a_collator_that_sorts_is_found_by_the_first_samples_that_differ_in_length(before):
    sizes = []

    def collate_fn(rows):
        sizes.append(len(rows))
        return pad_sequence(sorted(rows, key=len, reverse=True), batch_first=True)

    collate = WeightedCollator(collate_fn)
    for _ in range(before):
        collate([PADDED[1], PADDED[1]])
        collate([PADDED[1]])  # which has no order
    if before < 32:
        with pytest.raises(ValueError, match="puts the samples of a batch in another order"):
            collate(PADDED[:2])
    else:
        collate(PADDED[:2])
        assert len(sizes) == 2 * before + 1  # batches of one length are made once


def test_collators_that_keep_the_order_or_draw_at_random_pass():
    def padded(rows):
        return pad_sequence(rows, batch_first=True)

    def noisy(rows):
        return padded(rows) + torch.rand(len(rows), 1)

    def mean(rows):
        return padded(rows).mean(0, keepdim=True)

    for collate in (padded, noisy, mean, len, lambda rows: None, pad_sequence):
        _, weights = WeightedCollator(collate)(PADDED)
        assert weights.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    alike = [(torch.arange(3.0), torch.tensor(1.0))] * 3  # whose rows are places, (T, B)
    assert WeightedCollator(pad_sequence)(alike)[0].tolist() == [[0] * 3, [1] * 3, [2] * 3]
    sizes = []

    def counted(rows):
        sizes.append(len(rows))
        return padded(rows)

    collate = WeightedCollator(counted)
    for _ in range(3):
        collate(PADDED)
    assert sizes == [5, 5, 5, 5]  # the first batch is made once more, the others once


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -0.1])
def test_weights_that_are_none_are_refused(bad):
    pairs = [(torch.ones(2), torch.tensor(0.5)), (torch.ones(2), torch.tensor(bad))]
    with pytest.raises(ValueError, match="sample 1 of the batch has the weight"):
        WeightedCollator(torch.stack)(pairs)
    samples = [sample | {"weight": 1.0} for sample in tiny.make_samples(3)]
    samples[2]["weight"] = [1.0] * (len(samples[2]["input_ids"]) - 1) + [bad]
    with pytest.raises(ValueError, match="sample 2 of the batch has the weight"):
        WeightedCollator(tiny.collate)(samples)


def test_torchs_weighted_sampler_by_the_same_weights_is_refused():
    weights = torch.tensor([0.5, 1.0, 0.25])
    data = FlowWeightedDataset(TensorDataset(torch.arange(3.0)), weights)
    for draws in (weights, 7 * weights.double()):
        with pytest.raises(ValueError, match="act twice: a WeightedRandomSampler draws"):
            check_loader(DataLoader(data, sampler=WeightedRandomSampler(draws, 3)))
    check_loader(DataLoader(data, sampler=WeightedRandomSampler([1.0, 1.0, 2.0], 3)))
    check_loader(DataLoader(data.dataset, sampler=WeightedRandomSampler(weights, 3)))


def test_a_loader_that_weighs_and_resamples_is_refused():
    data, weights = TensorDataset(torch.arange(6.0)), torch.rand(6)
    weighted = FlowWeightedDataset(data, weights)
    for wrapped in (weighted, torch.utils.data.Subset(weighted, range(6))):
        loader = DataLoader(wrapped, sampler=FlowSampler(weights))
        with pytest.raises(ValueError, match="the weights would act twice"):
            check_loader(loader)
        with pytest.raises(ValueError, match="the weights would act twice"):
            check_loader(AccumulatedBatches(loader, 2, len))
    with pytest.raises(ValueError, match="gives the whole order to each of 2 ranks, which would"):
        check_loader(DataLoader(data, sampler=FlowSampler(weights)), num_ranks=2)
    share = FlowSampler(weights, num_replicas=2, rank=0)
    check_loader(DataLoader(data, sampler=share), num_ranks=2)
    check_loader(DataLoader(weighted, shuffle=True))
    check_loader(DataLoader(data, sampler=FlowSampler(weights)))
    assert flow_sampler_of(DataLoader(data)) is None
    with pytest.raises(ValueError, match="the weights would act twice"):
        check_loader(DataLoader(data, sampler=FlowSampler(weights)), weighted_loss=True)
    assert not carries_weights(data, "weight")
    assert carries_weights(weighted, "weight")


def test_the_last_step_of_an_epoch_may_have_fewer_batches():
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4)
    batches = AccumulatedBatches(loader, 2, lambda batch: len(batch[0]))
    for _ in range(2):  # a second epoch, too
        assert [items.item() for _, items in batches] == [8, 8, 2]
    assert len(batches) == 3
    for steps in (0, 2.0, "2"):
        with pytest.raises(ValueError, match="steps must be an integer >= 1, got"):
            AccumulatedBatches(loader, steps, len)


def test_a_count_that_is_not_a_number_of_items_is_refused():
    loader = DataLoader(TensorDataset(torch.arange(10.0), torch.ones(10)), batch_size=4)
    with pytest.raises(TypeError, match="count must be a function, batch -> its items, got int"):
        AccumulatedBatches(loader, 2, 4)
    for count, named in ((lambda batch: batch[1], r"Tensor of shape \(4,\)"), (str, "str")):
        with pytest.raises(TypeError, match=f"a number or a 0-d tensor, got {named}"):
            next(iter(AccumulatedBatches(loader, 2, count)))
    with pytest.raises(ValueError, match="count=len gives the parts of a batch that is a list"):
        next(iter(AccumulatedBatches(loader, 2, len)))


def test_a_collator_that_sorts_is_seen_where_sequences_come_last():
    def collate(samples):
        samples.sort(key=lambda sample: len(sample[0]), reverse=True)
        texts, labels = zip(*samples, strict=True)
        lengths = torch.tensor([len(text) for text in texts])
        return pad_sequence(texts), lengths, torch.stack(labels)

    samples = [(torch.arange(3 + i % 5), torch.tensor(i)) for i in range(16)]
    weighted = FlowWeightedDataset(samples, torch.rand(16))
    with pytest.raises(ValueError, match="the collator puts the samples of a batch in another"):
        list(DataLoader(weighted, batch_size=8, collate_fn=WeightedCollator(collate)))
