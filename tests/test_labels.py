"""Labels and samples of images that are not what a loss takes: one line each, with what to do."""

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import LossScorer
from tests.models import TinyResNet, images

NAMES = ("cat", "dog", "owl", "fox", "bat")


def pairs(change, count=30):
    return [change(image, label, place) for place, (image, label) in enumerate(images(count))]


def labelled(change):
    return pairs(lambda image, label, place: (image, change(label)))


def picture(image):
    return PIL.Image.fromarray((image.movedim(0, 2).numpy() * 20 + 99).astype(np.uint8))


def refusal(data, loss="auto", model=None):
    with pytest.raises(ValueError, match=r".+") as caught:
        LossScorer(model or TinyResNet(), loss, progress=False).score(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


NUMBERING = "give each class its number in the model (int64, from 0 on), as by class_names.index("
IMAGE = " second: if the first is the target, swap them ("
CASES = {  # name: samples, what the message says of them with loss="auto" and "cross_entropy" alike
    "strings": (labelled(NAMES.__getitem__), "the targets are strings, such as '"),
    "strings, with the remedy": (labelled(NAMES.__getitem__), NUMBERING),
    "NumPy's strings": (labelled(lambda label: np.str_(NAMES[label])), NUMBERING),
    "bytes": (labelled(lambda label: NAMES[label].encode()), "the targets are strings, such as b'"),
    "strings by name": (
        pairs(lambda image, label, _: {"pixel_values": image, "label": NAMES[label]}),
        NUMBERING,
    ),
    "floating": (labelled(float), "if they are classes, give them as integers, as by .long()"),
    "NumPy's floating": (labelled(np.float32), "as by .long()"),
    "floating, with an axis": (
        labelled(lambda label: torch.tensor([float(label)])),
        "as by .squeeze(1).long()",
    ),
    "None": (labelled(lambda label: None), ": the target is None; give it a value (-100 where no"),
    "None by name": (
        pairs(lambda image, label, _: {"pixel_values": image, "label": None}),
        ": 'label' is None; give it a value",
    ),
    "one None": (
        pairs(lambda image, label, place: (image, None if place == 23 else label)),
        "the target is None; give it a value",
    ),
    "pictures": (
        pairs(lambda image, label, _: (picture(image), label)),
        ": they hold images of PIL; give the data set the transform of the model's evaluation",
    ),
    "swapped": (
        pairs(lambda image, label, _: (label, image)),
        f"these have one whole number first and shape (3, 8, 8){IMAGE}",
    ),
    "swapped bytes": (
        pairs(lambda image, label, _: (label, (image * 20 + 99).byte())),
        f"(3, 8, 8){IMAGE}",
    ),
    "channels last": (
        pairs(lambda image, label, _: (image.movedim(0, 2), label)),
        "These seem to have their channels last, where most models take images of shape (C, H, W)",
    ),
}


@pytest.mark.parametrize("loss", ["auto", "cross_entropy"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said_with_what_to_do(name, loss):
    samples, words = CASES[name]
    assert words in refusal(samples, loss)


def test_a_model_that_fails_in_words_of_its_own_on_swapped_pairs_says_so_too():
    samples = pairs(lambda image, label, _: (label, image))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))  # fails with an IndexError
    assert IMAGE in refusal(samples, model=flat)
    assert refusal(samples, model=flat).count("Dimension out of range") == 1


def test_the_one_sample_that_can_not_be_collated_is_named():
    samples = pairs(lambda image, label, place: (image, None if place == 23 else label))
    assert "(sample 23; samples count from 0)" in refusal(samples, "cross_entropy")
    samples[23] = (torch.zeros(3, 9, 9), 0)  # it can be alone, so that none is to blame
    assert "sample 23" not in refusal(samples, "cross_entropy")


@pytest.mark.parametrize("loss", ["auto", "cross_entropy"])
def test_classes_with_an_axis_of_their_own_are_one_for_each_sample(loss):
    stacked = torch.stack([image for image, _ in images(20)])
    labels = torch.tensor([label for _, label in images(20)])
    columns = ("entropy", "correct", "gradient_norm")
    scorer = LossScorer(TinyResNet(), loss, columns=columns, progress=False)
    expected = scorer.score(TensorDataset(stacked, labels))
    scores = scorer.score(TensorDataset(stacked, labels[:, None]))
    assert torch.equal(scores.losses, expected.losses)
    assert torch.equal(scores.counts, expected.counts)
    for name in columns:
        assert torch.equal(scores.columns[name], expected.columns[name])


@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
def test_numbers_with_an_axis_too_many_say_which_to_squeeze(loss):
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    data = TensorDataset(torch.randn(6, 4), torch.rand(6, 1))
    message = refusal(data, loss, model)
    assert (
        "must have shape (1,), got (1, 1); give one number a sample, as by .squeeze(-1)" in message
    )
