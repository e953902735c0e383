import pytest
import torch

from flowdata.head.tally import LOWEST, Tally, merge


def tally_of(logits, softcap):
    """The tally of (n, classes) logits in one go."""
    top = logits.amax(1)
    weights = (logits - top[:, None]).exp()
    slopes = 1 - (logits / softcap).square()
    shifted = logits - top[:, None]
    return Tally(
        top,
        weights.sum(1),
        (weights * shifted).sum(1),
        (weights * slopes).square().sum(1),
    )


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_merged_parts_are_the_tally_of_the_whole(scale):
    torch.manual_seed(0)
    logits = torch.randn(6, 40, dtype=torch.float64) * scale
    parts = [tally_of(part, 4 * scale) for part in logits.split([1, 29, 10], dim=1)]
    merged = merge(Tally(*map(torch.stack, zip(*parts, strict=True))))
    torch.testing.assert_close(tuple(merged), tuple(tally_of(logits, 4 * scale)))


def test_a_part_without_classes_changes_nothing():
    """Every class of a part may be ruled out, by a bias of −inf or as the target."""
    one = tally_of(torch.tensor([[1.0, 2.0]]), 5.0)
    none = Tally(torch.tensor([LOWEST]), *torch.ones(3, 1))
    merged = merge(Tally(*map(torch.stack, zip(one, none, strict=True))))
    assert [float(value) for value in merged] == [float(value) for value in one]
