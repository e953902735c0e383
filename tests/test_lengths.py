"""Only tokens are counted in tokens; images, sound and what holds them go by the batch size."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from flowdata import LossScorer
from flowdata.scoring.plan.lengths import length_of, sample_lengths
from tests.models import TinyResNet, tiny_llama, token_samples

IMAGE = torch.ones(3, 8, 8)
PICTURE = PIL.Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("sample", "length"),
    [
        ({"input_ids": [1, 2, 3]}, 3),
        ({"input_ids": []}, 0),
        ({"input_ids": torch.arange(5)}, 5),
        ({"input_ids": np.arange(5, dtype=np.uint16)}, 5),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 1]}, 3),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, 5),  # of a decoder
        ({"input_ids": [1, 2, 3], "label": 1, "weight": 0.5, "text": "a b c", "id": None}, 3),
        ({"input_ids": [1, 2, 3], "labels": torch.tensor([0.0, 1.0])}, 5),  # of many classes
        ({"input_ids": [1, 2, 3], "token_weights": [0.1, 0.2, 0.3]}, 3),
        ({"input_ids": [1, 2, 3], "bbox": [[0, 0, 1, 1]] * 3}, 3),
        ({"input_ids": torch.arange(3), "bbox": torch.zeros(3, 4)}, 3),
        ({"input_ids": [1, 2], "messages": [{"role": "user", "content": "x"}]}, 2),
        ({"input_ids": [1, 2], "answers": [["a", "b"]]}, 2),
        ("x" * 30, 11),
        ({"prompt": "x" * 9, "completion": "x" * 9, "label": 3}, 7),
        (("x" * 9, 1), 4),
        ({"text": "x" * 9, "score": np.float32(0.5), "known": True, "note": None}, 4),
        ({"text": "x" * 9, "label": torch.tensor(1)}, 4),
    ],
)
def test_tokens_and_text_have_a_length(sample, length):
    assert length_of(sample) == length


@pytest.mark.parametrize(
    "sample",
    [
        {"image": IMAGE, "caption": "a cat"},
        {"pixel_values": IMAGE.numpy(), "label": 1, "file": "cat"},
        {"image": PICTURE, "caption": "a cat"},
        {"image": IMAGE.tolist(), "caption": "a cat"},
        {"audio": torch.ones(100), "text": "a word"},
        {"audio": [0.1, 0.2], "text": "a word"},
        {"table": [1.5, 2.5], "name": "row 1"},
        {"image": {"bytes": b"", "path": None}, "caption": "a cat"},
        (IMAGE, "a cat"),
        (PICTURE, "a cat", 1),
        {"image": "folder/cat.jpg", "label": 1},
        ("folder/word.wav", 3),
        "folder/cat.PNG",
        {"input_ids": [1, 2], "pixel_values": IMAGE},
        {"input_ids": torch.arange(4), "pixel_values": torch.ones(64, 12)},
        {"input_ids": [1, 2], "pixel_values": IMAGE.tolist()},
        {"input_ids": [1, 2], "pixel_values": torch.ones(2, 12)},  # a patch a token, by chance
        {"input_ids": [1, 2], "images": [PICTURE]},
        {"input_ids": [1, 2], "images": [IMAGE]},
        {"input_ids": [1, 2], "image": PICTURE},
        {"input_ids": [1, 2], "image": {"bytes": b"", "path": None}},
        {"input_ids": [1, 2], "input_values": torch.ones(16000)},
        {"input_ids": [1, 2], "input_values": [0.5] * 100},
        {"input_ids": torch.ones(5)},  # floats
        {"input_ids": [0.5, 1.5]},
        {"input_ids": torch.ones(2, 5, dtype=torch.long)},  # choices
        {"input_ids": [[1, 2], [3, 4]]},
        {"input_features": torch.ones(80, 10), "labels": [1, 2]},
        (IMAGE, 1),
        IMAGE,
        1,
    ],
)
def test_all_else_has_none(sample):
    assert length_of(sample) is None
    assert sample_lengths([sample, sample]) is None
    assert sample_lengths([sample, sample], [4, 5]).tolist() == [4, 5]  # but the user's own
    assert sample_lengths([sample, sample], [4, 2**40]).tolist() == [4, 2**31 - 1]


def test_one_sample_without_a_length_leaves_all_without():
    tokens = {"input_ids": [1, 2, 3]}
    assert sample_lengths([tokens, tokens]).tolist() == [3, 3]
    assert sample_lengths([tokens, tokens | {"pixel_values": IMAGE}]) is None
    assert sample_lengths(["a text", {"text": "another", "image": IMAGE}]) is None


def hugging_face(**columns):
    return datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], **columns})


def test_of_hugging_face_data_sets():
    assert sample_lengths(hugging_face()).tolist() == [3, 1]
    assert sample_lengths(hugging_face().with_format("torch")).tolist() == [3, 1]
    assert sample_lengths(hugging_face(labels=[[0.5, 1.0], [1.0, 0.5]])).tolist() == [5, 3]
    assert sample_lengths(hugging_face(note=[[["a"]], []])).tolist() == [3, 1]
    assert sample_lengths(hugging_face(sound=[[0.1] * 50, [0.2] * 50])) is None
    pictures = hugging_face(image=[None, PICTURE]).cast_column("image", datasets.Image())
    assert sample_lengths(pictures) is None  # though the first sample has none
    assert sample_lengths(pictures.with_format(columns=["input_ids"])).tolist() == [3, 1]
    cut = hugging_face().with_transform(
        lambda batch: {"input_ids": [[1]] * len(batch["input_ids"])}
    )
    assert sample_lengths(cut).tolist() == [1, 1]  # what the model is given
    of_text = datasets.Dataset.from_dict({"text": ["a b", "c"]}).with_transform(
        lambda batch: {"input_ids": [[1] * len(text) for text in batch["text"]]}
    )
    assert sample_lengths(of_text).tolist() == [3, 1]


class Named(Dataset):
    """Images with a name beside each, as the case has them."""

    def __len__(self):
        return 819

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "image": torch.randn(3, 8, 8, generator=generator),
            "name": f"{index}",
            "label": index % 5,
        }


def collate(samples):
    return torch.stack([s["image"] for s in samples]), torch.tensor([s["label"] for s in samples])


class Sizes(TinyResNet):
    def forward(self, images):
        self.largest = max(getattr(self, "largest", 0), len(images))
        return super().forward(images)


def test_named_images_are_scored_in_batches():
    model = Sizes().eval()
    scorer = LossScorer(model, "cross_entropy", progress=False)
    scores = scorer.score(Named(), collate_fn=collate)
    assert scores.metadata["plan"]["batch_size"] == 64
    assert scores.metadata["plan"]["max_tokens"] is None
    assert scores.metadata["plan"]["packs"] == 13
    with torch.no_grad():
        alone = [
            nn.functional.cross_entropy(model(image), label)
            for image, label in (collate([Named()[index]]) for index in (0, 400, 818))
        ]
    torch.testing.assert_close(scores.losses[[0, 400, 818]], torch.stack(alone))


def test_tokens_with_notes_are_still_packed():
    samples = [sample | {"source": "a book"} for sample in token_samples(6)]
    scores = LossScorer(tiny_llama(), progress=False).score(samples)
    assert scores.metadata["plan"]["max_tokens"] == 4096


class Flat:
    """Tokens in a flat array, as data sets of one's own keep them."""

    def __init__(self):
        self.input_ids, self.offsets = np.arange(40, dtype=np.uint16), np.arange(0, 41, 10)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": self.input_ids[self.offsets[index] : self.offsets[index + 1] - index]}


def test_a_strangers_flat_arrays_are_read_sample_by_sample():
    assert sample_lengths(Flat()).tolist() == [10, 9, 8, 7]
