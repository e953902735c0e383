"""What is taken for a data set, by index or as a stream, and what is refused with what to do."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, random_split

from flowdata import FlowWeightedDataset, FlowWeightedIterable, LossScorer, Scores
from flowdata._common.data_sets import check_map_style, check_stream

X, Y = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
PAIRS = TensorDataset(X, Y)
ROWS = datasets.Dataset.from_dict({"x": [1.0, 2.0], "y": [0, 1]})

BY_INDEX = {
    "rows": [{"x": 1}],
    "strings": ["a", "b"],
    "tensors": PAIRS,
    "part": Subset(PAIRS, [0]),
    "parts": ConcatDataset([PAIRS, PAIRS]),
    "hugging face": ROWS,
    "column": ROWS["x"],
    "array": np.ones((4, 2)),
    "tensor": X,
    "two tensors": [torch.ones(3, 4), torch.ones(3, 4)],
    "range": range(3),
}
STREAMS = {
    "stream": ROWS.to_iterable_dataset(),
    "set": {1, 2},
    "iterator": iter([1]),
    "loader": DataLoader(PAIRS, batch_size=None),
}
REFUSED = {
    "frame": (pd.DataFrame({"x": [1]}), r"got DataFrame; pass datasets\.Dataset\.from_pandas"),
    "series": (pd.Series([1]), r"got Series; pass its \.tolist"),
    "table": (pa.table({"x": [1]}), r"got Table; pass datasets\.Dataset\(it\)"),
    "columns": ({"x": X, "y": Y}, r"got dict of 'x', 'y'; pass datasets\.Dataset\.from_dict"),
    "splits": (datasets.DatasetDict(train=ROWS, test=ROWS), "'train', 'test'; pass one of them"),
    "stream splits": (
        datasets.IterableDatasetDict(train=ROWS.to_iterable_dataset()),
        "got IterableDatasetDict of 'train'; pass one of them",
    ),
    "list of splits": (random_split(PAIRS, [2, 2]), "pass one of its data sets, or torch"),
    "list of rows": ([ROWS, ROWS], "pass one of its data sets, or torch"),
    "inputs and targets": ((X, Y), "got tuple; pass torch.utils.data.TensorDataset"),
    "arrays": ((X.numpy(), Y.numpy()), "got tuple; pass torch.utils.data.TensorDataset"),
    "path": ("data.jsonl", r"got the str 'data.jsonl'; read the file first"),
    "path object": (Path("data.jsonl"), r"Path 'data.jsonl'; read the file first"),
    "bytes": (b"data", "got the bytes .* read the file first"),
    "class": (TensorDataset, "got the class TensorDataset itself; make one"),
    "model": (nn.Sequential(nn.Linear(2, 2)), "got Sequential; .* the model goes to LossScorer"),
    "loader": (DataLoader(PAIRS, batch_size=2), r"which gives batches; .*loader\.dataset"),
    "nothing": (None, "got NoneType"),
    "number": (3, "got int"),
    "function": (lambda: ROWS, "got function"),
}


@pytest.mark.parametrize("kind", BY_INDEX)
def test_what_gives_its_samples_by_index_is_a_data_set_and_a_stream(kind):
    check_map_style(BY_INDEX[kind])
    check_stream(BY_INDEX[kind])


@pytest.mark.parametrize("kind", STREAMS)
def test_what_gives_its_samples_in_turn_is_a_stream_alone(kind):
    check_stream(STREAMS[kind])
    with pytest.raises(TypeError, match=r"use FlowWeightedIterable|loader\.dataset"):
        check_map_style(STREAMS[kind])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_only_looks_like_a_data_set_is_refused_with_what_to_do(kind):
    data, message = REFUSED[kind]
    scorer = LossScorer(nn.Linear(2, 2), progress=False)
    for call in (
        lambda: scorer.score(data),
        lambda: FlowWeightedDataset(data, torch.ones(2)),
        lambda: FlowWeightedIterable(data, scorer),
    ):
        with pytest.raises(TypeError, match=f"dataset must .*{message}"):
            call()


def test_a_polars_frame_is_refused_with_what_to_do():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"x": [1]})
    for data in (frame, frame.lazy()):
        with pytest.raises(TypeError, match=r"Frame; pass datasets\.Dataset\.from_polars"):
            check_map_style(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ROWS.to_iterable_dataset(), "got IterableDataset; a stream has no order"),
        (datasets.DatasetDict(train=ROWS), "got DatasetDict; pass the split that was scored"),
        (pd.DataFrame({"x": [1, 2]}), r"got DataFrame; .*frame\['weight'\] = scores.weights"),
        (PAIRS, "got TensorDataset; for others use FlowWeightedDataset"),
        ((row for row in ROWS), "got generator; for others use FlowWeightedDataset"),
    ],
)
def test_a_column_needs_all_rows_of_a_hugging_face_data_set(data, message):
    scores = Scores(torch.tensor([1.0, 2.0]))
    with pytest.raises(TypeError, match=f"hf_dataset must be a Hugging Face Dataset, {message}"):
        scores.to_column(data)


@pytest.mark.parametrize(
    ("name", "message"),
    [("x", "has a column 'x' already"), ("", "got ''"), (3, "new column's name, got 3")],
)
def test_a_column_needs_a_name_of_its_own(name, message):
    with pytest.raises(ValueError, match=message):
        Scores(torch.tensor([1.0, 2.0])).to_column(ROWS, name)
