import hashlib

import torch

from flowdata._common import large_array
from flowdata.store.packs import checksums, join, places, reorder, restore, split
from tests import reference

COUNTS = torch.tensor([2, 0, 3, 1, 1])
COLUMNS = {
    "loss": torch.arange(5.0),
    "count": COUNTS,
    "token_loss": torch.arange(7.0),
    "entropy": -torch.arange(5.0),
}
ORDER = torch.tensor([4, 2, 0, 1, 3])


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_reordering_takes_every_samples_values_along():
    ordered = reorder(COLUMNS, ORDER)
    assert equal(ordered, reference.reordered_columns(COLUMNS, ORDER.tolist()))
    assert equal(reorder(ordered, ORDER.argsort()), COLUMNS)


def test_packs_are_put_in_the_order_of_the_data_set(monkeypatch):
    sizes = torch.tensor([2, 0, 3])
    packs = list(
        zip(ORDER.split(sizes.tolist()), split(reorder(COLUMNS, ORDER), sizes), strict=True)
    )
    assert equal(restore(lambda: packs, 5), COLUMNS)
    assert equal(restore(lambda: reversed(packs * 2), 5), COLUMNS)  # some of them twice
    monkeypatch.setattr(large_array, "IN_MEMORY", 16)
    assert equal(restore(lambda: packs, 5), COLUMNS)


def test_packs_are_cut_and_joined():
    sizes = torch.tensor([2, 3])
    first, second = split(COLUMNS, sizes)
    assert first["token_loss"].tolist() == [0, 1]
    assert second["token_loss"].tolist() == [2, 3, 4, 5, 6]
    assert equal(join([first, second]), COLUMNS)


def test_places():
    assert places(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 1])).tolist() == [5, 6, 9]


def test_a_checksum_is_of_one_packs_bytes_number_and_key():
    sizes, key = torch.tensor([2, 3]), "ab" * 32
    whole = checksums(COLUMNS, sizes, key)
    for pack, columns in enumerate(split(COLUMNS, sizes)):
        digest = hashlib.blake2b(digest_size=8, key=bytes.fromhex(key))
        digest.update(pack.to_bytes(8, "little"))
        for name in ("count", "entropy", "loss", "token_loss"):
            digest.update(columns[name].numpy().tobytes())
        assert whole[pack].item() == int.from_bytes(digest.digest(), "little", signed=True)
    assert (checksums(COLUMNS, sizes, "cd" * 32) != whole).all()
    changed = {**COLUMNS, "token_loss": COLUMNS["token_loss"].clone()}
    changed["token_loss"][0] += 1
    assert (checksums(changed, sizes, key) != whole).tolist() == [True, False]
