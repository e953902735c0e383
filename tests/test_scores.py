import logging

import datasets
import numpy as np
import pytest
import torch

from flowdata import LossScorer, ScoreMismatchError, Scores, flow_weights
from flowdata.scores import weights_of
from tests import reference


def test_weights_are_those_of_the_losses():
    scores = Scores(torch.tensor([0.5, 1.0, 4.0]))
    assert torch.equal(scores.weights(), flow_weights(scores.losses))
    assert torch.equal(scores.weights(2.0), flow_weights(scores.losses, temperature=2.0))
    assert scores.counts.tolist() == [1, 1, 1]


def test_samples_without_a_loss_raise_or_weigh_nothing():
    scores = Scores(torch.tensor([0.5, torch.nan, 4.0, torch.inf]), torch.tensor([2, 0, 1, 3]))
    assert scores.losses.isnan().tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"2 of 4 samples have no loss.*indices 1, 3; drop them"):
        scores.weights()
    weights = scores.weights(missing="zero")
    assert weights[[1, 3]].tolist() == [0, 0]
    assert torch.equal(weights[[0, 2]], flow_weights(torch.tensor([0.5, 4.0])))
    with pytest.raises(ValueError, match="missing must be 'raise' or 'zero'"):
        scores.weights(missing="ignore")
    with pytest.raises(ValueError, match="none of the 2 samples has a loss"):
        Scores(torch.tensor([torch.nan, torch.nan])).weights(missing="zero")


def test_long_lists_of_missing_samples_are_cut():
    with pytest.raises(ValueError, match=r"8, 9, … \(50 in all\)"):
        Scores(torch.tensor([torch.nan] * 50 + [1.0])).weights()


def test_token_losses_are_those_of_one_sample():
    scores = Scores(
        torch.tensor([1.5, torch.nan, 3.0]),
        torch.tensor([2, 0, 1]),
        token_losses=torch.tensor([1.0, 2.0, 3.0]),
    )
    assert scores.token_losses(0).tolist() == [1.0, 2.0]
    assert scores.token_losses(1).tolist() == []
    assert scores.token_losses(-1).tolist() == [3.0]
    with pytest.raises(IndexError, match="sample 3 of 3"):
        scores.token_losses(3)
    with pytest.raises(ValueError, match="token_losses=True"):
        Scores(torch.ones(2)).token_losses(0)


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_saving_and_loading_keeps_everything(tmp_path, name):
    scores = Scores(
        torch.tensor([1.5, torch.nan]),
        torch.tensor([2, 0]),
        metadata={"details": {"note": "kept"}},
        token_losses=torch.tensor([1.0, 2.0]),
    )
    loaded = Scores.load(scores.save(tmp_path / name))
    assert torch.equal(loaded.losses, scores.losses) or loaded.losses.isnan().tolist() == [0, 1]
    assert loaded.losses[0].item() == 1.5
    assert torch.equal(loaded.counts, scores.counts)
    assert torch.equal(loaded.flat_token_losses, scores.flat_token_losses)
    assert loaded.metadata["details"] == {"note": "kept"}


def test_a_column_is_float32_and_named(tmp_path):
    data = datasets.Dataset.from_dict({"x": [1, 2, 3]})
    scores = Scores(torch.tensor([0.5, 1.0, 4.0]))
    column = scores.to_column(data, "w")
    assert column.features["w"].dtype == "float32"
    np.testing.assert_array_equal(np.float32(column["w"]), scores.weights().numpy())
    assert data.column_names == ["x"]
    with pytest.raises(ValueError, match="has a column 'x' already"):
        scores.to_column(data, "x")
    with pytest.raises(ScoreMismatchError, match="of 3 samples, the data set has 2"):
        scores.to_column(data.select([0, 1]))


def test_a_column_goes_to_the_rows_that_were_scored():
    data = datasets.Dataset.from_dict(
        {"x": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], "labels": [0, 1, 2]}
    )
    data = data.with_format("torch")
    scores = LossScorer(torch.nn.Linear(2, 3), progress=False).score(data)
    assert torch.equal(scores.to_column(data)["weight"][:], scores.weights())
    with pytest.raises(ScoreMismatchError, match="another data set of the same length"):
        scores.to_column(data.select([1, 0, 2]))
    with pytest.raises(TypeError, match="must be a Hugging Face Dataset, got list"):
        scores.to_column([1, 2, 3])


def test_weights_given_directly_are_checked_and_not_copied():
    weights = torch.tensor([1.0, 0.5])
    assert weights_of(weights).data_ptr() == weights.data_ptr()
    array = np.array([1.0, 0.5])
    assert weights_of(array).numpy().__array_interface__["data"] == (array.ctypes.data, False)
    with pytest.raises(ValueError, match=r"weights\[1\] is -0.5"):
        weights_of(torch.tensor([1.0, -0.5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": torch.ones(2, 2)}, r"of shape \(N,\)"),
        ({"losses": torch.ones(0)}, "N > 0"),
        ({"losses": torch.ones(2).long()}, "must be floating"),
        (
            {"losses": torch.ones(2), "counts": torch.ones(3).long()},
            r"counts must have shape \(2,\)",
        ),
        ({"losses": torch.ones(2), "counts": torch.ones(2)}, "counts must be integers from 0 on"),
        ({"losses": torch.ones(2), "counts": torch.tensor([1, -1])}, "torch.int64 with -1"),
        ({"losses": torch.ones(2), "token_losses": torch.ones(3)}, r"token_losses must have shape"),
    ],
)
def test_wrong_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scores(**arguments)


def test_another_data_set_is_refused():
    scores = Scores(torch.ones(3), metadata={"identity": {"dataset": "content:2:abc"}})
    with pytest.raises(ScoreMismatchError, match="the scores are of 3 samples"):
        scores.check_dataset([1, 2])
    with pytest.raises(ScoreMismatchError, match=r"differ in content or order.*dataset_id="):
        scores.check_dataset([1, 2, 3])
    Scores(torch.ones(3), metadata={"identity": {"dataset": "mine"}}).check_dataset([1, 2, 3])


def test_only_finished_stores_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no store at"):
        Scores.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is empty"):
        Scores.load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"is not a flowdata store.*notes.txt"):
        Scores.load(tmp_path)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        Scores.load(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="is not a flowdata store"):
        Scores(torch.ones(2)).save(tmp_path)


def test_further_columns_take_the_losses_place_and_survive_the_store(tmp_path):
    norms = torch.tensor([3.0, 1.0, 2.0])
    scores = Scores(torch.tensor([0.1, 0.2, 0.3]), columns={"gradient_norm": norms})
    loaded = Scores.load(scores.save(tmp_path / "store"))
    assert loaded.columns["gradient_norm"].tolist() == [3.0, 1.0, 2.0]
    torch.testing.assert_close(
        loaded.weights(column="gradient_norm"), torch.exp(-norms / 2.0), rtol=1e-6, atol=0
    )


def test_columns_of_another_shape_or_name_are_refused():
    with pytest.raises(ValueError, match=r"columns\['entropy'\] must have shape \(2,\), got"):
        Scores(torch.ones(2), columns={"entropy": torch.ones(3)})
    scores = Scores(torch.ones(2), columns={"entropy": torch.ones(2)})
    with pytest.raises(ValueError, match=r"column must be 'loss' or one of \['entropy'\]"):
        scores.weights(column="margin")
    with pytest.raises(ValueError, match="column must be 'loss': there is no other, got 'margin'"):
        Scores(torch.ones(2)).weights(column="margin")


def test_ess_weights_are_those_of_flow_weights_relative_to_the_smallest_loss():
    losses = 7 + 0.05 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    weights = Scores(losses).weights("ess0.5")
    assert weights.max() == 1
    assert torch.equal(weights, flow_weights(losses, temperature="ess0.5"))
    gappy = torch.cat([torch.tensor([torch.nan]), losses])
    assert torch.equal(Scores(gappy).weights("ess0.5", missing="zero")[1:], weights)
    column = Scores(torch.zeros(500), columns={"entropy": losses})
    assert torch.equal(column.weights("ess0.5", column="entropy"), weights)


def test_vanishing_weights_are_warned_of_once_over_the_samples_with_a_loss(caplog):
    scores = Scores(torch.tensor([torch.nan, 7.0, 7.1, 7.2, 7.3]))
    for _ in range(3):
        scores.weights(0.01, missing="zero")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "temperature=0.01: the weights of the 4 samples have a mean of 0" in record.message
    assert "pass temperature='ess0.5'" in record.message
    caplog.clear()
    scores.weights("ess0.5", missing="zero")
    scores.weights(1.0, missing="zero", normalize="mean")
    assert caplog.records == []


def test_columns_on_one_line_of_a_program_are_warned_of_one_by_one(caplog):
    values = {"entropy": torch.linspace(7, 8, 50), "gradient_norm": torch.full((50,), 3.0)}
    scores = Scores(torch.linspace(7, 8, 50), columns=values)
    for column in ("loss", "entropy", "gradient_norm"):
        scores.weights(0.01 if column == "loss" else 0.1, column=column)
    assert len(caplog.messages) == 3
    caplog.clear()
    for column in ("loss", "entropy", "entropy", "gradient_norm"):
        scores.weights(0.02, column=column)
    assert len(caplog.messages) == 3
    scores.weights(1.0, column="gradient_norm")
    assert "the gradient_norm values of all 50 samples are 3" in caplog.messages[-1]


def test_what_float32_does_not_hold_is_no_loss():
    wide = torch.tensor([1.0, 1e39, torch.inf, -torch.inf, 2.0], dtype=torch.float64)
    scores = Scores(wide, columns={"entropy": wide})
    for values in (scores.losses, scores.columns["entropy"]):
        assert values.isnan().tolist() == [False, True, True, True, False]
    for column in ("loss", "entropy"):
        with pytest.raises(ValueError, match=f"have no {column} .*in float32.: indices 1, 2, 3;"):
            scores.weights(column=column)
    expected = reference.flow_weights([1.0, 2.0], 1.5)
    weights = scores.weights(missing="zero")
    assert weights[[0, 4]].tolist() == pytest.approx(expected)
    assert weights[1:4].tolist() == [0, 0, 0]


def test_a_column_that_is_large_for_easy_samples_is_refused(caplog):
    columns = {"correct": torch.tensor([1.0, 0.0]), "margin": torch.tensor([1.0, 2.0])}
    scores = Scores(torch.ones(2), columns=columns)
    remedy = r"1 - scores.columns\['correct'\] with flow_weights"
    with pytest.raises(ValueError, match=remedy):
        scores.weights(column="correct")
    with pytest.raises(ValueError, match=remedy):  # whether or not there is such a column
        Scores(torch.ones(2)).weights(column="correct")
    turned = flow_weights(1 - scores.columns["correct"], temperature=0.5)
    assert turned[0] > turned[1]
    caplog.set_level("INFO")
    scores.weights(column="margin")
    assert "column 'margin' takes the loss's place: small values are taken for" in caplog.text


def test_bad_values_of_a_column_are_named_by_its_name_and_their_index():
    margins = torch.tensor([torch.nan, 1.0, -3.0])
    scores = Scores(torch.ones(3), columns={"margin": margins})
    with pytest.raises(ValueError, match=r"margin values\[2\] is -3.0: 1 of 3 margin values are n"):
        scores.weights(column="margin", missing="zero")
    with pytest.raises(ValueError, match=r"losses\[2\] is -3.0: 1 of 3 losses are negative"):
        Scores(margins).weights(missing="zero")


def test_columns_are_not_named_as_what_scores_hold_themselves():
    with pytest.raises(ValueError, match="columns must not be named 'loss'"):
        Scores(torch.ones(2), columns={"loss": torch.ones(2)})
