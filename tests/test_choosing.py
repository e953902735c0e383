"""Choosing among runs by validation and drift."""

import json
import logging
import math
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from flowdata.drift import Drift, choose, draw_front, rank
from flowdata.drift.choosing import _Terms

ONES = torch.ones(64, dtype=torch.float64)


def drift(kl=0.1, agreement=0.9, cosine=0.9, *, of="tokens", samples=64, per_sample=None):
    return Drift(
        kl, kl, cosine, agreement, samples=samples, head="own", of=of, per_sample=per_sample or {}
    )


def scored(*scores, of="samples"):
    return [(str(place), score, drift(of=of)) for place, score in enumerate(scores)]


def test_losses_and_drifts_are_added_in_nats():
    runs = [("1e-5", 0.99, drift(0.001)), ("1e-4", 0.95, drift(0.012)), ("1e-3", 0.90, drift(1.5))]
    assert choose(runs) == "1e-4"
    assert choose(runs, exchange=0) == "1e-3"
    assert choose(runs, exchange=10) == "1e-5"
    assert [c.cost for c in rank(runs)] == pytest.approx([0.962, 0.991, 2.4])


@pytest.mark.parametrize("unit", [1, 100])
@pytest.mark.parametrize("of", ["samples", "tokens"])
def test_accuracies_and_what_was_kept_are_added_as_shares(unit, of):
    runs = [
        (name, accuracy * unit, drift(agreement=kept, cosine=0.5 + kept / 2, of=of))
        for name, accuracy, kept in [("a", 0.60, 0.99), ("b", 0.80, 0.90), ("c", 0.82, 0.30)]
    ]
    assert choose(runs, validation="accuracy") == "b"
    assert choose(runs, validation="accuracy", exchange=0) == "c"
    assert choose(runs, validation="accuracy", exchange=5) == "a"
    costs = [candidate.cost for candidate in rank(runs, validation="accuracy")]
    assert costs == pytest.approx([-1.7, -1.59, -1.12])


def test_what_is_lost_can_not_be_lost_twice():
    gone, further = drift(cosine=0.5, of="samples"), drift(cosine=0.2, of="samples")
    assert gone.kept == further.kept == 0
    assert drift(cosine=1.0, of="samples").kept == 1
    assert drift(agreement=0.7).kept == 0.7


def test_auto_says_what_it_takes_scores_for(caplog):
    with caplog.at_level(logging.INFO, "flowdata"):
        for _ in range(2):  # a line that is run again has nothing new to say
            choose([("a", 0.5, drift())])
            choose([("a", 0.5, drift(of="samples"))])
        choose([("a", 0.5, drift(of="samples"))], validation="loss")
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "losses in nats (less is better)" in said[0]
    assert "accuracies (more is better)" in said[1]


def test_what_was_taken_for_what_is_printed_where_no_logging_is_set_up(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flowdata"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("flowdata"), "handlers", [])
    rank([("a", 0.5, drift())])
    assert "flowdata: validation scores are taken for losses in nats" in capsys.readouterr().err


def test_the_picture_says_which_way_is_better(monkeypatch):
    monkeypatch.setattr("flowdata.drift.picture.png", lambda drawing: drawing)
    for kind, way in (("loss", "less is better"), ("accuracy", "more is better")):
        ranking = rank([("a", 0.5, drift())], validation=kind)
        axes = draw_front(ranking, measure="kl" if kind == "loss" else "kept").axes[0]
        assert kind in axes.get_ylabel()
        assert way in axes.get_ylabel()
        assert way in axes.get_xlabel()
    with pytest.raises(TypeError, match=r"must be what rank\(runs\) returns, got tuple"):
        draw_front([("a", 0.5, drift())])


def test_the_front_has_what_nothing_beats():
    runs = [
        ("kept", 1.0, drift(0.01)),
        ("beaten", 1.0, drift(0.02)),
        ("between", 0.9, drift(0.05)),
        ("learned", 0.8, drift(0.5)),
        ("diverged", math.nan, drift(math.inf)),
    ]
    candidates = {c.name: c for c in rank(runs)}
    assert [name for name, c in candidates.items() if c.is_on_front] == [
        "between",
        "kept",
        "learned",
    ]
    assert rank(runs)[-1].name == "diverged"
    assert candidates["diverged"].cost == math.inf


def test_runs_that_can_not_be_told_apart_are_said(caplog):
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(64, generator=generator).double()
    other = one + 0.1 * torch.randn(64, generator=generator).double()

    def measured(values):
        return drift(float(values.mean()), per_sample={"kl": values})

    runs = [("a", 1.0, measured(one)), ("b", 1.001, measured(other)), ("c", 1.5, measured(other))]
    tied = {candidate.name: candidate.is_tied for candidate in rank(runs)}
    assert tied["a"]
    assert tied["b"]
    assert not tied["c"]
    with caplog.at_level(logging.INFO, "flowdata"):
        best = choose(runs)
    least, other = sorted(runs[:2], key=lambda run: run[2].kl)
    assert f"{best} can't be told apart from {'b' if best == 'a' else 'a'}; of" in caplog.text
    assert f"of these {least[0]} drifted least: take it" in caplog.text
    assert not rank([runs[0], runs[2]])[0].is_tied  # the best alone is none of several


def test_of_runs_that_can_not_be_told_apart_it_says_which_to_take(caplog):
    def advice(best, other):
        caplog.clear()
        runs = [("best", *best), ("other", *other)]
        with caplog.at_level(logging.INFO, "flowdata"):
            assert choose(runs, validation="accuracy", validation_samples=1000) == "best"
        return caplog.messages[-1]

    near, far = (drift(kl, cosine=1 - kl, of="samples") for kl in (0.0, 0.1))
    assert advice((0.8, near), (0.98, far)) == (
        "best can't be told apart from other; of these best drifted least: take it, for it is the "
        "best estimate as well"
    )
    found = advice((0.85, far), (0.64, near))
    assert found == (
        "best can't be told apart from other; of these other drifted least: take it where you "
        "can't afford to forget, else best, the best estimate; about 15,000 validation samples "
        "would tell these two apart, if they differ by as much as here"
    )
    # 4 * (0.85 * 0.15 + 0.64 * 0.36) / 0.01**2 are 14,316, of which two digits are said.
    runs = [("best", 0.85, far), ("other", 0.64, near)]
    for samples, is_tied in ((14_300, True), (14_330, False)):
        ranking = rank(runs, validation="accuracy", validation_samples=samples)
        assert ranking[1].is_tied == is_tied
    alike = drift(0.1, cosine=1.0, of="samples")
    more = "; more validation samples or a larger probe may tell these two apart"
    assert advice((0.8, alike), (0.8, near)).endswith(more)


def test_samples_tell_nothing_apart_that_a_probe_leaves_open(caplog):
    off = torch.linspace(-0.2, 0.2, 64).double()
    near, far = (
        drift(kl, cosine=0.99 - kl / 10, of="samples", per_sample={"cosine": 0.9 + kl * off})
        for kl in (0.0, 0.1)
    )
    runs = [("best", 0.83, far), ("other", 0.80, near)]
    with caplog.at_level(logging.INFO, "flowdata"):
        assert choose(runs, validation="accuracy", validation_samples=1000) == "best"
    assert "about " in caplog.messages[-1]
    noisy = drift(0.1, cosine=0.98, of="samples", per_sample={"cosine": 0.9 + off})
    runs = [("best", 0.83, noisy), ("other", 0.80, near)]
    with caplog.at_level(logging.INFO, "flowdata"):
        assert choose(runs, validation="accuracy", validation_samples=1000) == "best"
    assert caplog.messages[-1].endswith("a larger probe may tell these two apart")


def share_told_apart(lengths, *, of_kept=False, draws=300, samples=64):
    """How often two runs that drift alike in truth are told apart on samples of some lengths."""
    generator, told = torch.Generator().manual_seed(0), 0
    for _ in range(draws):
        counts = lengths(generator, samples)
        runs = []
        for name in "ab":
            values = torch.rand(samples, generator=generator).double()
            values = {"agreement": values} if of_kept else {"kl": values}
            mean = float((next(iter(values.values())) * counts).sum() / counts.sum())
            runs.append((name, 1.0, drift(mean, mean, per_sample=values | {"targets": counts})))
        validation = "accuracy" if of_kept else "loss"
        told += not rank(runs, validation=validation)[1].is_tied
    return told / draws


@pytest.mark.parametrize("of_kept", [False, True])
def test_runs_are_told_apart_as_seldom_where_samples_differ_in_length(of_kept):
    def alike(generator, samples):
        return torch.full((samples,), 128)

    def unlike(generator, samples):
        is_short = torch.rand(samples, generator=generator) < 0.75
        return torch.where(is_short, 5, 128)

    for lengths in (alike, unlike):
        assert share_told_apart(lengths, of_kept=of_kept) < 0.1  # 0.05 is right


def test_the_error_is_that_of_a_mean_over_targets():
    values = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).double()
    old = [drift(per_sample={"kl": each}) for each in values]  # does not tell its targets
    error = _Terms("loss", 1.0, 1.0, None).error
    expected = float((values[0] - values[1]).std()) / 8
    assert error(("a", 1, old[0]), ("b", 1, old[1])) == pytest.approx(expected)
    alike = torch.full((64,), 7)
    new = [drift(per_sample={"kl": each, "targets": alike}) for each in values]
    assert error(("a", 1, new[0]), ("b", 1, new[1])) == pytest.approx(expected)
    few = torch.tensor([3, 0, 5])
    values = torch.tensor([[0.5, math.nan, 0.1], [0.2, math.nan, 0.3]])
    new = [drift(per_sample={"kl": each.double(), "targets": few}) for each in values]
    mean = (3 * 0.3 + 5 * -0.2) / 8
    expected = math.sqrt(2 * ((3 * (0.3 - mean)) ** 2 + (5 * (-0.2 - mean)) ** 2)) / 8
    assert error(("a", 1, new[0]), ("b", 1, new[1])) == pytest.approx(expected)


def test_the_choice_gives_its_reason_in_words_and_numbers(caplog):
    runs = [("1e-5", 0.99, drift(0.001)), ("1e-4", 0.95, drift(0.012)), ("1e-3", 0.90, drift(1.5))]
    with caplog.at_level(logging.INFO, "flowdata"):
        choose(runs, validation="loss", exchange=2)
    (record,) = caplog.records
    assert record.message == (
        "1e-4 has the least validation loss + 2 · KL: 0.95 + 2 · 0.012 = 0.974 nats a target; next "
        "come 1e-5 with 0.99 + 2 · 0.001 = 0.992 and 1e-3 with 0.9 + 2 · 1.5 = 3.9"
    )
    ranking = rank([*runs, ("far", math.nan, drift())], validation="loss")
    assert ranking[1].reason == (
        "1e-5 comes behind 1e-4: 0.99 + 0.001 = 0.991 to 0.95 + 0.012 = 0.962"
    )
    assert ranking[3].reason.startswith("far diverged")
    shares = [("a", 60.0, drift(agreement=0.99)), ("b", 80.0, drift(agreement=0.9))]
    assert rank(shares, validation="accuracy")[0].reason == (
        "b has the most accuracy + kept: 0.8 + 0.9 = 1.7; next comes a with 0.6 + 0.99 = 1.59"
    )
    close = [("a", 0.5, drift(0.1)), ("b", 0.50001, drift(0.1))]
    assert rank(close, validation="loss")[0].reason.endswith(
        "0.5 + 0.1 = 0.6 nats a target; next comes b with 0.50001 + 0.1 = 0.60001"
    )
    alone = rank([("a", 0.5, drift()), ("far", 0.5, drift(math.inf))], validation="loss")
    assert alone[0].reason.endswith("= 0.6 nats a target; all others diverged")


def test_names_may_be_of_any_kind(caplog):
    close = [drift(per_sample={"kl": torch.linspace(0, 1 + e, 64)}) for e in (0, 0.01)]
    runs = [(name, 1.0, each) for name, each in zip((1e-5, Path("a")), close, strict=True)]
    with caplog.at_level(logging.INFO, logger="flowdata"):
        assert choose(runs, validation="loss") == 1e-5
    assert "1e-05 can't be told apart from a" in caplog.text
    assert draw_front(rank(runs, validation="loss"))[:4] == b"\x89PNG"


def test_an_accuracy_is_as_certain_as_its_samples_are_many():
    runs = [(name, score, drift(of="samples")) for name, score in (("a", 0.81), ("b", 0.80))]
    for samples, is_tied in ((None, False), (100, True), (1_000_000, False)):
        other = rank(runs, validation_samples=samples)[1]
        assert other.is_tied == is_tied


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([], {}, "runs is empty"),
        ([("a", 1.0, drift())] * 2, {}, "two runs are named 'a'"),
        ([("a", 1.0, drift())], {"exchange": -1}, "exchange must be finite and >= 0"),
        ([("a", 1.0, drift())], {"exchange": "1"}, "exchange must be finite and >= 0"),
        ([("a", 1.0, drift())], {"validation_samples": -3}, "validation_samples must be"),
        ([("a", 1.0, drift())], {"validation_samples": 3}, "validation_samples has no effect on"),
        (scored(1.0), {"validation": "loss", "validation_samples": 3}, "no effect on losses: it"),
        ([("a", 1.0, drift())], {"validation": "f1"}, "'auto', 'loss' or 'accuracy', got 'f1'"),
        ([("a", -1.0, drift())], {"validation": "accuracy"}, "accuracies lie in"),
        ([("a", math.nan, drift())], {}, "all runs diverged"),
        ([("a", 1.0, drift()), ("b", 1.0, drift(samples=9))], {}, "several probes"),
        (scored(0.9, 90.0), {}, r"all shares or all in %, got 0.9 beside 90.0; give shares"),
        (scored(55.0, 1.0, 0.0), {}, r"got 1.0 beside 55.0"),
        (scored(0.9, 2.3), {"validation": "accuracy"}, "got 0.9 beside 2.3"),
        (scored(2.3, 1.9), {}, "the largest, 2.3, is a low accuracy in % or an ordinary loss"),
        (scored(55.2, 61.0, of="tokens"), {}, "taken for losses, and 55.2 would be"),
        (scored(-0.9, -0.8, of="tokens"), {}, "losses in nats are at least 0, got -0.9; give"),
        (scored(-0.9, 0.4), {"validation": "loss"}, "losses in nats are at least 0, got -0.9"),
    ],
)
def test_runs_that_can_not_be_compared_are_refused(runs, options, message):
    with pytest.raises(ValueError, match=message):
        choose(runs, **options)


@pytest.mark.parametrize("score", [None, "0.8", True])
def test_a_score_that_is_no_number_is_refused_by_its_runs_name(score):
    with pytest.raises(TypeError, match="validation score of 'b' must be a number"):
        choose([("a", 1.0, drift()), ("b", score, drift())])
    with pytest.raises(TypeError, match=r"runs must be \(name, validation, Drift\) each"):
        choose([("a", 1.0)])


def test_scores_are_numbers_of_any_kind():
    for kind in (np.float32, torch.tensor):
        runs = [("a", kind(0.8), drift(of="samples")), ("b", kind(0.9), drift(of="samples"))]
        assert choose(runs) == "b"


def test_scores_that_were_said_to_be_odd_are_taken_as_said():
    assert choose(scored(2.3, 1.9), validation="accuracy") == "0"
    assert choose(scored(2.3, 1.9), validation="loss") == "1"
    assert choose(scored(55.2, 61.0, of="tokens"), validation="accuracy") == "1"
    assert choose(scored(55.2, 61.0, of="tokens"), validation="loss") == "0"
    assert choose(scored(0.0, 90.0)) == "1"
    assert choose(scored(-1e-8, 0.1, of="tokens")) == "0"
    assert choose(scored(math.nan, math.inf, 0.7)) == "2"


@pytest.mark.parametrize(
    ("scores", "kind", "message"),
    [
        ((5.4,), "accuracy", "read as accuracies in %, .* the largest, 5.4, as 5.4 % right"),
        ((2.3, 9.1), "accuracy", "pass validation='loss' if they are losses in nats"),
        ((55.2, 61.0), "loss", "the least, 55.2, .* pass validation='accuracy' if"),
        ((0.6, 0.9), "accuracy", None),
        ((61.0, 5.4), "accuracy", None),
        ((0.6, 5.4), "loss", None),
    ],
)
def test_scores_that_could_hardly_be_what_was_said_are_warned_of(scores, kind, message, caplog):
    with caplog.at_level(logging.WARNING, "flowdata"):
        rank(scored(*scores), validation=kind)
    if message is None:
        assert not caplog.text
    else:
        assert re.search(message, caplog.text)


def test_runs_that_diverged_are_named_with_what_is_no_number(caplog):
    runs = [
        ("a", 0.5, drift()),
        ("b", math.nan, drift()),
        ("c", 0.6, drift(math.inf)),
        ("d", math.inf, drift(math.inf)),
    ]
    with caplog.at_level(logging.INFO, "flowdata"):
        assert choose(runs, validation="loss") == "a"
    assert (
        "left out: b diverged: its validation loss is nan; c diverged: its drift (kl) is inf; "
        "d diverged: its validation loss is inf and its drift (kl) is inf"
    ) in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "flowdata"):
        choose([runs[0]], validation="loss")
    assert "left out" not in caplog.text


def test_what_accuracies_are_weighed_with_is_in_a_drifts_repr():
    assert repr(drift(0.0123, cosine=0.98, of="samples")) == (
        "Drift(kl=0.0123, cosine=0.98, agreement=0.9, kept=0.96, samples=64)"
    )
    assert "agreement=0.7, kept=0.7, " in repr(drift(agreement=0.7))


def test_a_number_in_the_place_of_a_drift_is_refused():
    with pytest.raises(TypeError, match=r"runs must be \(name, validation, Drift\), got float"):
        choose([("a", 1.0, 0.1)])


@pytest.mark.parametrize("of", ["tokens", "samples"])
@pytest.mark.parametrize("value", [0.1234567890123456789, 1e-300, math.inf, math.nan])
def test_a_saved_drift_makes_the_same_drift_again(value, of):
    runs = [("a", 0.5, drift(of=of)), ("b", 0.4, drift(value, of=of, per_sample={"kl": ONES}))]
    saved = [(name, score, json.dumps(each.to_dict())) for name, score, each in runs]
    again = [(name, score, Drift(**json.loads(each))) for name, score, each in saved]
    for (*_, before), (*_, after) in zip(runs, again, strict=True):
        assert repr(after.to_dict()) == repr(before.to_dict())
        assert set(after.to_dict()) == {field.name for field in fields(Drift)} - {"per_sample"}
        assert after.kept == before.kept
    assert choose(again) == choose(runs)


def test_what_was_saved_of_a_drift_is_refused_with_how_to_make_one_of_it():
    for saved in (drift().to_dict(), 0.1):
        with pytest.raises(TypeError, match=r"for 'b'; what .* one again: Drift\(\*\*saved\)"):
            choose([("a", 1.0, drift()), ("b", 0.9, saved)])
    printed = drift(math.inf).to_dict() | {"kl": None}  # as the command line writes inf
    with pytest.raises(TypeError, match=r"drift of 'b' must have a number as kl, got None"):
        choose([("a", 1.0, drift()), ("b", 0.9, Drift(**printed))])
