"""What is done to training sets: as many labels wrong as the name says, and no others."""

import numpy as np
import pytest

from benchmarks.forgetting.corruptions import corrupted

GENERATOR = np.random.default_rng(0)
ARRAYS = GENERATOR.integers(0, 255, (600, 4, 4)), GENERATOR.integers(0, 10, 600)


def changed(name, seed=0):
    return corrupted(name).train(ARRAYS, seed)


def test_a_third_is_shuffled():
    images, labels = changed("noisy_digits")
    assert images is ARRAYS[0]
    is_third = np.arange(600) % 3 == 0
    assert (labels == ARRAYS[1])[~is_third].all()
    assert sorted(labels[is_third]) == sorted(ARRAYS[1][is_third])
    assert 0.8 < (labels != ARRAYS[1])[is_third].mean() < 1


@pytest.mark.parametrize("percent", [10, 20, 33, 50])
def test_so_many_labels_are_wrong(percent):
    labels = changed(f"wrong{percent}_digits")[1]
    is_wrong = labels != ARRAYS[1]
    assert is_wrong.sum() == round(6 * percent)
    steps = (labels - ARRAYS[1])[is_wrong] % 10
    assert set(steps) == set(range(1, 10))  # any other class
    assert set(labels) == set(range(10))


def test_pairs_are_wrong_by_one():
    labels = changed("pairs20_digits")[1]
    is_wrong = labels != ARRAYS[1]
    assert is_wrong.sum() == 120
    assert set((labels - ARRAYS[1])[is_wrong] % 10) == {1}


def test_a_rare_class_is_rare_and_right():
    images, labels = changed("rare_letters")
    before = (ARRAYS[1] == 0).sum()
    assert (labels == 0).sum() == round(0.1 * before)
    assert len(images) == len(labels) == 600 - before + round(0.1 * before)
    rest = ARRAYS[1] != 0
    assert np.array_equal(images[labels != 0], ARRAYS[0][rest])
    assert np.array_equal(labels[labels != 0], ARRAYS[1][rest])


def test_the_validation_set_changes_only_where_it_is_misjudged():
    for name in ("digits", "noisy_digits", "wrong20_digits", "rare_digits"):
        assert corrupted(name).validation(ARRAYS, 0) is ARRAYS
    misjudged = corrupted("misjudged20_digits")
    assert (misjudged.validation(ARRAYS, 0)[1] != ARRAYS[1]).sum() == 120
    assert (misjudged.train(ARRAYS, 0)[1] != ARRAYS[1]).sum() == 120


def test_a_seed_gives_the_same_and_another_others():
    assert np.array_equal(changed("wrong20_digits")[1], changed("wrong20_digits")[1])
    assert not np.array_equal(changed("wrong20_digits")[1], changed("wrong20_digits", 1)[1])


def test_names_without_words_are_left_alone_and_bad_ones_refused():
    assert corrupted("fashion_mnist").target == "fashion_mnist"
    assert corrupted("noisy_fashion_mnist").target == "fashion_mnist"
    assert corrupted("wrong10_mine=images.npz").target == "mine=images.npz"
    for name in ("wrong_digits", "wrong0_digits", "pairs100_digits"):
        with pytest.raises(ValueError, match="say how many per cent"):
            corrupted(name)
    with pytest.raises(ValueError, match="takes no number"):
        corrupted("noisy20_digits")
