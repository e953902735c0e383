import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowdata import effective_sample_size, flow_weights, resolve_temperature
from flowdata.scores import Scores
from flowdata.weights import shape_weights
from tests import reference

losses_lists = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=40)


@given(losses_lists, st.floats(0.01, 100))
def test_weights_equal_the_reference(values, temperature):
    weights = flow_weights(torch.tensor(values), temperature=temperature)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(reference.flow_weights(values, temperature), rel=1e-6)
    assert ((weights >= 0) & (weights <= 1)).all()


@given(losses_lists.filter(lambda values: reference.median(values) > 0))
def test_median_is_the_mean_of_the_two_middle_values(values):
    losses = torch.tensor(values, dtype=torch.float64)
    assert resolve_temperature(losses, "median") == reference.median(losses.tolist())


@given(losses_lists, st.floats(0.05, 0.95))
def test_quantiles_equal_numpy(values, share):
    expected = np.quantile(np.asarray(values, dtype=np.float64), share)
    if expected > 0:
        quantile = resolve_temperature(torch.tensor(values, dtype=torch.float64), f"q{share}")
        assert quantile == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_ess_temperature_gives_that_effective_sample_size(share, scale):
    losses = torch.rand(501, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    temperature = resolve_temperature(losses * scale + 3 * scale, f"ess{share}")
    weights = reference.flow_weights((losses * scale).tolist(), temperature)
    assert reference.effective_sample_size(weights) / 501 == pytest.approx(share, rel=1e-6)


def test_other_temperatures():
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert resolve_temperature(losses, "mean") == 3.0
    assert resolve_temperature(losses, 7) == 7.0
    assert resolve_temperature(losses, np.float32(0.5)) == 0.5
    assert resolve_temperature(losses, lambda values: values.max()) == 6.0


def test_median_above_2_to_the_24_elements():
    losses = torch.arange(2**24 + 3, dtype=torch.float32) / 2**24
    middle = losses[(2**24 + 3) // 2].item()
    assert resolve_temperature(losses.flip(0), "median") == middle


@given(st.lists(st.floats(2**-10, 10, width=32), min_size=1, max_size=40))
def test_effective_sample_size_equals_the_reference(values):
    expected = reference.effective_sample_size(values)
    assert effective_sample_size(torch.tensor(values)) == pytest.approx(expected, rel=1e-6)


def test_effective_sample_size_ignores_the_scale():
    tiny = torch.tensor([1e-30, 1e-30, 1e-30, 0.0], dtype=torch.float64) * 1e-200
    assert effective_sample_size(tiny) == pytest.approx(3)


def test_nothing_given_is_modified():
    losses = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    before = losses.detach().clone()
    weights = flow_weights(losses, temperature=lambda values: values.zero_().numel())
    assert torch.equal(losses, before)
    assert not weights.requires_grad


def test_normalising_and_capping_are_options():
    losses = torch.rand(100, generator=torch.Generator().manual_seed(0))
    normalized = flow_weights(losses, normalize="mean")
    assert normalized.mean().item() == pytest.approx(1, rel=1e-6)
    assert flow_weights(losses, normalize="mean", max_weight=1.1).max().item() == pytest.approx(1.1)


def test_shaping_normalises_first_and_caps_then_and_changes_nothing_by_default():
    weights = torch.tensor([1.0, 0.5, 0.0, 0.5])
    before = weights.clone()
    assert shape_weights(weights) is weights
    assert shape_weights(weights, normalize="mean").tolist() == [2.0, 1.0, 0.0, 1.0]
    assert shape_weights(weights, normalize="mean", max_weight=1.5).tolist() == [1.5, 1.0, 0.0, 1.0]
    assert shape_weights(weights, max_weight=0.75).tolist() == [0.75, 0.5, 0.0, 0.5]
    assert shape_weights(torch.zeros(2), normalize="mean").tolist() == [0.0, 0.0]
    assert torch.equal(weights, before)


def test_scores_shape_their_weights_as_flow_weights_does():
    options = {"normalize": "mean", "max_weight": 1.2}
    losses = torch.tensor([0.5, 1.0, 4.0])
    assert torch.equal(Scores(losses).weights(**options), flow_weights(losses, **options))
    gappy = Scores(torch.tensor([0.5, 1.0, math.nan, 4.0]))
    plain = gappy.weights(missing="zero")
    normalized = gappy.weights(missing="zero", normalize="mean")
    torch.testing.assert_close(normalized, plain / plain.mean())  # over all N samples
    assert gappy.weights(missing="zero", **options).max().item() == pytest.approx(1.2)
    for wrong in ({"normalize": "sum"}, {"max_weight": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            gappy.weights(missing="zero", **wrong)


def test_half_precision_numpy_and_lists_are_taken():
    values = [0.5, 1.0, 2.0]
    expected = flow_weights(torch.tensor(values))
    for given_as in (torch.tensor(values).bfloat16(), np.array(values), values):
        assert torch.equal(flow_weights(given_as), expected)


@pytest.mark.parametrize(
    ("losses", "temperature", "message"),
    [
        ([1.0, math.nan, 2.0], "median", r"losses\[1\] is nan: 1 of 3 losses are not finite"),
        ([1.0, 2.0, math.inf], 1.0, r"losses\[2\] is inf"),
        ([1.0, -2.0], 1.0, r"losses\[1\] is -2.0: 1 of 2 losses are negative"),
        ([], 1.0, r"not empty, got shape \(0,\)"),
        ([[1.0]], 1.0, r"1-D and not empty, got shape \(1, 1\)"),
        ([1.0, 2.0], 0.0, r"finite and > 0, but temperature=0.0 gives 0"),
        ([1.0, 2.0], -1.0, r"gives -1"),
        ([1.0, 2.0], math.nan, r"gives nan"),
        ([0.0, 0.0, 1.0], "median", r"gives 0; pass a positive float, 'mean' or a higher quantile"),
        ([0.0, 0.0], "mean", r"every loss is 0"),
        ([1.0, 2.0], "middle", r"'median', 'mean', a quantile"),
        ([0.0, 2.0], "q0", r"gives 0; pass"),
        ([1.0, 2.0], "ess1", r"the share must lie between 0 and 1"),
        ([1.0, 2.0], "q1.5", r"the share must lie between 0 and 1"),
        ([1.0, 2.0], "qx", r"got 'qx'"),
        ([1.0, 1.0, 2.0], "ess0.5", r"2 samples tie for the smallest loss"),
        ([1.0, 1.0], "ess0.9", r"every loss is the same"),
        ([1.0, 2.0], lambda losses: -1.0, r"gives -1"),
    ],
)
def test_bad_values_are_refused(losses, temperature, message):
    with pytest.raises(ValueError, match=message):
        flow_weights(losses, temperature=temperature)


def test_the_ends_are_quantiles_too():
    losses = torch.tensor([3.0, 1.0, 2.0])
    assert [resolve_temperature(losses, rule) for rule in ("q0", "q1", "q0.0", "q1.0")] == [
        1.0,
        3.0,
        1.0,
        3.0,
    ]


def test_bad_types_are_refused():
    with pytest.raises(TypeError, match="temperature='<lambda>' must return a float, got str"):
        resolve_temperature(torch.tensor([1.0]), lambda losses: "high")
    for wrong, name in ((Scores(torch.ones(2)), "Scores; pass its .losses"), ("loss", "str")):
        with pytest.raises(TypeError, match=f"a tensor, an array or a list of floats, got {name}"):
            flow_weights(wrong)
    with pytest.raises(ValueError, match="weights are negative; they must be >= 0"):
        effective_sample_size([1.0, -1.0])
    with pytest.raises(TypeError, match="must be floating, got dtype"):
        flow_weights(torch.tensor([1, 2]))
    for temperature in (True, None, [1.0]):
        with pytest.raises(TypeError, match="temperature must be a positive float"):
            resolve_temperature(torch.tensor([1.0]), temperature)
    with pytest.raises(ValueError, match="normalize must be"):
        flow_weights(torch.tensor([1.0]), normalize="sum")
    with pytest.raises(ValueError, match="max_weight must be positive"):
        flow_weights(torch.tensor([1.0]), max_weight=0)
    with pytest.raises(ValueError, match="weights are all zero"):
        effective_sample_size(torch.zeros(3))
    with pytest.raises(ValueError, match=r"weights\[0\] is -1.0"):
        effective_sample_size(torch.tensor([-1.0, 2.0]))
