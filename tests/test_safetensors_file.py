"""Files that are written piece by piece are safetensors files, as the library itself reads them."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from flowdata._common.safetensors_file import _DTYPES, header_of, octets

TENSORS = {
    "of two axes": torch.arange(6, dtype=torch.int64).view(2, 3),
    "none": torch.empty(0),
    "one": torch.tensor(1.5),
    "narrow": torch.tensor([True, False, True]),
}


def content_of(tensors, metadata):
    return header_of(tensors, metadata) + b"".join(map(octets, tensors.values()))


def test_the_library_reads_what_is_written(tmp_path):
    file = tmp_path / "tensors.safetensors"
    file.write_bytes(content_of(TENSORS, {"format": "pt"}))
    with safe_open(file, "pt") as read:
        assert read.metadata() == {"format": "pt"}
        for name, tensor in TENSORS.items():
            assert torch.equal(read.get_tensor(name), tensor)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_every_dtype_is_written_as_the_library_writes_it(dtype):
    tensors = {"ä": torch.arange(4 * dtype.itemsize, dtype=torch.uint8).view(dtype)}
    assert content_of(tensors, {"a": 'b "c"\n'}) == save(tensors, {"a": 'b "c"\n'})


def test_a_dtype_that_files_cannot_hold_is_named():
    with pytest.raises(ValueError, match=r"'a' is torch\.complex128"):
        header_of({"a": torch.zeros(1, dtype=torch.complex128)}, {})
