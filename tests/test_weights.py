import copy
import json
import logging
import math
import pickle
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdata import effective_sample_size, flow_weights, resolve_temperature
from flowdata.scores import Scores
from flowdata.weights import RelativeTemperature, shape_weights, weigh
from tests import reference

losses_lists = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=40)
WIDTHS = {16: torch.float16, 32: torch.float32, 64: torch.float64}
QUANTILES = ("median", "mean", "q0", "q0.25", "q0.9", "q1")


@st.composite
def any_losses(draw):
    """Losses of any dtype and size: subnormal, huge, tied, zero."""
    width = draw(st.sampled_from(sorted(WIDTHS)))
    floats = st.floats(0, width=width, allow_nan=False, allow_infinity=False, allow_subnormal=True)
    pool = draw(st.lists(floats, min_size=1, max_size=8))
    values = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=40))
    return torch.tensor(values, dtype=WIDTHS[width])


def check_weights(losses, weights):
    """What weights are under every rule."""
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    assert ((weights >= 0) & (weights <= 1)).all()
    order = losses.double().argsort()
    assert (weights[order].diff() <= 0).all()  # the larger the loss, the smaller the weight
    for loss in losses.unique():
        assert len(weights[losses == loss].unique()) == 1


@settings(max_examples=300)
@given(any_losses(), st.sampled_from(QUANTILES), st.randoms(use_true_random=False))
def test_weights_of_any_quantile_or_mean_keep_their_promises(losses, rule, random):
    expected = reference.temperature_of(losses.tolist(), rule)
    if expected == 0:
        with pytest.raises(ValueError, match=f"temperature='{rule}'"):
            flow_weights(losses, temperature=rule)
        return
    weights = flow_weights(losses, temperature=rule)
    check_weights(losses, weights)
    assert weights.max() > 0
    if losses.max() > 1e-300:  # below, float64 has too few digits to compare by
        assert weights.tolist() == pytest.approx(
            reference.flow_weights(losses.tolist(), float(expected)), rel=1e-5, abs=1e-44
        )
    order = random.sample(range(len(losses)), len(losses))
    assert torch.equal(flow_weights(losses[order], temperature=rule), weights[order])


@settings(max_examples=300)
@given(any_losses(), st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_weights_of_any_effective_sample_size_keep_their_promises(losses, share, random):
    rule, ties = f"ess{share}", int((losses == losses.min()).sum())
    try:
        weights = flow_weights(losses, temperature=rule)
    except ValueError as error:
        refusal = str(error)
        if losses.min() == losses.max():
            assert "every loss is" in refusal
        elif "tie" in refusal:
            assert ties >= share * len(losses)
        else:
            assert losses.dtype == torch.float64
            assert "rescale the losses" in refusal
        return
    check_weights(losses, weights)
    assert weights.max() == 1
    size = effective_sample_size(weights) / len(losses)
    assert size == pytest.approx(share, rel=1e-4)
    order = random.sample(range(len(losses)), len(losses))
    assert torch.equal(flow_weights(losses[order], temperature=rule), weights[order])


@settings(max_examples=300)
@given(
    any_losses(),
    st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_weights_of_any_number_are_the_papers_formula(losses, number, is_callable, random):
    temperature = (lambda losses: number) if is_callable else number
    weights = flow_weights(losses, temperature=temperature)
    check_weights(losses, weights)
    expected = reference.flow_weights(losses.tolist(), number)
    assert weights.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-44)
    order = random.sample(range(len(losses)), len(losses))
    assert torch.equal(flow_weights(losses[order], temperature=temperature), weights[order])


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


def hard_losses():
    """A thousand losses that lie close together, far from 0."""
    return 7 + 0.05 * torch.randn(1000, generator=torch.Generator().manual_seed(0))


def test_ess_weights_are_relative_to_the_smallest_loss():
    losses = hard_losses()
    temperature = resolve_temperature(losses, "ess0.5")
    assert temperature.smallest_loss == losses.min().item()
    expected = reference.relative_flow_weights(losses, temperature)
    for given_as in ("ess0.5", temperature, lambda losses: resolve_temperature(losses, "ess0.5")):
        weights = flow_weights(losses, temperature=given_as)
        assert weights.max() == 1
        assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    normalized = flow_weights(losses, temperature="ess0.5", normalize="mean")
    assert normalized.mean().item() == pytest.approx(1)


def test_a_loss_below_the_smallest_weighs_1_too():
    losses = torch.tensor([[5.0, 7.0], [8.0, 9.0]])
    weights = weigh(losses, RelativeTemperature(2.0, smallest_loss=7.0))
    assert weights.tolist() == [[1.0, 1.0], pytest.approx([math.exp(-0.5), math.exp(-1)])]


def test_a_relative_temperature_is_a_float_that_keeps_its_loss():
    temperature = resolve_temperature(torch.tensor([3.0, 4.0, 5.0, 9.0]), "ess0.5")
    for same in (copy.deepcopy(temperature), pickle.loads(pickle.dumps(temperature))):
        assert (same, same.smallest_loss) == (temperature, 3.0)
    assert resolve_temperature([1.0], temperature) is temperature
    assert json.loads(json.dumps({"temperature": temperature}))["temperature"] == temperature
    assert type(2 * temperature) is float


@pytest.fixture
def warnings_of(caplog):
    """The warnings that a call logs."""

    def logged(function, *arguments, **options):
        caplog.clear()
        function(*arguments, **options)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    return logged


@pytest.mark.parametrize(
    ("losses", "rule", "message"),
    [
        (hard_losses(), 0.05, "a mean of 0, so that .*temperature='ess0.5', whose weights do not"),
        (hard_losses(), np.float64(1), r"temperature=1.0: .* 1,000 samples have a mean of 0.0009"),
        (hard_losses(), lambda losses: 1e-3, "temperature='<lambda>': .* a mean of 0"),
        (torch.cat([torch.tensor([0.001]), hard_losses()]), "q0", "'q0': .* a mean of 0.000368"),
        (torch.tensor([7.0, 7.0, 8.0]), 1e-3, "temperature='median', whose weights do not vanish"),
        (torch.tensor([7.0]), 1e-3, "1 samples .* temperature='median'"),
        (hard_losses(), 1e12, "all the same, although the losses differ.*'ess0.5', .* differ"),
        (
            7 + 1e-9 * torch.arange(20, dtype=torch.float64),
            "median",
            "'median': .*the same.*ess0.5",
        ),
        (torch.tensor([1.0, 2.0]), 1e12, "the same, although .*'median', whose weights differ"),
        (torch.full((1000,), 0.6931), "median", "of all 1,000 samples are 0.6931, .* every rule"),
        (torch.full((8,), 7.0), 0.07, "temperature='median'"),
        (torch.zeros(12), 1.0, "of all 12 samples are 0, .*check the model and the labels"),
    ],
)
def test_weights_of_no_use_are_warned_of_once(warnings_of, losses, rule, message):
    def twice():
        for _ in range(2):
            flow_weights(losses, temperature=rule)

    (warning,) = warnings_of(twice)
    assert re.search(message, warning)


@pytest.mark.parametrize(
    ("losses", "options"),
    [
        (hard_losses(), {"temperature": "ess0.5"}),
        (hard_losses(), {}),
        (hard_losses(), {"temperature": 1.0, "normalize": "mean"}),  # small, and then normalised
        (torch.full((3,), 0.6931), {}),  # a batch of equal losses says nothing of a data set
        (torch.tensor([2.0]), {}),
    ],
)
def test_useful_weights_and_a_few_equal_losses_are_not_warned_of(warnings_of, losses, options):
    assert warnings_of(flow_weights, losses, **options) == []


def test_normalised_weights_that_float32_holds_no_digits_of_are_warned_of(warnings_of):
    losses = torch.tensor([100.0, 101.0, 102.0])
    (warning,) = warnings_of(flow_weights, losses, temperature=1.0, normalize="mean")
    assert "pass temperature='ess0.5'" in warning


def test_batch_after_batch_is_warned_of_once(warnings_of):
    def loop():
        for batch in hard_losses().split(100):
            flow_weights(batch, temperature=1.0)

    (warning,) = warnings_of(loop)
    assert "of the 100 samples have a mean of 0.000" in warning


def test_another_line_of_the_program_and_other_losses_are_warned_of_again(warnings_of):
    def two_lines():
        flow_weights(hard_losses(), temperature=0.05)
        flow_weights(hard_losses(), temperature=0.05)

    assert len(warnings_of(two_lines)) == 2
    assert (
        len(
            warnings_of(lambda: [flow_weights(hard_losses()[n:], temperature=0.05) for n in (0, 9)])
        )
        == 2
    )


def test_the_first_rank_alone_warns():
    program = (
        "import os, sys, flowdata\n"
        "for rank in ('1', '0'):\n"
        "    os.environ['RANK'] = rank\n"
        "    flowdata.flow_weights([7.0, 8.0], temperature=1e-3)\n"
        "    print('RANK', rank, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for rank, told in zip("10", done.stderr.split("RANK ")[:2], strict=True):
        assert told.count("whose weights do not vanish") == (rank == "0")


@pytest.mark.parametrize(
    "number",
    [
        *(Fraction(1, 2), Decimal("0.5"), np.float16(0.5), np.array(0.5), np.array([0.5])),
        *(torch.tensor(0.5), torch.tensor([0.5]), torch.nn.Parameter(torch.tensor(0.5))),
        lambda losses: torch.tensor(0.5),
        lambda losses: Fraction(1, 2),
    ],
)
def test_any_real_number_is_a_temperature(number):
    assert resolve_temperature(torch.tensor([1.0, 2.0]), number) == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *((value, "got bool") for value in (True, np.True_)),
        *((value, r"got (complex|Tensor)") for value in (1j, torch.tensor(1j))),
        (torch.tensor(True), "got Tensor"),
        (torch.tensor([1.0, 2.0]), r"got Tensor of shape \(2,\)"),
        (np.ones((2, 3)), r"got ndarray of shape \(2, 3\)"),
        *((lambda losses, v=v: v, "must return a float") for v in (None, "0.5", True, 1j, [1.0])),
        (lambda losses: losses, "must return a float, got Tensor"),
    ],
)
def test_what_is_no_real_number_is_no_temperature(wrong, message):
    with pytest.raises(TypeError, match=message):
        flow_weights(torch.tensor([1.0, 2.0]), temperature=wrong)


@pytest.mark.parametrize("wrong", [10**400, Fraction(10**400), math.inf, lambda losses: math.inf])
def test_numbers_beyond_a_float_are_refused(wrong):
    with pytest.raises(ValueError, match=r"finite and > 0, but temperature=.* gives inf"):
        flow_weights(torch.tensor([1.0, 2.0]), temperature=wrong)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, np.float32(1e-45)])
def test_a_subnormal_temperature_makes_no_nan(temperature):
    weights = flow_weights(torch.tensor([0.0, 1e-3, 7.0]), temperature=temperature)
    assert weights.tolist() == [1.0, 0.0, 0.0]


def test_float64_losses_near_its_ends_have_weights():
    huge = torch.tensor([1e308, 1e308, 1.7e308], dtype=torch.float64)
    assert resolve_temperature(huge, "mean") == pytest.approx(3.7 / 3 * 1e308)
    tiny = torch.tensor([0.0, 5e-324, 5e-324], dtype=torch.float64)
    assert resolve_temperature(tiny, "median") == resolve_temperature(tiny, "mean") == 5e-324
    with pytest.raises(ValueError, match=r"'ess0.6' lies beyond what a float holds.*rescale"):
        resolve_temperature(torch.tensor([0.0, 5e-324, 1e-323], dtype=torch.float64), "ess0.6")
    with pytest.raises(ValueError, match=r"'ess0.9999' lies beyond what a float holds.*rescale"):
        resolve_temperature(torch.tensor([0.0, 1.7e308], dtype=torch.float64), "ess0.9999")


def test_weights_too_small_for_a_float32_mean_are_normalised_exactly():
    tiny = torch.zeros(2**12)
    tiny[:4] = 1e-44
    normalized = shape_weights(tiny, normalize="mean")
    assert normalized[:5].tolist() == [1024.0] * 4 + [0.0]
    huge = torch.tensor([3e38, 1e38])
    assert shape_weights(huge, normalize="mean").tolist() == pytest.approx([1.5, 0.5])


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
    options = {"normalize": "mean", "max_weight": np.float32(1.2)}
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
    narrow = [torch.tensor(values).to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    for given_as in (*narrow, np.array(values), values):
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
    for wrong in (0, "1", True, math.nan, torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="max_weight must be positive, got"):
            flow_weights(torch.tensor([1.0]), max_weight=wrong)
    if np.dtype(np.longdouble) != np.float64:
        with pytest.raises(TypeError, match="got ndarray of float128"):
            flow_weights(np.ones(2, dtype=np.longdouble))
    with pytest.raises(TypeError, match="got ndarray of object"):
        flow_weights(np.array([1.0, None]))
    with pytest.raises(ValueError, match="weights are all zero"):
        effective_sample_size(torch.zeros(3))
    with pytest.raises(ValueError, match=r"weights\[0\] is -1.0"):
        effective_sample_size(torch.tensor([-1.0, 2.0]))
