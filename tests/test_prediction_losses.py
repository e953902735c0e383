import pytest
import torch
import torch.nn.functional as F

from flowdata.targets.labels import IGNORE_INDEX
from flowdata.targets.prediction_losses import binary_cross_entropy, cross_entropy, squared_error


@pytest.mark.parametrize("classes_last", [False, True])
def test_cross_entropies_of_several_targets_a_sample(classes_last):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3)
    targets = torch.tensor([[0, 2, IGNORE_INDEX, 1, IGNORE_INDEX], [IGNORE_INDEX] * 5])
    losses = cross_entropy(
        logits if classes_last else logits.movedim(-1, 1), targets, classes_last=classes_last
    )
    assert losses.counts.tolist() == [3, 0]
    places = [0, 1, 3]
    expected = F.cross_entropy(logits[0, places], targets[0, places], reduction="none")
    torch.testing.assert_close(losses.values, expected)


def test_as_many_classes_as_places_are_told_by_the_argument():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 3), torch.tensor([[0, 2, 1], [1, 1, 0]])
    last = cross_entropy(logits, targets, classes_last=True).values
    torch.testing.assert_close(last, cross_entropy(logits.movedim(-1, 1), targets).values)
    assert not torch.allclose(last, cross_entropy(logits, targets).values)


@pytest.mark.parametrize("shape", [(4,), (4, 3, 2)])
def test_probabilities_are_one_row_a_sample(shape):
    with pytest.raises(ValueError, match=r"probabilities of shape \(B, C\)"):
        cross_entropy(torch.zeros(shape), torch.full(shape, 0.5))


def test_probabilities_of_another_shape_than_the_logits_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(4, 3\), got \(4, 2\)"):
        cross_entropy(torch.randn(4, 3), torch.rand(4, 2))


def test_predictions_may_keep_the_axis_of_a_single_output():
    torch.manual_seed(0)
    values, targets = torch.randn(4, 1), torch.tensor([0.0, 1.0, 1.0, IGNORE_INDEX])
    assert binary_cross_entropy(values, targets).counts.tolist() == [1, 1, 1, 0]
    errors = squared_error(values, targets)
    torch.testing.assert_close(errors.values, (values[:, 0] - targets).square())
    assert errors.counts.tolist() == [1] * 4


def test_a_sequence_of_one_token_has_its_classes_last():
    logits, targets = torch.randn(1, 1, 5), torch.tensor([[3]])
    losses = cross_entropy(logits, targets, classes_last=True)
    torch.testing.assert_close(losses.values, -logits.log_softmax(-1)[0, :, 3])
    with pytest.raises(ValueError, match="at least two classes"):
        cross_entropy(torch.randn(4, 1), torch.zeros(4).long(), classes_last=True)
