import copy
import io
import pickle
from collections import namedtuple
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from flowdata._common import notices
from flowdata.dataset import FlowWeightedDataset, joint_temperature
from flowdata.errors import ScoreMismatchError
from flowdata.sampler import FlowSampler
from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer
from flowdata.store.identity import content_identity
from tests import reference
from tests.models import TinyResNet, images

WEIGHTS = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0625])
LABELLED = namedtuple("LABELLED", ["image", "label"])


class Nested:
    """Samples of tuples in dictionaries in named tuples; knows batches when asked to."""

    def __init__(self, length=5):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return LABELLED({"ids": (torch.tensor(index), torch.ones(2) * index)}, index)


def rows(length=5):
    return datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(length)]})


def test_pairs_hold_the_sample_and_its_float32_weight():
    weighted = FlowWeightedDataset(TensorDataset(torch.arange(5)), WEIGHTS.double())
    (value,), weight = weighted[3]
    assert value == 3
    assert weight == 0.125
    assert weight.shape == ()
    assert weight.dtype == torch.float32
    assert len(weighted) == 5


def test_scores_give_the_weights_of_the_reference():
    losses = torch.tensor([0.3, 2.0, 0.7, 1.1])
    weighted = FlowWeightedDataset(["a", "b", "c", "d"], Scores(losses))
    expected = reference.flow_weights(losses, reference.median(losses))
    assert [weight.item() for _, weight in weighted] == pytest.approx(expected, rel=1e-6)
    fixed = FlowWeightedDataset(["a", "b", "c", "d"], Scores(losses), temperature=3.0)
    assert fixed[1][1].item() == pytest.approx(reference.flow_weights(losses, 3.0)[1], rel=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("layout", ["pair", "triple", "dict"])
def test_default_collation_of_each_layout(layout, num_workers):
    samples = [{"x": i} if layout == "dict" else (i, -i) for i in range(5)]
    weighted = FlowWeightedDataset(samples, WEIGHTS, layout=layout)
    batches = list(DataLoader(weighted, batch_size=3, num_workers=num_workers))
    if layout == "pair":
        (x, y), weight = batches[0]
    elif layout == "triple":
        x, y, weight = batches[0]
    else:
        x, y, weight = batches[0]["x"], -batches[0]["x"], batches[0]["weight"]
    assert x.tolist() == [0, 1, 2]
    assert y.tolist() == [0, -1, -2]
    torch.testing.assert_close(weight, WEIGHTS[:3], rtol=0, atol=0)


def test_nested_samples_survive_collation():
    batch, weight = next(iter(DataLoader(FlowWeightedDataset(Nested(), WEIGHTS), batch_size=5)))
    assert isinstance(batch, LABELLED)
    assert batch.image["ids"][0].tolist() == [0, 1, 2, 3, 4]
    assert batch.image["ids"][1].shape == (5, 2)
    assert weight.tolist() == WEIGHTS.tolist()


def test_triple_takes_a_named_pair_apart():
    image, label, weight = FlowWeightedDataset(Nested(), WEIGHTS, layout="triple")[2]
    assert image["ids"][0] == 2
    assert label == 2
    assert weight == 0.25


@pytest.mark.parametrize("dataset", [rows(), Subset(rows(), range(5)), list(rows())])
def test_single_samples_and_batches_agree(dataset):
    weighted = FlowWeightedDataset(dataset, WEIGHTS, layout="dict", key="importance")
    indices = [4, 0, 0, 2]
    singles = [weighted[index] for index in indices]
    assert weighted.__getitems__(indices) == singles
    assert [sample["text"] for sample in singles] == ["row 4", "row 0", "row 0", "row 2"]
    assert [sample["importance"].item() for sample in singles] == WEIGHTS[indices].tolist()


def test_hugging_face_rows_keep_their_weight_through_a_loader():
    weighted = FlowWeightedDataset(rows(), WEIGHTS, layout="dict")
    weight_of = {}
    for batch in DataLoader(weighted, batch_size=2, shuffle=True):
        weight_of.update(zip(batch["text"], batch["weight"].tolist(), strict=True))
    assert weight_of == {f"row {i}": WEIGHTS[i].item() for i in range(5)}


def test_a_weight_sent_elsewhere_does_not_take_all_weights_along():
    weighted = FlowWeightedDataset(range(100_000), torch.rand(100_000))
    assert weighted[7][1].untyped_storage().nbytes() == 4
    assert len(pickle.dumps(weighted[7])) < 2_000
    buffer = io.BytesIO()
    torch.save(weighted.__getitems__(list(range(8))), buffer)
    assert buffer.tell() < 10_000


def test_indices_may_be_negative_or_of_numpy_or_torch_and_iteration_ends():
    weighted = FlowWeightedDataset(list("abcde"), WEIGHTS)
    assert weighted[-1] == ("e", WEIGHTS[4])
    assert weighted[np.int64(1)] == weighted[torch.tensor(1)] == ("b", WEIGHTS[1])
    assert [sample for sample, _ in weighted] == list("abcde")
    with pytest.raises(IndexError, match="index 5 of a data set of 5 samples"):
        weighted[5]
    with pytest.raises(TypeError):
        weighted[1:3]


def test_other_attributes_of_the_data_set_are_not_passed_through():
    weighted = FlowWeightedDataset(rows(), WEIGHTS)
    assert not hasattr(weighted, "column_names")
    assert not hasattr(weighted, "select")
    assert weighted.dataset.column_names == ["text"]


def test_the_weights_given_are_neither_copied_nor_changed():
    weights = WEIGHTS.clone()
    weighted = FlowWeightedDataset(range(5), weights)
    assert weighted.weights.data_ptr() == weights.data_ptr()
    weighted[0][1].mul_(7)
    assert weights.tolist() == WEIGHTS.tolist()


def test_scores_or_weights_of_another_length_are_refused():
    with pytest.raises(ScoreMismatchError, match="of 3 samples, the data set has 5"):
        FlowWeightedDataset(range(5), Scores(torch.ones(3)))
    with pytest.raises(ScoreMismatchError, match="holds 5 weights, the data set 4 samples"):
        FlowWeightedDataset(range(4), WEIGHTS)


def test_scores_of_another_data_set_are_refused():
    made_from, other = rows(), datasets.Dataset.from_dict({"text": list("abcde")})
    scores = Scores(torch.ones(5))
    scores.metadata["identity"] = {"dataset": content_identity(made_from)}
    assert len(FlowWeightedDataset(made_from, scores)) == 5
    with pytest.raises(ScoreMismatchError, match="made from another data set"):
        FlowWeightedDataset(other, scores)


def test_the_wrong_kind_of_data_set_is_named():
    splits = datasets.DatasetDict({"train": rows(), "test": rows()})
    with pytest.raises(TypeError, match="got DatasetDict of 'train', 'test'; pass one of them"):
        FlowWeightedDataset(splits, WEIGHTS)
    with pytest.raises(TypeError, match="dataset comes first"):
        FlowWeightedDataset(Scores(torch.ones(5)), rows())


def test_several_scores_are_of_the_parts_of_a_concatenation():
    scores = Scores(torch.ones(3)), Scores(torch.ones(2))
    assert len(FlowWeightedDataset(ConcatDataset([range(3), range(2)]), list(scores))) == 5
    for several in (list(scores), [Scores(torch.ones(5))]):
        with pytest.raises(TypeError, match=r"a list of scores is for a .*ConcatDataset"):
            FlowWeightedDataset(rows(), several)
    for wrong in ([], scores[0], [torch.ones(2)]):
        with pytest.raises(TypeError, match="scores must be a list of Scores"):
            joint_temperature(wrong)


def test_streams_are_sent_to_the_class_for_streams():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(5))

    for stream in (Stream(), iter([1, 2]), rows().to_iterable_dataset()):
        with pytest.raises(TypeError, match="FlowWeightedIterable"):
            FlowWeightedDataset(stream, WEIGHTS)


@pytest.mark.parametrize("layout", ["pair", "triple"])
def test_a_key_is_refused_where_no_layout_has_it(layout):
    samples = [(i, -i) for i in range(5)]
    with pytest.raises(ValueError, match=f"key='x' names the .* layout='{layout}' would ignore"):
        FlowWeightedDataset(samples, WEIGHTS, layout=layout, key="x")


def test_a_key_that_is_taken_is_refused():
    with_weights = rows().add_column("weight", [1.0] * 5)
    with pytest.raises(ValueError, match="have a 'weight' already; pass another key="):
        FlowWeightedDataset(with_weights, WEIGHTS, layout="dict")
    plain = FlowWeightedDataset([{"weight": 1}] * 5, WEIGHTS, layout="dict")
    with pytest.raises(ValueError, match="have a 'weight' already"):
        plain[0]
    with pytest.raises(ValueError, match="have a 'weight' already"):
        plain.__getitems__([0, 1])


def test_samples_that_do_not_fit_the_layout_are_refused():
    with pytest.raises(ValueError, match="layout must be 'pair', 'triple' or 'dict', got 'both'"):
        FlowWeightedDataset(range(5), WEIGHTS, layout="both")
    with pytest.raises(TypeError, match="layout='triple' needs samples"):
        FlowWeightedDataset(range(5), WEIGHTS, layout="triple")[0]
    with pytest.raises(TypeError, match="got tuple of 3"):
        FlowWeightedDataset([(1, 2, 3)] * 5, WEIGHTS, layout="triple")[0]
    with pytest.raises(TypeError, match="layout='dict' needs samples that are mappings, got int"):
        FlowWeightedDataset(range(5), WEIGHTS, layout="dict")[0]


def test_a_batch_of_another_size_than_asked_for_is_refused():
    class Forgetful(list):
        def __getitems__(self, indices):
            return [self[index] for index in indices[:-1]]

    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        FlowWeightedDataset(Forgetful(range(5)), WEIGHTS).__getitems__([0, 1])


def test_missing_losses_are_refused_or_weigh_nothing():
    scores = Scores(torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(ValueError, match="indices 1"):
        FlowWeightedDataset(range(3), scores)
    assert FlowWeightedDataset(range(3), scores, missing="zero")[1][1] == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0, float("nan")], r"weights\[1\] is nan"),
        ([1.0, float("inf")], r"weights\[1\] is inf"),
        ([-1.0, 1.0], r"weights\[0\] is -1.0"),
    ],
)
def test_bad_weights_are_refused_by_index(bad, message):
    with pytest.raises(ValueError, match=message):
        FlowWeightedDataset(range(2), torch.tensor(bad))


@pytest.mark.parametrize("takes", [partial(FlowWeightedDataset, range(40)), FlowSampler])
def test_losses_in_the_place_of_weights_are_refused_or_warned_of(takes, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())  # each line warns once in a process
    losses = 2 + torch.rand(40, generator=torch.Generator().manual_seed(0))
    scores = Scores(0.1 * losses)
    for given in (scores.losses, [scores.losses], copy.deepcopy(scores).losses):
        with pytest.raises(ValueError, match="the losses of scores, where weights belong"):
            takes(given)
    takes(0.1 * losses)  # the caller's own tensor is no part of the scores that are made of it
    assert caplog.records == []
    takes(losses.tolist())
    (record,) = caplog.records
    assert "the 40 weights given have a mean of 2.46, as losses have" in record.message


@pytest.mark.parametrize(
    "weights",
    [
        Scores(torch.linspace(0, 3, 40)).weights(normalize="mean"),  # up to 3 or so, 1 in the mean
        torch.tensor([10.0, 1.25]).repeat(20),  # of two classes
        torch.tensor([1.0, 2.0, 3.5]),  # written by hand
        torch.ones(40),
    ],
)
def test_weights_of_other_rules_are_not_taken_for_losses(weights, caplog):
    FlowWeightedDataset(range(len(weights)), weights)
    FlowSampler(weights)
    FlowSampler(Scores(torch.linspace(0, 1, 40)).losses.clone())  # on purpose
    assert caplog.records == []


def test_several_data_sets_get_a_temperature_each_or_one_together():
    easy, hard = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([2.0, 5.0])
    scores = [Scores(easy), Scores(hard)]
    both = ConcatDataset([list("abc"), list("de")])
    each = FlowWeightedDataset(both, scores)
    expected = reference.flow_weights(easy, 0.2) + reference.flow_weights(hard, 3.5)
    assert each.weights.tolist() == pytest.approx(expected, rel=1e-6)

    together = joint_temperature(scores)
    assert together == pytest.approx(reference.median([*easy, *hard]))
    joint = FlowWeightedDataset(both, scores, temperature=together)
    expected = reference.flow_weights([*easy, *hard], together)
    assert joint.weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert joint[3][0] == "d"


def test_weights_are_normalised_and_capped_on_request():
    losses = torch.tensor([0.3, 2.0, 0.7, 1.1])
    plain = FlowWeightedDataset(range(4), Scores(losses)).weights
    normalized = FlowWeightedDataset(range(4), Scores(losses), normalize="mean").weights
    torch.testing.assert_close(normalized, plain / plain.mean())
    options = {"normalize": "mean", "max_weight": 1.25}
    capped = FlowWeightedDataset(range(4), Scores(losses), **options).weights
    assert torch.equal(capped, normalized.clamp(max=1.25))
    # Weights that the user gives are shaped as those of scores are.
    assert torch.equal(FlowWeightedDataset(range(4), plain, **options).weights, capped)
    with pytest.raises(ValueError, match="normalize must be 'none' or 'mean', got 'sum'"):
        FlowWeightedDataset(range(4), plain, normalize="sum")
    with pytest.raises(ValueError, match="max_weight must be positive, got 0"):
        FlowWeightedDataset(range(4), plain, max_weight=0)


def test_several_data_sets_are_normalised_together_and_keep_their_ratios():
    scores = [Scores(torch.tensor([0.1, 0.2, 0.4])), torch.tensor([0.2, 0.1])]
    both = ConcatDataset([range(3), range(2)])
    plain = FlowWeightedDataset(both, scores).weights
    normalized = FlowWeightedDataset(both, scores, normalize="mean").weights
    torch.testing.assert_close(normalized, plain / plain.mean())


def test_several_data_sets_are_matched_with_their_own_scores():
    both = ConcatDataset([range(3), range(2)])
    with pytest.raises(ScoreMismatchError, match="of 2 samples, the data set has 3"):
        FlowWeightedDataset(both, [Scores(torch.ones(2)), Scores(torch.ones(3))])
    with pytest.raises(ScoreMismatchError, match="1 scores for 2 concatenated data sets"):
        FlowWeightedDataset(both, [Scores(torch.ones(5))])
    with pytest.raises(ScoreMismatchError, match=r"scores_or_weights\[0\] holds 2 weights"):
        FlowWeightedDataset(both, [torch.ones(2), torch.ones(3)])


def test_interleaved_data_sets_carry_their_weights_as_columns():
    first, second = rows(3), rows(3).map(lambda row: {"text": row["text"].upper()})
    scores = [Scores(torch.tensor([0.1, 0.2, 0.4])), Scores(torch.tensor([1.0, 2.0, 4.0]))]
    together = joint_temperature(scores)
    columns = [
        one.to_column(dataset, temperature=together)
        for one, dataset in zip(scores, (first, second), strict=True)
    ]
    mixture = datasets.interleave_datasets(columns)
    expected = reference.flow_weights([0.1, 1.0, 0.2, 2.0, 0.4, 4.0], together)
    assert list(mixture["weight"]) == pytest.approx(expected, rel=1e-6)
    assert mixture["text"][:2] == ["row 0", "ROW 0"]


def hard_parts():
    """Two data sets whose losses lie close together, far from 0."""
    generator = torch.Generator().manual_seed(0)
    losses = [level + 0.05 * torch.randn(100, generator=generator) for level in (7.0, 7.1)]
    return ConcatDataset([range(100), range(100)]), [Scores(part) for part in losses]


def test_a_joint_ess_temperature_keeps_the_ratios_between_data_sets():
    both, scores = hard_parts()
    together = joint_temperature(scores, "ess0.3")
    expected = reference.relative_flow_weights([*scores[0].losses, *scores[1].losses], together)
    weights = FlowWeightedDataset(both, scores, temperature=together).weights
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert weights.max() == 1
    assert reference.effective_sample_size(expected) / 200 == pytest.approx(0.3, rel=1e-6)
    column = scores[1].to_column(rows(100), temperature=together)
    assert list(column["weight"]) == pytest.approx(expected[100:], rel=1e-6)


def test_each_of_several_data_sets_has_an_ess_temperature_of_its_own():
    both, scores = hard_parts()
    weights = FlowWeightedDataset(both, scores, temperature="ess0.3").weights.split(100)
    assert [part.max().item() for part in weights] == [1, 1]
    for part, alone in zip(weights, scores, strict=True):
        assert torch.equal(part, alone.weights("ess0.3"))


def test_weights_of_no_use_are_warned_of_once_for_all_parts_together(caplog):
    both, scores = hard_parts()
    weighted = FlowWeightedDataset(both, scores, temperature=0.01)
    for _ in range(3):
        list(DataLoader(weighted, batch_size=50))
    (record,) = caplog.records
    assert "of the 200 samples have a mean of 0" in record.message
    caplog.clear()
    # A part that vanishes beside an easy one is what the weights are for.
    easy = Scores(0.001 * torch.rand(100, generator=torch.Generator().manual_seed(1)))
    FlowWeightedDataset(both, [easy, scores[1]], temperature=0.01)
    assert caplog.records == []
    FlowWeightedDataset(both, torch.zeros(200))  # weights are taken as they are
    assert caplog.records == []


def test_weights_that_float32_does_not_hold_are_refused():
    huge = torch.tensor([1.0, 1e39], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weights\[1\] is 1e\+39, more than float32 holds"):
        FlowWeightedDataset([0, 1], huge)
    with pytest.raises(ValueError, match="the largest weight is 1e-60, less than float32 holds"):
        FlowWeightedDataset([0, 1], torch.tensor([1e-60, 0.0], dtype=torch.float64))


def test_a_joint_temperature_needs_a_loss():
    with pytest.raises(ValueError, match="none of the 2 samples has a loss"):
        joint_temperature([Scores(torch.full((2,), torch.nan))])


class Augmented(torch.utils.data.Dataset):
    """Samples with noise from a generator of its own, whose state and epoch loaders keep."""

    def __init__(self):
        self.generator, self.epoch = torch.Generator().manual_seed(0), 0

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index + torch.rand((), generator=self.generator)

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict):
        self.generator.set_state(state_dict["generator"])

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_of_a_random_data_set_resumes_with_its_loader(num_workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def build():
        dataset = FlowWeightedDataset(Augmented(), torch.rand(20))
        return StatefulDataLoader(dataset, batch_size=4, num_workers=num_workers)

    loader = build()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    rest = [samples.tolist() for samples, _ in iterator]
    loader = build()
    loader.load_state_dict(state)
    assert [samples.tolist() for samples, _ in loader] == rest


def test_a_data_set_has_a_state_and_epochs_if_the_one_inside_has():
    dataset = FlowWeightedDataset(Augmented(), torch.rand(20))
    dataset.set_epoch(3)
    assert dataset.dataset.epoch == pickle.loads(pickle.dumps(dataset)).dataset.epoch == 3
    plain = FlowWeightedDataset(range(3), torch.rand(3))
    for name in ("state_dict", "load_state_dict", "set_epoch", "generator"):
        assert not hasattr(plain, name)
    with pytest.raises(AttributeError, match="'FlowWeightedDataset' object has no attribute 'gen"):
        _ = dataset.generator


@pytest.mark.parametrize("layout", ["pair", "dict"])
def test_a_weighted_data_set_is_not_weighted_again(layout):
    weighted = FlowWeightedDataset(rows(), torch.rand(5), layout=layout)
    with pytest.raises(ValueError, match="dataset carries weights already"):
        FlowWeightedDataset(weighted, torch.rand(5), layout=layout)


class Brightened(Dataset):
    """Images that are brighter or darker at random, or not."""

    def __init__(self, is_random):
        self.images, self.is_random = images(12), is_random

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image + torch.randn(()) * self.is_random, label


def test_scores_of_plain_images_say_first_what_to_do_with_augmented_ones():
    scores = LossScorer(TinyResNet(), progress=False).score(Brightened(False))
    remedy = r"^pass scores\.weights\(\) instead of scores if .*: .* reading, as augmentation does"
    with pytest.raises(ScoreMismatchError, match=remedy) as caught:
        FlowWeightedDataset(Brightened(True), scores)
    assert len(str(caught.value).split()) < 40
    assert len(FlowWeightedDataset(Brightened(True), scores.weights())) == 12
    with pytest.raises(
        ScoreMismatchError, match=r"^score this data set, or pass .*class gives them"
    ):
        FlowWeightedDataset(images(12, seed=1), scores)


@pytest.mark.parametrize("option", [{"temperature": "mean"}, {"missing": "zero"}])
def test_options_of_scores_are_refused_for_weights(option):
    (name,) = option
    for make in (partial(FlowWeightedDataset, [1, 2]), FlowSampler):
        with pytest.raises(ValueError, match=f"{name}=.* has no effect on weights"):
            make(torch.ones(2), **option)
