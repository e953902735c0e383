"""Thumbnails on pages: what a sample's image becomes, and which samples have one."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from flowdata.drift.comparing import compare
from flowdata.report import write_report
from flowdata.report.thumbnails import thumbnail
from flowdata.scores import Scores

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def opened(address):
    kind, content = address.removeprefix("data:image/").split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.format.lower() == kind
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
    ],
)
def test_small_images_of_bytes_are_shown_as_they_are(image):
    assert np.array_equal(np.asarray(opened(thumbnail(image))), PIXELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_other_numbers_are_stretched_from_their_least_to_their_largest(dtype):
    values = torch.tensor([[-2.0, 0.0], [1.0, 2.0]]).to(dtype)
    expected = [[0, 128], [191, 255]]
    for image in (values, values[None], values[..., None]):
        shown = np.asarray(opened(thumbnail(image)))
        assert shown[..., 0].tolist() == shown[..., 2].tolist() == expected
    assert np.asarray(opened(thumbnail(values * 0))).max() == 0


def test_what_is_no_number_of_a_picture_does_not_hide_the_others():
    values = np.array([[np.nan, 0.0], [1.0, np.inf]])
    assert np.asarray(opened(thumbnail(values)))[..., 0].tolist() == [[0, 0], [255, 0]]


def test_pictures_of_sixteen_bits_are_stretched():
    deep = Image.fromarray(np.array([[0, 1000], [2000, 4000]], dtype=np.uint16))
    assert np.asarray(opened(thumbnail(deep)))[..., 0].tolist() == [[0, 64], [128, 255]]


def test_large_images_are_small_on_the_page():
    address = thumbnail(np.random.default_rng(0).integers(0, 255, (3, 600, 900), np.uint8))
    assert opened(address).size == (128, 85)
    assert len(address) < 12_000


@pytest.mark.parametrize(
    "image",
    ["a", 3, torch.zeros(4), torch.zeros(5, 7, 9), torch.zeros(2, 3, 4, 4), np.zeros((0, 3))],
)
def test_what_is_no_image_is_refused(tmp_path, image):
    with pytest.raises(TypeError, match="images= must give a PIL image, or a tensor or array"):
        write_report(Scores(torch.tensor([1.0, 2.0])), tmp_path, images=lambda _: image)


def test_the_easiest_and_the_hardest_samples_have_images(tmp_path):
    asked = []

    def image(index):
        asked.append(index)
        return None if index == 599 else PIXELS

    scores = Scores(torch.arange(600.0) / 100)
    page = write_report(scores, tmp_path, images=image, top=2).page.read_text("utf-8")
    assert asked[:4] == [0, 1, 599, 598]
    assert len(asked) == len(set(asked)) == 500
    assert set(asked[4:]) == set(range(102, 598))
    lists = page[page.index("<h2>Easiest samples") :]
    assert lists.count('<img class="thumbnail"') == 3
    assert 'alt="sample 598"' in lists
    assert "The images of 499 samples are here." in page


def test_captions_of_images_are_no_copies_of_each_other(tmp_path):
    def page(**images):
        scores = Scores(torch.tensor([1.0, 2.0]))
        report = write_report(scores, tmp_path, samples=lambda _: "taken for 3", **images)
        return report.page.read_text("utf-8")

    assert "copy: the same text" in page()
    assert "the same text" not in page(images=lambda _: PIXELS)


def test_a_comparison_shows_images_of_what_moved(tmp_path):
    before, after = Scores(torch.tensor([2.0, 1.0, 0.5])), Scores(torch.tensor([0.5, 1.0, 0.75]))
    page = compare(before, after).write(tmp_path, images=lambda _: PIXELS, top=1)
    lists = page.read_text("utf-8").partition("<h2>Learned most")[2]
    assert [f'alt="sample {i}"' in lists for i in range(3)] == [True, False, True]
