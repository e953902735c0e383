import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from flowdata._common import large_array
from flowdata._common.growing_array import GrowingArray
from flowdata.scoring.plan.lengths import sample_lengths
from flowdata.text.tokens import TokenSamples

NUMBERS = {"b": np.int8, "i": np.int32, "q": np.int64}


@given(
    code=st.sampled_from(sorted(NUMBERS)),
    pieces=st.lists(st.lists(st.integers(-128, 127), max_size=9), max_size=9),
    in_memory=st.sampled_from([0, 16, 2**20]),
)
def test_numbers_stay_as_they_were_added(code, pieces, in_memory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_array, "IN_MEMORY", in_memory)
        numbers = GrowingArray(code)
        for piece in pieces:
            numbers.extend(piece)
        flat = [number for piece in pieces for number in piece]
        assert len(numbers) == len(flat)
        finished = numbers.finish()
    assert finished.dtype == NUMBERS[code]
    assert finished.tolist() == flat
    assert isinstance(finished, np.memmap) == (len(flat) * finished.itemsize > in_memory)


def samples_of(count):
    rows = ([([row % 7, 5, row], np.array([False, True, True]))] for row in range(count))
    return TokenSamples(rows, None)


def test_samples_in_files_are_the_samples(monkeypatch):
    in_memory = samples_of(50)
    monkeypatch.setattr(large_array, "IN_MEMORY", 16)
    in_files = samples_of(50)
    assert isinstance(in_files.input_ids, np.memmap)
    assert in_files.identity() == in_memory.identity()
    assert torch.equal(in_files.lengths, in_memory.lengths)
    assert sample_lengths(in_files).tolist() == [3] * 50
    copies = [pickle.loads(pickle.dumps(in_files)), in_files.part(10, 20), in_files.readable()]
    assert torch.equal(copies[0][7]["labels"], in_memory[7]["labels"])
    assert torch.equal(copies[1][7]["labels"], in_memory[17]["labels"])
    assert torch.equal(copies[2][7]["input_ids"], in_memory[7]["input_ids"])


def test_workers_read_samples_in_files(monkeypatch):
    monkeypatch.setattr(large_array, "IN_MEMORY", 16)
    samples = samples_of(12)
    loaded = list(DataLoader(samples, batch_size=4, num_workers=2))
    ids = torch.cat([batch["input_ids"] for batch in loaded])
    assert ids[:, 2].tolist() == list(range(12))
