"""What a data set gives belongs to its identity: transforms, formats, columns and decoding."""

import io
import logging
import random
import re
from functools import partial

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from flowdata import FlowWeightedDataset, LossScorer, ScoreMismatchError
from flowdata.probe import compute_features
from flowdata.scores import Scores
from flowdata.store.fingerprint import fingerprint_callable, fingerprint_dataset
from flowdata.store.fingerprint.dataset import random_sample
from flowdata.store.folder import read_manifest
from flowdata.store.identity import (
    content_identity,
    dataset_difference,
    sampling_note,
)
from flowdata.store.random_samples import remark_on_random_samples
from flowdata.views import score_views
from tests.integrations import tiny


def rows(count=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    return datasets.Dataset.from_dict(
        {"x": x.tolist(), "y": [i % 3 for i in range(count)], "text": ["a b"] * count}
    )


def scaling(factor):
    def transform(batch):
        return {"x": [factor * torch.tensor(x) for x in batch["x"]], "y": batch["y"]}

    return transform


def shaken(batch):
    return {"x": [torch.tensor(x) + torch.rand(()) for x in batch["x"]], "y": batch["y"]}


def collate(samples):
    return torch.stack([s["x"] for s in samples]), torch.tensor([s["y"] for s in samples])


def scorer():
    torch.manual_seed(0)
    return LossScorer(nn.Linear(4, 3), "cross_entropy", progress=False)


def images(**decoding):
    def png(shade):
        file = io.BytesIO()
        PIL.Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    data = datasets.Dataset.from_dict({"image": [png(20 * i) for i in range(4)]})
    return data.cast_column("image", datasets.Image(**decoding))


VIEWS = {  # of one data set: how it is made, and what a message says differs from the plain one
    "transform": (lambda data: data.with_transform(scaling(1)), "the transform differs"),
    "another transform": (lambda data: data.with_transform(scaling(2)), "the transform differs"),
    "of columns": (
        lambda data: data.with_transform(scaling(1), columns=["x", "y"]),
        "the columns that are shown differ .*, the transform differs",
    ),
    "torch": (lambda data: data.with_format("torch"), "the format differs"),
    "numpy": (lambda data: data.with_format("numpy"), "the format differs"),
    "double": (
        lambda data: data.with_format("torch", dtype=torch.float64),
        "the format differs",
    ),
    "columns": (lambda data: data.with_format(columns=["x"]), "the columns that are shown differ"),
    "columns and others": (
        lambda data: data.with_format("torch", columns=["x"], output_all_columns=True),
        "the format differs .*, the columns that are shown differ",
    ),
}


def test_every_view_of_the_same_rows_has_an_identity_of_its_own():
    identities = {content_identity(rows())}
    for make, words in VIEWS.values():
        identity = content_identity(make(rows()))
        assert identity == content_identity(make(rows()))
        identities.add(identity)
        difference = dataset_difference(content_identity(rows()), identity)
        assert re.match(words, difference)
    assert len(identities) == len(VIEWS) + 1
    assert len({fingerprint_dataset(make(rows())) for make, _ in VIEWS.values()}) == len(VIEWS)


@pytest.mark.parametrize("name", VIEWS)
def test_scores_of_another_view_are_refused_with_what_differs(name):
    make, words = VIEWS[name]
    scores = Scores(torch.ones(8), torch.ones(8, dtype=torch.long))
    scores.metadata["identity"] = {"dataset": content_identity(make(rows()))}
    assert len(FlowWeightedDataset(make(rows()), scores)) == 8
    with pytest.raises(ScoreMismatchError, match=words):
        FlowWeightedDataset(rows(), scores)


def test_plain_formats_are_one_and_set_is_with():
    data = rows()
    before = content_identity(data)
    assert content_identity(data.with_format("python")) == before
    assert content_identity(data.with_format(columns=["text", "y", "x"])) == before
    data.set_format("torch")
    assert content_identity(data) == content_identity(rows().with_format("torch"))
    data.reset_format()
    assert content_identity(data) == before


def test_a_store_of_another_transform_is_refused_and_one_of_the_same_is_reused(tmp_path):
    data = rows().with_transform(scaling(1))
    first = scorer().score(data, collate_fn=collate, store=tmp_path)
    again = scorer().score(rows().with_transform(scaling(1)), collate_fn=collate, store=tmp_path)
    assert torch.equal(first.losses, again.losses)
    other = rows().with_transform(scaling(2))
    with pytest.raises(ScoreMismatchError, match=r"another data set.*the transform differs"):
        scorer().score(other, collate_fn=collate, store=tmp_path)
    with pytest.raises(ScoreMismatchError, match="the transform differs"):
        FlowWeightedDataset(other, first)
    assert len(FlowWeightedDataset(data, first)) == 8
    assert first.to_column(rows()).column_names[-1] == "weight"  # rows are rows


def test_features_of_another_transform_are_refused(tmp_path):
    torch.manual_seed(0)
    file, body = tmp_path / "features.safetensors", nn.Linear(4, 2)
    options = {"store": file, "collate_fn": collate, "dtype": "float32", "progress": False}
    compute_features(body, rows().with_transform(scaling(1)), **options)
    with pytest.raises(ScoreMismatchError, match="the transform differs"):
        compute_features(body, rows().with_transform(scaling(2)), **options)


class Hidden:
    """Keeps its factor where no description looks: in what calls fill."""

    def __init__(self, factor):
        self.factors = [factor]

    def __call__(self, batch):
        self.factors.append(self.factors[0])
        return {"x": [self.factors[0] * x[0] for x in batch["x"]]}


def test_what_a_transform_reads_beside_its_code_is_noticed_by_what_it_gives():
    first = content_identity(rows().with_transform(Hidden(1.0)))
    assert content_identity(rows().with_transform(Hidden(1.0))) == first
    assert content_identity(rows().with_transform(Hidden(2.0))) != first


def test_decoding_is_part_of_it():
    identities = {
        content_identity(images()),
        content_identity(images(decode=False)),
        content_identity(images(mode="L")),
    }
    assert len(identities) == 3
    words = dataset_difference(content_identity(images()), content_identity(images(mode="L")))
    assert words == "the decoding of its features differs (Image, Audio)"
    nested = rows().cast_column("text", datasets.Value("string"))
    assert content_identity(nested) == content_identity(rows())


# --- data sets that only code can read -----------------------------------------------------------


class Folder(Dataset):
    """Images with a transform, as torchvision's folders have them."""

    def __init__(self, transform=None, count=12):
        self.transform, self.count = transform, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((4,), index, dtype=np.float32)
        return (image if self.transform is None else self.transform(image)), index % 3


class Halved(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x / 2, y


class Column(datasets.Dataset):
    def __getitem__(self, key):
        return super().__getitem__(key)["y"]


def test_other_items_give_another_identity_however_they_are_wrapped():
    wraps = [
        lambda data: data,
        lambda data: Subset(data, range(6)),
        lambda data: ConcatDataset([data, data]),
        lambda data: Subset(ConcatDataset([data, Folder()]), range(20)),
    ]
    for wrap in wraps:
        first = content_identity(wrap(Folder(lambda x: x)))
        assert first == content_identity(wrap(Folder(lambda x: 1 * x)))
        assert first != content_identity(wrap(Folder(lambda x: 2 * x)))
    tensors = torch.ones(4, 2), torch.arange(4)
    assert content_identity(Halved(*tensors)) != content_identity(TensorDataset(*tensors))
    assert content_identity(Column(rows().data)) != content_identity(rows())
    assert content_identity(ConcatDataset([rows(), rows()])) != content_identity(
        ConcatDataset([rows(), rows().with_transform(scaling(2))])
    )


class OwnGenerator(Folder):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index):
        return super().__getitem__(index)[0] + self.generator.random(), index


DRAWS = {
    "torch": lambda: Folder(lambda x: x + torch.rand(()).item()),
    "numpy": lambda: Folder(lambda x: x + np.random.rand()),  # noqa: NPY002
    "python": lambda: Folder(lambda x: x if random.random() < 0.5 else -x),
    "part": lambda: Subset(Folder(lambda x: x + random.random()), range(7)),
    "rows": lambda: rows().with_transform(shaken),
    "own": OwnGenerator,
}
STILL = {
    "folder": Folder,
    "list": lambda: [{"a": 1}, {"a": 2}],
    "tensors": lambda: TensorDataset(torch.arange(4)),
    "rows": lambda: rows().with_transform(scaling(2)),
    "images": images,
}


@pytest.mark.parametrize("name", DRAWS)
def test_samples_that_differ_on_a_second_reading_are_said_once(name, caplog, monkeypatch):
    monkeypatch.setattr("flowdata.store.random_samples._remarks", set())
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with caplog.at_level(logging.WARNING, "flowdata"):
        remark_on_random_samples(DRAWS[name](), None)
        remark_on_random_samples(DRAWS[name](), None)
    identity = content_identity(DRAWS[name]())
    assert (content_identity(DRAWS[name]()) == identity) or name == "own"
    assert caplog.text.count("differs from reading to reading") == 1
    assert "flowdata.views.score_views" in caplog.text
    assert ("pass dataset_id=" in caplog.text) == (name == "own")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]  # noqa: NPY002


FLIPS = {
    "torch": lambda share: torch.rand(1) < share,
    "numpy": lambda share: np.random.rand() < share,  # noqa: NPY002
    "python": lambda share: random.random() < share,
}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("draw", FLIPS.values(), ids=FLIPS)
def test_flips_are_noticed_however_rare_they_are(draw, share):
    flips = Folder(lambda x: -x if draw(share) else x)
    index, is_seeded = random_sample(flips)
    assert is_seeded
    assert 0 <= index < len(flips)


def test_draws_that_change_nothing_are_no_augmentation():
    assert random_sample(Folder(lambda x: x + 0 * torch.rand(()).item())) is None


def test_samples_are_read_three_times_where_nothing_is_drawn():
    readings = []
    random_sample(Folder(lambda x: readings.append(float(x[0])) or x))
    assert max(readings.count(x) for x in readings) == 3


@pytest.mark.parametrize("name", STILL)
def test_samples_that_stay_the_same_are_not_remarked_on(name, caplog):
    with caplog.at_level(logging.WARNING, "flowdata"):
        remark_on_random_samples(STILL[name](), None)
    assert caplog.text == ""


def test_views_of_random_samples_are_what_was_asked_for(caplog, monkeypatch):
    monkeypatch.setattr("flowdata.store.random_samples._remarks", set())

    def collate_images(samples):
        return torch.tensor(np.stack([s[0] for s in samples])), torch.tensor(
            [s[1] for s in samples]
        )

    with caplog.at_level(logging.WARNING, "flowdata"):
        scores = score_views(scorer(), DRAWS["torch"](), views=2, collate_fn=collate_images)
        assert len(FlowWeightedDataset(DRAWS["torch"](), scores)) == 12
    assert "differs from reading" not in caplog.text
    for name in (None, "flowers"):
        monkeypatch.setattr("flowdata.store.random_samples._remarks", set())
        caplog.clear()
        with caplog.at_level(logging.WARNING, "flowdata"):
            scorer().score(DRAWS["torch"](), collate_fn=collate_images, dataset_id=name)
        assert "differs from reading" in caplog.text


def test_a_data_set_that_has_a_name_need_not_be_recognised(caplog, monkeypatch):
    monkeypatch.setattr("flowdata.store.random_samples._remarks", set())
    with caplog.at_level(logging.WARNING, "flowdata"):
        remark_on_random_samples(DRAWS["own"](), "flowers")
    assert "differs from reading" in caplog.text
    assert "pass dataset_id" not in caplog.text


def test_a_sample_that_can_not_be_read_is_passed_over():
    class Torn(Folder):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("torn")
            return super().__getitem__(index)

    content_identity(Torn(), skip_unreadable=True)
    remark_on_random_samples(Torn(), None, skip_unreadable=True)
    torn = rows().with_transform(lambda batch: 1 / 0)
    content_identity(torn, skip_unreadable=True)
    remark_on_random_samples(torn, None, skip_unreadable=True)


def test_scores_say_that_a_sample_of_the_samples_was_fingerprinted(tmp_path, caplog):
    def collate_images(samples):
        return torch.tensor(np.stack([s[0] for s in samples])), torch.tensor(
            [s[1] for s in samples]
        )

    large = scorer().score(Folder(count=600), collate_fn=collate_images, store=tmp_path)
    note = sampling_note(large.metadata["identity"]["dataset"])
    assert note == "only 512 of the 600 samples were fingerprinted, since code gives them"
    assert read_manifest(tmp_path)["identity"]["dataset"].endswith(" sampled:512/600")
    assert "are returned as they are" not in caplog.text
    again = scorer().score(Folder(count=600), collate_fn=collate_images, store=tmp_path)
    assert torch.equal(again.losses, large.losses)
    assert f"are returned as they are: {note}, so that a change to others goes" in caplog.text
    small = scorer().score(Folder(count=500), collate_fn=collate_images)
    assert sampling_note(small.metadata["identity"]["dataset"]) == ""


def test_that_some_samples_were_fingerprinted_is_said_once_for_a_data_set(tmp_path, caplog):
    caplog.set_level(logging.INFO, "flowdata")

    def times_said(count, store=None):
        caplog.clear()
        torch.manual_seed(0)
        shown = LossScorer(nn.Linear(4, 3), "cross_entropy", progress=True)
        shown.score(Folder(count=count), store=store)
        note = f"only 512 of the {count} samples were fingerprinted"
        assert note in shown.explain()
        return sum(note in message for message in caplog.messages)

    assert times_said(700, tmp_path) == 1
    assert times_said(700) == 0
    assert times_said(700, tmp_path) == 1  # now of losses that are returned as they are
    assert times_said(700, tmp_path) == 0
    assert times_said(800) == 1


# --- scores of earlier versions ------------------------------------------------------------------


def test_scores_of_an_earlier_scheme_are_refused_with_the_reason(tmp_path):
    data = TensorDataset(torch.ones(4, 4), torch.arange(4) % 3)
    scores = scorer().score(data, store=tmp_path / "now")
    identity = scores.metadata["identity"]
    assert identity["model"].startswith("2:")
    assert identity["dataset"].startswith("content:2:")
    earlier = {
        **identity,
        "dataset": identity["dataset"].replace("content:2:", "content:"),
        "model": identity["model"].removeprefix("2:"),
    }
    old = Scores(scores.losses, scores.counts, metadata={**scores.metadata, "identity": earlier})
    reason = "made by an earlier version of flowdata, whose fingerprints saw neither"
    with pytest.raises(ScoreMismatchError, match=reason):
        FlowWeightedDataset(data, old)
    old.save(tmp_path / "then")
    with pytest.raises(ScoreMismatchError, match=f"another data set and model.*{reason}"):
        scorer().score(data, store=tmp_path / "then")


# --- columns that the model is not given ---------------------------------------------------------


def token_rows(**columns):
    data = tiny.as_hf_dataset(tiny.make_samples(8))
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data


def note(count=8):
    return [f"note {i}" for i in range(count)]


GIVEN = {  # columns that a language model takes, or that say what its targets are
    "attention_mask": lambda data: [[1] * (len(row) - 1) + [0] for row in data["input_ids"]],
    "position_ids": lambda data: [list(range(len(row))) for row in data["input_ids"]],
}


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_scores_stay_valid_when_a_column_is_added_that_the_model_is_not_given(tmp_path, form):
    lm = LossScorer(tiny.make_model(), progress=False)
    scores = lm.score(token_rows().with_format(form), store=tmp_path)
    wider = token_rows(note=note(), difficulty=[float(i) for i in range(8)]).with_format(form)
    assert torch.equal(lm.score(wider, store=tmp_path).losses, scores.losses)
    assert len(FlowWeightedDataset(wider, scores)) == 8
    assert scores.to_column(wider).column_names[-1] == "weight"
    assert Scores.load(tmp_path).check_dataset(wider) is None
    assert Scores.load(tmp_path).check_dataset(wider.remove_columns(["note"])) is None
    # And the other way round: what was there and is not any more.
    there = lm.score(wider, store=tmp_path / "wider")
    assert len(FlowWeightedDataset(token_rows().with_format(form), there)) == 8


@pytest.mark.parametrize("name", GIVEN)
def test_a_column_that_the_model_is_given_makes_another_data_set(tmp_path, name):
    lm = LossScorer(tiny.make_model(), progress=False)
    scores = lm.score(token_rows(), store=tmp_path)
    other = token_rows(**{name: GIVEN[name](token_rows())})
    with pytest.raises(ScoreMismatchError, match="samples differ in content or order"):
        FlowWeightedDataset(other, scores)
    with pytest.raises(ScoreMismatchError, match="another data set"):
        lm.score(other, store=tmp_path)


def test_labels_that_are_added_make_another_data_set():
    bare = token_rows().remove_columns("labels")
    scores = LossScorer(tiny.make_model(), progress=False).score(bare)
    assert len(FlowWeightedDataset(bare.add_column("note", note()), scores)) == 8
    with pytest.raises(ScoreMismatchError, match="samples differ in content or order"):
        FlowWeightedDataset(token_rows(), scores)


def test_what_may_read_any_column_is_held_to_all_of_them():
    lm = LossScorer(tiny.make_model(), progress=False)

    def pad_tokens(samples):
        pairs = [{k: torch.tensor(s[k]) for k in ("input_ids", "labels")} for s in samples]
        return tiny.collate(pairs)

    def shown(batch):
        return {name: batch[name] for name in ("input_ids", "labels")}

    for data, options in (
        (token_rows(), {"collate_fn": pad_tokens}),
        (token_rows().with_transform(shown), {}),
    ):
        scores = lm.score(data, **options)
        wider = token_rows(note=note()).with_format(**data.format)
        with pytest.raises(ScoreMismatchError, match=r"weights\(\).*with a column more"):
            FlowWeightedDataset(wider, scores)


def painted(folder, *shades):
    """A data set of pictures that lie in a folder, each of one shade of red."""
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{index}.bmp") for index in range(len(shades))]
    for path, shade in zip(paths, shades, strict=True):
        PIL.Image.new("RGB", (2, 2), (shade, 0, 0)).save(path)
    rows = {"image": paths, "pair": [paths[:2]] * len(paths), "y": list(range(len(paths)))}
    data = datasets.Dataset.from_dict(rows)
    return data.cast_column("image", datasets.Image()).cast_column(
        "pair", datasets.List(datasets.Image())
    )


def test_the_files_that_rows_name_count_wherever_they_lie(tmp_path):
    before = content_identity(painted(tmp_path / "first", 1, 2, 3))
    assert content_identity(painted(tmp_path / "second", 1, 2, 3)) == before
    repainted = painted(tmp_path / "first", 1, 2, 4)
    assert content_identity(repainted) != before
    assert "sampled" not in before
    pairs = repainted.select_columns("pair").select([2])
    before = content_identity(pairs)
    painted(tmp_path / "first", 9, 2, 4)
    assert content_identity(pairs) != before
    (tmp_path / "first" / "0.bmp").unlink()
    assert content_identity(pairs) != before


def test_of_many_files_all_sizes_count_and_the_contents_of_some(tmp_path):
    data = painted(tmp_path / "many", *(index % 256 for index in range(600)))
    before = content_identity(data)
    assert before.partition(" sampled:")[2].startswith("512/600")
    note = sampling_note(before)
    assert note == "only 512 of the 600 samples were fingerprinted, since files hold them"
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "many" / "6.bmp")
    assert content_identity(data) != before


def test_pictures_of_other_palettes_differ():
    def drawn(*colour):
        picture = PIL.Image.new("P", (2, 2))
        picture.putpalette(bytes(colour) * 256)
        return picture

    red, blue = drawn(255, 0, 0), drawn(0, 0, 255)
    assert fingerprint_dataset([red]) == fingerprint_dataset([red.copy()])
    assert fingerprint_dataset([red]) != fingerprint_dataset([blue])
    assert fingerprint_callable(partial(len, red)) != fingerprint_callable(partial(len, blue))
