"""Scores as a table: rows, parts, a data frame, HTML."""

import builtins
import math

import numpy as np
import pandas
import pytest
import torch

from flowdata import FlowWeightedDataset, LossScorer, ScoreMismatchError, Scores
from flowdata.scores.counting import compare_counts
from tests.models import TinyResNet, images, tiny_llama, token_samples


def table():
    """Scores of five samples, one of which could not be read."""
    return Scores(
        torch.tensor([1.0, 2.0, torch.nan, 4.0, 0.5]),
        torch.tensor([2, 1, 0, 3, 1]),
        metadata={
            "identity": {"dataset": "content:2:ab", "num_samples": 5, "loss": "causal_lm"},
            "skipped": {"2": "OSError: torn"},
            "details": {"data": {"source": "rows.jsonl"}, "model": "small"},
        },
        token_losses=torch.tensor([0.5, 1.5, 2.0, 3.0, 4.0, 5.0, 0.5]),
        columns={"entropy": torch.tensor([0.1, 0.2, torch.nan, 0.4, 0.5])},
    )


@pytest.mark.parametrize("index", [1, -4, np.int64(1), torch.tensor(1), np.array(1)])
def test_a_row_has_the_samples_values(index):
    row = table()[index]
    assert row == {"index": 1, "loss": 2.0, "count": 1, "entropy": pytest.approx(0.2)}


def test_the_row_of_a_sample_that_could_not_be_read_says_why():
    row = table()[2]
    assert math.isnan(row["loss"])
    assert row["skipped"] == "OSError: torn"


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(None, None, -1), [4, 3, 2, 1, 0]),
        (slice(-2, None), [3, 4]),
        (slice(0, 99, 2), [0, 2, 4]),
        ([3, 0, 3], [3, 0, 3]),
        ((4, -5), [4, 0]),
        (range(3), [0, 1, 2]),
        (np.array([2, 1]), [2, 1]),
        (torch.tensor([4]), [4]),
        ([True, False, False, True, False], [0, 3]),
        (np.array([False, True, True, False, False]), [1, 2]),
        (torch.tensor([False, False, False, False, True]), [4]),
        (pandas.Series([2, 0]), [2, 0]),
        (pandas.Index([4]), [4]),
        (pandas.Series([True, False, True, False, False]), [0, 2]),
        # Of a frame that was sorted the index tells whose value each is.
        (pandas.Series([True, False, False, True, False], index=[4, 3, 2, 1, 0]), [1, 4]),
    ],
)
def test_a_part_has_the_rows_that_are_selected(selection, chosen):
    whole = table()
    part = whole[selection]
    assert isinstance(part, Scores)
    assert len(part) == len(chosen)
    for place, index in enumerate(chosen):
        assert repr(part[place]) == repr({**whole[index], "index": place})
        assert torch.equal(part.token_losses(place), whole.token_losses(index))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (5, IndexError, "sample 5 of 5: the scores have 5 rows, numbered 0 to 4"),
        (-6, IndexError, "sample -6 of 5"),
        ([0, 7], IndexError, "sample 7 of 5"),
        ([True, False], IndexError, "5 booleans, one for each sample, got 2"),
        (pandas.Series([True] * 5, index=range(1, 6)), IndexError, "an index of 0 to 4"),
        (pandas.Series([0.5]), TypeError, "a list of integers"),
        ([], ValueError, "none of the 5 samples"),
        (slice(3, 3), ValueError, "none of the 5 samples"),
        ([False] * 5, ValueError, "none of the 5 samples"),
        ("loss", TypeError, r"scores\.losses"),
        ("entropy", TypeError, r"scores\.columns\['entropy'\]"),
        (1.0, TypeError, "got 1.0"),
        ([0.5], TypeError, "a list of integers"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
        ([[0, 1]], TypeError, "a list of integers"),
    ],
)
def test_what_is_no_index_is_refused(index, error, message):
    with pytest.raises(error, match=message):
        table()[index]


def test_scores_can_be_passed_over():
    assert [row["count"] for row in table()] == [2, 1, 0, 3, 1]


def test_a_part_is_not_taken_for_the_whole(tmp_path):
    whole = table()
    first, last = whole[:2], whole[-2:]
    assert first.metadata["identity"] != last.metadata["identity"]
    assert first.metadata["identity"]["num_samples"] == 2
    assert "data" not in first.metadata["details"]
    assert whole[[3, 2]].metadata["skipped"] == {"1": "OSError: torn"}
    first.save(tmp_path / "first")
    assert Scores.load(tmp_path / "first").metadata["identity"] == first.metadata["identity"]
    assert len(FlowWeightedDataset(["a", "b"], first)) == 2
    with pytest.raises(ScoreMismatchError):
        FlowWeightedDataset(["a", "b", "c"], first)
    with pytest.raises(ScoreMismatchError):
        last.save(tmp_path / "first")


def test_a_data_frame_has_a_row_for_each_sample(monkeypatch):
    pandas = pytest.importorskip("pandas")
    scores = table()
    frame = scores.to_pandas()
    assert list(frame.columns) == ["loss", "count", "entropy", "skipped"]
    assert frame["loss"].isna().tolist() == [False, False, True, False, False]
    assert frame["count"].dtype == np.int64
    assert frame["skipped"][2] == "OSError: torn"
    frame.loc[0, "loss"] = 9.0  # a frame is the user's own
    assert scores.losses[0] == 1.0
    assert list(scores[:2].to_pandas().columns) == ["loss", "count", "entropy"]
    assert isinstance(frame, pandas.DataFrame)

    real_import = builtins.__import__

    def without_pandas(name, *rest, **options):
        if name == "pandas":
            raise ImportError(name)
        return real_import(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ImportError, match="pip install pandas"):
        scores.to_pandas()


def test_a_notebook_shows_the_ends_of_the_table():
    page = table()._repr_html_()
    assert "Scores of 5 samples, median loss 1.5 nats, 1 without a loss" in page
    assert page.count("<tr>") == 6
    assert "<td>none</td>" in page
    assert "…" not in page
    many = Scores(torch.arange(1, 2001) / 7, columns={"<b>": torch.ones(2000)})
    page = many._repr_html_()
    assert "Scores of 2,000 samples" in page
    assert "<b>" not in page
    assert page.count("<th>…</th><td>…</td><td>…</td><td>…</td>") == 1
    assert "<th>1999</th>" in page
    assert "none" in Scores(torch.tensor([torch.nan]))._repr_html_()


def test_a_part_says_that_it_cannot_be_checked_for_each_data_set(caplog):
    caplog.set_level("INFO", "flowdata")
    dataset = images(12)
    scores = LossScorer(TinyResNet(), progress=False).score(dataset)
    for _ in range(2):
        FlowWeightedDataset([dataset[i] for i in (3, 1)], scores[[1, 3]])
    assert caplog.text.count("a part of others") == 2


KEPT = [5, 2, 7, 11]


@pytest.fixture(scope="module")
def scored_tokens():
    samples = token_samples(12, longest=20)
    return samples, LossScorer(tiny_llama(), progress=False).score(samples)


def test_a_part_fits_the_same_rows_alone(scored_tokens, caplog):
    caplog.set_level("INFO", "flowdata")
    samples, scores = scored_tokens
    part, rows = scores[KEPT], [samples[i] for i in KEPT]
    assert len(FlowWeightedDataset(rows, part)) == 4
    assert "but for the numbers of targets, which agree in 4 of 4" in caplog.text
    here, scored = (int(scores.counts[i]) for i in (7, 2))
    message = f"row 1 has {here} targets, its score was made of {scored} .rows count from 0."
    with pytest.raises(ScoreMismatchError, match=message):
        FlowWeightedDataset([rows[0], rows[2], rows[1], rows[3]], part)


def test_a_part_refuses_rows_that_lost_their_targets(scored_tokens):
    samples, scores = scored_tokens
    rows = [{**samples[i], "labels": torch.full_like(samples[i]["labels"], -100)} for i in KEPT]
    with pytest.raises(ScoreMismatchError, match=r"row 0 has 0 targets.* select rows and scores"):
        FlowWeightedDataset(rows, scores[KEPT])


def test_samples_that_do_not_tell_their_targets_are_not_compared(scored_tokens):
    samples, scores = scored_tokens
    without = [{"input_ids": samples[i]["input_ids"]} for i in KEPT]
    FlowWeightedDataset(without, scores[KEPT])
    padded = [
        {
            name: torch.cat([values, torch.full((3,), 1)])
            for name, values in {**samples[i], "attention_mask": torch.ones(1)}.items()
        }
        for i in KEPT
    ]
    for sample, i in zip(padded, KEPT, strict=True):
        size = len(samples[i]["input_ids"])
        sample["attention_mask"] = (torch.arange(size + 3) < size).long()
    FlowWeightedDataset(padded, scores[KEPT])


def test_a_bounded_number_of_samples_is_compared():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    rows = Counted([{"labels": [1, 2, 3]}] * 10_000)
    counts = torch.full((10_000,), 2)
    assert compare_counts(counts, "causal_lm", rows, skips=False) == rows.reads == 4096
    counts[-1] = 5
    with pytest.raises(ScoreMismatchError, match=r"row 9,999 has 2 targets, .* made of 5"):
        compare_counts(counts, "causal_lm", rows, skips=False)
    assert compare_counts(counts, "callable:ab", rows, skips=False) == 0
    assert compare_counts(counts + 1, "masked_lm", rows[:9_000], skips=False) == 4096


def test_scores_of_more_rows_say_how_to_select_them(scored_tokens):
    samples, scores = scored_tokens
    with pytest.raises(ScoreMismatchError, match=r"of 12 samples.* has 4.* scores\[keep\]"):
        FlowWeightedDataset([samples[i] for i in KEPT], scores)
