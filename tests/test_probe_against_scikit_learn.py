"""The bound of `python -m benchmarks probe`, on fewer splits."""

import pytest

pytest.importorskip("sklearn")

from benchmarks.probe import CLASSES, VALUES, compare, is_worse


@pytest.mark.parametrize("name", CLASSES + VALUES)
def test_the_probe_is_no_worse_than_scikit_learn_with_standardised_columns(name):
    row = compare(name, splits=1 if name == "digits" else 3)
    assert not is_worse(row), row


def test_worse_by_more_than_the_bound_is_told_from_worse_by_less():
    def row(points, nats):
        return {
            "flowdata": {"points": points, "nats": nats},
            "scikit-learn": {"points": 90.0, "nats": 0.1},
        }

    assert not is_worse(row(89.6, 0.119))
    assert is_worse(row(89.4, 0.1))
    assert is_worse(row(95.0, 0.121))
