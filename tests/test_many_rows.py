"""The rows of `python -m benchmarks many_rows`."""

import json

from benchmarks.many_rows import make_model, write_rows
from flowdata.text import load_tokenizer, read_rows, tokenize_rows


def test_rows_are_short_and_no_two_are_alike(tmp_path):
    make_model(tmp_path)
    file = tmp_path / "rows.jsonl"
    write_rows(file, 3000)
    assert len(set(file.read_text().splitlines())) == 3000
    rows = read_rows(str(file), streaming=True, limit=50)
    samples = tokenize_rows(rows, load_tokenizer(str(tmp_path)), template=False)
    assert samples.lengths.tolist() == [9] * 50
    assert samples.num_targets == 50 * 3
    assert json.loads(file.read_text().splitlines()[1]) == {"prompt": "9e3779", "completion": "07"}
